"A step runs in any format and precision, and `preserved` restores everything, whatever happens"
import random, signal, subprocess, sys, time, types
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch
from fastai import optimizer as fo
from fastai.callback.mixup import MixUp
from fastai.vision.all import (Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders,
    DynamicUnet, ImageBlock, Learner,
    MixedPrecision, OptimWrapper, PILImage, RandomSplitter, TensorImage, Transform, aug_transforms, before_batch_cb, params, xresnet18)
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.torch_core import TensorBase
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
import fastxtend_cl.channelslast, fastxtend_cl.learner
from fastxtend_cl import preserve
from fastxtend_cl.amp import DeviceMixedPrecision
from fastxtend_cl.callbacks import ChannelsLastTfm
from fastxtend_cl.kernels import fixed_kernels, open_contexts, tuned_kernels
from fastxtend_cl.preserve import Preserved
from fastxtend_cl.step import StepResult, TrainingStep
from helpers import dls_of, labels, tiny_learner

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
device = 'cpu'

@pytest.fixture(autouse=True)
def ctrl_c():
    "A shell that starts pytest in the background has it ignore Ctrl-C"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)

# ---- what the state is, found in another way than `step` finds it ----

def raw(t):
    with torch._C.DisableTorchFunctionSubclass():
        if t.is_sparse: return raw(t._indices()),raw(t._values())
        # of a copy: memory that NumPy has seen can no longer be resized
        return t.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes() if t.numel() else b''

def freeze(o, seen, keep, stop=()):
    "A comparable description of `o` and all it holds: values, strides, identities"
    if isinstance(o, (str, int, float, bytes, type(None), complex, type, types.ModuleType, types.BuiltinFunctionType)): return repr(o)
    if id(o) in seen: return 'seen', id(o)
    seen.add(id(o)); keep.append(o)
    rec = partial(freeze, seen=seen, keep=keep, stop=stop)
    res = [type(o).__name__, id(o)]
    if any(o is s for s in stop): return res
    if isinstance(o, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            place = () if o.is_sparse else (o.stride(), o.storage_offset(), o.data_ptr())
            res += [tuple(o.size()), place, o.dtype, str(o.device), o.requires_grad, o.is_leaf, o._version, raw(o)]
            if o.is_leaf: res.append(rec(o.grad))
            res += [rec(o._backward_hooks), rec(o._post_accumulate_grad_hooks)]
    elif isinstance(o, np.ndarray): res.append(o.tobytes())
    elif isinstance(o, random.Random): return res+[hash(o.getstate())]
    elif isinstance(o, np.random.Generator): return res+[repr(o.bit_generator.state)]
    elif isinstance(o, torch.Generator): return res+[raw(o.get_state())]
    elif isinstance(o, dict): res.append([(rec(k), rec(v)) for k,v in o.items()])
    elif isinstance(o, (list, tuple)) or type(o).__name__=='deque': res.append([rec(v) for v in o])
    elif isinstance(o, (set, frozenset)): res.append(sorted(map(id, o)))
    elif isinstance(o, types.MethodType): res.append(rec(o.__self__))
    elif isinstance(o, partial): res.append(rec([*o.args, o.func, o.keywords])[2:])
    elif isinstance(o, types.FunctionType): res.append([rec(c.cell_contents) for c in o.__closure__ or () if c!=types.CellType()])
    for s in getattr(type(o), '__slots__', ()) if type(o).__name__=='Slotted' else (): res.append(rec(getattr(o, s, 'none')))
    if isinstance(getattr(o, '__dict__', None), dict) and not type(o).__module__.startswith('threading'): res.append(rec(vars(o))[2:])
    return res

def process():
    b = torch.backends
    flags = [torch.is_grad_enabled(), torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled(),
        torch.get_default_dtype(), torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory, torch.get_num_threads(), torch.is_autocast_enabled('cpu'),
        torch.get_autocast_dtype('cpu'), torch.is_autocast_enabled('cuda'),
        torch.get_autocast_dtype('cuda'), torch.is_autocast_cache_enabled(), preserve._autocast_nesting(), b.cudnn.enabled,
        b.cudnn.benchmark, b.cudnn.deterministic, b.mkldnn.enabled,
        b.cuda.flash_sdp_enabled(),
        *[torch._C._get_fp32_precision_getter(d, o) for d in ('cuda','mkldnn') for o in ('matmul','conv','rnn','all')],
        signal.getsignal(signal.SIGINT), open_contexts()]
    for f in (torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32):
        try: flags.append(f())
        except RuntimeError: flags.append('mixed')
    s = np.random.get_state()
    return [*map(repr, flags), hash(random.getstate()), s[1].tobytes(), repr(s[2:]), raw(torch.get_rng_state())]

def fingerprint(*os, keep=None, stop=()):
    keep = [] if keep is None else keep
    keep.append(os)
    return [process(), [id(h) for d in preserve._global_hooks() for h in d.values()], [freeze(o, set(), keep, stop) for o in os]]

@contextmanager
def unchanged(*os):
    keep,bare = [],[*os]
    before = fingerprint(*bare, keep=keep)
    yield
    after = fingerprint(*bare, keep=keep)
    assert before[0]==after[0]
    assert before==after

# ---- models, optimizers, steps ----

class Slotted:
    __slots__ = 'n','t'
    def __init__(self): self.n,self.t = 0,torch.zeros(2)

class Odd(nn.Module):
    "Keeps state where a `state_dict` does not look"
    def __init__(self):
        super().__init__()
        self.conv,self.ema,self.log,self.table,self.gen,self.rng,self.pyrng = (nn.Conv2d(3, 4, 3),torch.zeros(4),[],
            np.zeros(3),torch.Generator(),np.random.default_rng(0),random.Random(0))
        self.slotted,self.seen,self.calls = Slotted(),set(),0
        count = 0
        def hook(m, x, y):
            nonlocal count
            count += 1
        self.hook = self.conv.register_forward_hook(hook)
        self.view = self.conv.weight.data[:1]
    def forward(self, x):
        y = self.conv(x)
        with torch.no_grad(): self.ema.mul_(0.9).add_(y.mean((0,2,3)), alpha=0.1)
        self.calls += 1
        self.log.append(y)
        self.table += self.rng.random(3)
        self.seen.add(self.calls)
        self.slotted.n += 1
        self.slotted.t = y.detach()
        self.last = y
        if not hasattr(self, 'late'):
            self.register_buffer('late', torch.rand(4, generator=self.gen))
            self.extra = nn.Parameter(torch.zeros(1))
        return (y*self.late[:,None,None]+self.pyrng.random()+random.random()+np.random.rand()).mean((2,3))

def conv2d():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Conv2d(6, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def conv3d():
    return nn.Sequential(nn.Unflatten(1, (1,3)), nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4),
        nn.AdaptiveAvgPool3d(1), nn.Flatten())
def tied():
    m = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten())
    m[2].weight = m[1].weight
    m[1].bias.data = m[0].bias.data # two parameters, one memory
    return m
def old_weight_norm(): return nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def new_weight_norm():
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def lazy():
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.LazyLinear(4))
models = dict(conv2d=conv2d, conv3d=conv3d, tied=tied, old_weight_norm=old_weight_norm, new_weight_norm=new_weight_norm, lazy=lazy, odd=Odd)

T = torch.optim
optimizers = dict(none=lambda ps: None, adam=lambda ps: T.Adam(ps, foreach=False),
    adamw=lambda ps: T.AdamW(ps, foreach=True), fused=lambda ps: T.AdamW(ps, fused=True),
    sgd=lambda ps: T.SGD(ps, 0.1, momentum=0.9), sgd_fused=lambda ps: T.SGD(ps, 0.1, momentum=0.9, fused=True),
    fastai_adam=lambda ps: fo.Adam(ps, 1e-2), fastai_sgd=lambda ps: fo.SGD(ps, 1e-2, mom=0.9, decouple_wd=False, wd=0.1),
    ranger=lambda ps: fo.ranger(ps, 1e-2, k=2), wrapper=lambda ps: OptimWrapper(ps, partial(T.AdamW, fused=True), lr=1e-2))

def make(model='conv2d', opt='adam', warm=0, **kwargs):
    torch.manual_seed(0)
    m = models[model]()
    is_lazy = model=='lazy'
    ps = list(m.parameters())
    step = TrainingStep(m, torch.randn(4, 3, 8, 8), torch.randint(4, (4,)), nn.CrossEntropyLoss(),
        optimizers['none' if is_lazy and 'fused' in opt else opt](ps), **kwargs)
    for _ in range(warm): step.run()
    return step

class RaiseAt(TorchDispatchMode):
    "Count operations of torch, and raise after the `n`-th"
    def __init__(self, n=None, error=None): super().__init__(); self.n,self.error,self.count = n,error,0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        self.count += 1
        if self.count==self.n: raise self.error
        return res

errors = dict(runtime=RuntimeError('injected'), memory=torch.OutOfMemoryError('injected'), interrupt=KeyboardInterrupt('injected'))

def n_events(step, **kwargs):
    with step.preserved(), RaiseAt() as r: step.run(**kwargs)
    return r.count

# ---- fault injection ----

@pytest.mark.parametrize('error', errors)
@pytest.mark.parametrize('model,opt,kwargs',
    [('conv2d','adam',{}), ('odd','fastai_adam',dict(memory_format='channels_last')), ('lazy','sgd',{}),
        ('tied','ranger',dict(dtype=torch.float64)),
    ('old_weight_norm','wrapper',dict(dtype=torch.bfloat16)), ('conv3d','fused',dict(memory_format='channels_last', dtype=torch.float16))])
def test_raise_at_every_event(model, opt, kwargs, error):
    "Each operation of forward, loss, backward and update is the last one, once"
    step = make(model, opt, warm=0 if model=='lazy' else 1)
    n = n_events(step, **kwargs)
    assert n>20
    for i in range(1, n+1, 1 if error=='runtime' else 7):
        with unchanged(step), pytest.raises(type(errors[error]), match='injected'), step.preserved(), RaiseAt(i, errors[error]):
            step.run(**kwargs)

@pytest.mark.parametrize('where', ['model', 'loss_func', 'optimizer', 'backward'])
def test_raise_in_python_code(where):
    step = make('conv2d', 'fastai_adam', warm=1)
    def boom(*args, **kwargs): raise KeyboardInterrupt('injected')
    if where=='model': step.model[3].forward = boom
    elif where=='loss_func': step.loss_func = boom
    elif where=='optimizer': step.optimizer.cbs.append(boom)
    else: step.model[4].weight.register_hook(boom)
    with unchanged(step), pytest.raises(KeyboardInterrupt), step.preserved(): step.run('channels_last')
    assert not torch.is_autocast_enabled('cpu')

@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(sorted(models)), st.sampled_from(sorted(optimizers)),
    st.sampled_from([None,'channels_last','contiguous']),
    st.sampled_from(['as is',None,torch.bfloat16,torch.float16,torch.float64]),
    st.integers(0, 2), st.sampled_from(sorted(errors)), st.floats(0, 1.2), st.booleans(), st.sampled_from([None, 7]))
def test_preserved(model, opt, memory_format, dtype, warm, error, at, again, seed):
    "Any model, optimizer, format, precision and past; an error anywhere, or none"
    step = make(model, opt, warm)
    n = int(at*n_events(step, memory_format=memory_format, dtype=dtype)) + 1
    with unchanged(step):
        try:
            with step.preserved(), RaiseAt(n, errors[error]):
                step.run(memory_format, dtype, seed=seed, keep='state')
                if again: step.run(keep='loss')
        except type(errors[error]) as e: assert 'injected' in str(e)

# ---- each thing that is restored ----

def _hold(step): return lambda *args: None

def _set_flag(o, name, value): return lambda s: setattr(o, name, value)

b = torch.backends
mutations = dict(
    weights=lambda s: nn.init.zeros_(s.model[0].weight), weights_by_data=lambda s: s.model[0].weight.data.zero_(),
    buffers=lambda s: s.model[1].running_mean.add_(1),
    version=lambda s: s.model[0].weight.detach().add_(0),
    new_memory=lambda s: setattr(s.model[0].weight, 'data', s.model[0].weight.data.clone()),
    strides=lambda s: s.model.to(memory_format=torch.channels_last), dtype=lambda s: s.model.double(),
    new_parameter=lambda s: setattr(s.model[0], 'weight', nn.Parameter(s.model[0].weight.data)),
    removed=lambda s: delattr(s.model[0], 'bias'),
    added_parameter=lambda s: s.model[0].register_parameter('more', nn.Parameter(torch.zeros(1))),
    added_buffer=lambda s: s.model[0].register_buffer('more', torch.zeros(1)),
    added_module=lambda s: s.model.add_module('more', nn.ReLU()), plain_attribute=lambda s: setattr(s.model[0], 'more', 1),
    parametrized=lambda s: nn.utils.parametrizations.weight_norm(s.model[0]),
    mode=lambda s: s.model[1].eval(), order=lambda s: s.model._modules.update({'0': s.model._modules.pop('0')}),
    requires_grad=lambda s: s.model[0].weight.requires_grad_(False), grad_values=lambda s: s.model[0].weight.grad.zero_(),
    grad_none=lambda s: setattr(s.model[0].weight, 'grad', None),
    grad_object=lambda s: setattr(s.model[0].weight, 'grad', s.model[0].weight.grad.clone()),
    non_leaf=lambda s: s.model[1].running_mean.mul_(s.model[1].weight),
    tensor_hook=lambda s: s.model[0].weight.register_hook(_hold(s)),
    post_grad_hook=lambda s: s.model[0].weight.register_post_accumulate_grad_hook(_hold(s)),
    forward_hook=lambda s: s.model[0].register_forward_hook(_hold(s)),
    forward_pre_hook=lambda s: s.model[0].register_forward_pre_hook(_hold(s)),
    backward_hook=lambda s: s.model[0].register_full_backward_hook(_hold(s)),
    global_hook=lambda s: nn.modules.module.register_module_forward_hook(_hold(s)),
    optimizer_hook=lambda s: s.optimizer.register_step_pre_hook(_hold(s)),
    optimizer_state=lambda s: s.optimizer.state[s.model[0].weight]['exp_avg'].add_(1),
    optimizer_steps=lambda s: s.optimizer.state[s.model[0].weight]['step'].add_(1),
    optimizer_cleared=lambda s: s.optimizer.state.clear(),
    optimizer_replaced=lambda s: setattr(s.optimizer, 'state', {}), hyper=lambda s: s.optimizer.param_groups[0].update(lr=7.),
    groups=lambda s: s.optimizer.param_groups.append({'params': []}),
    inputs=lambda s: s.inputs[0].zero_(), targets=lambda s: s.targets[0].zero_(),
    step_fields=lambda s: setattr(s, 'inputs', ()), loss=lambda s: setattr(s.loss_func, 'reduction', 'sum'),
    python=lambda s: random.random(), numpy=lambda s: np.random.rand(), torch=lambda s: torch.rand(1),
    grad_mode=lambda s: torch._C._set_grad_enabled(False), default_dtype=lambda s: torch.set_default_dtype(torch.float64),
    anomaly=lambda s: torch.set_anomaly_enabled(True), anomaly_nan=lambda s: torch.set_anomaly_enabled(False, False),
    deterministic=lambda s: torch.use_deterministic_algorithms(True, warn_only=True),
    fill=_set_flag(torch.utils.deterministic, 'fill_uninitialized_memory', False),
    threads=lambda s: torch.set_num_threads(torch.get_num_threads()+1),
    autocast=lambda s: torch.autocast('cpu', dtype=torch.bfloat16).__enter__(),
    autocast_dtype=lambda s: torch.set_autocast_dtype('cpu', torch.float16),
    autocast_cache=lambda s: torch.set_autocast_cache_enabled(False),
    nesting=lambda s: torch.autocast_increment_nesting(), cudnn=_set_flag(b.cudnn, 'enabled', False),
    cudnn_benchmark=_set_flag(b.cudnn, 'benchmark', True), cudnn_deterministic=_set_flag(b.cudnn, 'deterministic', True),
    cudnn_tf32=_set_flag(b.cudnn, 'allow_tf32', False), mkldnn=_set_flag(b.mkldnn, 'enabled', False),
    matmul=lambda s: torch.set_float32_matmul_precision('medium'), tf32=_set_flag(b.cuda.matmul, 'allow_tf32', True),
    new_precision=lambda s: setattr(b.mkldnn.matmul, 'fp32_precision', 'bf16'), flash=lambda s: b.cuda.enable_flash_sdp(False))

@pytest.mark.parametrize('name', mutations)
def test_restored(name):
    "Each change is one that the fingerprint sees, and is undone"
    step,keep = make('conv2d', 'adam', warm=1),[]
    before = fingerprint(step, keep=keep)
    with step.preserved():
        with torch.no_grad() if name not in ('non_leaf','grad_mode') else nullcontext(): mutations[name](step)
        assert fingerprint(step, keep=keep)!=before
    after = fingerprint(step, keep=keep)
    assert after[0]==before[0] and after==before

sabotage = {'_restore_bytes': ('weights','weights_by_data','buffers','grad_values','optimizer_state','inputs','targets'),
    '_dict_undo': ('mode','added_buffer','plain_attribute','forward_hook','optimizer_cleared','hyper',
        'step_fields','loss','global_hook'),
    '_list_undo': ('groups',), '_TensorState.restore_memory': ('strides','dtype','new_memory'),
    '_TensorState.restore': ('requires_grad','grad_none','non_leaf','tensor_hook','post_grad_hook'),
    '_TensorState.restore_version': ('version',), 'generators': ('python','numpy','torch'),
    '_flag_undos': ('grad_mode','default_dtype','anomaly','deterministic','threads','autocast','nesting',
        'cudnn_benchmark','matmul','flash'), '_object_undo': ('parametrized',)}

def remove(monkeypatch, what):
    owner,name = preserve,what
    if '.' in what: owner,name = preserve._TensorState,what.split('.')[1]
    monkeypatch.setattr(owner, name, (lambda *a: []) if what in ('generators','_flag_undos') else (lambda *a: None))

@pytest.mark.parametrize('what,name', [(k,n) for k,v in sabotage.items() for n in v])
def test_sabotaged_restoration_is_seen(what, name, monkeypatch):
    step,keep = make('conv2d', 'adam', warm=1),[]
    with Preserved(step):
        before = fingerprint(step, keep=keep)
        with monkeypatch.context() as m:
            remove(m, what)
            with step.preserved():
                with torch.no_grad() if name not in ('non_leaf','grad_mode') else nullcontext(): mutations[name](step)
        assert fingerprint(step, keep=keep)!=before

def test_freed_memory():
    step = make('conv2d', 'adam', warm=1)
    with unchanged_values(step), step.preserved(): step.model[0].weight.untyped_storage().resize_(0)

def test_gradients_that_were_none_are_none_again():
    step = make()
    with unchanged(step), step.preserved(): step.run(optimizer_step=False)
    assert all(p.grad is None for p in step.model.parameters()) and not step.optimizer.state

@pytest.mark.parametrize('name', ['fastai_adam','ranger','wrapper'])
def test_fastai_optimizers(name):
    step = make('conv2d', name, warm=3)
    opt = step.optimizer
    with unchanged(step), step.preserved():
        opt.set_hypers(lr=3.); opt.freeze_to(0); opt.clear_state(); step.run()
        if name=='ranger': assert opt.count==1
        opt.frozen_idx = 5

def test_lazy_layer_is_lazy_again():
    step = make('lazy', 'none')
    with unchanged(step):
        with step.preserved():
            step.run('channels_last')
            assert type(step.model[0]) is nn.Conv2d and step.model[0].weight.shape==(6, 3, 3, 3)
    assert type(step.model[0]) is nn.LazyConv2d and isinstance(step.model[0].weight, nn.UninitializedParameter)
    assert step.run().grads['0.weight'].shape==(6, 3, 3, 3)

def test_pending_backward():
    "A graph made before is as good afterwards: values and versions are those it remembers"
    def grads(run):
        step = make('conv2d', 'adam')
        torch.manual_seed(1)
        loss = step.loss_func(step.model(*step.inputs), *step.targets)
        if run:
            with step.preserved(): step.run('channels_last', torch.float64)
        loss.backward()
        return [p.grad for p in step.model.parameters()]
    for a,b in zip(grads(True), grads(False)): assert torch.equal(a, b)

def test_dynamic_unet_after_a_forward_pass():
    "Its hooks keep activations, with which the model cannot be copied"
    body = nn.Sequential(*list(xresnet18().children())[:6])
    net = DynamicUnet(body, 3, (32,32))
    step = TrainingStep(net, torch.randn(2, 3, 32, 32), torch.randint(3, (2,32,32)), nn.CrossEntropyLoss(), T.SGD(net.parameters(), 0.1))
    step.run(optimizer_step=False)
    with pytest.raises(RuntimeError): deepcopy(net)
    stored = [h.stored for h in net.sfs]
    with unchanged(step), step.preserved(): step.run('channels_last')
    assert all(h.stored is s for h,s in zip(net.sfs, stored))
    with unchanged(step), pytest.raises(torch.OutOfMemoryError), step.preserved(), \
            RaiseAt(99, torch.OutOfMemoryError('injected')):
        step.run(dtype=torch.float64)

def test_sparse_gradient_and_compiled_attribute():
    emb = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    step = TrainingStep(emb, torch.randint(10, (6,)), torch.randn(6, 4), nn.MSELoss(), T.SparseAdam(list(emb.parameters())))
    step.run()
    assert step.run().grads['0.weight'].is_sparse
    with unchanged(step), step.preserved(): step.run(); step.run()

def test_inference_tensor_in_model():
    step = make()
    with torch.inference_mode(): step.model.scratch = torch.zeros(3)
    with step.preserved():
        with torch.inference_mode(): step.model.scratch.add_(1)
    assert step.model.scratch.sum()==0

def test_inside_inference_mode_no_grad_and_autocast():
    step = make()
    with torch.inference_mode(), unchanged_values(step), step.preserved(): assert len(step.run().grads)==6
    with torch.no_grad(), unchanged(step), step.preserved(): assert len(step.run().grads)==6
    with torch.autocast('cpu', dtype=torch.bfloat16), unchanged(step), step.preserved():
        a = step.run(seed=0, dtype=None, optimizer_step=False)
        with torch.autocast('cpu', enabled=False): assert torch.equal(a.loss, step.run(seed=0, dtype=None).loss)

def test_cache_of_an_outer_autocast():
    "It holds casts of weights, and knows nothing of weights that change in place"
    step = make('tied', 'sgd', autocast=torch.bfloat16)
    def losses():
        with step.preserved(): return [step.run().loss.item() for _ in range(3)]
    want,out = losses(),lambda: step.model(*step.inputs)
    assert len(set(want))==3
    with torch.autocast('cpu', dtype=torch.bfloat16):
        before = out()
        assert losses()==want and torch.equal(out(), before)

@contextmanager
def unchanged_values(step):
    before = deepcopy(step.model.state_dict())
    yield
    for n,t in step.model.state_dict().items(): assert torch.equal(t, before[n])

def test_other_views_of_the_memory():
    "What holds the same memory, unknown to the step, sees the old values too"
    step = make('conv2d', 'sgd')
    view = step.model[0].weight.data[1:3]
    before = view.clone()
    with step.preserved():
        step.run('channels_last', torch.float64); step.run()
        step.model[0].weight.data = step.model[0].weight.data.float()
    assert torch.equal(view, before) and view.untyped_storage()._cdata==step.model[0].weight.untyped_storage()._cdata

def test_nested():
    step = make('odd', 'fastai_adam', warm=1)
    with unchanged(step), step.preserved():
        step.run('channels_last')
        with unchanged(step), step.preserved(): step.run('contiguous', torch.float64)

# ---- interrupts ----

def test_second_interrupt_waits():
    step,seen = make('conv2d', 'adam', warm=1),[]
    def interrupted(f):
        def g(*args):
            if not seen: seen.append(1); signal.raise_signal(signal.SIGINT)
            return f(*args)
        return g
    restore_bytes = preserve._restore_bytes
    preserve._restore_bytes = interrupted(restore_bytes)
    try:
        with unchanged(step), pytest.raises(KeyboardInterrupt), step.preserved(): step.run('channels_last')
        assert seen
        seen.clear()
        with unchanged(step), pytest.raises(KeyboardInterrupt) as e, step.preserved(): step.run(); raise ValueError('first')
        assert isinstance(e.value.__context__, ValueError)
    finally: preserve._restore_bytes = restore_bytes

def test_interrupt_in_nested_exit_reaches_the_body_of_the_outer():
    step = make()
    restore_bytes,calls = preserve._restore_bytes,[]
    def once(*a):
        if not calls: calls.append(1); signal.raise_signal(signal.SIGINT)
        restore_bytes(*a)
    preserve._restore_bytes = once
    try:
        with unchanged(step), step.preserved():
            with pytest.raises(KeyboardInterrupt), step.preserved(): step.run()
            calls.append('outer body goes on')
        assert calls==[1,'outer body goes on']
    finally: preserve._restore_bytes = restore_bytes

@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='needs interval timers')
def test_interrupt_at_any_instant():
    "Ctrl-C by a timer, also in the middle of putting things back"
    step = make('odd', 'fastai_adam', warm=1)
    keep,hit,rng,start = [],0,random.Random(0),time.perf_counter()
    with step.preserved(): step.run('channels_last', keep='loss')
    longest = 1.2*(time.perf_counter()-start)
    old = signal.signal(signal.SIGALRM, lambda *a: signal.raise_signal(signal.SIGINT))
    before = fingerprint(step, keep=keep)
    try:
        for i in range(100):
            try:
                try:
                    with step.preserved():
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, longest))
                        step.run('channels_last', keep='loss')
                    for _ in range(10_000): pass
                finally: signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt: hit += 1
            assert fingerprint(step, keep=keep)==before, i
    finally: signal.signal(signal.SIGALRM, old)
    assert hit

def test_contexts_of_kernels_that_an_interrupt_left_open_are_closed():
    step,outer,late = make(),tuned_kernels('correct'),[tuned_kernels('survive'), tuned_kernels(), fixed_kernels()]
    with outer, unchanged(step):
        with step.preserved():
            for c in late: c.__enter__() # and never left: the interrupt came on the way in
            step.run()
        assert open_contexts()==([('correct', 10)], [])
        for c in late: c.__exit__(None, None, None) # that comes after all
        assert open_contexts()==([('correct', 10)], [])
    assert open_contexts()==([], [])

def test_one_failure_does_not_stop_the_others(monkeypatch):
    step = make('conv2d', 'adam', warm=1)
    keep,weight = [],step.model[0].weight
    before,restore = fingerprint(step, keep=keep),preserve._TensorState.restore
    def fails(self):
        restore(self)
        if self.t is weight: raise RuntimeError('this one')
    monkeypatch.setattr(preserve._TensorState, 'restore', fails)
    with pytest.raises(RuntimeError, match='1 of the saved states could not be restored; the first error: '
            'RuntimeError: this one'), step.preserved():
        step.run('channels_last')
    assert fingerprint(step, keep=keep)==before
    with pytest.warns(RuntimeWarning, match='could not be restored'), pytest.raises(ValueError, match='mine'), step.preserved():
        step.run()
        raise ValueError('mine')
    assert fingerprint(step, keep=keep)==before

def test_running_out_of_memory_on_entry(monkeypatch):
    step = make('conv2d', 'adam', warm=1)
    calls = []
    def copy(t, on):
        calls.append(t)
        if len(calls)==3: raise torch.OutOfMemoryError('injected')
        return t.clone()
    monkeypatch.setattr(preserve, '_copy', copy)
    with unchanged(step), pytest.raises(torch.OutOfMemoryError), step.preserved(): pytest.fail('not reached')

def test_thread():
    import threading
    step,res = make('conv2d', 'adam', warm=1),[]
    def work():
        with step.preserved(): res.append(step.run())
    with unchanged(step):
        t = threading.Thread(target=work); t.start(); t.join()
    assert res

# ---- memory ----

def test_preserved_bytes():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    data = torch.randn(1000, 3, 8, 8)
    step = TrainingStep(net, data[10:14], data[10:14, :1], lambda o,t: o.mean()+t.mean())
    assert step.preserved_bytes()==4*(8*3*9 + 4*3*64), 'of the data only the batch, once'
    step.run()
    assert step.preserved_bytes()==4*(2*8*3*9 + 4*3*64)
    with step.preserved(offload_to='cpu') as p: assert sum(c.numel() for _,c in p._copies)==step.preserved_bytes()

def test_values_can_be_left_out():
    step = make()
    with Preserved(step, values=False): step.model[0].weight.data.zero_(); step.model.more = 1
    assert step.model[0].weight.sum()==0 and not hasattr(step.model, 'more')

def test_learners_and_locks_are_not_visited():
    import threading, logging
    step = make()
    class Fake: pass
    fake = Fake(); fake.dls,fake.data = object(),[torch.zeros(3)]
    step.model.owner,step.model.lock,step.model.log = fake,threading.Lock(),logging.getLogger('x')
    assert not any(o is fake or o is fake.data for o in preserve.reachable([step]))
    with step.preserved(): step.run()

# ---- the run itself ----

def reference(step, dtype=None):
    "The same step written out, on a copy"
    m = deepcopy(step.model).train()
    m.zero_grad()
    opt = T.SGD(m.parameters(), 0.1)
    x,y = step.inputs[0],step.targets[0]
    if dtype==torch.float64: m,x = m.double(),x.double()
    with torch.autocast('cpu', dtype=dtype) if dtype in (torch.bfloat16,torch.float16) else nullcontext():
        out = m(x)
        loss = step.loss_func(out.float() if out.dtype in (torch.bfloat16,torch.float16) else out, y)
    loss.backward()
    grads = {n:p.grad.clone() for n,p in m.named_parameters()}
    opt.step()
    return loss.detach(),out.detach(),grads,dict(m.named_parameters()),dict(m.named_buffers())

def plain(dtype=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return TrainingStep(net, torch.randn(4, 3, 8, 8), torch.randint(4, (4,)), nn.CrossEntropyLoss(),
        T.SGD(net.parameters(), 0.1), autocast=dtype)

@pytest.mark.parametrize('dtype', [None, torch.float64, torch.bfloat16])
def test_run_is_the_step_written_out(dtype):
    step = plain()
    loss,out,grads,weights,buffers = reference(step, dtype)
    with step.preserved(): res = step.run(dtype=dtype, keep='state')
    assert torch.equal(res.loss, loss) and torch.equal(res.outputs, out) and not res.loss.requires_grad and not res.outputs.requires_grad
    for got,want in ((res.grads,grads), (res.weights,weights), (res.buffers,buffers)):
        assert got.keys()==want.keys()
        for n in want: assert torch.equal(got[n], want[n]) and got[n].dtype==want[n].dtype, n
    assert all(g.dtype==(dtype if dtype==torch.float64 else torch.float32) for g in res.grads.values())

@pytest.mark.parametrize('kind', ['conv2d','conv3d','tied','old_weight_norm','new_weight_norm'])
def test_formats_agree_in_double_precision(kind):
    step = make(kind, 'none')
    for m in step.model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    def run(*args):
        with step.preserved(): return step.run(*args)
    a,b = run('contiguous', torch.float64),run('channels_last', torch.float64)
    for n in a.grads: assert torch.allclose(a.grads[n], b.grads[n], rtol=1e-9, atol=1e-12), n
    c = run('channels_last', None)
    for n in a.grads: assert torch.allclose(a.grads[n].float(), c.grads[n], rtol=1e-2, atol=1e-4), n

def test_format_of_everything_in_a_run():
    step,seen = make('conv2d', 'adam', warm=1),[]
    step.model[0].register_forward_pre_hook(lambda m,x: seen.append((x[0].stride(), m.weight.stride())))
    with step.preserved():
        res = step.run('channels_last')
        assert seen[-1]==((192,1,24,3), (27,1,9,3)) and res.grads['0.weight'].stride()==(27,1,9,3)
        assert step.optimizer.state[step.model[0].weight]['exp_avg'].stride()==(27,1,9,3)
        step.run('contiguous')
        assert seen[-1]==((192,64,8,1), (27,9,3,1))

@pytest.mark.parametrize('name', ['fused','wrapper','sgd_fused','ranger'])
def test_optimizer_state_follows(name):
    "Three steps, a change of format, three steps: as if there had been no change"
    def train(fmt):
        step = make('tied', name)
        for i in range(6): step.run(fmt if i>=3 else None, optimizer_step=True)
        return step.model.state_dict()
    a,b = train(None),train('channels_last')
    for n in a: assert torch.allclose(a[n], b[n], atol=1e-5), n

@pytest.mark.parametrize('name', sorted(set(optimizers)-{'none'}))
def test_double_precision_update(name):
    step = make('tied', name, warm=2)
    with step.preserved():
        res = step.run(dtype=torch.float64, keep='state')
        for s in getattr(step.optimizer, 'opt', step.optimizer).state.values():
            for k,v in s.items():
                if isinstance(v, Tensor): assert v.dtype==(torch.float32 if k=='step' else torch.float64), k
    with step.preserved(): low = step.run(keep='state')
    for n,w in res.weights.items(): assert w.dtype==torch.float64 and torch.allclose(w.float(), low.weights[n], atol=1e-4), n

def test_ties_hold_in_double_precision():
    step = make('tied', 'none')
    with step.preserved():
        step.run(dtype=torch.float64)
        assert step.model[0].bias.data_ptr()==step.model[1].bias.data_ptr() and step.model[1].weight is step.model[2].weight
        assert step.model[0].bias.dtype==torch.float64

def test_double_precision_overrides_the_models_own_casts():
    class Casts(nn.Conv2d):
        def forward(self, x):
            return (torch.zeros(1, dtype=torch.float32)
                + super().forward(x).float().mean((2,3)).to(torch.bfloat16).half() @ torch.eye(4))
    net = Casts(3, 4, 3)
    step = TrainingStep(net, torch.randn(2, 3, 8, 8), torch.rand(2, 4), nn.BCEWithLogitsLoss(pos_weight=torch.rand(4)))
    with unchanged(step), step.preserved(): res = step.run(dtype=torch.float64)
    x = nn.functional.conv2d(step.inputs[0].double(), net.weight.double(), net.bias.double()).mean((2,3))
    want = nn.functional.binary_cross_entropy_with_logits(x, step.targets[0].double(), pos_weight=step.loss_func.pos_weight.double())
    assert res.outputs.dtype==torch.float64 and torch.allclose(res.loss, want.detach(), rtol=1e-14)
    assert torch.get_default_dtype()==torch.float32

def test_fp16():
    step = plain(torch.float16)
    with step.preserved(): full = step.run(dtype=None)
    with step.preserved(): res = step.run()
    assert not res.skipped and abs(res.loss-full.loss)<1e-2
    for n,g in res.grads.items(): assert g.dtype==torch.float32 and torch.allclose(g, full.grads[n], atol=1e-2)
    step.loss_scale = 1e9
    with step.preserved(): over = step.run(keep='state')
    assert over.skipped and torch.equal(over.weights['0.weight'], step.model[0].weight) and 'a gradient overflowed' in repr(over)
    step.loss_scale = 2.**-20 # a scale that is lost cannot be restored; one that is undone can
    with step.preserved(): assert not step.run().skipped

def test_outputs_and_losses_of_any_kind():
    class Many(nn.Conv2d):
        def forward(self, x, z=None): y = super().forward(x); return {'a': y, 'b': [y.mean(), (y.sum(), 3)]}
    net = Many(3, 4, 3)
    step = TrainingStep(net, (torch.randn(2, 3, 8, 8), None), (), lambda o: o['b'][0], autocast=torch.bfloat16)
    res = step.run()
    assert res.outputs['b'][1][1]==3 and not res.outputs['a'].requires_grad and res.loss.dtype==torch.float32
    class Center(nn.Module):
        def __init__(self): super().__init__(); self.c = nn.Parameter(torch.zeros(1))
        def forward(self, o, t): return (o['a']-self.c).pow(2).mean()
    step = TrainingStep(net, torch.randn(2, 3, 8, 8), torch.zeros(2), Center())
    with unchanged(step), step.preserved(): assert set(step.run().grads)=={'weight','bias','loss_func.c'}

def test_unused_and_frozen_parameters_have_no_gradient():
    step = plain()
    step.model[0].weight.requires_grad_(False); step.model.idle = nn.Identity(); step.model.idle.w = nn.Parameter(torch.zeros(1))
    class First(nn.Sequential): forward = lambda s,x: nn.Sequential(*list(s)[:6])(x)
    step.model.__class__ = First
    assert '0.weight' not in step.run().grads and 'idle.w' not in step.run().grads

def test_gradients_are_of_this_step_alone_and_stay():
    step = make('tied', 'fastai_sgd') # its weight decay is added to the gradient in place
    a = step.run()
    b = {n:g.clone() for n,g in a.grads.items()}
    with step.preserved(): step.run()
    for n,g in a.grads.items(): assert torch.equal(g, b[n])
    with step.preserved(): x = step.run()
    with step.preserved(): y = step.run(optimizer_step=False)
    for n in x.grads: assert torch.equal(x.grads[n], y.grads[n])
    with step.preserved():
        x = step.run(optimizer_step=False); y = step.run(optimizer_step=False)
    for n in x.grads: assert torch.equal(x.grads[n], y.grads[n])

def test_modes():
    step = plain()
    step.model.eval()
    with unchanged(step), step.preserved():
        step.run()
        assert step.model.training and step.model[1].training
    step.model.train(); step.model[1].eval() # frozen
    with unchanged(step), step.preserved(): assert 'frozen' and step.run(keep='state').buffers['1.num_batches_tracked']==0

def test_seed():
    step = make('conv2d', 'none')
    def loss(**kw):
        with step.preserved(): return step.run(**kw).loss
    assert loss(seed=1)==loss(seed=1)!=loss(seed=2)
    assert loss()==loss()
    step.run()
    with unchanged(step): loss(seed=3)

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.drops = (nn.Conv2d(3, 8, 3),
            nn.ModuleList([nn.Dropout(0.3), nn.Dropout2d(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)]))
    def forward(self, x):
        y = self.conv(x)
        for d in self.drops: y = d(y)
        y = (y*torch.rand_like(y) + torch.randn_like(y) + torch.randn(1) + torch.rand(8, 1, 1, dtype=y.dtype)
            + torch.empty_like(y).uniform_(-1, 1) + torch.bernoulli(y.sigmoid())*0)
        return (y + y.new_empty(y.shape).normal_() + torch.randint(3, (8,1,1)) + random.random()).mean((2,3))

def test_same_random_numbers_in_every_format_and_precision():
    torch.manual_seed(0)
    step = TrainingStep(Noisy(), torch.randn(4, 3, 8, 8), torch.randint(8, (4,)), nn.CrossEntropyLoss())
    def run(*args, seed=3):
        with step.preserved(): return step.run(*args, seed=seed)
    ref = run('contiguous', torch.float64)
    for fmt,dtype,tol in (('channels_last',torch.float64,1e-10), ('contiguous',None,1e-5), ('channels_last',None,1e-5),
            ('channels_last',torch.bfloat16,0.1)):
        res = run(fmt, dtype)
        assert (res.outputs-ref.outputs).abs().max()<tol, (fmt, dtype)
        for n,g in res.grads.items(): assert (g-ref.grads[n]).abs().max()<tol, (fmt, dtype, n)
    assert (run('contiguous', torch.float64, seed=4).outputs-ref.outputs).abs().max()>0.1

def test_seed_draws_what_torch_draws():
    step = make('conv2d', 'none')
    with step.preserved(): a = step.run(seed=5)
    with step.preserved(): torch.manual_seed(5); b = step.run()
    assert torch.equal(a.outputs, b.outputs)

@pytest.mark.parametrize('what', ['_array_undo','_generator_undo','_list_undo','_object_undo','_dict_undo','_restore_bytes','_clear_cell'])
def test_sabotage_of_odd_places_is_seen(what, monkeypatch):
    "The model that keeps state everywhere"
    step,keep = make('odd', 'fastai_adam', warm=1),[]
    if what=='_clear_cell':
        def f(): return later
        step.model.f = f
        act = lambda: setattr(f.__closure__[0], 'cell_contents', 1)
    else: act = step.run
    with Preserved(step):
        before = fingerprint(step, keep=keep)
        with step.preserved(): act()
        assert fingerprint(step, keep=keep)==before
        with monkeypatch.context() as m:
            m.setattr(preserve, what, lambda *a: None)
            with step.preserved(): act()
        assert fingerprint(step, keep=keep)!=before
    if what=='_clear_cell': later = 0

@pytest.mark.parametrize('wrap', [torch.jit.script, partial(torch.compile, backend='aot_eager')], ids=['scripted','compiled'])
def test_scripted_and_compiled(wrap):
    net = wrap(conv3d())
    net.eval()
    step = TrainingStep(net, torch.randn(4, 3, 8, 8), torch.randint(4, (4,)), nn.CrossEntropyLoss(), T.SGD(net.parameters(), 0.1))
    with unchanged_values(step), step.preserved(): a = step.run(); step.run('channels_last')
    assert not net.training
    with unchanged_values(step), step.preserved(): assert torch.allclose(step.run(seed=1).loss, a.loss)

def test_batch_of_the_user_is_left_alone():
    "Also without `preserved`"
    net,x,y = nn.Conv2d(3, 4, 3),TensorImage(torch.rand(2, 3, 8, 8)),torch.rand(2, 4, 6, 6)
    from collections import OrderedDict
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.net = net
        def forward(self, b): self.kind = type(b),type(b['x']); return self.net(b['x'])
    step = TrainingStep(Named(), OrderedDict(x=x), y, nn.MSELoss())
    step.run('channels_last', torch.float64)
    assert step.model.kind==(OrderedDict,TensorImage) and step.inputs[0]['x'].dtype==torch.float64
    assert x.dtype==y.dtype==torch.float32 and x.is_contiguous() and y.is_contiguous() and type(x) is TensorImage
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    step = TrainingStep(net, x, y, nn.MSELoss())
    step.run('channels_last', torch.float64)
    assert step.inputs[0].requires_grad and step.inputs[0].is_leaf and step.inputs[0].grad.dtype==torch.float64 and x.grad is None

def test_keep():
    step = plain()
    r = step.run(keep='loss')
    assert isinstance(r, StepResult) and r.grads is r.outputs is r.weights is None and r.loss.ndim==0
    r = step.run(keep='grads')
    assert r.weights is None and len(r.grads)==6 and repr(r)==f'StepResult(loss {r.loss.item():.4g}, 6 gradients)'

# ---- bad input ----

@pytest.mark.parametrize('loss,error,text', [
    (lambda o,t: 3., TypeError, 'the loss must be a tensor with one element, got float'),
    (lambda o,t: o, ValueError, r'got the shape \(4, 4\): reduce it'),
    (lambda o,t: o.sum()*float('inf'), ValueError, 'the loss is (inf|-inf): check learning rate, data and precision'),
    (lambda o,t: o.detach().sum(), ValueError, 'the loss has no gradient'),
    (lambda o,t: (o.sum()*0).log()-float('inf')+float('nan'), ValueError, 'the loss is nan')])
def test_bad_loss(loss, error, text):
    step = plain()
    step.loss_func = loss
    with unchanged(step), pytest.raises(error, match=text), step.preserved(): step.run()

@pytest.mark.parametrize('kwargs,error,text',
    [(dict(memory_format='nhwc'), ValueError, "memory_format must be 'contiguous', 'channels_last' or None, got 'nhwc'"),
        (dict(dtype='fp16'), ValueError, "dtype must be 'as is', .* got 'fp16'"),
    (dict(dtype=torch.int8), ValueError, 'got torch.int8'),
    (dict(keep='all'), ValueError, "keep must be 'loss', 'grads' or 'state', got 'all'")])
def test_bad_arguments(kwargs, error, text):
    step = make(warm=1)
    with unchanged(step), pytest.raises(error, match=text): step.run(**kwargs)

def test_bad_parts():
    net,x,y = nn.Conv2d(3, 4, 3),torch.zeros(1, 3, 4, 4),torch.zeros(1)
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got function'): TrainingStep(conv2d, x, y, nn.MSELoss())
    with pytest.raises(TypeError, match='loss_func must be a function of the output and the targets, got NoneType'):
        TrainingStep(net, x, y, None)
    with pytest.raises(TypeError, match='optimizer must have a method `step` or be None, got str'):
        TrainingStep(net, x, y, nn.MSELoss(), 'adam')
    with pytest.raises(ValueError, match="autocast must be None, torch.float16 or torch.bfloat16, got 'bf16'"):
        TrainingStep(net, x, y, nn.MSELoss(), autocast='bf16')
    assert TrainingStep(net, x, y, nn.MSELoss()).inputs==(x,) and TrainingStep(net, [x], (y,), nn.MSELoss()).inputs==([x],)

def test_no_autocast_on_this_device():
    step = plain().__class__(nn.Conv2d(3, 4, 3, device='meta'), torch.zeros(1, 3, 8, 8, device='meta'), (), lambda o: o.mean())
    with pytest.raises(ValueError, match='torch.float16 is not available on meta'): step.run(dtype=torch.float16)

def test_repr():
    step = plain(torch.bfloat16)
    assert (repr(step)==str(step)=='TrainingStep(Sequential on cpu, inputs (4, 3, 8, 8) fp32 contiguous, '
        'targets (4,) int64, CrossEntropyLoss, SGD, autocast bf16)')
    step = TrainingStep(step.model, (torch.zeros(1, 3, 4, 5).to(memory_format=torch.channels_last), None), (),
        lambda o: o.sum(), fo.Adam(step.model.parameters(), 1.))
    assert (repr(step)=='TrainingStep(Sequential on cpu, inputs (1, 3, 4, 5) fp32 channels_last, NoneType, '
        'targets None, test_repr.<locals>.<lambda>, Optimizer, no autocast)')

def test_needs_no_fastai(root):
    code = 'import sys, fastxtend_cl.step; assert not [m for m in sys.modules if m.split(".")[0]=="fastai"]'
    subprocess.run([sys.executable, '-c', code], cwd=root, check=True)

# ---- on a GPU ----

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('offload_to', [None,'cpu'])
def test_on_a_gpu(offload_to):
    torch.manual_seed(0)
    net = conv2d().cuda()
    step = TrainingStep(net, torch.randn(4, 3, 8, 8, device='cuda'), torch.randint(4, (4,), device='cuda'),
        nn.CrossEntropyLoss(), T.AdamW(net.parameters(), fused=True), torch.float16)
    step.run()
    def state():
        return deepcopy([net.state_dict(), step.optimizer.state_dict(), [p.grad for p in net.parameters()],
            torch.cuda.get_rng_state(), b.cuda.matmul.allow_tf32, b.cudnn.benchmark])
    def flat(o):
        return ([o.cpu()] if isinstance(o, Tensor) else
            [x for v in (o.values() if isinstance(o, dict) else o) for x in flat(v)] if isinstance(o, (dict, list)) else [o])
    before = flat(state())
    with pytest.raises(torch.OutOfMemoryError), step.preserved(offload_to=offload_to) as p:
        assert all(c.device.type==(offload_to or 'cuda') for (s,_,_),c in p._copies if s.device.type=='cuda')
        for fmt in ('contiguous','channels_last'):
            for dtype in ('as is', None, torch.bfloat16): step.run(fmt, dtype, seed=0)
        b.cuda.matmul.allow_tf32,b.cudnn.benchmark = not b.cuda.matmul.allow_tf32,not b.cudnn.benchmark
        step.run(dtype=torch.float64)
        torch.empty(2**60, device='cuda')
    after = flat(state())
    assert len(before)==len(after) and all(torch.equal(x, y) if isinstance(x, Tensor) else x==y for x,y in zip(before, after))
    step.run()

# ---- from a Learner ----

def image(i): return PILImage.create(np.random.RandomState(i).randint(0, 255, (16,16,3), dtype=np.uint8))
def label(i): return i%2

def get_dls(workers=0, tfms=True, n=40, **kwargs):
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    db = DataBlock((ImageBlock, CategoryBlock), get_x=image, get_y=label, splitter=RandomSplitter(seed=0),
        batch_tfms=aug_transforms() if tfms else None)
    return db.dataloaders(range(n), bs=8, num_workers=workers, device='cpu', **kwargs)

def get_learner(dls=None, **kwargs):
    dls = get_dls() if dls is None else dls
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return Learner(dls, net, **{'loss_func':CrossEntropyLossFlat(), **kwargs})

def epoch(dl): return [(x.clone(), y.clone()) for x,y in dl]

def same_batches(a, b):
    assert len(a)==len(b)
    for (x,y),(u,v) in zip(a, b): assert torch.equal(x, u) and torch.equal(y, v)

class TorchData(torch.utils.data.Dataset):
    def __len__(self): return 20
    def __getitem__(self, i): return torch.full((3,8,8), float(i))+torch.rand(1), i%2

class Stream(torch.utils.data.IterableDataset):
    def __init__(self): self.pos = 0
    def __iter__(self):
        for i in range(20):
            self.pos += 1
            yield torch.full((3,8,8), float(self.pos)), i%2

def torch_dls(workers=0, **kw):
    torch.manual_seed(0)
    return DataLoaders(torch.utils.data.DataLoader(TorchData(), 4, shuffle=True, num_workers=workers, **kw),
        torch.utils.data.DataLoader(TorchData(), 4))

def own_generator(): return torch_dls(generator=torch.Generator().manual_seed(3))

kinds = dict(plain=partial(get_dls, tfms=False), augmented=get_dls, workers=partial(get_dls, workers=2), torch=torch_dls,
    torch_workers=partial(torch_dls, 2), generator=own_generator,
    stream=lambda: DataLoaders(DataLoader(Stream(), bs=4), DataLoader(Stream(), bs=4)),
    list=lambda: DataLoaders([(torch.ones(4, 3, 8, 8)*i, torch.tensor([0,1,0,1])) for i in range(3)], []))

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('past', ['fresh','exhausted','in the middle'])
def test_the_next_epoch_has_the_same_batches(kind, past):
    def batches(take):
        dls = kinds[kind]()
        learn = get_learner(dls)
        rest = []
        it = iter(dls.train) if past=='in the middle' else None
        if past=='exhausted': epoch(dls.train)
        if it: rest += [next(it)]
        if take:
            with unchanged_process(): step = TrainingStep.from_learner(learn)
            assert step.inputs[0].shape[1]==3
        if it: rest += list(it)
        return rest + epoch(dls.train) + epoch(dls.train)
    same_batches(batches(True), batches(False))

@contextmanager
def unchanged_process():
    before = process()
    yield
    assert process()==before

@pytest.mark.parametrize('kind', ['plain','augmented','torch','generator','stream'])
def test_batch_is_the_first_of_the_next_epoch(kind):
    dls = kinds[kind]()
    step = TrainingStep.from_learner(get_learner(dls))
    x,y = next(iter(dls.train))
    assert torch.equal(step.inputs[0], x) and torch.equal(step.targets[0], y) and type(step.inputs[0]) is Tensor

class Running(Transform):
    "Keeps statistics of what it has seen, in a tensor and in an array"
    order = 200
    def __init__(self): self.mean,self.n,self.gen = torch.zeros(1),np.zeros(1),torch.Generator().manual_seed(0)
    def encodes(self, x:TensorImage): self.mean += x.mean().as_subclass(Tensor); self.n += 1; return x+torch.rand(1, generator=self.gen)

def test_transforms_with_a_state():
    learn = get_learner(get_dls())
    learn.dls.train.after_batch.add([Running()])
    with unchanged(learn): TrainingStep.from_learner(learn)
    tfm = learn.dls.train.after_batch.fs[-1]
    learn.dls.train.one_batch()
    assert tfm.n[0]==1 and tfm.mean!=0

class Draws(Callback):
    "Draws random numbers and keeps them, as a stateful callback may"
    def __init__(self): self.seen,self.rng = [],np.random.default_rng(0)
    def before_batch(self): self.seen.append(self.rng.random()); self.learn.xb = (self.xb[0]+torch.rand(1),)

def full_learner(**kwargs):
    return get_learner(cbs=[Draws(), before_batch_cb(lambda s,x,y: ((x[0]*2,), y))], **kwargs).to_channelslast(amp_mode='bf16')

@pytest.mark.parametrize('opt_func', [fo.Adam, partial(fo.SGD, mom=0.9, lr=3.), partial(OptimWrapper, opt=T.AdamW)],
    ids=['adam','partial','wrapper'])
def test_learner_is_as_before(opt_func):
    learn = full_learner(opt_func=opt_func)
    with unchanged(learn): step = TrainingStep.from_learner(learn)
    assert learn.opt is None and step.optimizer is not None and step.model is learn.model and step.loss_func is learn.loss_func
    assert step.optimizer.hypers[0]['lr']==(3. if isinstance(opt_func, partial) and 'lr' in opt_func.keywords else learn.lr)
    with unchanged(learn), unchanged(step), step.preserved(): step.run('channels_last', keep='state')
    learn.create_opt()
    with unchanged(learn): assert TrainingStep.from_learner(learn).optimizer is learn.opt

def test_built_optimizer():
    "`opt_func` may be an optimizer already, which `create_opt` would clear"
    learn = get_learner()
    learn.opt_func = OptimWrapper(opt=T.AdamW(learn.model.parameters()))
    learn.opt_func.opt.state[learn.model[0].weight] = {'step': torch.tensor(3.)}
    with unchanged(learn): assert TrainingStep.from_learner(learn).optimizer is learn.opt_func

def test_after_a_fit():
    learn = full_learner()
    with learn.no_bar(): learn.fit(1)
    with unchanged(learn): step = TrainingStep.from_learner(learn)
    with unchanged(learn), unchanged(step), step.preserved(offload_to='cpu'): step.run(); step.run(dtype=torch.float64)

def test_copy_of_a_loader_with_workers_that_stay():
    dl = torch_dls(2, persistent_workers=True, prefetch_factor=3, timeout=5).train
    vars(dl)['_iterator'] = running = object()
    res = fastxtend_cl.learner._alone(dl)
    assert len(list(res))==5 and dl._iterator is running and dl.num_workers==2

class AtEvent(Callback):
    "Takes a step from within a fit"
    order = 20
    def __init__(self, event, f): self.f,self.count = f,0; setattr(self, event, self.once)
    def once(self):
        self.count += 1
        if self.count==2: self.f(self.learn)

@pytest.mark.parametrize('event',
    ['before_fit','before_epoch','before_train','before_batch','after_pred','after_loss','before_backward',
        'after_backward','before_step','after_step','after_batch','after_train','before_validate','after_epoch'])
def test_in_the_middle_of_a_fit(event):
    "The same training as without, at each event of the loop"
    def train(take):
        learn = get_learner(lr=0.05)
        def f(learn):
            step = TrainingStep.from_learner(learn)
            with step.preserved(): step.run('channels_last'); step.run(dtype=torch.float64)
        cb = AtEvent(event, f if take else lambda l: None)
        if event=='before_fit': cb.count = 1
        with learn.no_bar(): learn.fit(2, cbs=cb)
        assert cb.count>=2
        return learn.model.state_dict()
    a,b = train(True),train(False)
    for n in a: assert torch.equal(a[n], b[n]), n

class RaiseInCall:
    "Raise in the `n`-th call of a Python function, except while things are put back"
    def __init__(self, n, error): self.n,self.error,self.count = n,error,0
    def __call__(self, frame, event, arg):
        if event!='call': return
        f = frame
        while f and f.f_code is not Preserved.__exit__.__code__: f = f.f_back
        if f: return
        self.count += 1
        if self.count==self.n: sys.settrace(None); raise self.error
    def __enter__(self): self.old = sys.gettrace(); sys.settrace(self); return self
    def __exit__(self, *e): sys.settrace(self.old)

@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_raise_at_any_call_of_from_learner():
    learn,keep = full_learner(),[]
    TrainingStep.from_learner(learn)
    with RaiseInCall(None, None) as r: TrainingStep.from_learner(learn)
    n,rng = r.count,random.Random(0)
    assert n>500
    before = fingerprint(learn, keep=keep)
    for i in sorted(rng.sample(range(1, n), 60)):
        error = rng.choice([RuntimeError('injected'), torch.OutOfMemoryError('injected'), KeyboardInterrupt('injected')])
        try:
            with RaiseInCall(i, error): TrainingStep.from_learner(learn)
        except BaseException as e:
            if 'injected' not in str(e): raise
        after = fingerprint(learn, keep=keep)
        assert after[0]==before[0] and after==before, (i, n)

@pytest.mark.parametrize('where', ['before_batch','after_item','after_batch','before_iter','create_item'])
def test_error_in_the_users_code(where):
    learn = full_learner()
    def boom(*a, **k): raise ValueError('mine')
    if where=='before_batch': learn.add_cb(before_batch_cb(boom))
    elif where in ('after_item','after_batch'): getattr(learn.dls.train, where).add([Transform(boom)])
    else: setattr(learn.dls.train, where, boom)
    with unchanged(learn), pytest.raises(ValueError, match='mine'): TrainingStep.from_learner(learn)

def test_callbacks_that_change_batches():
    learn = get_learner(get_dls(tfms=False))
    base = TrainingStep.from_learner(learn).inputs[0]
    learn.add_cb(before_batch_cb(lambda s,x,y: ((x[0]*2,), y)))
    assert torch.equal(TrainingStep.from_learner(learn).inputs[0], base*2)
    learn.add_cbs([MixUp(), fastxtend_cl.channelslast.ChannelsLastCallback()])
    with unchanged(learn): step = TrainingStep.from_learner(learn)
    assert torch.equal(step.inputs[0], base*2) and step.inputs[0].is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('cb,dtype,scale',
    [(None,None,1024.), (lambda: MixedPrecision('bf16'),None,1024.),
        (lambda: DeviceMixedPrecision('bf16'),torch.bfloat16,1024.), (lambda: DeviceMixedPrecision('fp16'),torch.float16,1024.),
    (lambda: DeviceMixedPrecision('fp16', init_scale=8.),torch.float16,8.),
    (lambda: DeviceMixedPrecision('fp16', enabled=False),torch.float16,1.)])
def test_precision(cb, dtype, scale):
    step = TrainingStep.from_learner(get_learner(cbs=cb and cb()))
    assert (step.autocast,step.loss_scale)==(dtype,scale)

def test_learners_step_is_what_a_fit_does():
    "One batch of a fit and one run give the same weights"
    def learner(): return get_learner(get_dls(n=10), opt_func=partial(fo.SGD, mom=0.), lr=0.1)
    learn = learner()
    torch.manual_seed(5)
    step = TrainingStep.from_learner(learn)
    with step.preserved(): res = step.run(keep='state')
    with learn.no_bar(): learn.fit(1)
    for n,p in learn.model.named_parameters(): assert torch.equal(p, res.weights[n]), n

class Slabs(TensorBase): "A batch of stacks of images, five dimensions and no volume"

class OfSlabs(nn.Module):
    def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(3, 8, 3),nn.Linear(8, 2)
    def forward(self, x): return self.head(self.conv(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))

def test_a_learners_batch_is_laid_out_as_in_training():
    "A type that no transform knows stays as it is, whatever its rank; a patched one gets what was patched"
    learn = tiny_learner(dls=dls_of([Slabs(torch.randn(4, 3, 8, 8)) for _ in range(4)], labels(4), bs=2), model=OfSlabs())
    def strides():
        step = TrainingStep.from_learner(learn)
        with step.preserved():
            step.convert('channels_last')
            assert step.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
            return step.inputs[0].stride()
    assert strides()==(768, 192, 64, 8, 1)
    try:
        @ChannelsLastTfm
        def encodes(self, x:Slabs): return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        assert strides()==(768, 192, 1, 24, 3)
    finally:
        @ChannelsLastTfm
        def encodes(self, x:Slabs): return x

def test_learners_without_a_step():
    class Targetless(TorchData):
        def __getitem__(self, i): return (torch.zeros(3,8,8),)
    dl = lambda ds: torch.utils.data.DataLoader(ds, 4)
    cases = [(get_learner(DataLoaders()), 'the Learner has no training data'),
        (get_learner(DataLoaders(DataLoader([], bs=4))), 'the Learner has no training data'),
        (get_learner(get_dls().new_empty()), 'the Learner has no training data'),
        (get_learner(DataLoaders(dl(Targetless()), dl(Targetless()))), 'the training batch of the Learner has no target'),
        (get_learner(DataLoaders(iter([(1,2)]), [])), 'the training data is an iterator')]
    learn = get_learner(); learn.loss_func = None
    cases += [(learn, 'the Learner has no loss: set `learn.loss_func`, which is None'),
        (get_learner(cbs=NonNativeMixedPrecision()),
            'call `learn.to_non_native_fp32()` first'.replace('(', r'\(').replace(')', r'\)'))]
    learn = get_learner(); learn.dls = None
    for learn,text in cases + [(learn, 'the Learner has no training data')]:
        with unchanged(learn), pytest.raises(ValueError, match=text): TrainingStep.from_learner(learn)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_gradients_of_another_dtype_are_restored(dtype):
    "The user's own body may change the dtype of the model"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4*36, 2))
    step = TrainingStep(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), nn.functional.cross_entropy)
    step.run()
    before = [(p, p.detach().clone(), p.grad, p.grad.clone()) for p in model.parameters()]
    with step.preserved():
        model.to(dtype)
        step.inputs = (step.inputs[0].to(dtype),)
        step.run()
        assert all(p.grad.dtype==dtype for p in model.parameters())
    assert all(q is p and torch.equal(q, v) and q.grad is g and torch.equal(g, h) for q,(p,v,g,h) in zip(model.parameters(), before))

def test_gradients_may_be_added_to():
    torch.manual_seed(0)
    step = TrainingStep(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4*36, 2)).double(), torch.randn(2, 3, 8, 8).double(), torch.zeros(2, dtype=torch.long), nn.functional.cross_entropy)
    once = {n:g.clone() for n,g in step.run().grads.items()}
    again = step.run(zero_grad=False).grads
    for n in once: torch.testing.assert_close(again[n], 2*once[n])
    for n,g in step.run().grads.items(): assert torch.equal(g, once[n])
