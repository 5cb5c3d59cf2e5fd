"""Is a planted difference found, and a planted zero called a tie? `python benchmarks/planted.py`

Whole networks. An arm that wastes 5 % of a step's time, and one that wastes nothing, are told from the present by `bench_formats`;
quiet, and with a busy process on another core. Writes results/planted.json. `--tiny` tries the script."""
import contextlib, statistics, time
import torch
from fastcore.script import call_parse
from fastxtend_cl.bench import bench_formats
from fastxtend_cl.cli import model_step
from common import busy, interleave, save

def wasting(step, share, seconds):
    "An arm: the step, and `share` of `seconds` of CPU work before it"
    a = torch.randn(64, 64)
    def f():
        end = time.thread_time()+share*seconds
        while time.thread_time()<end: a@a
        return step.run(keep='loss')
    return lambda step: f

@call_parse
def main(
    names:str='resnet18,mobilenet_v2,densenet121', # torchvision models, separated by commas
    bs:int=8, size:int=128,
    seconds:float=60, # Of a measurement
    repeats:int=2, # How often each is measured
    tiny:bool=False, # Small and short; writes nothing
):
    "Measure and write benchmarks/results/planted.json"
    if tiny: names,bs,size,seconds,repeats = 'mobilenet_v2',2,32,4,1
    rows = []
    for name in names.split(','):
        step = model_step(name, bs, size, 10, 'cpu')
        with step.preserved(): one = statistics.median(interleave({'': lambda: step.run(keep='loss')}, 3, 4, progress=False)[''])
        for load in (False, True):
            for i in range(repeats):
                with busy(rest=3.) if load else contextlib.nullcontext():
                    res = bench_formats(step, {'5 % more': wasting(step, 0.05, one), 'the same': wasting(step, 0, one)},
                        seconds=seconds, seed=i, bar=False)
                rows.append(dict(model=name, load=load, noise=res.noise,
                    arms={r.arm:(r.verdict, r.ratio, r.low, r.high) for r in res.rows[2:]},
                    pairs=res.baseline.pairs, seconds=res.seconds))
                print(name, 'load' if load else 'quiet', rows[-1]['arms'], 'noise', res.noise, flush=True)
    if not tiny: save('planted', rows=rows, bs=bs, size=size, seconds=seconds)
