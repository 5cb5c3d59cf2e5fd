"The sentinel finds what is planted in another torch, and nothing where there is nothing; its layers, its workflow and its published results"
import copy, json, math, os, re, subprocess, sys
import pytest
import torch
import yaml
from fastxtend_cl.choose import gradient_error

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the sentinel forks')

planted = '''
import os, torch
from torch import nn

def plant(cls, f):
    old = cls.forward
    cls.forward = lambda self, x: f(old(self, x), x)

plant(nn.ReLU, lambda y, x: y*1.5 if x.dtype!=torch.float64 else y) # wrong
plant(nn.Tanh, lambda y, x: y*1.5) # wrong in double precision, too
plant(nn.SiLU, lambda y, x: [y.clone() for i in range(300)][-1]) # slow
plant(nn.Sigmoid, lambda y, x: y if x.is_contiguous() else os.abort()) # crashes in channels last
def refuse(y, x):
    if x.element_size()==2: raise RuntimeError('not implemented for this dtype')
    return y
plant(nn.ELU, refuse)
'''
layers = [dict(layer=n, kwargs={}, x=[2, 8, 8, 8], networks=3, such_as='timm/example') for n in ('ReLU', 'SiLU', 'Sigmoid', 'ELU', 'GELU', 'Tanh')]

@pytest.fixture(scope='module')
def sentinel(script): return script('benchmarks', 'sentinel')

@pytest.fixture(scope='module')
def other(tmp_path_factory):
    "A Python whose torch has faults"
    folder = tmp_path_factory.mktemp('other')
    (folder/'sitecustomize.py').write_text(planted)
    (folder/'python').write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    (folder/'python').chmod(0o755)
    return str(folder/'python')

@pytest.fixture(scope='module')
def old(sentinel): return sentinel.measure(sys.executable, layers, 1)

def test_finds_what_is_planted(sentinel, old, other):
    found,page = sentinel.became_worse(layers, old, sentinel.measure(other, layers, 1), [sys.executable, other], 1, 300)
    by_layer = {n: [s for s in found if s.layer['layer']==n] for n in ('ReLU', 'SiLU', 'Sigmoid', 'ELU', 'GELU', 'Tanh')}
    assert {(s.arm, s.kernel) for s in by_layer['ReLU'] if s.what=='wrong'}=={(a, k) for a in sentinel.arms[1:] for k in ('forward', 'dgrad')}
    slow = [s for s in by_layer['SiLU'] if s.kernel=='forward']
    assert {s.arm for s in slow}=={*sentinel.arms[1:]} and all(s.what=='slower' and s.ratio[1]>sentinel.slower for s in slow)
    crashed = by_layer['Sigmoid']
    assert {s.what for s in crashed}=={'crashes'} and {s.arm for s in crashed}=={a for a in sentinel.arms if a[1]}
    raising = by_layer['ELU']
    assert {s.what for s in raising}=={'raises'} and {s.arm[0] for s in raising}=={'bf16', 'fp16'}
    assert not by_layer['GELU']
    assert {(s.arm, s.kernel) for s in by_layer['Tanh'] if s.what=='wrong'}=={(sentinel.reference, k) for k in ('forward', 'dgrad')}
    assert 'died of signal 6' in page and 'raised: not implemented for this dtype' in page and '3, such as timm/example' in page
    assert re.search(r'SiLU\(\) on 2x8x8x8 \| fp32 contiguous, forward \| [\d.]+ \([\d.]+ to [\d.]+\) times as slow', page)

def test_noise_and_chance_are_not_found(sentinel, old):
    "What was slow, wrong or dead once, and is not when run again in turns"
    new = copy.deepcopy(dict(old, rows=old['rows'][:2]))
    for row in new['rows']:
        for i,res in enumerate(row['results'][1:]): res[0] = [[res[0][0], 9*res[0][1]], [7., res[0][1]], 'died of signal 6', 'raised: no memory'][i%4]
    assert {s.what for s in sentinel.suspects(layers, old, new)}=={'slower', 'wrong', 'crashes', 'raises'}
    found,page = sentinel.became_worse(layers, old, new, [sys.executable]*2, 1, 300)
    assert found==[] and '12 kernels looked worse. Run again in turns, 0 are' in page and 'became' not in page

def test_a_crash_has_the_right_name(sentinel, other):
    "It ends a child; the other arms of its layer, and the next layer, are measured"
    w = sentinel.Worker(other, None)
    res = w.run(layers[2])
    assert {a for (a,_),v in res.items() if isinstance(v, str)}=={a for a in sentinel.arms if a[1]}
    assert not any(isinstance(v, str) for v in w.run(layers[4]).values())
    w.close()

def test_each_result_is_held_to_double_precision(sentinel):
    "The tolerance of each dtype is above its rounding, and below a result that is a little wrong"
    w = sentinel.Worker(sys.executable, None)
    conv = dict(layer='Conv2d', kwargs=dict(in_channels=8, out_channels=8, kernel_size=3), x=[2, 8, 12, 12])
    res = w.run(conv)
    w.close()
    assert {*res}=={(a, k) for a in sentinel.arms for k in sentinel.kernels}
    assert all(0<v[0]<.5 for (a,_),v in res.items() if a!=sentinel.reference)
    assert max(v[0] for (a,_),v in res.items() if a[0]=='fp32')<.1

def test_no_time_is_told(sentinel, old, other):
    new = sentinel.measure(other, layers[:1], 1)
    found,page = sentinel.became_worse(layers, old, new, [sys.executable, other], 1, 0)
    assert not found and f'For {len(sentinel.suspects(layers, old, new))} there was no time (`--seconds 0`)' in page

def test_command_line(root, sentinel, tmp_path):
    "Exit status, and errors that say what to do"
    measured = sentinel.measure(sys.executable, json.loads((root/'benchmarks/layers.json').read_text())[-3:], 1)
    a,b = tmp_path/'a.json',tmp_path/'b.json'
    sentinel.write(a, measured)
    assert json.loads(a.read_text())==measured
    worse = copy.deepcopy(measured)
    worse['rows'][0]['results'][1][0] = 'raised: a test' # in the old one, so that it is better now
    sentinel.write(b, worse)
    r = subprocess.run([sys.executable, '-W', 'ignore', root/'benchmarks/sentinel.py', '--compare', b, '--measured', a], capture_output=True, text=True)
    assert r.returncode==0 and 'Run again in turns, 0 are' in r.stdout and a.with_suffix('.md').read_text() in r.stdout, r
    def changed(**kwargs): return dict(measured, conditions=measured['conditions'] | kwargs)
    with pytest.raises(SystemExit, match='measured on Some CPU, and this is .*: times cannot be compared. Measure it again here'):
        sentinel.environment_of(changed(cpu='Some CPU'), None)
    with pytest.raises(SystemExit, match=f'measured with torch 1.0, and this Python has {re.escape(torch.__version__)}: name one that has it with --old'):
        sentinel.environment_of(changed(torch='1.0'), None)
    assert sentinel.environment_of(changed(torch='1.0'), 'p')=='p' and sentinel.environment_of(measured, None)==sys.executable
    with pytest.raises(SystemExit, match=f'measured with torch {re.escape(torch.__version__)}, but the Python given for it has {re.escape(torch.__version__)}'):
        sentinel.became_worse([], changed(git='f00'), measured, [sys.executable]*2, 1, 10)
    with pytest.raises(SystemExit, match='/bin/true does not run benchmarks/sentinel_worker.py: it needs torch'): sentinel.Worker('/bin/true', None)
    with pytest.raises(SystemExit, match='no Python at /no/python: No such file or directory'): sentinel.Worker('/no/python', None)

def test_errors_are_those_of_the_package(sentinel, script):
    "The worker has no package, and the same formula"
    worker,gen = script('benchmarks', 'sentinel_worker'),torch.Generator().manual_seed(0)
    want = torch.randn(3, 5, generator=gen).double()
    for name,dtype in worker.dtypes.items():
        for noise in (0., 1e-4, 0.1, math.inf):
            got = (want+noise*torch.randn(3, 5, generator=gen)).to(dtype)
            assert worker.error(got, want, sentinel.allowed[name])==gradient_error(got, want, dtype)

def test_layers(root, script):
    "500 and more, each different, each usable; of networks and random ones; and as many as the texts say"
    worker = script('benchmarks', 'sentinel_worker')
    layers = json.loads((root/'benchmarks/layers.json').read_text())
    assert len({json.dumps([o['layer'], o['kwargs'], o['x']]) for o in layers})==len(layers)>=500
    random = [o for o in layers if 'networks' not in o]
    assert 100<len(random)<len(layers)-400 and {o['layer'] for o in random}>={f'Conv{t}{n}d' for t in ('', 'Transpose') for n in (1, 2, 3)}
    for o in layers:
        with torch.device('meta'): y = getattr(torch.nn, o['layer'])(**worker.with_tuples(o['kwargs']))(torch.empty(o['x']))
        assert y.numel()>0
    for text in ('upstream/README.md', 'nbs/upstream.ipynb'): assert f'runs {len(layers)} layers' in (root/text).read_text()

def test_workflow_calls_what_there_is(root):
    "Weekly, with no right to write, and each option of its commands exists"
    w = yaml.safe_load((root/'.github/workflows/sentinel.yaml').read_text())
    assert w['permissions']=={'contents': 'read'} and re.fullmatch(r'\d+ \d+ \* \* \d', w[True]['schedule'][0]['cron'])
    commands = [c for j in w['jobs'].values() for s in j['steps'] for c in s.get('run', '').splitlines() if c.startswith('python ')]
    for script in ('benchmarks/sentinel.py', 'upstream/run.py'):
        text = subprocess.run([sys.executable, '-W', 'ignore', root/script, '--help'], capture_output=True, text=True, check=True).stdout
        mine = [c for c in commands if c.split()[1]==script]
        assert mine and all(f'{o} ' in text for c in mine for o in re.findall(r'--\w+', c))
    assert any('--compare' in c for c in commands)
