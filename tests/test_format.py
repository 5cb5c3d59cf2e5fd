"Models, gradients and optimizer state change their format together, all or nothing, and formats are what torch says they are"
import pickle
import warnings
from copy import deepcopy
from functools import partial
import pytest
import torch
from accelerate import Accelerator
from fastai import optimizer as fastai_optim
from fastai.optimizer import OptimWrapper
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from helpers import (all_tensors, assert_same_snapshot, furthest, images, mixed, naive_channels_last, naive_contiguous,
    process_group, snapshot, state_follows, strides)
from fastxtend_cl import convert
from fastxtend_cl.convert import FormatWarning, NoConvolutionWarning, align_optimizer_state, apply_channels_last, apply_contiguous, temporarily_contiguous, convert_format
from fastxtend_cl.layout import (as_channels_last, as_contiguous, channels_last_formats, dense_like, dense_strides, format_of, is_channels_last,
    is_expanded, layout_of, restride, torch_format, with_strides)

def formats(model): return {n:format_of(p) for n,p in model.named_parameters() if p.ndim>3}

# What is converted

def test_mixed_model_converts_convolutions_and_nothing_else():
    model = mixed()
    before = strides(model)
    assert apply_channels_last(model) is model
    assert formats(model)=={'stem.weight': 'channels_last', 'body.weight': 'channels_last',
        'depthwise.weight': 'ambiguous', 'grouped.weight': 'channels_last',
        'pointwise.weight': 'ambiguous', 'up.weight': 'channels_last', 'volume.weight': 'ambiguous', 'pos': 'contiguous'}
    changed = {n for n,s in strides(model).items() if s!=before[n]}
    assert changed=={f'{n}.weight' for n in ('stem', 'body', 'depthwise', 'grouped', 'pointwise', 'up', 'volume')}

def test_ambiguous_weights_get_the_strides_that_kernels_read():
    model = apply_channels_last(mixed())
    assert model.pointwise.weight.stride()==(8, 1, 8, 8)
    assert model.depthwise.weight.stride()==(9, 1, 3, 1)

def test_round_trip_of_a_mixed_model():
    model = mixed()
    before = snapshot(model)
    apply_channels_last(model)
    assert_same_snapshot(before, snapshot(apply_contiguous(model)))

def test_output_and_gradients_equal_the_contiguous_ones():
    a,b = mixed(),apply_channels_last(mixed())
    for m in (a, b): m(images()).square().sum().backward()
    for p,q in zip(a.parameters(), b.parameters()):
        if p.grad is not None: torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10)

def test_position_embedding_can_still_be_viewed_where_torchs_own_conversion_fails():
    model = apply_channels_last(mixed())
    assert model.pos.view(-1).shape==(1024,)
    with pytest.raises(RuntimeError, match='rank 4|view size'): mixed().to(memory_format=torch.channels_last)(images())

def test_5d_weights_become_channels_last_3d():
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 2, 2))
    apply_channels_last(model)
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last_3d) and format_of(m.weight)=='channels_last' for m in model)

def test_conv1d_and_linear_stay():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.warns(NoConvolutionWarning): apply_channels_last(model)
    assert_same_snapshot(before, snapshot(model))

def test_frozen_weights_are_converted_and_stay_frozen():
    model = mixed()
    model.requires_grad_(False)
    apply_channels_last(model)
    assert format_of(model.stem.weight)=='channels_last' and not any(p.requires_grad for p in model.parameters())

def test_apply_contiguous_undoes_torchs_own_conversion():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
    before = strides(model)
    model.to(memory_format=torch.channels_last)
    model.register_parameter('pos', nn.Parameter(torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last)))
    apply_contiguous(model)
    assert {n:s for n,s in strides(model).items() if n!='pos'}==before
    assert format_of(model.pos)=='contiguous'

def test_twice_is_once():
    model = apply_channels_last(mixed())
    pointers = [p.data_ptr() for p in model.parameters()]
    apply_channels_last(model)
    assert pointers==[p.data_ptr() for p in model.parameters()]

def norms():
    w,s = torch.nn.utils.weight_norm,torch.nn.utils.spectral_norm
    return {'weight_norm': parametrizations.weight_norm, 'spectral_norm': parametrizations.spectral_norm,
        'old_weight_norm': w, 'old_spectral_norm': s}

@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated')
@pytest.mark.parametrize('conv', [nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d])
@pytest.mark.parametrize('norm', norms())
def test_normed_convolutions(norm, conv):
    def train(convert):
        torch.manual_seed(0)
        model = nn.Sequential(norms()[norm](conv(3, 4, 3)), nn.Flatten(), nn.LazyLinear(2)).double()
        x = torch.randn(2, 3, *(5,)*(3 if conv is nn.Conv3d else 2), dtype=torch.float64)
        model(x)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for i in range(6):
            if i==2 and convert: apply_channels_last(model, opt)
            if i==4 and convert: apply_contiguous(model, opt)
            if i==3 and convert:
                owned = [p for n,p in model.named_parameters() if p.ndim>3 and p.numel()>4]
                assert [format_of(p) for p in owned]==['channels_last'] and state_follows(model, opt)
            model(x).square().sum().backward(); opt.step(); opt.zero_grad()
        return model
    assert furthest(train(False), train(True))<1e-10

# Ties, slices and what has no strides to set

def test_tied_by_object_stays_one_object():
    model = apply_channels_last(mixed())
    assert model.tied.weight is model.body.weight and format_of(model.tied.weight)=='channels_last'

def tied_by_data():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight.data = model[0].weight.data
    return model

def test_tied_by_data_moves_together():
    model = tied_by_data()
    for to,expected in ((apply_channels_last, 'channels_last'), (apply_contiguous, 'contiguous')):
        to(model)
        assert [format_of(m.weight) for m in model]==[expected]*2
        assert model[0].weight.data_ptr()==model[1].weight.data_ptr()
        with torch.no_grad(): model[0].weight += 1
        assert torch.equal(model[0].weight, model[1].weight)

def test_slices_of_a_flat_buffer_are_left_alone_with_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    flat = torch.cat([m.weight.detach().flatten() for m in model[:2]])
    model[0].weight.data,model[1].weight.data = flat[:108].view(4, 3, 3, 3),flat[108:].view(4, 4, 3, 3)
    with pytest.warns(FormatWarning, match=r'2 of 3 convolution parameters cannot be converted: '
            r'0\.weight, because it .*memory|slice') as caught:
        apply_channels_last(model)
    assert len(caught)==1
    assert [format_of(m.weight) for m in model]==['contiguous', 'contiguous', 'channels_last']
    flat.zero_()
    assert not model[0].weight.any() and not model[1].weight.any()

def test_tied_by_a_transposed_view_is_left_alone_with_a_warning():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    model[1].weight.data = model[0].weight.data.transpose(0, 1)
    with pytest.warns(FormatWarning, match='0.weight, because it shares memory with another tensor of the model; 1.weight'):
        apply_channels_last(model)
    assert model[0].weight.data_ptr()==model[1].weight.data_ptr()

def test_shared_with_other_processes_is_left_alone_with_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).share_memory()
    with pytest.warns(FormatWarning, match='0.weight, because .*shared'): apply_channels_last(model)
    assert model[0].weight.is_shared()

def test_inside_inference_mode_a_model_stays_trainable():
    model = mixed()
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    model(images()).sum().backward(); opt.step()
    with torch.inference_mode(): apply_channels_last(model, opt)
    model(images()).sum().backward(); opt.step()
    assert state_follows(model, opt)

def left_alone(make):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    del model[0].weight
    model[0].weight = nn.Parameter(make(torch.randn(4, 4, 3, 3)), requires_grad=False)
    return model

@pytest.mark.filterwarnings('ignore:.*nested tensors:UserWarning', 'ignore:.*quantiz')
@pytest.mark.parametrize('make,why', [
    (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), 'it is quantized'),
    (lambda t: t.to_sparse(), 'its layout is torch.sparse_coo'),
    (lambda t: t.to('meta'), 'it is on the meta device and has no values'),
    (lambda t: t.to_mkldnn(), 'its layout is torch._mkldnn'),
    (lambda t: torch.nested.nested_tensor(list(t.unbind())), 'nested'),
], ids=['quantized', 'sparse', 'meta', 'mkldnn', 'nested'])
def test_weights_without_strides_to_set_are_left_alone_with_a_warning(make, why):
    model = left_alone(make)
    weight = model[0].weight
    with pytest.warns(FormatWarning) as caught: apply_channels_last(model)
    assert model[0].weight is weight and format_of(model[1].weight)=='channels_last'
    assert [f'1 of 2 convolution parameters cannot be converted: 0.weight, because' in str(w.message)
        and why in str(w.message) for w in caught]==[True]
    assert format_of(apply_contiguous(model)[1].weight)=='contiguous'

def test_only_three_names_are_listed():
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, device='meta') for _ in range(5)])
    with pytest.warns(FormatWarning, match='; and 2 more$'): apply_channels_last(model)

def test_a_model_with_values_after_meta_is_converted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device='meta'))
    with pytest.warns(FormatWarning, match='convert again once it has'): apply_channels_last(model)
    model.to_empty(device='cpu')
    assert format_of(apply_channels_last(model)[0].weight)=='channels_last'

def test_quantized_module_has_nothing_to_convert():
    with pytest.warns(NoConvolutionWarning): apply_channels_last(torch.ao.nn.quantized.Conv2d(3, 4, 3))

# Lazy layers

def lazy(): return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConvTranspose2d(4, 2), nn.Flatten(1), nn.LazyLinear(2))
def lazy_formats(model): return [format_of(model[i].weight) for i in (0, 2)]

def test_lazy_layers_are_converted_at_their_first_forward():
    model = apply_channels_last(lazy())
    assert lazy_formats(model)==[None, None]
    model(images(dtype=torch.float32))
    assert lazy_formats(model)==['channels_last']*2
    assert not any(m._forward_pre_hooks for m in model)

def test_lazy_layers_undone():
    model = apply_contiguous(apply_channels_last(lazy()))
    model(images(dtype=torch.float32))
    assert lazy_formats(model)==['contiguous']*2

def test_lazy_layers_twice_have_one_hook():
    model = apply_channels_last(apply_channels_last(lazy()))
    assert ([len(m._forward_pre_hooks) for m in model]
        ==[len(m._forward_pre_hooks)+1 if i in (0,2) else len(m._forward_pre_hooks) for i,m in enumerate(lazy())])

@pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_lazy_layers_copied_while_pending(copy):
    model = apply_channels_last(lazy())
    other = copy(model)
    other(images(dtype=torch.float32))
    assert lazy_formats(other)==['channels_last']*2 and lazy_formats(model)==[None, None]
    model(images(dtype=torch.float32))
    assert lazy_formats(model)==['channels_last']*2

def test_temporarily_contiguous_keeps_the_pending_conversion():
    model = apply_channels_last(lazy())
    with temporarily_contiguous(model): assert b'fastxtend_cl' not in pickle.dumps(model)
    model(images(dtype=torch.float32))
    assert lazy_formats(model)==['channels_last']*2

# Bad input

def test_model_without_convolution():
    with pytest.warns(NoConvolutionWarning,
            match='channels last has no effect: Sequential has no convolution of two or three dimensions') as caught:
        apply_channels_last(nn.Sequential())
    assert len(caught)==1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        apply_contiguous(nn.Sequential())

@pytest.mark.parametrize('f', [apply_channels_last, apply_contiguous, lambda m: align_optimizer_state(m, [])])
def test_wrong_model(f):
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got Tensor$'): f(torch.zeros(1))
    holder = type('Holder', (), {'model': nn.Linear(1, 1)})()
    with pytest.raises(TypeError, match='got Holder: pass its model, or call its own method'): f(holder)

@pytest.mark.parametrize('wrong', [3, 'adam', [torch.optim.SGD([torch.zeros(1)], lr=1), 3], lambda ps: ps])
def test_wrong_optimizer(wrong):
    model = mixed()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r'optimizers must be an optimizer or a list of them, got (int|str|function), '
            r'which has no `state` by parameter'):
        apply_channels_last(model, wrong)
    assert_same_snapshot(before, snapshot(model))

def test_wrong_format():
    with pytest.raises(ValueError, match="to must be 'channels_last' or 'contiguous', got 'nhwc'"):
        convert_format(mixed(), 'nhwc')

@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: OptimWrapper(opt=o)], ids=['torch', 'OptimWrapper'])
def test_lbfgs(wrap):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    opt = wrap(torch.optim.LBFGS(model.parameters()))
    before = snapshot(model)
    with pytest.raises(ValueError,
            match=r'LBFGS flattens gradients with `.view\(-1\)`.*use another optimizer, or stay contiguous'):
        apply_channels_last(model, opt)
    assert_same_snapshot(before, snapshot(model))
    apply_contiguous(model, opt)

@pytest.fixture
def one_process_group(tmp_path):
    with process_group(init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1): yield

def test_ddp_wrapped_model_raises_and_is_unchanged(one_process_group):
    for inner,f in ((mixed(), apply_channels_last), (apply_channels_last(mixed()), apply_contiguous)):
        model = DistributedDataParallel(inner, find_unused_parameters=True)
        before = snapshot(model)
        with pytest.raises(ValueError, match='wrapped in DistributedDataParallel.*convert it first, then wrap it'): f(model)
        assert_same_snapshot(before, snapshot(model))
    assert apply_channels_last(DistributedDataParallel(apply_channels_last(mixed())))

def test_optimizer_state_of_a_ddp_wrapped_model_is_converted(one_process_group):
    "A checkpoint that was saved contiguous, loaded after wrapping: the buckets hold no state"
    def started():
        model = mixed()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(images()).sum().backward(); opt.step(); opt.zero_grad()
        return model,opt
    checkpoint = deepcopy(started()[1].state_dict())
    model,opt = started()
    apply_channels_last(model, opt)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    opt.load_state_dict(checkpoint)
    def follow(): return all(t.stride()==p.stride() for p,s in opt.state.items() for t in s.values() if t.shape==p.shape)
    assert not follow()
    apply_channels_last(wrapped, opt)
    assert follow() and formats(model)['stem.weight']=='channels_last'

# What follows a parameter

def test_gradients_go_along_as_the_same_objects():
    model = mixed()
    model(images()).sum().backward()
    grads = {n:(id(p.grad), p.grad.clone()) for n,p in model.named_parameters() if p.grad is not None}
    for convert in (apply_channels_last, apply_contiguous):
        convert(model)
        for n,p in model.named_parameters():
            if n in grads: assert (id(p.grad), p.grad.stride())==(grads[n][0], p.stride()) and torch.equal(p.grad, grads[n][1])

def test_accumulation_over_a_conversion():
    a,b = mixed(),mixed()
    for m in (a, b): m(images()).sum().backward()
    apply_channels_last(b)
    for m in (a, b): m(images(seed=1)).sum().backward()
    for p,q in zip(a.parameters(), b.parameters()):
        if p.grad is not None: torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10)

def variants():
    kinds = [('Adam', {}), ('Adam', dict(amsgrad=True)), ('AdamW', {}), ('AdamW', dict(amsgrad=True)), ('SGD', dict(momentum=0.9)),
        ('SGD', dict(momentum=0.9, nesterov=True)), ('Adagrad', {}), ('RMSprop', {}), ('RMSprop', dict(momentum=0.9)),
        ('RMSprop', dict(centered=True))]
    for name,kw in kinds:
        for how in (dict(foreach=False), dict(foreach=True), dict(fused=True)):
            make = partial(getattr(torch.optim, name), lr=0.01, **kw, **how)
            try: make([nn.Parameter(torch.zeros(1))])
            except (TypeError, RuntimeError): continue
            yield '-'.join([name, *kw, next(k+str(v) for k,v in how.items())]),make

torch_variants = dict(variants())
wrapped_variants = {f'OptimWrapper-{n}':partial(OptimWrapper, opt=make) for n,make in torch_variants.items()}
fastai_variants = {n:partial(getattr(fastai_optim, f), lr=0.01, **kw)
    for n,f,kw in (('fastai-Adam', 'Adam', dict(wd=0.1)), ('fastai-SGD', 'SGD', dict(mom=0.9)),
    ('fastai-RMSProp', 'RMSProp', dict(mom=0.9)), ('fastai-RAdam', 'RAdam', {}), ('fastai-Lamb', 'Lamb', {}),
    ('fastai-Larc', 'Larc', {}), ('fastai-QHAdam', 'QHAdam', {}), ('fastai-ranger', 'ranger', dict(k=2)))}
all_variants = {**torch_variants, **wrapped_variants, **fastai_variants}
fused_variants = [n for n in all_variants if 'fused' in n]

def test_variants_cover_what_torch_offers():
    assert {'SGD-momentum-foreachFalse', 'RMSprop-centered-foreachTrue', 'Adam-fusedTrue', 'AdamW-amsgrad-fusedTrue',
        'SGD-momentum-fusedTrue', 'Adagrad-fusedTrue'} <= set(all_variants)

def six_steps(make, convert=None, back=None, dtype=torch.float64, given=False):
    "Train a mixed model six steps; `given` gradients are the same random ones in every format"
    model,rng = mixed(dtype=dtype),torch.Generator().manual_seed(1)
    opt = make([p for p in model.parameters() if p.requires_grad])
    for i in range(6):
        if i==2 and convert: convert(model, opt)
        if i==4 and back: back(model, opt)
        if not given: model(images(dtype=dtype, seed=i)).square().sum().backward()
        else:
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.empty_strided(p.shape, p.stride(),
                        dtype=dtype).copy_(torch.randn(p.shape, generator=rng, dtype=dtype))
        opt.step(); opt.zero_grad()
        if convert is apply_channels_last: assert i<1 or state_follows(model, opt), f'state after step {i}'
    return model

@pytest.mark.parametrize('name', all_variants)
def test_six_steps_with_conversions_equal_six_without(name):
    make = all_variants[name]
    assert furthest(six_steps(make), six_steps(make, apply_channels_last, apply_contiguous))<1e-10

@pytest.mark.parametrize('name', all_variants)
def test_six_steps_in_fp32_from_given_gradients(name):
    make = partial(six_steps, all_variants[name], dtype=torch.float32, given=True)
    assert furthest(make(), make(apply_channels_last, apply_contiguous))<1e-6

@pytest.mark.parametrize('name', fused_variants)
def test_the_comparison_catches_the_naive_conversion(name):
    make = partial(six_steps, all_variants[name], given=True)
    assert furthest(make(), make(naive_channels_last, naive_contiguous))>1e-4

@pytest.mark.parametrize('name', ['AdamW-fusedTrue', 'OptimWrapper-AdamW-fusedTrue', 'fastai-Adam', 'fastai-ranger'])
@pytest.mark.parametrize('follow', [apply_channels_last, align_optimizer_state])
def test_state_of_a_checkpoint_in_the_other_format(name, follow):
    def train(convert):
        model = mixed()
        opt = all_variants[name]([p for p in model.parameters() if p.requires_grad])
        def step():
            model(images()).square().sum().backward(); opt.step(); opt.zero_grad()
        step(); step()
        if convert:
            checkpoint = deepcopy(opt.state_dict())
            apply_channels_last(model, opt)
            opt.load_state_dict(checkpoint)
            assert not state_follows(model, opt)
            follow(model, opt)
            assert state_follows(model, opt)
        step(); step()
        return model
    assert furthest(train(False), train(True))<1e-10

def test_several_optimizers():
    model = mixed()
    heads = [list(model.stem.parameters()), list(model.body.parameters())]
    opts = [torch.optim.AdamW(ps, fused=True) for ps in heads]
    model(images()).sum().backward()
    for o in opts: o.step()
    for arg in (opts, tuple(opts)):
        for convert in (apply_channels_last, apply_contiguous):
            convert(model, arg)
            assert all(s['exp_avg'].stride()==p.stride() for o in opts for p,s in o.state.items())

def test_accelerates_wrapper():
    model = mixed()
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    model(images()).sum().backward(); opt.step()
    apply_channels_last(model, Accelerator(cpu=True).prepare(opt))
    assert state_follows(model, opt)

@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: OptimWrapper(opt=o), lambda o: Accelerator(cpu=True).prepare(o)],
    ids=['torch', 'OptimWrapper', 'accelerate'])
def test_each_tensor_is_moved_once(wrap, monkeypatch):
    model,moved,restride = nn.Sequential(nn.Conv2d(3, 4, 3)),[],convert.restride
    opt = wrap(torch.optim.AdamW(model.parameters()))
    model(images(dtype=torch.float32)).sum().backward(); opt.step()
    monkeypatch.setattr(convert, 'restride', lambda t,stride: (moved.append(id(t)), restride(t, stride))[1])
    apply_channels_last(model, opt)
    assert len(moved)==len(set(moved))==4

def test_conversion_between_forward_and_backward():
    a,b = mixed(),mixed()
    losses = [m(images()).square().sum() for m in (a, b)]
    apply_channels_last(b)
    for l in losses: l.backward()
    for p,q in zip(a.parameters(), b.parameters()):
        if p.grad is not None: torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10)

def test_lookahead_slow_weights_follow():
    model = mixed()
    opt = fastai_optim.ranger(list(model.parameters()), lr=0.01)
    model(images()).sum().backward(); opt.step()
    apply_channels_last(model, opt)
    assert all(s.stride()==p.stride() for ss,ps in zip(opt.slow_weights, opt.param_lists) for s,p in zip(ss, ps))

# All or nothing

def trained():
    model = tied_by_data().append(nn.Conv2d(4, 2, 3)).append(nn.BatchNorm2d(2))
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 4, 9, 9)).square().sum().backward(); opt.step()
    return model,opt

@pytest.mark.parametrize('error', [MemoryError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize('there,back', [(apply_channels_last, apply_contiguous), (apply_contiguous, apply_channels_last)])
def test_a_failure_at_any_tensor_leaves_all_as_it_was(there, back, error, monkeypatch):
    model,opt = trained()
    back(model, opt)
    before,restride,calls = snapshot(model, opt),convert.restride,[]
    def failing(at):
        def f(*args):
            calls.append(1)
            if len(calls)==at: raise error('planted')
            return restride(*args)
        return f
    for k in range(1, 100):
        calls.clear()
        monkeypatch.setattr(convert, 'restride', failing(k))
        try: there(model, opt)
        except error: assert_same_snapshot(before, snapshot(model, opt))
        else: break
        assert model[0].weight.data_ptr()==model[1].weight.data_ptr()
    assert k>8 and state_follows(model, opt)
    assert [s for _,s,_ in before]!=[t.stride() for t in all_tensors(model, opt)]

class InterruptedOnce(nn.Parameter):
    "Ctrl-C comes just when it gets new memory, the first time"
    armed = False
    @property
    def data(self): return torch.Tensor.data.__get__(self)
    @data.setter
    def data(self, new):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        torch.Tensor.data.__set__(self, new)

def test_an_interrupt_between_two_tied_tensors():
    model = tied_by_data()
    model[1].weight = InterruptedOnce(model[0].weight.data)
    assert model[0].weight.data_ptr()==model[1].weight.data_ptr()
    before = snapshot(model)
    model[1].weight.armed = True
    with pytest.raises(KeyboardInterrupt): apply_channels_last(model)
    assert_same_snapshot(before, snapshot(model))
    assert not model[1].weight.armed and model[0].weight.data_ptr()==model[1].weight.data_ptr()

@pytest.mark.parametrize('buffer', [torch.ones(()), torch.ones(999)[:1]], ids=['scalar', 'slice'])
def test_a_failure_takes_back_a_gradient_that_is_expanded(buffer, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    for m in model: m.weight.grad = buffer.expand_as(m.weight)
    before,restride,calls = [t.stride() for t in all_tensors(model)],convert.restride,[]
    def fourth(*args):
        calls.append(1)
        if len(calls)==4: raise MemoryError('planted')
        return restride(*args)
    monkeypatch.setattr(convert, 'restride', fourth)
    with pytest.raises(MemoryError, match='planted'): apply_channels_last(model)
    assert [t.stride() for t in all_tensors(model)]==before

# Random models

conv_kinds = {1: [nn.Conv1d], 2: [nn.Conv2d, nn.ConvTranspose2d], 3: [nn.Conv3d, nn.ConvTranspose3d]}

@st.composite
def layers(draw):
    kind = draw(st.sampled_from(['conv', 'linear', 'bn', 'pos', 'tie']))
    if kind!='conv': return kind
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    return draw(st.sampled_from(conv_kinds[dims])),groups*draw(st.integers(1, 3)),groups*draw(st.integers(1, 3)),kernel,groups

class Pos(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 3, 2, 2))

def build(specs):
    model = nn.Sequential()
    for spec in specs:
        convs = [m for m in model if isinstance(m, (nn.Conv2d, nn.Conv3d))]
        if spec=='linear': model.append(nn.Linear(2, 3))
        elif spec=='bn': model.append(nn.BatchNorm2d(3))
        elif spec=='pos': model.append(Pos())
        elif spec=='tie' and convs: model.append(deepcopy(convs[-1])); model[-1].weight = convs[-1].weight
        elif spec!='tie':
            cls,i,o,kernel,groups = spec
            model.append(cls(i, o, kernel, groups=groups))
    return model

def give_state(model):
    opt = torch.optim.AdamW(list(model.parameters()) or [torch.zeros(1)])
    for p in model.parameters(): p.grad = torch.randn_like(p)
    opt.step()
    return opt

@settings(max_examples=60, deadline=None)
@given(st.lists(layers(), max_size=6))
def test_random_models_round_trip(specs):
    model = build(specs)
    opt = give_state(model)
    before = snapshot(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        apply_channels_last(model, opt)
    after = snapshot(model, opt)
    assert [o[0] for o in before]==[o[0] for o in after] and all(torch.equal(a[2], b[2]) for a,b in zip(before, after))
    assert state_follows(model, opt)
    for m in model:
        for p in m.parameters(recurse=False):
            converted = isinstance(m, (nn.modules.conv._ConvNd)) and p.ndim in (4, 5)
            if p.ndim>3: assert format_of(p) in (('channels_last', 'ambiguous') if converted else ('contiguous', 'ambiguous'))
    apply_contiguous(model, opt)
    assert_same_snapshot(before, snapshot(model, opt))

def dense_in_order(t, order):
    "By definition: walking `t` in `order` of its dimensions, last fastest, meets memory without a gap; a size of 1 is never walked"
    step = 1
    for d in reversed(order):
        if t.shape[d]!=1 and t.stride(d)!=step: return False
        step *= t.shape[d]
    return True

def brute_format(t):
    if t.ndim not in (4, 5): return None
    space = tuple(range(2, t.ndim))
    found = dense_in_order(t, (0, 1, *space)),dense_in_order(t, (0, *space, 1))
    return {(True, False): 'contiguous', (False, True): 'channels_last', (True, True): 'ambiguous', (False, False): 'neither'}[found]

@st.composite
def strided(draw):
    ndim = draw(st.integers(2, 6))
    t = torch.zeros([draw(st.integers(1, 4)) for _ in range(ndim)])
    t = t.permute(draw(st.permutations(range(ndim)))) if draw(st.booleans()) else t
    if ndim in (4, 5) and draw(st.booleans()): t = t.to(memory_format=torch.channels_last if ndim==4 else torch.channels_last_3d)
    if draw(st.booleans()): t = t[(slice(None),)*draw(st.integers(0, ndim-1)) + (slice(0, None, draw(st.integers(1, 2))),)]
    return t

@settings(max_examples=300, deadline=None)
@given(strided())
def test_format_of_agrees_with_its_definition(t): assert format_of(t)==brute_format(t)

def test_format_of_takes_only_tensors():
    with pytest.raises(TypeError, match='t must be a torch.Tensor, got list'): format_of([1])

# Layouts, compared with torch's own answers

@st.composite
def permuted(draw, min_size=1):
    "A dense tensor of random numbers with its dimensions in any order"
    ndim = draw(st.integers(2, 5))
    t = torch.randn([draw(st.integers(min_size, 4)) for _ in range(ndim)])
    return t.permute(draw(st.permutations(range(ndim))))

@settings(max_examples=200, deadline=None)
@given(permuted(min_size=0))
def test_strides_are_those_that_torch_gives(t):
    for memory_format in (torch.contiguous_format, *(f for n,f in channels_last_formats.items() if n==t.ndim)):
        assert dense_strides(t.shape, memory_format)==torch.empty(t.shape, memory_format=memory_format).stride()
    def used(stride): return [s for s,n in zip(stride, t.shape) if n>1]
    if t.numel(): assert used(dense_like(t.shape, t.stride()))==used(torch.empty_like(t).stride())

@settings(max_examples=200, deadline=None)
@given(permuted(), st.randoms())
def test_copies_with_other_strides(t, rng):
    order = rng.sample(range(t.ndim), t.ndim)
    stride = torch.empty([t.shape[d] for d in order]).permute([order.index(d) for d in range(t.ndim)]).stride()
    for a in (restride(t, stride), with_strides(t, stride)):
        assert torch.equal(a, t) and a.stride()==stride and a.dtype==t.dtype and not a.requires_grad
    assert restride(t, t.stride()).data_ptr()!=t.data_ptr() and with_strides(t, t.stride()) is t
    half = with_strides(t, stride, torch.bfloat16)
    assert half.dtype==torch.bfloat16 and half.stride()==stride and torch.equal(half, t.bfloat16())

@settings(max_examples=200, deadline=None)
@given(permuted())
def test_there_and_back(t):
    there = as_channels_last(t)
    assert torch.equal(there, t)
    if t.ndim not in channels_last_formats: assert there is t
    else:
        assert format_of(there) in ('channels_last', 'ambiguous') and there.stride()==t.to(memory_format=channels_last_formats[t.ndim]).stride()
        back = as_contiguous(there)
        assert torch.equal(back, t) and back.stride()==dense_strides(t.shape)
        assert as_contiguous(back) is back and (as_channels_last(there) is there or format_of(there)=='ambiguous') # of which `to` makes a copy

@settings(max_examples=200, deadline=None)
@given(strided())
def test_order_of_any_tensor(t):
    "A tensor with gaps is in the order in which its dense copy is; channels last beyond doubt is what torch says, with several channels"
    dense = torch.empty_like(t)
    assert layout_of(dense)==format_of(dense) or format_of(dense)=='neither'
    layout = layout_of(t)
    assert (layout is None)==(t.ndim not in (4, 5)) and (layout=='sliced')<=(format_of(t)=='neither')
    if layout=='sliced': assert format_of(dense) in ('channels_last', 'ambiguous')
    if layout=='contiguous': assert dense.is_contiguous()
    several = t.ndim in (4, 5) and t.shape[1]>1 and t.stride(1)==1
    assert is_channels_last(t)==(several and t.is_contiguous(memory_format=channels_last_formats[t.ndim]))
    assert torch_format(t)==(channels_last_formats[t.ndim] if several else torch.contiguous_format)

@settings(max_examples=200, deadline=None)
@given(permuted(), st.data())
def test_expanded_is_what_torch_does_not_write_to(t, data):
    t = t[tuple(slice(0, 1) if data.draw(st.booleans()) else slice(None) for _ in t.shape)]
    t = t.expand([n if n>1 else data.draw(st.integers(1, 3)) for n in t.shape])
    try: t.add_(0)
    except RuntimeError as e: assert is_expanded(t) and 'single memory location' in str(e)
    else: assert not is_expanded(t)
