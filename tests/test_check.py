"`check_formats` and `Learner.check_channelslast`: planted faults are named, correct steps are OK, and everything is restored"
import math
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TensorCategory, TensorImage
from hypothesis import given, settings, strategies as st
from fastxtend_cl.all import *
from fastxtend_cl import check, timing
from fastxtend_cl.precision import cpu_bf16
from helpers import Fault, Faulty, adamw, assert_same_snapshot, snapshot, step_of

class FaultyForward(nn.Module):
    def forward(self, x): return x if x.is_contiguous() or x.dtype==torch.float64 else x+0.05

class FaultyWeight(nn.Conv2d):
    "Its weight gradient alone is wrong in channels last"
    def _conv_forward(self, x, w, b): return super()._conv_forward(x, Fault.apply(w, 1.05, torch.float32), b)

def block(i, o, **kw): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **kw), nn.BatchNorm2d(o), nn.ReLU())

def network(middle=None, width=8, head=None):
    torch.manual_seed(0)
    return nn.Sequential(block(3, width), block(width, width, stride=2), middle or nn.Identity(),
        block(width, width, stride=2), head or nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))

@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('opt', [None, adamw, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)])
def test_a_correct_step_is_ok(autocast, opt):
    res = check_formats(step_of(network(nn.Dropout2d(0.3)), opt=opt, autocast=autocast))
    assert res.ok is True and res and not res.wrong and res.first is None
    assert {r.kind for r in res.rows}=={'loss', 'output', 'gradient', 'weight', 'buffer'}
    assert {r.precision for r in res.rows}=={'fp32', *({'bf16'} if autocast==torch.bfloat16 else {'fp16'} if autocast else ())}

@pytest.mark.parametrize('factor', [0.9, 0.98, 1.02, 1.1, -1., 0.])
def test_a_wrong_backward_is_named(factor):
    res = check_formats(step_of(network(Faulty(factor))))
    assert res.ok is False and res.first==dict(module='2', phase='backward', precision='fp32')
    assert {n for n in res.wrong if n.endswith('weight')}=={'0.0.weight', '0.1.weight', '1.0.weight', '1.1.weight'}
    assert str(res).startswith('wrong: ') and 'it starts in the backward pass of `2`, in fp32' in str(res)

def test_a_wrong_backward_in_bf16_only_is_named():
    res = check_formats(step_of(network(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Faulty(1.5, torch.bfloat16))),
        bs=16, autocast=torch.bfloat16))
    assert (res.ok is False and res.first['precision']=='bf16' and res.first['module']=='2.1'
        and {r.precision for r in res.rows if r.verdict=='wrong'}=={'bf16'})

def test_a_wrong_forward_is_named():
    res = check_formats(step_of(network(FaultyForward())))
    assert res.ok is False and res.first==dict(module='2', phase='forward', precision='fp32')

def test_a_wrong_weight_gradient_is_named():
    "A weight of one channel a group is ambiguous, so this one has more"
    model = network(FaultyWeight(8, 8, 3, padding=1))
    res = check_formats(step_of(model))
    assert res.ok is False and res.first==dict(module='2', phase='backward', precision='fp32') and res.wrong==['2.weight']

def test_optimizer_state_that_does_not_follow_is_found(monkeypatch):
    "Rule 2: without it a fused optimizer updates with the wrong state"
    from fastxtend_cl import convert
    step = step_of(network(), opt=lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, fused=True))
    for _ in range(3): step.run()
    assert check_formats(step).ok is True
    monkeypatch.setattr(convert, '_followers', lambda p, opts: [])
    res = check_formats(step)
    assert res.ok is False and {r.kind for r in res.rows if r.verdict=='wrong'}=={'weight'}

def test_the_wrong_kernel_of_an_instance_norm_is_found_and_tuned_kernels_are_correct():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4))
    for tuned in (True, 'correct'): assert check_formats(step_of(model, bs=1, tuned=tuned)).ok is True
    res = check_formats(step_of(model, bs=1))
    assert res.ok is False and res.first['module']=='1' and res.first['phase']=='backward'

@pytest.mark.parametrize('layer,size,dtype,text', [
    (nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32), 40, torch.bfloat16, '3x3 depthwise, 32, dilation 2, on 8x40x40 bf16'),
    (nn.Conv2d(32, 32, 3, padding=1, stride=4), 3, torch.bfloat16, '3x3, 32 to 32, stride 4, on 8x3x3 bf16'),
    (nn.Conv2d(32, 32, 1, stride=2), 40, torch.bfloat16, None), (nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32), 40, None, None)])
def test_kernels_that_can_crash_are_not_run_and_not_right(layer, size, dtype, text):
    "They may be right by luck; `tuned_kernels` does without them"
    model = nn.Sequential(nn.Conv2d(3, 32, 1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    for tuned in (True, 'correct'): assert check_formats(step_of(model, size=size, autocast=dtype, tuned=tuned)).ok is True
    res = check_formats(step_of(model, size=size, autocast=dtype))
    assert res.ok is (text is None)
    if text: assert res.reason.startswith(f"torch's own kernels of {text} access memory out of bounds: they can crash the process or compute wrong results, "
        'and were not run. Train inside `tuned_kernels()`, which avoids it. Without them: ')

def test_a_narrow_pointwise_convolution_is_not_right():
    "Its backward pass corrupts the heap in fp32, too"
    res = check_formats(step_of(nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert res.ok is False and '1x1, 3 to 8, stride 2, on 8x24x24 fp32' in res.reason and res.wrong==[]

def test_only_the_step_under_test_is_tuned(monkeypatch):
    "The contiguous step and those in double precision compute as torch does"
    seen,real = set(),TrainingStep.run
    def run(self, memory_format=None, dtype='as is', **kw):
        seen.add((memory_format, dtype, self.kernels))
        return real(self, memory_format, dtype, **kw)
    monkeypatch.setattr(TrainingStep, 'run', run)
    assert check_formats(step_of(network(), autocast=torch.bfloat16, tuned=True)).ok is True
    assert ({k for f,d,k in seen if f=='channels_last' and d!=torch.float64},{k for f,d,k in seen if f!='channels_last' or d==torch.float64})==(
        {'tuned'}, {'survive'})

class Imaginary(torch.autograd.Function):
    "The identity, whose backward is wrong in the imaginary part where its input was in channels last"
    @staticmethod
    def forward(ctx, x):
        ctx.right = x.is_contiguous()
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g): return g if ctx.right else g - 5j

class Spectral(nn.Module):
    def __init__(self, fault): super().__init__(); self.scale,self.fault = nn.Parameter(torch.randn(1, 8, 24, 13, dtype=torch.complex64)),fault
    def forward(self, x):
        s = self.scale.expand(len(x), -1, -1, -1).contiguous(memory_format=torch.channels_last if x.stride(1)==1 else torch.contiguous_format)
        return torch.fft.irfft2(torch.fft.rfft2(x)*(Imaginary.apply(s) if self.fault else s))

@pytest.mark.parametrize('fault', [False, True])
def test_imaginary_parts_are_compared(fault):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Spectral(fault), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    res = check_formats(step_of(model))
    assert (res.ok,res.wrong)==((False, ['1.scale']) if fault else (True, []))
    x = torch.randn(5, dtype=torch.complex64)
    assert check.relative_error(x+3j, x)>1 and check._compared(step_of(model).run(keep='state'))['gradient','1.scale'].dtype==torch.complex128

def test_a_wrong_contiguous_kernel_hides_nothing():
    "A result near double precision is OK, whatever the contiguous step has computed"
    assert [check._verdict(c, 1e-3, 4*c, 0.01) for c in (math.inf, 0.9, 1e-3)]==['OK']*3
    assert [check._verdict(c, 0.3, 4*c, 0.01) for c in (math.inf, 0.9, 1e-3)]==['inconclusive', 'inconclusive', 'wrong']

def test_randomness_without_a_seed_is_inconclusive():
    import time
    class Clock(nn.Module):
        def forward(self, x): return x*(1 + (time.perf_counter_ns()%1000)/1000)
    res = check_formats(step_of(network(Clock())))
    assert res.ok is None and res.verdict=='inconclusive' and 'two runs of the same step from the same seed differ' in res.reason

def test_on_a_gpu_only_forward_passes_have_to_repeat():
    once = {(k,'a'): torch.ones(3) for k in ('loss', 'output', 'buffer', 'gradient', 'weight')}
    for kind in ('loss', 'output', 'buffer', 'gradient', 'weight'):
        again = {**once, (kind,'a'): 2*torch.ones(3)}
        assert check._largest_difference(again, once, torch.device('cpu'))==1
        assert check._largest_difference(again, once, torch.device('cuda'))==(kind in ('loss', 'output', 'buffer'))

def test_rounding_to_tf32_is_allowed_for(monkeypatch):
    step = step_of(network(nn.Identity()))
    on_gpu = lambda: type('Step', (), dict(device=torch.device('cuda')))
    monkeypatch.setattr(check, 'tf32_allowed', lambda: True)
    assert [check.rounding_unit(o, None) for o in (step, on_gpu())]==[check.relative_rounding['fp32'], 2**-11] and check.rounding_unit(on_gpu(), torch.bfloat16)==2**-8
    monkeypatch.setattr(check, 'tf32_allowed', lambda: False)
    assert check.rounding_unit(on_gpu(), None)==check.relative_rounding['fp32']

def test_rounding_that_explains_anything_is_inconclusive():
    "A sum that cancels to a thousandth of a unit of bf16"
    class Cancel(nn.Module):
        def forward(self, x): return (x + 1e4) - 1e4
    res = check_formats(step_of(nn.Sequential(nn.Conv2d(3, 8, 3), Cancel(), nn.Conv2d(8, 8, 3), Cancel(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), autocast=torch.bfloat16))
    assert any(r.verdict=='inconclusive' for r in res.rows) and res.ok is not False

def test_errors():
    for model,text in ((nn.Sequential(nn.Flatten(), nn.Linear(3*24*24, 4)), 'there is nothing to check: Sequential has no convolution'),):
        with pytest.raises(ValueError, match=text): check_formats(step_of(model))
    nan = network(); nan[7].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match='the loss is nan'): check_formats(step_of(nan))
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match='the loss has no gradient'): check_formats(step_of(frozen))
    step = step_of(network()); step.loss_func = lambda p,t: F.cross_entropy(p, t, reduction='none')
    with pytest.raises(ValueError, match=r'the loss must be a tensor with one element, got the shape \(8,\)'): check_formats(step)

def state(step):
    opt = step.optimizer.state_dict() if step.optimizer else {}
    return ([(n,p.detach().clone(),p.stride(),id(p),'none' if p.grad is None else p.grad.clone())
                for n,p in step.model.named_parameters()],
            [(n,b.clone()) for n,b in step.model.named_buffers()], torch.get_rng_state(),
            [t.clone() for s in opt.get('state', {}).values() for t in s.values() if isinstance(t, torch.Tensor)],
            step.tuned, [m.training for m in step.model.modules()],
            [len(m._forward_hooks) for m in step.model.modules()])

def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype==b.dtype and torch.equal(a, b)
    return len(a)==len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a==b

@pytest.mark.parametrize('fault', [None, 'wrong', 'raises', 'interrupt'])
def test_nothing_is_left_behind(fault, monkeypatch):
    model = network({None: None, 'wrong': Faulty()}.get(fault))
    step = step_of(model, opt=adamw, autocast=torch.bfloat16)
    step.run()
    if fault in ('raises', 'interrupt'):
        real,calls = check._run,[0]
        def run(*args):
            calls[0] += 1
            if calls[0]==4:
                with step.preserved():
                    apply_channels_last(model, step.optimizer)
                    raise KeyboardInterrupt if fault=='interrupt' else MemoryError
            return real(*args)
        monkeypatch.setattr(check, '_run', run)
    before = state(step)
    try: check_formats(step)
    except (KeyboardInterrupt, MemoryError): assert fault in ('raises', 'interrupt')
    assert same(state(step), before)

@pytest.mark.parametrize('mean', [0., 1e-4, 1e-3, 1e-2])
def test_the_running_mean_of_values_around_zero(mean):
    "In channels last it is as exact as the values are, which beside a small mean is little"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[1].bias.data.fill_(mean)
    res = check_formats(step_of(model, size=80))
    assert res.ok is True, res

@pytest.mark.parametrize('mean', [1e-3, 1.])
def test_a_wrong_running_mean_is_found(mean):
    class WrongMean(nn.BatchNorm2d):
        def forward(self, x):
            res = super().forward(x)
            if x.dtype==torch.float32 and not x.is_contiguous(): self.running_mean.data.add_(2e-3)
            return res
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), WrongMean(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[1].bias.data.fill_(mean)
    res = check_formats(step_of(model, size=40))
    assert res.ok is False and res.wrong==['2.running_mean']

def test_a_kink_does_not_hide_a_fault():
    "Whatever values of a batch are near ReLU's kink, a gradient that is 5 % off is found; 77 of 77 batches, also with one planting of errors"
    for i in range(4):
        torch.manual_seed(100 + i)
        step = TrainingStep(network(Faulty()), torch.randn(8, 3, 24, 24), torch.randint(0, 4, (8,)), F.cross_entropy)
        assert check_formats(step).ok is False, i

def learner(model, n=32, **kw):
    torch.manual_seed(0)
    ds = [(TensorImage(torch.randn(3, 24, 24)),TensorCategory(i%4)) for i in range(n)]
    return Learner(DataLoaders.from_dsets(ds, ds[:8], bs=8, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat(), **kw)

def test_learner_method():
    learn = learner(network()).to_channelslast(amp_mode='bf16')
    res = learn.check_channelslast()
    assert res.ok is True and learn.opt is None and {r.precision for r in res.rows}=={'fp32', 'bf16'}
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.check_channelslast(raise_on_wrong=True).ok is True

def test_learner_method_raises_on_wrong():
    learn = learner(network(Faulty()))
    assert learn.check_channelslast().ok is False
    with pytest.raises(WrongStepError, match='it starts in the backward pass of `2`'): learn.check_channelslast(raise_on_wrong=True)

def test_fastais_own_losses_are_compared_in_double():
    "fastai's flattened losses cast to single precision; the reference must not"
    from fastxtend_cl.step import TrainingStep
    step = TrainingStep.from_learner(learner(network()))
    with step.preserved(): assert step.run(dtype=torch.float64).loss.dtype==torch.float64

def test_too_large_for_double_precision_is_inconclusive():
    res = check_formats(step_of(network()), memory=1e5)
    assert res.ok is None and not res.rows and 'needs about' in res.reason and res.reason.endswith('are free: use a smaller batch')

def test_result_is_a_value():
    import json
    res = check_formats(step_of(network(Faulty())))
    d = json.loads(json.dumps(res.to_dict()))
    assert d['ok'] is False and d['wrong']==res.wrong and len(d['rows'])==len(res.rows) and d['conditions']['device']=='cpu'
    assert (repr(res),res._repr_markdown_(),f'{[res]}')==(f'wrong: {res.reason}', f'**wrong**: {res.reason}', f'[wrong: {res.reason}]')

class Shifted(nn.Module):
    "In fp32 and channels last all pixels of a channel are off alike, as from a mean that was summed in single precision"
    def forward(self, x):
        off = x.dtype==torch.float32 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return x + 1e-5*torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:,None,None] if off else x*1

def test_errors_that_pixels_share_are_measured_and_planted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Shifted(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    runs,call = check._RecordedRuns(step_of(model)),('1', 0)
    exact = runs('contiguous', torch.float64)[1]
    measured,base = (runs(f, None)[1].shared_error(exact, 'forward', call) for f in ('channels_last', 'contiguous'))
    planted = runs.with_noise(None, 0)[1].shared_error(exact, 'forward', call)
    assert base<1e-6<3e-6<measured<1e-4 and measured/4<planted<4*measured
    assert check_formats(step_of(model)).ok

def test_relative_error():
    x = torch.randn(5).double()
    assert check.relative_error(x, x)==0 and math.isclose(check.relative_error(1.1*x, x), 0.1, rel_tol=1e-9)
    assert check.relative_error(x*math.nan, x)==check.relative_error(x[:2], x)==math.inf and check.relative_error(torch.ones(4), torch.zeros(4))==2

@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_networks_are_not_wrong(data):
    draw,layers,c,size = data.draw,[],3,16
    for _ in range(draw(st.integers(1, 4))):
        o = draw(st.sampled_from((4, 8, 12)))
        kind = draw(st.sampled_from(('conv', 'depthwise', 'pool', 'norm', 'instance', 'up', 'act', 'transposed')))
        if kind=='conv': layers.append(nn.Conv2d(c, o, 3, padding=1, stride=draw(st.integers(1, 2)))); c = o
        elif kind=='depthwise': layers.append(nn.Conv2d(c, c, 3, padding=1, groups=c))
        elif kind=='transposed': layers.append(nn.ConvTranspose2d(c, o, 2, stride=2)); c = o
        else:
            layers.append({'pool': nn.MaxPool2d(3, 2, 1), 'norm': nn.BatchNorm2d(c),
                'instance': nn.InstanceNorm2d(c, affine=True), 'up': nn.Upsample(scale_factor=2), 'act': nn.GELU()}[kind])
    torch.manual_seed(draw(st.integers(0, 99)))
    layers.append(nn.Conv2d(c, 4, 1))
    res = check_formats(step_of(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)),
        bs=draw(st.integers(2, 4)), size=size))
    assert res.ok is not False, str(res)

def test_without_time_less_is_measured_and_reported():
    "Planted faults are found all the same"
    right = check_formats(step_of(network(), autocast=torch.bfloat16), seconds=1e-6)
    assert right.ok is True and {r.precision for r in right.rows}=={'bf16'} and 'left out to finish in about 1e-06 s: ' in right.reason
    assert {'double precision in the run with planted errors', 'the comparison in fp32'} <= {*right.conditions['left_out']}
    for fault in (Faulty(), FaultyForward()):
        found = check_formats(step_of(network(fault)), seconds=1e-6)
        assert found.ok is False and found.first['module']=='2'
    assert check_formats(step_of(network()), seconds=1e6).conditions['left_out']==[]
    with pytest.raises(ValueError, match='seconds must be above 0, got 0'): check_formats(step_of(network()), seconds=0)

@pytest.mark.parametrize('fault,module', [(None, None), (Faulty, '2'), (FaultyForward, '2')])
def test_a_large_step_is_checked_with_some_items_of_the_batch(fault, module):
    step = step_of(network(*[f() for f in [fault] if f]), bs=24)
    before = snapshot(step.model)
    res = check_formats(step, seconds=1e-6)
    assert '20 of 24 items of the batch' in res.reason and res.conditions['shape'][0]==4 and len(step.inputs[0])==24
    assert res.ok is (fault is None) and (fault is None or res.first['module']==module)
    assert_same_snapshot(snapshot(step.model), before)

def test_batches_without_items_are_not_cut():
    step = step_of(network(), bs=24)
    uneven = TrainingStep(step.model, step.inputs, (step.targets[0], torch.zeros(3)), lambda p, y, z: F.cross_entropy(p, y))
    for s in (uneven, step_of(network(), bs=5)):
        assert not any('items of the batch' in o for o in check_formats(s, seconds=1e-6).conditions['left_out'])
    assert not any('items of the batch' in o for o in check_formats(step, seconds=1e6).conditions['left_out'])

def test_without_time_randomness_is_still_seen():
    import time
    class Clock(nn.Module):
        def forward(self, x): return x*(1 + (time.perf_counter_ns()%1000)/1000)
    assert 'two runs of the same step from the same seed differ' in check_formats(step_of(network(Clock())), seconds=1e-6).reason

def test_the_sentence_has_the_largest_error_and_the_table_all():
    right,wrong = check_formats(step_of(network())),check_formats(step_of(network(Faulty())))
    for res in (right, wrong):
        worst = max((r for r in res.rows if r.verdict==res.verdict), key=lambda r: r.channels_last/r.allowed)
        assert '\n' not in str(res) and f'the largest error is {worst.channels_last/worst.allowed:.2g} times the allowed one ({worst})' in res.reason
        lines = res.table().splitlines()
        assert len(lines)==len(res.rows)+1 and lines[0].split('  ')[0]=='verdict' and lines[1].startswith(res.verdict)
    kinds = [str(check.CheckRow(k, 'a', 'fp32', 0, 0, 1, 'OK')) for k in ('loss', 'output', 'gradient', 'weight', 'buffer')]
    assert kinds==['the loss in fp32', 'a in fp32', 'the gradient of `a` in fp32', 'the weight `a` in fp32', 'the buffer `a` in fp32']

def test_a_result_that_is_not_finite_is_wrong():
    class Infinite(nn.Module):
        def forward(self, x): return x if x.is_contiguous() or x.dtype==torch.float64 else x*float('inf')
    class Side(nn.Module):
        "Outputs what the loss does not read"
        def __init__(self): super().__init__(); self.net,self.fault = network(),Infinite()
        def forward(self, x): return self.net(x),self.fault(self.net[0][0](x))
    res = check_formats(TrainingStep(Side(), torch.randn(8, 3, 24, 24), torch.randint(0, 4, (8,)), lambda out,y: F.cross_entropy(out[0], y)))
    assert res.ok is False and res.wrong==['output 1'] and 'the largest error is not finite (output 1 in fp32)' in res.reason

def test_the_bar_shows_after_two_seconds(monkeypatch):
    shown = []
    class Bar:
        def __init__(self, gen, leave): shown.append(gen)
        def update(self, n): shown.append(n)
    monkeypatch.setattr(timing, 'progress_bar', Bar)
    def slow(bar):
        budget = check._TimeBudget(15., bar)
        budget.progress.shown_from -= 3
        budget.count_run(False); budget.progress.done()
        return shown
    assert slow(False)==[] and slow(True)==[range(100), 0, 20, 100]
    assert check._TimeBudget(15., True).progress.bar is None
