"Whatever torch makes of a network inside `tuned_kernels` is what it makes of it outside, contiguous and in double precision"
import copy
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.kernels import tuned_kernels

formats = {4: torch.channels_last, 5: torch.channels_last_3d}

# Each operator of which something is put before torch's own: reverse mode, forward mode, batched, and twice

operators = {str(o): o for o in (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(3, 4, 3, stride=2, dilation=2), nn.Conv3d(3, 3, (3, 1, 1), groups=3),
    nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(3), nn.GroupNorm(3, 3), nn.InstanceNorm2d(3, affine=True), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Mish(), nn.ELU())}
operators |= {'mean': lambda x: x.mean((2, 3)), 'mean, kept': lambda x: x.mean((-1, -2), keepdim=True), 'circular padding': lambda x: F.pad(x, (1, 2, 0, 1), mode='circular')}

@pytest.mark.parametrize('name', operators)
def test_derivatives_of_all_kinds(name):
    f,shape = operators[name],(2, 3, *[5]*(3 if 'Conv3d' in name else 2))
    if isinstance(f, nn.Module): f = copy.deepcopy(f).double()
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=formats[len(shape)]).requires_grad_()
    with tuned_kernels():
        more = 'GroupNorm' not in name or torch.__version__>='2.14' # before, torch's own raises in channels last
        assert torch.autograd.gradcheck(f, x, check_forward_ad=more, check_batched_grad=more)
        assert torch.autograd.gradgradcheck(f, x)

# A network of faulty kernels, in transforms and contexts

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode='circular'), nn.SiLU(), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.GELU(),
        nn.AvgPool2d(3, 2, 1), nn.ConvTranspose2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 4, 1, stride=2))

def images(): return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))

def out(m, p, x): return functional_call(m, p, (x,)).mean((2, 3))
def loss(m, p, x): return out(m, p, x).square().sum()
def leaf(x): return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()

def dual(m, p, x):
    with forward_ad.dual_level(): return forward_ad.unpack_dual(out(m, p, forward_ad.make_dual(x, x.cos())))

def penalty(m, p, x):
    "The gradient of a norm of a gradient"
    p = {n: leaf(t) for n,t in p.items()}
    g = torch.autograd.grad(loss(m, p, x := leaf(x)), x, create_graph=True)[0]
    return g.detach(),torch.autograd.grad((g.flatten(1).norm(dim=1)-1).square().mean(), [p[n] for n in p if n!='6.bias'])

def anomalies(m, p, x):
    with torch.autograd.set_detect_anomaly(True): return penalty(m, p, x)

def saved_elsewhere(m, p, x):
    with torch.autograd.graph.save_on_cpu(): return penalty(m, p, x)

def batched(m, p, x):
    y = out(m, p, x := leaf(x))
    return torch.autograd.grad(y, x, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)

def inference(m, p, x):
    with torch.inference_mode(): return out(m, p, x)

uses = {f.__name__: f for f in (loss, dual, penalty, anomalies, saved_elsewhere, batched, inference)} | {
    'grad': lambda m, p, x: grad(loss, 1)(m, p, x),
    'jvp': lambda m, p, x: jvp(lambda x: out(m, p, x), (x,), (x.cos(),)),
    'jvp of weights': lambda m, p, x: jvp(lambda p: out(m, p, x), (p,), ({n: t.cos() for n,t in p.items()},)),
    'vjp': lambda m, p, x: vjp(lambda x: loss(m, p, x), x)[1](x.new_ones(())),
    'jacrev': lambda m, p, x: jacrev(lambda x: out(m, p, x))(x),
    'jacfwd': lambda m, p, x: jacfwd(lambda b: out(m, {**p, '0.bias': b}, x))(p['0.bias']),
    'hessian': lambda m, p, x: hessian(lambda b: loss(m, {**p, '0.bias': b}, x))(p['0.bias']),
    'hessian times vector': lambda m, p, x: jvp(grad(lambda x: loss(m, p, x)), (x,), (x.cos(),)),
    'gradient of each sample': lambda m, p, x: vmap(lambda x: grad(loss, 1)(m, p, x[None]))(x),
    'ensemble': lambda m, p, x: vmap(lambda p: grad(loss, 1)(m, p, x))({n: torch.stack([t, 1.1*t]) for n,t in p.items()})}

@pytest.mark.filterwarnings('ignore:the gradient kernels')
@pytest.mark.parametrize('name', uses)
def test_transforms_and_contexts(name):
    def run(m, x): return uses[name](m, {n: p.detach() for n,p in m.named_parameters()}, x)
    want = tree_leaves(run(network().double(), images().double()))
    with tuned_kernels(): got = tree_leaves(run(apply_channels_last(network()), images().contiguous(memory_format=torch.channels_last)))
    assert len(got)==len(want)
    for a,b in zip(got, want): assert (a-b).norm()<=1e-5*b.norm().clamp_min(1e-3)

# Tensors in strides that no layer makes

views = {'expanded batch': lambda x: x[:1].expand(4, -1, -1, -1), 'expanded channels': lambda x: x[:,:1].expand(-1, 4, -1, -1),
    'expanded pixels': lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 9, 9), 'every second': lambda x: x[:,:,::2,1::3],
    'channels of another': lambda x: torch.cat([x, x], 1)[:,::2], 'transposed': lambda x: x.transpose(2, 3), 'no samples': lambda x: x[:0]}
weights = {'expanded': lambda w: w[:1].expand_as(w), 'expanded taps': lambda w: w[:,:,:1,:1].expand_as(w), 'transposed': lambda w: w.transpose(2, 3),
    'flipped': lambda w: w.flip(2, 3), 'sliced': lambda w: w[:,:,1:,::2], 'overlapping': lambda w: w.contiguous().as_strided(w.shape, (9, 3, 3, 1))}

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('view,weight', [*((v, 'transposed') for v in views), *(('transposed', w) for w in weights)])
def test_unusual_strides(view, weight, dtype):
    def run(x, w, kwargs):
        x,w = leaf(x),leaf(w)
        f = F.conv_transpose2d if kwargs.pop('transposed', False) else F.conv2d
        y = f(views[view](x), weights[weight](w), **kwargs)
        (y.sum((2, 3))*torch.arange(y.shape[1]).cos()).sum().backward() # an expanded gradient
        return [y.detach(), x.grad, w.grad]
    for kwargs in (dict(padding=1), dict(stride=2, groups=4), dict(padding=2, dilation=2, transposed=True)):
        torch.manual_seed(0)
        x,w = torch.randn(2, 4, 16, 16),0.1*torch.randn(8 if 'transposed' not in kwargs else 4, 1 if 'groups' in kwargs else 4, 3, 3)
        want = run(x.to(dtype).double(), w.to(dtype).double(), dict(kwargs))
        with tuned_kernels(): got = run(*(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, w)), dict(kwargs))
        for a,b in zip(got, want): assert a.shape==b.shape and (a-b).norm()<=(1e-5 if dtype==torch.float32 else 0.05)*b.norm()
