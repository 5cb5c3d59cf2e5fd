"""Is training in channels last right on a GPU? The parts right and checks of `python benchmarks/gpu.py`

They are made of sections that gpu.py runs side by side, each in a process of its own; those of the part faults are in gpu_faults.py."""
import contextlib, itertools, tempfile, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
from copy import deepcopy
from functools import partial
from pathlib import Path
import torch, torchvision
import torch.nn.functional as F
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import (SGD, Adam, Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, TensorCategory, TensorImage,
    TensorMask, create_unet_model, load_learner)
import fastxtend_cl.all
from fastxtend_cl.amp import DeviceMixedPrecision, amp_modes
from fastxtend_cl.callbacks import ChannelsLastCallback
from fastxtend_cl.kernels import less_random
from fastxtend_cl.check import check_formats
from fastxtend_cl.cli import digits_dls
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.plan import FormatPlan
from fastxtend_cl.preserve import seed_all
from fastxtend_cl.step import TrainingStep
from gpu_common import cudnn, in_format, kernels, precisions, relative

# Optimizers across a conversion

optimizers = {'Adam': {}, 'AdamW': {}, 'AdamW amsgrad': dict(amsgrad=True), 'SGD momentum': dict(momentum=0.9),
    'Adagrad': {}, 'RMSprop momentum': dict(momentum=0.9)}
kinds = {'plain': dict(foreach=False), 'foreach': dict(foreach=True), 'fused': dict(fused=True)}

def six_steps(name, kind, convert, device):
    "Weights after six steps in double precision, converted after three"
    torch.manual_seed(0)
    model,x = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 4, 1)).double().to(device),
        torch.randn(2, 3, 8, 8).double().to(device))
    opt = getattr(torch.optim, name.split()[0])(model.parameters(), lr=0.01, **optimizers[name], **kinds[kind])
    for i in range(6):
        if i==3 and convert: convert(model, opt)
        model(x).square().mean().backward(); opt.step(); opt.zero_grad()
    return [p.detach() for p in model.parameters()]

def across_conversion(device):
    for name,kind in itertools.product(optimizers, kinds):
        try: never = six_steps(name, kind, None, device)
        except (RuntimeError, TypeError) as e: yield dict(optimizer=name, kind=kind, unavailable=str(e).splitlines()[0]); continue
        row = dict(optimizer=name, kind=kind)
        for arm,convert in {'model.to': lambda m,o: m.to(memory_format=torch.channels_last),
                'apply_channels_last': apply_channels_last}.items():
            try: row[arm] = max((p-q).abs().max().item() for p,q in zip(never, six_steps(name, kind, convert, device)))
            except RuntimeError as e: row[arm] = f'raises: {str(e).splitlines()[0]}'
        yield dict(row, ok=isinstance(row['apply_channels_last'], float) and row['apply_channels_last']<1e-10)

# Learners

class Losses(Callback):
    "The loss and the scaler's scale of each training batch"
    order = 20
    def __init__(self): self.rows = []
    def after_batch(self):
        if self.training: self.rows.append((self.loss.item(), self.scaler.get_scale() if hasattr(self, 'scaler') else None))

@contextlib.contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield learn

def fitted(learn, epochs=1, lr=1e-3):
    "Losses of the batches of a fit"
    start = len(learn.losses.rows)
    with quiet(learn): learn.fit(epochs, lr)
    return [r[0] for r in learn.losses.rows[start:]]

def learner(model, x, y, bs, device, **kwargs):
    "A `Learner` with these samples in this order"
    items = [(TensorImage(a), TensorMask(b) if b.ndim else TensorCategory(b)) for a,b in zip(x, y)]
    return Learner(DataLoaders.from_dsets(items, items[:bs], bs=bs, num_workers=0, device=device, shuffle=False), model.to(device),
        loss_func=CrossEntropyLossFlat(axis=1 if y.ndim>1 else -1), cbs=Losses(), **kwargs)

def small_model():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

def small_learner(device, **kwargs):
    seed_all(0)
    return learner(small_model(), torch.randn(32, 3, 16, 16), torch.arange(32)%10, 16, device, **kwargs)

def fp16_rows(cbs, device, tiny):
    with less_random(0):
        learn = Learner(digits_dls(16, 256 if tiny else 64, device), small_model(), loss_func=nn.CrossEntropyLoss(), cbs=[*cbs, Losses()])
        fitted(learn, 1 if tiny else 3)
    return learn.losses.rows

def like_fastai(device, tiny):
    "fp16 through our callbacks and through fastai's own"
    fastais = [ChannelsLast, MixedPrecision('fp16')] if device.type=='cuda' else [ChannelsLast, DeviceMixedPrecision('fp16')]
    a,b = fp16_rows(fastais, device, tiny),fp16_rows([ChannelsLastCallback, DeviceMixedPrecision('fp16')], device, tiny)
    return dict(batches=len(a), same_scales=(same := [r[1] for r in a]==[r[1] for r in b]), ok=same,
        largest_loss_difference=max(abs(p[0]-q[0]) for p,q in zip(a, b)), scales=sorted({r[1] for r in b}))

def checkpoint(device, opt_func, last_first):
    "Losses after a checkpoint is loaded by a Learner of the other format, and without that detour"
    def made(last):
        learn = small_learner(device, opt_func=opt_func)
        return learn.to_channelslast(use_amp=False) if last else learn
    with tempfile.TemporaryDirectory() as folder, cudnn(allow_tf32=False):
        first,other = made(last_first),made(not last_first)
        fitted(first)
        first.save(Path(folder)/'state')
        other.load(Path(folder)/'state')
        want,got = fitted(first),fitted(other)
    return dict(saved='channels last' if last_first else 'contiguous', without=want, after=got,
        ok=all(abs(a-b)<=1e-3*abs(a) for a,b in zip(want, got)))

def exported(device, tiny):
    "Predictions of a Learner, and of its export on the CPU and on the device"
    seed_all(0)
    learn = Learner(digits_dls(16, 256 if tiny else 64, device), small_model(), loss_func=CrossEntropyLossFlat(), cbs=Losses())
    learn.to_channelslast(amp_mode='fp16' if device.type=='cuda' else None)
    fitted(learn, lr=1e-2)
    with tempfile.TemporaryDirectory() as folder, quiet(learn):
        learn.export(file := Path(folder)/'export.pkl')
        plain = all(p.is_contiguous() for p in torch.load(file, weights_only=False).model.parameters())
        want,res = learn.predict(0)[2].cpu(),{}
        for cpu in (True, False):
            with quiet(load_learner(file, cpu=cpu)) as other:
                res['cpu' if cpu else str(device)] = (other.predict(0)[2].cpu()-want).abs().max().item()
    return dict(largest_difference=res, contiguous_in_file=plain, ok=plain and max(res.values())<1e-2)

def methods(device, tiny):
    "What the methods of a Learner say, each with a few seconds"
    limit = 2. if tiny else 5.
    for name,kwargs in dict(check={}, trace={}, bench=dict(seconds=limit, epochs=False, bar=False),
            plan=dict(seconds=limit, cache=False, bar=False)).items():
        learn = small_learner(device).to_channelslast()
        with quiet(learn): res = getattr(learn, f'{name}_channelslast')(**kwargs)
        says = [l for l in str(res).splitlines() if l.strip()][:6]
        yield dict(method=name, verdict=str(getattr(res, 'verdict', '')), says=says, losses=fitted(learn),
            ok=name!='check' or res.ok is not False)

def compiled(device, how):
    "Losses of a compiled model and of the same model, not compiled, in channels last"
    amp = amp_modes(device)[0].value if device.type=='cuda' else 'bf16'
    def made(compile):
        learn = small_learner(device)
        if compile and how=='torch.compile(model)': learn.model = torch.compile(learn.model)
        if compile and how=='model.compile()': learn.model.compile()
        plan = FormatPlan(f'channels last {amp}', 'channels_last', amp, tuned=True, compile=True)
        return learn.to_channelslast(amp_mode=amp, plan=plan if compile and how=='plan with compile=True' else None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = fitted(made(True))
    graphs,breaks = torch._dynamo.utils.counters['stats'].get('unique_graphs', 0),dict(torch._dynamo.utils.counters['graph_break'])
    want = fitted(made(False))
    return dict(how=how, amp=amp, losses=dict(eager=want, compiled=got), graphs=graphs, breaks=breaks,
        ok=graphs>0 and all(abs(a-b)<=.03*abs(a) for a,b in zip(want, got)))

def cuda_graph(device, mode):
    "Gradients of a captured training step, replayed on new batches, against eager ones"
    if device.type!='cuda': return dict(skipped='needs a GPU')
    seed_all(0)
    model,y = apply_channels_last(small_model().to(device)),torch.arange(16, device=device)%10
    x = in_format(torch.randn(16, 3, 32, 32, device=device), True)
    eager,errors = deepcopy(model),[]
    def grads(model, x):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        return [p.grad for p in model.parameters()]
    with kernels(mode):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): grads(model, x)
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()): captured = grads(model, x)
        for i in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            errors.append(relative(captured, grads(eager, x)))
    return dict(kernels=mode, distances=errors, ok=max(errors)<1e-2)

# Mixed precision against fp32

def amp_case(name, tiny):
    "Model, inputs and targets"
    n,size = (6 if name=='r3d_18' else 12, 64) if tiny else (48, 128)
    x,y = torch.randn(n, 3, size, size),torch.arange(n)%10
    if name=='unet_resnet18':
        return create_unet_model(torchvision.models.resnet18, 4, (size, size), pretrained=False),x,torch.randint(4, (n, size, size))
    if name=='r3d_18':
        return torchvision.models.video.r3d_18(num_classes=10),torch.randn(n, 3, *((2, 16, 16) if tiny else (8, 64, 64))),y
    import timm
    model = timm.create_model(name, num_classes=10, drop_rate=0.)
    for m in model.modules():
        if hasattr(m, 'bn3'): nn.init.constant_(m.bn3.weight, .2) # of resnet50 it is 0, so that inner layers have no gradient
    return model,x,y

def three_steps(name, device, tiny, set_up, lr):
    "Losses of three steps of SGD from a fixed seed, and the change of each weight"
    seed_all(0)
    model,x,y = amp_case(name, tiny)
    learn = learner(model, x, y, len(x)//3, device, opt_func=SGD)
    before = [p.detach().clone() for p in model.parameters()]
    set_up(learn)
    losses = fitted(learn, lr=lr)
    return losses,[p.detach().double()-b.double() for p,b in zip(model.parameters(), before)],learn.losses.rows[-1][1]

def small_rate(name, device, tiny):
    "The learning rate with which a step changes the weights by a hundred-thousandth, so that three steps are no chaos"
    seed_all(0)
    model,x,y = amp_case(name, tiny)
    model,n = model.to(device),len(x)//3
    F.cross_entropy(model(x[:n].to(device)), y[:n].to(device)).backward()
    return 1e-5*(sum(p.square().sum() for p in model.parameters())/sum(p.grad.square().sum() for p in model.parameters())).sqrt().item()

def amp_rows(name, device, tiny):
    with cudnn(allow_tf32=False, benchmark=False):
        lr = small_rate(name, device, tiny)
        want,change,_ = three_steps(name, device, tiny, lambda learn: None, lr)
    for mode in amp_modes(device):
        kwargs = dict(init_scale=128.) if mode.value=='fp16' else {}
        losses,scales,far = dict(reference=want),{},{}
        for arm,set_up in dict(contiguous=lambda learn: learn.add_cb(DeviceMixedPrecision(mode, **kwargs)),
                ours=lambda learn: learn.to_channelslast(amp_mode=mode, **kwargs)).items():
            losses[arm],got,scales[arm] = three_steps(name, device, tiny, set_up, lr)
            far[arm] = relative(got, change)
        yield dict(model=name, amp=mode.value, lr=lr, losses=losses, scale=scales, update_distance=far,
            ok=None if far['contiguous']>.5 else far['ours']<=1.5*far['contiguous']+.01, rule='ok: distance of our update from that of '
            'contiguous fp32 <= 1.5 times that of contiguous mixed precision + 0.01; None: the latter is above 0.5, rounding explains all')

# Checks

grouped = ['mobilenetv2_100', 'resnest50d', 'inception_v3', 'regnetx_002', 'regnety_004', 'resnext50_32x4d', 'mobilenetv3_small_100',
    'efficientnet_b0', 'convnext_atto', 'ghostnet_100', 'mixnet_s', 'repvgg_a0', 'fastvit_t8', 'edgenext_xx_small']

def padded_pool(device):
    "Distance of the padded average pool's input gradient from double precision, alone and as `check_formats` sees it"
    torch.manual_seed(0)
    pixels,g,pool = torch.randn(4, 8, 15, 15, device=device),torch.randn(4, 8, 8, 8, device=device),nn.AvgPool2d(3, 2, 1)
    def grad(dtype, last):
        a = in_format(pixels, last, dtype).requires_grad_()
        pool(a).backward(in_format(g, last, dtype))
        return a.grad.double()
    exact = grad(torch.float64, False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).to(device)
    for mode in (False, 'correct', 'tuned'):
        with kernels(mode):
            alone = {f: relative([grad(torch.float32, l)], [exact]) for f,l in (('contiguous', False), ('channels last', True))}
        x,y = torch.randn(8, 3, 32, 32, device=device),torch.arange(8, device=device)%4
        c = check_formats(TrainingStep(model, x, y, F.cross_entropy, tuned=mode))
        yield dict(kernels=mode or 'plain', alone=alone, check=dict(verdict=c.verdict, reason=c.reason, first=c.first))

def check(name, device, tiny, dtype):
    "Whether a step with the kernels that a Learner trains with is right; if not, also with those of torch"
    import timm
    n,size = (2, 64) if tiny else (8, 96)
    for tuned in ('tuned', False):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).to(device)
        x,y = torch.randn(n, 3, size, size, device=device),torch.arange(n, device=device)%10
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        c = check_formats(TrainingStep(model, x, y, F.cross_entropy, opt, autocast=dtype, tuned=tuned))
        yield dict(model=name, dtype=precisions[dtype], kernels=tuned or 'plain', ok=c.ok, reason=c.reason, first=c.first,
            wrong=c.wrong[:10], seconds=c.seconds)
        if c.ok is not False: return

def steps(*these): return lambda device, tiny: iter([(n, partial(f, device, *more)) for n,f,*more in these])

fused = partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))
small_steps = [('optimizers across a conversion', across_conversion),
    *((f'checkpoint, {n}, saved {"channels last" if l else "contiguous"}', checkpoint, f, l)
        for n,f in (('Adam', Adam), ('fused AdamW', fused)) for l in (True, False)),
    *((f'CUDA graph, {m or "plain"}', cuda_graph, m) for m in (None, 'correct', 'tuned'))]
in_tiny = [("fp16 against fastai's own callbacks", like_fastai), ('export', exported), ('methods', methods)]
amp_networks = ['mobilenetv2_100', 'r3d_18', 'resnet50', 'unet_resnet18', 'efficientnet_b0']

def check_steps(dtype): return lambda device, tiny: ((n, partial(check, n, device, tiny, dtype)) for n in grouped[:1 if tiny else None])

# Name to a generator of pairs: what it is, and a function that returns a row or an iterable of rows
sections = dict(
    small=lambda device, tiny: steps(*small_steps, *((n, f, tiny) for n,f in in_tiny))(device, tiny),
    compile=steps(*((f'compile, {h}', compiled, h) for h in ('torch.compile(model)', 'model.compile()', 'plan with compile=True'))),
    amp=lambda device, tiny: ((n, partial(amp_rows, n, device, tiny)) for n in amp_networks[:2 if tiny else None]),
    fp16=check_steps(torch.float16), bf16=check_steps(torch.bfloat16), pool=steps(('padded pool', padded_pool)))
