"""Does bench say what training gives?: `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/agree.py`

The ratios that `Learner.bench_channelslast` gives, from a plain Learner, beside those of `Learner.fit`, which trains each setting in
processes of its own, as a user does. All in turns, so that what changes on the machine meets all alike. The plain Learner has three
processes a turn: its page faults differ from one process to the next. A quotient that is more than 5 % from 1 is flagged.
Writes results/agree-DEVICE.json and .md after each network and goes on where it was interrupted. `--tiny` tries the script."""
import json, os, statistics, subprocess, sys, tempfile, time, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
import fastxtend_cl.all
from fastxtend_cl.amp import native_amp_mode
from common import conditions, geometric, kept_found, results, save
from peers import learner, models

names = 'mobilenet_v2','efficientnet_b0','resnet18','densenet121','regnety_004','r3d_18'
base,fp32,default = 'plain','to_channelslast(use_amp=False)','to_channelslast()'
settings = {base: lambda learn: learn, fp32: lambda learn: learn.to_channelslast(use_amp=False), default: lambda learn: learn.to_channelslast()}

def arm_of(setting, device):
    "The arm of bench that computes as a setting does"
    mode = native_amp_mode(device) if setting==default else None
    return f'channels last {mode.value if mode else "fp32"}, tuned'

class Times(Callback):
    "Seconds of each training step, by the clock of the wall and of the thread's CPU time"
    order = -100 # before the batch is converted
    def __init__(self): self.wall,self.cpu = [],[]
    def before_batch(self): self.start = time.perf_counter(),time.thread_time()
    def after_batch(self):
        if not self.training: return
        if self.learn.dls.device.type=='cuda': torch.cuda.synchronize()
        for to,now,start in zip((self.wall,self.cpu), (time.perf_counter(),time.thread_time()), self.start): to.append(now-start)

def fit(name, shape, device, setting, steps):
    "Train one setting; the median step of the second half"
    learn = learner(name, shape, device, steps)
    settings[setting](learn).add_cb(times := Times())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return {k: 1e3*statistics.median(getattr(times, k)[steps//2:]) for k in ('wall','cpu')}

def bench(name, shape, device, seconds):
    "What bench says of each setting"
    arms = {s: arm_of(s, device) for s in (fp32,default)}
    res = learner(name, shape, device).bench_channelslast([*dict.fromkeys(arms.values())], seconds=seconds, epochs=False, bar=False)
    now = res['baseline']
    return {s: dict(wall=r.ratio, cpu=now.cpu_seconds/r.cpu_seconds if r.cpu_seconds else None, low=r.low, high=r.high, pairs=r.pairs,
        verdict=r.verdict, reason=r.reason) for s,a in arms.items() for r in [res[a]]} | {'seconds': res.seconds}

def run_child(name, cache, *more):
    "What a process of its own has printed"
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--names', name, *more], capture_output=True, text=True,
        env={**os.environ, 'FASTXTEND_CL_CACHE': cache})
    if r.returncode: raise RuntimeError(f'{name} {more}: {r.stderr[-2000:]}')
    return json.loads(r.stdout.splitlines()[-1])

def measure(name, turns, *more):
    "All turns of a network; the kernels that the first process has tuned are known to the others"
    found = {'bench': [], **{s: [] for s in settings}}
    with tempfile.TemporaryDirectory() as cache:
        run_child(name, cache, '--child', default, *more), run_child(name, cache, '--child', fp32, *more) # they tune
        for _ in range(turns):
            for what in (base, *found, base): found[what].append(run_child(name, cache, '--child', what, *more))
    return dict(model=name, rows=[row(found, s, k) for s in (fp32,default) for k in ('wall','cpu')], each=found)

def row(found, setting, clock):
    "Ratio by bench and by training, each the median and the extremes, and their quotient"
    said = sorted(r for b in found['bench'] if (r := b[setting][clock]))
    gave = sorted(p[clock]/found[setting][i//3][clock] for i,p in enumerate(found[base]))
    q = statistics.median(said)/statistics.median(gave) if said else None
    def three(rs): return [statistics.median(rs), rs[0], rs[-1]] if rs else None
    return dict(setting=setting, clock=clock, bench=three(said), training=three(gave), quotient=q, apart=q is None or abs(q-1)>0.05)

def table(found):
    "Markdown"
    def cell(r): return '{:.2f} ({:.2f} to {:.2f})'.format(*r) if r else ''
    lines = ['| | setting | clock | bench | training | bench / training | |', '|---|---|---|--:|--:|--:|---|']
    for f in found:
        for r in f['rows']:
            lines.append(f"| {f['model']} | {r['setting']} | {r['clock']} | {cell(r['bench'])} | {cell(r['training'])} | "
                f"{r['quotient'] or 0:.3f} | {'differs' if r['apart'] else ''} |")
    for clock in ('wall','cpu'):
        qs = [(f['model'],r) for f in found for r in f['rows'] if r['clock']==clock]
        apart = [f"{m}, {r['setting']}" for m,r in qs if r['apart']]
        if mean := [r['quotient'] for _,r in qs if r['quotient']]:
            lines += ['', f"By {'the wall clock' if clock=='wall' else 'CPU time'}: geometric mean of the quotients {geometric(mean):.3f}, "
                f"{min(mean):.3f} to {max(mean):.3f}; more than 5 % apart: {'; '.join(apart) or 'none'}."]
    return '\n'.join(lines)

@call_parse
def main(
    names:str=','.join(names), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    steps:int=24, # Training steps of a process; the second half counts
    turns:int=3, # Processes of each setting, and of bench; three times as many of the plain Learner
    seconds:float=100, # For bench
    child:str=None, # Measure this in this process and write nothing: 'bench' or a setting
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/agree-DEVICE.json and .md"
    device = torch.device(device)
    if child:
        shape = (2, 3, *((4, 32, 32) if len(models[names])==5 else (32, 32))) if tiny else models[names]
        return print(json.dumps(bench(names, shape, device, seconds) if child=='bench' else fit(names, shape, device, child, steps)))
    found = {} if tiny else kept_found(f'agree-{device.type}', refresh)
    for name in progress_bar(names.split(',')):
        if name in found: continue
        found[name] = measure(name, turns, '--device', str(device), '--steps', str(steps), '--seconds', str(seconds), *['--tiny']*tiny)
        if tiny: continue
        save(f'agree-{device.type}', found=[*found.values()], steps=steps, turns=turns, seconds=seconds)
        c = conditions()
        (results/f'agree-{device.type}.md').write_text(f"Times as fast as a plain Learner: median of the processes (extremes). Each "
            f"has a step's median; CPU time is that of the thread. {c['gpu'] or c['cpu']}, {c['cores']} threads, torch {c['torch']}, "
            f"fastai {c['fastai']}, {c['date']}.\n\n{table([*found.values()])}\n")
    print(table([*found.values()]))
