"The plan: what its layers compute, what it chooses, how it is proven, kept, and taken away again"
import copy, io, itertools, json, os, pickle, random, subprocess, sys, threading
from pathlib import Path
import numpy as np
import pytest, torch
from fastai.losses import CrossEntropyLossFlat
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from helpers import AveragedCopy, caught_warnings, dls_of, fit, images, labels, mixed, quiet, random_images, tiny_learner
import fastxtend_cl.all
from fastxtend_cl import plan as module
from fastxtend_cl.bench import Arm, BenchRow, FormatBench, least_pairs
from fastxtend_cl.format import FormatWarning, NoEffectWarning, apply_contiguous
from fastxtend_cl.hazards import Guard, guard, guarded
from fastxtend_cl.plan import (FormatPlan, LayerPlan, PlanRow, _Costs, _wrap, apply_plan, cache_file, choose, kind_of,
    layer_options, plan_formats, plan_key, planned,
    record_step, remove_plan, solve_pbqp, winner)
from fastxtend_cl.probe import LayerSpec, LayerTimes, conv_args, is_tiled, tiled_weight_grad
from fastxtend_cl.repair import repair_layer, repaired, unrepair_format
from fastxtend_cl.step import TrainingStep

low = torch.bfloat16
def bf16(on=True): return torch.autocast('cpu', dtype=low, enabled=on)

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))

def step_of(model=None, size=16, n=4, **kwargs):
    model = model or net()
    x,y = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)),torch.arange(n)%2
    return TrainingStep(model, x, y, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)

plans = {'0': LayerPlan('bf16', None, 'fp32', False, 'fp32'), '3': LayerPlan('bf16', 'fp32', 'bf16', True, 'bf16'),
    '6': LayerPlan('fp32', 'bf16', 'bf16', False, 'fp32', 'contiguous'), '4': LayerPlan(dense=True)}
def a_plan(**kwargs):
    return FormatPlan(**{**dict(arm='plan', memory_format='channels_last', autocast='bf16', layers=dict(plans)), **kwargs})

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('FASTXTEND_CL_CACHE', str(tmp_path/'cache'))

# What a planned layer computes

def gradients(m, x, g):
    x = x.clone().requires_grad_()
    y = m(x)
    return y, *torch.autograd.grad(y, (x, *m.parameters()), g.to(y.dtype))

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_planned_layer_computes_the_same(data):
    draw,nd = data.draw,data.draw(st.sampled_from((1, 2, 3)))
    ints = lambda lo,hi: tuple(draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd)))
    groups,transposed,name = draw(st.sampled_from((1, 2, 8))),draw(st.booleans()),st.sampled_from(('fp32', 'bf16'))
    kernel,stride = ints(1, 6),ints(1, 2)
    torch.manual_seed(0)
    m = getattr(nn, f'Conv{"Transpose"*transposed}{nd}d')(8, 8, kernel, stride=stride,
        padding=tuple(k//2 for k in kernel), groups=groups, bias=draw(st.booleans()))
    x = torch.randn(2, 8, *ints(6, 9))
    layer = LayerPlan(draw(name), draw(name), draw(name), is_tiled(m) and draw(st.booleans()), draw(name),
        draw(st.sampled_from((None, 'contiguous', 'channels_last'))) if nd>1 else None)
    g = torch.randn_like(m(x))
    exact = gradients(copy.deepcopy(m).double(), x.double(), g.double())
    _wrap(m, {'': layer}, low)
    with bf16():
        assume(vars(m)['forward'].applies((x,), {})) # no hazard stands before it
        ours = gradients(m, x, g)
    assert ours[0].dtype==(low if layer.output=='bf16' else torch.float32)
    lowest = {'output': {layer.forward, layer.output}, 'x': {layer.input, layer.output},
        'weight': {layer.weight, layer.output, layer.forward}, 'bias': {layer.weight, layer.output}}
    for (n,kinds),a,b in zip(lowest.items(), ours, exact):
        assert a.dtype==torch.float32 or n=='output'
        assert (a.double()-b).norm() <= (0.03 if 'bf16' in kinds else 1e-5)*b.norm()+1e-6, (n, m, layer, x.shape)

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(4, 8), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_tiles_give_the_weight_gradient(kh, kw, sh, sw, ph, pw, channels_last):
    m = nn.Conv2d(6, 6, (kh, kw), stride=(sh, sw), padding=(ph, pw), groups=3).double()
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    if channels_last: x = x.to(memory_format=torch.channels_last)
    y = m(x)
    g = torch.randn_like(y)
    assert is_tiled(m)
    torch.testing.assert_close(tiled_weight_grad(g, x, m.weight.detach(), conv_args(m)),
        torch.autograd.grad(y, m.weight, g)[0], rtol=1e-10, atol=1e-10)

def test_a_dense_gradient_and_that_of_a_mean():
    "Strides are those of the output and the input; values stay"
    seen = []
    class Squeeze(nn.Module):
        def forward(self, x): return x*x.mean((2, 3), keepdim=True).sigmoid()
    def run(layers):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Squeeze()).to(memory_format=torch.channels_last)
        _wrap(m, layers, None)
        handles = [m[1].register_forward_hook(lambda m,i,o: o.register_hook(lambda g: seen.append(g.stride())) and None)]
        x = images(dtype=torch.float32).to(memory_format=torch.channels_last)
        y = m(x)
        y.backward(torch.linspace(0, 1, y.numel()).view(y.shape)) # a contiguous gradient
        return [p.grad for p in m.parameters()]
    plain = run({})
    ours = run({'1': LayerPlan(dense=True), '2': LayerPlan(dense=True, pooled=True)})
    assert seen[1]==(8*36, 1, 6*8, 8)
    for a,b in zip(plain, ours): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_a_bias_beside_a_frozen_weight():
    m = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    m.weight.requires_grad_(False)
    x = torch.randn(2, 4, 6, 6)
    _wrap(m, {'': LayerPlan('bf16', 'bf16', 'bf16', True, 'fp32')}, low)
    with bf16(): (m(x)*x).sum().backward()
    assert m.weight.grad is None
    torch.testing.assert_close(m.bias.grad, x.sum((0, 2, 3)), rtol=1e-2, atol=1e-2)

def test_inplace_operations_after_a_dense_layer():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    _wrap(m, {'0': LayerPlan('bf16', 'bf16', 'bf16', False, 'bf16'), '1': LayerPlan(dense=True), '2': LayerPlan(dense=True)}, low)
    with bf16(): m(images(dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None for p in m.parameters())

def test_a_second_derivative_is_refused_clearly():
    m = nn.Conv2d(3, 4, 3)
    _wrap(m, {'': LayerPlan('fp32', 'fp32', 'bf16', False, 'fp32')}, low)
    x = images(dtype=torch.float32).requires_grad_()
    with bf16(): g, = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

# When a plan steps in

def test_it_computes_only_where_it_was_made_for(monkeypatch):
    m = nn.Conv2d(3, 4, 3)
    _wrap(m, {'': LayerPlan('fp32', 'fp32', 'fp32', False, 'bf16')}, low)
    p,x = vars(m)['forward'],images(dtype=torch.float32)
    with bf16():
        assert p.applies((x,), {}) and p.applies((x.bfloat16(),), {}) and m(x).dtype==low
        for other in (x[0], x.double(), x.half(), x[:0]): assert not p.applies((other,), {})
        assert not p.applies((x,), {'output_size': 3}) and not p.applies((), {}) and not p.applies(([x],), {})
    assert not p.applies((x,), {}) and m(x).dtype==torch.float32
    with torch.autocast('cpu', dtype=torch.float16): assert not p.applies((x,), {})
    with bf16(): assert torch.func.vmap(m)(x[None]).shape==(1, 2, 4, 6, 6)
    m.double()
    with bf16(): assert not p.applies((x,), {})
    assert m(x.double()).dtype==torch.float64

def test_a_plan_of_fp32_steps_in_without_autocast():
    m = nn.Conv2d(3, 4, 3)
    _wrap(m, {'': LayerPlan('fp32', 'fp32', 'fp32', False, 'fp32', 'channels_last')}, None)
    x = images(dtype=torch.float32)
    assert vars(m)['forward'].applies((x,), {})
    with bf16(): assert not vars(m)['forward'].applies((x,), {}) and m(x).dtype==low

def test_a_hazard_goes_first():
    m = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    _wrap(m, {'': LayerPlan('bf16', 'bf16', 'bf16', False, 'bf16')}, low)
    assert 'bf16 narrow' in vars(m)['forward'].names
    with bf16():
        assert (not vars(m)['forward'].applies((torch.randn(1, 8, 8, 1),), {})
            and vars(m)['forward'].applies((torch.randn(1, 8, 8, 8),), {}))
    assert m(torch.randn(1, 8, 8, 1)).shape==(1, 8, 4, 1)

def test_without_gradients_the_same_precisions():
    model = net()
    apply_plan(model, a_plan())
    x = images(dtype=torch.float32)
    model.eval()
    with bf16():
        y = model(x)
        with torch.no_grad(): assert torch.equal(model(x), y)
        with torch.inference_mode(): assert torch.equal(model(x), y)

# Applied and taken away

def test_round_trip():
    model = guard(nn.Sequential(*net(), nn.Conv2d(3, 8, 1, stride=2)))
    before,keys = {n:vars(m).get('forward') for n,m in model.named_modules()},list(model.state_dict())
    apply_plan(model, a_plan())
    assert planned(model)==plans and list(model.state_dict())==keys and set(guarded(model))=={'3', '10'}
    forward = vars(model[3])['forward']
    apply_plan(model, a_plan())
    assert vars(model[3])['forward'] is forward, 'applied twice'
    guard(model)
    assert vars(model[3])['forward'] is forward
    remove_plan(model)
    assert planned(model)=={} and {n:type(vars(m).get('forward')) for n,m in model.named_modules()}=={n:type(f) for n,f in before.items()}
    apply_plan(model, a_plan()); apply_contiguous(model)
    assert not any('forward' in vars(m) for m in model.modules())

def test_a_forward_of_the_users_own_is_kept():
    "On the layer itself, or below its guard; it has no plan, and a plan that names it lets it be"
    for guarded_too in (False, True):
        m = net()
        own = m[3].forward = lambda x: nn.Conv2d.forward(m[3], x)*2
        if guarded_too: guard(m)
        step = step_of(m)
        assert module._sort_out(record_step(step, None), m)[1]=={'3': 'Conv2d has a forward of its own'}
        x = torch.randn(2, 8, 9, 9)
        with bf16(): before = m[3](x)
        apply_plan(m, a_plan())
        with bf16(): assert torch.equal(m[3](x), before)
        remove_plan(m)
        f = vars(m[3])['forward']
        assert (f.instance_forward if isinstance(f, Guard) else f) is own

def test_copies_and_pickles():
    model = net()
    apply_plan(model, a_plan())
    x = images(dtype=torch.float32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert planned(other)==plans and all(vars(m)['forward'].module is m for m in other.modules() if 'forward' in vars(m))
        with bf16(): assert torch.equal(other.eval()(x), model.eval()(x))

def test_a_plan_of_another_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = model[0].weight.stride()
    with pytest.raises(ValueError,
            match='the plan is of another model: it has 4 layers, of which 3 and 2 more are not in this Sequential'):
        apply_plan(model, a_plan())
    assert planned(model)=={} and model[0].weight.stride()==before

def test_compiled():
    model = net()
    apply_plan(model, a_plan(layers={k:v for k,v in plans.items() if k!='4'}))
    x = images(dtype=torch.float32)
    with bf16():
        y = model(x)
        y.float().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.compile(backend='aot_eager')
        model(x).float().sum().backward()
    for a,p in zip(grads, model.parameters()): torch.testing.assert_close(p.grad, a, rtol=0.1, atol=0.1)

every_kind = [*plans.values(), LayerPlan('fp32', tiled=True), LayerPlan('bf16', tiled=True), LayerPlan('fp32', weight='bf16'),
    LayerPlan('bf16', memory_format='contiguous'), LayerPlan('fp32', output='bf16', memory_format='channels_last'),
    LayerPlan(dense=True, pooled=True)]

@pytest.mark.parametrize('layer', every_kind, ids=str)
def test_compiled_in_one_graph(layer):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.ReLU())
    apply_plan(model, a_plan(layers={'1': layer}))
    x,g = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last),torch.randn(2, 8, 16, 16)
    def run():
        model.zero_grad()
        with bf16(): y = model(x)
        y.backward(g.to(y.dtype))
        return [y.detach(), *[p.grad.clone() for p in model.parameters()]]
    want = run()
    model.compile(backend='aot_eager', fullgraph=True) # which raises where a graph would break
    for a,b in zip(want, run()): torch.testing.assert_close(b, a, rtol=0.02, atol=0.02*float(a.abs().max()))

# The record

def test_where_inputs_come_from():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.never = nn.Conv2d(3, 3, 1)
        def forward(self, x):
            a = self.a(x)
            b = self.b(a.relu())
            return self.d(torch.cat([self.c(b+a), b])[:2]).mean((2, 3))
    step = TrainingStep(Net(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), nn.functional.cross_entropy)
    rec = record_step(step, None)
    assert rec.edges()=={('a', 'b'), ('a', 'c'), ('b', 'c'), ('c', 'd'), ('b', 'd')}
    specs,left = module._sort_out(rec, step.model)
    assert list(specs)==['a', 'b', 'c', 'd'] and left=={'never': 'it is not called in training'}
    assert [s.input_grad for s in specs.values()]==[False, True, True, True]

def test_what_cannot_have_a_plan():
    class Own(nn.Conv2d):
        def forward(self, x): return super().forward(x)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own,self.twice,self.circular,self.fine = (Own(3, 3, 3, padding=1),nn.Conv2d(3, 3, 3, padding=1),
                nn.Conv2d(3, 3, 3, padding=1, padding_mode='circular'),nn.Conv2d(3, 3, 3))
        def forward(self, x): return self.twice(self.twice(self.fine(self.circular(self.own(x)))).repeat(1, 1, 2, 1)).mean((2, 3))
    step = TrainingStep(Net(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), nn.functional.cross_entropy)
    specs,left = module._sort_out(record_step(step, None), step.model)
    assert list(specs)==['fine']
    assert left=={'own': 'Own has a forward of its own', 'twice': 'it is called with 2 different inputs',
        'circular': "padding (1, 1) in mode 'circular'"}

def test_strange_gradients_are_noticed():
    class Squeeze(nn.Module):
        def forward(self, x): return x*x.mean((2, 3), keepdim=True)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.bn,self.c,self.se,self.last = nn.Conv2d(3, 8, 1),nn.BatchNorm2d(8),nn.Conv2d(3, 8, 1),Squeeze(),nn.Conv2d(16, 2, 1)
        def forward(self, x): return self.last(self.se(torch.cat([self.bn(self.a(x)), self.c(x)], 1))).mean((2, 3))
    step = TrainingStep(Net(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), nn.functional.cross_entropy)
    rec = record_step(step)
    assert rec.extras()=={'bn': LayerPlan(dense=True), 'se': LayerPlan(pooled=True)}
    assert record_step(step, 'contiguous').pooled==set()

def test_recording_leaves_no_trace():
    step = step_of(autocast=low)
    before,hooks = [p.clone() for p in step.model.parameters()],[len(m._forward_hooks) for m in step.model.modules()]
    record_step(step, 'channels_last', low)
    assert all(torch.equal(p, b) and p.stride()==b.stride() for p,b in zip(step.model.parameters(), before))
    assert hooks==[len(m._forward_hooks) for m in step.model.modules()] and step.model[0].weight.grad is None

# The choice

def brute_force(costs, edges):
    every = itertools.product(*[range(len(c)) for c in costs])
    return min(total(o, costs, edges) for o in every)

def total(o, costs, edges): return sum(c[i] for c,i in zip(costs, o)) + sum(m[o[i],o[j]] for (i,j),m in edges.items())

@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_pbqp_is_exact_on_chains_trees_and_rings(seed, n):
    rng = np.random.default_rng(seed)
    costs = [rng.random(rng.integers(1, 4)) for _ in range(n)]
    pairs = {(int(rng.integers(i)), i) for i in range(1, n)} # a tree
    if n>2 and rng.random()<0.5: pairs = {(i, i+1) for i in range(n-1)} | {(0, n-1)} # a ring
    edges = {(i,j): rng.random((len(costs[i]), len(costs[j]))) for i,j in pairs}
    assert total(solve_pbqp(costs, edges), costs, edges)==pytest.approx(brute_force(costs, edges))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_pbqp_is_near_on_any_graph(seed):
    "The heuristic is within a tenth where every node has many neighbours"
    rng = np.random.default_rng(seed)
    costs = [rng.random(3) for _ in range(6)]
    edges = {(i,j): 0.1*rng.random((3, 3)) for i in range(6) for j in range(i)}
    found,best = total(solve_pbqp(costs, edges), costs, edges),brute_force(costs, edges)
    assert best-1e-9<=found<=1.1*best+0.1

def times_of(spec, **changes):
    "Times in which bf16 halves everything, with `changes`: (precision, name) to seconds"
    names = ['forward', 'input', 'weight', 'weight tiled', 'chain']
    res = {(f,p,n): 1. if p=='fp32' else 0.5 for f in ('contiguous', 'channels_last') for p in ('fp32', 'bf16') for n in names}
    res |= {(f,p,f'{t} to {q}'): 0.1 for f in ('contiguous', 'channels_last') for p in ('fp32', 'bf16')
        for t in ('input', 'output') for q in ('fp32', 'bf16', 'contiguous', 'channels_last') if q not in (p, f)}
    for (p,n),t in changes.get('changes', {}).items(): res |= {(f,p,n): t for f in ('contiguous', 'channels_last')}
    return LayerTimes(spec, res)

spec = LayerSpec.of(nn.Conv2d(8, 8, 3), torch.randn(2, 8, 8, 8).requires_grad_())

def test_a_slow_kernel_gets_another_precision():
    costs = {'a': _Costs(times_of(spec, changes={('bf16', 'input'): 9.}), 'channels_last')}
    assert choose(costs, [], ('fp32', 'bf16'), outputs=('bf16',))[0]=={'a': LayerPlan('bf16', 'fp32', 'bf16', False, 'bf16')}
    assert choose(costs, [], ('fp32', 'bf16'), outputs=('bf16',), whole=True)[0]=={'a': LayerPlan('fp32', 'fp32', 'fp32', False, 'bf16')}

def test_a_lost_candidate_is_never_chosen():
    t = times_of(spec)
    for f in ('contiguous', 'channels_last'): del t.seconds[f,'bf16','forward']
    assert all(o.forward=='fp32' for o in layer_options(_Costs(t, 'channels_last'), ('fp32', 'bf16')))
    assert layer_options(_Costs(LayerTimes(spec), 'channels_last'), ('fp32', 'bf16'))==[]
    assert choose({'a': _Costs(LayerTimes(spec), 'channels_last')}, [], ('fp32', 'bf16'))==({}, 0.)

def test_a_layer_of_one_dimension():
    spec = LayerSpec.of(nn.Conv1d(8, 8, 3), torch.randn(2, 8, 32).requires_grad_())
    with module.Probe() as child: t = child.times(spec, precisions=('fp32', 'bf16'), seconds=0.1)
    assert {f for f,*_ in t.seconds}=={'contiguous'} and not t.lost
    layer = choose({'a': _Costs(t, 'channels_last')}, [], ('fp32', 'bf16'), formats=(None, 'contiguous'))[0]['a']
    assert layer.memory_format is None and layer.forward

def test_a_frozen_layer_has_no_weight_gradient():
    t = times_of(spec, changes={('fp32', 'weight'): 100., ('bf16', 'weight'): 100.})
    assert _Costs(t, 'channels_last', frozen=True).inside(LayerPlan('fp32', 'fp32', 'fp32', False, 'fp32'))<10

def test_another_format_pays_for_its_conversions():
    t = times_of(spec)
    for n in ('forward', 'input', 'weight'): t.seconds['contiguous','fp32',n] = t.seconds['contiguous','bf16',n] = 0.
    kw = dict(precisions=('fp32', 'bf16'), formats=(None, 'contiguous'))
    assert choose({'a': _Costs(t, 'channels_last')}, [], **kw)[0]['a'].memory_format=='contiguous'
    for k in list(t.seconds):
        if k[2].endswith(('to contiguous', 'to channels_last')): t.seconds[k] = 5.
    assert choose({'a': _Costs(t, 'channels_last')}, [], **kw)[0]['a'].memory_format is None

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_six_layers_are_chosen_as_by_brute_force(seed):
    rng = random.Random(seed)
    def noisy():
        t = times_of(spec)
        t.seconds = {k: v*rng.uniform(0.3, 3) for k,v in t.seconds.items()}
        return _Costs(t, 'channels_last')
    names = list('abcdef')
    costs,edges = {n:noisy() for n in names},{(a,b) for a,b in zip(names, names[1:])} | {('a', 'c'), ('d', 'f')}
    kw = dict(precisions=('fp32', 'bf16'))
    layers,seconds = choose(costs, edges, **kw)
    def cost(o):
        fed = {n: [a for a,b in edges if b==n] for n in names}
        return sum(costs[n].inside(o[n])
            + (sum(costs[n].entry(o[n], o[a].output) for a in fed[n])/len(fed[n]) if fed[n] else costs[n].entry(o[n], 'fp32'))
            for n in names)
    best = min(cost(dict(zip(names, o))) for o in itertools.product(*[layer_options(costs[n], **kw) for n in names]))
    assert seconds==pytest.approx(cost(layers)) and seconds==pytest.approx(best)

# The proof

def row(arm, seconds, n=12, verdict='tie'):
    blocks = {i: seconds*(1+0.01*(i%3)) for i in range(n)}
    return BenchRow(arm, verdict, ratio=1/seconds, seconds=seconds, blocks=blocks, pairs=n, low=0.9/seconds, high=1.1/seconds)

def proof(*rows, noise=(0.99, 1.01)): return FormatBench([row('now', 1.), row('now, again', 1.), *rows], noise)

def test_the_winner_is_proven():
    assert winner(proof(row('channels last bf16', 0.5), row('plan', 0.4)))=='plan'
    assert winner(proof(row('channels last bf16', 1.2), row('plan', 1.1)))=='now'
    assert winner(proof(row('channels last bf16', 0.5), row('plan', 0.5)))=='channels last bf16', 'a tie keeps the simpler'
    assert winner(proof(row('channels last bf16', 0.995)))=='now', 'within the noise'
    assert winner(proof(row('plan', 0.5, n=4)))=='now', 'too few rounds'
    assert winner(proof(row('plan', 0.95), noise=(0.9, 1.1)))=='now'

def test_a_lucky_plan_does_not_win():
    "Its median is better than the single setting's, but not beyond chance"
    rng = np.random.default_rng(0)
    a,b = row('channels last bf16', 0.5),row('plan', 0.495)
    a.blocks,b.blocks = ({i: s*float(rng.lognormal(0, 0.1)) for i in range(20)} for s in (0.5, 0.495))
    assert winner(proof(a, b))=='channels last bf16'

def test_whole_search_leaves_no_trace_and_says_what_it_found(capsys):
    step = step_of(autocast=low)
    before,state = [p.clone() for p in step.model.parameters()],torch.get_rng_state()
    p = plan_formats(step, budget=6, bar=False)
    assert capsys.readouterr()==('', '')
    assert (all(torch.equal(a, b) and a.stride()==b.stride() for a,b in zip(before, step.model.parameters()))
        and torch.equal(state, torch.get_rng_state()))
    assert planned(step.model)=={} and guarded(step.model)=={}
    assert p.arm=='now' or p.bench[p.arm].verdict=='faster'
    assert ([r.path for r in p.rows if r.kind!='other']==['0', '3', '6']
        and {r.kind for r in p.rows}>={'3x3', '5x5 depthwise, stride 2', '1x1'})
    assert p.conditions['precision']=='bf16' and p.conditions['shape']==[4, 3, 16, 16] and p.predicted and p.seconds>0
    text = str(p).splitlines()
    assert text[0]==(f'now: {p.reason}' if p.arm=='now' else p.reason) and 'Found in' in str(p)
    rest = f': {p.reason}' if p.arm=='now' else p.reason.removeprefix(p.arm)
    assert p._repr_markdown_().startswith(f'**{p.arm}**{rest}\n')
    again = FormatPlan.from_dict(json.loads(json.dumps(p.to_dict())))
    assert again==p and str(again)==str(p)
    import matplotlib
    matplotlib.use('Agg')
    assert len(p.plot().patches)==6

def test_precision_is_the_users_leave():
    p = plan_formats(step_of(), budget=4, bar=False, cache=False)
    assert p.autocast is None and all({o.forward, o.input, o.weight, o.output}<={'fp32', None} for o in p.layers.values())
    assert not any('bf16' in r.arm for r in p.bench.rows)

def test_a_kernel_that_fails_loses_its_candidate_only(monkeypatch):
    real = module.Probe.times
    def planted(self, spec, **kw):
        t = real(self, spec, **kw)
        if spec.kernel_size==(5, 5):
            t.seconds = {k:v for k,v in t.seconds.items() if k[1]!='bf16'}
            t.lost = {(f,'bf16'): 'died: the process died of SIGSEGV' for f in ('contiguous', 'channels_last')}
        return t
    monkeypatch.setattr(module.Probe, 'times', planted)
    seen = []
    real_candidates = module._candidates
    monkeypatch.setattr(module, '_candidates', lambda *a: seen.extend(real_candidates(*a)) or seen)
    p = plan_formats(step_of(), low, budget=4, bar=False, cache=False)
    assert not [r for r in p.bench.rows if r.arm.endswith('last bf16')
        or r.arm=='contiguous bf16'], 'the whole step in what killed the child'
    assert any(n.startswith('channels last bf16 was not run as a whole: Conv2d 8 to 8') for n in p.notes)
    assert seen and all(c.layers['3'].forward=='fp32' for c in seen)

def test_no_time_left(monkeypatch):
    step = step_of(autocast=low)
    monkeypatch.setattr(module, '_probe_layers', lambda *a: {})
    p = plan_formats(step, budget=3, bar=False, cache=False)
    assert set(p.left.values())=={'there was no time left to measure it'} and not p.layers
    assert '3 convolutions stay as they are: 0 (there was no time left to measure it) and others.' in str(p)

real = module.bench_formats
def test_little_time_for_the_proof(monkeypatch):
    "Of equally fast finalists only one of each kind is proven, and said so"
    monkeypatch.setattr(module, '_screen', lambda step, arms, *a: ({a.name: 0.01 for a in arms}, {a.name: 1e3 for a in arms}))
    monkeypatch.setattr(module, 'bench_formats', lambda step, arms, **kw: real(step, arms, **{**kw, 'limit': 60., 'rounds': least_pairs}))
    p = plan_formats(step_of(), low, budget=3, bar=False, cache=False)
    assert len(p.bench.rows)==4, [r.arm for r in p.bench.rows]
    assert 'In 3 s there was time to prove the best single setting and the best plan only.' in p.notes
    monkeypatch.setattr(module, '_screen', lambda step, arms, *a: ({a.name: 0.01 for a in arms}, {a.name: 0. for a in arms}))
    p = plan_formats(step_of(), low, budget=60, bar=False, cache=False)
    assert len(p.bench.rows)==6 and not any('there was time' in n for n in p.notes)

def test_the_verdict_agrees_with_its_table():
    "The ratio to the best single setting is that of the two ratios, even where wall seconds say otherwise"
    p = FormatPlan('plan', 'channels_last', layers={'0': LayerPlan('fp32')}, bench=proof(row('one', 0.7), row('plan', 0.6)))
    p.bench['plan'].seconds *= 2
    assert f'and {p.bench["plan"].ratio/p.bench["one"].ratio:.2f} times as fast as the best single setting, one' in p.reason

def test_bad_arguments():
    with pytest.raises(ValueError, match='there is nothing to plan: Linear has no convolution'):
        plan_formats(TrainingStep(nn.Linear(2, 2), torch.randn(2, 2), torch.tensor([0, 1]), nn.functional.cross_entropy))
    with pytest.raises(ValueError, match='budget is a number of seconds above 0, received 0'): plan_formats(step_of(), budget=0)
    with pytest.raises(ValueError, match="cache is True, False or 'refresh', received 'no'"): plan_formats(step_of(), cache='no')

@pytest.mark.parametrize('where', ['record_step', '_probe_layers', '_screen', 'bench_formats'])
def test_interrupted_anywhere(monkeypatch, where):
    step = step_of(autocast=low)
    before = [p.clone() for p in step.model.parameters()]
    real = getattr(module, where)
    def interrupted(*a, **kw):
        if where in ('_screen', 'bench_formats'): # in the midst of it
            with step.preserved():
                step.convert('channels_last'); _wrap(step.model, {'0': plans['0']}, low); step.run()
                raise KeyboardInterrupt
        raise KeyboardInterrupt
    monkeypatch.setattr(module, where, interrupted)
    with pytest.raises(KeyboardInterrupt): plan_formats(step, budget=3, bar=False)
    assert (all(torch.equal(a, b) and a.stride()==b.stride() for a,b in zip(before, step.model.parameters()))
        and planned(step.model)=={} and not cache_file().exists())

# Kept

def fake_search(monkeypatch, found):
    calls = []
    monkeypatch.setattr(module, '_probe_layers', lambda specs, *a: {s: LayerTimes(s) for s in specs.values()})
    monkeypatch.setattr(module, '_prove', lambda *a: calls.append(1) or found)
    return calls

def test_a_plan_is_found_once(monkeypatch):
    calls = fake_search(monkeypatch, a_plan())
    step = step_of(autocast=low)
    first = plan_formats(step)
    assert not first.cached and plan_formats(step).cached and plan_formats(step).layers==plans and len(calls)==1
    plan_formats(step, cache='refresh'); plan_formats(step, cache=False)
    assert len(calls)==3
    assert json.loads(cache_file().read_text())['version']==module._cache_version

def test_what_is_not_final_is_not_kept(monkeypatch):
    calls = fake_search(monkeypatch, a_plan(left={'0': 'there was no time left to measure it'}))
    plan_formats(step_of()); plan_formats(step_of())
    assert len(calls)==2
    calls = fake_search(monkeypatch, FormatPlan('now', bench=proof(noise=None)))
    assert (proof(noise=None).verdict=='cannot tell' and not plan_formats(step_of()).cached
        and not plan_formats(step_of()).cached and not cache_file().exists())

def test_what_changes_the_key(monkeypatch):
    fake_search(monkeypatch, a_plan())
    def key(step, *more): return plan_key(step, record_step(step), *more)
    base = key(step_of())
    assert key(step_of(net(seed=5)))==base, 'values do not matter'
    frozen = net(); frozen[0].requires_grad_(False)
    still = net(); still[1].eval()
    others = [step_of(size=12), step_of(n=2), step_of(autocast=low), step_of(frozen),
        step_of(nn.Sequential(*net()[:6], nn.Conv2d(8, 14, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 2))),
        step_of(still)]
    keys = [key(s) for s in others] + [key(step_of(), 'bf16')]
    torch.set_num_threads(n := torch.get_num_threads()+1)
    try: keys.append(key(step_of()))
    finally: torch.set_num_threads(n-1)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    try: keys.append(key(step_of()))
    finally: torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch, '__version__', '9.9'); keys.append(key(step_of()))
    assert len({base, *keys})==len(keys)+1

@pytest.mark.parametrize('text', ['{', '[]', '{"version": 99, "plans": {}}', '{"version": 2, "plans": 3}', ''])
def test_a_damaged_or_foreign_file(monkeypatch, text):
    fake_search(monkeypatch, a_plan())
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    with caught_warnings() as w: plan_formats(step_of())
    assert [o for o in w if issubclass(o.category, FormatWarning) and 'cannot be used and will be written anew' in str(o.message)]
    with caught_warnings() as w: assert plan_formats(step_of()).cached
    assert not w

def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    fake_search(monkeypatch, a_plan())
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FASTXTEND_CL_CACHE', str(tmp_path/'file'))
    with caught_warnings() as w: assert plan_formats(step_of()).layers==plans
    assert any('the plan is not kept' in str(o.message) for o in w)

def test_two_may_write_at_once():
    threads = [threading.Thread(target=lambda i=i: [module._write_cache(cache_file(), f'{i}', a_plan()) for _ in range(5)])
        for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    kept = module._read_cache(cache_file())
    assert kept and set(kept)<=set('0123') and all(FormatPlan.from_dict(o)==a_plan() for o in kept.values())
    assert [p.name for p in cache_file().parent.iterdir()]==['plans.json']

@pytest.mark.parametrize('platform,env,place',
    [('linux', {'HOME': '/h'}, '/h/.cache/fastxtend_cl/plans.json'),
        ('linux', {'XDG_CACHE_HOME': '/x'}, '/x/fastxtend_cl/plans.json'),
    ('darwin', {'HOME': '/h'}, '/h/Library/Caches/fastxtend_cl/plans.json'),
    ('win32', {'LOCALAPPDATA': '/l'}, '/l/fastxtend_cl/plans.json')])
def test_where_it_is_kept(monkeypatch, platform, env, place):
    for k in ('FASTXTEND_CL_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(k, raising=False)
    for k,v in env.items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(sys, 'platform', platform)
    assert cache_file()==Path(place)

# A Learner

def learner(**kwargs): return tiny_learner(dls=dls_of(random_images(8, (3, 16, 16)), labels(8), bs=4), model=net(), **kwargs)

def test_a_learner_trains_by_a_plan():
    learn = learner()
    assert learn.to_channelslast(plan=a_plan()) is learn
    assert learn.mixed_precision.amp_mode.value=='bf16' and learn.channels_last.plan.layers==plans
    fit(learn)
    assert planned(learn.model)==plans and learn.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    with quiet(learn): learn.validate(); learn.get_preds(dl=learn.dls.valid)
    learn.to_channelslast(amp_mode='bf16')
    assert learn.channels_last.plan is None and planned(learn.model)=={}
    learn.to_channelslast(plan=a_plan()); fit(learn)
    learn.to_contiguous()
    assert (planned(learn.model)=={} and not any('forward' in vars(m) for m in learn.model.modules())
        and learn.model[0].weight.is_contiguous())
    fit(learn)

def test_with_other_callbacks():
    "Accumulated gradients, an average of the weights, and a frozen body"
    from fastai.callback.training import GradientAccumulation
    learn = learner(cbs=[GradientAccumulation(8), AveragedCopy()]).to_channelslast(plan=a_plan())
    for p in learn.model[:3].parameters(): p.requires_grad_(False)
    before = [p.clone() for p in learn.model.parameters()]
    fit(learn)
    moved = [not torch.equal(p, b) for p,b in zip(learn.model.parameters(), before)]
    assert moved[:3]==[False]*3 and all(moved[3:]), moved
    copied = learn.averaged_copy.averaged.module
    assert planned(copied)==plans and all(vars(m)['forward'].module is m for m in copied.modules() if 'forward' in vars(m))

def test_a_contiguous_plan():
    learn = learner().to_channelslast(plan=a_plan(memory_format='contiguous'))
    fit(learn)
    assert planned(learn.model)==plans and learn.model[0].weight.is_contiguous()

def test_an_export_is_plain_fastai(tmp_path):
    learn = learner(path=tmp_path).to_channelslast(plan=a_plan())
    fit(learn)
    learn.export('a.pkl')
    assert planned(learn.model)==plans
    code = ("import sys, torch; sys.modules['fastxtend_cl'] = None; from fastai.learner import load_learner; "
        "l = load_learner('a.pkl'); print(l.model(torch.randn(1, 3, 16, 16)).shape)")
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert 'torch.Size([1, 2])' in r.stdout, r.stderr

def test_auto_asks_for_a_plan(monkeypatch):
    from fastxtend_cl import learner as lm
    asked = []
    monkeypatch.setattr(lm, 'plan_formats', lambda step, precision, now=None, **kw: asked.append((precision, now, kw)) or a_plan())
    learn = learner().to_channelslast(plan='auto', amp_mode='bf16')
    assert asked[-1][:2]==(low, None) and learn.channels_last.plan.layers==plans
    learn.plan_channelslast(budget=5)
    assert (asked[-1][0]==low and asked[-1][1].memory_format=='channels_last' and callable(asked[-1][1].setup)
        and asked[-1][2]=={'budget': 5})
    learner().to_channelslast(use_amp=False).plan_channelslast(use_amp=False)
    assert asked[-1][0] is None and asked[-1][1]==Arm('now', 'channels_last')

def test_nothing_faster_changes_nothing(monkeypatch):
    learn = learner()
    cbs = list(learn.cbs)
    with caught_warnings() as w: learn.to_channelslast(plan=FormatPlan('now', bench=proof(row('plan', 1.2))))
    assert (learn.cbs==cbs
        and [str(o.message) for o in w if o.category is NoEffectWarning]==['what you have now (now) stays: '
            'nothing was proven to be faster'])

def test_arguments_that_contradict():
    for kw,text in ((dict(use_amp=False), 'the plan computes in bf16, and the arguments ask for fp32'),
            (dict(amp_mode='fp16'), 'the plan computes in bf16, and the arguments ask for fp16')):
        with pytest.raises(ValueError, match=text): learner().to_channelslast(plan=a_plan(), **kw)
    with pytest.raises(ValueError, match="plan is 'auto', a FormatPlan or None, received 'best'"): learner().to_channelslast(plan='best')
    with pytest.raises(ValueError, match="compile=True is for plan='auto'"): learner().to_channelslast(compile=True)
    learn = learner()
    cbs = list(learn.cbs)
    with pytest.raises(ValueError, match='repair=True and a plan are two ways: a plan has remedies of its own'): learn.to_channelslast(repair=True, plan=a_plan())
    assert learn.cbs==cbs and planned(learn.model)=={}

def test_what_is_left_open_is_as_the_output():
    x = torch.randn(2, 3, 8, 8)
    def grads(layer):
        m = net()
        _wrap(m, {'0': layer, '3': layer}, low)
        with bf16(): m(x).square().mean().backward()
        return [p.grad for p in m.parameters()]
    torch.testing.assert_close(grads(LayerPlan('fp32')), grads(LayerPlan('fp32', 'fp32', 'fp32', output='fp32')), rtol=0, atol=0)

def test_a_plan_for_a_repaired_model():
    "One after the other: both hold, train as the plain model does, and are taken away together"
    from torchvision.ops import SqueezeExcitation
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), SqueezeExcitation(8, 4), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    plain,x = copy.deepcopy(model),torch.randn(4, 3, 16, 16)
    repair_layer(model[1], 'mean')
    _wrap(model, {'0': LayerPlan('fp32', 'fp32', 'fp32', output='fp32'), '2': LayerPlan('fp32', 'fp32', 'fp32', output='fp32')}, None)
    assert [*repaired(model)]==['1'] and [*planned(model)]==['0', '2']
    for m in (model, plain): m(x).square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], rtol=1e-5, atol=1e-7)
    unrepair_format(remove_plan(model))
    assert not any('forward' in vars(m) for m in model.modules())

def test_a_new_input_size_is_noticed_once():
    learn = learner().to_channelslast(plan=a_plan(conditions={'shape': [4, 3, 16, 16]}))
    with caught_warnings() as w, quiet(learn, silent=False): learn.fit(1)
    assert not [o for o in w if 'the plan was made for' in str(o.message)]
    learn.dls = dls_of(random_images(8, (3, 20, 20)), labels(8), bs=3) # the last batch is small
    with caught_warnings() as w, quiet(learn, silent=False): learn.fit(2)
    assert len([o for o in w if 'the plan was made for inputs of 3x16x16 and holds for these of 3x20x20, too' in str(o.message)])==1

def test_training_converges_the_same():
    "Training losses of a plan that computes in bf16 differ less than those of different seeds"
    from fastxtend_cl.cli import digits_dls
    from fastxtend_cl.channelslast import less_random
    def loss(plan, seed):
        with less_random(seed):
            model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
            learn = tiny_learner(dls=digits_dls(16, 64), model=model, loss_func=CrossEntropyLossFlat(), seed=seed)
            learn.to_channelslast(plan=plan) if plan else learn.to_channelslast(amp_mode=False)
            fit(learn, 3, 1e-2)
            return learn.recorder.values[-1][0] # of validation depend on what batch norms have seen last, and jump
    plain,ours = [loss(None, s) for s in range(4)],[loss(a_plan(), s) for s in range(4)]
    assert max(abs(a-b) for a,b in zip(ours, plain))<=max(plain)-min(plain), (plain, ours)
    assert max(ours)<1.8, 'it has learned nothing' # 2.3 is chance

# The command line

def test_command(capsys, monkeypatch):
    from fastxtend_cl import cli
    monkeypatch.setattr(module, 'plan_formats', lambda step, dtype,
        **kw: a_plan(bench=proof(row('plan', 0.5)), notes=[f'{dtype} {kw["budget"]} {kw["cache"]}']))
    assert cli.main(['plan', 'resnet18', '--bs', '2', '--size', '32', '--device', 'cpu', '--amp', 'bf16', '--budget', '7', '--refresh'])==0
    out = capsys.readouterr().out
    assert out.startswith('plan is 2.00 times as fast as what you have now (now)') and 'torch.bfloat16 7.0 refresh' in out
    assert cli.main(['plan', 'resnet18', '--bs', '2', '--size', '32', '--device', 'cpu', '--amp', 'none', '--json'])==0
    assert json.loads(capsys.readouterr().out)['notes']==['None 120.0 True']
    assert cli.main(['plan', 'resnet18', '--amp', 'int4'])==2
    assert '--amp int4 is no precision: it takes fp16, bf16 or none' in capsys.readouterr().err

# Two processes

def worker(folder):
    "Plan in a group of two; only the first rank may probe"
    import torch.distributed as dist
    dist.init_process_group('gloo')
    rank,real = dist.get_rank(),module._probe_layers
    def probe(*a):
        assert rank==0, 'the second rank probes'
        return real(*a)
    module._probe_layers,module._is_final = probe,lambda p: True # also where the machine is too busy for a verdict
    model = net()
    apply_plan(model, a_plan())
    wrapped = nn.parallel.DistributedDataParallel(model)
    with bf16(): wrapped(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(rank))).float().square().sum().backward()
    grads = [float(q.grad.double().norm()) for q in model.parameters()]
    p = plan_formats(step_of(), low, budget=5, bar=False)
    again = plan_formats(step_of(), low, budget=5, bar=False)
    assert {*p.left.values()}<={module._no_time} # on a busy machine
    (Path(folder)/f'{rank}.json').write_text(json.dumps(dict(plan=p.to_dict(), again=again.to_dict(),
        kept=cache_file().exists(), grads=grads)))
    dist.destroy_process_group()

def test_two_processes_get_the_same_plan(tmp_path):
    from test_distributed import free_port
    tests = Path(__file__).resolve().parent
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': '2',
        'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(tests.parent), str(tests)])}
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', __file__, str(tmp_path)],
        env={**env, 'RANK': str(i), 'FASTXTEND_CL_CACHE': str(tmp_path/f'cache{i}')}, stderr=subprocess.PIPE, text=True)
        for i in range(2)]
    try: errs = [p.communicate(timeout=200)[1] for p in ps]
    finally:
        for p in ps: p.kill()
    assert [p.returncode for p in ps]==[0, 0], errs
    a,b = (json.loads((tmp_path/f'{i}.json').read_text()) for i in range(2))
    assert a['plan']['arm']==b['plan']['arm'] and a['plan']['layers']==b['plan']['layers'] and a['plan']['bench']==b['plan']['bench']
    assert a['grads']==b['grads'] and all(a['grads'])
    assert (a['kept'],b['kept'])==(True, False) and a['again']['cached'] and b['again']['cached'], 'the first rank keeps it for all'

def test_a_failure_on_the_first_rank_is_one_on_all(monkeypatch):
    monkeypatch.setattr(module, '_world', lambda: 2)
    sent = [None, 'ZeroDivisionError: division by zero']
    monkeypatch.setattr(module.dist, 'get_rank', lambda: 1)
    monkeypatch.setattr(module.dist, 'broadcast_object_list', lambda l: l.__setitem__(slice(None), sent))
    with pytest.raises(RuntimeError, match='planning failed on the first rank: ZeroDivisionError'): module._share(lambda: 1)

if __name__=='__main__': worker(*sys.argv[1:])
