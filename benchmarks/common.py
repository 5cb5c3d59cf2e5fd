"""How the benchmarks measure and save their results

`paired` measures: in each round every arm runs one block of steps, in a new random order; the first step of a block is dropped, and the
median of the others counts. `compared` divides round by round: how many times as fast as the first arm, the median of the rounds and its
95 % interval. Clocks, blocks and intervals are those of `fastxtend_cl.timing`. `Results` saves the rows after each network, with machine,
versions, date and settings, and the next run continues from there."""
import contextlib, json, math, os, platform, random, statistics, subprocess, sys
from pathlib import Path
import torch
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.report import markdown_table
from fastxtend_cl.timing import Deadline, TimedArm, device_clock, interval, pairs_of, run_block

results = Path(__file__).resolve().parent/'results'

# Measuring

class NoDeadline(Deadline):
    "A deadline that is never reached, without the checks between steps that a real one needs"
    until = None
    def __init__(self, clock): super().__init__(math.inf, clock)

def paired(arms, rounds, block, device='cpu', bar=False, over=lambda: False, drop=False):
    """A `TimedArm` for each name, with its seconds per step in each round; fewer rounds if `over()`

    An error in an arm is raised. With `drop` it ends only that arm, whose `failed` says why, unless it is the first arm."""
    deadline,rng = NoDeadline(device_clock(device)),random.Random(0)
    timed = {n: TimedArm(n, lambda body, f=f: body(f)) for n,f in arms.items()}
    first = next(iter(timed.values()))
    for i in progress_bar(range(rounds), leave=False) if bar else range(rounds):
        running = [a for a in timed.values() if not a.failed]
        for arm in rng.sample(running, len(running)):
            run_block(arm, deadline, block, i)
            if arm.failed and not drop: raise RuntimeError(f'{arm.name}: {arm.failed}')
        if over() or first.failed: break
    return timed

def spread(values):
    "Median and its interval of 95 %, by order statistics; of less than 6 values it covers less"
    values = [*values]
    return interval(values, 0.05, (len(values),)) if len(values)>3 else (statistics.median(values), min(values), max(values))

def ratio_of(base, arm):
    "How many times as fast as `base`: median and interval"
    return [*spread(pairs_of(base.seconds, arm.seconds))]

def ms_of(arm): return 1e3*statistics.median(arm.seconds.values())

def compared(timed, base=None):
    "A row for each arm: milliseconds of a step, and how many times as fast as `base` it is"
    base = base or next(iter(timed.values()))
    return [dict(arm=n, ms=ms_of(a), ratio=ratio_of(base, a)) for n,a in timed.items()]

def geometric(ratios): return math.exp(statistics.fmean(map(math.log, ratios)))

_busy = """
import os, sys, time
parent = os.getppid()
while os.getppid()==parent: # ends with its parent
    end = time.time()+3
    while time.time()<end: pass
    time.sleep(float(sys.argv[1]))
"""

@contextlib.contextmanager
def busy(rest=0.):
    "Run another process on the same cores meanwhile: it computes for 3 seconds, then sleeps for `rest` seconds"
    p = subprocess.Popen([sys.executable, '-c', _busy, str(rest)])
    try: yield
    finally: p.kill(); p.wait()

def options(**values):
    "Arguments of a command line; True is a flag, None and False are left out"
    return [s for k,v in values.items() if v is not None and v is not False for s in (f'--{k.replace("_", "-")}', *[str(v)]*(v is not True))]

def run_child(script, cache=None, **values):
    "Run `python SCRIPT` in its own process, with `cache` as its cache folder, and return the last line that it prints, read as JSON"
    more = {'FASTXTEND_CL_CACHE': cache} if cache else {}
    r = subprocess.run([sys.executable, '-W', 'ignore', script, *options(**values)], capture_output=True, text=True, env={**os.environ, **more})
    if r.returncode: raise RuntimeError(f'{values} ended with status {r.returncode}: {r.stderr[-2000:]}')
    return json.loads(r.stdout.splitlines()[-1])

# Saving

def conditions():
    "Machine, versions and date"
    import fastai, fastxtend_cl
    from fastxtend_cl.report import machine
    c = machine('cpu')
    return dict(cpu=c['device_name'], cores=c['threads'], gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=platform.platform(), python=platform.python_version(), torch=c['torch'], fastai=fastai.__version__,
        fastxtend_cl=fastxtend_cl.__version__, date=c['date'])

def read(name):
    "What `save` has written to results/NAME.json; empty if there is none"
    p = results/f'{name}.json'
    return json.loads(p.read_text()) if p.exists() else {}

def save(name, **data):
    "Write `data` with its conditions to results/NAME.json"
    results.mkdir(exist_ok=True)
    command = ' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])
    (results/f'{name}.json').write_text(json.dumps(dict(conditions=conditions(), command=command, **data), indent=1)+'\n')
    print(f'written: benchmarks/results/{name}.json')

class Results:
    """The rows of results/NAME.json, one or more for each model: iterating gives the names that remain to be measured, `add` saves their rows

    Rows measured with the same settings and the same torch are kept. With others the script stops, unless `refresh` is set."""
    def __init__(self, name, names, refresh=False, tiny=False, key='rows', page=None, **settings):
        self.name,self.tiny,self.key,self.page,self.settings = name,tiny,key,page,settings
        self.names,old = names.split(',') if isinstance(names, str) else names,{} if tiny else read(name)
        was = {**{k: old[k] for k in settings if k in old}, 'torch': old['conditions']['torch']} if old else {}
        other = {k: v for k,v in was.items() if v!={**settings, 'torch': torch.__version__}[k]}
        if other and not refresh:
            sys.exit(f'results/{name}.json was measured with {", ".join(f"{k}={v}" for k,v in other.items())}: --refresh measures all anew')
        self.rows = [] if other else [r for r in old.get(key, []) if not (refresh and r['model'] in self.names)]

    def __iter__(self):
        done = {r['model'] for r in self.rows}
        yield from progress_bar([n for n in self.names if n not in done])

    def add(self, *rows):
        self.rows += rows
        if self.tiny: return
        save(self.name, **{self.key: self.rows}, **self.settings)
        if self.page: (results/f'{self.name}.md').write_text(self.page(self.rows)+'\n')

# Showing

def machine(c=None):
    "Processor or GPU, versions and date in a line"
    c = c or conditions()
    return f"{c['gpu'] or c['cpu']}, {c['cores']} thread{'s'*(c['cores']!=1)}, torch {c['torch']}, fastai {c['fastai']}, {c['date']}"

def cell(ratio): return '{:.2f} ({:.2f} to {:.2f})'.format(*ratio[:3]) if ratio else ''

def markdown(head, rows, left=1):
    "A table whose first `left` columns are aligned left"
    return markdown_table([[*map(str, r)] for r in (head, *rows)], left)
