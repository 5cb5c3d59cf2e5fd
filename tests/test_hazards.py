"Each known hazard, in a child process: it is still there without the guard, and the guarded layer is right"
import json, subprocess, sys, textwrap
from copy import deepcopy
from itertools import product
import pytest, torch
import torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from fastxtend_cl.amp import cpu_bf16
from fastxtend_cl.format import apply_channels_last, apply_contiguous, format_of
from fastxtend_cl.probe import LayerSpec, Probe
from fastxtend_cl.hazards import Guard, guard, guarded, hazards, out_sizes, unguard

avx512_bf16 = pytest.mark.skipif(cpu_bf16()!='AVX512-BF16', reason='seen with AVX512-BF16 only')
avx = pytest.mark.skipif(not (torch.backends.mkldnn.is_available() and 'AVX' in torch.backends.cpu.get_cpu_capability()),
    reason='seen on x86 with AVX2 or AVX512')

# Name of the hazard: the layer, the shape of its input, and whether it computes in bf16
cases = {
    'strided 1x1': ('nn.Conv2d(3, 64, 1, stride=2)', (2, 3, 256, 256), False),
    'strided transposed 1x1': ('nn.ConvTranspose2d(64, 3, 1, stride=2, output_padding=1)', (2, 64, 128, 128), False),
    'instance norm, batch of 1': ('nn.InstanceNorm2d(8)', (1, 8, 16, 16), False),
    'bf16 dilated': ('nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32)', (1, 32, 9, 40), True),
    'bf16 narrow': ('nn.Conv2d(16, 16, 3, stride=2, padding=1)', (1, 16, 9, 1), True),
    'bf16 shallow 3-D': ('nn.Conv3d(16, 16, 3, padding=1)', (2, 16, 2, 8, 8), True),
}

child = '''
import sys, torch
from torch import nn
from fastxtend_cl.format import as_channels_last
from fastxtend_cl.hazards import guard, hazards
hazard, layer, shape, bf16, guarded = {args!r}
def grads(layer, x, bf16):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast('cpu', enabled=bf16): y = layer(x)
    torch.manual_seed(1)
    g = torch.randn(y.shape).to(y.dtype)
    y.backward(as_channels_last(g) if x.dtype!=torch.float64 else g.double())
    return [x.grad.double(), *(p.grad.double() for p in layer.parameters())]
torch.manual_seed(0)
layer, x = eval(layer), torch.randn(shape)
mf = torch.channels_last if len(shape)==4 else torch.channels_last_3d
worst, junk = 0., []
for _ in range({rounds}):
    junk.append(torch.full((1<<16,), 1e30)); junk = junk[-3:] # memory that is handed out again is not clean
    layer.float().zero_grad(); layer.to(memory_format=mf)
    if guarded:
        guard(layer)
        assert hazards[hazard].applies(layer, x) or bf16
    ours = grads(layer, x.to(memory_format=mf), bf16)
    layer.double().zero_grad()
    exact = grads(layer, x.double(), False)
    errors = [((a-b).norm()/b.norm().clamp_min(1e-30)).item() for a,b in zip(ours, exact)]
    worst = max([worst, *(1e9 if e!=e else e for e in errors)])
print('worst', worst)
'''

def run(name, guarded, rounds=3):
    layer,shape,bf16 = cases[name]
    code = child.replace('{args!r}', repr((name, layer, shape, bf16, guarded))).replace('{rounds}', str(rounds))
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    return r, (float(r.stdout.split()[-1]) if r.returncode==0 else None)

def test_each_row_has_a_case(): assert set(cases)==set(hazards)

@pytest.mark.parametrize('name', cases)
def test_guarded_is_right(name):
    r,worst = run(name, True)
    assert r.returncode==0, r.stderr[-2000:]
    assert worst<(0.02 if cases[name][2] else 1e-5), worst

@pytest.mark.parametrize('name', [pytest.param(n, marks=avx512_bf16 if c[2] else avx if '1x1' in n else ()) for n,c in cases.items()])
def test_the_hazard_is_still_there(name):
    r,worst = run(name, False)
    assert r.returncode!=0 or worst>0.05, f'{name!r} no longer goes wrong with torch {torch.__version__}: take it out of `hazards`'
    assert r.returncode<=0, 'the child must die of a signal or compute wrongly, not raise:\n'+r.stderr[-2000:]

def other_way(layer, x, *args):
    "Output and gradients of the layer as it is and guarded, in double precision, guard forced to act"
    res = []
    for forced in (False, True):
        m,xi = deepcopy(layer).double(),x.double().requires_grad_()
        names = [h.name for h in hazards.values() if h.suspect(m)]
        y = hazards[names[0]].instead(m, xi, *args) if forced else m(xi, *args)
        y.square().sum().backward()
        res.append([y.detach(), xi.grad, *(p.grad for p in m.parameters())])
    return res

@pytest.mark.parametrize('layer,shape,args', [
    (nn.Conv2d(3, 5, 1, stride=2), (2, 3, 8, 6), ()), (nn.Conv2d(3, 5, 1, stride=(2,3), bias=False), (2, 3, 8, 9), ()),
    (nn.Conv2d(1, 5, 1, stride=2), (2, 1, 8, 8), ()),
    (nn.Conv2d(3, 5, 1, stride=2, padding='valid'), (3, 8, 8), ()),
    (nn.ConvTranspose2d(4, 3, 1, stride=2, output_padding=1), (2, 4, 5, 6), ()),
    (nn.ConvTranspose2d(4, 3, 1, stride=3, bias=False), (2, 4, 5, 6), ([14, 17],)),
    (nn.InstanceNorm2d(4), (1, 4, 5, 6), ()), (nn.InstanceNorm2d(4, affine=True), (1, 4, 5, 6), ()),
    (nn.InstanceNorm3d(4, affine=True), (1, 4, 5, 6, 3), ()),
    (nn.InstanceNorm2d(4, track_running_stats=True), (1, 4, 5, 6), ()),
], ids=str)
def test_the_other_way_is_the_same_in_double(layer, shape, args):
    for a,b in zip(*other_way(layer, torch.randn(shape), *args)): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def test_running_statistics_are_updated_once():
    x,layer = torch.randn(1, 4, 5, 6),nn.InstanceNorm2d(4, track_running_stats=True)
    twin = guard(deepcopy(layer))
    layer(x); twin(x)
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    assert layer.num_batches_tracked==twin.num_batches_tracked

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_out_sizes_is_what_the_layer_gives(data):
    draw,nd = data.draw,data.draw(st.sampled_from((2,3)))
    ints = lambda lo,hi: tuple(draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd)))
    transposed,k,s,d,p = draw(st.booleans()),ints(1, 3),ints(1, 3),ints(1, 2),ints(0, 1)
    kw = dict(kernel_size=k, stride=s, dilation=d, padding=p)
    if transposed: kw['output_padding'] = tuple(draw(st.integers(0, max(a,b)-1)) for a,b in zip(s, d))
    layer = getattr(nn, f'Conv{"Transpose" if transposed else ""}{nd}d')(2, 2, **kw)
    x = torch.randn(1, 2, *ints(5, 8))
    try: y = layer(x)
    except RuntimeError: return # an output of no size
    assert out_sizes(layer, x)==tuple(y.shape[2:])

def test_a_guard_only_acts_on_its_hazard(monkeypatch):
    "Guarded layers that no hazard concerns now give bit for bit what they gave"
    layers = [(nn.Conv2d(3, 5, 1, stride=2), (2, 3, 7, 8)), (nn.InstanceNorm2d(4), (2, 4, 5, 5)),
        (nn.Conv2d(32, 32, 3, dilation=2, groups=32), (2, 32, 9, 40)), (nn.Conv3d(4, 4, 3, padding=1), (1, 4, 2, 5, 5))]
    for layer,shape in layers:
        x = torch.randn(shape)
        assert torch.equal(layer(x), guard(deepcopy(layer))(x)) and guarded(guard(deepcopy(layer)))

def test_guards_keep_a_forward_of_the_layers_own():
    layer = nn.Conv2d(3, 5, 1, stride=2)
    layer.forward = mine = lambda x: x*2
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(guard(layer)(x), x*2)
    assert unguard(layer).forward is mine

def test_conversion_guards_and_takes_away():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 3),
        nn.LazyConv2d(40, 3, dilation=2, groups=4))
    keys = list(model.state_dict())
    apply_channels_last(model)
    assert set(guarded(model))=={'0','1'}
    model(torch.randn(2, 3, 24, 24))
    assert set(guarded(model))=={'0','1','3'}, 'a lazy layer is guarded once it has its shape'
    assert (list(model.state_dict())==keys and apply_channels_last(model) is model
        and not isinstance(vars(model[0])['forward'].instance_forward, Guard))
    assert guarded(apply_contiguous(model))=={} and 'forward' not in vars(model[0])

@avx
@pytest.mark.parametrize('kernel,padding,depth', [(6, 3, 6), (5, 3, 6), (4, 3, 5), (6, 2, 4)])
def test_a_transposed_layer_with_a_shallow_output_is_guarded(kernel, padding, depth):
    spec = LayerSpec('ConvTranspose3d', 8, 8, (kernel, 1, 1), (1, 1, 1), (padding, 0, 0), (1, 1, 1), 1, (0, 0, 0), False, 'zeros',
        (2, 8, depth, 6, 6), True)
    with Probe() as p: assert p.run(spec, 'channels_last', 'bf16', rounds=3).ok

def test_compiled_with_guards():
    model = apply_channels_last(nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 3)))
    x = torch.randn(1, 3, 12, 12)
    want = model(x)
    torch.testing.assert_close(torch.compile(model, backend='aot_eager')(x), want)

fastvit = '''
import timm, torch, warnings
from fastai.vision.all import *
from fastxtend_cl.all import *
torch.set_num_threads(1)
ds = [(TensorImage(torch.randn(3, 256, 256)),TensorCategory(i%2)) for i in range(6)]
learn = Learner(DataLoaders.from_dsets(ds, ds[:2], bs=2, num_workers=0, device='cpu'),
    timm.create_model({name!r}, num_classes=2), loss_func=CrossEntropyLossFlat()).to_channelslast(use_amp=False)
with learn.no_bar(), learn.no_logging(): learn.fit(1)
print(learn.train_iter, np.isfinite(float(learn.recorder.losses[-1])))
'''

@avx
@pytest.mark.parametrize('name', ['fastvit_t8', 'fastvit_sa12'])
def test_fastvit_trains_three_steps(name):
    "A bare `model.to(memory_format=torch.channels_last)` kills these"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', fastvit.replace('{name!r}', repr(name))],
        capture_output=True, text=True, timeout=600)
    assert r.returncode==0, r.stderr[-2000:]
    assert r.stdout.split()[-2:]==['3', 'True']
