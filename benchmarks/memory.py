"""How much memory do tuned kernels need, and what is gained if the CPU's allocator keeps freed memory?
`OMP_NUM_THREADS=1 python benchmarks/memory.py`

Each arm trains in its own processes, in turns. CPU time of the steps, page faults a step and the largest resident
set are recorded. `tuned, cold` measures with an empty cache, so that its peak includes verification and timing; the others use the
choices that it saved. `kept` keeps freed memory, as `to_channelslast()` does by default.
Writes results/memory-cpu.json and .md after each network and continues where it was interrupted."""
import contextlib, json, resource, statistics, tempfile, time
import torch
from fastcore.script import call_parse
from fastxtend_cl.memory import can_keep_memory, kept_memory
from fastxtend_cl.step import TrainingStep
from common import Results, geometric, machine, markdown, run_child
from networks import model_of, shape_of

# Precision, tuned, memory kept
arms = {'channels last fp32': (None, False, False), 'bf16': (torch.bfloat16, False, False), 'tuned, cold': (torch.bfloat16, True, False),
    'tuned': (torch.bfloat16, True, False), 'tuned, kept': (torch.bfloat16, True, True)}

def step_of(name, shape, dtype, tuned):
    "A step of training with AdamW, from a fixed seed, in channels last"
    torch.manual_seed(0)
    model = model_of(name, shape)
    y = torch.randint(10, (shape[0], *(shape[2:] if name.startswith('unet') else ())))
    step = TrainingStep(model, torch.randn(shape), y, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters(), lr=1e-6),
        autocast=dtype, tuned=tuned)
    step.convert('channels_last')
    return step

def usage(): return resource.getrusage(resource.RUSAGE_SELF)

def in_process(name, shape, arm, steps):
    "Train one arm in this process"
    dtype,tuned,keep = arms[arm]
    step,times,faults = step_of(name, shape, dtype, tuned),[],[]
    with kept_memory() if keep else contextlib.nullcontext():
        for _ in range(steps):
            before,start = usage().ru_minflt,time.thread_time()
            step.run(keep='loss')
            times.append(time.thread_time()-start); faults.append(usage().ru_minflt-before)
    half = steps//2
    return dict(ms=1e3*statistics.median(times[half:]), faults=statistics.median(faults[half:]), mib=usage().ru_maxrss/1024)

def measure(name, steps, turns, tiny):
    "Rows of a network: the medians over `turns` processes"
    found = {a: [] for a in arms}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as cache:
            for arm in arms: found[arm].append(run_child(__file__, cache, names=name, child=arm, steps=steps, tiny=tiny))
    rows = {a: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for a,rs in found.items()}
    return dict(model=name, shape=list(shape_of(name, tiny)), rows=rows, each=found)

def table(found):
    "Markdown"
    def gain(f): return f['rows']['tuned']['ms']/f['rows']['tuned, kept']['ms']
    def mean(key, a, b): return f"{geometric(f['rows'][a][key]/f['rows'][b][key] for f in found):.3f}"
    rows = [[f['model'], *(f"{f['rows'][a]['ms']:.0f}" for a in arms), *(f"{f['rows'][a]['mib']:,.0f}" for a in arms), f'{gain(f):.2f}'] for f in found]
    return '\n'.join([markdown(['', *(f'{a}, {unit}' for unit in ('ms', 'MiB') for a in arms), 'keeping gains'], rows), '',
        f'Geometric means of {len(found)} networks: keeping memory makes a tuned step {geometric(map(gain, found)):.3f} times as fast. '
        f"The largest resident set of tuned training is {mean('mib', 'tuned', 'bf16')} times that of untuned, "
        f"{mean('mib', 'tuned, cold', 'bf16')} while it tunes."])

def page(found): return f'{machine()}; CPU time.\n\n{table(found)}'

@call_parse
def main(
    names:str='mobilenet_v2,efficientnet_b0,resnet50,r3d_18', # Networks of networks.py, separated by commas
    steps:int=8, # Steps of a process; the second half counts
    turns:int=1, # Processes of each arm
    child:str=None, # Train this arm in this process and write nothing
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/memory-cpu.json and .md"
    if child: return print(json.dumps(in_process(names, shape_of(names, tiny), child, steps)))
    if not can_keep_memory(): raise SystemExit("nothing to measure: the allocator is not glibc's, or the environment sets it")
    found = Results('memory-cpu', names, refresh, tiny, key='found', page=page, steps=steps, turns=turns)
    for name in found: found.add(measure(name, steps, turns, tiny))
    print(table(found.rows))
