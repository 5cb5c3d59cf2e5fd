"""Which of these faults does a torch have? `python upstream/run.py` runs each script with the torch of this Python

`--python A/bin/python,B/bin/python` runs them in other environments; `--keep` also writes what was seen to results.json, and brings the
reports and README.md up to date. A script prints what is expected and what is seen, and ends with status 1 if the fault is there and 0 if
it is not. Some faults crash the process."""
import json, os, re, signal, subprocess, sys
from itertools import groupby
from pathlib import Path
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.report import machine, markdown_table

here = Path(__file__).resolve().parent
repo = 'https://github.com/fastxtend-cl/fastxtend_cl/blob/main'
sets = {'AVX2': 'avx2', 'AVX512_CORE': 'avx512bw', 'AVX512_CORE_VNNI': 'avx512_vnni', 'AVX512_CORE_BF16': 'avx512_bf16', 'AVX512_CORE_AMX': 'amx_bf16'}
limits = 'AVX2','AVX512_CORE',None # of ONEDNN_MAX_CPU_ISA; None: all that the machine has

# What happens, and what fastxtend_cl does about it
ours = {
    'conv-transpose-bf16-wgrad': ('wrong weights', 'never calls that kernel: computes it contiguous or in fp32, whichever is faster'),
    'conv-transpose2d-1x1-strided-wgrad-crash': ('crashes the process', 'never calls that kernel'),
    'conv1d-bf16-wgrad-unwritten-memory': ('wrong weights, at times', 'never calls that kernel: computes it in fp32'),
    'conv2d-1x1-strided-wgrad-crash': ('crashes the process', 'never calls that kernel; `apply_channels_last` warns where `tuned_kernels` is not used'),
    'conv2d-bf16-forward-thin': ('wrong outputs', 'compares the first output with fp32, and computes it in another way'),
    'conv2d-bf16-wgrad-dilated': ('wrong weights; large ones crash the process', 'never calls that kernel: computes it contiguous or in fp32, whichever is faster'),
    'conv2d-bf16-wgrad-narrow': ('wrong weights, at times', 'never calls that kernel: computes it in fp32'),
    'conv2d-bf16-wgrad-reads-past-input': ('can crash the process', 'never calls that kernel: computes it in fp32'),
    'conv2d-forward-all-padding-crash': ('crashes the process', 'never calls that kernel'),
    'conv3d-bf16-wgrad-shallow': ('wrong weights; flat ones crash the process', 'never calls that kernel: computes it in fp32 or with its padding in memory'),
    'conv3d-wgrad-crash': ('crashes the process', 'never calls that kernel: computes it with its padding in memory'),
    'depthwise-stride-2-bf16-dgrad-slow': ('slow', 'times bf16 and fp32, and takes the faster'),
    'expm1-avx512-slow': ('slow', 'nothing'),
    'fastai-channels-last-rank': ('raises', 'converts the weights of convolutions only, each to the format of its rank'),
    'fastai-mixed-precision-cuda': ('trains in fp32', '`to_channelslast` and `DeviceMixedPrecision` use the device at hand; `to_fp16` and `to_bf16` stay as they are'),
    'fastai-to-channelslast-none': ('raises', 'replaces the method'),
    'fused-optimizers-ignore-strides': ('wrong weights', '`to_channelslast` and `apply_channels_last` give optimizer state and gradients the strides of their parameter'),
    'group-norm-frozen-input-crash': ('crashes the process', 'computes the gradient of the input, too'),
    'instance-norm-batch-1': ('wrong gradients', 'gives the gradient the strides of the input first'),
    'nll-loss-channels-last': ('raises', 'computes the gradient contiguous'),
}

# How a user of fastxtend_cl runs a script: what replaces a part of it. Others run within `tuned_kernels`
replaced = {
    'fastai-channels-last-rank': {}, 'fastai-to-channelslast-none': {}, # importing the package is enough
    'fastai-mixed-precision-cuda': {'.to_bf16()': ".to_channelslast(amp_mode='bf16')"},
    'fused-optimizers-ignore-strides': {'model.to(memory_format=torch.channels_last)': 'apply_channels_last(model, opt)'},
}

def names(): return sorted(p.parent.name for p in here.glob('*/repro.py'))

def of_fastai(name): return name.startswith('fastai-')

# Running

def outcome(python, script, limit=None, tries=1):
    """'right', 'faulty', 'crashes' or 'does not run: ...', and what a script printed, which is a file or the text of a program

    It runs up to `tries` times until it shows the fault: a kernel that reads uninitialized memory is right at times."""
    command = [python, '-W', 'ignore', *(['-c', script] if isinstance(script, str) else [str(script)])]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **({'ONEDNN_MAX_CPU_ISA': limit} if limit else {})}
    for _ in range(tries):
        r = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        out = r.stdout.strip()
        if r.returncode<0: return 'crashes',f'{out}\nseen: {signal.Signals(-r.returncode).name}'
        if 'seen:' not in out or r.returncode not in (0, 1): return f'does not run: {(r.stderr.strip().splitlines() or ["no output"])[-1]}',out
        if r.returncode: return 'faulty',out
    return 'right',out

def instruction_set():
    "The largest of oneDNN's instruction sets that this CPU has, or None"
    try: flags = re.search('^flags.*: (.*)', Path('/proc/cpuinfo').read_text(), re.M)[1].split()
    except (OSError, TypeError): return
    return next((name for name,flag in reversed(sets.items()) if flag in flags), None)

_about = '''
import json, torch
try: from fastai import __version__ as fastai
except ImportError: fastai = None
print(json.dumps(dict(torch=torch.__version__.split('+')[0], fastai=fastai)))
'''

def about(python): return json.loads(subprocess.run([python, '-W', 'ignore', '-c', _about], capture_output=True, text=True, check=True).stdout)

def run_all(python, limits=limits):
    "Outcomes of all scripts in an environment, for each fault those under each limit"
    env,res = about(python),{}
    for name in progress_bar(names(), leave=False):
        if of_fastai(name) and not env['fastai']: continue
        res[name] = {limit or 'all': outcome(python, here/name/'repro.py', limit, tries=3)[0] for limit in limits if not (limit and of_fastai(name))}
    return env,res

def with_package(name):
    "The text of a script as a user of fastxtend_cl would run it, or None if the package does nothing about its fault"
    if ours[name][1]=='nothing': return
    script,head = here/name/'repro.py','from fastxtend_cl.all import *\n'
    if name not in replaced: return f'{head}import runpy\nwith tuned_kernels(): runpy.run_path({str(script)!r}, run_name="__main__")\n'
    text = script.read_text()
    for old,new in replaced[name].items():
        assert old in text, f'{name}: {old} is not in its script'
        text = text.replace(old, new)
    return head+text

# Writing

def read(): return json.loads(p.read_text()) if (p := here/'results.json').exists() else dict(outcomes={})

def version(text): return tuple(map(int, re.findall(r'\d+', text)))

def ranges(versions, tried):
    "Versions as text: '2.8 to 2.15', of those that were tried"
    tried = sorted(tried, key=version)
    groups = [[v for v in vs] for on,vs in groupby(tried, lambda v: v in versions) if on]
    def short(v): return '.'.join(v.split('.')[:2])
    return ', '.join(short(g[0]) if len(g)==1 else f'{short(g[0])} to {short(g[-1])}' for g in groups) or 'none'

def is_fault(o): return o in ('faulty', 'crashes')

def tried(seen):
    "Version to outcome without a limit, where the script ran"
    return {v: o['all'] for v,o in seen.items() if not o['all'].startswith('does not run')}

def versions_with(seen):
    "Versions of torch that have the fault, and those that were tried"
    return {v for v,o in tried(seen).items() if is_fault(o)},[*tried(seen)]

def expected(results, name, torch):
    "What was recorded for a version of torch: of the same minor version, of the one before, or of the oldest"
    seen = tried(results['outcomes'][name])
    def minor(v): return version(v)[:2]
    return seen[max((v for v in seen if minor(v)<=minor(torch)), key=version, default=min(seen, key=version))]

def fixed_text(name, torch, printed):
    return (f'{name} does not show its fault with torch {torch}: {printed}\nIf upstream has fixed it, run `python upstream/run.py --keep`, say so in its '
        f'report, and see whether fastxtend_cl still needs its part: {ours[name][1]}')

def where_text(results, name):
    "The part of a report that says where the fault is"
    seen = results['outcomes'].get(name, {})
    if of_fastai(name): return f'fastai {results["fastai"]}, with torch {ranges(*versions_with(seen))}. {results["date"]}'
    columns = {k: f'`ONEDNN_MAX_CPU_ISA={k}`' for k in limits if k} | {'all': 'default'}
    rows = [[v, *(seen[v].get(k, '') for k in columns)] for v in sorted(seen, key=version)]
    machine = f'Builds from PyPI, one thread, {results["cpu"]} ({results["instruction_set"]}), Linux, {results["date"]}.'
    return markdown_table([['torch', *columns.values()], *rows], 4)+f'\n\n{machine}'

def title_of(name): return (here/name/'report.md').read_text().splitlines()[0].removeprefix('# ')

def filled(text, marker, content):
    "`text` with `content` after a marker, in place of what was there"
    return re.sub(rf'<!-- {re.escape(marker)} -->\n(?:.*?<!-- end -->\n)?', lambda _: f'<!-- {marker} -->\n{content}\n<!-- end -->\n', text.rstrip()+'\n', flags=re.S)

def report_of(name, results):
    "The text of a report with its script, and where the fault was seen"
    text = filled((here/name/'report.md').read_text(), 'repro.py', f'```python\n{(here/name/"repro.py").read_text().rstrip()}\n```')
    return filled(text, 'versions', where_text(results, name))

def needs(seen):
    "The instructions without which the newest torch that has a fault does not show it"
    known = {v: o for v,o in seen.items() if 'AVX2' in o and is_fault(o['all'])}
    if not known: return ''
    o = known[max(known, key=version)]
    return '' if is_fault(o['AVX2']) else ', with AVX-512' if is_fault(o['AVX512_CORE']) else ', with AVX512-BF16'

def row_of(name, results):
    "A row of the table: fault, what happens, where, what this package does"
    seen,(what,done) = results['outcomes'][name],ours[name]
    title = 'fastai: '*of_fastai(name)+title_of(name).removeprefix('[CPU] ')
    return [f'[{title}]({repo}/upstream/{name}/report.md)', what, ranges(*versions_with(seen))+needs(seen), done]

def table(results=None):
    results,order = results or read(),('crashes', 'can', 'wrong', 'trains', 'raises', 'slow')
    known = sorted(results['outcomes'], key=lambda n: (order.index(ours[n][0].split()[0]), n))
    return markdown_table([['fault', 'what happens', 'torch versions', 'what this package does'], *(row_of(n, results) for n in known)], 4)

def caption(results=None):
    results = results or read()
    versions = {v for o in results['outcomes'].values() for v in o}
    return (f'Tried: torch {", ".join(sorted(versions, key=version))}, fastai {results["fastai"]}, on {results["cpu"]} with instructions up to '
        f'{results["instruction_set"]}, {results["date"]}.')

def write(results):
    (here/'results.json').write_text(json.dumps(results, indent=1)+'\n')
    for name in names(): (here/name/'report.md').write_text(report_of(name, results))
    readme = here/'README.md'
    readme.write_text(filled(readme.read_text(), 'table', f'{table(results)}\n\n{caption(results)}'))

@call_parse
def main(
    python:str=None, # Pythons of the environments, separated by commas; default: this one
    keep:bool=False, # Write results.json, and bring reports and README.md up to date
    texts:bool=False, # Write the texts alone
):
    "Run the script of each fault"
    results = read()
    if texts: write(results); return
    for i,p in enumerate((python or sys.executable).split(',')):
        env,seen = run_all(p, limits if i==0 else (None,)) # instruction sets with the first one only
        print(f'torch {env["torch"]}, fastai {env["fastai"] or "not installed"}')
        for name,o in seen.items():
            print(f'  {name}: '+', '.join(v if k=='all' else f'{k} {v}' for k,v in o.items()))
            results['outcomes'].setdefault(name, {}).setdefault(env['torch'], {}).update(o)
        if not keep: continue
        m = machine('cpu')
        results |= dict(cpu=m['device_name'], instruction_set=instruction_set(), date=m['date'], fastai=env['fastai'] or results.get('fastai'))
        write(results)
