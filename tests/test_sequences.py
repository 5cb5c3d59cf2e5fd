"After any sequence of calls a Learner is as after the last conversion alone"
import tempfile
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
import pytest, torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.optimizer import OptimWrapper
from hypothesis import HealthCheck, assume, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from helpers import SeeBatch, fit, labels, quiet, random_images, state_follows, strides, dls_of, tiny_learner
import fastxtend_cl.all
from fastxtend_cl.amp import DeviceMixedPrecision
from fastxtend_cl.callbacks import ChannelsLastCallback
from fastxtend_cl.layout import format_of
from fastxtend_cl.operators import switch
from fastxtend_cl.plan import FormatPlan
from fastxtend_cl.race import RaceCallback

plans = {'contiguous': FormatPlan('contiguous bf16', 'contiguous', 'bf16'), 'channels last': FormatPlan('channels last fp32', 'channels_last'),
    'compiled': FormatPlan('channels last bf16, compiled', 'channels_last', 'bf16', compile=True),
    'contiguous, compiled': FormatPlan('contiguous fp32, compiled', 'contiguous', compile=True)}

def leaves_something(call):
    "Whether what `call` comes to depends on what was before it"
    name,kw = call
    return name in fastais or name=='to_contiguous' and not kw['to_fp32'] or kw.get('plan')=='auto'

fastais = 'to_fp16', 'to_bf16', 'to_fp32' # they add callbacks of fastai's own, or take all away

conversions = [('to_channelslast', kw) for kw in (dict(), dict(use_amp=False), dict(amp_mode='bf16', keep_memory=True), dict(amp_mode='fp16', growth_interval=7),
    dict(to_fp16=True, tune=False), dict(amp_mode=False, keep_memory=False), dict(init_scale=8.), *[dict(plan=p) for p in plans],
    dict(plan='contiguous', tune=False, keep_memory=False), dict(plan='auto'), dict(plan='auto', use_amp=False, tune=False))]
conversions += [('to_contiguous', dict(to_fp32=b)) for b in (False, True)]

def splitter(m): return [[*m[:3].parameters()], [*m[3:].parameters()]]

def new_learner(fused, own=None, path=None):
    "`own`: the mode of a mixed precision callback that the user has"
    opt = dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)) if fused else {}
    cbs = DeviceMixedPrecision(own, growth_interval=9) if own else None
    return tiny_learner(dls_of(random_images(4), labels(4)), splitter=splitter, path=path, cbs=cbs, **opt)

def call(learn, o):
    name,kw = o
    with quiet(learn): res = getattr(learn, name)(**{**kw, **(dict(plan=plans.get(kw['plan'], kw['plan'])) if 'plan' in kw else {})})
    assert res is learn

def settings_of(amp): return {k: v for k,v in amp.kwargs.items() if k!='enabled' or type(amp) is not MixedPrecision} # fastai's own sets that in a fit

def described(learn):
    "Callbacks of the package and their settings"
    cl,amps = learn._grab_cbs(ChannelsLast),learn._grab_cbs(MixedPrecision)
    assert getattr(learn, 'channels_last', None) is (cl[0] if cl else None) and getattr(learn, 'mixed_precision', None) in (amps or [None])
    assert all(cb.learn is learn for cb in learn.cbs) and all(type(cb) is ChannelsLastCallback for cb in cl)
    return dict(all=sorted(type(cb).__name__ for cb in learn.cbs), amp=[(type(cb), cb.amp_mode, settings_of(cb)) for cb in amps],
        race=[cb.baseline.name for cb in learn._grab_cbs(RaceCallback)],
        channels_last=[(cb.plan and cb.plan.arm, cb.tune, cb.memory_format, cb.kernels, cb.keep_memory) for cb in cl])

def not_compiled(f, **kwargs):
    "In place of `torch.compile`: what is compiled is not the question here, and takes long"
    @wraps(f)
    def res(*args, **kwargs): return f(*args, **kwargs)
    return res

references = {}

def reference(calls, fused, own=None):
    "Settings of a new Learner after `calls`, whether a plan has compiled it, and its strides after a fit"
    key = repr((calls, fused, own))
    if key not in references:
        learn = new_learner(fused, own)
        for o in calls: call(learn, o)
        references[key] = described(learn),learn.model._compiled_call_impl is not None,strides(fit(learn).model)
    return references[key]

class Fails(Callback):
    def __init__(self, event, error, order): self.event,self.error,self.order = event,error,order
    def __call__(self, event):
        if event==self.event: raise self.error()

class Sequences(RuleBasedStateMachine):
    @initialize(fused=st.booleans())
    def make(self, fused):
        self.folder = tempfile.TemporaryDirectory()
        self.fused,self.learn = fused,new_learner(fused, path=Path(self.folder.name))
        self.calls,self.own,self.settled,self.saved = [],None,True,False
        self.users = [] # the call that gave the Learner fastai's own mixed precision

    @rule(o=st.sampled_from(conversions))
    def convert_only(self, o): self.convert(o)

    @rule(o=st.sampled_from(conversions))
    def convert_and_fit(self, o): self.convert(o); self.fit()

    @rule(name=st.sampled_from(fastais))
    def fastais_own(self, name):
        cl = self.learn._grab_cbs(ChannelsLastCallback)
        assume(name!='to_fp32' or not cl or cl[0].amp_displaced is None) # it comes back with the next `to_channelslast()`
        call(self.learn, (name, {}))
        self.users = [] if name=='to_fp32' else [(name, {})]
        self.calls = [*self.calls, (name, {})]

    def convert(self, o):
        call(self.learn, o)
        if o==('to_contiguous', dict(to_fp32=True)): self.users = []
        self.calls = [*self.calls, o] if leaves_something(o) else [*self.users, o]
        self.settled = o[0]=='to_contiguous'

    def fit(self):
        fit(self.learn)
        self.settled = True

    @rule(event=st.sampled_from(['before_fit', 'before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'before_validate', 'after_epoch']),
        error=st.sampled_from([CancelFitException, CancelEpochException, CancelBatchException, KeyboardInterrupt]), order=st.sampled_from([-60, 50]))
    def fit_fails(self, event, error, order):
        try:
            with self.learn.added_cbs(Fails(event, error, order)): fit(self.learn)
        except (KeyboardInterrupt, CancelEpochException, CancelBatchException): pass # fastai catches what belongs to the event
        if event!='before_fit': self.settled = True

    @rule(without=st.sampled_from([[], [ChannelsLast], [MixedPrecision], [ChannelsLast, MixedPrecision], [RaceCallback]]))
    def fit_with_others(self, without):
        "Callbacks that come for one fit, in nested contexts, and some that are away meanwhile"
        with self.learn.removed_cbs(self.learn._grab_cbs(tuple(without))) if without else nullcontext(), self.learn.added_cbs([Callback()]), self.learn.added_cbs([SeeBatch()]):
            fit(self.learn)
        if MixedPrecision in without and self.learn._grab_cbs(RaceCallback): fit(self.learn) # the settings that need it compete again
        if ChannelsLast not in without: self.settled = True

    @rule(how=st.sampled_from(['freeze', 'unfreeze']))
    def freeze(self, how): getattr(self.learn, how)()

    @rule(again=st.booleans())
    def save_and_load(self, again):
        "The file of now, or one that was saved in another format"
        if not again or not self.saved:
            saved = torch.load(self.learn.save('a'), weights_only=False)
            if self.learn._grab_cbs(ChannelsLastCallback):
                assert 'channels_last' not in {format_of(t) for t in (saved['model'] if set(saved)=={'model', 'opt'} else saved).values()}
            self.saved = True
        with quiet(self.learn): self.learn.load('a')

    @rule()
    def export(self):
        with quiet(self.learn):
            before = strides(self.learn.model),list(self.learn.cbs)
            self.learn.export()
            assert (strides(self.learn.model),list(self.learn.cbs))==before

    @rule()
    def compile(self):
        self.learn.model.compile(backend='eager')
        self.own = self.learn.model._compiled_call_impl

    @invariant()
    def is_as_after_the_last_conversion(self):
        found,compiled,after_fit = reference(self.calls, self.fused)
        assert described(self.learn)==found, self.calls
        impl = self.learn.model._compiled_call_impl
        assert impl is self.own if self.own else (impl is not None)==compiled, self.calls
        if self.settled: assert strides(self.learn.model)==after_fit, self.calls
        assert switch.mode is None and not torch.is_autocast_enabled('cpu')
        if self.learn.opt is not None: assert state_follows(self.learn.model, self.learn.opt)

    def teardown(self):
        if hasattr(self, 'folder'): self.folder.cleanup()

@pytest.fixture(autouse=True)
def quick_compile(monkeypatch): monkeypatch.setattr(torch, 'compile', not_compiled)

@pytest.mark.filterwarnings('ignore')
def test_sequences():
    run_state_machine_as_test(Sequences, settings=settings(max_examples=80, stateful_step_count=12, deadline=None,
        derandomize=True, database=None, suppress_health_check=list(HealthCheck)))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('own', [None, 'bf16'])
def test_every_pair(own):
    "The second call comes to what it would alone, for those that leave nothing as it is"
    for one in conversions:
        for other in conversions:
            if leaves_something(other): continue
            learn = new_learner(False, own)
            call(learn, one); call(learn, other)
            stays = None if one==('to_contiguous', dict(to_fp32=True)) else own
            assert (described(learn),learn.model._compiled_call_impl is not None)==reference([other], False, stays)[:2], (one, other)

@pytest.mark.filterwarnings('ignore')
def test_the_users_own_mixed_precision_comes_back():
    learn = new_learner(False, 'bf16')
    own = learn.mixed_precision
    learn.to_channelslast(use_amp=False)
    assert not learn._grab_cbs(MixedPrecision)
    assert learn.to_contiguous() is learn and learn.mixed_precision is own and own.learn is learn and list(learn._grab_cbs(MixedPrecision))==[own]
    assert learn.to_channelslast().mixed_precision is own
    learn.to_channelslast(use_amp=False).to_contiguous(to_fp32=True)
    assert not learn._grab_cbs(MixedPrecision)
