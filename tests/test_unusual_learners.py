"Learners whose callbacks make the batch or exchange the model, unusual data, networks outside of the model, lazy and scripted models"
import time
from copy import deepcopy
from functools import partial
import helpers, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.gan import GANLearner, InvisibleTensor, basic_critic, basic_generator
from fastxtend_cl import bench as bench_module
from fastxtend_cl.all import *
from fastxtend_cl.preserve import Preserved, reachable
from fastxtend_cl.step import TrainingStep
from helpers import SeeBatch, caught_warnings, device, fit, of_class, snapshot, assert_same_snapshot, tensor_dls, tiny_cnn, tiny_learner

questions = dict(step=TrainingStep.from_learner, check=lambda l: l.check_channelslast(bar=False), trace=lambda l: l.trace_channelslast(),
    bench=lambda l: l.bench_channelslast(seconds=1, bar=False), plan=lambda l: l.plan_channelslast(seconds=1, cache=False, bar=False))

def gan_learner(seed=0):
    torch.manual_seed(seed)
    ds = [(InvisibleTensor(torch.randn(100)), TensorImage(torch.randn(3, 32, 32))) for _ in range(8)]
    dl = DataLoader(ds, bs=4, num_workers=0)
    return GANLearner.wgan(DataLoaders(dl, dl, device=device), basic_generator(32, 3, n_features=8), basic_critic(32, 3, n_features=8))

class Byol(Callback):
    "Two views of each batch, and a teacher made when training begins, as in self-supervised learning"
    def before_fit(self):
        self.teacher = deepcopy(self.model).requires_grad_(False)
        self.learn.loss_func = self.lf
    def views(self): return self.x + 0.1*torch.randn_like(self.x)
    def before_batch(self):
        a,b = self.views(),self.views()
        self.learn.xb,self.learn.yb = (torch.cat([a, b]),),(torch.cat([self.teacher(b), self.teacher(a)]),)
    def lf(self, pred, y): return F.mse_loss(pred, y)

class Cycle(Callback):
    "The loss is told of the inputs, as in CycleGAN"
    def before_train(self): self.real = None
    def take(self): self.learn.xb,self.learn.yb = (self.xb[0]*2,),self.xb
    def before_batch(self): self.take()

class Exchanged(Callback):
    def before_fit(self): self.learn.model = nn.Sequential(self.model, nn.Identity())

class Switches(Callback):
    "Needs no preparation"
    def before_batch(self): self.model.late = not getattr(self.model, 'late', False)

class Freezes(Callback):
    def before_batch(self): self.model[0].requires_grad_(False)

@pytest.mark.parametrize('question', questions)
@pytest.mark.parametrize('fitted', [False, True])
def test_gan(question, fitted):
    learn = gan_learner()
    if fitted: fit(learn)
    before,cbs = snapshot(learn.model),list(learn.cbs)
    with pytest.raises(ValueError, match=r'^GANTrainer: .*TrainingStep\(learn.model.generator, .* and `TrainingStep\(learn.model.critic, ') as e:
        questions[question](learn)
    assert 'learn.removed_cbs([learn.gan_trainer])' in str(e.value)
    assert_same_snapshot(snapshot(learn.model), before)
    assert list(learn.cbs)==cbs

@pytest.mark.parametrize('cb', [Byol, Cycle, Exchanged, Switches, Freezes])
def test_callbacks_that_make_the_step_are_named(cb):
    learn = tiny_learner(cbs=cb(), model=tiny_cnn(4))
    before = snapshot(learn.model)
    for ask in questions.values():
        with pytest.raises(ValueError, match=f'^{cb.__name__}: .*TrainingStep'): ask(learn)
    assert_same_snapshot(snapshot(learn.model), before)
    assert all(p.requires_grad for p in learn.model.parameters()) and not hasattr(learn.model, 'late')
    with learn.removed_cbs(learn.cbs.filter(lambda o: isinstance(o, cb))): assert questions['step'](learn).model is learn.model

@pytest.mark.parametrize('cb', [Byol, Switches])
def test_they_are_named_after_a_fit_too(cb):
    learn = tiny_learner(cbs=cb(), model=tiny_cnn(4))
    fit(learn)
    for ask in questions.values():
        with pytest.raises(ValueError, match=f'^{cb.__name__}: .*TrainingStep'): ask(learn)

def test_the_parts_of_a_gan_can_be_asked():
    learn = gan_learner()
    z,x,critic = torch.randn(4, 100),torch.randn(4, 3, 32, 32),learn.model.critic
    gen = TrainingStep(learn.model.generator, z, (), lambda out: critic(out).mean())
    crit = TrainingStep(critic, x, (), lambda out: out.mean())
    for s in (gen, crit): assert check_formats(s, bar=False).ok is not False and trace_formats(s).reason

@pytest.mark.parametrize('cb', [SeeBatch, MixUp])
def test_callbacks_that_leave_the_model_whole_are_no_obstacle(cb):
    learn = tiny_learner(cbs=cb())
    assert TrainingStep.from_learner(learn).model is learn.model
    fit(learn)
    assert TrainingStep.from_learner(learn).model is learn.model

class Clips(Callback):
    "Writes to the weights before a batch"
    def before_batch(self):
        for p in self.model.parameters(): p.data.clamp_(-0.01, 0.01)

def test_weights_that_a_callback_writes_to_are_put_back():
    learn = tiny_learner(cbs=Clips())
    before = snapshot(learn.model)
    TrainingStep.from_learner(learn)
    assert_same_snapshot(snapshot(learn.model), before)

# data

class Unread(list):
    "A list whose elements nobody may look at"
    def __iter__(self): raise AssertionError('iterated')

def nested(n): return [dict(id=i, boxes=[dict(x=i, y=[i, i+1])]) for i in range(n)]

class Items:
    def __init__(self, items): self.items,self.seen = items,0
    def __len__(self): return 16
    def __getitem__(self, i):
        self.seen += 1
        return TensorImage(torch.full((3, 8, 8), float(i))),TensorCategory(i%2)

class Holds(Callback):
    def __init__(self, items): self.items = items

@pytest.mark.parametrize('where', ['data', 'callback', 'loss'])
def test_data_are_not_walked(where):
    items = Unread(nested(90_000))
    data = Items(items if where=='data' else [])
    dl = lambda: DataLoader(data, bs=8, num_workers=0)
    class Loss(nn.Module):
        def __init__(self): super().__init__(); self.items = items
        def forward(self, p, y): return F.cross_entropy(p, y)
    learn = Learner(DataLoaders(dl(), dl(), device=device), tiny_cnn(), loss_func=Loss() if where=='loss' else F.cross_entropy,
        cbs=Holds(items) if where=='callback' else None)
    met = sum(1 for _ in reachable([learn, *learn.cbs, learn.dls.train, learn.loss_func]))
    assert met<20_000
    start = time.process_time()
    step = TrainingStep.from_learner(learn)
    with step.preserved(): pass
    assert time.process_time()-start<1
    assert learn.check_channelslast(bar=False).ok and data.seen==0

def test_what_is_no_data_is_still_put_back():
    kept,params = {i: [i] for i in range(900)},[nn.Parameter(torch.zeros(1)) for _ in range(1500)]
    state,long = {p: {'n': [0]} for p in params},list(range(5000))
    with Preserved(kept, params, state, long):
        kept[3].append(1); kept[2000] = 1; params[1400].data += 1; state[params[1400]]['n'][0] = 1; long.append(1); long[0] = 7
    assert kept[3]==[3] and 2000 not in kept and params[1400].item()==0 and state[params[1400]]['n']==[0] and long==list(range(5000))

# empty and lazy

def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

step_of = partial(helpers.step_of, size=16, classes=2)

@pytest.mark.parametrize('ask', [check_formats, trace_formats, lambda s: bench_formats(s, seconds=1, bar=False), TrainingStep.run])
def test_empty_batches(ask):
    with pytest.raises(ValueError, match=r'the batch is empty \(inputs of shape \(0, 3, 16, 16\)\): a step needs at least one item'):
        ask(step_of(net(), bs=0))

def lazy(): return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))

@pytest.mark.parametrize('question', questions)
def test_lazy_models_are_asked_and_stay_lazy(question):
    learn = tiny_learner(model=lazy())
    res = questions[question](learn)
    if question!='auto': assert isinstance(learn.model[0], nn.LazyConv2d) and torch.nn.parameter.is_lazy(learn.model[0].weight)
    if question=='check': assert res.ok is True and {'0.weight', '3.weight'} <= {r.name for r in res.rows}
    fit(learn)
    assert not torch.nn.parameter.is_lazy(learn.model[0].weight)

@pytest.mark.parametrize('inference', [False, True])
def test_a_lazy_step_is_measured_as_any_other(inference, monkeypatch):
    "Arms are chosen with its weights there; afterwards it is lazy again"
    monkeypatch.setattr(bench_module, 'peak_flops', lambda *a, **kw: 1e12)
    step = step_of(lazy())
    res = bench_formats(step, seconds=1, rounds=8, block=2, bar=False, inference=inference)
    assert {'channels last fp32', 'channels last fp32, tuned'} < {r.arm for r in res.rows} and not [r for r in res.rows if r.verdict=='failed'], res
    assert res.conditions['baseline']=='contiguous fp32' and torch.nn.parameter.is_lazy(step.model[0].weight) and type(step.model[3]) is nn.LazyConv2d

def test_a_lazy_step_is_planned_as_any_other(monkeypatch, tmp_path):
    monkeypatch.setenv('FASTXTEND_CL_CACHE', str(tmp_path))
    monkeypatch.setattr(bench_module, 'peak_flops', lambda *a, **kw: 1e12)
    step = step_of(lazy())
    p = plan_formats(step, seconds=2, bar=False)
    assert 'channels last fp32' in {r.arm for r in p.rows} and torch.nn.parameter.is_lazy(step.model[0].weight)

@pytest.mark.parametrize('ask', [check_formats, trace_formats, lambda s: bench_formats(s, seconds=1, bar=False), lambda s: plan_formats(s, seconds=1, bar=False)],
    ids=['check', 'trace', 'bench', 'plan'])
def test_an_empty_batch_initializes_nothing(ask):
    step = step_of(lazy(), bs=0)
    with pytest.raises(ValueError, match='the batch is empty'): ask(step)
    assert torch.nn.parameter.is_lazy(step.model[0].weight)

# networks outside

class Perceptual(nn.Module):
    def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    def forward(self, p, t): return (self.net(p)-self.net(t)).square().flatten(1).sum(1).mean()

class Teacher:
    def __init__(self): self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    def __call__(self, p, t): return (self.net(p)-self.net(t)).square().flatten(1).sum(1).mean()

@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
@pytest.mark.parametrize('loss,name', [(Perceptual, 'loss_func.net'), (Teacher, 'network')])
def test_a_network_outside_of_the_model_is_said_to_be_not_converted(loss, name, autocast):
    model,x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)),torch.randn(4, 3, 24, 24)
    step = TrainingStep(model, x, x.clone(), loss(), autocast=autocast)
    res = trace_formats(step)
    found = [r for r in res.rows if r.kind=='weight']
    assert found and all(f'is not converted with it: `apply_channels_last({name})`' in r.advice for r in found) and 'not converted' in str(res)
    assert not any('a tensor is made contiguous' in r.advice for r in res.rows)
    apply_channels_last(step.loss_func.net)
    assert not [r for r in trace_formats(step).rows if r.kind=='weight']

class Holder(Callback):
    def __init__(self, held): self.held = held

def with_loss(loss): return tiny_learner(loss_func=loss)

class Bound:
    def __init__(self, net): self.net = net
    def loss(self, p, y): return F.cross_entropy(p, y)

beside = {
    'a loss': lambda net: with_loss(nn.ModuleDict(dict(net=net, loss=nn.CrossEntropyLoss()))),
    'a closure': lambda net: with_loss(lambda p, y: F.cross_entropy(p, y) + 0*sum(q.sum() for q in net.parameters())),
    'a partial': lambda net: with_loss(partial(lambda p, y, net: F.cross_entropy(p, y), net=net)),
    'a method': lambda net: with_loss(Bound(net).loss),
    "fastai's loss": lambda net: with_loss(setattr(loss := CrossEntropyLossFlat(), 'net', net) or loss),
    'a callback': lambda net: tiny_learner(cbs=Holder(net)),
    'a list': lambda net: tiny_learner(cbs=Holder(dict(teachers=[net]))),
    'another Learner': lambda net: tiny_learner(cbs=Holder(tiny_learner(model=net))),
    'an average': lambda net: tiny_learner(cbs=Holder(torch.optim.swa_utils.AveragedModel(net)))}

@pytest.mark.parametrize('where', beside)
def test_networks_beside_the_model_are_named_once(where):
    net = tiny_cnn().to(device)
    learn = beside[where](net)
    who = 'the loss' if where in ('a loss', 'a closure', 'a partial', 'a method', "fastai's loss") else 'Holder'
    text = rf'^{who} holds a network with convolutions \(.+\) that is not converted with the model: `apply_channels_last\(network\)` does that$'
    with pytest.warns(FormatWarning, match=text): learn.to_channelslast(use_amp=False)
    with caught_warnings() as said: learn.to_channelslast(use_amp=False)
    assert not of_class(said, FormatWarning)
    if 'loss' not in where: # is no loss that could be computed
        with caught_warnings() as said: fit(learn)
        assert not of_class(said, FormatWarning)
    assert {format_of(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d)}=={'contiguous'}

def test_networks_of_a_callback_of_one_fit_are_named():
    learn = tiny_learner().to_channelslast(use_amp=False)
    with pytest.warns(FormatWarning, match='^Holder holds a network'): learn.fit(1, cbs=Holder(tiny_cnn()))

@pytest.mark.parametrize('held', [lambda m: m, lambda m: m[0], nn.DataParallel, lambda m: apply_channels_last(tiny_cnn()), lambda m: nn.Linear(2, 2),
    lambda m: torch.compile(m, backend='eager')], ids=['model', 'layer', 'wrapped', 'converted', 'linear', 'compiled'])
def test_what_a_callback_holds_of_the_model_or_converted_is_not_named(held):
    model = tiny_cnn()
    learn = tiny_learner(model=model, cbs=Holder(held(model)))
    with caught_warnings() as said: fit(learn.to_channelslast(use_amp=False))
    assert not of_class(said, FormatWarning)

def test_the_network_of_another_learner_in_the_loss_is_brought_to_double_precision():
    teacher,x = tiny_learner(model=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))),torch.randn(4, 3, 16, 16)
    step = TrainingStep(nn.Conv2d(3, 3, 1), x, x.clone(), lambda p, y: F.mse_loss(teacher.model(p), teacher.model(y)))
    before = snapshot(teacher.model)
    assert check_formats(step).ok is True
    assert_same_snapshot(snapshot(teacher.model), before)

def test_a_weight_that_is_computed_contiguous_is_no_unconverted_network():
    class Dynamic(nn.Module):
        def __init__(self): super().__init__(); self.a,self.w = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8, 8*8*9)
        def forward(self, x):
            x = self.a(x)
            return F.conv2d(x, self.w(x.mean((0, 2, 3))).view(8, 8, 3, 3), padding=1).flatten(2).mean(2)
    assert not [r for r in trace_formats(step_of(Dynamic(), loss=lambda p, t: p.square().mean())).rows if r.kind=='weight']

# towers and scripts

class Towers(nn.Module):
    "Each has its own convolutions and pool"
    def __init__(self):
        super().__init__()
        self.a,self.b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)) for _ in range(2))
        self.head = nn.Linear(16, 4)
    def forward(self, x): return self.head(torch.cat([t(x).mean((2, 3)) for t in (self.a, self.b)], 1))

class Gated(Towers):
    "The first tower's pool feeds the second's convolutions"
    def forward(self, x):
        a = self.a(x)
        return self.head(torch.cat([a.mean((2, 3)), self.b(x*a.mean((1, 2, 3), keepdim=True)).mean((2, 3))], 1))

def test_the_pool_of_the_first_tower_is_no_leak():
    res = trace_formats(step_of(Towers()))
    assert res.ok and len(res.by_design)>=2
    assert [r.op for r in trace_formats(step_of(Gated())).by_design]

@pytest.mark.parametrize('script', [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(8, 3, 16, 16)), lambda m: nn.Sequential(torch.jit.script(m))])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_convolutions_in_scripts_are_seen(script):
    step = step_of(script(net()))
    before = snapshot(step.model)
    assert check_formats(step).ok is True
    assert {r.advice for r in trace_formats(step).rows if r.kind=='weight'}=={
        'a scripted convolution is not converted: `apply_channels_last` the model first, then script it'}
    assert_same_snapshot(snapshot(step.model), before)

@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_scripts_without_a_convolution_say_what_cannot_be_seen():
    step = TrainingStep(torch.jit.script(nn.Linear(2, 2)), torch.randn(2, 2), torch.randn(2, 2), F.mse_loss)
    for f,what in ((check_formats, 'check'), (trace_formats, 'trace')):
        with pytest.raises(ValueError, match=f'nothing to {what}: .* \\(scripted modules cannot be seen into\\)'): f(step)

# plans

@pytest.mark.parametrize('memory_format', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('tune', [True, False])
@pytest.mark.parametrize('fitted', [False, True])
def test_check_and_bench_ask_the_setting_of_a_plan(memory_format, tune, fitted, monkeypatch):
    learn = tiny_learner(dls=tensor_dls(32, 8))
    learn.to_channelslast(plan=FormatPlan('a plan', memory_format, conditions={'shape': [8, 3, 8, 8]}), tune=tune)
    if fitted: fit(learn)
    seen,real = set(),TrainingStep.run
    def run(self, memory_format=None, dtype='as is', **kw):
        seen.add((memory_format, self.kernels))
        return real(self, memory_format, dtype, **kw)
    monkeypatch.setattr(TrainingStep, 'run', run)
    res = learn.check_channelslast(bar=False)
    assert res.ok is True and res.conditions['memory_format']==memory_format
    assert (memory_format,'tuned' if tune else 'correct') in seen
    assert ('channels_last' in {f for f,_ in seen})==(memory_format=='channels_last')
    assert learn.bench_channelslast(seconds=2, bar=False).baseline.seconds>0

def test_a_gan_may_race():
    "Its steps are of two kinds; each is trained"
    learn = gan_learner().to_channelslast(plan='auto', amp_mode='bf16')
    fit(learn, 2)
    assert learn.channels_last.plan.steps and all(torch.isfinite(p).all() for p in learn.model.parameters())
