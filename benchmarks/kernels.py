"""What does `to_channelslast()` gain, and what does tuning cost? `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/kernels.py`

The networks of networks.py, each in a child process with an empty cache of kernels. Every arm has its own `Learner` with the same
weights and batch, timed by `Learner.one_batch`, memory kept for all. The first step of a second child has a warm cache.
Writes results/kernels-DEVICE.json and .md after each network and continues where it was interrupted; headline.py makes the README's table
of it."""
import json, tempfile, warnings
import torch
from fastcore.script import call_parse
from fastxtend_cl.kernels import kernel_count, kernel_table, tuning_line
from fastxtend_cl.memory import kept_memory
from fastxtend_cl.timing import device_clock, why_failed
from common import Results, cell, compared, geometric, machine, markdown, paired, run_child
from networks import as_fastai, learner, models, others, ready, refuse_crashing, shape_of, shapes

base,again,fastai,plain,ours,ours_fp32 = ('contiguous fp32','contiguous fp32, again',"fastai's to_channelslast()",
    'tune=False','to_channelslast()','use_amp=False')
arms = {base: lambda learn: None, again: lambda learn: None, fastai: as_fastai, plain: lambda learn: learn.to_channelslast(tune=False),
    ours_fp32: lambda learn: learn.to_channelslast(use_amp=False), ours: lambda learn: learn.to_channelslast()}

def step_of(name, arm, device, shape):
    "A function that trains one step"
    learn = learner(name, shape, device)
    if arm==fastai: refuse_crashing(learn)
    arms[arm](learn)
    return ready(learn)

def first_step(step, device):
    "Seconds of a first step, seconds of tuning in it, and the line about the tuning"
    since = kernel_count()
    seconds = device_clock(device).steps(step, 1)[0, 0]
    return dict(first=seconds, tuning=kernel_table(since).seconds, line=tuning_line(since))

def in_process(name, device, rounds, block, shape):
    "The results of one network, except the warm start"
    res,steps = dict(model=name, shape=list(shape)),{}
    with kept_memory():
        for arm in arms:
            try: steps[arm] = step_of(name, arm, device, shape)
            except Exception as e: res.setdefault('failed', {})[arm] = why_failed(e)[:200]; continue
            first = first_step(steps[arm], device)
            if arm in (ours, ours_fp32): res[arm] = first
            for _ in range(2): steps[arm]()
        return dict(res, rows=compared(paired(steps, rounds, block, device)))

def measure(name, **more):
    with tempfile.TemporaryDirectory() as cache:
        res = run_child(__file__, cache, child=name, **more)
        try: warm = run_child(__file__, cache, child=name, warm=True, **more)
        except RuntimeError as e: warm = dict(failed=str(e)[:500])
    print(name, {r['arm']: round(r['ratio'][0], 2) for r in res['rows']}, res[ours]['line'], flush=True)
    return dict(res, warm=warm)

def ratios(f): return {r['arm']: r['ratio'] for r in f['rows']}

def table(found):
    "Markdown: a row for each network, and notes"
    names,rows = [again, fastai, plain, ours_fp32, ours],[]
    for f in found:
        seconds = f"{f[ours]['tuning']:.1f}",f"{f[ours]['first']:.1f}",f"{f['warm'].get('first', 0):.2f}"
        rows.append([f['model'], *(cell(ratios(f).get(n)) for n in names), *seconds])
    for label,some in (('twelve networks', models), ('others', others)):
        rs = [ratios(f) for f in found if f['model'] in some]
        means = [f'{geometric(r[n][0] for r in rs):.2f}' if rs and all(n in r for r in rs) else '' for n in names]
        if rs: rows.append([f'**geometric mean, {label} ({len(rs)})**', *means, '', '', ''])
    behind = [f['model'] for f in found if (g := ratios(f))[ours][0]<0.97*max(1, g.get(fastai, [0])[0])]
    notes = [f"- {f['model']}, {a}: {why}" for f in found for a,why in f.get('failed', {}).items()]
    return '\n'.join([markdown(['', *names, 'tuning, s', 'first step, s: empty cache', 'warm'], rows), '',
        f"Slower than the better of contiguous and fastai's by more than 3 %: {', '.join(behind) or 'none'}.", '', *notes])

def page(found): return f'Times as fast as contiguous fp32 (95 % interval). {machine()}.\n\n{table(found)}'

@call_parse
def main(
    names:str=','.join(shapes), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    child:str=None, # Measure this network in this process and write nothing
    warm:bool=False, # In a child: only the first step
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/kernels-DEVICE.json and .md"
    if child:
        warnings.simplefilter('ignore')
        device,shape = torch.device(device),shape_of(child, tiny)
        res = first_step(step_of(child, ours, device, shape), device) if warm else in_process(child, device, rounds, block, shape)
        return print(json.dumps(res))
    found = Results(f'kernels-{device}', names, refresh, tiny, key='found', page=page, rounds=rounds, block=block)
    for name in found: found.add(measure(name, device=device, rounds=rounds, block=block, tiny=tiny))
    print(table(found.rows))
