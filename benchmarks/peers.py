"""One training step of twelve networks by each known method, side by side: `python benchmarks/peers.py`

Every arm is a `Learner` of its own with the same weights and batch, timed by `Learner.one_batch` with the independent
harness of common.py.
Peers whose packages are not installed are their published few lines; the rows say which. Writes
results/peers-DEVICE.json and .md after each network and goes on where it was broken off. `--tiny` tries the script."""
import gc, statistics, warnings
warnings.simplefilter("ignore", FutureWarning) # torch's own, when fastai.vision is imported
from functools import partial
import torch, torchvision
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import (AMPMode, Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper,
    TensorCategory, TensorImage, TensorMask, create_unet_model, to_device)
from fastcore.script import call_parse
import fastxtend_cl.all
from fastxtend_cl import cli
from fastxtend_cl.memory import kept_memory # of the harness, the one thing that is ours: else page faults decide
from common import conditions, geometric, interleave, interval, kept_rows, results, save

models = {'resnet18': (16, 3, 128, 128), 'resnet50': (8, 3, 128, 128), 'mobilenet_v2': (16, 3, 128, 128),
    'mobilenet_v3_large': (16, 3, 128, 128), 'efficientnet_b0': (16, 3, 128, 128),
    'regnety_004': (16, 3, 128, 128), 'densenet121': (8, 3, 128, 128), 'convnext_atto': (16, 3, 128, 128),
    'ghostnet_100': (16, 3, 128, 128), 'shufflenet_v2_x1_0': (16, 3, 128, 128),
    'unet_resnet18': (4, 3, 128, 128), 'r3d_18': (2, 3, 8, 56, 56)}
base,again,ours,ours_fp32 = 'contiguous fp32','contiguous fp32, again','ours: to_channelslast()','ours: to_channelslast(use_amp=False)'

def model_of(name, shape):
    if name=='unet_resnet18': return create_unet_model(torchvision.models.resnet18, 10, shape[-2:], pretrained=False)
    return cli.model_of(name, 1000)

def learner(name, shape, device, batches=1):
    "A Learner of random images, with as many training batches as asked for"
    torch.manual_seed(0)
    mask = name.startswith('unet')
    target = lambda i: TensorMask(torch.randint(10, shape[2:])) if mask else TensorCategory(i%10)
    ds = [(TensorImage(torch.randn(shape[1:])),target(i)) for i in range(shape[0])]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = model_of(name, shape)
    return Learner(DataLoaders.from_dsets(ds*batches, ds, bs=shape[0], num_workers=0, device=device, shuffle=False),
        model.to(device), loss_func=CrossEntropyLossFlat(axis=1 if mask else -1), lr=1e-6,
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))

class ConvertInputs(Callback):
    order = -1
    def before_batch(self):
        self.learn.xb = tuple(x.contiguous(memory_format=torch.channels_last if x.ndim==4 else torch.channels_last_3d)
            for x in self.xb)

def mixed(learn): # what `to_channelslast` of fastai and fastxtend adds; its autocast is CUDA's, whatever the device
    learn.add_cb(MixedPrecision(AMPMode.FP16))
def as_fastai(learn, device): learn.add_cb(ChannelsLast()); mixed(learn)
def as_fastxtend(learn, device): learn.model.to(memory_format=torch.channels_last); learn.add_cb(ConvertInputs()); mixed(learn)
def as_composer(learn, device): learn.model.to(memory_format=torch.channels_last)
def compiled(learn, device): learn.model.compile()
def compiled_ours(learn, device): learn.to_channelslast().model.compile()

def autotuned(learn, device):
    if device.type!='cuda': raise RuntimeError('its requirements are not met: it tunes on CUDA only')
    from pytorch_autotune import autotune
    x,y = to_device(learn.dls.train.one_batch(), device)
    res = autotune(learn.model, (x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)), optimizer='adamw', budget='fast', cache=False)
    return lambda: res.step(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))

# name: (set-up, what ran)
arms = {base: (lambda learn, device: None, ''), again: (lambda learn, device: None, ''),
    "fastai's to_channelslast()": (as_fastai, 'its callbacks'),
    "fastxtend's to_channelslast()": (as_fastxtend, 'reimplemented: model and inputs'),
    "Composer's channels last": (as_composer, 'reimplemented: model.to(memory_format=channels_last)'),
    'pytorch-autotune': (autotuned, 'pytorch_autotune 2.0'), 'torch.compile': (compiled, 'model.compile()'),
    ours_fp32: (lambda learn, device: learn.to_channelslast(use_amp=False), ''),
    ours: (lambda learn, device: learn.to_channelslast(), ''), 'ours: to_channelslast(), compiled': (compiled_ours, '')}

def ready(learn, device):
    "A function that trains `learn` on its first batch, as inside of a fit"
    batch = learn.dls.train.one_batch()
    learn.create_opt()
    learn.dl,learn.n_iter,learn.n_epoch,learn.iter,learn.training = learn.dls.train,1,1,0,True
    for o in learn.cbs.filter(lambda o: o.name in ('recorder','progress')): learn.remove_cb(o)
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    learn.model.train()
    def step():
        learn.one_batch(0, batch)
        if device.type=='cuda': torch.cuda.synchronize(device)
    return step

def stepper(name, shape, device, setup):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(name, shape, device)
        own = setup(learn, device)
        step = own if callable(own) and not isinstance(own, Learner) else ready(learn, device)
        for _ in range(3): step() # a first failure shows here, and compiling is done
    return step

def measure(name, shape, device, rounds, block, compile=True):
    "Rows of one network"
    steps,rows = {},[]
    for arm,(setup,what) in arms.items():
        if 'compile' in arm and not compile: continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: steps[arm] = stepper(name, shape, device, setup)
            except Exception as e:
                if arm in (base, again): raise
                rows.append(dict(model=name, arm=arm, what=what, failed=f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'[:200]))
    with warnings.catch_warnings(), kept_memory():
        warnings.simplefilter('ignore')
        for step in steps.values(): step()
        seconds = interleave(steps, rounds, block)
    for arm,s in seconds.items():
        rows.append(dict(model=name, shape=list(shape), arm=arm, what=arms[arm][1], ms=1e3*statistics.median(s),
            ratio=interval([b/a for a,b in zip(s, seconds[base])])))
    del steps
    gc.collect()
    return rows

def table(rows):
    "Markdown: a row for each network, a column for each arm"
    names,kinds = (list(dict.fromkeys(r['model'] for r in rows)),
        list(dict.fromkeys(r['arm'] for r in rows if r['arm']!=base and 'failed' not in r)))
    found = {(r['model'],r['arm']): r for r in rows if 'ratio' in r}
    def cell(r): return '' if r is None else '{:.2f} ({:.2f} to {:.2f})'.format(*r['ratio'])
    lines = ([f"| {' | '.join(['', *kinds])} |", f"|---|{'--:|'*len(kinds)}"]
        + [f"| {' | '.join([n, *(cell(found.get((n, k))) for k in kinds)])} |" for n in names])
    means = [geometric(r['ratio'][0] for n in names if (r := found.get((n, k)))) for k in kinds]
    whole = [f'{m:.2f}' if all((n, k) in found for n in names) else '' for k,m in zip(kinds, means)]
    failed = {}
    for r in rows:
        if 'failed' in r: failed.setdefault((r['arm'],r['failed']), []).append(r['model'])
    notes = [f"- {arm}: {why} ({'all' if len(of)==len(names) else ', '.join(of)})" for (arm,why),of in failed.items()]
    return '\n'.join([*lines, f"| geometric mean | {' | '.join(whole)} |", '', *notes])

def write(name, rows, **kw):
    save(name, rows=rows, **kw)
    c = conditions()
    (results/f'{name}.md').write_text(f"Times as fast as contiguous fp32 (95 % interval). {c['gpu'] or c['cpu']}, "
        f"{c['cores']} threads, torch {c['torch']}, fastai {c['fastai']}, {c['date']}.\n\n{table(rows)}\n")

@call_parse
def main(
    names:str=','.join(models), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    no_compile:bool=False, # Leave the compiled arms out
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/peers-DEVICE.json and .md"
    device = torch.device(device)
    asked = dict(rounds=rounds, block=block)
    rows = kept_rows(f'peers-{device.type}', asked, tiny)
    for name in names.split(','):
        if any(r['model']==name for r in rows): continue
        shape = (2, 3, *((4, 32, 32) if name=='r3d_18' else (32, 32))) if tiny else models[name]
        for r in measure(name, shape, device, rounds, block, not no_compile):
            rows.append(r)
            print(f"{r['model']:20}{r['arm']:38}"
                + (r['failed'] if 'failed' in r else '{:9.1f} ms  {:.2f} ({:.2f} to {:.2f})'.format(r['ms'], *r['ratio'])), flush=True)
        if not tiny: write(f'peers-{device.type}', rows, **asked)
    if tiny: print(table(rows))
