"""What training gains where the CPU's allocator keeps freed memory: `python benchmarks/memory.py`

Each arm trains in processes of its own, as a user's does, in turns; `kept` is what `KeepMemoryCallback` does. Plans are
taken from the cache where plan.py has left them, else made. CPU time of the steps, page faults a step and the largest
resident set are noted. `sizes` trains batches of changing sizes, which makes holes in the heap.
Writes results/memory-cpu.json and .md after each network and goes on where it was interrupted."""
import contextlib, json, resource, statistics, subprocess, sys, time, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.memory import can_keep_memory, kept_memory
from fastxtend_cl.plan import plan_formats
from common import geometric, kept_found, results, save
from peers import models
from plan import arms_of, native_of, step_of, stepper

arms = {'contiguous fp32': False, 'channels last fp32': False, 'channels last fp32, kept': True, 'plan': False, 'plan, kept': True,
    'plan, sizes': False, 'plan, sizes, kept': True}
device = torch.device('cpu')

def usage(): return resource.getrusage(resource.RUSAGE_SELF)

def child(name, arm, steps, budget):
    "Train one arm in this process and print a line of JSON"
    native,precision = native_of(device)
    plan = plan_formats(step_of(name, models[name], device), native, budget=budget, bar=False)
    how = arms_of(plan, native, precision, False)[arm.split(',')[0]]
    times,faults = [],[]
    with kept_memory() if arms[arm] else contextlib.nullcontext():
        run = stepper(name, models[name], device, *how, sizes='sizes' in arm)
        for _ in range(steps):
            before,start = usage().ru_minflt,time.thread_time()
            run()
            times.append(time.thread_time()-start); faults.append(usage().ru_minflt-before)
    half = steps//2
    print(json.dumps(dict(ms=1e3*statistics.median(times[half:]), faults=statistics.median(faults[half:]), mib=usage().ru_maxrss/1024)))

def measure(name, steps, turns, budget):
    "Rows of a network: the medians over `turns` processes"
    found = {a: [] for a in arms}
    for _ in range(turns):
        for arm in arms:
            r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--names', name, '--arm', arm, '--steps', str(steps),
                '--budget', str(budget)], capture_output=True, text=True)
            if r.returncode: raise RuntimeError(f'{name}, {arm}: {r.stderr[-2000:]}')
            found[arm].append(json.loads(r.stdout.splitlines()[-1]))
    rows = {a: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for a,rs in found.items()}
    return dict(model=name, shape=list(models[name]), rows=rows, each=found)

def table(found):
    "Markdown"
    lines = ["| | fastai's own, as usual | kept | plan, as usual | kept | keeping gains | together over fastai's | page faults a step, as usual "
        '| kept | largest resident set, as usual | kept | with changing sizes, as usual | kept |', '|---|'+'--:|'*12]
    gains,both = [],[]
    for f in found:
        r = f['rows']
        gains.append(r['plan']['ms']/r['plan, kept']['ms']); both.append(r['channels last fp32']['ms']/r['plan, kept']['ms'])
        lines.append(f"| {f['model']} | " + ' | '.join(f"{r[a]['ms']:.0f} ms" for a in
            ('channels last fp32', 'channels last fp32, kept', 'plan', 'plan, kept')) + f' | {gains[-1]:.2f} | {both[-1]:.2f} | '
            + ' | '.join([*(f"{r[a]['faults']:,.0f}" for a in ('plan', 'plan, kept')),
            *(f"{r[a]['mib']:,.0f} MiB" for a in ('plan', 'plan, kept', 'plan, sizes', 'plan, sizes, kept'))]) + ' |')
    return '\n'.join([*lines, f'| **geometric mean** | | | | | **{geometric(gains):.3f}** | **{geometric(both):.3f}** |' + ' |'*6])

@call_parse
def main(
    names:str=','.join(models), # Networks, separated by commas
    steps:int=16, # Steps of a process; the second half counts
    turns:int=2, # Processes of each arm
    budget:float=120., # Seconds to plan a network that is not in the cache
    arm:str=None, # Train this one and no more
    refresh:bool=False, # Measure anew what has been measured
):
    "Measure and write benchmarks/results/memory-cpu.json and .md"
    if arm: return child(names, arm, steps, budget)
    if not can_keep_memory(): raise SystemExit("nothing to measure: the allocator is not glibc's, or the environment sets it")
    found = kept_found('memory-cpu', refresh)
    for name in progress_bar(names.split(',')):
        if name in found: continue
        found[name] = measure(name, steps, turns, budget)
        save('memory-cpu', found=[*found.values()], steps=steps, turns=turns)
        (results/'memory-cpu.md').write_text(table([*found.values()])+'\n')
    print(table([*found.values()]))
