"The networks that the benchmarks share, and a Learner for each"
import time, warnings
from functools import partial
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch, torchvision
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import (AMPMode, Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, TensorCategory, TensorImage,
    TensorMask, create_unet_model)
import fastxtend_cl.all
from fastxtend_cl import cli
from fastxtend_cl.ways import crashing_layers

# Name to the shape of a batch: twelve on which the package was developed, and others that nothing was fitted to
models = {'resnet18': (16, 3, 128, 128), 'resnet50': (8, 3, 128, 128), 'mobilenet_v2': (16, 3, 128, 128),
    'mobilenet_v3_large': (16, 3, 128, 128), 'efficientnet_b0': (16, 3, 128, 128), 'regnety_004': (16, 3, 128, 128),
    'densenet121': (8, 3, 128, 128), 'convnext_atto': (16, 3, 128, 128), 'ghostnet_100': (16, 3, 128, 128),
    'shufflenet_v2_x1_0': (16, 3, 128, 128), 'unet_resnet18': (4, 3, 128, 128), 'r3d_18': (2, 3, 8, 56, 56)}
others = {'mobilenetv4_conv_small': (16, 3, 128, 128), 'mnasnet_100': (16, 3, 128, 128), 'regnetx_004': (16, 3, 128, 128),
    'mc3_18': (2, 3, 8, 56, 56), 'edgenext_xx_small': (16, 3, 128, 128), 'repvgg_a0': (16, 3, 128, 128)}
shapes = models | others

def shape_of(name, tiny=False):
    if not tiny: return shapes[name]
    return (2, 3, 4, 32, 32) if len(shapes[name])==5 else (2, 3, 32, 32)

def model_of(name, shape):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if name=='unet_resnet18': return create_unet_model(torchvision.models.resnet18, 10, shape[-2:], pretrained=False)
        return cli.model_of(name, 1000)

def learner(name, shape, device, batches=1):
    "A Learner of random images, with as many training batches as asked for"
    torch.manual_seed(0)
    mask = name.startswith('unet')
    target = lambda i: TensorMask(torch.randint(10, shape[2:])) if mask else TensorCategory(i%10)
    ds = [(TensorImage(torch.randn(shape[1:])),target(i)) for i in range(shape[0])]
    return Learner(DataLoaders.from_dsets(ds*batches, ds, bs=shape[0], num_workers=0, device=device, shuffle=False),
        model_of(name, shape).to(device), loss_func=CrossEntropyLossFlat(axis=1 if mask else -1), lr=1e-6,
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))

def ready(learn):
    "A function that trains `learn` on its first batch, as inside of a fit"
    batch = learn.dls.train.one_batch()
    learn.create_opt()
    learn.dl,learn.n_iter,learn.n_epoch,learn.iter,learn.training = learn.dls.train,1,1,0,True
    for o in learn.cbs.filter(lambda o: o.name in ('recorder','progress')): learn.remove_cb(o)
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    learn.model.train()
    return partial(learn.one_batch, 0, batch)

def mixed(learn): # what `to_channelslast` of fastai and fastxtend adds; its autocast is CUDA's, whatever the device
    learn.add_cb(MixedPrecision(AMPMode.FP16))

def refuse_crashing(learn):
    "Raise if torch's own kernels could crash in channels last"
    if learn.dls.device.type=='cpu' and (layers := crashing_layers(learn.model)):
        raise RuntimeError(f'not run: the kernels of {layers[0]} can crash the process (oneDNN issue 6035)')

def as_fastai(learn):
    "What fastai's own `to_channelslast` does"
    learn.add_cb(ChannelsLast())
    mixed(learn)

class Times(Callback):
    "Seconds of each training step, by the clock of the wall and of the thread's CPU time"
    order = -100 # before the batch is converted
    def __init__(self): self.wall,self.cpu = [],[]
    def before_batch(self): self.start = time.perf_counter(),time.thread_time()
    def after_batch(self):
        if not self.training: return
        if self.learn.dls.device.type=='cuda': torch.cuda.synchronize()
        for to,now,start in zip((self.wall,self.cpu), (time.perf_counter(),time.thread_time()), self.start): to.append(now-start)
