"""Which results are wrong on a GPU? The part faults of `python benchmarks/gpu.py`

Known reports, one by one, random small networks, and the random convolutions of faults.py in both formats and three precisions, against
double precision. The sections are run by gpu.py, side by side, each in a process of its own."""
import itertools, random
from copy import deepcopy
from functools import partial
import torch
import torch.nn.functional as F
from torch import nn
from fastxtend_cl.choose import gradient_error
from faults import aten, clearly, draw, tensors, usable
from gpu_common import alive, cudnn, in_format, kernels, precisions

def attempt(f, want, dtype, mode=None):
    "`gradient_error` of what `f` computes, or what it raises"
    device = want.device
    judged = torch.bfloat16 if dtype==torch.float32 and device.type=='cuda' and torch.backends.cudnn.allow_tf32 else dtype
    try:
        with kernels(mode): return gradient_error(f(), want, judged)
    except RuntimeError as e:
        alive(device)
        return f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:120]}'

def wrong(error): return isinstance(error, float) and error>1

operators = ['F.avg_pool2d(x, 2, 1, 1)', 'F.avg_pool2d(x, 2, 2, 1)', 'F.avg_pool2d(x, 3, 2, 1)',
    'F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)', 'F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)', 'F.avg_pool2d(x, 2, 2)',
    'F.max_pool2d(x, 3, 2, 1)', 'F.max_pool2d(x, 3, 2, 1, ceil_mode=True)', 'F.adaptive_avg_pool2d(x, 1)', 'F.adaptive_avg_pool2d(x, 4)',
    'F.adaptive_max_pool2d(x, 4)', 'F.lp_pool2d(x.abs()+1, 2, 3)', 'F.interpolate(x, scale_factor=2)',
    'F.interpolate(x, scale_factor=2, mode="bilinear")', 'F.interpolate(x, size=7, mode="bilinear", antialias=True)',
    'F.interpolate(x, scale_factor=2, mode="bicubic")', 'F.pad(x, [1]*4, mode="reflect")', 'F.pad(x, [1]*4, mode="replicate")',
    'F.pad(x, [1]*4, mode="circular")', 'F.pixel_shuffle(x, 2)', 'F.batch_norm(x, None, None, training=True)', 'F.group_norm(x, 4)',
    'F.instance_norm(x)', 'F.local_response_norm(x, 5)', 'F.log_softmax(x, 1)', 'F.unfold(x, 3)',
    'F.cross_entropy(x, x.detach().argmin(1))', 'F.avg_pool3d(v, 3, 2, 1)', 'F.avg_pool3d(v, 3, 2, 1, count_include_pad=False)',
    'F.max_pool3d(v, 3, 2, 1)', 'F.adaptive_avg_pool3d(v, 2)', 'F.adaptive_avg_pool3d(v, 1)',
    'F.interpolate(v, scale_factor=2, mode="trilinear")', 'F.batch_norm(v, None, None, training=True)', 'F.group_norm(v, 4)']

def operator_row(expr, device):
    """Errors of an operator's output and input gradient, in both formats, by torch and inside `tuned_kernels`: pytorch issue 188344 and
    relatives"""
    gen,res = torch.Generator().manual_seed(0),{}
    name,shape = ('v', (3, 8, 7, 9, 9)) if '(v' in expr else ('x', (3, 8, 15, 16))
    source = torch.randn(shape, generator=gen)
    def run(t, last=False):
        y = eval(expr, dict(F=F, **{name: t.requires_grad_()}))
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return y.detach(),torch.autograd.grad(y, t, in_format(g, last).to(y))[0]
    for dtype in (torch.float32, torch.float16):
        if dtype==torch.float16 and 'max' in expr: continue # ties
        x = source.to(dtype)
        y,want = run(x.double())
        for last,mode in itertools.product((False, True), (None, 'correct', 'tuned')):
            key = f"{precisions[dtype]} {'channels last' if last else 'contiguous'}, {mode or 'plain'}"
            try:
                with kernels(mode): got = run(in_format(x.to(device), last), last)
                res[key] = [gradient_error(a.cpu(), b, dtype) for a,b in zip(got, (y, want))]
            except RuntimeError as e:
                alive(device)
                res[key] = f'{type(e).__name__}: {str(e).splitlines()[0][:120]}'
    bad = [k for k,v in res.items() if not isinstance(v, str) and max(v)>1]
    return dict(operator=expr, report=188344 if 'avg_pool2d(' in expr else None, errors=res, wrong=bad)

def slices(x, g, w, name, step):
    "What the native kernel computes in fp32, for a few slices of depth at a time"
    for i in range(0, x.shape[2], step):
        a,b = (t[:,:,i:i+step].contiguous().float() for t in (x, g))
        with cudnn(enabled=False): res = three(b, a, w.float(), [[1]*3, [0]*3, [1]*3, False, [0]*3, 1])[name]()
        yield slice(i, i+step),res

def three(g, x, w, args):
    "The three kernels of a convolution as functions"
    return dict(forward=lambda: aten.convolution(x, w, None, *args),
        dgrad=lambda: aten.convolution_backward(g, x, w, None, *args, [True, False, False])[0],
        wgrad=lambda: aten.convolution_backward(g, x, w, None, *args, [False, True, False])[1])

def large_row(device, tiny, dtype, last, benchmark):
    "The volume of pytorch issue 163539, of which most slices were wrong in bf16"
    if device.type=='cuda': torch.cuda.set_per_process_memory_fraction(min(1., 40e9/torch.cuda.mem_get_info(device)[1]))
    torch.manual_seed(0)
    d,h,n = (4, 20, 20) if tiny or device.type!='cuda' else (124, 1282, 722)
    x,g,w = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((1, 16, d, h, n), (1, 16, d, h-2, n-2), (16, 16, 1, 3, 3)))
    errors,where = {},{}
    def bad(key): return wrong(errors[key]) and errors[key]>(10 if key.startswith('wgrad') else 1) # its sums have 114 million terms
    args = [in_format(t, last, dtype) for t in (g, x, w)]
    for name,f in three(*args, [[1]*3, [0]*3, [1]*3, False, [0]*3, 1]).items():
        for mode in (None, 'correct'):
            key = f'{name}, {mode or "plain"}'
            try:
                with cudnn(benchmark=benchmark), kernels(mode): got = f()
                if name=='wgrad': errors[key] = attempt(lambda got=got: got, sum(o.double() for _,o in slices(x, g, w, name, 4)), dtype)
                else:
                    each = {s.start: attempt(lambda got=got: got[:,:,s], o, dtype) for s,o in slices(x, g, w, name, 4)}
                    errors[key],where[key] = max(each.values()),[i for i,e in each.items() if e>1][:40]
                del got
            except RuntimeError as e: errors[key] = f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'; alive(device)
            if device.type=='cuda': torch.cuda.empty_cache()
            if not bad(key): break
    most = torch.cuda.max_memory_allocated()/1e9 if device.type=='cuda' else None
    return dict(report=163539, shape=list(x.shape), dtype=precisions[dtype], channels_last=last, benchmark=benchmark, errors=errors,
        wrong_slices=where, gigabytes=most, wrong=[k for k in errors if bad(k)])

def draw_network(rng):
    "A random small network of convolutions as plain data"
    nd,layers = rng.choice((1, 1, 2)),[]
    size,c = [rng.randint(50, 1000)|1 if nd==1 else rng.randint(15, 64)|1 for _ in range(nd)],rng.randint(1, 64)
    shape = [rng.choice((1, 2, 4, 8)), c, *size]
    for _ in range(rng.randint(1, 4)):
        groups = rng.choice([1, c, *[d for d in range(2, c) if c%d==0]])
        k,s,d = rng.choice((1, 2, 3, 5, 7, 15, 31) if nd==1 else (1, 2, 3, 5, 7)),rng.choice((1, 1, 1, 2, 3)),rng.choice((1, 1, 2))
        p = rng.randint(0, d*(k-1)//2)
        new = [(n+2*p-d*(k-1)-1)//s+1 for n in size]
        if min(new)<1: continue
        o = groups*rng.randint(1, max(1, 64//groups))
        layers.append(dict(i=c, o=o, k=k, s=s, p=p, d=d, groups=groups))
        size,c = new,o
    return layers and dict(nd=nd, shape=shape, layers=layers, seed=rng.randrange(1<<30))

def network_rows(c, device, benchmark):
    "Gradients of all weights and the input, with cuDNN and without, against double precision (pytorch issue 150700)"
    torch.manual_seed(c['seed'])
    conv = nn.Conv1d if c['nd']==1 else nn.Conv2d
    model = nn.Sequential(*[m for l in c['layers'] for m in (conv(l['i'], l['o'], l['k'], l['s'], l['p'], l['d'], l['groups']), nn.GELU())])
    source = torch.randn(c['shape'])
    def grads(dtype, last, on, autocast=False):
        net = deepcopy(model).to(device, dtype)
        if last: net = net.to(memory_format=torch.channels_last)
        x = in_format(source.to(device, dtype), last).requires_grad_()
        with cudnn(enabled=on, benchmark=benchmark), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = (net(x).float() if dtype!=torch.float64 else net(x)).square().mean()
            return [g.double() for g in torch.autograd.grad(loss, [x, *net.parameters()])]
    exact,count = grads(torch.float64, False, False),{}
    norm = sum(g.square().sum() for g in exact).sqrt().item()
    def far(gs): return sum((a-b).square().sum() for a,b in zip(gs, exact)).sqrt().item()/max(norm, 1e-30)
    allowed = .02+3*far(grads(torch.float32, False, False, True))
    for last,low in itertools.product((False, True)[:c['nd']], (False, True)):
        e = far(got := grads(torch.float32, last, True, low))
        name = f"{c['nd']}d {'bf16' if low else 'fp32'} {'channels last' if last else 'contiguous'}"
        count[name] = [1, int(not e<=allowed)]
        if e<=allowed: continue
        yield dict(report=150700, setting=name, distance=e, allowed=allowed, again=far(grads(torch.float32, last, True, low)),
            without_cudnn=far(grads(torch.float32, last, False, low)), cudnn=device.type=='cuda', benchmark=benchmark,
            norm_ratio=sum(g.square().sum() for g in got).sqrt().item()/max(norm, 1e-30), case=c)
    yield dict(count=count)

def kind(c):
    w,groups,transposed = c['w'],c['args'][5],c['args'][3]
    grouping = 'dense' if groups==1 else 'depthwise' if groups==c['x'][1] else 'grouped'
    return f"{len(w)-2}d {grouping}{' transposed' if transposed else ''}"

def random_rows(c, device, benchmark):
    "All three kernels of a random convolution in both formats and three precisions, of values that all of these hold exactly"
    g,x,w = ((t*32).round().clamp(-127, 127).div(32).to(device) for t in tensors(dict(c, dtype='fp32', formats=[False]*3)))
    with cudnn(enabled=False): exact = {n: f() for n,f in three(g.double(), x.double(), w.double(), c['args']).items()}
    count = {}
    for dtype,last in itertools.product(precisions, (False, True) if x.ndim>3 else (False,)):
        for name,f in three(*[in_format(t, last, dtype) for t in (g, x, w)], c['args']).items():
            with cudnn(benchmark=benchmark):
                e = attempt(f, exact[name], dtype)
                key = f"{kind(c)} {precisions[dtype]} {'channels last' if last else 'contiguous'} {name}"
                count[key] = [1, int(wrong(e)), int(wrong(e) and e>clearly), int(isinstance(e, str))]
                if not isinstance(e, str) and not wrong(e): continue
                again,corrected = attempt(f, exact[name], dtype),attempt(f, exact[name], dtype, 'correct')
                yield dict(kind=key, error=e, again=again, corrected=corrected, benchmark=benchmark,
                    case={k: c[k] for k in ('x', 'w', 'args', 'seed')})
    yield dict(count=count)

def verdicts(rows, counts):
    "What is to be said of each report"
    def of(n): return [r for r in rows if r.get('report')==n and 'failed' not in r]
    pools,large = ([(r, w) for r in of(n) for w in r['wrong'] if 'plain' in w] for n in (188344, 163539))
    nets = [r for r in of(150700) if r['cudnn'] and not r['without_cudnn']>r['allowed']]
    def say(found, of, what): return f'reproduced: {found} of {of} {what}' if found else f'not reproduced in {of} {what}'
    return {'188344': say(len(pools), sum('plain' in k for r in of(188344) for k in r['errors']), 'settings of avg_pool2d'),
        '163539': say(len(large), sum('plain' in k for r in of(163539) for k in r['errors']), 'kernels'),
        '150700': say(len(nets), sum(v[0] for k,v in counts.items() if len(v)==2), 'gradients of random networks')}

def endless(make, run):
    rng = random.Random(0)
    for i in itertools.count():
        if c := make(rng): yield c,partial(run, c, i)

bf16,fp16,fp32 = torch.bfloat16,torch.float16,torch.float32
large_cases = [(bf16, False, False), (bf16, True, False), (bf16, False, True), (bf16, True, True), (fp16, False, True), (fp16, True, True),
    (fp32, False, False), (fp32, True, False)] # dtype, channels last, benchmark

# Name to a generator of pairs: what it is, and a function that returns a row or an iterable of rows
sections = dict(
    operators=lambda device, tiny: ((e, partial(operator_row, e, device)) for e in operators),
    large=lambda device, tiny: ((f'{o}', partial(large_row, device, tiny, *o)) for o in large_cases),
    networks=lambda device, tiny: endless(draw_network, lambda c, i: network_rows(c, device, i%2==0)),
    random=lambda device, tiny: endless(lambda rng: c if usable(c := draw(rng)) else None, lambda c, i: random_rows(c, device, i%2==0)))
