"""Everything that needs a GPU, in one command: `python benchmarks/gpu.py`, or some of its parts: `--parts right,faults`

plan: what the race of `to_channelslast(plan='auto')` chooses, and whether that is the fastest setting
faults: known reports, reproduced or refuted, and random operators, networks and convolutions against double precision
    (gpu_faults.py)
right: optimizers, checkpoints, exports, compiled models, CUDA graphs and mixed precision through `to_channelslast` (gpu_right.py)
checks: `check_formats` of networks with grouped and depthwise convolutions (gpu_right.py)
tests: those that depend on the device
kernels: how fast and right each convolution of a few networks is (gpu_kernels.py)
speed: how fast training is (gpu_speed.py)
scripts: traces, which write results of their own, and the demo

Each part writes results/gpu-PART-DEVICE.json, after every row; what raises is a row, and the next part goes on. The exit status is 1 if a
part failed or found something wrong. `--device cpu --tiny` tries all without a GPU and writes nothing."""
import contextlib, difflib, importlib.util, io, itertools, json, os, signal, subprocess, sys, tempfile, time, traceback, warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from fastcore.script import call_parse
from common import read, save

here = Path(__file__).resolve().parent
env = {'OMP_NUM_THREADS': '2', **os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), str(here.parent), str(here)]))}
parts = {'plan': None, 'faults': ('gpu_faults', 'operators,large,networks,random'), 'right': ('gpu_right', 'small,compile,amp'),
    'checks': ('gpu_right', 'pool,fp16,bf16'), 'tests': None, 'kernels': None, 'speed': None, 'scripts': None} # Shortest first

def short(o):
    "The same with four digits of each number"
    if isinstance(o, float): return float(f'{o:.4g}')
    if isinstance(o, dict): return {k: short(v) for k,v in o.items()}
    return [short(v) for v in o] if isinstance(o, (list, tuple)) else o

class Rows:
    "Rows of a part: printed, and written to results/gpu-PART-DEVICE.json"
    def __init__(self, part, device, tiny):
        self.name,self.tiny,self.rows,self.counts,self.start = f'gpu-{part}-{device.type}',tiny,[],{},time.time()

    def add(self, **row):
        self.rows.append(row := short(row))
        text = ', '.join(f'{k} {v}' for k,v in row.items() if k not in ('trace', 'tail'))
        print(text if len(text)<300 else text[:300]+' ...', flush=True)

    def keep(self):
        with contextlib.redirect_stdout(io.StringIO()):
            if not self.tiny: save(self.name, rows=self.rows, counts=self.counts, seconds=round(time.time()-self.start, 1))

    def attempt(self, f, **about):
        "Add what `f` returns, or why it failed"
        start = time.time()
        try: res = f()
        except Exception as e: res = failure(e)
        self.add(**about, **res, took=round(time.time()-start, 1))
        self.keep()

    @property
    def bad(self): return [r for r in self.rows if r.get('ok') is False or 'failed' in r]

def failure(e): return dict(failed=f'{type(e).__name__}: {e}'[:500], trace=traceback.format_exc().splitlines()[-8:])

# Sections: generators of steps, in a process of their own

endless = 'networks','random'

def child(module, name, device, tiny, skip, until, file):
    "Run the steps of a section from number `skip`, writing to `file` what begins and what is found"
    warnings.simplefilter('ignore')
    device,out = torch.device(device),open(file, 'a', buffering=1)
    def say(**message): out.write(json.dumps(message, default=str)+'\n')
    for about,f in itertools.islice(importlib.import_module(module).sections[name](device, tiny), skip, None):
        start = time.time()
        if start>until and name in endless: break
        about = about if isinstance(about, str) else dict(about)
        if start>until: say(at=about, row=dict(left_out='no time was left')); continue
        say(at=about)
        try:
            res = f()
            for r in [res] if isinstance(res, dict) else res: say(**(r if 'count' in r else dict(row=r)))
        except Exception as e:
            say(row=failure(e))
            try: torch.ones(1, device=device).add(1).item()
            except RuntimeError: os._exit(77) # the device is lost to this process
        say(took=round(time.time()-start, 2))
        if device.type=='cuda' and name not in endless: torch.cuda.empty_cache()
    say(done=True)
    out.close()
    os._exit(0) # helpers of a compiler may be left

class Section:
    "A section in a process, which is started again behind what has ended it"
    def __init__(self, module, name, device, tiny, until, folder):
        self.args,self.name,self.until = (module, name, str(device), tiny),name,until
        self.file,self.errors = Path(folder)/name,Path(folder)/f'{name}.err'
        self.begun,self.read,self.at,self.done,self.crashed = 0,0,None,False,0
        self.file.touch()
        self.run()

    def run(self):
        self.since,own = time.time(),{**env, 'TORCHINDUCTOR_CACHE_DIR': f'{self.file}.inductor'}
        code = f'import gpu; gpu.child(*{(*self.args, self.begun, self.until, str(self.file))!r})'
        with self.errors.open('w') as err:
            self.p = subprocess.Popen([sys.executable, '-c', code], cwd=here, env=own, stdout=subprocess.DEVNULL, stderr=err,
                start_new_session=True)

    def kill(self):
        with contextlib.suppress(ProcessLookupError): os.killpg(self.p.pid, signal.SIGKILL)
        self.p.wait()

    def messages(self):
        with self.file.open() as f:
            f.seek(self.read)
            text = f.read()
        lines = text[:text.rfind('\n')+1]
        self.read += len(lines.encode())
        return [json.loads(l) for l in lines.splitlines()]

    def poll(self, rows):
        "Take what is new; returns whether there was anything"
        ended = self.p.poll() is not None
        new = self.messages()
        for m in new:
            self.since = time.time()
            if 'at' in m: self.at,self.begun = m['at'],self.begun+1
            if 'row' in m: rows.add(section=self.name, **m['row'], **({} if 'case' in m['row'] else dict(at=self.at)))
            if 'took' in m and self.name not in endless: rows.rows[-1].setdefault('took', m['took'])
            for k,v in m.get('count', {}).items():
                rows.counts[k] = [a+b for a,b in itertools.zip_longest(rows.counts.get(k, []), v, fillvalue=0)]
            self.done |= 'done' in m
        if self.done: self.kill()
        elif ended or (why := self.overdue()): self.restart(rows, None if ended else why)
        return bool(new)

    def overdue(self):
        now = time.time()
        if now>self.until+12: return 'killed at the limit'
        if self.name in endless and now-self.since>45: return 'killed: no answer'

    def restart(self, rows, why):
        self.kill()
        tail = self.errors.read_text()[-1500:].splitlines()
        if why or self.p.returncode!=77:
            rows.add(section=self.name, at=self.at, failed=why or f'ended with status {self.p.returncode}', trace=tail)
        self.crashed += 1
        idle = self.crashed>3 and not self.begun # it cannot even begin
        self.done = idle or self.crashed>30 or time.time()>self.until-5
        if not self.done: self.run()

def run_sections(part, device, tiny, seconds, only=None):
    module,names = parts[part]
    rows = Rows(part, device, tiny)
    if only: # the others' rows stay
        rows.rows = [r for r in read(rows.name).get('rows', []) if r.get('section') not in only.split(',')]
        names = only
    with tempfile.TemporaryDirectory() as folder:
        limits = {n: min(seconds, 20) if tiny and n in endless else seconds for n in names.split(',')}
        sections = [Section(module, n, device, tiny, rows.start+l, folder) for n,l in limits.items()]
        try:
            while any(not s.done for s in sections):
                time.sleep(.3)
                if any([s.poll(rows) for s in sections if not s.done]): rows.keep()
        finally:
            for s in sections: s.kill()
    if part=='faults': rows.add(verdicts=importlib.import_module(module).verdicts(rows.rows, rows.counts))
    rows.keep()
    if rows.counts: print(f'{sum(v[0] for v in rows.counts.values())} results of {len(rows.counts)} kinds; those wrong or failed:')
    for k,v in sorted(rows.counts.items()):
        if any(v[1:]): print(f'{k:60}', *v)
    found = [r for r in rows.rows if r.get('wrong') or 'case' in r]
    print(f'{part}: {len(rows.rows)} rows, {len(rows.bad)} failed or not OK, {len(found)} with wrong results')
    return not rows.bad

# The other parts

def raced(name, device, tiny, compile, seconds):
    "What the race chooses in a fit of random images that are on the device already, against what `bench_formats` says of the same settings"
    from fastai.callback.core import Callback, CancelFitException
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from fastxtend_cl.all import TrainingStep, bench_formats
    from gpu_common import network, random_batch, sizes, tiny_sizes
    class Until(Callback):
        "End the fit with the race"
        order = 300
        def after_batch(self):
            if self.learn.channels_last.plan.conditions: raise CancelFitException
    size = (tiny_sizes if tiny else sizes)[name]
    x,y = random_batch(name, size, device)
    torch.manual_seed(0)
    with device: model = network(name, size).to(device)
    learn = Learner(DataLoaders([(x, y)]*250, [(x, y)]), model, loss_func=torch.nn.functional.cross_entropy,
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), lr=1e-6)
    learn.to_channelslast(plan='refresh', compile=compile).add_cb(Until())
    start = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    plan,took = learn.channels_last.plan,time.time()-start
    print(plan, flush=True)
    arms = [a for a in learn.race.arms.values() if not a.compile]
    res = dict(size=list(size), plan=plan.to_dict(), race_seconds=took)
    if compile or seconds<5: return res
    step = TrainingStep(model, x, y, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters(), lr=1e-6))
    arms = [replace(a, tuned=True) for a in arms]
    bench = bench_formats(step, arms[1:], baseline=replace(arms[0], name='baseline'), seconds=seconds, bar=False)
    print(bench, flush=True)
    bench.about()
    alone = {('baseline' if i==0 else a.name): a.name for i,a in enumerate(arms)}
    each = {alone[r.arm]: r.seconds for r in bench.rows if r.arm in alone and r.seconds}
    best = min(each, key=each.get)
    return {**res, 'alone': each, 'best': best, 'regret': each[plan.arm]/each[best] if plan.arm in each else None, 'conditions': bench.conditions}

def run_plan(device, tiny, seconds):
    "The race of `to_channelslast(plan='auto')`, with networks for which channels last pays and others for which it does not"
    torch.backends.cudnn.benchmark = False # its searches take longer than what is measured here
    rows,end = Rows('plan', device, tiny),time.time()+seconds
    cases = [(n, False) for n in ('resnet50', 'regnetx_032', 'r3d_18', 'efficientnet_b0', 'resnest50d', 'mobilenetv2_100', 'densenet121', 'convnext_tiny')]
    for name,compile in [*cases[:3], ('resnet50', True), *cases[3:]] if not tiny else cases[:3]:
        if time.time()>end: rows.add(model=name, compile=compile, left_out='no time'); continue
        rows.attempt(lambda: raced(name, device, tiny, compile, 5 if tiny else 15), model=name, compile=compile)
        if device.type=='cuda': torch.cuda.empty_cache()
    return not rows.bad

def run_kernels(device, tiny, seconds):
    import gpu_kernels
    gpu_kernels.run_kernels(device, tiny, seconds)
    return True

def finish(command, seconds, cwd, **more):
    "Exit status of a command (None: it was killed when the time was over), the end of what it said, and seconds"
    start = time.time()
    with tempfile.TemporaryFile('w+') as out:
        p = subprocess.Popen(command, cwd=cwd, env={**env, **more}, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try: p.wait(seconds)
        except subprocess.TimeoutExpired: pass
        status = p.poll()
        with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        out.seek(0)
        more = {} if status==0 else dict(ok=False)
        return dict(status=status, seconds=round(time.time()-start, 1), tail=out.read()[-20_000:], **more)

def run_script(part, command, device, tiny, seconds, rows=None):
    rows = rows or Rows(part, device, tiny)
    rows.attempt(lambda: finish([sys.executable, *command, '--device', str(device), *['--tiny']*tiny], seconds, here),
        script=' '.join(command))
    if rows.rows[-1].get('ok') is False: print(rows.rows[-1]['tail'][-3000:])
    return not rows.bad

def run_speed(device, tiny, seconds): return run_script('speed', ['gpu_speed.py'], device, tiny, 590)

def run_scripts(device, tiny, seconds):
    rows = Rows('scripts', device, tiny)
    for command in (['traces.py'], *[['traces.py', '--autocast', 'fp16']]*(device.type=='cuda')):
        if tiny and command[0]=='traces.py': command = [*command, '--names', 'resnet18']
        run_script('scripts', command, device, tiny, 240, rows)
    size = dict(epochs=1, arch='xresnet18', size=32, bs=256, seconds=3) if tiny else dict(epochs=4, arch='resnet50', size=128, bs=64)
    args = ['demo', '--json', '--device', str(device), *[a for k,v in size.items() for a in (f'--{k}', str(v))]]
    code = 'import sys; from fastxtend_cl.cli import main; sys.exit(main())'
    rows.attempt(lambda: finish([sys.executable, '-c', code, *args], 240, here.parent), script='demo')
    return not rows.bad

# Tests

tests = ['amp', 'format', 'training', 'step', 'check', 'trace', 'kernels', 'tuned_training']

def pytest_runtest_logreport(report):
    "This file as a plugin of pytest: write each result at once, so that they are there when pytest is killed"
    if os.environ.get('PYTEST_XDIST_WORKER') or report.when!='call' and report.passed: return
    outcome = report.outcome if report.when=='call' or not report.failed else f'error in {report.when}'
    row = dict(test=report.nodeid, outcome=outcome, seconds=round(report.duration, 2))
    if report.failed: row['trace'] = report.longreprtext.splitlines()[-15:]
    with open(os.environ['FXCL_GPU_TESTS'], 'a') as f: f.write(json.dumps(row)+'\n')

def has(module): return importlib.util.find_spec(module) is not None

def run_tests(device, tiny, seconds):
    rows = Rows('tests', device, tiny)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'results'
        file.touch()
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'gpu', '--tb=short', '--durations=10',
            *['-n', '6']*has('xdist'), *['--timeout', '120']*has('pytest_timeout'),
            *[f'tests/test_{t}.py' for t in tests[:1 if tiny else None]]]
        res = finish(command, max(110, seconds), here.parent, FXCL_DEVICE=str(device), FXCL_GPU_TESTS=str(file))
        found = [json.loads(l) for l in file.read_text().splitlines()]
    for r in found:
        if 'trace' in r: rows.add(**r, failed=r['trace'][-1] if r['trace'] else '')
    counts = dict(Counter(r['outcome'] for r in found))
    rows.add(summary=counts, slowest=sorted([(r['seconds'], r['test']) for r in found], reverse=True)[:10], **res)
    rows.keep()
    print(*res['tail'].splitlines()[-15:], f'tests: {counts}', 'killed when the time was over' if res['status'] is None else '', sep='\n')
    return not rows.bad

def unknown(names):
    "What to say of names that are no parts, or None"
    for n in names:
        if n in parts: continue
        near = difflib.get_close_matches(n, parts, 1)
        return f"unknown part {n!r}; {f'did you mean {near[0]!r}?' if near else f'choose from {chr(44).join(parts)}'}"

def unknown_sections(names, sections):
    "What to say of sections that are not those of the one part named, or None"
    known = {n: v[1].split(',') for n,v in parts.items() if v}
    if sections and (len(names)>1 or {*sections.split(',')}-{*known.get(names[0], [])}):
        return f'sections {sections!r}: choose from those of one part: {", ".join(f"{n}: {chr(44).join(v)}" for n,v in known.items())}'

@call_parse
def main(
    device:str='cuda', # Where to run
    tiny:bool=False, # Small and short, to try the script; writes nothing
    parts:str=','.join(parts), # What to do, separated by commas
    seconds:float=None, # Of each part but speed and scripts; default: 80, with --tiny 100
    sections:str=None, # Of one part of faults, right and checks, only these; what its file has of the others stays
):
    "Run the parts and write benchmarks/results/gpu-PART-DEVICE.json"
    names = parts.split(',')
    if why := unknown(names) or unknown_sections(names, sections): sys.exit(why)
    limit = seconds or (100 if tiny else 80)
    if len(names)>1: # each in a process of its own, so that a lost device or its memory is one part's
        own = [sys.executable, str(here/'gpu.py'), '--device', device, '--seconds', str(limit), *['--tiny']*tiny]
        failed = [n for n in names if subprocess.run([*own, '--parts', n], env=env).returncode]
        print(f'failed: {", ".join(failed)}' if failed else f'all OK: {parts}')
        sys.exit(int(bool(failed)))
    name,device = names[0],torch.device(device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # so that sections end, too
    print(f'== {name} on {device}', flush=True)
    run = dict(plan=run_plan, tests=run_tests, kernels=run_kernels, speed=run_speed, scripts=run_scripts)
    try: ok = run[name](device, tiny, limit) if name in run else run_sections(name, device, tiny, limit, sections)
    except Exception: traceback.print_exc(); ok = False
    print(f'== {name}: {"OK" if ok else "failed, or wrong results"}', flush=True)
    sys.exit(int(not ok))
