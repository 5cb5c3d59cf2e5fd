"""What tuned kernels cost in memory, and what training gains where the CPU's allocator keeps freed memory:
`python benchmarks/memory.py`

Each arm trains in processes of its own, as a user's does, in turns. CPU time of the steps, page faults a step and the largest resident
set are recorded. `tuned, cold` measures with an empty cache, so that its peak includes verification and timing; the others find the
choices that it left. `kept` is what `KeepMemoryCallback` does.
Writes results/memory-cpu.json and .md after each network and goes on where it was interrupted."""
import contextlib, json, os, resource, statistics, subprocess, sys, tempfile, time, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.memory import can_keep_memory, kept_memory
from fastxtend_cl.step import TrainingStep
from common import geometric, kept_found, results, save
from peers import model_of, models

# Precision, tuned, memory kept
arms = {'channels last fp32': (None, False, False), 'bf16': (torch.bfloat16, False, False), 'tuned, cold': (torch.bfloat16, True, False),
    'tuned': (torch.bfloat16, True, False), 'tuned, kept': (torch.bfloat16, True, True)}

def step_of(name, dtype, tuned):
    "A step of training with AdamW, from a fixed seed, in channels last"
    torch.manual_seed(0)
    shape = models[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = model_of(name, shape)
    y = torch.randint(10, (shape[0], *(shape[2:] if name.startswith('unet') else ())))
    step = TrainingStep(model, torch.randn(shape), y, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters(), lr=1e-6),
        autocast=dtype, tuned=tuned)
    step.convert('channels_last')
    return step

def usage(): return resource.getrusage(resource.RUSAGE_SELF)

def in_process(name, arm, steps):
    "Train one arm in this process and print a line of JSON"
    dtype,tuned,keep = arms[arm]
    step,times,faults = step_of(name, dtype, tuned),[],[]
    with kept_memory() if keep else contextlib.nullcontext():
        for _ in range(steps):
            before,start = usage().ru_minflt,time.thread_time()
            step.run(keep='loss')
            times.append(time.thread_time()-start); faults.append(usage().ru_minflt-before)
    half = steps//2
    print(json.dumps(dict(ms=1e3*statistics.median(times[half:]), faults=statistics.median(faults[half:]), mib=usage().ru_maxrss/1024)))

def measure(name, steps, turns):
    "Rows of a network: the medians over `turns` processes"
    found = {a: [] for a in arms}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as cache:
            for arm in arms:
                r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--names', name, '--arm', arm, '--steps', str(steps)],
                    capture_output=True, text=True, env={**os.environ, 'FASTXTEND_CL_CACHE': cache})
                if r.returncode: raise RuntimeError(f'{name}, {arm}: {r.stderr[-2000:]}')
                found[arm].append(json.loads(r.stdout.splitlines()[-1]))
    rows = {a: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for a,rs in found.items()}
    return dict(model=name, shape=list(models[name]), rows=rows, each=found)

def table(found):
    "Markdown"
    lines = [f"| | {' | '.join(f'{a}, ms' for a in arms)} | {' | '.join(f'{a}, MiB' for a in arms)} | keeping gains |", '|---|'+'--:|'*(2*len(arms)+1)]
    gains = []
    for f in found:
        r = f['rows']
        gains.append(r['tuned']['ms']/r['tuned, kept']['ms'])
        lines.append(f"| {f['model']} | " + ' | '.join(f"{r[a]['ms']:.0f}" for a in arms) + ' | ' + ' | '.join(f"{r[a]['mib']:,.0f}" for a in arms)
            + f' | {gains[-1]:.2f} |')
    def mean(key, a, b): return f"{geometric(f['rows'][a][key]/f['rows'][b][key] for f in found):.3f}"
    return '\n'.join([*lines, '', f'Geometric means of {len(found)} networks: keeping memory makes a tuned step {geometric(gains):.3f} times as fast. '
        f"The largest resident set of tuned training is {mean('mib', 'tuned', 'bf16')} times that of untuned, {mean('mib', 'tuned, cold', 'bf16')} while it tunes."])

@call_parse
def main(
    names:str=','.join(models), # Networks, separated by commas
    steps:int=12, # Steps of a process; the second half counts
    turns:int=1, # Processes of each arm
    arm:str=None, # Train this one and no more
    refresh:bool=False, # Measure again what has been measured
):
    "Measure and write benchmarks/results/memory-cpu.json and .md"
    if arm: return in_process(names, arm, steps)
    if not can_keep_memory(): raise SystemExit("nothing to measure: the allocator is not glibc's, or the environment sets it")
    found = kept_found('memory-cpu', refresh)
    for name in progress_bar(names.split(',')):
        if name in found: continue
        found[name] = measure(name, steps, turns)
        save('memory-cpu', found=[*found.values()], steps=steps, turns=turns)
        (results/'memory-cpu.md').write_text(table([*found.values()])+'\n')
    print(table([*found.values()]))
