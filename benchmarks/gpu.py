"""What has to be seen on a GPU, in one command: `python benchmarks/gpu.py`

Right (`--parts right`): optimizers across a conversion; fp16 training through `to_channelslast` against fastai's own
callbacks; the padded average pool whose backward was wrong in channels last (pytorch issue 188344) and families with
grouped and depthwise convolutions under `check_formats`; the demo; traces and fake tensors, each with a
result of its own; the tests.
Fast (`--parts fast`, under ten minutes): the case that PyTorch publishes (ResNet-50, mixed precision, batches of 200,
224 pixels: 22 % on a V100), the models of its list, and the peers.
Kernels (`--parts kernels`, within two minutes): forward, dgrad and wgrad of the distinct convolutions of nine networks in both formats
and in fp16, bf16 and fp32, each compared with fp32 and contiguous: convolutions-DEVICE.json.
Plans (`--parts plan`) for networks with grouped and depthwise convolutions, where channels last is known to lose:
plans-DEVICE.json.
Writes results/gpu-DEVICE.json, published-DEVICE.json and .md, peers-DEVICE.json and .md. `--device cpu --tiny` tries
the script without a GPU."""
import contextlib, gc, io, itertools, json, os, subprocess, sys, time, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import Callback, Learner
from fastcore.script import call_parse
from fastxtend_cl.amp import DeviceMixedPrecision
from fastxtend_cl.channelslast import ChannelsLastCallback, less_random
from fastxtend_cl.bench import bench_formats, device_clock
from fastxtend_cl.check import check_formats
from fastxtend_cl.cli import UsageError, demo, digits_dls, model_step
from fastxtend_cl.format import apply_channels_last
from fastxtend_cl.kernels import gradient_error, make_args
from fastxtend_cl.plan import plan_formats
from fastxtend_cl.step import TrainingStep
from fastxtend_cl.ways import Call
import peers
from common import conditions, results, save
from traces import supported # the models for which PyTorch's tutorial gives 8 to 35 %

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
    rows = []
    for name,kind in itertools.product(optimizers, kinds):
        try: never = six_steps(name, kind, None, device)
        except (RuntimeError, TypeError) as e: rows.append(dict(optimizer=name, kind=kind, unavailable=str(e).splitlines()[0])); continue
        row = dict(optimizer=name, kind=kind)
        for arm,convert in {'model.to': lambda m,o: m.to(memory_format=torch.channels_last),
                'apply_channels_last': apply_channels_last}.items():
            try: row[arm] = max((p-q).abs().max().item() for p,q in zip(never, six_steps(name, kind, convert, device)))
            except RuntimeError as e: row[arm] = f'raises: {str(e).splitlines()[0]}'
        rows.append(row)
    return rows

class Scales(Callback):
    "The loss and the scaler's scale of each batch"
    order = 20
    def before_fit(self): self.rows = []
    def after_batch(self):
        if self.training: self.rows.append((self.loss.item(), self.scaler.get_scale()))

def fp16_rows(cbs, device, tiny):
    with less_random(0), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        learn = Learner(digits_dls(16, 256 if tiny else 64, device), model, loss_func=nn.CrossEntropyLoss(), cbs=[*cbs, Scales()])
        with learn.no_bar(), learn.no_logging(): learn.fit(1 if tiny else 3, 1e-3)
    return learn.scales.rows

grouped = ['regnety_004', 'resnext50_32x4d', 'mobilenetv2_100', 'mobilenetv3_small_100', 'efficientnet_b0',
    'convnext_atto', 'ghostnet_100', 'mixnet_s', 'repvgg_a0', 'fastvit_t8', 'edgenext_xx_small']

def padded_pool(device):
    "Distance of the padded average pool's input gradient from double precision, alone and as `check_formats` sees it"
    torch.manual_seed(0)
    x,g,pool = torch.randn(4, 8, 15, 15, device=device),torch.randn(4, 8, 8, 8, device=device),nn.AvgPool2d(3, 2, 1)
    def grad(dtype, fmt):
        a = x.to(dtype, memory_format=fmt, copy=True).requires_grad_()
        pool(a).backward(g.to(dtype, memory_format=fmt))
        return a.grad.double()
    exact = grad(torch.float64, torch.contiguous_format)
    res = {str(f).split('.')[1]: ((grad(torch.float32, f)-exact).norm()/exact.norm()).item()
        for f in (torch.contiguous_format, torch.channels_last)}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).to(device)
    c = check_formats(TrainingStep(model, torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device)%4,
        nn.functional.cross_entropy))
    return dict(alone=res, check=dict(ok=c.ok, reason=c.reason, first=c.first))

def checks(device, tiny):
    import timm
    for name in grouped[:1] if tiny else grouped:
        for dtype in (torch.float16, torch.bfloat16):
            torch.manual_seed(0)
            model,n = timm.create_model(name, num_classes=10).to(device),2 if tiny else 16
            size = 64 if tiny else 160
            try:
                c = check_formats(TrainingStep(model, torch.randn(n, 3, size, size, device=device),
                    torch.arange(n, device=device)%10, nn.functional.cross_entropy,
                    torch.optim.SGD(model.parameters(), lr=0.01), autocast=dtype))
                yield dict(model=name, dtype=str(dtype), ok=c.ok, reason=c.reason, first=c.first, seconds=c.seconds)
            except Exception as e: yield dict(model=name, dtype=str(dtype), raised=f'{type(e).__name__}: {e}'.splitlines()[0])

def plan_rows(device, tiny):
    "What `plan_formats` finds, on networks from timm"
    rows = []
    for name in ('regnetx_032', 'resnest50d', 'mobilenetv2_100') if not tiny else ('mobilenetv2_050',):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: step = model_step(name, *((2, 32) if tiny else (64, 224)), device=str(device))
            except UsageError as e: rows.append(dict(model=name, failed=str(e))); continue
        plan = plan_formats(step, torch.float16 if device.type=='cuda' else torch.bfloat16, budget=10 if tiny else 180,
            cache=False, bar=False)
        rows.append(dict(model=name, **plan.to_dict()))
        print(plan, flush=True)
    return rows

networks = {'resnet50': 2, 'regnetx_032': 2, 'regnety_032': 2, 'resnest50d': 2, 'mobilenetv2_100': 2, 'efficientnet_b0': 2, 'convnext_tiny': 2,
    'densenet121': 2, 'unet3d': 3}

def block3d(i, o):
    return nn.Sequential(*[m for c in (i, o) for m in (nn.Conv3d(c, o, 3, padding=1, bias=False), nn.BatchNorm3d(o), nn.ReLU())])

class UNet3d(nn.Module):
    "A small 3-D U-Net: two steps down, two up, with concatenations"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d,self.e = (block3d(i, o) for i,o in ((1, 32), (32, 64), (64, 128), (128, 64), (64, 32)))
        self.up1,self.up2,self.head,self.pool = nn.ConvTranspose3d(128, 64, 2, 2),nn.ConvTranspose3d(64, 32, 2, 2),nn.Conv3d(32, 2, 1),nn.MaxPool3d(2)
    def forward(self, x):
        a = self.a(x); b = self.b(self.pool(a))
        d = self.d(torch.cat([b, self.up1(self.c(self.pool(b)))], 1))
        return self.head(self.e(torch.cat([a, self.up2(d)], 1)))

def network(name):
    if name=='unet3d': return UNet3d()
    import timm
    return timm.create_model(name)

class Calls(TorchDispatchMode):
    "The distinct calls of `aten::convolution_backward`, and how often each is made"
    def __init__(self): super().__init__(); self.found = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default: self.found[replace(Call.of(args), mask=(True, True, False))] += 1
        return func(*args, **(kwargs or {}))

def convolutions_of(name, tiny):
    "The distinct convolutions of a training step of a network, from a run without values"
    shape = ((2, 3, 32, 32) if tiny else (64, 3, 224, 224)) if networks[name]==2 else ((1, 1, 8, 8, 8) if tiny else (2, 1, 64, 64, 64))
    with torch.device('meta'), warnings.catch_warnings(), Calls() as calls:
        warnings.simplefilter('ignore')
        network(name)(torch.randn(shape)).sum().backward()
    return calls.found

def kernel_rows(args, last, dtype, exact):
    "Milliseconds by the device's clock, and errors, of the three kernels of a call; `exact` keeps what the first setting computes"
    def ready(t):
        t,fmt = t.to(dtype),torch.contiguous_format if not last else torch.channels_last if t.ndim==4 else torch.channels_last_3d
        return torch.empty(t.shape, dtype=dtype, device=t.device, memory_format=fmt).copy_(t)
    (g,x,w),rest,res,aten = map(ready, args[:3]),args[4:10],{},torch.ops.aten
    runs = {'forward': lambda: aten.convolution(x, w, None, *rest),
        'dgrad': lambda: aten.convolution_backward(g, x, w, None, *rest, [True, False, False])[0],
        'wgrad': lambda: aten.convolution_backward(g, x, w, None, *rest, [False, True, False])[1]}
    for name,run in runs.items():
        try:
            ms = 1e3*min(device_clock(x.device).steps(run, 7)[0][2:])
            res[name] = dict(ms=ms, error=gradient_error(run().float(), exact.setdefault(name, run().float()), dtype))
        except RuntimeError as e: res[name] = dict(failed=str(e).splitlines()[0][:120])
    return res

def run_kernels(device, tiny, seconds=110):
    "Time each distinct convolution of all networks once; written after each network"
    start,seen,rows = time.time(),{},[]
    settings = {f"{'channels last' if last else 'contiguous'} {str(d)[6:]}": (last, d)
        for d in (torch.float32, torch.float16, torch.bfloat16) for last in (False, True)}
    for name in list(networks)[:1 if tiny else None] + ['unet3d']*tiny:
        for call,count in convolutions_of(name, tiny).items():
            if time.time()-start>seconds: rows.append(dict(model=name, left_out=str(call))); continue
            if call not in seen:
                exact,args = {},make_args(call, device, 1<<28)
                seen[call] = {n: kernel_rows(args, *o, exact) for n,o in settings.items()}
            rows.append(dict(model=name, call=str(call), count=count, kernels=seen[call]))
        print(f'{name:20}{sum(r["model"]==name for r in rows):4} distinct convolutions, {time.time()-start:.0f} s', flush=True)
        if not tiny: save(f'convolutions-{device.type}', rows=rows, tf32=torch.backends.cudnn.allow_tf32, benchmark=torch.backends.cudnn.benchmark)
    wrong = {(r['call'], s, k): v['error'] for r in rows if 'kernels' in r for s,ks in r['kernels'].items() for k,v in ks.items() if (v.get('error') or 0)>1}
    print(f'{len(rows)} rows; {len(wrong)} kernels further from fp32 and contiguous than rounding explains', *list(wrong.items())[:5], sep='\n')

def run_tests(device):
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/test_amp.py',
        'tests/test_format.py', 'tests/test_training.py', 'tests/test_step.py', 'tests/test_check.py',
        'tests/test_trace.py', 'tests/test_kernels.py'],
        env={**os.environ, 'FXCL_DEVICE': str(device)}, capture_output=True, text=True)
    return dict(status=r.returncode, tail=r.stdout.splitlines()[-15:])

def run_scripts(device, tiny):
    "Scripts that write results of their own"
    more = ['--tiny'] if tiny else []
    scripts = [['traces.py'], *([['traces.py', '--autocast', 'fp16']] if device.type=='cuda' else []), ['fake.py']]
    here = Path(__file__).parent
    return {' '.join(s): subprocess.run([sys.executable, s[0], *s[1:], '--device', str(device), *more], cwd=here).returncode
        for s in scripts}

def published_row(name, bs, size, device, amp, limit):
    "Mixed precision, contiguous against channels last"
    try:
        res = bench_formats(model_step(name, bs, size, 1000, str(device), amp),
            [f'channels last {amp}', 'contiguous fp32'], limit=limit, bar=False)
    except Exception as e: return dict(model=name, bs=bs, failed=f'{type(e).__name__}: {e}'[:200]) # such as out of memory
    r = res[f'channels last {amp}']
    return dict(model=name, bs=bs, size=size, amp=amp, verdict=r.verdict, ratio=r.ratio, low=r.low, high=r.high,
        ms=1e3*res.now.seconds, samples=r.samples, noise=res.noise, bench=res.to_dict())

def run_published(device, tiny, limit):
    amp = 'fp16' if device.type=='cuda' else 'bf16'
    cases = [('resnet50', 2, 32), ('squeezenet1_0', 2, 64)] if tiny else [('resnet50', 200, 224), *[(n, 64, 224) for n in supported]]
    rows = []
    for i,(name,bs,size) in enumerate(cases):
        rows.append(r := published_row(name, bs, size, device, amp, limit if i else 5*limit))
        print(f'{name:20}{bs:4}  '
            + (r['failed'] if 'failed' in r else r['verdict'] if r['ratio'] is None
                else f"{r['verdict']:7}{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"), flush=True)
        gc.collect()
        if device.type=='cuda': torch.cuda.empty_cache()
    if tiny: return
    save(f'published-{device.type}', rows=rows)
    c = conditions()
    lines = ['| model | batch | times as fast in channels last | 99 % interval | |', '|---|--:|--:|---|---|']
    lines += [f"| {r['model']} | {r['bs']} | | | {r['failed']} |" if 'failed' in r or r['ratio'] is None else
        f"| {r['model']} | {r['bs']} | {r['ratio']:.2f} | {r['low']:.2f} to {r['high']:.2f} | {r['verdict']} |"
        for r in rows]
    (results/f'published-{device.type}.md').write_text(f"A training step in {amp}, channels last against contiguous. "
        f"{c['gpu'] or c['cpu']}, torch {c['torch']}, {c['date']}.\n\n" + '\n'.join(lines) + '\n')

def run_peers(device, tiny, limit):
    rows = []
    for name,shape in list(peers.models.items())[:1 if tiny else None]:
        if tiny: shape = (2, 3, 32, 32)
        rows += peers.measure(name, shape if tiny or name=='r3d_18' else (4*shape[0], *shape[1:]), device, 8,
            3 if tiny else 8, limit, compile=False)
        print(name, *[f"{r['arm']}: {r['ratio'][0]:.2f}" for r in rows if r['model']==name and 'ratio' in r], sep='  ', flush=True)
        gc.collect()
        if device.type=='cuda': torch.cuda.empty_cache()
    if not tiny: peers.write(f'peers-{device.type}', rows)

@call_parse
def main(
    device:str='cuda', # Where to run
    tiny:bool=False, # Small and short, to try the script
    tests:bool=True, # Run the tests too
    parts:str='kernels,right,fast,plan', # What to do: which kernels are fast, is it right, is it fast, what is the fastest
    limit:float=4., # Seconds for a network
):
    "Measure and write benchmarks/results/gpu-DEVICE.json"
    device,res = torch.device(device),{}
    if set(parts.split(','))-{'kernels', 'right', 'fast', 'plan'}: sys.exit(f'--parts takes kernels, right, fast and plan, got {parts}')
    if 'kernels' in parts: run_kernels(device, tiny)
    if 'fast' in parts: run_published(device, tiny, limit); run_peers(device, tiny, limit)
    if 'plan' in parts:
        rows = plan_rows(device, tiny)
        if not tiny: save(f'plans-{device.type}', rows=rows)
    if 'right' not in parts: return
    res['across_conversion'] = across_conversion(device)
    for r in res['across_conversion']: print(r)
    fastais = [ChannelsLast, MixedPrecision('fp16')] if device.type=='cuda' else [ChannelsLast, DeviceMixedPrecision('fp16')]
    a,b = fp16_rows(fastais, device, tiny),fp16_rows([ChannelsLastCallback, DeviceMixedPrecision('fp16')], device, tiny)
    res['fp16'] = dict(batches=len(a), same_scales=[r[1] for r in a]==[r[1] for r in b],
        largest_loss_difference=max(abs(p[0]-q[0]) for p,q in zip(a, b)), scales=sorted({r[1] for r in b}))
    print(res['fp16'])
    res['padded_pool'] = padded_pool(device)
    print(res['padded_pool'])
    res['checks'] = []
    for row in checks(device, tiny): res['checks'].append(row); print(row, flush=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        demo(device=str(device), epochs=1 if tiny else 4, arch='xresnet18' if tiny else 'resnet50',
            size=32 if tiny else 128, bs=256 if tiny else 64, json=True)
    res['demo'] = json.loads(out.getvalue())
    for r in res['demo']['arms']: print(r)
    res['scripts'] = run_scripts(device, tiny)
    print(res['scripts'])
    if tests:
        res['tests'] = run_tests(device)
        print(*res['tests']['tail'], sep='\n')
    if not tiny: save(f'gpu-{device.type}', **res)
