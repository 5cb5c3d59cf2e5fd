import copy
import pickle
from itertools import product
from types import MethodType
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from helpers import caught_warnings, device, fit, labels, of_class, quiet, random_images, tiny_cnn, tiny_learner
from fastxtend_cl import amp, channelslast, precision
from fastxtend_cl.amp import DeviceMixedPrecision, amp_modes, as_amp_mode, check_amp_mode, check_scaler_args, learner_device, native_amp_mode
from fastxtend_cl.precision import cpu_bf16
from fastxtend_cl.convert import NoEffectWarning

FP16,BF16 = AMPMode.FP16,AMPMode.BF16
dtypes = {'fp16': torch.float16, 'bf16': torch.bfloat16}
modes_here = [m.value for m in amp_modes(device)]

@pytest.fixture
def no_bf16(monkeypatch): monkeypatch.setattr(precision, '_cpu_flags', lambda: {'avx2', 'avx512f'})

@pytest.fixture
def with_bf16(monkeypatch): monkeypatch.setattr(precision, '_cpu_flags', lambda: {'avx2', 'avx512_bf16'})

@pytest.fixture
def fake_cuda(monkeypatch):
    "A GPU as far as questions go; the argument says whether it has bf16"
    def make(bf16):
        class Index:
            def __init__(self, device): pass
            def __enter__(self): pass
            def __exit__(self, *args): pass
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device', Index)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16 or including_emulation)
    return make

def conv_dtypes(learn, **kwargs):
    "What the second convolution computes in during a fit, in training and validation"
    seen = set()
    h = learn.model[3].register_forward_hook(lambda m,i,o: seen.add((m.training, o.dtype)))
    fit(learn, **kwargs)
    h.remove()
    return seen

def both(dtype): return {(True, dtype), (False, dtype)}

# Arguments

@pytest.mark.parametrize('mode', ['fp8', 16, None, 'FP16', torch.float16])
def test_wrong_mode(mode):
    with pytest.raises(ValueError, match=r"^amp_mode must be 'fp16' or 'bf16', got "): as_amp_mode(mode)

def test_modes_by_name_and_by_value():
    assert [as_amp_mode(m) for m in ('fp16', 'bf16', FP16, BF16)]==[FP16, BF16]*2
    assert [DeviceMixedPrecision(m).amp_mode for m in ('fp16', BF16, None)]==[FP16, BF16, None]

@pytest.mark.parametrize('kwargs,error,text', [
    (dict(growth=2), TypeError, r"^unknown argument 'growth'; did you mean 'growth_factor'\?$"),
    (dict(Init_Scale=2), TypeError, r"^unknown argument 'Init_Scale'; did you mean 'init_scale'\?$"),
    (dict(device='cuda'), TypeError, "^unknown argument 'device'; choose from "),
    (dict(init_scale=1., b=2, c=3), TypeError,
        "^unknown argument 'b'; choose from (amp_mode, )?init_scale, growth_factor, backoff_factor, growth_interval, enabled$"),
    (dict(init_scale='big'), TypeError, r"^arguments of GradScaler must be numbers, got init_scale='big'$"),
    (dict(growth_factor=None), TypeError, 'arguments of GradScaler must be numbers, got growth_factor=None'),
    (dict(growth_factor=0.5), ValueError, r'^GradScaler rejects .*The growth factor must be > 1.0'),
    (dict(backoff_factor=2), ValueError, 'The backoff factor must be < 1.0'),
    (dict(growth_factor=0.5, enabled=False), ValueError, 'The growth factor must be > 1.0'),
])
def test_wrong_scaler_arguments(kwargs, error, text):
    for f in (check_scaler_args, lambda kw: DeviceMixedPrecision('fp16', **kw)):
        with pytest.raises(error, match=text): f(kwargs)

def test_a_misspelled_argument_of_the_callback_itself():
    with pytest.raises(TypeError, match=r"^unknown argument 'ampmode'; did you mean 'amp_mode'\?$"): DeviceMixedPrecision(ampmode='bf16')

@pytest.mark.parametrize('cb,mode', [(None, FP16), (lambda: DeviceMixedPrecision(), FP16), (lambda: DeviceMixedPrecision('bf16'), BF16),
    (lambda: MixedPrecision('bf16'), BF16)], ids=['nothing', 'native', 'bf16', "fastai's"])
def test_a_plan_on_a_gpu_may_choose_what_the_learner_has(cb, mode, fake_cuda, monkeypatch):
    fake_cuda(bf16=True)
    monkeypatch.setattr(channelslast, 'learner_device', lambda learn: torch.device('cuda:0'))
    learn = tiny_learner(cbs=cb and cb())
    assert channelslast.allowed_mode(learn, True, None)==mode and channelslast.allowed_mode(learn, False, None) is None
    if cb:
        assert channelslast.current_setting(learn).dtype==amp.amp_dtypes[mode]
        learn.mixed_precision.paused = True
        assert channelslast.allowed_mode(learn, True, None)==mode, 'also while a race trains without it'

def test_right_scaler_arguments():
    check_scaler_args(dict(init_scale=1024., growth_factor=2, backoff_factor=0.5, growth_interval=10, enabled=True))

@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_impossible_mode_names_the_device_and_its_modes(mode):
    with pytest.raises(ValueError, match=f'^{mode} mixed precision is not available on meta: train in fp32 with `use_amp=False`$'):
        check_amp_mode(AMPMode(mode), 'meta')

def test_impossible_mode_names_what_there_is(fake_cuda):
    fake_cuda(bf16=False)
    with pytest.raises(ValueError, match='^bf16 mixed precision is not available on cuda:0: use fp16$'):
        check_amp_mode(BF16, 'cuda:0')

def test_impossible_mode_at_fit(monkeypatch):
    monkeypatch.setattr(precision, '_has_autocast', lambda d, dtype: dtype==torch.bfloat16)
    learn = tiny_learner(cbs=DeviceMixedPrecision('fp16'))
    with pytest.raises(ValueError, match=f'fp16 mixed precision is not available on {device}.*: use bf16'): fit(learn)

# What a device does natively

def test_cpu_with_bf16(with_bf16): assert (cpu_bf16(), native_amp_mode('cpu'))==('AVX512-BF16', BF16)

@pytest.mark.parametrize('flag,name', [('amx_bf16', 'AMX'), ('bf16', 'Arm BF16'), ('sve_bf16', 'Arm SVE BF16')])
def test_other_bf16_instructions(flag, name, monkeypatch):
    monkeypatch.setattr(precision, '_cpu_flags', lambda: {flag})
    assert (cpu_bf16(), native_amp_mode('cpu'))==(name, BF16)

def test_cpu_without_bf16(no_bf16):
    assert (cpu_bf16(), native_amp_mode('cpu'))==(None, None)
    assert BF16 in amp_modes('cpu')

def test_cuda_is_fp16_with_and_without_bf16(fake_cuda):
    fake_cuda(bf16=True)
    assert (native_amp_mode('cuda'), amp_modes('cuda'))==(FP16, [FP16, BF16])
    fake_cuda(bf16=False)
    assert (native_amp_mode('cuda:0'), amp_modes('cuda:0'))==(FP16, [FP16])

@pytest.mark.parametrize('kind', ['mps', 'xpu'])
def test_other_devices_have_the_default_of_their_autocast(kind, monkeypatch):
    monkeypatch.setattr(precision, '_has_autocast', lambda d, dtype: True)
    for dtype,mode in ((torch.bfloat16, BF16), (torch.float16, FP16), (torch.float32, None)):
        monkeypatch.setattr(torch, 'get_autocast_dtype', lambda d: dtype)
        assert native_amp_mode(kind)==mode

@pytest.mark.parametrize('kind', ['mps', 'xpu'])
def test_other_devices_as_torch_has_them(kind):
    "What torch's own autocast computes in there, unless told otherwise; nothing where it switches itself off"
    with caught_warnings(): theirs = torch.autocast(kind)
    assert native_amp_mode(kind)=={torch.float16: FP16, torch.bfloat16: BF16}.get(theirs.fast_dtype if theirs._enabled else None)

def test_a_default_that_its_autocast_lacks(monkeypatch):
    monkeypatch.setattr(precision, '_has_autocast', lambda d, dtype: dtype==torch.bfloat16)
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda d: torch.float16)
    assert native_amp_mode('mps') is None

def test_asking_leaves_no_warning_and_no_autocast():
    with caught_warnings() as caught:
        for d in ('cpu', 'meta', 'mps', 'xpu'): amp_modes(d); native_amp_mode(d)
    assert not caught and not torch.is_autocast_enabled('cpu')

def test_device_of_a_learner():
    learn = tiny_learner()
    assert learner_device(learn)==learn.dls.device
    learn.dls = None
    learn.model.to('meta')
    assert learner_device(learn)==torch.device('meta')
    learn.model = nn.ReLU()
    assert learner_device(learn)==torch.device('cpu')

def test_device_of_the_model_at_the_moment():
    learn = tiny_learner()
    learn.model.to('meta')
    assert learner_device(learn, now=True)==torch.device('meta') and learner_device(learn)==learn.dls.device
    learn.model = nn.ReLU()
    assert learner_device(learn, now=True)==learn.dls.device

def test_device_of_data_without_one():
    class Own:
        train = valid = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]
        def __init__(self, **kwargs): vars(self).update(kwargs)
        def __getitem__(self, i): return self.train
    learn = tiny_learner()
    for dls in (DataLoaders([], []), DataLoaders(), DataLoaders(Own.train, Own.train), Own(), Own(device=None), None):
        learn.dls = dls
        for where in ('cpu', 'meta'):
            learn.model = tiny_cnn().to(where)
            assert learner_device(learn)==torch.device(where)
    learn.dls = Own(device='cpu')
    assert learner_device(learn)==torch.device('cpu')

# Training

@pytest.mark.parametrize('mode', modes_here)
def test_convolutions_compute_in_the_mode(mode):
    assert conv_dtypes(tiny_learner(cbs=DeviceMixedPrecision(mode)))==both(dtypes[mode])

@pytest.mark.skipif(device.type!='cpu', reason="fastai's own works on CUDA")
def test_the_hook_sees_that_fastais_own_does_not():
    assert conv_dtypes(tiny_learner(cbs=MixedPrecision('bf16')))==both(torch.float32)

def test_left_to_itself_it_takes_the_native_mode():
    mode = native_amp_mode(device)
    assert conv_dtypes(tiny_learner(cbs=DeviceMixedPrecision()))==both(amp.amp_dtypes.get(mode, torch.float32))

@pytest.mark.skipif(device.type!='cpu', reason='about processors')
def test_cpu_without_bf16_trains_in_fp32_and_says_so_once(no_bf16):
    learn = tiny_learner(cbs=DeviceMixedPrecision())
    with learn.no_bar(), learn.no_logging(), caught_warnings() as caught:
        learn.fit(1); learn.fit(1); learn.validate()
    said = of_class(caught, NoEffectWarning)
    assert ([str(w.message) for w in said]
        ==['Mixed precision has no effect on cpu: '
            'this processor has no instructions for bf16 (AVX512-BF16, AMX or Arm BF16); training is in fp32'])
    assert conv_dtypes(learn)==both(torch.float32)

@pytest.mark.skipif(device.type!='cpu', reason='about processors')
def test_cpu_with_bf16_says_which_and_why_once(with_bf16, capsys):
    learn = tiny_learner(cbs=DeviceMixedPrecision())
    with quiet(learn): learn.fit(1); learn.fit(1)
    assert capsys.readouterr().out.strip()==f'Mixed precision on {device}: bf16, which this processor computes natively (AVX512-BF16)'

def test_an_explicit_mode_says_nothing(capsys):
    learn = tiny_learner(cbs=DeviceMixedPrecision(modes_here[-1]))
    with learn.no_bar(), learn.no_logging(), caught_warnings() as caught: learn.fit(1)
    assert not capsys.readouterr().out and not of_class(caught, NoEffectWarning)

def test_scaler_arguments_without_effect_are_said_once():
    learn = tiny_learner(cbs=DeviceMixedPrecision('bf16', growth_interval=3))
    with learn.no_bar(), learn.no_logging(), caught_warnings() as caught: learn.fit(1); learn.fit(1)
    assert ([str(w.message) for w in of_class(caught, NoEffectWarning)]
        ==['growth_interval of GradScaler without effect: only fp16 scales the loss, training is in bf16'])

class SeeScaler(Callback):
    order = 20
    def after_backward(self):
        self.seen = (self.scaler.is_enabled(),self.scaler._device,
            self.scaler.get_growth_interval() if self.scaler.is_enabled() else None)

@pytest.mark.skipif('fp16' not in modes_here, reason='no fp16')
@pytest.mark.parametrize('enabled', [False, True])
def test_enabled_is_honoured(enabled):
    learn = fit(tiny_learner(cbs=[DeviceMixedPrecision('fp16', enabled=enabled, growth_interval=7), SeeScaler()]), 2)
    assert learn.see_scaler.seen==(enabled, device.type, 7 if enabled else None)

def test_bf16_is_not_scaled():
    learn = fit(tiny_learner(cbs=[DeviceMixedPrecision('bf16', enabled=True), SeeScaler()]))
    assert not learn.see_scaler.seen[0]

@pytest.mark.skipif('fp16' not in modes_here, reason='no fp16')
def test_a_step_with_overflow_is_skipped_and_training_goes_on():
    learn = tiny_learner(cbs=DeviceMixedPrecision('fp16', init_scale=2.**40, backoff_factor=2.**-10))
    before = learn.model[3].weight.detach().clone()
    seen = []
    class Skips(Callback):
        order = 20
        def after_cancel_step(self): seen.append(torch.equal(self.model[3].weight.cpu(), before))
    fit(learn.add_cb(Skips()), 2)
    assert seen and all(seen) and not torch.equal(learn.model[3].weight.cpu(), before)
    assert all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('mode', modes_here)
def test_the_loss_falls(mode):
    learn = fit(tiny_learner(cbs=DeviceMixedPrecision(mode, **(dict(init_scale=1024.) if mode=='fp16' else {}))), 20, 1e-2)
    losses = [v[0] for v in learn.recorder.values]
    assert losses[-1]<losses[0]

def test_another_callback_may_mean_something_else_by_kernels():
    class Blur(Callback): kernels = [3, 5]
    assert amp.kernels_mode(tiny_learner(cbs=Blur)) is None and amp.kernels_mode(tiny_learner(cbs=[Blur(), DeviceMixedPrecision()]))=='correct'
    fit(tiny_learner(cbs=Blur))

def test_it_is_fastais_mixed_precision_to_fastai():
    learn = tiny_learner(cbs=DeviceMixedPrecision('bf16'))
    assert isinstance(learn.mixed_precision, MixedPrecision)
    learn.to_fp32()
    assert not hasattr(learn, 'mixed_precision') and not learn._grab_cbs(MixedPrecision)

# A batch outside of a fit

@pytest.mark.parametrize('mode', modes_here)
@pytest.mark.parametrize('training', [False, True])
def test_a_batch_outside_of_a_fit_computes_in_the_mode(mode, training):
    learn = fit(tiny_learner(cbs=DeviceMixedPrecision(mode)))
    seen = []
    h = learn.model[3].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    learn.training = training
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(): learn.one_batch(0, learn.dls.one_batch())
    h.remove()
    assert seen==[dtypes[mode]] and learn.loss.isfinite() and autocasts()==(False, False)
    assert learn.scaler is None and learn.mixed_precision.autocast is None, 'as after a fit'
    if mode=='bf16': assert training!=all(torch.equal(p, b) for p,b in zip(learn.model.parameters(), before))
    assert conv_dtypes(learn)==both(dtypes[mode])

def test_a_batch_before_the_first_fit():
    learn = tiny_learner(cbs=DeviceMixedPrecision('bf16'))
    learn.remove_cb(learn.recorder) # which makes its metrics in a fit
    with learn.no_bar(): learn.one_batch(0, learn.dls.one_batch())
    assert learn.pred.shape==(4, 2) and learn.loss.isfinite() and autocasts()==(False, False)

def test_an_error_in_a_batch_outside_of_a_fit():
    learn = fit(tiny_learner(cbs=DeviceMixedPrecision('bf16')))
    learn.loss_func = lambda *args: 1/0
    with pytest.raises(ZeroDivisionError): learn.one_batch(0, learn.dls.one_batch())
    assert autocasts()==(False, False) and learn.mixed_precision.autocast is None

# Nothing is left behind

class Broken(nn.Module):
    def __init__(self, error): super().__init__(); self.error = error
    def forward(self, x): raise self.error('planted')

def autocasts(): return torch.is_autocast_enabled('cpu'),torch.is_autocast_enabled('cuda')

@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['model', 'loss', 'callback'])
def test_no_autocast_is_left_after(where, error):
    learn = tiny_learner(cbs=DeviceMixedPrecision('bf16'))
    def fail(*args, **kwargs): raise error('planted')
    with quiet(learn):
        if where=='model': learn.model.append(Broken(error))
        elif where=='loss': good,learn.loss_func = learn.loss_func,fail
        else:
            bad = Callback(after_pred=fail)
            bad.order = 30
            learn.add_cb(bad)
        with pytest.raises(error, match='planted'): learn.fit(1)
    assert autocasts()==(False, False)
    if where=='model': del learn.model[-1]
    elif where=='loss': learn.loss_func = good
    else: learn.remove_cb(bad)
    assert conv_dtypes(learn)==both(torch.bfloat16) and autocasts()==(False, False)

def test_without_our_wrapping_it_would_be_left(monkeypatch):
    monkeypatch.setattr(Learner, 'one_batch', amp._fastai_one_batch)
    learn = tiny_learner(model=tiny_cnn().append(Broken(ZeroDivisionError)), cbs=DeviceMixedPrecision('bf16'))
    with quiet(learn), pytest.raises(ZeroDivisionError): learn.fit(1)
    left = autocasts()
    learn.mixed_precision.leave()
    assert left==tuple(o==device.type for o in ('cpu', 'cuda')) and autocasts()==(False, False)

class Ends(Callback):
    def __init__(self, error): self.error = error
    def after_pred(self): raise self.error()

@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('error', [CancelBatchException, KeyboardInterrupt])
def test_fastais_own_is_left_too(error):
    "It stays inside by itself, where a batch ends before its loss"
    learn = tiny_learner(cbs=[MixedPrecision, Ends(error)])
    for one_batch,stays in ((Learner.one_batch, False), (amp._fastai_one_batch, True)):
        learn.one_batch = MethodType(one_batch, learn)
        try: fit(learn)
        except KeyboardInterrupt: pass
        left = amp._autocast_depth()
        for _ in range(left): torch.autocast_decrement_nesting()
        assert (left>0)==stays

def test_weights_are_cast_anew_where_another_autocast_was_never_left():
    def losses():
        learn = fit(tiny_learner(cbs=DeviceMixedPrecision('bf16')), lr=0.1)
        return [l.item() for l in learn.recorder.losses]
    want = losses()
    torch.autocast_increment_nesting()
    try: assert losses()==want
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

@pytest.mark.parametrize('interrupted,copied', list(product([False, True], [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])))
def test_a_learner_is_copied_after_training(interrupted, copied):
    items = list(zip(random_images(), labels())) # a list: fastai's Datasets cannot be pickled in mid-epoch
    learn = tiny_learner(DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device=device), cbs=DeviceMixedPrecision('bf16'))
    if interrupted:
        learn.model.append(Broken(KeyboardInterrupt))
        with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1)
        del learn.model[-1]
    else: fit(learn)
    assert conv_dtypes(copied(learn))==both(torch.bfloat16)
