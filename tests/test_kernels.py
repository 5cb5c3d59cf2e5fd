"Each convolution in the fastest correct way: faults, decisions, cache, and that nothing else notices"
import copy, io, itertools, json, math, os, pickle, re, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
import fastxtend_cl.kernels as K
from fastxtend_cl import cache, choose, operators, ways
from fastxtend_cl.kernels import fixed_kernels, kernel_count, kernel_table, tuned_kernels, tuning_line
from fastxtend_cl.memory import poisoned_memory
from fastxtend_cl.operators import switch
from fastxtend_cl.choose import GpuKernelBench, KernelBench, KernelChoice, Reason, gradient_error
from fastxtend_cl.ways import Call, Way, as_is, can_crash, can_tune, candidates, canonical_contiguous, suspicious, torchs_formats, trusted
from helpers import caught_warnings, two_processes

aten,bf16 = torch.ops.aten,torch.bfloat16
formats = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
native_bf16 = torch.cpu.get_capabilities().get('avx512_bf16') is True and not torch.cpu.get_capabilities().get('amx_bf16') # AMX has other kernels
glibc = sys.platform=='linux'

@pytest.fixture(autouse=True)
def own_decisions(own_cache, monkeypatch):
    "A cache and decisions of its own for each test"
    fresh = forget(monkeypatch)
    yield fresh
    assert switch.mode is None and not fresh.contexts and not fresh.fixed

def forget(monkeypatch):
    "Let this process start anew, but for the cache"
    fresh = K._State()
    monkeypatch.setattr(K, '_state', fresh)
    return fresh

def decisions(): return K._state.log

def rows(since=0):
    "What was decided on gradients"
    return [(k,c) for k,c in kernel_table(since).rows if c.kernel!='forward']

def rel(a, b): return ((a.double()-b.double()).norm()/b.double().norm().clamp_min(1e-30)).item()

def inputs(x, w, args, dtype=bf16, last=True, seed=0):
    "Gradient, input, weight of a convolution"
    gen = torch.Generator().manual_seed(seed)
    def make(shape):
        t = torch.randn(shape, generator=gen).to(dtype)
        return t.contiguous(memory_format=formats[len(shape)]) if last else t
    x,w = make(x),make(w)
    return make(aten.convolution(x.double().contiguous(), w.double().contiguous(), None, *args).shape),x,w

def exact(g, x, w, args, mask=(True, True, True)):
    return aten.convolution_backward(*(t.double().contiguous() for t in (g, x, w)), [g.shape[1]], *args, list(mask))

def backward(g, x, w, args, mask=(True, True, True)):
    return aten.convolution_backward(g, x, w, [g.shape[1]], *args, list(mask))

# Name: input, weight; stride, padding, dilation, transposed, output padding, groups
faults = {
    'dilated': ((2,24,32,32), (24,24,3,3), ([1,1],[2,2],[2,2],False,[0,0],1)),
    'dilated, stride in W': ((2,24,34,66), (24,24,3,3), ([1,2],[2,2],[2,2],False,[0,0],1)),
    'dilated, transposed': ((2,24,32,32), (24,24,3,3), ([1,1],[2,2],[2,2],True,[0,0],1)),
    'dilated, transposed 3-D': ((2,24,4,32,32), (24,24,3,3,3), ([1,1,1],[1,2,1],[1,2,1],True,[0,0,0],1)),
    'narrow': ((2,16,32,2), (32,16,3,3), ([4,4],[1,1],[1,1],False,[0,0],1)),
    'short 1-D': ((8,64,1), (64,64,7), ([2],[3],[1],False,[0],1)),
    'shallow 3-D': ((2,16,2,12,12), (16,16,4,3,3), ([1,1,1],[1,1,1],[1,1,1],False,[0,0,0],1)),
    'shallow transposed 3-D': ((2,8,1,8,8), (8,8,6,1,1), ([1,1,1],[2,0,0],[1,1,1],True,[0,0,0],1)),
    'depthwise': ((2,32,12,12), (32,1,5,5), ([1,1],[2,2],[1,1],False,[0,0],32)),
    'grouped, kernel 7, stride 2': ((2,16,15,13), (32,4,7,7), ([2,2],[3,3],[1,1],False,[0,0],4)),
    'padding on one side': ((2,8,9,9), (8,8,3,1), ([1,1],[1,0],[1,1],False,[0,0],1)),
}

@pytest.mark.parametrize('mode', ['tuned', 'correct'])
@pytest.mark.parametrize('dtype', [bf16, torch.float16, torch.float32])
@pytest.mark.parametrize('name', faults)
def test_gradients_are_right_whatever_memory_holds(name, dtype, mode):
    "Over several steps and states of memory; the tolerances are a few times the rounding of each dtype"
    x,w,args = faults[name]
    tol = {bf16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for seed in range(3):
        ts = inputs(x, w, args, dtype, seed=seed)
        want = exact(*ts, args)
        for poisoned in (False, True, False):
            for shape in (x, w, ts[0].shape): torch.full(shape, float('nan')) # what is freed holds NaN
            with tuned_kernels(mode):
                if poisoned:
                    with poisoned_memory(): got = backward(*ts, args)
                else: got = backward(*ts, args)
            for a,b,like in zip(got, want, (*ts[1:], None)):
                assert rel(a, b)<tol and a.dtype==dtype
                if like is not None: assert a.shape==like.shape

@pytest.mark.skipif(not (native_bf16 and glibc), reason='the kernels of AVX512-BF16, and a memory that can be poisoned')
@pytest.mark.parametrize('name', ['dilated', 'dilated, transposed', 'narrow', 'short 1-D'])
def test_torch_still_has_these_faults(name):
    "If this fails, torch has fixed one: shorten the table and `suspicious`; the scripts of upstream/ are run by test_upstream.py"
    x,w,args = faults[name]
    ts = inputs(x, w, args)
    with poisoned_memory(): got = backward(*ts, args)
    assert not rel(got[1], exact(*ts, args)[1])<0.1

def test_verification_alone_finds_the_faults(monkeypatch):
    "Also where no condition is known"
    monkeypatch.setattr(ways, 'suspicious', lambda *args: False)
    ways.can_crash.cache_clear()
    for name in ('dilated', 'dilated, transposed', 'narrow', 'short 1-D'):
        x,w,args = faults[name]
        ts = inputs(x, w, args)
        with tuned_kernels(): got = backward(*ts, args)
        assert rel(got[1], exact(*ts, args)[1])<4e-3
    ways.can_crash.cache_clear()
    if native_bf16 and glibc: assert sum(c.corrected for _,c in rows())>=4

def test_known_conditions_hold_where_memory_cannot_be_poisoned(monkeypatch):
    "The fault of the 1-D convolution shows by chance only; its condition does not"
    x,w,args = faults['short 1-D']
    monkeypatch.setattr(KernelBench, 'verify', lambda self, way: (0., None)) # all seems right
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    (_,c), = [r for r in rows() if r[1].kernel=='wgrad']
    assert c.way.fp32 and c.failed['as is']=='not run: can crash' and c.reason==Reason.crash

# Planted faults

plain_case = (2,16,12,12), (16,16,3,3), ([1,1],[1,1],[1,1],False,[0,0],1)

def plant(monkeypatch, change, which=as_is):
    "Let torch's own way return what `change` makes of it"
    original = ways.compute_gradients
    def f(op, way, args, mask):
        res = original(op, way, args, mask)
        return tuple(None if t is None else change(t) for t in res) if way==which else res
    for module in (K, choose): monkeypatch.setattr(module, 'compute_gradients', f)

def one_element(t):
    t = t.clone(); t.view(-1)[t.numel()//2] += 1.*t.abs().max()
    return t

@pytest.mark.parametrize('change', [lambda t: 1.1*t, lambda t: t*float('nan'), one_element, lambda t: t.roll(1, 0), torch.zeros_like],
    ids=['scaled', 'NaN', 'one element', 'shifted', 'zero'])
@pytest.mark.parametrize('dtype', [bf16, torch.float32])
def test_a_planted_fault_is_found(monkeypatch, change, dtype):
    plant(monkeypatch, change)
    x,w,args = plain_case
    ts = inputs(x, w, args, dtype)
    with tuned_kernels(): got = backward(*ts, args)
    assert all(c.corrected and c.reason==Reason.wrong for _,c in rows())
    for a,b in zip(got, exact(*ts, args)): assert rel(a, b)<4e-3
    assert '1 dgrad kernel corrected' in tuning_line()

def test_without_the_fault_nothing_is_corrected():
    x,w,args = plain_case
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    assert not any(c.corrected for _,c in rows())

def test_a_faster_way_is_taken_only_by_a_clear_margin(monkeypatch):
    x,w,args = plain_case
    monkeypatch.setattr(KernelBench, 'verify', lambda self, way: (0., None)) # all are right and equally fast at first
    for t,taken in ((0.95, False), (0.5, True)):
        forget(monkeypatch)
        monkeypatch.setattr(KernelBench, 'race', lambda self, ways: {w: t if w.fp32 and not w.contiguous else 1. for w in ways})
        with tuned_kernels(): backward(*inputs(x, w, args), args)
        assert all((c.way==Way(fp32=True))==taken for _,c in rows())
        K.choices_file.path.unlink()

@pytest.mark.parametrize('last', [True, False])
def test_a_way_that_is_right_by_luck_is_not_used(monkeypatch, last):
    "The fastest way is verified once more: if it is wrong then, the trusted one is used, whether that was timed or not"
    x,w,args = plain_case
    seen = []
    def verify(self, way): seen.append((self.name, way)); return float(2*(way==Way(fp32=True) and seen.count((self.name, way))==2)),None
    monkeypatch.setattr(KernelBench, 'verify', verify)
    monkeypatch.setattr(KernelBench, 'race', lambda self, ways: {w: 0.1 if w==Way(fp32=True) else 1. for w in ways})
    ts = inputs(x, w, args, last=last)
    with tuned_kernels(): backward(*ts, args)
    assert [c.way for _,c in rows()]==[Way(fp32=True, contiguous=True)]*2 and all(c.errors['fp32']==2 for _,c in rows())
    assert tuning_line().startswith('Tuned 1 convolution in ') and repr(kernel_table())

def test_a_way_that_raises_is_no_candidate(monkeypatch):
    def fail(t): raise RuntimeError('could not create a primitive')
    plant(monkeypatch, fail, Way(fp32=True))
    x,w,args = plain_case
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    assert all(c.errors['fp32']==math.inf and c.failed['fp32']=='RuntimeError: could not create a primitive' for _,c in rows())

def test_errors_of_the_user_stay_torchs_own():
    g,x,w = inputs(*plain_case)
    with tuned_kernels():
        for bad in ((g[:,:5], x, w), (g, x[:,:3], w)):
            with pytest.raises(RuntimeError): backward(*bad, plain_case[2])

def message(f):
    with pytest.raises(RuntimeError) as e: f()
    return str(e.value)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layer,shape', [(nn.Conv1d(4, 8, 3), (32, 3, 64)), (nn.Conv2d(4, 8, 3), (32, 3, 64, 64)), (nn.Conv2d(4, 8, 3, groups=2), (32, 2, 64, 64)), (nn.Conv2d(4, 8, 9), (32, 4, 6, 6)),
    (nn.ConvTranspose2d(4, 8, 3), (32, 3, 64, 64)), (nn.Conv3d(4, 8, 3), (32, 3, 8, 8, 8))], ids=lambda o: str(o).replace(' ', ''))
def test_wrong_shapes_give_torchs_own_message(layer, shape, dtype):
    "With the shape of the user's batch, not of the part of it that kernels are verified with"
    layer,x = copy.deepcopy(layer).to(dtype),torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim==4 else x
    want = message(lambda: layer(x))
    for mode in K.modes:
        with tuned_kernels(mode): assert message(lambda: layer(x))==want

def test_arguments_of_one_number_for_all_dimensions():
    "`aten::convolution` takes them and expands them itself"
    _,x,w = inputs(*plain_case, torch.float32)
    x.requires_grad_(); w.requires_grad_()
    def run(): return torch.autograd.grad(aten.convolution(x, w, None, [2], [1], [1], False, [0], 1).square().sum(), (x, w))
    want = run()
    for mode in K.modes:
        with tuned_kernels(mode): assert all(map(torch.equal, run(), want))

# Kernels that crash the process

crashing = '''
import torch, sys
sys.path.insert(0, {path!r})
from fastxtend_cl.kernels import tuned_kernels
from fastxtend_cl.ways import crashing_layers
torch.set_num_threads(1)
nn,last = torch.nn,{{4: torch.channels_last, 5: torch.channels_last_3d}}
m,x = {case}
m,x = m.to(memory_format=last[x.ndim]),x.contiguous(memory_format=last[x.ndim]).requires_grad_()
print(crashing_layers(m))
exact = m.double()(x.double().contiguous()); g = torch.randn_like(exact)
m.zero_grad(); exact.backward(g); want = [p.grad.clone() for p in m.parameters()]
m.float().zero_grad()
for mode,amp in (('tuned', False), ('tuned', True), ('correct', True), ('survive', True)):
    for i in range(15):
        m.zero_grad()
        with tuned_kernels(mode):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp): y = m(x)
            y.backward(g.to(y.dtype).contiguous(memory_format=last[x.ndim]))
        junk = [torch.randn(n) for n in range(1, 400, 7)]
        if mode=='survive': continue # values may be wrong
        for p,w in zip(m.parameters(), want): assert (p.grad.double()-w).norm()<=(1e-2 if amp else 1e-4)*w.norm()
print('alive')
'''
# What crashes without `tuned_kernels`, seen with ordinary memory on torch 2.14 with AVX512-BF16
cases = {
    '1x1 with a stride': ("nn.Conv2d(3, 8, 1, stride=2), torch.randn(2, 3, 256, 256)", ['']),
    '1x1 transposed': ("nn.ConvTranspose2d(8, 3, 1, stride=2, output_padding=1), torch.randn(2, 8, 128, 128)", ['']),
    'a window over both ends': ("nn.Conv3d(16, 16, (7,1,1), stride=(2,1,1), padding=(5,0,0)), torch.randn(2, 16, 3, 6, 6)", []),
    'a window over one end, in bf16': ("nn.Conv3d(12, 16, (7,7,2), stride=(1,4,1), padding=(2,2,1)), torch.randn(2, 12, 12, 4, 4)", []),
    'a column in the padding': ("nn.Conv3d(20, 128, (3,1,1), stride=4, padding=(3,0,2), dilation=(3,1,3), groups=4), torch.randn(1, 20, 3, 8, 2)", []),
    'dilated, in bf16': ("nn.Conv2d(24, 24, 3, dilation=12, padding=12), torch.randn(1, 24, 128, 128)", []),
    'dilated, transposed, in bf16': ("nn.ConvTranspose2d(24, 24, 3, dilation=12, padding=12), torch.randn(1, 24, 128, 128)", []),
    'lower than its kernel, in bf16': ("nn.Conv3d(16, 16, (1,3,1), stride=(1,2,1), padding=(0,1,0)), torch.randn(1, 16, 3, 1, 8)", [])}

@pytest.mark.parametrize('name', cases)
def test_kernels_that_crash_are_never_run(root, name, tmp_path):
    case,named = cases[name]
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', crashing.format(path=str(root), case=case)],
        capture_output=True, text=True, env={**os.environ, 'FASTXTEND_CL_CACHE': str(tmp_path)})
    assert r.returncode==0 and r.stdout==f'{named}\nalive\n', (r.returncode, r.stdout, r.stderr[-1000:])

def test_no_candidate_can_crash():
    for w,x,transposed in (((8,3,1,1), (2,3,16,16), False), ((8,3,1,1), (2,8,16,16), True)):
        args = ([2,2],[0,0],[1,1],transposed,[1,1] if transposed else [0,0],1)
        for dtype in (bf16, torch.float32):
            g,xx,ww = inputs(x, w, args, dtype)
            call = Call.of((g, xx, ww, None, *args, [True]*3))
            assert can_crash(call, Way(fp32=True)) and not can_crash(call, trusted(call, 'wgrad'), 'wgrad')
            assert not any(can_crash(call, o, k) for k in ('dgrad', 'wgrad') for o in candidates(call, k))

def test_ambiguous_weights_get_contiguous_strides():
    "A 1x1 weight in channels last is contiguous as well, and torch takes it for channels last"
    w = torch.randn(8, 3, 1, 1).to(memory_format=torch.channels_last)
    assert w.is_contiguous() and w.stride()!=canonical_contiguous(w).stride()==(3, 1, 1, 1)

def test_a_cached_way_that_can_crash_is_not_used():
    args = ([2,2],[0,0],[1,1],False,[0,0],1)
    ts = inputs((2,3,16,16), (8,3,1,1), args, torch.float32)
    call = Call.of((*ts, [8], *args, [True]*3))
    with tuned_kernels(): machine = K._machine(K._state.settings)
    c = dict(way='as is', reason='as is', seconds={}, errors={}, failed={})
    K._save_calls(machine, {repr(call): dict(dgrad=c, wgrad=c)})
    with tuned_kernels(): backward(*ts, args)
    assert [c.way!=as_is for _,c in rows() if c.kernel=='wgrad']==[True]

# Modes

def test_modes(monkeypatch):
    x,w,args = plain_case
    plant(monkeypatch, lambda t: 2*t)
    ts = inputs(x, w, args)
    with tuned_kernels('survive'): assert torch.equal(backward(*ts, args)[1], backward(*ts, args)[1]) and not kernel_count()
    with tuned_kernels('correct'):
        got = backward(*ts, args)
        with tuned_kernels('survive'): pass
        assert switch.mode=='correct'
    assert rel(got[1], exact(*ts, args)[1])<4e-3
    assert all(not c.seconds for _,c in rows()) and tuning_line().startswith('Checked 1 convolution in ')
    assert switch.mode is None

@pytest.mark.parametrize('bad', ['fast', None, True])
def test_another_mode_is_an_error(bad):
    with pytest.raises(ValueError, match=f"mode must be 'tuned', 'correct' or 'survive', got {bad!r}"):
        with tuned_kernels(bad): pass
    with pytest.raises(ValueError, match='benchmark_limit must be a number of shapes, 0 or more, got -1'):
        with tuned_kernels(benchmark_limit=-1): pass

def test_contexts_may_end_in_any_order_and_by_any_exception():
    a,b = tuned_kernels(),tuned_kernels('survive')
    a.__enter__(); b.__enter__(); a.__exit__(None, None, None)
    assert switch.mode=='survive'
    b.__exit__(None, None, None)
    for e in (KeyboardInterrupt, ValueError):
        with pytest.raises(e):
            with tuned_kernels(): raise e
        assert switch.mode is None

def test_an_interrupt_while_deciding_leaves_nothing(monkeypatch):
    x,w,args = plain_case
    def interrupt(self, ways): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(KernelBench, 'race', interrupt)
        with pytest.raises(KeyboardInterrupt), tuned_kernels(): backward(*inputs(x, w, args), args)
    assert not rows()
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    assert len(rows())==2

# Repeatable

def train(mode='tuned', steps=3):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2, groups=16),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).to(memory_format=torch.channels_last)
    opt,x,y = torch.optim.SGD(m.parameters(), 0.1),torch.randn(4, 3, 24, 24).contiguous(memory_format=torch.channels_last),torch.arange(4)%2
    for _ in range(steps):
        with tuned_kernels(mode), torch.autocast('cpu', bf16): loss = F.cross_entropy(m(x).float(), y)
        with tuned_kernels(mode): loss.backward()
        opt.step(); opt.zero_grad()
    return [p.detach() for p in m.parameters()]

def test_fixed_kernels_time_nothing_and_repeat(monkeypatch):
    def timed(*args): raise AssertionError('timed')
    monkeypatch.setattr(KernelBench, 'race', timed)
    with fixed_kernels(): first = train()
    monkeypatch.undo()

@pytest.mark.parametrize('how', ['fixed_kernels', 'use_deterministic_algorithms', 'cudnn.deterministic'])
def test_two_repeatable_runs_are_equal_also_with_tuning_between(how, monkeypatch):
    def run():
        if how=='fixed_kernels':
            with fixed_kernels(): return train()
        flag = torch.backends.cudnn.deterministic
        try:
            if how=='cudnn.deterministic': torch.backends.cudnn.deterministic = True
            else: torch.use_deterministic_algorithms(True)
            return train()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = flag
    races,race = [],KernelBench.race
    monkeypatch.setattr(KernelBench, 'race', lambda self, ways: races.append(1) or race(self, ways))
    first = run()
    assert not races
    train() # times all, and may choose others
    assert races
    races.clear()
    assert all(map(torch.equal, first, run())) and not races

# Shapes that vary

def test_only_so_many_shapes_of_a_layer_are_timed(monkeypatch):
    raced,race = [],KernelBench.race
    monkeypatch.setattr(KernelBench, 'race', lambda self, ways: raced.append(self.call.x[0][2]) or race(self, ways))
    (_,c,*_),w,args = plain_case
    with tuned_kernels(benchmark_limit=3):
        got = {n: backward(*inputs((2,c,n,n), w, args), args)[1] for n in range(8, 24)}
    for n,g in got.items(): assert rel(g, exact(*inputs((2,c,n,n), w, args), args)[1])<4e-3
    assert set(raced)=={8, 9, 10}
    rest = [c for k,c in rows() if k.x[0][2]>10]
    assert len(rest)==26 and all(c.reason==Reason.nearest for c in rest)

def test_the_nearest_shapes_choice_is_checked(monkeypatch):
    "A way that is wrong for the new shape only"
    (_,c,*_),w,args = plain_case
    original = ways.compute_gradients
    def f(op, way, a, mask):
        res = original(op, way, a, mask)
        return tuple(None if t is None else t*2 for t in res) if way==as_is and a[1].shape[2]==20 else res
    monkeypatch.setattr(KernelBench, 'race', lambda self, ways: dict.fromkeys(ways, 1.))
    with tuned_kernels(benchmark_limit=1):
        backward(*inputs((2,c,8,8), w, args), args)
        for module in (K, choose): monkeypatch.setattr(module, 'compute_gradients', f)
        ts = inputs((2,c,20,20), w, args)
        for a,b in zip(backward(*ts, args), exact(*ts, args)): assert rel(a, b)<4e-3
    assert len([1 for _,c in rows() if c.reason==Reason.nearest and c.way==Way(fp32=True, contiguous=True)])==2

def test_checks_stop_after_many_right_shapes(monkeypatch):
    "After ten times the limit, if all of a layer were right"
    checked,verify = [],KernelBench.verify
    monkeypatch.setattr(KernelBench, 'verify', lambda self, way: checked.append(self.call.x[0][2:]) or verify(self, way))
    monkeypatch.setattr(KernelBench, 'race', lambda self, ways: dict.fromkeys(ways, 1.)) # the trusted way is not checked, and might win
    w,args = (4,4,3,3),plain_case[2]
    with tuned_kernels(benchmark_limit=1):
        for n in range(8, 8+13): backward(*inputs((1,4,n,5), w, args), args)
    assert (18,5) in checked and (20,5) not in checked

# Memory

def test_large_layers_are_verified_on_a_few_samples():
    call = Call(*[((64,8,512,512), (8*512*512,1,8*512,8), bf16)]*2, ((8,8,3,3), (72,1,24,8), bf16), *plain_case[2][:3], False, (0,0), 1, (True,)*3)
    g,x,w,*_ = choose.make_args(call)
    assert g.shape==x.shape==(2,8,512,512) and g.stride()==(8*512*512,1,8*512,8) and w.shape==(8,8,3,3)

def no_memory(*args, **kwargs): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

@pytest.mark.parametrize('where', ['make_args', 'verify', 'race'])
def test_where_memory_runs_out_a_condition_decides(monkeypatch, where):
    monkeypatch.setattr(*((choose, where) if where=='make_args' else (KernelBench, where)), no_memory)
    for name,way in (('dilated', Way(fp32=True, contiguous=True)), ('depthwise', as_is)):
        since = kernel_count()
        x,w,args = faults[name]
        ts = inputs(x, w, args)
        with tuned_kernels(): got = backward(*ts, args)
        (c,) = [c for _,c in rows(since) if c.kernel=='wgrad']
        assert c.way==way and c.reason==Reason.unverified and rel(got[1], exact(*ts, args)[1])<4e-3

def test_decisions_do_not_depend_on_data(monkeypatch):
    "Gradients of zero, as behind a batch norm that starts at zero, and infinite ones, as of fp16, are no reason to trust or reject"
    x,w,args = faults['dilated']
    g,xx,ww = inputs(x, w, args)
    for bad in (torch.zeros_like(g), g*float('inf'), g*float('nan')):
        forget(monkeypatch)
        K.choices_file.path.unlink(missing_ok=True)
        since = kernel_count()
        with tuned_kernels(): backward(bad, xx, ww, args); got = backward(g, xx, ww, args)
        (c,) = [c for _,c in rows(since) if c.kernel=='wgrad']
        assert c.way!=as_is and rel(got[1], exact(g, xx, ww, args)[1])<4e-3

def test_the_random_generator_is_not_touched():
    x,w,args = plain_case
    ts = inputs(x, w, args)
    torch.manual_seed(3); want = torch.rand(3); torch.manual_seed(3)
    with tuned_kernels(): backward(*ts, args)
    assert torch.equal(torch.rand(3), want)

# What autograd and torch's other machinery make of it

class User(nn.Module):
    "A layer of a user's own, with a faulty convolution inside"
    def __init__(self):
        super().__init__()
        self.weight,self.first = nn.Parameter(0.1*torch.randn(24, 24, 3, 3).contiguous(memory_format=torch.channels_last)),nn.Conv2d(3, 24, 3, padding=1)
    def forward(self, x):
        w = self.weight-self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(self.first(x), w, padding=2, dilation=2)

def user_grads(m, x, dtype, run=None):
    m = copy.deepcopy(m).to(dtype)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    (run or m)(x).square().mean().backward() if run is None else run(m, x)
    return [x.grad,*(p.grad for p in m.parameters())]

def user_case():
    torch.manual_seed(0)
    return User(),torch.randn(2, 3, 32, 32)

def close(got, want, tol=0.02): # bf16 through two convolutions
    for a,b in zip(got, want): assert rel(a, b)<tol

def loss_backward(m, x): m(x).float().square().mean().backward()

def test_a_users_own_layer():
    m,x = user_case()
    with tuned_kernels(): close(user_grads(m, x, bf16, loss_backward), user_grads(m, x, torch.float64))

def test_compiled():
    m,x = user_case()
    with tuned_kernels(): got = user_grads(m, x, bf16, lambda m, x: loss_backward(torch.compile(m, backend='aot_eager'), x))
    close(got, user_grads(m, x, torch.float64))
    assert any(c.corrected for _,c in rows()) or not native_bf16

@pytest.mark.skipif(sys.platform=='win32', reason='Inductor needs a C++ compiler that is set up')
def test_compiled_by_inductor():
    m,x = user_case()
    with tuned_kernels(): got = user_grads(m, x, bf16, lambda m, x: loss_backward(torch.compile(m, fullgraph=True), x))
    close(got, user_grads(m, x, torch.float64))
    assert kernel_count()

def test_scripted_and_symbolically_traced():
    m,x = user_case()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        def scripted(m, x): loss_backward(torch.jit.trace(m, x), x)
        def traced(m, x): loss_backward(torch.fx.symbolic_trace(m), x)
        for run in (scripted, traced):
            with tuned_kernels(): close(user_grads(m, x, bf16, run), user_grads(m, x, torch.float64))

@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointed(reentrant):
    m,x = user_case()
    with tuned_kernels(): got = user_grads(m, x, bf16, lambda m, x: checkpoint(m, x, use_reentrant=reentrant).float().square().mean().backward())
    close(got, user_grads(m, x, torch.float64))

def test_double_backward():
    m = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(3, 3, 5, padding=2, groups=3)).double().to(memory_format=torch.channels_last)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    def f(x): return m(x).mean((2, 3))
    with tuned_kernels():
        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)

def test_functional_transforms():
    m,x = user_case()
    params = {n: p.detach() for n,p in m.named_parameters()}
    def loss(params, x): return torch.func.functional_call(m, params, (x[None],)).square().mean()
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    with tuned_kernels(): got = per_sample(params, x)
    want = per_sample({n: p.double() for n,p in params.items()}, x.double())
    for n in params: assert rel(got[n], want[n])<1e-4
    with tuned_kernels(): torch.func.jacfwd(lambda x: loss(params, x))(x[0])

def test_hooks_run_once_and_the_model_is_not_touched():
    m,x = user_case()
    seen = []
    hooks = [m.first.register_forward_hook(lambda *a: seen.append('forward')), m.first.register_full_backward_hook(lambda *a: seen.append('backward'))]
    before = {n: {k: v for k,v in vars(o).items() if not k.startswith('_')} for n,o in m.named_modules()}
    with tuned_kernels(): loss_backward(m, x)
    assert seen==['forward', 'backward']
    assert before=={n: {k: v for k,v in vars(o).items() if not k.startswith('_')} for n,o in m.named_modules()}
    for h in hooks: h.remove()
    file = io.BytesIO()
    with tuned_kernels(): torch.save(m, file); pickle.loads(pickle.dumps(copy.deepcopy(nn.Conv2d(2, 2, 1))))
    assert b'fastxtend' not in file.getvalue()

def test_threads():
    "Several that meet new calls at once; each call is decided once"
    cases = [inputs((2,c,12,12), (c,c,3,3), plain_case[2], seed=i) for i,c in enumerate((4, 8, 12, 16)*4)]
    with tuned_kernels(), ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda ts: backward(*ts, plain_case[2]), cases))
    for ts,g in zip(cases, got):
        for a,b in zip(g, exact(*ts, plain_case[2])): assert rel(a, b)<4e-3
    assert kernel_count()==4

ranks = '''
import torch, torch.distributed as dist
from torch import nn
from helpers import process_group
from fastxtend_cl.kernels import tuned_kernels, kernel_count
torch.set_num_threads(1); torch.manual_seed(0)
def train():
    m = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, padding=2, dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2)).to(memory_format=torch.channels_last))
    opt = torch.optim.SGD(m.parameters(), 0.1)
    x = torch.randn(4, 3, 34, 34, generator=torch.Generator().manual_seed(dist.get_rank())).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        with tuned_kernels(), torch.autocast('cpu', torch.bfloat16): loss = nn.functional.cross_entropy(m(x).float(), torch.arange(4)%2)
        with tuned_kernels(): loss.backward()
        opt.step(); opt.zero_grad()
    assert kernel_count()==4 and all(p.isfinite().all() for p in m.parameters())
    print(sum(p.double().sum().item() for p in m.parameters()))
with process_group(): train()
'''
def test_two_ranks():
    outs = two_processes('-c', ranks, timeout=300)
    assert outs[0][0]==outs[1][0]

# Formats

def force(monkeypatch, way):
    "Compute in this way whatever can be"
    def choice(bench, timed): return KernelChoice(bench.name, way if way in candidates(bench.call, bench.name) else as_is, Reason.fastest)
    monkeypatch.setattr(choose, '_choose', choice)
    forget(monkeypatch)
    monkeypatch.setattr(K._State, 'from_cache', lambda self, call: None)

every_way = [as_is, Way(contiguous=True), Way(fp32=True), Way(fp32=True, contiguous=True), Way(tiled=True), Way(padded=True)]
mixed_layers = {'plain': (nn.Conv2d(8, 6, 3, padding=1), (2,8,7,7)), '1x1': (nn.Conv2d(8, 6, 1), (2,8,7,7)), 'depthwise': (nn.Conv2d(8, 8, 5, padding=2, groups=8), (2,8,9,9)),
    'one channel': (nn.Conv2d(1, 8, 3), (2,1,7,7)), 'transposed': (nn.ConvTranspose2d(8, 4, 2, stride=2), (2,8,7,7)), 'tokens': (nn.Conv1d(8, 6, 1), (2,8,36)),
    '1-D': (nn.Conv1d(8, 8, 3, groups=8), (2,8,36)), '3-D': (nn.Conv3d(8, 6, 3, padding=1), (2,8,4,5,5)), '3-D 1x1x1': (nn.Conv3d(8, 6, 1), (2,8,4,5,5))}

def last(t): return t.movedim(1, -1).contiguous().movedim(-1, 1)
def as_slice(t): return last(torch.cat([t, t], 1))[:,:t.shape[1]]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dtype', [torch.float32, bf16])
@pytest.mark.parametrize('name', mixed_layers)
def test_strides_of_results_do_not_depend_on_the_way(monkeypatch, name, dtype):
    "Input, weight and gradient in all formats: where a graph was planned with torch's own, and in a trace"
    layer,shape = mixed_layers[name]
    layer = copy.deepcopy(layer).to(dtype)
    def run(x, w, grads):
        x,layer.weight = x.detach().requires_grad_(),nn.Parameter(w)
        y = layer(x)
        gx,gw = torch.autograd.grad(y, (x, layer.weight), grads(torch.ones_like(y)))
        return [tuple(s for s,n in zip(t.stride(), t.shape) if n>1) for t in (y, gx, gw)]
    for fx,fw,fg in itertools.product((torch.clone, last, as_slice), (torch.clone, last), (torch.clone, last, as_slice)):
        x,w = fx(torch.randn(shape).to(dtype)),fw(layer.weight.detach())
        want = run(x, w, fg)
        for way in every_way:
            force(monkeypatch, way)
            with tuned_kernels(), torchs_formats(): assert run(x, w, fg)==want, (way, fx, fw, fg)

@pytest.mark.parametrize('way', every_way[:2], ids=str)
def test_compiled_graphs_get_the_strides_that_they_were_planned_with(monkeypatch, way):
    conv,x = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last),torch.randn(2, 8, 7, 7).requires_grad_()
    def grad():
        torch._dynamo.reset()
        return torch.autograd.grad(torch.compile(lambda x: conv(x).square().sum(), backend='aot_eager')(x), x)[0]
    want = grad()
    force(monkeypatch, way)
    with tuned_kernels(): got = grad()
    assert got.stride()==want.stride()!=x.stride() and rel(got, want)<1e-5

# The other operators

def grads_of(f, x, g, mode):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = f(x)
    if mode is None: y.backward(g)
    else:
        with tuned_kernels(mode): y.backward(g)
    return x.grad

slow = {'relu': F.relu, 'hardtanh': F.relu6, 'hardswish': F.hardswish, 'hardsigmoid': F.hardsigmoid, 'silu': F.silu, 'gelu': F.gelu,
    'gelu tanh': lambda x: F.gelu(x, approximate='tanh'), 'leaky': F.leaky_relu, 'mish': F.mish, 'sigmoid': torch.sigmoid, 'elu': F.elu,
    'batch norm': lambda x: F.batch_norm(x, None, None, training=True), 'group norm': lambda x: F.group_norm(x, 2)}

def arrivals(shape):
    "The gradient as a slice of a larger one, an expanded view, and in the other format"
    n,c,*hw = shape
    big = torch.randn(n, c+4, *hw).contiguous(memory_format=formats[len(shape)])
    return {'slice': big[:,2:2+c], 'expanded': torch.randn(n, c, *[1]*len(hw)).expand(shape), 'contiguous': torch.randn(shape)}

@pytest.mark.parametrize('name', slow)
@pytest.mark.parametrize('shape', [(2,8,6,6), (2,4,3,4,4)])
def test_gradients_in_other_strides(name, shape):
    x = torch.randn(shape).contiguous(memory_format=formats[len(shape)])
    for kind,g in arrivals(shape).items():
        got,want = grads_of(slow[name], x, g, 'tuned'),grads_of(slow[name], x.double().contiguous(), g.double().contiguous(), None)
        assert rel(got, want)<1e-5, kind
        assert got.is_contiguous(memory_format=formats[len(shape)]), kind

def test_instance_norm_of_a_batch_of_one():
    "Its input gradient is wrong in mixed formats"
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    x,g = (torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
    want = grads_of(copy.deepcopy(norm).double(), x.double().contiguous(), g.double().contiguous(), None)
    for mode in ('tuned', 'correct'): assert rel(grads_of(norm, x, g, mode), want)<1e-5

views = {'contiguous': lambda t: t, 'channels last': lambda t: t.contiguous(memory_format=torch.channels_last),
    'of one image': lambda t: t[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None], # as images are read, with a batch of one
    'of one column': lambda t: t[...,0].transpose(1, 2).contiguous().transpose(1, 2)[...,None]} # features of sequences

odd_views = [(shape, a, b) for shape,own in (((1, 8, 6, 6), 'of one image'), ((2, 8, 6, 1), 'of one column'))
    for a,b in itertools.permutations(('contiguous', 'channels last', own), 2)]

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape,a,b', odd_views)
def test_batch_norm_of_views(a, b, shape, training):
    "PyTorch's gradients are wrong for some of these: it reads the stride of a dimension of size 1"
    norm,(x,g) = nn.BatchNorm2d(8).double().train(training),torch.randn(2, *shape).double()
    want = grads_of(copy.deepcopy(norm), x, g, None)
    for mode in ('tuned', 'correct'):
        got = views[a](x).detach().requires_grad_()
        y = norm(got)
        with tuned_kernels(mode): y.backward(views[b](g))
        assert rel(got.grad, want)<1e-12

@pytest.mark.parametrize('mode', K.modes)
@pytest.mark.parametrize('shape', [(2, 8, 3, 4), (2, 8, 3, 4, 2)])
def test_group_norm_behind_what_is_frozen(shape, mode):
    "Its input needs no gradient. torch's kernel crashes up to 2.13 if that is not asked for in channels last"
    norm,(x,g),fmt = nn.GroupNorm(2, 8).double(),torch.randn(2, *shape).double(),formats[len(shape)]
    want = torch.autograd.grad(norm(x), [*norm.parameters()], g)
    with tuned_kernels(mode): got = torch.autograd.grad(norm(x.to(memory_format=fmt)), [*norm.parameters()], g.to(memory_format=fmt))
    assert all(rel(a, b)<1e-12 for a,b in zip(got, want))
    masks = []
    f = operators._group_norm_backward(Operator(lambda *args: masks.append(args[-1]) or aten.native_group_norm_backward(*args)), at=1, corrects=False)
    _,mean,rstd = aten.native_group_norm(x, norm.weight, norm.bias, 2, 8, x[0,0].numel(), 2, 1e-5)
    def call(*mask): return f(None, g, x, mean, rstd, norm.weight, 2, 8, x[0,0].numel(), 2, mask)
    with tuned_kernels(mode): dropped,kept = call(False, True, False),call(True, True, True)
    assert masks==[[True, True, False], (True, True, True)] and dropped[0] is None and torch.equal(dropped[1], kept[1]) and kept[0].shape==x.shape
    call(False, True, True) # outside nothing is replaced
    assert masks[-1]==(False, True, True)

def norm_steps(shape, dtype, affine):
    "An instance normalization with its inputs in channels last; and a function that gives output and gradients of a mode, in double if asked"
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(shape[1], affine=affine) if len(shape)==4 else nn.InstanceNorm3d(shape[1], affine=affine)
    for p in norm.parameters(): nn.init.uniform_(p)
    x,g = ((torch.randn(shape)+m).to(dtype) for m in (2, 0))
    def run(mode, exact=False):
        m,fmt = copy.deepcopy(norm),torch.contiguous_format if exact else formats[len(shape)]
        if exact or dtype==torch.float64: m.double()
        a,b = (t.to(torch.float64 if exact else dtype).contiguous(memory_format=fmt) for t in (x, g))
        a.requires_grad_()
        with tuned_kernels(mode) if mode else nullcontext(): y = m(a); y.backward(b)
        return [y.detach(),a.grad,*(p.grad for p in m.parameters())]
    return run

@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 4e-6), (torch.bfloat16, 2**-7), (torch.float64, 1e-13)])
@pytest.mark.parametrize('shape', [(3,8,64,32), (1,16,32,32), (2,4,16,16,16)])
def test_instance_norm_keeps_the_format(shape, dtype, tol, affine):
    run = norm_steps(shape, dtype, affine)
    got,want = run('tuned'),run(None, exact=True)
    assert all(t.is_contiguous(memory_format=formats[len(shape)]) and t.dtype==dtype for t in got[:2])
    for a,b in zip(got, want): assert rel(a, b)<tol

@pytest.mark.parametrize('mode', ['correct', 'survive', None])
def test_instance_norm_is_left_alone_elsewhere(mode, monkeypatch):
    run = norm_steps((2,4,8,8), torch.float32, True)
    want = run(None)
    assert all(map(torch.equal, run('tuned'), want)), 'small images'
    monkeypatch.setattr(operators, '_large_image', 1)
    assert not torch.equal(run('tuned')[0], want[0]) and all(map(torch.equal, run(mode), want))

def test_instance_norm_in_all_its_forms(monkeypatch):
    "Running statistics, evaluation, no gradients, an empty batch, transforms of functions, second derivatives"
    monkeypatch.setattr(operators, '_large_image', 1)
    last = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    norms = [nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)]
    norms.append(copy.deepcopy(norms[1]).eval())
    for m in norms:
        before = copy.deepcopy(m)
        with tuned_kernels(): got = m(last)
        torch.testing.assert_close(got, before(last.contiguous()))
        for n,b in m.named_buffers(): torch.testing.assert_close(b, before.get_buffer(n))
    for context in (torch.no_grad, torch.inference_mode):
        with context(), tuned_kernels(): torch.testing.assert_close(norms[0](last), norms[0](last.contiguous()))
    with pytest.raises(IndexError), tuned_kernels(): norms[0](last[:0]) # as torch's
    def loss(x): return norms[0](x).sin().sum()
    with tuned_kernels(): each = torch.func.vmap(torch.func.grad(loss))(last.unsqueeze(1))
    torch.testing.assert_close(each, torch.func.grad(loss)(last.contiguous()).unsqueeze(1))
    double = nn.InstanceNorm2d(4, affine=True).double()
    with tuned_kernels(): assert torch.autograd.gradgradcheck(double, last[:1].double().requires_grad_())
    for pixels in ((2, 4, 1, 1), (1, 4, 1, 1)):
        with pytest.raises(ValueError, match='Expected more than 1 spatial element'), tuned_kernels(): norms[0](torch.randn(pixels))

@pytest.mark.parametrize('f', [lambda x: x.mean((2, 3)), lambda x: x.mean((-1, -2), keepdim=True), lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: x.mean([2, 3]), lambda x: x.mean(1), lambda x: x.mean((2, 3), dtype=torch.float64), lambda x: x.mean((1, 2, 3)),
    lambda x: x.mean(), lambda x: x.mean(2)])
def test_the_gradient_of_a_mean(f):
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    def run(x, mode):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        def step(): y = f(x*1); y.sin().sum().backward(); return y.detach(),x.grad
        if mode is None: return step()
        with tuned_kernels(mode): return step()
    got,want = run(x, 'tuned'),run(x.double().contiguous(), None)
    for a,b in zip(got, want): assert a.shape==b.shape and (a-b).abs().max()<1e-6

def test_a_mean_over_pixels_has_its_gradient_in_channels_last():
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    formats_seen = []
    def run():
        y = x*1
        y.register_hook(lambda g: formats_seen.append(g.is_contiguous(memory_format=torch.channels_last)))
        y.mean((2, 3)).square().sum().backward()
    run()
    with tuned_kernels(): run()
    assert formats_seen==[False, True]

@pytest.mark.parametrize('shape,pad', [((2,5,6,4), (1,2,3,0)), ((1,3,4,4), (4,4,4,4)), ((2,3,3,4,5), (1,1,0,2,1,3)), ((2,5,6,4), (0,0,1,1))])
def test_circular_padding(shape, pad):
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn(F.pad(x, pad, mode='circular').shape, dtype=torch.float64)
    last = x.contiguous(memory_format=formats[len(shape)])
    def f(x): return F.pad(x, pad, mode='circular')
    with tuned_kernels():
        y = f(last)
        assert torch.equal(f(x), y) and y.is_contiguous(memory_format=formats[len(shape)]) and not f(x).is_contiguous(memory_format=formats[len(shape)])
        with torch.inference_mode(): assert torch.equal(f(last), y)
        got = last.clone().requires_grad_()
        f(got).backward(g)
        assert got.grad.is_contiguous(memory_format=formats[len(shape)])
        if shape[0]==1: assert torch.autograd.gradgradcheck(f, last.clone().requires_grad_())
    assert rel(got.grad, grads_of(f, x, g, None))<1e-14
    with pytest.raises(RuntimeError), tuned_kernels(): F.pad(last, (99, 0, 0, 0), mode='circular')

def test_nll_loss_of_a_channels_last_output():
    "Torch itself raises; `log_softmax` before it hides that"
    torch.manual_seed(0)
    x,y = torch.randn(2, 5, 4, 4),torch.randint(5, (2, 4, 4))
    x.requires_grad_(); F.nll_loss(x, y).backward()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with tuned_kernels('correct'): F.nll_loss(last, y).backward()
    assert torch.equal(last.grad, x.grad)
    with pytest.raises(RuntimeError, match='contiguous'): F.nll_loss(last, y).backward()

# The cache

def test_choices_are_kept_between_processes(monkeypatch):
    x,w,args = faults['depthwise']
    ts = inputs(x, w, args)
    with tuned_kernels(): want = backward(*ts, args)
    old = kernel_table()
    forget(monkeypatch)
    def again(*args): raise AssertionError('decided again')
    monkeypatch.setattr(K, 'decide', again)
    with tuned_kernels(): got = backward(*ts, args)
    assert all(map(torch.equal, got, want)) and tuning_line() is None
    assert [(str(k), c.way, c.seconds) for k,c in rows()]==[(str(k), c.way, c.seconds) for k,c in old.rows]

@pytest.mark.parametrize('what', ['threads', 'precision'])
def test_another_setting_is_another_choice(what):
    x,w,args = plain_case
    ts,n,p = inputs(x, w, args),torch.get_num_threads(),torch.get_float32_matmul_precision()
    with tuned_kernels(): backward(*ts, args)
    try:
        if what=='threads': torch.set_num_threads(n+1)
        else: torch.set_float32_matmul_precision('medium')
        with tuned_kernels(): backward(*ts, args)
    finally: torch.set_num_threads(n); torch.set_float32_matmul_precision(p)
    assert kernel_count()==2 and not any(d.cached for d in decisions())

def test_a_damaged_cache_is_one_warning_and_replaced():
    "tests/test_cache.py has all ways to be damaged"
    file = K.choices_file.path
    file.parent.mkdir(parents=True); file.write_text('{')
    x,w,args = plain_case
    with caught_warnings() as caught, tuned_kernels(): backward(*inputs(x, w, args), args)
    assert [o.category for o in caught]==[cache.CacheWarning] and 'cannot be used and will be measured again' in str(caught[0].message)
    assert json.loads(file.read_text())['version']==K.choices_file.version

@pytest.mark.parametrize('data', [{'m': {}}, {'m': {'used': 'x', 'calls': 3}}, {'m': {'used': None}, 'n': {'used': [1], 'calls': {}}}])
def test_foreign_machines_in_the_cache(data):
    K.choices_file.update(lambda _: data)
    K._save_calls('m', {'call': {}})
    assert K._saved_calls('m')=={'call': {}}

@pytest.mark.parametrize('change', [lambda c: {}, lambda c: {**c, 'way': 'magic'}, lambda c: {**c, 'way': 3}, lambda c: {**c, 'seconds': 'x'},
    lambda c: {**c, 'reason': 'luck'}, lambda c: {**c, 'errors': {'as is': 'x'}}, lambda c: None])
def test_foreign_entries_are_decided_again(monkeypatch, change):
    x,w,args = plain_case
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    def foreign(machines):
        for m in machines.values():
            for c in m['calls'].values():
                if 'dgrad' in c: c['dgrad'] = change(c['dgrad'])
        return machines
    K.choices_file.update(foreign)
    forget(monkeypatch)
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    assert not any(d.cached for d in decisions() if not d.forward)

def test_the_cache_does_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(K, '_most_calls', 5)
    for i in range(12): K._save_calls(f'machine {i}', {f'call {j}': {} for j in range(9)})
    machines = K.choices_file.read()
    assert list(machines)==[f'machine {i}' for i in range(4, 12)] and all(len(m['calls'])==5 for m in machines.values())

def test_a_cache_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FASTXTEND_CL_CACHE', str(tmp_path/'file'/'folder'))
    x,w,args = plain_case
    with caught_warnings() as caught, tuned_kernels(): backward(*inputs(x, w, args), args)
    (text,) = [str(o.message) for o in caught]
    assert text.startswith('cannot save the choices of kernels for the next process: ')

# Tables, lines, plots

def test_table():
    empty = kernel_table()
    assert repr(empty)=='no kernels: no convolution was computed inside `tuned_kernels` yet'==empty._repr_markdown_().replace('*', '') and not empty.conditions
    for name in ('dilated', 'depthwise'):
        x,w,args = faults[name]
        with tuned_kernels(): backward(*inputs(x, w, args), args)
    t = kernel_table()
    n = sum(c.way!=as_is for _,c in t.rows)
    assert t.verdict==f'{n} of 4 kernels replaced' and repr(t).startswith(f'{t.verdict}: ') and re.search(r'; decided in [\d.]+ s$', t.reason)
    assert 'because it can crash' in t.reason
    for text in (repr(t), t._repr_markdown_()): assert '3x3, 24 to 24, dilation 2, on 2x32x32 bf16' in text and torch.__version__ in text
    assert '5x5 depthwise, 32, on 2x12x12 bf16' in repr(t) and max(map(len, repr(t).splitlines()[1:]))<=100
    assert len(t.cells()[0])==6 and json.loads(json.dumps(t.to_dict(), allow_nan=False))['verdict']==t.verdict
    many = K.KernelTable([*t.rows, *[(k,KernelChoice('dgrad', as_is, Reason.as_is)) for k,_ in t.rows]*10])
    assert len(many.cells())==11 and many.remarks()==['34 more are computed as torch does: `.table()` shows all.'] and len(many.table().splitlines())==45

def test_reasons_add_up():
    call = gpu_call(*plain_case)[0]
    def of(reason, way=Way(fp32=True)): return call,KernelChoice('wgrad', way, reason, {'as is': 2e-3, str(way): 1e-3})
    t = K.KernelTable([of(Reason.fastest), of(Reason.fastest), of(Reason.wrong), of(Reason.crash), of(Reason.nearest), of(Reason.unverified), of(Reason.as_is, as_is)], 1.)
    assert t.verdict=='6 of 7 kernels replaced'
    assert t.reason==('2 for speed, 1 because torch computes it wrong, 1 because it can crash, 1 as for the nearest shape, 1 not verified, out of memory; '
        'decided in 1.0 s')
    assert [row[3] for row in t.cells()[1:]]==['2.0x as fast', '2.0x as fast', 'wrong as is', 'can crash as is', 'nearest shape', 'not verified', '']
    assert "torch's own are correct and the fastest" in K.KernelTable([of(Reason.as_is, as_is)]).reason

def test_tuning_line():
    assert tuning_line() is None
    for name in ('dilated', 'depthwise'):
        x,w,args = faults[name]
        with tuned_kernels(): backward(*inputs(x, w, args), args)
    line = tuning_line()
    assert line.startswith('Tuned 2 convolutions in ') and '1 wgrad kernel corrected' in line and tuning_line(kernel_count()) is None

def test_plot():
    x,w,args = faults['depthwise']
    with tuned_kernels(): backward(*inputs(x, w, args), args)
    assert len(kernel_table().plot().get_yticks())==2
    empty = K.KernelTable([])
    assert empty.plot().texts[0].get_text()==empty.reason
    assert K.KernelTable([(gpu_call(*plain_case)[0],KernelChoice('dgrad', as_is, Reason.as_is))]).plot().texts[0].get_text()=='nothing was timed'

# Random convolutions

@st.composite
def convolutions(draw):
    nd = draw(st.integers(1, 3))
    def each(lo, hi): return draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd))
    groups,transposed = draw(st.sampled_from((1, 1, 2, 8))),draw(st.booleans())
    c,o = groups*draw(st.integers(1, 4)),groups*draw(st.integers(1, 4))
    kernel,stride,dilation = each(1, 5),each(1, 3),each(1, 2)
    padding = [draw(st.integers(0, d*(k-1)//2)) for k,d in zip(kernel, dilation)]
    size = [draw(st.integers(max(1, d*(k-1)+1-2*p), 9)) if not transposed else draw(st.integers(1+(2*p>d*(k-1)), 6))
        for k,d,p in zip(kernel, dilation, padding)]
    args = (stride, padding, dilation, transposed, [0]*nd, groups)
    w = (c, o//groups, *kernel) if transposed else (o, c//groups, *kernel)
    return (draw(st.integers(1, 3)), c, *size),w,args,draw(st.sampled_from((bf16, torch.float32, torch.float16, torch.float64))),draw(st.booleans()),draw(st.booleans())

@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_random_convolutions_are_right(case):
    x,w,args,dtype,last,sliced = case
    ts = inputs(x, w, args, dtype, last)
    if sliced: ts = (torch.cat([ts[0], ts[0]], 1)[:,:ts[0].shape[1]], *ts[1:])
    want = exact(*ts, args)
    summands = ts[0].double().abs().sum([0, *range(2, ts[0].ndim)]) # of the bias gradient, which may cancel
    def right(got, mask=(True, True, True)):
        for a,b,m in zip(got[:2], want, mask): assert not m or gradient_error(a, b, dtype)<=1
        if mask[2]: assert ((got[2]-want[2]).abs()<=4*torch.finfo(dtype).eps*summands).all()
    for _ in range(2):
        with tuned_kernels(): right(backward(*ts, args))
    with tuned_kernels():
        for mask in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)): right(backward(*ts, args, mask), mask)

# Logic for a GPU, tested on a CPU

class Operator:
    "A kernel whose results `change` may spoil, as `torch.library.get_kernel` returns one"
    def __init__(self, op, change=lambda res: res): self.op,self.change = op,change
    def __call__(self, *args): return self.change(self.op(*args))
    def call_boxed(self, ks, *args): return self(*args)

def gpu_call(shape, w, args, dtype=torch.float16, last=True, mask=(True, True, True)):
    ts = inputs(shape, w, args, dtype, last)
    call = Call.of((*ts, None, *args, mask))
    return Call(**{**vars(call), 'device': 'a GPU'}),ts

grouped = {'grouped': ((5,24,9,8), (36,6,3,3), ([2,1],[1,1],[1,1],False,[0,0],4)), 'depthwise': ((4,32,9,9), (32,1,5,5), ([1,1],[2,2],[1,1],False,[0,0],32)),
    'grouped, transposed': ((4,16,5,5), (16,3,3,3), ([2,2],[1,1],[1,1],True,[1,1],4)), 'grouped 3-D': ((4,8,4,5,5), (16,2,3,3,3), ([1]*3,[1]*3,[1]*3,False,[0]*3,4))}

@pytest.mark.parametrize('last', [True, False])
@pytest.mark.parametrize('name', grouped)
def test_dense_groups_compute_the_same(name, last):
    "In fp64: zeros are added between the groups, and nothing else"
    shape,w,args = grouped[name]
    call,ts = gpu_call(shape, w, args, torch.float64, last)
    want,own,y = exact(*ts, args),backward(*ts, args),aten.convolution(*ts[1:], None, *args)
    for way in (Way(dense=True), Way(dense=True, contiguous=True)):
        got = ways.compute_gradients(aten.convolution_backward, way, (*ts, [ts[0].shape[1]], *args, [True]*3), [True]*3)
        for a,b,o in zip(got, want, own): assert rel(a, b)<1e-12 and a.stride()==o.stride()
        out = ways.compute_forward(aten.convolution, way, (*ts[1:], None, *args))
        assert rel(out, y)<1e-12 and out.stride()==y.stride()

def worst(name, kernel, change=lambda res: res, dtype=torch.float16, **kwargs):
    "Error of each way to compute a kernel, as verified for a GPU"
    shape,w,args = grouped[name]
    call,_ = gpu_call(shape, w, args, dtype, mask=(False,)*3 if kernel=='forward' else (True,)*3)
    op = aten.convolution if kernel=='forward' else aten.convolution_backward
    bench = GpuKernelBench(op, call, kernel, torch.device('cpu'))
    bench.reference # is right
    bench.op = Operator(op, change)
    return {str(o): bench.verify(o) for o in candidates(call, kernel)}

@pytest.mark.parametrize('kernel', ['forward', 'dgrad', 'wgrad'])
@pytest.mark.parametrize('name', grouped)
def test_ways_for_a_gpu_are_verified(name, kernel):
    errors = {way: e for way,(e,_) in worst(name, kernel).items()}
    assert {*errors}==({'as is', 'contiguous', 'dense'} if name.startswith('grouped') and '3-D' not in name else {'as is'})
    assert all(e<=1 for e in errors.values())

def spoil(change):
    def f(res):
        res = [None if t is None else t.clone() for t in (res if isinstance(res, (list, tuple)) else [res])]
        for t in res: t is None or change(t)
        return res if len(res)>1 else res[0]
    return f

@pytest.mark.parametrize('kernel', ['forward', 'dgrad', 'wgrad'])
@pytest.mark.parametrize('change', [lambda t: t.mul_(1.05), lambda t: t[-1].zero_(), lambda t: t[(0,)*t.ndim].fill_(math.nan)],
    ids=['scaled', 'last sample or channel', 'NaN'])
def test_faults_on_a_gpu_are_found(kernel, change):
    assert all(e>1 for e,_ in worst('grouped', kernel, spoil(change)).values())

def test_only_torchs_own_way_is_searched_for_by_cudnn(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    bench = GpuKernelBench(Operator(aten.convolution_backward, lambda res: seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)) or res),
        gpu_call(*grouped['grouped'])[0], 'dgrad', torch.device('cpu'))
    assert all(bench.verify(w)[0]<=1 for w in (as_is, Way(contiguous=True), Way(dense=True)))
    assert seen==[(False, False), (True, True), (True, False), (True, False)] # the reference, and each way
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.enabled

def test_a_way_that_raises_on_a_gpu_is_no_candidate():
    def fail(res): raise RuntimeError('no engine for this')
    assert {*worst('grouped', 'dgrad', fail).values()}=={(math.inf, 'RuntimeError: no engine for this')}

def test_on_a_gpu_the_batch_is_kept_and_three_samples_are_compared():
    call,_ = gpu_call((64,8,6,6), (8,8,3,3), ([1,1],[1,1],[1,1],False,[0,0],1))
    bench = GpuKernelBench(aten.convolution_backward, call, 'wgrad', torch.device('cpu'))
    (g,x,*_),_ = bench.reference
    assert len(g)==len(x)==64 and bench.picks.tolist()==[0,32,63] and (g.abs().sum((1,2,3))>0).nonzero().view(-1).tolist()==[0,32,63]

@pytest.mark.parametrize('conv,tunable', [(nn.Conv2d(8, 8, 3, groups=2), True), (nn.ConvTranspose2d(8, 8, 3, groups=2), True), (nn.Conv2d(8, 8, 3), False),
    (nn.Conv2d(8, 8, 3, groups=8), False), (nn.Conv2d(8, 16, 3, groups=8), False), (nn.Conv2d(8, 8, 7, groups=8), True), (nn.Conv3d(8, 8, 3, groups=2), False), (nn.Conv1d(8, 8, 3, groups=2), False)])
def test_which_models_have_a_choice_on_a_gpu(conv, tunable):
    "As `candidates` says of their calls; on a CPU all have one, elsewhere none"
    model,x = nn.Sequential(nn.Flatten(0, 0), conv),torch.randn(2, 8, *[7]*len(conv.kernel_size))
    x = x.contiguous(memory_format=formats[x.ndim])
    assert [can_tune(model, torch.device(d)) for d in ('cpu', 'cuda', 'mps')]==[True, tunable, False]
    y = conv(x)
    call = Call.of((y, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, isinstance(conv, nn.ConvTranspose2d), conv.output_padding, conv.groups, (True,)*3))
    call = Call(**{**vars(call), 'device': 'a GPU'})
    assert (candidates(call, 'dgrad')!=[as_is])==tunable
    if conv.groups==8: assert candidates(Call(**{**vars(call), 'x': (*call.x[:2], torch.float16)}), 'dgrad')==[as_is]

def test_only_what_a_model_needs_is_registered_on_a_gpu(monkeypatch):
    seen = []
    for module in (K, operators):
        monkeypatch.setattr(module, 'has_cuda', lambda: True)
        monkeypatch.setattr(module, 'register', lambda name, replacements: seen.append(name))
    for mode,model,n in (('tuned', nn.Conv2d(8, 8, 3), 3), ('tuned', nn.Conv2d(8, 8, 3, groups=2), 4), ('correct', nn.Conv2d(8, 8, 3, groups=2), 3), ('tuned', None, 4)):
        seen.clear()
        with tuned_kernels(mode, model=model): pass
        assert seen==['CPU', 'CUDA', 'CPU convolutions', 'CUDA convolutions'][:n]

def test_no_kernel_is_known_to_fail_on_a_gpu():
    for name in faults:
        call,_ = gpu_call(*faults[name], dtype=bf16)
        assert not suspicious(call) and not can_crash(call) and as_is in candidates(call, 'wgrad')

@pytest.mark.parametrize('wrong', [True, False])
def test_average_pools_are_corrected_where_they_are_wrong(wrong):
    "The kernel of CUDA's channels last up to torch 2.13 forgets the padding (issue 188344); here it is planted"
    def pool(g, x, *args):
        if wrong and not x.is_contiguous(): g = g.roll(1, -1)
        return aten.avg_pool2d_backward(g, x, *args)
    f = operators._avg_pool_backward(Operator(pool))
    x,args = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last),([3,3],[2,2],[1,1],False,True,None)
    g = torch.randn_like(F.avg_pool2d(x, 3, 2, 1))
    want = aten.avg_pool2d_backward(g.contiguous(), x.contiguous(), *args)
    assert torch.allclose(f(None, g, x, *args), want)!=wrong
    for mode in ('correct', 'tuned'):
        with tuned_kernels(mode):
            got = f(None, g, x, *args)
            assert torch.allclose(got, want) and got.stride()==x.stride()
    with tuned_kernels('survive'): assert torch.allclose(f(None, g, x, *args), want)!=wrong

def test_calls_on_different_devices_are_different():
    call,_ = gpu_call(*plain_case, dtype=bf16)
    own = Call(**{**vars(call), 'device': 'cpu'})
    assert own!=call and own.layer!=call.layer and repr(own)!=repr(call)

class Net(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Conv2d(3, 16, 3),nn.Conv2d(16, 16, 3, groups=4)
    def forward(self, x): return self.b(self.a(x).relu())

@pytest.mark.parametrize('model', [nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), Net()], ids=['Sequential', 'own'])
def test_compiled_models_have_the_graphs_that_they_have_without(model):
    "The functions that stand before torch's kernels are not compiled"
    def graphs(context):
        torch._dynamo.reset()
        seen,m,x = [],copy.deepcopy(model),torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
        m.compile(backend=lambda gm, args: seen.append(len(gm.graph.nodes)) or gm)
        with context: m(x).square().mean().backward()
        return seen
    assert graphs(tuned_kernels())==graphs(nullcontext())
