"""Is it faster than other tools? One training step of twelve networks with each known method: `OMP_NUM_THREADS=1 python benchmarks/peers.py`

Every arm has its own `Learner` with the same weights and batch, timed by `Learner.one_batch`, with memory kept for all. The few published
lines of a tool are used if its package is not installed; the rows say where.
Writes results/peers-DEVICE.json and .md after each network and continues where it was interrupted."""
import gc, warnings
import torch
from fastai.vision.all import Callback, to_device
from fastcore.script import call_parse
from fastxtend_cl.layout import as_channels_last
from fastxtend_cl.memory import kept_memory # else page faults decide
from fastxtend_cl.timing import why_failed
from common import Results, cell, compared, geometric, machine, markdown, paired
from networks import as_fastai, learner, mixed, models, ready, shape_of

base,again = 'contiguous fp32','contiguous fp32, again'

class ConvertInputs(Callback):
    order = -1
    def before_batch(self): self.learn.xb = tuple(map(as_channels_last, self.xb))

def to_last(learn): learn.model.to(memory_format=torch.channels_last)

def as_fastxtend(learn):
    to_last(learn)
    learn.add_cb(ConvertInputs())
    mixed(learn)

def compiled_ours(learn): learn.to_channelslast().model.compile()

def autotuned(learn):
    if learn.dls.device.type!='cuda': raise RuntimeError('its requirements are not met: it tunes on CUDA only')
    from pytorch_autotune import autotune
    x,y = (o.as_subclass(torch.Tensor) for o in to_device(learn.dls.train.one_batch(), learn.dls.device))
    res = autotune(learn.model, (x, y), optimizer='adamw', budget='fast', cache=False)
    return lambda: res.step(x, y)

# Name to a set-up, which may return a step of its own, and what ran
arms = {base: (lambda learn: None, ''), again: (lambda learn: None, ''), "fastai's to_channelslast()": (as_fastai, 'its callbacks'),
    "fastxtend's to_channelslast()": (as_fastxtend, 'reimplemented: model and inputs'),
    "Composer's channels last": (to_last, 'reimplemented: model.to(memory_format=channels_last)'),
    'pytorch-autotune': (autotuned, 'pytorch_autotune 2.0'), 'torch.compile': (lambda learn: learn.model.compile(), 'model.compile()'),
    'ours: to_channelslast(use_amp=False)': (lambda learn: learn.to_channelslast(use_amp=False) and None, ''),
    'ours: to_channelslast()': (lambda learn: learn.to_channelslast() and None, ''), 'ours: to_channelslast(), compiled': (compiled_ours, '')}

def stepper(name, shape, device, setup):
    "A function that trains one step"
    learn = learner(name, shape, device)
    step = setup(learn) or ready(learn)
    for _ in range(3): step() # a first failure shows here, and compiling is done
    return step

def measure(name, shape, device, rounds, block, compile=True):
    "Rows of one network"
    steps,rows = {},[]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for arm,(setup,what) in arms.items():
            if 'compile' in arm and not compile: continue
            try: steps[arm] = stepper(name, shape, device, setup)
            except Exception as e:
                if arm in (base, again): raise
                rows.append(dict(model=name, arm=arm, what=what, failed=why_failed(e)[:200]))
        with kept_memory():
            for step in steps.values(): step()
            found = compared(paired(steps, rounds, block, device, bar=True))
    gc.collect()
    return rows+[dict(model=name, shape=list(shape), what=arms[r['arm']][1], **r) for r in found]

def table(rows):
    "Markdown: a row for each network, a column for each arm, and what failed"
    names = [*dict.fromkeys(r['model'] for r in rows)]
    kinds = [*dict.fromkeys(r['arm'] for r in rows if r['arm']!=base and 'failed' not in r)]
    found,failed = {(r['model'],r['arm']): r['ratio'] for r in rows if 'ratio' in r},{}
    def mean(k): return f'{geometric(found[n, k][0] for n in names):.2f}' if all((n, k) in found for n in names) else ''
    lines = [[n, *(cell(found.get((n, k))) for k in kinds)] for n in names]+[['geometric mean', *map(mean, kinds)]]
    for r in rows:
        if 'failed' in r: failed.setdefault((r['arm'],r['failed']), []).append(r['model'])
    notes = [f"- {arm}: {why} ({'all' if len(of)==len(names) else ', '.join(of)})" for (arm,why),of in failed.items()]
    return '\n'.join([markdown(['', *kinds], lines), '', *notes])

def page(rows, c=None): return f'Times as fast as contiguous fp32 (95 % interval). {machine(c)}.\n\n{table(rows)}'

@call_parse
def main(
    names:str=','.join(models), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    no_compile:bool=False, # Leave the compiled arms out
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/peers-DEVICE.json and .md"
    found = Results(f'peers-{device}', names, refresh, tiny, page=page, rounds=rounds, block=block)
    for name in found: found.add(*measure(name, shape_of(name, tiny), torch.device(device), rounds, block, not no_compile))
    print(table(found.rows))
