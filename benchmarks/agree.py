"""Do the results of bench agree with training? `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/agree.py`

Compares the ratios of `Learner.bench_channelslast`, for a plain Learner, with those of `Learner.fit`, which trains each setting in its
own processes, as a user does. They run in turns, so that changes of the machine's speed affect all alike. The plain Learner has three
processes per turn, because its page faults vary between processes. A quotient more than 5 % from 1 is flagged; `--again` measures
networks a second time.
Writes results/agree-DEVICE.json and .md after each network and continues where it was interrupted."""
import json, statistics, tempfile
import torch
from fastcore.script import call_parse
from fastxtend_cl.amp import native_amp_mode
from common import Results, cell, geometric, machine, markdown, run_child
from networks import Times, learner, shape_of

networks = 'mobilenet_v2','efficientnet_b0','resnet18','densenet121','regnety_004','r3d_18'
base,fp32,default = 'plain','to_channelslast(use_amp=False)','to_channelslast()'
settings = {base: lambda learn: learn, fp32: lambda learn: learn.to_channelslast(use_amp=False), default: lambda learn: learn.to_channelslast()}

def arm_of(setting, device):
    "The arm of bench that computes as a setting does"
    mode = native_amp_mode(device) if setting==default else None
    return f'channels last {mode.value if mode else "fp32"}, tuned'

def fit(name, shape, device, setting, steps):
    "Train one setting; the median step of the second half"
    learn = learner(name, shape, device, steps)
    settings[setting](learn).add_cb(times := Times())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return {k: 1e3*statistics.median(getattr(times, k)[steps//2:]) for k in ('wall','cpu')}

def bench(name, shape, device, seconds):
    "The results of bench for each setting"
    arms = {s: arm_of(s, device) for s in (fp32,default)}
    res = learner(name, shape, device).bench_channelslast([*dict.fromkeys(arms.values())], seconds=seconds, epochs=False, bar=False)
    baseline = res.baseline
    return {s: dict(wall=r.ratio, cpu=baseline.cpu_seconds/r.cpu_seconds if r.cpu_seconds else None, low=r.low, high=r.high, pairs=r.pairs,
        verdict=r.verdict, reason=r.reason) for s,a in arms.items() for r in [res[a]]} | {'seconds': res.seconds}

def measure(name, label, turns, **more):
    "All turns of a network; all processes use the kernels that the first ones tuned"
    found = {'bench': [], **{s: [] for s in settings}}
    with tempfile.TemporaryDirectory() as cache:
        def child(what): return run_child(__file__, cache, names=name, child=what, **more)
        child(default), child(fp32) # tune the kernels
        for _ in range(turns):
            for what in (base, *found, base): found[what].append(child(what))
    return dict(model=label, rows=[row(found, s, k) for s in (fp32,default) for k in ('wall','cpu')], each=found)

def row(found, setting, clock):
    "Ratio by bench and by training, each the median and the extremes, and their quotient"
    said = sorted(r for b in found['bench'] if (r := b[setting][clock]))
    gave = sorted(p[clock]/found[setting][i//3][clock] for i,p in enumerate(found[base]))
    q = statistics.median(said)/statistics.median(gave) if said else None
    def three(rs): return [statistics.median(rs), rs[0], rs[-1]] if rs else None
    return dict(setting=setting, clock=clock, bench=three(said), training=three(gave), quotient=q, apart=q is None or abs(q-1)>0.05)

def table(found):
    "Markdown"
    rows = [(f['model'], r) for f in found for r in f['rows']]
    lines = [markdown(['', 'setting', 'clock', 'bench', 'training', 'bench / training', ''], [[m, r['setting'], r['clock'], cell(r['bench']),
        cell(r['training']), f"{r['quotient'] or 0:.3f}", 'differs'*r['apart']] for m,r in rows], 3)]
    for clock in ('wall','cpu'):
        apart = [f"{m}, {r['setting']}" for m,r in rows if r['clock']==clock and r['apart']]
        if qs := [r['quotient'] for _,r in rows if r['clock']==clock and r['quotient']]:
            lines += ['', f"By {'the wall clock' if clock=='wall' else 'CPU time'}: geometric mean of the quotients {geometric(qs):.3f}, "
                f"{min(qs):.3f} to {max(qs):.3f}; more than 5 % apart: {'; '.join(apart) or 'none'}."]
    return '\n'.join(lines)

def page(found):
    return ('Times as fast as a plain Learner: median of the processes (extremes). Each has a step\'s median; CPU time is that of the thread. '
        f'{machine()}.\n\n{table(found)}')

@call_parse
def main(
    names:str=','.join(networks), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    steps:int=24, # Training steps of a process; the second half counts
    turns:int=3, # Processes of each setting, and of bench; three times as many of the plain Learner
    seconds:float=100, # For bench
    child:str=None, # Measure this in this process and write nothing: 'bench' or a setting
    again:bool=False, # Measure them a second time, as rows of their own
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/agree-DEVICE.json and .md"
    if child:
        args = names,shape_of(names, tiny),torch.device(device)
        return print(json.dumps(bench(*args, seconds) if child=='bench' else fit(*args, child, steps)))
    labels = {f'{n}, again' if again else n: n for n in names.split(',')}
    found = Results(f'agree-{device}', [*labels], refresh, tiny, key='found', page=page, steps=steps, turns=turns, seconds=seconds)
    for label in found: found.add(measure(labels[label], label, turns, device=device, steps=steps, seconds=seconds, tiny=tiny))
    print(table(found.rows))
