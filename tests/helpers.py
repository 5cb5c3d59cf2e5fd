"Small models, data and comparisons that several test files share"
import gc, os, socket, warnings
from contextlib import contextmanager
from pathlib import Path
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import Datasets
from fastai.data.transforms import ItemGetter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from warm import start_python

device = torch.device(os.environ.get('FXCL_DEVICE', 'cpu'))

class Mixed(nn.Module):
    """One of each: 2-D and 3-D convolutions, transposed, grouped, depthwise, tied, frozen, a position embedding that is
    viewed, a linear layer"""
    def __init__(self):
        super().__init__()
        self.stem,self.body,self.tied = (nn.Conv2d(3, 8, 3, padding=1, bias=False),nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1))
        self.tied.weight = self.body.weight
        self.depthwise,self.grouped,self.pointwise = (nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),nn.Conv2d(8, 8, 1))
        self.bn,self.up,self.volume = nn.BatchNorm2d(8),nn.ConvTranspose2d(8, 4, 2, 2),nn.Conv3d(1, 2, 3, padding=1)
        self.pos,self.head = nn.Parameter(torch.randn(1, 4, 16, 16)),nn.Linear(2, 2)
        self.pointwise.weight.requires_grad_(False)

    def forward(self, x):
        x = self.depthwise(self.tied(self.body(self.bn(self.stem(x)).relu()).relu())).relu()
        x = self.up(self.pointwise(self.grouped(x))).flatten(1) * self.pos.view(-1)
        return self.head(self.volume(x.view(-1, 1, 4, 16, 16)).mean((2, 3, 4)))

def mixed(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Mixed().to(dtype)

def images(n=2, size=8, dtype=torch.float64, seed=0):
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))

def tensors_in(o):
    if isinstance(o, Tensor): yield o
    elif isinstance(o, dict): yield from (t for v in o.values() for t in tensors_in(v))
    elif isinstance(o, (list, tuple)): yield from (t for v in o for t in tensors_in(v))

def all_tensors(model, opt=None):
    "Parameters, buffers, gradients and optimizer state, in a fixed order"
    ps = list(model.parameters())
    opt = getattr(opt, 'opt', opt)
    state = [] if opt is None else [t for p in ps for t in tensors_in(opt.state.get(p, {}))]
    return [*ps, *model.buffers(), *(p.grad for p in ps if p.grad is not None), *state]

def snapshot(model, opt=None):
    "What a failed conversion may not change: objects, strides and values"
    return [(id(t), t.stride(), t.detach().clone()) for t in all_tensors(model, opt)]

def assert_same_snapshot(a, b):
    assert [o[:2] for o in a]==[o[:2] for o in b]
    assert all(torch.equal(s[2], t[2]) for s,t in zip(a, b))

def furthest(a, b):
    "The largest difference between two models' parameters and buffers"
    return max((p.double()-q.double()).abs().max().item() for p,q in zip((*a.parameters(), *a.buffers()), (*b.parameters(), *b.buffers())))

def strides(model): return {n:t.stride() for n,t in (*model.named_parameters(), *model.named_buffers())}

def state_follows(model, opt):
    "Whether each gradient and each same-shaped tensor of optimizer state has its parameter's strides"
    opt = getattr(opt, 'opt', opt)
    return all(t.stride()==p.stride() for p in model.parameters()
        for t in (*tensors_in(opt.state.get(p, {})), *tensors_in(p.grad)) if t.shape==p.shape)

def naive_channels_last(model, opt=None):
    "What not to do: the weights alone"
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d)):
            m.weight.data = m.weight.data.to(memory_format=torch.channels_last if m.weight.ndim==4 else torch.channels_last_3d)

def naive_contiguous(model, opt=None):
    for p in model.parameters(): p.data = p.data.contiguous()

@contextmanager
def caught_warnings():
    "All warnings of the body, in a list"
    with warnings.catch_warnings(record=True) as res:
        warnings.simplefilter('always')
        yield res

def of_class(caught, cls): return [w for w in caught if issubclass(w.category, cls)]

class Fault(torch.autograd.Function):
    "The identity, whose backward multiplies channels-last gradients of `dtype` by `factor`"
    @staticmethod
    def forward(ctx, x, factor, dtype):
        ctx.factor,ctx.dtype = factor,dtype
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g): return (g*ctx.factor if g.dtype==ctx.dtype and not g.is_contiguous() else g),None,None

class Faulty(nn.Module):
    def __init__(self, factor=1.05, dtype=torch.float32): super().__init__(); self.factor,self.dtype = factor,dtype
    def forward(self, x): return Fault.apply(x, self.factor, self.dtype)

def step_of(model, bs=8, size=24, classes=4, opt=None, loss=F.cross_entropy, **kw):
    "A `TrainingStep` on random images"
    from fastxtend_cl.step import TrainingStep # what runs without the package imports this file too
    torch.manual_seed(1)
    return TrainingStep(model, torch.randn(bs, 3, size, size), torch.randint(0, classes, (bs,)), loss, opt and opt(model), **kw)

adamw = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)

# fastai

def tiny_cnn(classes=2, channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

def dls_of(*columns, bs=4, n_inp=None, **kwargs):
    "`DataLoaders` of columns of items, in a fixed order; the same items for training and validation"
    items = list(zip(*columns))
    ds = Datasets(items, [[ItemGetter(i)] for i in range(len(columns))], splits=[range(len(items))]*2, n_inp=n_inp)
    return ds.dataloaders(bs=bs, num_workers=0, device=device, shuffle=False, drop_last=False, **kwargs)

def random_images(n=16, shape=(3, 8, 8), cls=TensorImage, seed=0):
    return [cls(t) for t in torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))]

def labels(n=16, classes=2): return [TensorCategory(i%classes) for i in range(n)]

def tensor_dls(n=16, bs=4, **kwargs): return dls_of(random_images(n), labels(n), bs=bs, **kwargs)

class Double(Callback):
    "Inputs in fp64, as a model needs them that is in fp64"
    order = 8
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
    def after_loss(self): self.learn.loss = self.loss.float() # fastai's Recorder averages in single precision

def tiny_double(seed=0, **kwargs):
    "A Learner in fp64: its rounding is too small to hide an error"
    torch.manual_seed(seed)
    return tiny_learner(model=tiny_cnn().double(), **kwargs).add_cb(Double())

def tiny_learner(dls=None, model=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Learner(dls or tensor_dls(), (model or tiny_cnn()).to(device), **{'loss_func': CrossEntropyLossFlat(), **kwargs})

@contextmanager
def quiet(learn, silent=True):
    "No progress bar, no log, and no warnings where `silent`"
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        if silent: warnings.simplefilter('ignore')
        yield learn

def fit(learn, n=1, lr=1e-3, **kwargs):
    with quiet(learn): learn.fit(n, lr, **kwargs)
    return learn

class AveragedCopy(Callback):
    "An average of the weights, of a copy made when training begins"
    def before_fit(self):
        if not hasattr(self, 'averaged'): self.averaged = AveragedModel(self.model)
    def after_batch(self):
        if self.training: self.averaged.update_parameters(self.model)

class SeeBatch(Callback):
    "The formats that the model receives and gives, in training and validation"
    order = 200
    def before_fit(self): self.x,self.y,self.pred_ = set(),set(),set()
    def before_batch(self): self.x |= set(map(format_name, self.xb)); self.y |= set(map(format_name, self.yb))
    def after_pred(self): self.pred_.add(format_name(self.pred))

def format_name(t):
    "An own definition, without this package: 'nhwc', 'nchw', 'both', 'none' or the rank"
    if t.ndim not in (4, 5): return t.ndim
    nchw,nhwc = t.is_contiguous(),t.is_contiguous(memory_format=torch.channels_last if t.ndim==4 else torch.channels_last_3d)
    return ['none', 'nhwc', 'nchw', 'both'][nchw*2+nhwc]

# Several processes

def gloo_threads():
    "Names of the native threads of process groups in this process; Linux only"
    names = (f.read_text().strip() for f in Path('/proc/self/task').glob('*/comm'))
    return sorted(n for n in names if 'gloo' in n or 'tcpstore' in n)

def end_group():
    "Destroy the group, and see its threads end: Python may abort at exit while they run. What holds it, as `DistributedDataParallel` does, must be gone"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()
    assert not gloo_threads(), gloo_threads()

@contextmanager
def process_group(**kwargs):
    "A gloo group until the end of the body, and its rank"
    import torch.distributed as dist
    import torch.distributed.nn # `torch.optim` imports it; default arguments of its functions hold the group, where there is one by then
    dist.init_process_group('gloo', **kwargs)
    yield dist.get_rank()
    end_group()

def two_processes(*args, timeout=600, **env):
    "Run Python with `args` as both ranks of a group, in an environment whose values may be functions of the rank; stdout and stderr of each"
    root = Path(__file__).resolve().parent.parent
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'RANK': str, 'LOCAL_RANK': str,
        'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(map(str, (root, root/'tests'))), 'CUDA_VISIBLE_DEVICES': '', 'FXCL_DEVICE': 'cpu', **env}
    ps = [start_python('-W', 'ignore', *args, env={k: v(i) if callable(v) else v for k,v in env.items()}) for i in range(2)]
    try: done = [p.wait(timeout) for p in ps]
    finally:
        for p in ps: p.kill()
    assert [r.returncode for r in done]==[0, 0], done
    return [(r.stdout, r.stderr) for r in done]
