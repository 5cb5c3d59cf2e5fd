"""Which layers became wrong or slow with another torch? `python benchmarks/sentinel.py --python OTHER/bin/python --compare OLD.json`

Runs the layers of layers.json, without this package, forward and for the gradients of input (dgrad) and parameters (wgrad), in fp32, bf16
and fp16, contiguous and channels last, one thread a process and one process a core. Each result is checked against double precision
and timed, and those in double precision against those of the other torch; a crash ends only a child. `--python` names the environment to examine, which needs nothing but torch. Writes
results/sentinel-TORCH.json, and with `--compare` the comparison beside it.

`--compare` looks for what became wrong, raises, crashes, or became more than 1.5 times slower. Each suspect is run again in both
environments, in turns on the same core; a slower one counts if the whole 95 % interval of the ratios is above 1.5. Ends with status 1
if anything is found."""
import json, math, os, queue, random, statistics, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.choose import tolerances
from fastxtend_cl.report import machine, markdown_table
from common import results, spread
from sentinel_worker import dtypes

here = Path(__file__).resolve().parent
kernels = 'forward','dgrad','wgrad'
reference = 'fp64',False # in place of an error it has the norm of the result
arms = [reference, *((d, last) for d in dtypes for last in (False, True))]
allowed = {n: tolerances[d] for n,d in dtypes.items()}
wrong = 2. # times the tolerance; sums of many terms in bf16 and fp16 are up to 1.2 off by rounding alone
slower,screened = 1.5,1.35 # times as slow: to be reported; to be run again

def name_of(arm): return f'{arm[0]} {"channels last" if arm[1] else "contiguous"}'
def text_of(layer):
    kw = ', '.join(f'{k}={v}' for k,v in layer['kwargs'].items())
    return f'{layer["layer"]}({kw}) on {"x".join(map(str, layer["x"]))}'

# Running layers in another environment

class Worker:
    "A process of an environment, on one core"
    def __init__(self, python, core):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(1<<34)}
        command = [python, '-W', 'ignore', str(here/'sentinel_worker.py'), *([] if core is None else [str(core)])]
        try: self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        except OSError as e: sys.exit(f'no Python at {python}: {e.strerror}')
        line = self.process.stdout.readline()
        if not line: sys.exit(f'{python} does not run benchmarks/sentinel_worker.py: it needs torch')
        self.about = json.loads(line)

    def run(self, layer, arms=arms, kernels=kernels, seconds=0.004, direct=False):
        "Error and seconds of each kernel of each arm, as (arm, kernel): 'died ...', 'raised: ...', or a pair of numbers"
        if len(layer['x'])==3: arms = [a for a in arms if not a[1]] # has one format only
        job = dict(layer={k: layer[k] for k in ('layer', 'kwargs', 'x')}, arms=[[*a, kernels] for a in arms], seconds=seconds, tolerances=allowed, direct=direct)
        self.process.stdin.write(json.dumps(job)+'\n'); self.process.stdin.flush()
        res = {}
        for line in self.process.stdout:
            a = json.loads(line)
            if 'done' in a: return res
            if 'failed' in a:
                res.update({(b, k): f'raised: {a["failed"]}' for b in arms for k in kernels if (b, k) not in res})
                continue
            arm = tuple(a['arm'])
            for k in kernels:
                if 'died' in a: res[arm,k] = f'died of signal {a["died"]}'
                elif k in a: res[arm,k] = a[k]
        raise RuntimeError(f'the process that runs layers ended at {text_of(layer)}')

    def close(self): self.process.stdin.close(); self.process.wait()

class Pool:
    "Workers of one or more environments on each core, and a function applied to items side by side"
    def __init__(self, pythons, n):
        cores = sorted(os.sched_getaffinity(0))[:n] if hasattr(os, 'sched_getaffinity') else [None]*n
        self.sets,self.free = [[Worker(p, c) for p in pythons] for c in cores],queue.SimpleQueue()
        for s in self.sets: self.free.put(s)
    @property
    def about(self): return [w.about for w in self.sets[0]]
    def __enter__(self): return self
    def __exit__(self, *_):
        for s in self.sets:
            for w in s: w.close()

    def map(self, f, items):
        "`f(workers, item)` of each item"
        def one(item):
            mine = self.free.get()
            try: return f(mine, item)
            finally: self.free.put(mine)
        with ThreadPoolExecutor(len(self.sets)) as ex:
            try: return [*progress_bar(ex.map(one, items), total=len(items), leave=False)]
            except BaseException: ex.shutdown(cancel_futures=True); raise

def about(worker):
    m = machine('cpu')
    return dict(cpu=m['device_name'], cpu_capability=worker['cpu_capability'], torch=worker['torch'], git=worker['git'], date=m['date'])

def rounded(arm, v): return v if isinstance(v, str) else [float(f'{v[0]:.{12 if arm==reference else 3}g}'), float(f'{1e6*v[1]:.4g}')]

def measure(python, layers, n):
    "Results of all layers: error as a multiple of the tolerance, microseconds"
    with Pool([python], n) as pool:
        found = pool.map(lambda ws, o: ws[0].run(o), layers)
        rows = [dict(layer=text_of(o), results=[[rounded(a, r[a,k]) if (a,k) in r else None for k in kernels] for a in arms]) for o,r in zip(layers, found)]
        return dict(conditions=about(*pool.about), arms=[name_of(a) for a in arms], kernels=[*kernels], rows=rows)

# Comparing

@dataclass
class Suspect:
    layer:dict
    arm:tuple
    kernel:str
    what:str # 'crashes', 'raises', 'wrong' or 'slower'
    old:object # What was measured
    new:object
    ratio:tuple|None = field(default=None) # Of the times, when both were run again: median and interval
    @property
    def weight(self): return self.new[1]/self.old[1] if self.what=='slower' else math.inf

def is_bad(arm, v): return isinstance(v, str) or arm!=reference and v[0]>wrong

def kind_of(arm, old, new):
    "What became worse, or None; values as in the results"
    if isinstance(new, str): return None if isinstance(old, str) else 'crashes' if new.startswith('died') else 'raises'
    if isinstance(old, str): return None
    if arm==reference: return None if math.isclose(old[0], new[0], rel_tol=1e-9) else 'wrong'
    if new[0]>wrong and new[0]>3*old[0]: return 'wrong'
    if new[1]>screened*old[1]: return 'slower'

def pairs(old, new):
    "Arm, kernel, old and new value of all layers that both have"
    before = {r['layer']: r['results'] for r in old['rows']}
    for row in new['rows']:
        for a,xs,ys in zip(arms, before.get(row['layer'], []), row['results']):
            for k,x,y in zip(kernels, xs, ys):
                if x is not None and y is not None: yield row['layer'],a,k,x,y

def suspects(layers, old, new):
    known = {text_of(o): o for o in layers}
    res = [Suspect(known[l], a, k, what, x, y) for l,a,k,x,y in pairs(old, new) if (what := kind_of(a, x, y)) and l in known]
    return sorted(res, key=lambda s: -s.weight)

def confirm(workers, s, rounds=8, tries=3):
    """Run a suspect again in both environments, in turns; the suspect, if it is still one

    Times are taken outside of forked children, where some functions are slower. The 95 % interval of 8 ratios is all of them, so one that
    is not above `slower` is enough."""
    before,after = [],[]
    for i in range(rounds if s.what=='slower' else tries):
        for w,to in random.sample([(workers[0],before),(workers[1],after)], 2):
            to.append(w.run(s.layer, [s.arm], [s.kernel], 0.01, direct=s.what=='slower')[s.arm,s.kernel])
        if s.what=='slower' and (isinstance(before[-1], str) or isinstance(after[-1], str) or after[-1][1]<=slower*before[-1][1]): return
    if s.what=='slower':
        s.ratio = spread([y[1]/x[1] for x,y in zip(before, after)])
        return s
    bad = [kind_of(s.arm, x, y) for x,y in zip(before, after)]
    return s if s.what in bad and not any(is_bad(s.arm, x) for x in before) else None

def shown(arm, v): return v if isinstance(v, str) else f'norm {v[0]:.10g}' if arm==reference else f'error {v[0]:.2g}, {v[1]:.4g} µs'

def table_of(found):
    "A row for each layer and kernel that became worse; errors are multiples of the tolerance"
    rows = [[text_of(s.layer), f'{name_of(s.arm)}, {s.kernel}', s.what if s.ratio is None else '{:.2f} ({:.2f} to {:.2f}) times as slow'.format(*s.ratio),
        shown(s.arm, s.old), shown(s.arm, s.new), f'{s.layer["networks"]}, such as {s.layer["such_as"]}' if 'networks' in s.layer else '-'] for s in found]
    return markdown_table([['layer', 'kernel', 'became', 'old', 'new', 'networks'], *rows], 6)

def summary_of(old, new, found):
    "For each arm and kernel: how many, the median of the ratios of times, how many became slower, and how many are faulty"
    rows,seen = [],[*pairs(old, new)]
    for a in arms[1:]:
        for k in kernels:
            both = [(x,y) for _,b,j,x,y in seen if (b,j)==(a,k)]
            timed = [y[1]/x[1] for x,y in both if not isinstance(x, str) and not isinstance(y, str)]
            if not timed: continue
            rows.append([f'{name_of(a)}, {k}', str(len(both)), f'{statistics.median(timed):.2f}', f'{sum((s.arm,s.kernel,s.what)==(a,k,"slower") for s in found)}',
                *(f'{sum(is_bad(a, o[i]) for o in both)}' for i in range(2))])
    return markdown_table([['kernel', 'layers', 'time, new / old: median', 'slower', 'wrong, raising or crashing: old', 'new'], *rows], 1)

def environment_of(old, given):
    "The Python of the environment that OLD.json was measured in"
    then,now = old['conditions'],machine('cpu')
    if then['cpu']!=now['device_name']: sys.exit(f'measured on {then["cpu"]}, and this is {now["device_name"]}: times cannot be compared. Measure it again here')
    if given: return given
    if then['torch']!=now['torch']: sys.exit(f'measured with torch {then["torch"]}, and this Python has {now["torch"]}: name one that has it with --old')
    return sys.executable

def became_worse(layers, old, new, pythons, n, seconds):
    "What is worse in `new` after both environments have run it again, and the page that says so"
    todo,end,late = suspects(layers, old, new),time.monotonic()+seconds,[]
    def look(workers, s):
        if time.monotonic()<end: return confirm(workers, s)
        late.append(s)
    with Pool(pythons, n) as pool:
        for then,there in zip((old, new), pool.about):
            if then['conditions']['git']!=there['git']:
                sys.exit(f'measured with torch {then["conditions"]["torch"]}, but the Python given for it has {there["torch"]}')
        found = [s for s in pool.map(look, todo) if s]
    names = [f'torch {o["conditions"]["torch"]}' for o in (old, new)]
    text = [f'# {names[1]} against {names[0]}', f'On {new["conditions"]["cpu"]}, {new["conditions"]["date"]}, one thread. {len(todo)} kernels looked worse. '
        f'Run again in turns, {len(found)} {"is" if len(found)==1 else "are"}.'+f' For {len(late)} there was no time (`--seconds {seconds:g}`).'*bool(late),
        *([table_of(found)] if found else []), 'All kernels:', summary_of(old, new, found)]
    return found,'\n\n'.join(text)+'\n'

def write(path, data):
    "JSON with a row of the results a line"
    rows = ',\n'.join(json.dumps(r, separators=(',', ':')) for r in data['rows'])
    path.write_text(json.dumps({k: v for k,v in data.items() if k!='rows'}, indent=1)[:-2]+f',\n "rows": [\n{rows}\n ]\n}}\n')
    print(f'written: {path}')

@call_parse
def main(
    python:str=None, # Python of the environment to examine; default: this one
    compare:str=None, # Results of another torch, to compare with
    old:str=None, # Python of the environment of those; default: this one, if it has the same torch
    measured:str=None, # Results of the environment to examine, instead of running all layers
    out:str=None, # File or folder for the results; default: benchmarks/results
    seconds:float=240, # For running suspects again
    workers:int=2, # Processes side by side, each on its own core
    tiny:bool=False, # 12 layers
):
    "Run many layers with one torch, and compare with another"
    layers = json.loads((here/'layers.json').read_text())
    if tiny: layers = layers[::len(layers)//12][:12]
    python,then = python or sys.executable,compare and json.loads(Path(compare).read_text())
    if then: old = environment_of(then, old)
    if measured: new,to = json.loads(Path(measured).read_text()),Path(measured)
    else:
        new,to = measure(python, layers, workers),Path(out or results)
        if not to.suffix: to = to/f'sentinel-{new["conditions"]["torch"].split("+")[0]}.json'
        write(to, new)
    if not then: return
    found,page = became_worse(layers, then, new, [old, python], workers, seconds)
    print(page)
    to.with_suffix('.md').write_text(page)
    sys.exit(bool(found))
