"""Does `to_channelslast(plan='auto')` choose the fastest setting, and what does it gain?: `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/plan.py`

The twelve networks of peers.py and six others, each in a child process with an empty cache of plans and kernels:

1. A Learner trains with `plan='auto'` until the race is over: what was chosen, in how many steps and seconds.
2. Each of the four settings that compete, alone, beside plain PyTorch's four (no tuned kernels) and fastai's own `to_channelslast()`:
   paired, in blocks in random order, memory kept for all. The regret is the time of the chosen setting over that of the best of the four.
3. At a smaller shape, so that it can be repeated: races while another process computes on the same core, against the four settings alone
   in quiet. Their kernels are tuned before.

An epoch of 150 steps with the race in it is the race's time and the rest by the chosen setting's.
Writes results/plan-DEVICE.json and .md after each network and goes on where it was interrupted. `--tiny` tries the script."""
import json, os, statistics, subprocess, sys, tempfile, time, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastai.callback.core import Callback, CancelFitException
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.all import FormatPlan, apply_channels_last, as_channels_last
from fastxtend_cl.amp import amp_dtypes, native_amp_mode
from fastxtend_cl.memory import kept_memory
from fastxtend_cl.ways import crashing_layers
from agree import Times
from common import busy, conditions, geometric, interleave, interval, kept_found, results, save
from kernels import others
from peers import as_fastai, learner, mixed, models, ready

shapes = models | {n: others[n] for n in ('mobilenetv4_conv_small', 'mnasnet_100', 'regnetx_004', 'mc3_18', 'edgenext_xx_small', 'repvgg_a0')}
fastai,epoch = "fastai's to_channelslast()",150

def small(shape): return (shape[0], 3, 4, 40, 40) if len(shape)==5 else (max(2, shape[0]//4), 3, 64, 64)

class Plain(Callback):
    "Batch and precision as PyTorch's tutorials do it"
    order = -1
    def __init__(self, channels_last, dtype): self.channels_last,self.dtype = channels_last,dtype
    def before_batch(self):
        if self.channels_last: self.learn.xb = tuple(map(as_channels_last, self.xb))
        self.autocast = torch.autocast(self.dls.device.type, self.dtype, enabled=self.dtype is not None)
        self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)

def plain(learn, channels_last, low):
    if channels_last:
        if learn.dls.device.type=='cpu' and low is None and (layers := crashing_layers(learn.model)):
            raise RuntimeError(f'not run: the kernels of {layers[0]} can end the process (oneDNN issue 6035)')
        apply_channels_last(learn.model)
    if low and learn.dls.device.type=='cuda': mixed(learn); low = None
    learn.add_cb(Plain(channels_last, low and amp_dtypes[low]))

def own(learn):
    if learn.dls.device.type=='cpu' and (layers := crashing_layers(learn.model)):
        raise RuntimeError(f'not run: the kernels of {layers[0]} can end the process (oneDNN issue 6035)')
    as_fastai(learn, learn.dls.device)

def arms(device):
    "Names and set-ups: the settings that compete, then the others"
    low,res,more = native_amp_mode(device),{},{}
    for mode in (None, *[low]*bool(low)):
        for f in ('contiguous','channels_last'):
            name = f'{f.replace("_", " ")} {mode.value if mode else "fp32"}'
            plan = FormatPlan(name, f, mode and mode.value)
            res[name] = lambda learn, plan=plan: learn.to_channelslast(plan=plan)
            more[f'plain {name}'] = lambda learn, f=f, mode=mode: plain(learn, f=='channels_last', mode)
    return res,{**more, fastai: own}

class Until(Callback):
    "End the fit when the race is over"
    order = 101 # after Times
    def __init__(self): self.over = False
    def after_batch(self):
        plan = self.learn.channels_last.plan
        if self.training and plan.conditions: # it has none before
            self.over = True
            raise CancelFitException

def race(name, shape, device):
    "Train until the race is over; what it chose"
    learn = learner(name, shape, device, 60)
    learn.to_channelslast(plan='refresh').add_cbs([times := Times(), until := Until()])
    with learn.no_bar(), learn.no_logging():
        for _ in range(4):
            if not until.over: learn.fit(1)
    plan = learn.channels_last.plan
    return dict(arm=plan.arm, verdict=plan.verdict, reason=plan.reason, steps=len(times.wall), seconds=sum(times.wall), over=until.over,
        rows=[{k: vars(r)[k] for k in ('arm','verdict','ratio','low','high','seconds','pairs')} for r in plan.rows])

def alone(name, shape, device, setups, rounds, block):
    "Seconds of each round of each set-up, and why others failed"
    steps,failed = {},{}
    with kept_memory(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for arm,setup in setups.items():
            try:
                setup(learn := learner(name, shape, device))
                steps[arm] = ready(learn, device)
                steps[arm]()
            except Exception as e: steps.pop(arm, 0); failed[arm] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'[:200]
        return interleave(steps, rounds, block, progress=False),failed

def median(seconds): return {a: statistics.median(s) for a,s in seconds.items()}

def regret(seconds, settings, chosen):
    "Time of the chosen setting over that of the best: median and interval over the rounds"
    best = min(settings, key=median({a: seconds[a] for a in settings}).get)
    return dict(best=best, regret=interval([c/b for c,b in zip(seconds[chosen], seconds[best])]))

def in_process(name, shape, tiny, device, rounds, block, repeats):
    "Measure one network in this process and print a line of JSON"
    start,(settings,more) = time.perf_counter(),arms(device)
    quiet = race(name, shape, device)
    seconds,failed = alone(name, shape, device, settings | more, rounds, block)
    quiet.update(regret(seconds, settings, quiet['arm']))
    ms = median(seconds)
    rest = max(0, epoch-quiet['steps'])
    quiet['epoch'] = quiet['seconds']+rest*ms[quiet['arm']]
    again,few = [],shape if tiny else small(shape)
    small_seconds,_ = alone(name, few, device, settings, 2*rounds, block)
    with busy():
        for _ in range(repeats):
            again.append(race(name, few, device))
            again[-1].update(regret(small_seconds, settings, again[-1]['arm']))
    print(json.dumps(dict(model=name, shape=list(shape), quiet=quiet, ms={a: 1e3*s for a,s in ms.items()}, failed=failed, small=list(few),
        small_ms={a: 1e3*s for a,s in median(small_seconds).items()}, busy=again, seconds=time.perf_counter()-start)))

def measure(name, *more):
    with tempfile.TemporaryDirectory() as cache:
        r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--child', name, *more], capture_output=True, text=True,
            env={**os.environ, 'FASTXTEND_CL_CACHE': cache})
    if r.returncode: raise RuntimeError(f'{name}: {r.stderr[-2000:]}')
    return json.loads(r.stdout.splitlines()[-1])

def gains(found, of):
    "How many times as fast the chosen setting is as another, for each network that has it"
    return {f['model']: f['ms'][a]/f['ms'][f['quiet']['arm']] for f in found if (a := of(f)) in f['ms']}

def of_plain(f): return {a: t for a,t in f['ms'].items() if a.startswith('plain ')}

def summary(found):
    "Lines below the table"
    def line(what, gain):
        if not gain: return f'- {what}: not measured.'
        worst = min(gain, key=gain.get)
        return f'- {what}: {geometric(gain.values()):.2f} (least: {worst} {gain[worst]:.2f}; networks: {len(gain)}).'
    names = dict.fromkeys(a for f in found for a in of_plain(f))
    common = min((a for a in names if all(a in f['ms'] for f in found)), key=lambda a: geometric(f['ms'][a] for f in found))
    regrets = [(r['regret'], f['model'], where, r['arm'], r['best']) for f in found for where,rs in (('quiet', [f['quiet']]), ('under load', f['busy'])) for r in rs]
    worst = max(regrets)
    def share(limit): return f'{sum(r[0][0]>limit for r in regrets)} of {len(regrets)}'
    res = ['How many times as fast the chosen setting is, geometric mean:', '',
        line('as contiguous fp32 of plain PyTorch', gains(found, lambda f: 'plain contiguous fp32')), line("as fastai's own", gains(found, lambda f: fastai)),
        line('as the best plain setting of each network', gains(found, lambda f: min(of_plain(f), key=of_plain(f).get))),
        line(f'as the one plain setting that is best for all ({common[6:]})', gains(found, lambda f: common)), '',
        f'Largest regret: {worst[0][0]-1:.1%} ({worst[1]}, {worst[2]}: {worst[3]} instead of {worst[4]}); more than 2 %: {share(1.02)} races, more than 5 %: {share(1.05)}.', '',
        *(f'- {model}, {where}: {arm} instead of {best}, {r[0]-1:.1%} slower ({r[1]-1:.1%} to {r[2]-1:.1%})' for r,model,where,arm,best in sorted(regrets)[::-1] if r[0]>1.02), '']
    for label,some in (('twelve networks', models), ('others', {n: s for n,s in shapes.items() if n not in models})):
        if part := [f for f in found if f['model'] in some]:
            g = [geometric(gains(part, of).values()) for of in (lambda f: 'plain contiguous fp32', lambda f: fastai if fastai in f['ms'] else 'plain contiguous fp32',
                lambda f: min(of_plain(f), key=of_plain(f).get))]
            res.append(f"{label.capitalize()} ({len(part)}): {g[0]:.2f} times contiguous fp32, {g[1]:.2f} fastai's own (contiguous fp32 where it fails), {g[2]:.2f} the best plain one.")
    return '\n'.join(res)

def table(found):
    "Markdown: a row for each network"
    lines = [f'| | chosen | steps | regret | under load: chosen | regret, largest | {epoch} steps with the race, s | contiguous fp32 alone | chosen alone | '
        "times as fast as contiguous fp32 | fastai's own | best plain |", '|---|---|--:|--:|---|--:|'+'--:|'*6]
    for f in found:
        q,ms = f['quiet'],f['ms']
        counts = {a: sum(r['arm']==a for r in f['busy']) for a in dict.fromkeys(r['arm'] for r in f['busy'])}
        now,best = ms[q['arm']],min(of_plain(f), key=of_plain(f).get)
        def times(a): return f'{ms[a]/now:.2f}' if a in ms else ''
        lines.append(f"| {f['model']} | {q['arm']} | {q['steps']} | {q['regret'][0]-1:.1%} | {', '.join(f'{n} {a}' for a,n in counts.items())} | "
            f"{max(r['regret'][0] for r in f['busy'])-1:.1%} | {q['epoch']:.1f} | {epoch*ms['contiguous fp32']/1e3:.1f} | {epoch*now/1e3:.1f} | "
            f"{times('plain contiguous fp32')} | {times(fastai)} | {times(best)} ({best[6:]}) |")
    notes = [f"- {f['model']}, {a}: {why}" for f in found for a,why in f['failed'].items()]
    return '\n'.join([*lines, '', summary(found), '', *notes])

@call_parse
def main(
    names:str=','.join(shapes), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    rounds:int=4, # Rounds of settings alone; twice as many at the small shape
    block:int=3, # Steps a block; the first is dropped
    repeats:int=5, # Races under load
    child:str=None, # Measure this network in this process and write nothing
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/plan-DEVICE.json and .md"
    device = torch.device(device)
    if child:
        shape = (2, 3, *((4, 32, 32) if len(shapes[child])==5 else (32, 32))) if tiny else shapes[child]
        return in_process(child, shape, tiny, device, rounds, block, repeats)
    found = {} if tiny else kept_found(f'plan-{device.type}', refresh)
    more = ['--device', str(device), '--rounds', str(rounds), '--block', str(block), '--repeats', str(repeats), *['--tiny']*tiny]
    for name in progress_bar(names.split(',')):
        if name in found: continue
        found[name] = f = measure(name, *more)
        print(f"{name}: {f['quiet']['arm']} after {f['quiet']['steps']} steps, regret {f['quiet']['regret'][0]-1:.1%}, under load "
            f"{max(r['regret'][0] for r in f['busy'])-1:.1%}; {f['seconds']:.0f} s", flush=True)
        if tiny: continue
        save(f'plan-{device.type}', found=[*found.values()], rounds=rounds, block=block, repeats=repeats)
        c = conditions()
        (results/f'plan-{device.type}.md').write_text(f"{c['gpu'] or c['cpu']}, {c['cores']} threads, torch {c['torch']}, fastai {c['fastai']}, "
            f"{c['date']}. Milliseconds are medians of steps alone, memory kept for all.\n\n{table([*found.values()])}\n")
    print(table([*found.values()]))
