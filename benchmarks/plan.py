"""Does `to_channelslast(plan='auto')` choose the fastest setting, and what does it gain? `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/plan.py`

The networks of networks.py, each in a child process with an empty cache of plans and kernels:

1. A Learner trains with `plan='auto'` until the race is over: what was chosen, in how many steps and seconds.
2. Each of the four settings that compete, alone, with those of plain PyTorch (no tuned kernels) and fastai's own `to_channelslast()`:
   paired, in blocks in random order, with memory kept for all. The regret is the time of the chosen setting over that of the best of the four.
3. At a smaller shape, so that it can be repeated: races while another process computes on the same core, against the four settings alone
   in quiet. Their kernels are tuned before.

An epoch of 150 steps with the race in it is the race's time and the rest by the chosen setting's.
Writes results/plan-DEVICE.json and .md after each network and continues where it was interrupted."""
import json, tempfile, time, warnings
from functools import partial
import torch
from fastai.callback.core import Callback, CancelFitException
from fastcore.script import call_parse
from fastxtend_cl.all import FormatPlan, apply_channels_last, as_channels_last
from fastxtend_cl.amp import amp_dtypes, native_amp_mode
from fastxtend_cl.memory import kept_memory
from fastxtend_cl.timing import why_failed
from common import Results, busy, geometric, machine, markdown, ms_of, paired, ratio_of, run_child
from networks import Times, as_fastai, learner, mixed, models, ready, refuse_crashing, shape_of, shapes

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
        if low is None: refuse_crashing(learn)
        apply_channels_last(learn.model)
    if low and learn.dls.device.type=='cuda': mixed(learn); low = None
    learn.add_cb(Plain(channels_last, low and amp_dtypes[low]))

def own(learn):
    refuse_crashing(learn)
    as_fastai(learn)

def arms(device):
    "Names and set-ups: the settings that compete, then the others"
    low,res,more = native_amp_mode(device),{},{}
    for mode in (None, *[low]*bool(low)):
        for f in ('contiguous','channels_last'):
            name = f'{f.replace("_", " ")} {mode.value if mode else "fp32"}'
            plan = FormatPlan(name, f, mode and mode.value)
            res[name] = lambda learn, plan=plan: learn.to_channelslast(plan=plan)
            more[f'plain {name}'] = partial(plain, channels_last=f=='channels_last', low=mode)
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
    "A `TimedArm` for each set-up, and why others failed"
    steps,failed = {},{}
    with kept_memory(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for arm,setup in setups.items():
            try:
                setup(learn := learner(name, shape, device))
                steps[arm] = ready(learn)
                steps[arm]()
            except Exception as e: steps.pop(arm, 0); failed[arm] = why_failed(e)[:200]
        return paired(steps, rounds, block, device),failed

def with_regret(raced, timed, settings):
    "The result of a race with the best of the settings alone, and the time of the chosen one over that of the best: median and interval"
    best = min(settings, key=lambda a: ms_of(timed[a]))
    return dict(raced, best=best, regret=ratio_of(timed[raced['arm']], timed[best]))

def in_process(name, shape, tiny, device, rounds, block, repeats):
    "The results of one network"
    start,(settings,more) = time.perf_counter(),arms(device)
    quiet = race(name, shape, device)
    timed,failed = alone(name, shape, device, settings | more, rounds, block)
    quiet,ms = with_regret(quiet, timed, settings),{n: ms_of(a) for n,a in timed.items()}
    quiet['epoch'] = quiet['seconds']+max(0, epoch-quiet['steps'])*ms[quiet['arm']]/1e3
    few = shape if tiny else small(shape)
    small_timed,_ = alone(name, few, device, settings, 2*rounds, block)
    with busy(): again = [with_regret(race(name, few, device), small_timed, settings) for _ in range(repeats)]
    return dict(model=name, shape=list(shape), quiet=quiet, ms=ms, failed=failed, small=list(few),
        small_ms={n: ms_of(a) for n,a in small_timed.items()}, busy=again, seconds=time.perf_counter()-start)

def measure(name, **more):
    with tempfile.TemporaryDirectory() as cache: f = run_child(__file__, cache, child=name, **more)
    print(f"{name}: {f['quiet']['arm']} after {f['quiet']['steps']} steps, regret {f['quiet']['regret'][0]-1:.1%}, under load "
        f"{max(r['regret'][0] for r in f['busy'])-1:.1%}; {f['seconds']:.0f} s", flush=True)
    return f

def gains(found, of):
    "How many times as fast the chosen setting is as another, for each network that has it"
    return {f['model']: f['ms'][a]/f['ms'][f['quiet']['arm']] for f in found if (a := of(f)) in f['ms']}

def of_plain(f): return {a: t for a,t in f['ms'].items() if a.startswith('plain ')}
def best_plain(f): return min(of_plain(f), key=of_plain(f).get)

def compared_to(found):
    "Lines: how many times as fast the chosen setting is as others"
    def line(what, of):
        if not (gain := gains(found, of)): return f'- {what}: not measured.'
        worst = min(gain, key=gain.get)
        return f'- {what}: {geometric(gain.values()):.2f} (least: {worst} {gain[worst]:.2f}; networks: {len(gain)}).'
    names = [a for a in dict.fromkeys(a for f in found for a in of_plain(f)) if all(a in f['ms'] for f in found)]
    one = min(names, key=lambda a: geometric(f['ms'][a] for f in found))
    return ['How many times as fast the chosen setting is, geometric mean:', '',
        line('as contiguous fp32 of plain PyTorch', lambda f: 'plain contiguous fp32'), line("as fastai's own", lambda f: fastai),
        line('as the best plain setting of each network', best_plain),
        line(f'as the one plain setting that is best for all ({one[6:]})', lambda f: one), '']

def regrets(found):
    "Lines: what the choices cost"
    races = [(f['model'], where, r) for f in found for where,rs in (('quiet', [f['quiet']]), ('under load', f['busy'])) for r in rs]
    races = sorted([(r['regret'], model, where, r['arm'], r['best']) for model,where,r in races], reverse=True)
    r,model,where,arm,best = races[0]
    def share(limit): return f'{sum(r[0][0]>limit for r in races)} of {len(races)}'
    return [f'Largest regret: {r[0]-1:.1%} ({model}, {where}: {arm} instead of {best}); more than 2 %: {share(1.02)} races, '
        f'more than 5 %: {share(1.05)}.', '',
        *(f'- {m}, {w}: {a} instead of {b}, {r[0]-1:.1%} slower ({r[1]-1:.1%} to {r[2]-1:.1%})' for r,m,w,a,b in races if r[0]>1.02), '']

def groups(found):
    "Lines: the gains of the twelve networks, and of the others"
    for label,some in (('twelve networks', True), ('others', False)):
        if part := [f for f in found if (f['model'] in models)==some]:
            g = [geometric(gains(part, of).values()) for of in (lambda f: 'plain contiguous fp32',
                lambda f: fastai if fastai in f['ms'] else 'plain contiguous fp32', best_plain)]
            yield (f"{label.capitalize()} ({len(part)}): {g[0]:.2f} times contiguous fp32, {g[1]:.2f} fastai's own (contiguous fp32 where it fails), "
                f'{g[2]:.2f} the best plain one.')

def row(f):
    "Cells of a network"
    q,ms = f['quiet'],f['ms']
    own,best,chosen = ms[q['arm']],best_plain(f),[r['arm'] for r in f['busy']]
    def times(a): return f'{ms[a]/own:.2f}' if a in ms else ''
    return [f['model'], q['arm'], q['steps'], f"{q['regret'][0]-1:.1%}", ', '.join(f'{chosen.count(a)} {a}' for a in dict.fromkeys(chosen)),
        f"{max(r['regret'][0] for r in f['busy'])-1:.1%}", f"{q['epoch']:.1f}", f"{epoch*ms['contiguous fp32']/1e3:.1f}", f'{epoch*own/1e3:.1f}',
        times('plain contiguous fp32'), times(fastai), f'{times(best)} ({best[6:]})']

def table(found):
    "Markdown: a row for each network, and what they say together"
    head = ['', 'chosen', 'steps', 'regret', 'under load: chosen', 'regret, largest', f'{epoch} steps with the race, s', 'contiguous fp32 alone',
        'chosen alone', 'times as fast as contiguous fp32', "fastai's own", 'best plain']
    notes = [f"- {f['model']}, {a}: {why}" for f in found for a,why in f['failed'].items()]
    return '\n'.join([markdown(head, map(row, found), 2), '', *compared_to(found), *regrets(found), *groups(found), '', *notes])

def page(found): return f'{machine()}. Milliseconds are medians of steps alone, memory kept for all.\n\n{table(found)}'

@call_parse
def main(
    names:str=','.join(shapes), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    rounds:int=4, # Rounds of settings alone; twice as many at the small shape
    block:int=3, # Steps a block; the first is dropped
    repeats:int=5, # Races under load
    child:str=None, # Measure this network in this process and write nothing
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/plan-DEVICE.json and .md"
    asked = dict(rounds=rounds, block=block, repeats=repeats)
    if child: return print(json.dumps(in_process(child, shape_of(child, tiny), tiny, torch.device(device), **asked)))
    found = Results(f'plan-{device}', names, refresh, tiny, key='found', page=page, **asked)
    for name in found: found.add(measure(name, device=device, tiny=tiny, **asked))
    print(table(found.rows))
