"""Where kernels are tuned: a Learner's batches and a `TrainingStep`, and nowhere else; nothing is left on a model.
`tests/test_kernels.py` tests what the kernels compute"""
import copy, inspect, pickle
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.schedule import *
from fastai.learner import Learner
from torch import nn
from torchvision.models import resnet18
from helpers import AveragedCopy, Double, caught_warnings, device, dls_of, fit, images, labels, quiet, random_images, tiny_cnn, tiny_learner
from fastxtend_cl.all import *
from fastxtend_cl import callbacks
from fastxtend_cl.amp import kernels_mode
from fastxtend_cl.precision import cpu_bf16
from fastxtend_cl.convert import FormatWarning
from fastxtend_cl.kernels import open_contexts, runs_repeat
from fastxtend_cl.operators import switch
from warm import run_python

cpu = pytest.mark.skipif(str(dls_of(random_images(2), labels(2)).device)!='cpu', reason='kernels of a CPU')

class SeeKernels(Callback):
    "The mode that the model computes in, and whether anything may be timed"
    def __init__(self): self.seen = []
    def after_pred(self): self.seen.append((switch.mode, runs_repeat()))
    def step(self): self.seen.append((switch.mode, runs_repeat())) # after the gradients
    def after_backward(self): self.step()

def plan(**kwargs): return FormatPlan(**{**dict(arm='channels last bf16', memory_format='channels_last', autocast='bf16'), **kwargs})

setups = {
    'plain': (lambda l: l, None),
    'default': (lambda l: l.to_channelslast(), 'tuned'),
    'not tuned': (lambda l: l.to_channelslast(tune=False), 'correct'),
    'tuned again': (lambda l: l.to_channelslast(tune=False).to_channelslast(), 'tuned'),
    'callback': (lambda l: l.add_cb(ChannelsLastCallback()), 'tuned'),
    'callback, not tuned': (lambda l: l.add_cb(ChannelsLastCallback(tune=False)), 'correct'),
    'bf16 alone': (lambda l: l.add_cb(DeviceMixedPrecision('bf16')), 'correct'),
    'strongest wins': (lambda l: l.add_cbs([DeviceMixedPrecision('bf16'), ChannelsLastCallback()]), 'tuned'),
    'plan': (lambda l: l.to_channelslast(plan=plan()), 'tuned'),
    'contiguous plan': (lambda l: l.to_channelslast(plan=plan(memory_format='contiguous')), 'tuned'),
    'race': (lambda l: l.to_channelslast(plan='auto'), 'tuned'),
    'race, not tuned': (lambda l: l.to_channelslast(plan='auto', tune=False), 'correct'),
    'plan, not tuned': (lambda l: l.to_channelslast(plan=plan(), tune=False), 'correct'),
    'undone': (lambda l: l.to_channelslast().to_contiguous(to_fp32=True), None),
    'undone but for bf16': (lambda l: l.to_channelslast(amp_mode='bf16').to_contiguous(), 'correct'),
}

def learner(**kwargs): return tiny_learner(cbs=SeeKernels(), **kwargs)

@pytest.mark.parametrize('name', setups)
def test_mode_by_callbacks(name):
    setup,mode = setups[name]
    with caught_warnings(): learn = fit(setup(learner()))
    assert {m for m,_ in learn.see_kernels.seen}=={mode} and kernels_mode(learn)==mode and switch.mode is None

runs = {'fit': lambda l: l.fit(1), 'fit_one_cycle': lambda l: l.fit_one_cycle(1), 'validate': lambda l: l.validate(),
    'get_preds': lambda l: l.get_preds(), 'get_preds of training data': lambda l: l.get_preds(ds_idx=0),
    'lr_find': lambda l: l.lr_find(show_plot=False, num_it=5), 'predict': lambda l: l.get_preds(dl=l.dls.test_dl([l.dls.valid_ds[0]]))}

@pytest.mark.parametrize('run', runs)
def test_mode_in_every_run(run, tmp_path):
    for setup,mode in (setups['plain'],setups['default']):
        learn = setup(learner(path=tmp_path))
        with quiet(learn): runs[run](learn)
        assert {m for m,_ in learn.see_kernels.seen}=={mode} and switch.mode is None

def test_predict(tmp_path):
    from PIL import Image
    from fastai.vision.all import ImageDataLoaders
    import numpy as np
    for i in range(8): Image.fromarray(np.full((16, 16, 3), 30*i, np.uint8)).save(tmp_path/f'{"ab"[i%2]}_{i}.png')
    dls = ImageDataLoaders.from_name_func(tmp_path, sorted(tmp_path.glob('*.png')), lambda n: n[0], valid_pct=0.5, seed=0, bs=2, num_workers=0)
    learn = learner(dls=dls).to_channelslast()
    with quiet(learn): learn.predict(tmp_path/'a_0.png')
    assert {m for m,_ in learn.see_kernels.seen}=={'tuned'} and switch.mode is None

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelFitException, CancelBatchException, SystemExit])
@pytest.mark.parametrize('event', ['before_fit', 'before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch'])
def test_the_context_is_closed_after_any_exception(error, event):
    learn = learner().to_channelslast()
    def fail(): raise error('planted')
    cb = Callback()
    setattr(cb, event, fail)
    if event=='before_fit': cb.order = -60 # before any other has prepared anything
    learn.add_cb(cb)
    try: fit(learn)
    except (RuntimeError, KeyboardInterrupt, SystemExit, CancelBatchException): pass
    assert switch.mode is None and not open_contexts()[0] and not torch.is_autocast_enabled('cpu')

def test_only_our_callbacks_set_the_mode():
    "An attribute `kernels` of the model, the Learner or another callback has no effect"
    class Other(Callback): kernels = 5
    learn = learner()
    learn.model.kernels = learn.kernels = 'tuned'
    learn.add_cb(Other())
    assert kernels_mode(fit(learn)) is None and {m for m,_ in learn.see_kernels.seen}=={None}

def test_signature_of_one_batch():
    assert [*inspect.signature(Learner.one_batch).parameters.values()][1:]==[*inspect.signature(Learner.one_batch._wrapped).parameters.values()][1:]

def test_a_second_learner_inside_a_fit():
    "The mode of the inner one holds while it runs, then that of the outer one again"
    class Inner(Callback):
        def after_pred(self):
            if self.training and not inner.see_kernels.seen: fit(inner)
    inner,outer = learner(),learner(model=tiny_cnn())
    inner.add_cb(ChannelsLastCallback(tune=False))
    fit(outer.to_channelslast().add_cb(Inner()))
    assert {m for m,_ in inner.see_kernels.seen}=={'correct'} and outer.see_kernels.seen[-1][0]=='tuned'

# One line

def lines(out): return [l for l in out.splitlines() if l.startswith(('Tuned', 'Checked', 'tuned'))]

def test_one_line_at_the_end_of_a_fit(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(callbacks, 'tuning_line', lambda since: asked.append(since) or 'tuned something')
    learn = learner().to_channelslast(use_amp=False)
    with quiet(learn):
        learn.fit(2)
        assert lines(capsys.readouterr().out)==['tuned something']
        learn.validate()
        assert lines(capsys.readouterr().out)==['tuned something'] and len(asked)==2
    learn.check_channelslast(); learn.trace_channelslast()
    learn.bench_channelslast(['channels last fp32'+', tuned'*(device.type=='cpu')], seconds=1, rounds=8, epochs=False, bar=False)
    assert not lines(capsys.readouterr().out) and len(asked)==2
    monkeypatch.setattr(callbacks, 'rank_distrib', lambda: 1)
    fit(learn)
    assert not lines(capsys.readouterr().out), 'only the first rank speaks'
    monkeypatch.setattr(callbacks, 'rank_distrib', lambda: 0)
    monkeypatch.setattr(callbacks, 'tuning_line', lambda since: None)
    fit(learn)
    assert capsys.readouterr().out.strip()==''

@cpu
def test_the_line_is_of_this_fit(capsys):
    def learn(): return tiny_learner(model=nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 2)))
    first = learn().to_channelslast(use_amp=False)
    fit(first)
    assert len(lines(capsys.readouterr().out))==1
    fit(first); fit(learn().to_channelslast(use_amp=False))
    assert not lines(capsys.readouterr().out), 'nothing was left to tune'

def test_less_random_times_nothing():
    learn = learner().to_channelslast(use_amp=False)
    with less_random(): fit(learn)
    assert {f for _,f in learn.see_kernels.seen}=={True} and not runs_repeat()
    learn.see_kernels.seen.clear()
    fit(learn)
    assert {f for _,f in learn.see_kernels.seen}=={False}
    with pytest.raises(ZeroDivisionError), less_random(): 1/0
    assert not runs_repeat()

# TrainingStep

def step_of(model=None, **kwargs):
    model = model or tiny_cnn()
    return TrainingStep(model, images(4, 16, torch.float32), torch.arange(4)%2, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)

@pytest.mark.parametrize('tuned,mode', [(False, 'survive'), (True, 'tuned'), ('correct', 'correct')])
def test_mode_of_a_step(tuned, mode):
    step,seen = step_of(tuned=tuned),[]
    loss,update = step.loss_func,step.optimizer.step
    step.loss_func = lambda *a: seen.append(switch.mode) or loss(*a)
    step.optimizer.step = lambda: seen.append(switch.mode) or update()
    step.run()
    assert seen==[mode]*2 and switch.mode is None and step.kernels==mode
    assert (f'{mode} kernels' in repr(step))==(tuned is not False)
    step.loss_func = lambda *a: 1/0
    with pytest.raises(ZeroDivisionError): step.run()
    assert switch.mode is None

def test_a_step_takes_true_false_or_a_mode():
    with pytest.raises(ValueError, match="tuned must be True, False, 'tuned', 'correct' or 'survive', got 'fast'"): step_of(tuned='fast')

@pytest.mark.parametrize('name,tuned', [('plain', False), ('default', 'tuned'), ('not tuned', 'correct'), ('bf16 alone', 'correct'), ('undone', False)])
def test_the_step_of_a_learner(name, tuned):
    with caught_warnings(): step = TrainingStep.from_learner(setups[name][0](learner()))
    assert step.tuned==tuned and step.kernels==(setups[name][1] or 'survive')

@pytest.mark.skipif(device.type!='cpu', reason='nothing of this model is tuned on a GPU')
def test_the_baseline_of_a_learner_is_tuned():
    learn = learner().to_channelslast(use_amp=False)
    res = learn.bench_channelslast(['channels last fp32'], seconds=1, rounds=8, epochs=False, bar=False)
    assert res.conditions['baseline']=='channels last fp32, tuned'

# Layers that can crash the process

class Patchy(nn.Module):
    def __init__(self): super().__init__(); self.strided,self.body = nn.Conv2d(3, 8, 1, stride=2),nn.Conv2d(8, 8, 3)
    def forward(self, x): return self.body(self.strided(x)).mean((2, 3))[:,:2]

@cpu
def test_a_plain_loop_is_warned_and_a_learner_is_not():
    with caught_warnings() as w: apply_channels_last(Patchy())
    assert [o.category for o in w]==[FormatWarning] and 'strided' in str(w[0].message) and '`with tuned_kernels():`' in str(w[0].message)
    with pytest.warns(FormatWarning, match='Conv2d.*tuned_kernels'): apply_channels_last(nn.Conv2d(3, 8, 1, stride=2))
    with caught_warnings() as w: apply_channels_last(tiny_cnn()); apply_channels_last(Patchy().to('meta'))
    assert not [o for o in w if 'tuned_kernels' in str(o.message)]
    learn = learner(model=Patchy())
    with caught_warnings() as w, quiet(learn, silent=False):
        learn.to_channelslast(); learn.fit(1)
    assert not [o for o in w if 'tuned_kernels' in str(o.message)]

dying = '''
import torch
from torch import nn
from fastai.vision.all import *
from fastxtend_cl.all import *
from helpers import dls_of, labels, random_images, tiny_learner
torch.manual_seed(0)
m = nn.Sequential(nn.Conv2d(3, 64, 1, stride=2), nn.ReLU(), nn.ConvTranspose2d(64, 3, 1, stride=2, output_padding=1), nn.Flatten(), nn.Linear(3*256*256, 2))
learn = tiny_learner(dls=dls_of(random_images(4, (3, 256, 256)), labels(4), bs=2), model=m)
with learn.no_bar(), learn.no_logging(): {setup}
print('survived', all(torch.isfinite(p).all() for p in m.parameters()))
'''

@cpu
@pytest.mark.parametrize('setup', ['learn.to_channelslast(use_amp=False).fit(1, 1e-4)', 'learn.to_channelslast(use_amp=False, tune=False).fit(1, 1e-4)',
    'step = TrainingStep.from_learner(learn); step.convert("channels_last"); step.run()'])
def test_kernels_that_crash_are_avoided(setup, root):
    r = run_python('-W', 'ignore', '-c', dying.replace('{setup}', setup), cwd=root/'tests', timeout=300)
    assert r.returncode==0 and r.stdout.split()[-2:]==['survived', 'True'], r.stderr[-2000:]

@cpu
@pytest.mark.skipif(not cpu_bf16(), reason='bf16')
@pytest.mark.parametrize('layers', [
    lambda: [nn.ConvTranspose2d(24, 24, 3, dilation=2, padding=2)], lambda: [nn.Conv2d(24, 24, 3, dilation=2, padding=2, groups=24)],
    lambda: [nn.Flatten(2), nn.Conv1d(24, 24, 7, stride=2, padding=3), nn.Conv1d(24, 24, 7, stride=1024, padding=3), nn.Conv1d(24, 24, 7, stride=2, padding=3),
        nn.Unflatten(2, (1, 1))]], ids=['transposed', 'depthwise', '1-D'])
@pytest.mark.parametrize('setup', [lambda l: l.to_channelslast(amp_mode='bf16'), lambda l: l.add_cb(DeviceMixedPrecision('bf16'))], ids=['channels last', 'bf16 alone'])
def test_faulty_kernels_in_bf16_train_right_weights(layers, setup):
    "Ten steps against fp32; a wrong gradient is off by its own size, or not a number"
    def train(setup):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Conv2d(3, 24, 1), *layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
        learn = setup(tiny_learner(dls=dls_of(random_images(20, (3, 40, 40)), labels(20), bs=2), model=m, opt_func=lambda ps,lr: __import__('fastai.optimizer').optimizer.SGD(ps, lr)))
        start = [p.detach().clone() for p in m.parameters()]
        fit(learn, 1, 1e-2)
        return [p.detach()-s for p,s in zip(m.parameters(), start)]
    for a,b in zip(train(setup), train(lambda l: l)):
        assert torch.isfinite(a).all() and (a-b).norm()<=0.2*b.norm()+1e-5

# Nothing is put on a model

class StdConv2d(nn.Conv2d):
    "Weight standardization"
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w/w.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)
class ScaledIN(nn.InstanceNorm2d):
    def forward(self, x): return 3*super().forward(x)
class ScaledUp(nn.ConvTranspose2d):
    def forward(self, x): return .1*super().forward(x)
class Styled(nn.InstanceNorm2d):
    def forward(self, x, style): return super().forward(x)*style
class Keywords(nn.Module):
    "Layers called with keywords and with further arguments"
    def __init__(self): super().__init__(); self.conv,self.norm,self.styled = nn.Conv2d(8, 8, 1, stride=2),nn.InstanceNorm2d(8),Styled(8)
    def forward(self, x): return self.styled(self.norm(input=self.conv(input=x)), x.mean())

def net(*middle): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))

layers = {'standardized': lambda: StdConv2d(8, 16, 1, stride=2), 'scaled norm': lambda: ScaledIN(8), 'scaled up': lambda: ScaledUp(8, 8, 1, stride=2, output_padding=1),
    'keywords': Keywords}

def own_forward():
    m = nn.Conv2d(8, 8, 1, stride=2)
    m.forward = lambda x, f=m.forward: 2*f(x)
    return m
layers['own forward'] = own_forward

class Exact(Double):
    def after_loss(self): self.learn.loss = self.loss.float() # fastai's Recorder averages in single precision

@pytest.mark.parametrize('name', layers)
@pytest.mark.parametrize('bs', [1, 4])
def test_layers_with_a_forward_of_their_own_train_the_same(name, bs):
    "In double precision, so that only an error shows"
    def train(convert):
        torch.manual_seed(0)
        model = net(layers[name]()).double()
        model(images(2, dtype=torch.float64))
        learn = convert(tiny_learner(dls=dls_of(random_images(8), labels(8), bs=bs), model=model, loss_func=nn.CrossEntropyLoss(), cbs=Exact()))
        fit(learn, 1, 1e-2)
        return [p.detach() for p in model.parameters()]
    for a,b in zip(train(lambda l: l), train(lambda l: l.to_channelslast(use_amp=False))): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

def attributes(model): return [(type(m), {k:v for k,v in vars(m).items() if not k.startswith('_') and k!='training'}, set(vars(m)),
    [len(h) for h in vars(m).values() if isinstance(h, dict)]) for m in model.modules()]

faulty = lambda: net(nn.Conv2d(8, 8, 1, stride=2), nn.InstanceNorm2d(8), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, dilation=2, padding=2, groups=32))

@pytest.mark.parametrize('amp', [False, 'bf16'])
def test_nothing_is_left_on_a_model(amp):
    model = faulty()
    model(images(2, dtype=torch.float32))
    before = attributes(model)
    learn = learner(model=model).to_channelslast(amp_mode=amp)
    fit(learn)
    assert attributes(model)==before
    with quiet(learn): learn.validate(); learn.get_preds(); learn.check_channelslast(); learn.trace_channelslast()
    assert attributes(model)==before
    learn.to_contiguous()
    assert attributes(model)==before

def test_a_fitted_model_is_saved_without_a_reference_to_this_package(tmp_path):
    learn = fit(learner(model=resnet18(num_classes=2), dls=dls_of(random_images(4, (3, 32, 32)), labels(4), bs=2)).to_channelslast(amp_mode='bf16'))
    torch.save(learn.model, tmp_path/'model.pt')
    assert b'fastxtend_cl' not in (tmp_path/'model.pt').read_bytes() and b'fastxtend_cl' not in pickle.dumps(learn.model)
    code = "import sys; sys.modules['fastxtend_cl'] = None; import torch; m = torch.load('model.pt', weights_only=False, map_location='cpu'); print(m(torch.randn(2, 3, 32, 32)).shape)"
    r = run_python('-W', 'ignore', '-c', code, cwd=tmp_path)
    assert 'torch.Size([2, 2])' in r.stdout, r.stderr
    assert torch.equal(copy.deepcopy(learn.model).eval()(x := images(2, 32, torch.float32).to(device)), learn.model.eval()(x))

@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore:.*torch.jit')
def test_a_converted_model_is_scripted_and_traced():
    model,x = apply_channels_last(resnet18(num_classes=2)).eval(),images(2, 32, torch.float32)
    want = model(x)
    for m in (torch.jit.script(model), torch.fx.symbolic_trace(model)): torch.testing.assert_close(m(x), want)
    learn = learner(model=model, dls=dls_of(random_images(4, (3, 32, 32)), labels(4), bs=2)).to_channelslast(amp_mode='bf16')
    fit(learn)
    torch.jit.script(learn.to_contiguous().model); torch.fx.symbolic_trace(learn.model)

def test_a_replica_has_its_own_weights():
    m = apply_channels_last(net(nn.Conv2d(8, 8, 1, stride=2), nn.InstanceNorm2d(8)))
    m(images(2, dtype=torch.float32))
    for layer in (m[0], m[1]):
        replica = layer._replicate_for_data_parallel()
        replica.weight,replica.bias = (nn.Parameter(torch.zeros_like(p)) for p in (layer.weight, layer.bias))
        assert not replica(torch.randn(2, layer.in_channels, 8, 8)).any()

def test_functional_transforms():
    m,x = apply_channels_last(nn.Conv2d(16, 8, 1, stride=2)),torch.randn(3, 16, 8, 8)
    def loss(p, x): return torch.func.functional_call(m, p, (x[None],)).square().sum()
    with tuned_kernels(): g = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(m.named_parameters()), x)
    assert g['weight'].shape==(3, *m.weight.shape)

def test_hooks_run_once():
    model,calls = faulty(),[]
    model(images(2, dtype=torch.float32))
    for m in model: m.register_forward_hook(lambda m, i, o: calls.append(m))
    learn = learner(model=model, dls=dls_of(random_images(2), labels(2), bs=2)).to_channelslast(amp_mode='bf16')
    fit(learn) # a training batch and a validation batch
    assert [sum(c is m for c in calls) for m in model]==[2]*len(model)

@pytest.mark.parametrize('add', [AveragedCopy])
def test_copies_made_by_callbacks_are_plain(add):
    learn = fit(learner(model=tiny_cnn()).add_cb(add()).to_channelslast(amp_mode='bf16'))
    assert not any('forward' in vars(m) for m in learn.averaged_copy.averaged.modules())

# trace

class Squeeze(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Conv2d(8, 8, 1)
    def forward(self, x): return x*self.fc(x.mean((2, 3), keepdim=True))

@cpu
def test_trace_sees_what_training_does(monkeypatch):
    "The gradient of a mean is written in channels last by tuned kernels only; costs are measured with the step's own kernels"
    from fastxtend_cl import trace
    seen,real = set(),trace._least_seconds
    monkeypatch.setattr(trace, '_least_seconds', lambda *a, **kw: seen.add(switch.mode) or real(*a, **kw))
    model = net(nn.Conv2d(8, 8, 3), Squeeze(), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 3))
    model(images(2, dtype=torch.float32))
    found = {t: {r.advice for r in trace_formats(step_of(model, tuned=t)).rows} for t in (False, True)}
    assert seen=={'survive', 'tuned'}
    assert any('the gradient of a mean' in a for a in found[False]) and not any('the gradient of a mean' in a for a in found[True])
    assert all(any('instance normalization copies into contiguous order' in a for a in f) for f in found.values()), 'these images are small'

def test_what_trace_advises_for_shuffles_and_instance_norms_is_true():
    x = images(2, dtype=torch.float32).repeat(1, 4, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    groups = 3
    y = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
    assert torch.equal(y, nn.ChannelShuffle(groups)(x)) and format_of(y)=='channels_last'
    y.backward(torch.ones_like(y))
    assert format_of(x.grad)=='channels_last'
    model,x = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)),torch.randn(2, 3, 32, 32)
    lost = {t: [r for r in trace_formats(TrainingStep(model, x, x, lambda p, y: p.square().mean(), tuned=t)).rows if r.cls=='InstanceNorm2d'] for t in (False, True)}
    assert lost[False] and not lost[True]
    assert all('instance normalization copies into contiguous order: `tuned_kernels`' in r.advice for r in lost[False])
