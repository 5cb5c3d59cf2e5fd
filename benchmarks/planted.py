"""Does `bench_formats` find an artificial difference, and report a tie without one? `OMP_NUM_THREADS=1 python benchmarks/planted.py`

Whole networks. `bench_formats` compares an arm that wastes 5 % of a step's time, and one that wastes nothing, with the baseline, on idle
cores, and with a process that computes on the same cores every other three seconds. Writes results/planted.json."""
import contextlib, statistics, time
import torch
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.bench import bench_formats
from fastxtend_cl.cli import model_step
from common import busy, paired, save

def wasting(step, share, seconds):
    "An arm that computes for `share` of `seconds` of CPU time before the step"
    a = torch.randn(64, 64)
    def f():
        end = time.thread_time()+share*seconds
        while time.thread_time()<end: a@a
        return step.run(keep='loss')
    return lambda step: f

def measure(name, load, step, one, seconds, seed):
    "The results of `bench_formats` for both arms"
    with busy(rest=3.) if load else contextlib.nullcontext():
        res = bench_formats(step, {'5 % more': wasting(step, 0.05, one), 'the same': wasting(step, 0, one)}, seconds=seconds, seed=seed, bar=False)
    row = dict(model=name, load=load, noise=res.noise, arms={r.arm: (r.verdict, r.ratio, r.low, r.high) for r in res.rows[2:]},
        pairs=res.baseline.pairs, seconds=res.seconds)
    print(name, 'load' if load else 'quiet', row['arms'], 'noise', res.noise, flush=True)
    return row

@call_parse
def main(
    names:str='resnet18,mobilenet_v2', # torchvision models, separated by commas
    bs:int=4, # Images a batch
    size:int=96, # Pixels
    seconds:float=60, # Of a measurement
    repeats:int=1, # How often each is measured
    tiny:bool=False, # Small and short; writes nothing
):
    "Measure and write benchmarks/results/planted.json"
    if tiny: names,bs,size,seconds,repeats = 'mobilenet_v2',2,32,4,1
    rows = []
    for name in progress_bar(names.split(',')):
        step = model_step(name, bs, size, 10, 'cpu')
        with step.preserved(): one = statistics.median(paired({'': lambda: step.run(keep='loss')}, 3, 4)[''].cpu.values())
        rows += [measure(name, load, step, one, seconds, i) for load in (False, True) for i in range(repeats)]
    if not tiny: save('planted', rows=rows, bs=bs, size=size, seconds=seconds)
