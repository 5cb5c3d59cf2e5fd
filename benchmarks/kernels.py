"""What `to_channelslast()` gains, and what tuning kernels costs: `python benchmarks/kernels.py`

The twelve networks of peers.py and others that nothing was fitted to, each in a child process with an empty cache of kernels. Every
arm is a `Learner` of its own with the same weights and batch, timed by `Learner.one_batch` with the independent harness of
common.py: paired, in blocks in random order, memory kept for all. The first step of a second child has a warm cache.
Writes results/kernels-DEVICE.json and .md after each network and goes on where it was broken off. `--tiny` tries the script."""
import json, os, statistics, subprocess, sys, tempfile, time, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.kernels import kernel_count, kernel_table, tuning_line
from fastxtend_cl.memory import kept_memory
from fastxtend_cl.ways import crashing_layers
from common import conditions, geometric, interleave, interval, kept_found, results, save
from peers import as_fastai, learner, models, ready

others = {'mobilenetv4_conv_small': (16, 3, 128, 128), 'mnasnet_100': (16, 3, 128, 128), 'efficientnetv2_rw_t': (8, 3, 128, 128),
    'regnetx_004': (16, 3, 128, 128), 'resnext50_32x4d': (8, 3, 128, 128), 'repvgg_a0': (16, 3, 128, 128),
    'mobileone_s0': (16, 3, 128, 128), 'googlenet': (16, 3, 128, 128), 'edgenext_xx_small': (16, 3, 128, 128), 'mc3_18': (2, 3, 8, 56, 56)}
shapes = models | others
base,again,fastai,plain,ours,ours_fp32 = ('contiguous fp32','contiguous fp32, again',"fastai's to_channelslast()",
    'tune=False','to_channelslast()','use_amp=False')
arms = {base: lambda learn, device: None, again: lambda learn, device: None, fastai: as_fastai,
    plain: lambda learn, device: learn.to_channelslast(tune=False), ours_fp32: lambda learn, device: learn.to_channelslast(use_amp=False),
    ours: lambda learn, device: learn.to_channelslast()}

def step_of(name, arm, device, shape):
    "A function that trains one step"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(name, shape, device)
        if arm==fastai and device.type=='cpu' and (names := crashing_layers(learn.model)):
            raise RuntimeError(f'not run: the kernels of {names[0]} can end the process (oneDNN issue 6035)')
        arms[arm](learn, device)
        return ready(learn, device)

def first_step(step):
    "Seconds of a first step, what its tuning took of them, and what that says"
    since,start = kernel_count(),time.perf_counter()
    step()
    return dict(first=time.perf_counter()-start, tuning=kernel_table(since).seconds, line=tuning_line(since))

def in_process(name, device, rounds, block, warm, shape):
    "Measure one network in this process and print a line of JSON"
    res,steps = {},{}
    with kept_memory():
        if warm: return print(json.dumps(first_step(step_of(name, ours, device, shape))))
        for arm in arms:
            try: steps[arm] = step_of(name, arm, device, shape)
            except Exception as e: res.setdefault('failed', {})[arm] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'[:200]; continue
            first = first_step(steps[arm])
            if arm in (ours, ours_fp32): res[arm] = first
            for _ in range(2): steps[arm]()
        seconds = interleave(steps, rounds, block, progress=False)
    rows = [dict(arm=a, ms=1e3*statistics.median(s), ratio=interval([b/o for o,b in zip(s, seconds[base])])) for a,s in seconds.items()]
    print(json.dumps(dict(model=name, shape=list(shape), rows=rows, **res)))

def run_child(name, cache, *more):
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--child', name, *more], capture_output=True, text=True,
        env={**os.environ, 'FASTXTEND_CL_CACHE': cache})
    if r.returncode: return dict(failed_child=f'exit status {r.returncode}: {r.stderr[-500:]}')
    return json.loads(r.stdout.splitlines()[-1])

def measure(name, *more):
    with tempfile.TemporaryDirectory() as cache:
        res = run_child(name, cache, *more)
        return dict(model=name, **{k: v for k,v in res.items() if k!='model'}, warm=run_child(name, cache, '--warm', *more))

def ratios(f): return {r['arm']: r['ratio'] for r in f['rows']}

def table(found):
    "Markdown: a row for each network"
    names = [again, fastai, plain, ours_fp32, ours]
    lines = [f'| | {" | ".join(names)} | tuning, s | first step, s: empty cache | warm |', '|---|'+'--:|'*(len(names)+3)]
    def cell(r): return '' if r is None else '{:.2f} ({:.2f} to {:.2f})'.format(*r)
    for f in found:
        got = ratios(f)
        lines.append(f"| {f['model']} | {' | '.join(cell(got.get(n)) for n in names)} | {f[ours]['tuning']:.1f} | {f[ours]['first']:.1f} "
            f"| {f['warm'].get('first', 0):.2f} |")
    for label,some in (('twelve networks', models), ('others', others)):
        rs = [ratios(f) for f in found if f['model'] in some]
        means = [f'{geometric(r[n][0] for r in rs):.2f}' if rs and all(n in r for r in rs) else '' for n in names]
        if rs: lines.append(f'| **geometric mean, {label} ({len(rs)})** | {" | ".join(means)} | | | |')
    behind = [f['model'] for f in found if (g := ratios(f))[ours][0]<0.97*max(1, g.get(fastai, [0])[0])]
    notes = [f"- {f['model']}, {a}: {why}" for f in found for a,why in f.get('failed', {}).items()]
    lines += ['', f"Behind the better of contiguous and fastai's by more than 3 %: {', '.join(behind) or 'none'}.", '', *notes]
    return '\n'.join(lines)

@call_parse
def main(
    names:str=','.join(shapes), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    child:str=None, # Measure this network in this process and write nothing
    warm:bool=False, # In a child: only the first step
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2 and images of 32 pixels; writes nothing
):
    "Measure and write benchmarks/results/kernels-DEVICE.json and .md"
    device = torch.device(device)
    if child:
        shape = (2, 3, *((4, 32, 32) if len(shapes[child])==5 else (32, 32))) if tiny else shapes[child]
        return in_process(child, device, rounds, block, warm, shape)
    found = {} if tiny else kept_found(f'kernels-{device.type}', refresh)
    more = ['--device', str(device), '--rounds', str(rounds), '--block', str(block), *['--tiny']*tiny]
    for name in progress_bar(names.split(',')):
        if name in found: continue
        found[name] = measure(name, *more)
        f = found[name]
        if 'rows' not in f: print(name, f); del found[name]; continue
        print(name, {a: round(r[0], 2) for a,r in ratios(f).items()}, f[ours]['line'], flush=True)
        if tiny: continue
        save(f'kernels-{device.type}', found=[*found.values()], rounds=rounds, block=block)
        c = conditions()
        (results/f'kernels-{device.type}.md').write_text(f"Times as fast as contiguous fp32 (95 % interval). {c['gpu'] or c['cpu']}, "
            f"{c['cores']} threads, torch {c['torch']}, fastai {c['fastai']}, {c['date']}.\n\n{table([*found.values()])}\n")
    print(table([*found.values()]))
