"What the benchmarks share: paired, interleaved timing and the conditions that stand beside each figure"
import contextlib, json, math, platform, random, statistics, subprocess, sys, time
from pathlib import Path
import torch

results = Path(__file__).parent/'results'

def conditions():
    "Machine, versions and date"
    import fastai, fastxtend_cl
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')),
        '') if Path('/proc/cpuinfo').exists() else platform.processor()
    return dict(cpu=cpu, cores=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, system=platform.platform(),
        python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__,
        fastxtend_cl=fastxtend_cl.__version__, date=time.strftime('%Y-%m-%d'))

def interleave(arms, rounds=60, block=5, progress=True, clock=time.perf_counter):
    """Seconds of each arm in each round: the median of a block's steps but for the first, arms in a new random order each round

    The first step after another arm's pays for memory that the allocator has given back, so it is dropped."""
    from fastprogress.fastprogress import progress_bar
    rng,res = random.Random(0),{n:[] for n in arms}
    for _ in progress_bar(range(rounds), leave=False) if progress else range(rounds):
        for name in rng.sample(list(arms), len(arms)):
            times = []
            for i in range(block):
                start = clock()
                arms[name]()
                times.append(clock()-start)
            res[name].append(statistics.median(times[1:]))
    return res

def interval(pairs, n=2000, seed=0):
    "Median of `pairs` and its 95 % bootstrap interval"
    rng = random.Random(seed)
    meds = sorted(statistics.median(rng.choices(pairs, k=len(pairs))) for _ in range(n))
    return statistics.median(pairs), meds[int(n*0.025)], meds[int(n*0.975)]

_busy = """
import os, sys, time
parent = os.getppid()
while os.getppid()==parent: # it ends with who has started it
    end = time.time()+3
    while time.time()<end: pass
    time.sleep(float(sys.argv[1]))
"""

@contextlib.contextmanager
def busy(rest=0.):
    "Another process computes meanwhile, on the cores that this one may use: for 3 seconds, then not for `rest` seconds"
    p = subprocess.Popen([sys.executable, '-c', _busy, str(rest)])
    try: yield
    finally: p.kill(); p.wait()

def geometric(ratios): return math.exp(statistics.fmean(map(math.log, ratios)))

def read(name):
    "What `save` has written to results/NAME.json; empty if there is none"
    p = results/f'{name}.json'
    return json.loads(p.read_text()) if p.exists() else {}

def kept_rows(name, asked, anew=False):
    "The rows of results/NAME.json, if they were measured as `asked` and with this torch; else none, or if they are wanted `anew`"
    old = {} if anew else read(name)
    return old['rows'] if old and {k:old.get(k) for k in asked}==asked and old['conditions']['torch']==torch.__version__ else []

def kept_found(name, anew=False):
    "Network to what results/NAME.json has found of it; nothing if it is wanted `anew`"
    return {} if anew else {f['model']: f for f in read(name).get('found', [])}

def save(name, **data):
    "Write `data` with its conditions to results/NAME.json"
    results.mkdir(exist_ok=True)
    (results/f'{name}.json').write_text(json.dumps(dict(conditions=conditions(), command=' '.join(['python', *sys.argv]),
        **data), indent=1)+'\n')
    print(f'written: benchmarks/results/{name}.json')
