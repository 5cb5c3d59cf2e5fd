"`to_channelslast(plan='auto')`: training steps compare settings, whatever happens meanwhile"
import json, os, pickle, sys, time
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.data.core import Datasets
from fastai.data.transforms import ItemGetter
from torch import nn
from helpers import (AveragedCopy, Double, fit, furthest, labels, process_group, quiet, random_images, state_follows, tensors_in, tiny_cnn,
    tiny_double, tiny_learner, two_processes)
import fastxtend_cl.all
from fastxtend_cl import plan as plans, race as module
from fastxtend_cl.amp import DeviceMixedPrecision, kernels_mode
from fastxtend_cl.bench import BenchRow
from fastxtend_cl.callbacks import ChannelsLastCallback
from fastxtend_cl.kernels import less_random
from fastxtend_cl.layout import format_of
from fastxtend_cl.plan import FormatPlan, plans_file
from fastxtend_cl.race import RaceCallback

pytestmark = [pytest.mark.usefixtures('own_cache'), pytest.mark.filterwarnings('ignore'), pytest.mark.skipif('FXCL_DEVICE' in os.environ, reason='the clock is simulated')]
base,won = 'contiguous fp32','channels last bf16'
speeds = {base: 1., 'channels last fp32': 0.8, 'contiguous bf16': 0.9, won: 0.5}

class Clock:
    "A step takes what `speeds` says of the setting that is in force, as the model and its callbacks show it"
    def __init__(self, speeds): self.speeds,self.learn,self.t = speeds,None,0.
    def __call__(self, device):
        self.t += self.speeds[setting(self.learn)]
        return self.t

def setting(learn):
    "Which setting is in force"
    amp,weight = learn._grab_cbs(DeviceMixedPrecision),next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d)).weight
    low = amp[0].amp_mode.value if amp and not amp[0].paused else {torch.float64: 'fp64'}.get(weight.dtype, 'fp32')
    compiled = ', compiled' if learn.model._compiled_call_impl is not None else ''
    return f'{format_of(weight).replace("_", " ")} {low}{compiled}'

class See(Callback):
    "The setting of each batch, as the model is used"
    order = 300
    def __init__(self): self.train,self.valid,self.dtypes,self.scales = [],[],set(),[]
    def after_pred(self):
        (self.train if self.training else self.valid).append(setting(self.learn))
        self.dtypes.add((setting(self.learn).split()[-1], torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None, format_of(next(tensors_in(self.xb)))))

def dls(n=64, size=8, bs=4):
    "In a fixed order; one batch for validation"
    items = [*zip(random_images(n, (3, size, size)), labels(n))]
    return Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(n), range(4)]).dataloaders(bs=bs, num_workers=0, shuffle=False, drop_last=False, device='cpu')

@pytest.fixture
def race(monkeypatch):
    "Makes a Learner that races with simulated times"
    def make(speeds=speeds, learn=None, model=None, data=None, cbs=(), before=lambda l: l, **kwargs):
        clock = Clock(speeds)
        monkeypatch.setattr(module, '_mark', clock)
        learn = learn or tiny_learner(data or dls(), model, cbs=[See(), *cbs])
        clock.learn = learn
        before(learn)
        assert learn.to_channelslast(**{**dict(plan='auto', amp_mode='bf16'), **kwargs}) is learn
        return learn
    return make

class Stop(Callback):
    "End the fit three batches after the race"
    order = 400
    def before_fit(self): self.more = 3
    def after_batch(self):
        if not self.training or self.learn.race.open_races: return
        self.more -= 1
        if not self.more: raise CancelFitException()

def fit_out(learn, n): return fit(learn, n, cbs=Stop())

def plan(learn): return learn.channels_last.plan
def blocks(names):
    "Runs of one setting"
    res = []
    for n in names:
        if res and res[-1][0]==n: res[-1][1] += 1
        else: res.append([n, 1])
    return res

# The choice

@pytest.mark.parametrize('fastest', speeds)
def test_the_fastest_stays(race, fastest, capsys):
    learn = race({**speeds, fastest: 0.3})
    fit_out(learn, 10)
    p = plan(learn)
    assert p.arm==fastest and p.verdict==('faster' if fastest!=base else 'no faster setting') and p.baseline==base and {r.arm for r in p.rows}==set(speeds)
    assert learn.see.train[-1]==setting(learn)==fastest and p.steps<=88
    assert 'usually fewer than 100' in (out := capsys.readouterr().out) and out.count('Comparing 4 settings in the first training steps')==1
    why = f'3.33 times as fast as {base}, 3.33 to 3.33' if fastest!=base else 'no setting is faster by more than the noise'
    assert out.count(f'{"Kept" if fastest==base else "Chose"} {fastest} after {p.steps} steps: {why}.')==1
    assert p.row.ratio==(pytest.approx(1/0.3) if fastest!=base else 1) and p.conditions['shape']==[4, 3, 8, 8]
    ours = [n for n,_ in blocks(learn.see.train[:p.steps])]
    assert set(ours)==set(speeds) and all(n%4==0 for _,n in blocks(learn.see.train[:p.steps])), 'in blocks of four'

def test_a_tie_keeps_the_baseline(race):
    learn = fit_out(race(dict.fromkeys(speeds, 1.)), 12)
    assert plan(learn).arm==base==setting(learn) and plan(learn).verdict=='no faster setting'

def test_each_setting_is_in_force(race):
    "Autocast and format of the batch are those of the setting, in training and validation"
    learn = fit_out(race(), 10)
    assert {o for o in learn.see.dtypes if o[0]=='bf16'}=={('bf16', torch.bfloat16, 'channels_last'), ('bf16', torch.bfloat16, 'contiguous')}
    assert {o for o in learn.see.dtypes if o[0]=='fp32'}=={('fp32', None, 'channels_last'), ('fp32', None, 'contiguous')}
    assert kernels_mode(learn)=='tuned'

@pytest.mark.parametrize('before,kwargs,names', [
    (lambda l: l, dict(use_amp=False, amp_mode=None), [base, 'channels last fp32']),
    (lambda l: l.to_channelslast(amp_mode='bf16'), {}, [won, base, 'channels last fp32', 'contiguous bf16']),
    (lambda l: l.to_channelslast(amp_mode='fp16'), {}, ['channels last fp32', base, 'contiguous bf16', won]),
    (lambda l: l.to_channelslast(use_amp=False), {}, ['channels last fp32', base, 'contiguous bf16', won]),
    (lambda l: l.to_channelslast(plan=FormatPlan('x', 'contiguous', 'bf16')), {}, ['contiguous bf16', base, 'channels last fp32', won]),
    (lambda l: l.to_channelslast(plan='auto', amp_mode='bf16'), {}, [*speeds]),
    (lambda l: l.add_cb(fastxtend_cl.channelslast.ChannelsLast()), {}, ['channels last fp32', base, 'contiguous bf16', won]),
    (lambda l: l.model.double(), {}, ['contiguous fp64', 'channels last fp64'])],
    ids=['no mixed precision', 'bf16', 'fp16', 'channels last', 'a plan', 'auto', 'fastai', 'double'])
def test_what_is_allowed_competes_with_what_was_before(race, before, kwargs, names):
    learn = race(before=before, **kwargs)
    assert [*learn.race.arms]==names and learn.race.baseline.name==names[0]
    if names[0]!='contiguous fp64': assert setting(fit(learn).to_channelslast(plan='auto', amp_mode='bf16') and learn) in speeds

def test_the_result_is_there_from_the_beginning(race):
    learn = race()
    assert plan(learn).verdict=='not measured' and 'The comparison has not started.' in str(plan(learn)) and not plan(learn).changes
    fit(learn)
    assert plan(learn).verdict=='inconclusive' and plan(learn).steps==16 and 'The comparison is not finished.' in str(plan(learn)) and len(plan(learn).rows)==4
    assert json.dumps(plan(learn).to_dict())

def test_steps_that_cannot_be_timed_end_it(race, monkeypatch):
    "Epochs of one batch: each is the first after an interruption"
    monkeypatch.setattr(module, '_most_idle', 6)
    learn = fit_out(race(data=dls(4)), 10)
    assert plan(learn).verdict=='inconclusive' and plan(learn).arm==base==setting(learn) and not plans_file.path.exists() and not learn.race.open_races

@pytest.mark.parametrize('threads,counts', [(1, False), (2, True)])
def test_one_thread_is_timed_by_its_own_clock(threads, counts):
    "While the core does something else, that stands still; where threads wait for each other it would not tell"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = module._mark(torch.device('cpu'))
        time.sleep(0.2)
        assert (module._between(a, module._mark(torch.device('cpu')))>0.1)==counts
    finally: torch.set_num_threads(before)

# Fits that are short, end, or fail

def test_it_goes_on_in_the_next_fit(race, capsys):
    learn = race()
    for i in range(10):
        fit(learn)
        assert setting(learn)==(base if learn.race.open_races else won)
        with quiet(learn): learn.validate()
    assert plan(learn).arm==won and 'The comparison of settings continues in the next fit: 16 steps so far.' in capsys.readouterr().out
    whole = fit_out(race(), 10)
    assert plan(whole).steps==plan(learn).steps and set(learn.see.valid)<=set(speeds)

class Fails(Callback):
    def __init__(self, event, error, at): self.event,self.error,self.at = event,error,at
    def before_fit(self): self.n = 0
    def __call__(self, event):
        super().__call__(event)
        if event==self.event and self.training:
            self.n += 1
            if self.n==self.at: raise self.error

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch'])
@pytest.mark.parametrize('at', [1, 6, 11])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), CancelFitException()], ids=['Ctrl-C', 'cancelled'])
def test_a_fit_that_ends_leaves_the_baseline(race, event, at, error):
    learn = race()
    with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext(): fit(learn, 1, cbs=Fails(event, error, at))
    assert setting(learn)==base and state_follows(learn.model, learn.opt) and not torch.is_autocast_enabled('cpu')
    assert plan(fit_out(learn, 12)).arm==won==setting(learn)

def test_an_error_of_the_users_is_an_error(race, capsys):
    learn = race()
    with pytest.raises(RuntimeError, match="the user's"): fit(learn, 2, cbs=AlwaysFails(7))
    assert setting(learn)==base and 'excluded' not in capsys.readouterr().out
    assert plan(fit_out(learn, 12)).arm==won and len(plan(learn).rows)==4, 'no setting was to blame'

class FailsInValidation(Callback):
    def after_pred(self):
        if not self.training: raise RuntimeError("the user's")

def test_an_error_in_validation_is_an_error(race, capsys):
    learn = race()
    with pytest.raises(RuntimeError, match="the user's"): fit(learn, cbs=FailsInValidation())
    assert setting(learn)==base and 'excluded' not in capsys.readouterr().out and not learn.race.open_race.race.failed

@pytest.mark.parametrize('how', ['dicts', 'no targets', 'loss that is a number'])
def test_unusual_batches(race, how):
    "Inputs in a dict, batches without a target, and a loss for the log that is no tensor"
    class Unusual(Callback):
        order = 500
        def before_batch(self):
            if how=='dicts': self.learn.xb = ({'x': self.xb[0]},)
            if how=='no targets' and self.iter%2: self.learn.yb = ()
        def after_loss(self):
            if how.startswith('loss'): self.learn.loss = self.learn.loss.detach()
    model = tiny_cnn()
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.net = model
        def forward(self, x): return self.net(x['x'] if isinstance(x, dict) else x)
    learn = fit(race(model=Takes(), cbs=[Unusual()]), 2)
    assert learn.race.open_race.steps and plan(learn).verdict=='inconclusive'

class AlwaysFails(Callback):
    def __init__(self, at): self.at = at
    def before_fit(self): self.n = 0
    def before_batch(self): self.n += 1
    def after_pred(self):
        if self.n>=self.at: raise RuntimeError("the user's")

# Settings that fail

class FailsIn(nn.Module):
    "A layer that fails under autocast, or in channels last"
    def __init__(self, where, how): super().__init__(); self.where,self.how,self.on = where,how,True
    def forward(self, x):
        bad = self.training and self.on and (torch.is_autocast_enabled('cpu') if self.where=='autocast' else format_of(x)=='channels_last')
        return self.how(x) if bad else x

def raises(x): raise NotImplementedError('"planted" not implemented for this setting')
class RaisesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, g): raise torch.OutOfMemoryError('planted')
def no_number(x): return x*float('nan')

def with_layer(where, how):
    torch.manual_seed(0)
    model = tiny_cnn()
    return nn.Sequential(*model[:3], FailsIn(where, how), nn.Dropout(0.1), *model[3:])

@pytest.mark.parametrize('where,left', [('autocast', {base, 'channels last fp32'}), ('last', {base, 'contiguous bf16'})])
@pytest.mark.parametrize('how,said', [(raises, 'NotImplementedError: "planted" not implemented'), (RaisesBackward.apply, 'out of memory: OutOfMemoryError: planted'), (no_number, 'the loss is nan')],
    ids=['forward', 'backward', 'nan'])
def test_a_setting_that_fails_is_excluded(race, capsys, where, left, how, said):
    learn = race(model=with_layer(where, how))
    fit_out(learn, 12)
    out,p = capsys.readouterr().out,plan(learn)
    failed = {r.arm for r in p.rows if r.verdict=='failed'}
    assert failed==set(speeds)-left and p.arm in left-{base} and all(out.count(f'{n} excluded: {said}')==1 for n in failed)
    assert all(torch.isfinite(q).all() for q in learn.model.state_dict().values() if q.is_floating_point())

@pytest.mark.parametrize('how', [raises, RaisesBackward.apply, no_number])
def test_a_retried_batch_trains_as_if_nothing_had_happened(race, how):
    "Weights, statistics of batch norm and random numbers end where they end without a race"
    def trained(to):
        with less_random(1):
            model = with_layer('last', how).double()
            learn = tiny_learner(dls(), model, cbs=[Double(), See()], loss_func=nn.functional.cross_entropy)
            to(learn)
        torch.manual_seed(5)
        model[3].on = to is not nothing
        return fit(learn, 2)
    def nothing(learn): pass
    a,b = trained(nothing),trained(lambda l: race(learn=l, amp_mode=None, speeds={'contiguous fp64': 1., 'channels last fp64': .5}))
    assert [r.verdict for r in plan(b).rows]==['baseline', 'failed'] and furthest(a.model, b.model)<1e-12

def test_a_loss_that_no_setting_makes_finite(race):
    "Training that diverges is not the fault of a setting"
    learn = race(model=with_layer('last', no_number))
    learn.model[3].where,learn.model[3].how = 'all',no_number
    learn.model[3].forward = lambda x: no_number(x)
    fit(learn)
    assert not learn.race.open_race.race.failed

def test_a_conversion_that_fails(race, monkeypatch, capsys):
    real = module.convert_format
    def fails(model, to, opt=None):
        if to=='channels_last': raise ValueError('planted')
        real(model, to, opt)
    monkeypatch.setattr(module, 'convert_format', fails)
    learn = fit_out(race(), 8)
    assert plan(learn).arm=='contiguous bf16' and 'channels last fp32 excluded: ValueError: planted' in capsys.readouterr().out

# What users do besides

def test_gradients_are_accumulated_in_one_setting(race):
    "A setting changes between optimizer steps only"
    learn = race(cbs=[GradientAccumulation(12)]) # three batches
    steps = []
    learn.add_cb(StepSettings(steps))
    fit_out(learn, 40)
    assert plan(learn).arm==won and all(len(set(s))==1 and len(s)==3 for s in steps), steps

class StepSettings(Callback):
    "The settings of the batches of each optimizer step"
    def __init__(self, steps): self.steps,self.now = steps,[]
    def after_backward(self): self.now.append(setting(self.learn))
    def after_step(self): self.steps.append(self.now); self.now = []

def test_the_scale_of_the_loss_goes_on(race):
    "One GradScaler in a fit, which counts the steps in fp16 alone; a step that overflows is not counted"
    fp16 = {n.replace('bf16', 'fp16'): t for n,t in speeds.items()}
    learn = race(fp16, amp_mode='fp16', init_scale=2.**40, growth_interval=1000)
    seen = []
    learn.add_cb(Scales(seen))
    fit_out(learn, 12)
    p = plan(learn)
    assert p.arm=='channels last fp16' and {s for n,s,_ in seen if 'fp32' in n}=={1.}
    scales = [s for n,s,_ in seen if 'fp16' in n]
    assert scales==sorted(scales, reverse=True) and 2.**40>=scales[0]>scales[-1]>1, 'it only falls'
    assert len({i for n,_,i in seen if 'fp16' in n})==1
    assert {r.arm: r.seconds for r in p.rows}=={n: pytest.approx(t) for n,t in fp16.items()}

class Scales(Callback):
    order = 50
    def __init__(self, seen): self.seen = seen
    def after_batch(self):
        if self.training: self.seen.append((setting(self.learn), self.learn.scaler.get_scale(), id(self.learn.scaler)))

def splitter(m): return [[*m[:3].parameters()], [*m[3:].parameters()]]

def test_what_is_trained_changes(race, capsys):
    learn = race(learn=tiny_learner(dls(), cbs=See(), splitter=splitter))
    learn.freeze()
    fit_out(learn, 8)
    first = plan(learn)
    assert first.arm==won and setting(learn)==won
    learn.unfreeze()
    fit_out(learn, 8)
    assert plan(learn) is not first and plan(learn).arm==won and plan(learn).steps==first.steps
    assert 'Comparing 4 settings again: the trained parameters changed.' in capsys.readouterr().out
    learn.freeze(); n = len(learn.see.train); fit(learn)
    assert plan(learn) is first and set(learn.see.train[n:])=={won}, 'that is decided'

def test_progressive_resizing(race, capsys):
    learn = fit_out(race(), 8)
    small = plan(learn)
    learn.dls = dls(size=12)
    fit_out(learn, 8)
    assert plan(learn) is not small and plan(learn).conditions['shape']==[4, 3, 12, 12] and 'the input size changed' in capsys.readouterr().out
    learn.dls = dls()
    fit(learn)
    assert plan(learn) is small

def test_a_small_last_batch_starts_no_race_and_does_not_count(race):
    learn = fit_out(race(data=dls(30)), 16)
    assert plan(learn).arm==won and len(learn.race.plans)==1
    assert {r.arm: r.seconds for r in plan(learn).rows}=={n: pytest.approx(t) for n,t in speeds.items()}

class Sizes(Callback):
    "Images of another size in each batch"
    order = -5
    def before_batch(self): self.learn.xb = tuple(nn.functional.interpolate(x, size=8+self.iter%5) for x in self.xb)

def test_images_of_many_sizes_race_once(race):
    learn = fit_out(race(cbs=[Sizes()]), 12)
    assert plan(learn).arm==won and len(learn.race.plans)==1 and not learn.race.open_races

@pytest.mark.parametrize('cbs', [[MixUp(0.4)], [AveragedCopy()], [ParamScheduler({'lr': lambda p: 1e-3*(1-p)})]], ids=lambda c: type(c[0]).__name__)
def test_with_other_callbacks(race, cbs):
    learn = fit_out(race(cbs=cbs), 10)
    assert plan(learn).arm==won
    if isinstance(cbs[0], AveragedCopy): assert all(torch.isfinite(p).all() for p in cbs[0].averaged.parameters())

def test_lr_find_is_training(race):
    import fastai.callback.schedule
    learn = race(learn=tiny_learner(dls(400), cbs=See()))
    with quiet(learn): learn.lr_find(num_it=60, show_plot=False)
    assert learn.race.open_races and setting(learn)==base
    assert plan(fit(learn, 2)).arm==won

def test_files_in_the_middle(race, tmp_path):
    learn = race(learn=tiny_learner(dls(), cbs=[], path=tmp_path))
    fit(learn)
    saved = torch.load(learn.save('a'), weights_only=False)
    assert 'channels_last' not in {format_of(t) for t in saved['model'].values()}
    with quiet(learn): learn.load('a')
    learn.export()
    assert b'fastxtend_cl' not in (tmp_path/'export.pkl').read_bytes() and learn.race in learn.cbs
    assert plan(fit_out(learn, 10)).arm==won
    assert pickle.loads(pickle.dumps(plan(learn)))==plan(learn)

def test_training_ends_where_it_ends_without_a_race(race):
    "In fp64 to rounding: AdamW, batch norm, dropout, a schedule"
    def trained(to):
        with less_random(2): learn = tiny_double(dls=dls(), loss_func=nn.functional.cross_entropy)
        to(learn)
        torch.manual_seed(3)
        with quiet(learn): learn.fit_one_cycle(6, 1e-2)
        return learn
    a,b = trained(lambda l: None),trained(lambda l: race({'contiguous fp64': 1., 'channels last fp64': .5}, learn=l, amp_mode=None))
    assert plan(b).arm=='channels last fp64' and plan(b).steps>32 and furthest(a.model, b.model)<1e-10
    assert a.recorder.values[-1][1]==pytest.approx(b.recorder.values[-1][1], rel=1e-9)

# Compiled

@pytest.fixture
def eager_compile(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: real(f, backend='eager'))

@pytest.mark.parametrize('faster', [True, False])
def test_the_fastest_is_compared_with_itself_compiled(race, eager_compile, faster, capsys):
    learn = race({**speeds, f'{won}, compiled': 0.25 if faster else 0.6}, compile=True)
    fit_out(learn, 14)
    p = plan(learn)
    assert p.compile==faster and p.arm==(f'{won}, compiled' if faster else won)==setting(learn) and len(p.rows)==5
    out = capsys.readouterr().out
    assert f'Comparing {won} with and without compilation.' in out and '; then the fastest with and without compilation' in out and 'compiling took' in str(p)
    if faster: assert p.ratio==pytest.approx(4) and f'2.00 times as fast as {won}' in str(p)
    learn.to_channelslast(use_amp=False)
    assert learn.model._compiled_call_impl is None

def test_a_model_that_does_not_compile_is_a_line(race, monkeypatch, capsys):
    def fail(f, **kwargs):
        def broken(*args): raise torch._dynamo.exc.Unsupported('planted')
        return broken
    import torch._dynamo
    monkeypatch.setattr(torch, 'compile', fail)
    learn = fit_out(race({**speeds, f'{won}, compiled': 0.25}, compile=True), 12)
    assert plan(learn).arm==won==setting(learn) and f'{won}, compiled excluded: Unsupported: planted' in capsys.readouterr().out
    assert plan(learn).rows[-1].verdict=='failed'

def test_an_error_of_the_users_while_compiled_is_compared(race, eager_compile):
    "The fastest setting is the baseline there: it is not excluded"
    learn = race({**speeds, f'{won}, compiled': 0.25}, compile=True)
    while not (learn.race.open_race and learn.race.open_race.settings): fit(learn)
    with pytest.raises(RuntimeError, match="the user's"): fit(learn, 2, cbs=AlwaysFails(3))
    assert setting(learn) in (won, base)
    assert plan(fit_out(learn, 20)).arm==f'{won}, compiled'

def test_the_fastest_setting_stays_while_compiled_is_compared(race, eager_compile):
    learn = race({**speeds, f'{won}, compiled': 0.25}, compile=True)
    while not (learn.race.open_race and learn.race.open_race.settings): fit(learn)
    assert setting(learn)==won

# Saved plans

def test_a_saved_plan_is_used(race, capsys):
    first = plan(fit_out(race(), 8))
    capsys.readouterr()
    again = fit(race())
    assert plan(again).cached and plan(again).arm==won and set(again.see.train)=={won} and plan(again).rows==first.rows
    assert f'Using the saved plan, {won}: 2.00 times as fast as {base}, 2.00 to 2.00.' in capsys.readouterr().out
    anew = fit_out(race({**speeds, 'contiguous bf16': 0.2}, plan='refresh'), 8)
    assert not plan(anew).cached and plan(anew).arm=='contiguous bf16'
    assert plan(fit(race())).arm=='contiguous bf16', 'which is kept'

def test_plans_with_and_without_training_share_a_cache(race, monkeypatch):
    from test_plan import proof, row
    monkeypatch.setattr(plans, 'bench_formats', lambda *a, **kw: proof(row(won, .5, verdict='faster')))
    learn = tiny_learner(dls(), cbs=See())
    assert learn.plan_channelslast(amp_mode='bf16').arm==won
    fit(race(learn=learn))
    assert plan(learn).cached and set(learn.see.train)=={won}
    fit_out(race({**speeds, 'contiguous bf16': 0.2}, plan='refresh'), 8)
    assert tiny_learner(dls(), cbs=See()).plan_channelslast(amp_mode='bf16').arm=='contiguous bf16'

def test_a_saved_compiled_plan_is_used(race, eager_compile):
    fast = {**speeds, f'{won}, compiled': 0.25}
    fit_out(race(fast, compile=True), 14)
    learn = fit(race(fast, compile=True))
    assert plan(learn).cached and setting(learn)==f'{won}, compiled' and set(learn.see.train[1:])=={f'{won}, compiled'}

# Where steps cannot alternate

def test_where_runs_must_be_reproducible(race, capsys):
    learn = race()
    with less_random(): fit(learn, 2)
    assert set(learn.see.train)=={won}=={setting(learn)} and 'Not comparing settings, because runs must be reproducible, and timings are not: no saved plan, using channels last bf16.' in (out := capsys.readouterr().out)
    assert out.count('Not comparing settings')==1 and plan(learn).verdict=='not measured'
    fit_out(race({**speeds, 'contiguous bf16': 0.2}), 8)
    learn = race()
    with less_random(): fit(learn)
    assert set(learn.see.train)=={'contiguous bf16'} and plan(learn).cached

class Wraps(Callback):
    order = 11
    def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module

def ddp_worker(folder):
    "Each rank trains with its own random times; the second has a plan of its own in its cache"
    with process_group() as rank:
        learn = tiny_learner(dls(), cbs=[See(), Wraps()])
        with quiet(learn): learn.to_channelslast(plan='auto', amp_mode='bf16')
        learn.create_opt()
        learn.race.learn = learn
        mine = FormatPlan('contiguous bf16' if rank==0 else 'channels last fp32', 'contiguous' if rank==0 else 'channels_last', 'bf16' if rank==0 else None,
            rows=[BenchRow(base, 'baseline', ratio=1.), BenchRow('contiguous bf16' if rank==0 else 'channels last fp32', 'faster', ratio=2., low=1.9, high=2.1)])
        plans.save_plan(learn.race.make_key(), '4x3x8x8', mine)
        learn.opt = None
        fit(learn)
        (Path(folder)/f'{rank}.json').write_text(json.dumps(dict(seen=sorted(set(learn.see.train)), arm=plan(learn).arm)))
        del learn

def test_distributed_training_takes_the_first_ranks_plan(tmp_path):
    outs = two_processes(__file__, tmp_path, timeout=200, FASTXTEND_CL_CACHE=lambda i: str(tmp_path/f'cache{i}'))
    a,b = (json.loads((tmp_path/f'{i}.json').read_text()) for i in range(2))
    assert a==b==dict(seen=['contiguous bf16'], arm='contiguous bf16')
    assert 'Not comparing settings, because training is distributed: using the saved plan, contiguous bf16 (2.00 times as fast' in outs[0][0]

# Calls one after the other

@pytest.mark.parametrize('fitted', [0, 1, 10])
@pytest.mark.parametrize('then,expected', [(lambda l: l.to_channelslast(amp_mode='bf16'), won), (lambda l: l.to_channelslast(use_amp=False), 'channels last fp32'),
    (lambda l: l.to_channelslast(plan=FormatPlan('x', 'contiguous', 'bf16')), 'contiguous bf16'), (lambda l: l.to_contiguous(to_fp32=True), base)])
def test_the_last_call_wins(race, fitted, then, expected):
    learn = race()
    if fitted: fit(learn, fitted)
    then(learn)
    assert not learn._grab_cbs(RaceCallback) and not hasattr(learn, 'race')
    assert setting(fit(learn))==expected

def test_back_to_contiguous_leaves_the_precision_of_the_winner(race):
    for fast,expected in ((won, 'bf16'), ('channels last fp32', None)):
        learn = fit_out(race({**speeds, fast: 0.3}, plan='refresh'), 10).to_contiguous()
        amps = learn._grab_cbs(MixedPrecision)
        assert [cb.amp_mode.value for cb in amps]==([expected] if expected else []) and not learn._grab_cbs((RaceCallback, ChannelsLastCallback))

def test_the_users_own_mixed_precision_comes_back(race):
    learn = tiny_learner(dls(), cbs=[See()]).to_bf16()
    own = learn.mixed_precision
    race(learn=learn)
    assert learn.mixed_precision is not own
    learn.to_channelslast(use_amp=False).to_contiguous()
    assert learn.mixed_precision is own

def test_mixed_precision_that_the_user_takes_away(race):
    "The settings that need it compete no longer"
    learn = fit(race())
    learn.to_fp32()
    fit_out(learn, 8)
    assert {*learn.race.arms}=={base, 'channels last fp32'} and plan(learn).arm=='channels last fp32' and not learn._grab_cbs(MixedPrecision)

def test_mixed_precision_that_is_away_for_one_fit(race):
    learn = fit(race())
    arms,before = [*learn.race.arms],learn.race.baseline.name
    with learn.removed_cbs(learn._grab_cbs(MixedPrecision)): fit(learn)
    assert not any(a.dtype for a in learn.race.arms.values())
    fit_out(learn, 8)
    assert [*learn.race.arms]==arms and learn.race.baseline.name==before and learn._grab_cbs(MixedPrecision)

def test_bad_arguments_change_nothing():
    learn = tiny_learner(model=nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))
    before = list(learn.cbs)
    with pytest.raises(ValueError, match='there is nothing to plan: Sequential has no convolution'): learn.to_channelslast(plan='auto')
    learn = tiny_learner()
    with pytest.raises(TypeError, match='did you mean'): learn.to_channelslast(plan='auto', init_scal=1)
    assert list(learn.cbs)==before or len(learn.cbs)==len(before)

if __name__=='__main__': ddp_worker(*sys.argv[1:])
