"""The twelve networks of peers.py by the plan, against contiguous, fastai's, the best single setting and compiled
models: `python benchmarks/plan.py`

Each network is planned as a user would, whatever was found earlier, and then measured anew with the independent harness
of common.py, paired, in blocks, with memory kept for all arms; memory.py measures what that is worth.
Writes results/plan-DEVICE.json after each network and goes on where it was interrupted; `--refresh` starts anew,
`--tiny` tries the script.
`--robust-times 5` plans each network five times while another process keeps its core busy (pin this one to a core, and
the other shares it), measures what was chosen when all is quiet, and writes results/plan-robust-DEVICE.json."""
import gc, itertools, statistics, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastcore.script import call_parse
from fastxtend_cl.amp import amp_dtypes, native_amp_mode
from fastxtend_cl.memory import kept_memory
from fastxtend_cl.plan import apply_plan, plan_formats
from fastxtend_cl.step import TrainingStep
from common import busy, geometric, interleave, interval, kept_found, kept_rows, results, save
from peers import model_of, models

base,again,fastais = 'contiguous fp32','contiguous fp32, again','channels last fp32' # what fastai's own gives outside CUDA

def step_of(name, shape, device):
    "A step of training with AdamW, from a fixed seed"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = model_of(name, shape).to(device)
    y = torch.randint(10, (shape[0], *(shape[2:] if name.startswith('unet') else ())), device=device)
    return TrainingStep(model, torch.randn(shape, device=device), y, torch.nn.functional.cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=1e-6))

def stepper(name, shape, device, memory_format, dtype, plan=None, compile=False, scale=1024., sizes=False):
    "A function that trains one step in a world of its own; with `sizes`, on all, three quarters or half of the batch in turn"
    step = step_of(name, shape, device)
    step.loss_scale = scale
    step.convert(memory_format)
    if plan is not None: apply_plan(step.model, plan, step.optimizer)
    if compile: step.model.compile()
    turn,whole = itertools.count(),(step.inputs,step.targets)
    def run():
        if sizes:
            n = max(1, shape[0]*(4-next(turn)%3)//4)
            step.inputs,step.targets = (tuple(t[:n] for t in ts) for ts in whole)
        step.run(dtype=dtype, keep='loss')
        if device.type=='cuda': torch.cuda.synchronize(device)
    for _ in range(2): run() # compiling, and what else is done once
    return run

def native_of(device):
    "Dtype and name of the precision that `device` computes natively besides fp32, or None and None"
    mode = native_amp_mode(device)
    return amp_dtypes.get(mode),mode and mode.value

def arms_of(plan, native, precision, compile):
    "Name to arguments of `stepper`"
    res = {base: ('contiguous', None), again: ('contiguous', None), fastais: ('channels_last', None)}
    if native: res |= {f'contiguous {precision}': ('contiguous', native), f'channels last {precision}': ('channels_last', native)}
    if plan.changes and plan.layers: res['plan'] = plan.memory_format,amp_dtypes_of(plan),plan
    elif plan.changes: res['plan'] = plan.memory_format,amp_dtypes_of(plan)
    else: res['plan'] = 'contiguous',None
    if compile:
        res |= {f'{fastais}, compiled': ('channels_last', None, None, True)}
        res['plan, compiled'] = (*res['plan'], None, None)[:3] + (True,)
    return res

def amp_dtypes_of(plan): return {'fp16': torch.float16, 'bf16': torch.bfloat16}.get(plan.autocast)

def measure(name, shape, device, budget, rounds, block, compile):
    "Plan, and the rows of one network"
    native,precision = native_of(device)
    plan = plan_formats(step_of(name, shape, device), native, budget=budget, cache='refresh')
    steps,failed = {},{}
    hows = arms_of(plan, native, precision, compile)
    for arm,args in hows.items():
        try: steps[arm] = stepper(name, shape, device, *args)
        except Exception as e:
            if arm in (base, again): raise
            failed[arm] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'[:200]
    twin = next((a for a in steps if a!=again and 'plan' not in a and hows[a]==hows['plan']), None)
    if twin: steps.pop('plan', None) # a plan that is a single setting is that arm, and not a copy that lies elsewhere in memory
    with kept_memory(): seconds = interleave(steps, rounds, block)
    if twin: seconds['plan'] = seconds[twin]
    rows = [dict(arm=arm, ms=1e3*statistics.median(s), ratio=interval([b/a for a,b in zip(s, seconds[base])])) for arm,s in seconds.items()]
    def over(arm, others): # of the fastest of `others`, round by round
        best = min((o for o in others if o in seconds), key=lambda o: statistics.median(seconds[o]))
        return dict(arm=best, ratio=interval([b/a for a,b in zip(seconds[arm], seconds[best])]))
    singles = [a for a in seconds if 'plan' not in a and 'compiled' not in a]
    allowed = min((a for a in ('plan', 'plan, compiled', *[a for a in seconds if a.endswith('compiled')]) if a in seconds),
        key=lambda o: statistics.median(seconds[o]))
    known = [r for r in plan.rows if r.before is not None and r.after is not None]
    saved = dict(predicted_ms=1e3*sum(r.before-r.after for r in known),
        measured_ms=1e3*(statistics.median(seconds[base])-statistics.median(seconds['plan'])))
    del steps
    gc.collect()
    return dict(model=name, shape=list(shape), chosen=plan.arm, plan_seconds=plan.seconds, own_ratio=plan.ratio,
        rows=rows, failed=failed, saved=saved, keep_memory=plan.keep_memory,
        over_fastai=over('plan', [fastais]), over_single=over('plan', singles),
        allowed=dict(arm=allowed, over_fastai=over(allowed, [fastais])),
        layers=[[k, w, n] for (k,w),(n,*_) in plan.counts.items()])

def table(found):
    "Markdown"
    lines = ['| | plan over contiguous | over channels last fp32 | over the best single setting | with compile, over channels last fp32 '
        '| chosen | planned in | saved a step, predicted | measured |', '|---|--:|--:|--:|--:|---|--:|--:|--:|']
    def cell(r): return '{:.2f} ({:.2f} to {:.2f})'.format(*r)
    for f in found:
        plan,saved = next(r for r in f['rows'] if r['arm']=='plan'),f['saved']
        lines.append(f"| {f['model']} | {cell(plan['ratio'])} | {cell(f['over_fastai']['ratio'])} | "
            f"{cell(f['over_single']['ratio'])}, {f['over_single']['arm']} | {cell(f['allowed']['over_fastai']['ratio'])} "
            f"| {f['chosen']} | {f['plan_seconds']:.0f} s | {saved['predicted_ms']:.0f} ms | {saved['measured_ms']:.0f} ms |")
    means = [geometric([next(r for r in f['rows'] if r['arm']=='plan')['ratio'][0] for f in found]),
        *[geometric([f[k]['ratio'][0] for f in found]) for k in ('over_fastai', 'over_single')],
        geometric([f['allowed']['over_fastai']['ratio'][0] for f in found])]
    return '\n'.join([*lines, f"| **geometric mean** | {' | '.join(f'**{m:.3f}**' for m in means)} | | | | |"])

def robust(name, shape, device, budget, times, rounds, block):
    "What planning under load chooses, and how fast that is when all is quiet, against the best single setting"
    native,precision = native_of(device)
    with busy(): plans = [plan_formats(step_of(name, shape, device), native, budget=budget, cache=False) for _ in range(times)]
    args = {k:v for k,v in arms_of(plans[0], native, precision, False).items() if k!='plan'}
    args |= {f'plan {i}': arms_of(p, native, precision, False)['plan'] for i,p in enumerate(plans)}
    with kept_memory(): seconds = interleave({a: stepper(name, shape, device, *v) for a,v in args.items()}, rounds, block)
    best = min((a for a in seconds if not a.startswith('plan')), key=lambda a: statistics.median(seconds[a]))
    ratios = [interval([b/a for a,b in zip(seconds[f'plan {i}'], seconds[best])]) for i in range(times)]
    return dict(model=name, shape=list(shape), chosen=[p.arm for p in plans], seconds=[p.seconds for p in plans],
        best_single=best, over_single=ratios, slower=[r[2]<0.98 for r in ratios])

def robust_main(names, device, budget, times, rounds, block, refresh, tiny):
    file,asked = f'plan-robust-{device}',dict(budget=budget, times=times, rounds=rounds, block=block)
    rows = kept_rows(file, asked, refresh or tiny)
    for name in names.split(','):
        if name in [r['model'] for r in rows]: continue
        rows.append(robust(name, (2, *models[name][1:]) if tiny else models[name], device, 10. if tiny else budget,
            times, 2 if tiny else rounds, 3 if tiny else block))
        print(rows[-1], flush=True)
        if not tiny: save(file, rows=rows, **asked)
    print('slower than the best single setting by more than 2 %:', sum(map(sum, (r['slower'] for r in rows))), 'of', times*len(rows))

@call_parse
def main(
    names:str=','.join(models), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    budget:float=120., # Seconds to plan a network in
    rounds:int=10, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    compile:bool=True, # Compiled models, too
    robust_times:int=0, # Plan so often under load, and do no more
    refresh:bool=False, # Measure anew what has been measured
    tiny:bool=False, # Small batches and few rounds, to try the script; writes nothing
):
    "Measure and write benchmarks/results/plan-DEVICE.json and .md"
    if robust_times: return robust_main(names, torch.device(device), budget, robust_times, rounds, block, refresh, tiny)
    device,file = torch.device(device),f'plan-{device}'
    found = kept_found(file, refresh or tiny)
    for name in names.split(','):
        if name in found: continue
        shape = (2, *models[name][1:]) if tiny else models[name]
        found[name] = measure(name, shape, device, 10. if tiny else budget, 2 if tiny else rounds, 3 if tiny else block, compile)
        print(table([found[name]]), flush=True)
        if not tiny: save(file, found=[*found.values()], budget=budget, rounds=rounds, block=block)
    text = table([*found.values()])
    print(text)
    if not tiny: (results/f'{file}.md').write_text(text+'\n')
