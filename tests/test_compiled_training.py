"""Models that are compiled in place train as uncompiled ones do: through freezing and unfreezing, in both memory formats, and
where they are compiled only at times"""
import inspect
import pytest, torch
import torch._dynamo as dynamo
from fastai.callback.core import Callback
from fastai.learner import params
from fastai.optimizer import SGD
from fastcore.foundation import L
from torch import nn
from fastxtend_cl.all import *
from fastxtend_cl.arms import compile_alone
from fastxtend_cl.convert import convert_format
from fastxtend_cl.layout import as_contiguous
from helpers import Double, fit, furthest, tiny_cnn, tiny_learner

@pytest.fixture(autouse=True)
def no_graphs():
    "Graphs of earlier tests would be taken again, and all models of a process share the limit on their number"
    torch.compiler.reset(); dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()

def graphs(): return dynamo.utils.counters['stats']['unique_graphs']

def learner(compile, double=True):
    torch.manual_seed(0)
    m = tiny_cnn()
    m = nn.Sequential(m[:5], m[5:])
    learn = tiny_learner(model=m.double() if double else m, splitter=lambda m: L(m[0], m[1]).map(params), opt_func=SGD, cbs=Double() if double else None)
    if compile: learn.model.compile(backend='aot_eager')
    return learn

def both(train, setup=lambda l: l, double=True):
    "A compiled and an uncompiled Learner that have trained alike"
    res = [setup(learner(c, double)) for c in (True,False)]
    for l in res: train(l)
    return res

def freeze_and_unfreeze(learn):
    learn.freeze()
    body = [p.clone() for p in learn.model[0][0].parameters()]
    fit(learn, lr=0.1)
    assert all(map(torch.equal, body, learn.model[0][0].parameters())), 'frozen'
    learn.unfreeze()
    fit(learn, lr=0.1)
    assert not any(map(torch.equal, body, learn.model[0][0].parameters())), 'not frozen'

setups = {'plain': lambda l: l, 'channels last': lambda l: l.to_channelslast(use_amp=False),
    'channels last, not tuned': lambda l: l.to_channelslast(use_amp=False, tune=False)}

@pytest.mark.parametrize('name', setups)
def test_freeze_and_unfreeze(name):
    a,b = both(freeze_and_unfreeze, setups[name])
    assert furthest(a.model, b.model)<1e-12 and graphs()>=3
    assert format_of(a.model[0][0].weight)==('contiguous' if name=='plain' else 'channels_last')

def test_freeze_and_unfreeze_in_the_default_precision():
    a,b = both(freeze_and_unfreeze, lambda l: l.to_channelslast(), double=False)
    assert furthest(a.model, b.model)<0.01

def test_nothing_is_compiled_twice():
    learn = learner(True).to_channelslast(use_amp=False)
    freeze_and_unfreeze(learn)
    n = graphs()
    for _ in range(3): freeze_and_unfreeze(learn)
    assert graphs()==n<=4 # in training and validation, before and after

def to_and_fro(learn):
    for to in (lambda: learn.to_channelslast(use_amp=False), learn.to_contiguous)*2:
        to()
        freeze_and_unfreeze(learn)

def test_formats_change_between_fits():
    a,b = both(to_and_fro)
    assert furthest(a.model, b.model)<1e-12 and graphs()<=8

class Switch(Callback):
    "Another memory format in every second step, compiled in two of four"
    order = -2
    def before_fit(self): self.compiled,self.n = self.model._compiled_call_impl,0
    def before_batch(self):
        if not self.training: return
        fmt,to = (('contiguous',as_contiguous),('channels_last',as_channels_last))[self.n%2]
        convert_format(self.model, fmt, self.learn.opt)
        self.learn.xb = tuple(map(to, self.xb))
        self.model._compiled_call_impl = self.compiled if self.n%4<2 else None
        self.n += 1
    def after_fit(self): self.model._compiled_call_impl = self.compiled

def test_format_and_compilation_change_between_steps():
    a,b = both(freeze_and_unfreeze, lambda l: l.add_cb(Switch()))
    assert furthest(a.model, b.model)<1e-12 and 4<=graphs()<=8

def test_beyond_the_limit_training_goes_on_uncompiled():
    with dynamo.config.patch(recompile_limit=1): a,b = both(to_and_fro)
    assert graphs()==1 and furthest(a.model, b.model)<1e-12

def test_a_compiled_module_cannot_be_frozen():
    "That is why `learn.model.compile()` and not `learn.model = torch.compile(learn.model)`"
    learn = learner(False)
    learn.model = torch.compile(learn.model, backend='aot_eager')
    with pytest.raises(TypeError, match='not subscriptable'): learn.freeze()

@pytest.mark.skipif('isolate_recompiles' not in inspect.signature(torch.compile).parameters, reason='torch 2.14 has it')
@pytest.mark.parametrize('alone', [True, False])
def test_each_model_has_its_own_limit_of_variants(alone, monkeypatch):
    "Otherwise the ninth model of a process runs uncompiled, and a benchmark of it says that compiling does not pay"
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, isolate_recompiles=False: real(f, backend='eager', isolate_recompiles=isolate_recompiles))
    for n in range(1, 11):
        model = nn.Sequential(nn.Conv2d(3, n, 3), nn.ReLU())
        compile_alone(model) if alone else model.compile()
        model(torch.randn(1, 3, 8, 8))
    assert graphs()==(10 if alone else 8)
