"""Each repair on whole training steps, paired: channels last as it is, once more (the noise), and with one remedy in all
the layers that a trace names

Writes results/repairs-DEVICE.json after each model, and goes on where it was broken off. Ratios above 1: the repaired
step is faster."""
import statistics, warnings
import torch, torchvision
from fastai.layers import NormType
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from fastcore.script import call_parse
from fastxtend_cl.amp import amp_dtypes, native_amp_mode
from fastxtend_cl.repair import candidates, repair_layer, unrepair_format
from fastxtend_cl.step import TrainingStep
from fastxtend_cl.trace import trace_format
from common import interleave, interval, kept_rows, save

def circular(model):
    "Every padded convolution pads circularly, as for panoramas and textures"
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d) and max(m.padding):
            m.padding_mode,m._reversed_padding_repeated_twice = 'circular',[p for p in m.padding for _ in range(2)]
    return model

def unet(size, **kw): return create_unet_model(torchvision.models.resnet18, 4, (size, size), pretrained=False, **kw)

models = {**{n:(lambda size, n=n: torchvision.models.get_model(n))
    for n in ('shufflenet_v2_x1_0', 'shufflenet_v2_x2_0', 'efficientnet_b0', 'mobilenet_v3_large',
        'squeezenet1_1', 'densenet121')},
    'inception_v3': lambda size: torchvision.models.inception_v3(aux_logits=False, init_weights=False),
    'resnet18 circular': lambda size: circular(torchvision.models.resnet18()),
    'xresnet34 self-attention': lambda size: xresnet.xresnet34(n_out=1000, sa=True),
    'unet resnet18': unet, 'unet resnet18 self-attention': lambda size: unet(size, self_attention=True),
    'unet resnet18 instance norm': lambda size: unet(size, norm_type=NormType.Instance)}

def step_of(name, bs, size, device, autocast):
    torch.manual_seed(0)
    model = models[name](size)
    y,loss = ((torch.randint(0, 4, (bs, size, size)),CrossEntropyLossFlat(axis=1)) if 'unet' in name
        else (torch.randint(0, 10, (bs,)),torch.nn.functional.cross_entropy))
    return TrainingStep(model.to(device), torch.randn(bs, 3, size, size, device=device), y.to(device), loss, autocast=autocast)

def steppers(step, todo, device):
    "For each arm a step; an arm changes the model in its first step, which is dropped"
    now = []
    def arm(name):
        def run():
            if now!=[name]:
                unrepair_format(step.model)
                for m in todo.get(name, {}).values(): repair_layer(m, name)
                now[:] = [name]
            step.run(keep='loss')
            if device.type=='cuda': torch.cuda.synchronize(device)
        return run
    return {n:arm(n) for n in ('as it is', 'as it is, again', *todo)}

def rows_of(name, precision, step, device, rounds, block):
    bs = len(step.inputs[0])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        todo = candidates(trace_format(step), step.model)
    rows = []
    with step.preserved():
        step.convert('channels_last')
        seconds = interleave(steppers(step, todo, device), rounds, block) if todo else {}
    for arm,s in seconds.items():
        rows.append(dict(model=name, bs=bs, precision=precision, arm=arm, layers=len(todo.get(arm, ())),
            ms=1e3*statistics.median(s), ratio=interval([a/b for a,b in zip(seconds['as it is'], s)])))
        print('{model:30}{precision:6}{arm:18}{layers:4} layers {ms:9.1f} ms'.format(**rows[-1])
            + '{:8.3f} ({:.3f} to {:.3f})'.format(*rows[-1]['ratio']), flush=True)
    return rows or [dict(model=name, bs=bs, precision=precision, arm='nothing to repair', layers=0, ms=None, ratio=None)]

@call_parse
def main(
    names:str=','.join(models), # Models, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    bs:int=8, # A quarter of it for unets
    size:int=128,
    rounds:int=15, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    tiny:bool=False, # Small and short, to try the script; nothing is written
):
    "Measure and write benchmarks/results/repairs-DEVICE.json"
    if tiny: bs,size,rounds,block = 2,96,2,2
    device = torch.device(device)
    mode = native_amp_mode(device)
    asked = dict(bs=bs, size=size, rounds=rounds, block=block)
    rows = kept_rows(f'repairs-{device.type}', asked, tiny)
    for name in names.split(','):
        for precision,dtype in {'fp32': None, **({mode.value: amp_dtypes[mode]} if mode else {})}.items():
            if any((r['model'],r['precision'])==(name, precision) for r in rows): continue
            rows += rows_of(name, precision, step_of(name, max(2, bs//4) if 'unet' in name else bs, size, device, dtype),
                device, rounds, block)
            if not tiny: save(f'repairs-{device.type}', rows=rows, **asked)
