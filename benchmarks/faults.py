"""Random convolutions through `tuned_kernels`, looking for kernels that compute wrong results or end the process:
`python benchmarks/faults.py`

One to three dimensions, transposed, grouped, dilated, strided, padded, in every dtype and in mixed formats. Each call is made in a
forked child, in memory that holds no zeros, and all three results are compared with double precision; what torch's own kernel
computes is compared too. A child that dies is replayed call by call. Writes results/faults-cpu.json: how many calls were made, which
of torch's kernels were wrong, and whether one of ours was.

`sections` are what `python benchmarks/gpu.py --parts faults` runs on a GPU: known reports, one by one, random small networks, and the
random convolutions of here in both formats and three native_dtypes."""
import contextlib, itertools, json, math, os, random, time
from collections import Counter
from copy import deepcopy
from functools import partial
import torch
import torch.nn.functional as F
from torch import nn
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.kernels import kernel_count, kernel_table, tuned_kernels
from fastxtend_cl.choose import gradient_error
from fastxtend_cl.memory import poisoned_memory
from fastxtend_cl.ways import Call, can_crash, suspicious
from common import save

aten,dtypes = torch.ops.aten,{'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp64': torch.float64}
formats = {2: torch.channels_last, 3: torch.channels_last_3d}

clearly = 5. # times what verification allows: a bias gradient whose terms cancel, or a sum of many terms in fp16, may be up to there

def draw(rng):
    "A random convolution as plain data"
    nd = rng.choices((1, 2, 3), (2, 5, 3))[0]
    def each(values, weights=None): return rng.choices(values, weights, k=nd) if rng.random()<.5 else rng.choices(values, weights)*nd
    groups = rng.choice((1, 1, 1, 2, 4, 0)) # 0: depthwise
    if groups==0: groups = c = o = rng.choice((4, 8, 16, 24, 32, 40))
    else: c,o = groups*rng.choice((1, 2, 3, 4, 5, 8, 12, 16, 24)),groups*rng.choice((1, 2, 4, 5, 8, 16, 24, 32))
    transposed = rng.random()<.25
    kernel,stride,dilation = each((1, 2, 3, 5, 7), (4, 2, 6, 2, 1)),each((1, 2, 3, 4), (5, 4, 1, 1)),each((1, 2, 3), (5, 2, 1))
    padding = [rng.randint(0, d*(k-1)//2+(k>1)) for k,d in zip(kernel, dilation)]
    output_padding = [rng.randrange(max(s, d)) if transposed and rng.random()<.3 else 0 for s,d in zip(stride, dilation)]
    most = {1: 64, 2: 40, 3: 12}[nd]
    size = [rng.choice((rng.randint(1, 8), rng.randint(4, most), most)) for _ in range(nd)]
    return dict(x=[rng.choice((1, 2, 4, 5)), c, *size], w=[c, o//groups, *kernel] if transposed else [o, c//groups, *kernel],
        args=[stride, padding, dilation, transposed, output_padding, groups], bias=rng.random()<.5,
        dtype=rng.choices(list(dtypes), (4, 6, 2, 1))[0], formats=[rng.random()<.75 for _ in 'gxw'], seed=rng.randrange(1<<30))

def out_size(c):
    (stride,padding,dilation,transposed,extra,_),k = c['args'],c['w'][2:]
    if transposed: return [(n-1)*s-2*p+d*(k-1)+e+1 for n,s,p,d,k,e in zip(c['x'][2:], stride, padding, dilation, k, extra)]
    return [(n+2*p-d*(k-1)-1)//s+1 for n,s,p,d,k in zip(c['x'][2:], stride, padding, dilation, k)]

def usable(c):
    ns = out_size(c)
    return min(ns)>0 and c['x'][0]*max(math.prod(c['x'][1:]), math.prod(ns)*c['w'][0 if not c['args'][3] else 1]*8)<4e6

def tensors(c):
    gen,nd = torch.Generator().manual_seed(c['seed']),len(c['x'])-2
    out = c['w'][1]*c['args'][5] if c['args'][3] else c['w'][0]
    def make(shape, last):
        t = torch.randn(shape, generator=gen).to(dtypes[c['dtype']])
        return t.contiguous(memory_format=formats[nd]) if last and nd in formats else t
    return [make(s, f) for s,f in zip(([c['x'][0], out, *out_size(c)], c['x'], c['w']), c['formats'])]

def tell(got, want, dtype): return max((gradient_error(a, b, dtype) for a,b in zip(got, want) if b is not None), default=0.)

def run(c):
    """Errors of what torch computes, forward and backward (None: it is known to end the process, and was not run), and of what we do, as
    multiples of what rounding explains"""
    g,x,w = tensors(c)
    args,dtype,bias = c['args'],dtypes[c['dtype']],[g.shape[1]] if c['bias'] else None
    mask = [True, True, c['bias']]
    exact = [t.double().contiguous() for t in (g, x, w)]
    want,y = aten.convolution_backward(*exact, bias, *args, mask),aten.convolution(*exact[1:], None, *args)
    call,res = Call.of((g, x, w, bias, *args, mask)),dict(forward=None, backward=None)
    res['known'],res['deadly'] = suspicious(call),[k for k in ('forward', 'dgrad', 'wgrad') if can_crash(call, kernel=k)]
    def back(mask=mask): return aten.convolution_backward(g, x, w, bias, *args, mask)
    with poisoned_memory():
        if 'forward' not in res['deadly']: res['forward'] = tell([aten.convolution(x, w, None, *args)], [y], dtype)
        if not {'dgrad', 'wgrad'} & {*res['deadly']}: res['backward'] = tell(back(), want, dtype)
    since,res['ours'],res['ours_forward'] = kernel_count(),0.,0.
    for i in range(2): # as decided, and from memory
        with poisoned_memory() if i else contextlib.nullcontext(), tuned_kernels():
            res['ours_forward'] = max(res['ours_forward'], tell([aten.convolution(x, w, None, *args)], [y], dtype))
            res['ours'] = max(res['ours'], tell(back(), want, dtype))
    res['corrected'] = [k.kernel for _,k in kernel_table(since).rows if k.corrected]
    return res

def child(cases, write):
    torch.set_num_threads(1)
    for i,c in enumerate(cases):
        os.write(write, f'{i}\n'.encode())
        try: r = run(c)
        except RuntimeError as e: r = dict(raised=(str(e).splitlines() or [''])[0][:120])
        os.write(write, (json.dumps(r)+'\n').encode())

def forked(cases, seconds=120):
    "What a child answers, and its exit status"
    read,write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        try: child(cases, write)
        finally: os._exit(0)
    os.close(write)
    out = b''
    while chunk := os.read(read, 1<<16): out += chunk
    os.close(read)
    return [json.loads(l) for l in out.decode().splitlines() if l.startswith('{')],os.waitpid(pid, 0)[1]

# On a GPU

native_dtypes = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16'}

def in_format(t, last, dtype=None):
    return t.to(dtype or t.dtype, copy=True, memory_format=formats[t.ndim-2] if last and t.ndim-2 in formats else torch.contiguous_format)

def kernels(mode): return tuned_kernels(mode) if mode else contextlib.nullcontext()

@contextlib.contextmanager
def cudnn(**flags):
    "A context with these settings; torch's own sets all others, too"
    old = {k: getattr(torch.backends.cudnn, k) for k in flags}
    try:
        for k,v in flags.items(): setattr(torch.backends.cudnn, k, v)
        yield
    finally:
        for k,v in old.items(): setattr(torch.backends.cudnn, k, v)

def alive(device):
    "Raise if the device has been lost"
    torch.ones(1, device=device).add(1).item()

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
            key = f"{native_dtypes[dtype]} {'channels last' if last else 'contiguous'}, {mode or 'plain'}"
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
                if name=='wgrad': errors[key] = attempt(lambda: got, sum(o.double() for _,o in slices(x, g, w, name, 4)), dtype)
                else:
                    each = {s.start: attempt(lambda: got[:,:,s], o, dtype) for s,o in slices(x, g, w, name, 4)}
                    errors[key],where[key] = max(each.values()),[i for i,e in each.items() if e>1][:40]
                del got
            except RuntimeError as e: errors[key] = f'{type(e).__name__}: {str(e).splitlines()[0][:200]}'; alive(device)
            if device.type=='cuda': torch.cuda.empty_cache()
            if not bad(key): break
    most = torch.cuda.max_memory_allocated()/1e9 if device.type=='cuda' else None
    return dict(report=163539, shape=list(x.shape), dtype=native_dtypes[dtype], channels_last=last, benchmark=benchmark, errors=errors,
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
    "All three kernels of a random convolution in both formats and three native_dtypes, of values that all of these hold exactly"
    g,x,w = ((t*32).round().clamp(-127, 127).div(32).to(device) for t in tensors(dict(c, dtype='fp32', formats=[False]*3)))
    with cudnn(enabled=False): exact = {n: f() for n,f in three(g.double(), x.double(), w.double(), c['args']).items()}
    count = {}
    for dtype,last in itertools.product(native_dtypes, (False, True) if x.ndim>3 else (False,)):
        for name,f in three(*[in_format(t, last, dtype) for t in (g, x, w)], c['args']).items():
            with cudnn(benchmark=benchmark):
                e = attempt(f, exact[name], dtype)
                key = f"{kind(c)} {native_dtypes[dtype]} {'channels last' if last else 'contiguous'} {name}"
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

@call_parse
def main(
    n:int=20_000, # Calls
    seed:int=0,
    each:int=50, # Calls of a child
    tiny:bool=False, # 100 calls; writes nothing
):
    "Look for faulty kernels and write results/faults-cpu.json"
    os.environ['FASTXTEND_CL_CACHE'] = os.devnull # each child decides by itself
    import warnings; warnings.simplefilter('ignore')
    rng,cases,found,died,raised,start = random.Random(seed),[],[],[],Counter(),time.time()
    while len(cases)<(100 if tiny else n):
        if usable(c := draw(rng)): cases.append(c)
    for i in progress_bar(range(0, len(cases), each), leave=False):
        some = cases[i:i+each]
        while some:
            answers,status = forked(some)
            found += zip(some, answers)
            if not status and len(answers)==len(some): break
            at = some[len(answers)]
            died.append(dict(at, status=status, again=[forked([at])[1] for _ in range(10)]))
            some = some[len(answers)+1:]
    for _,r in found:
        if 'raised' in r: raised[r['raised']] += 1
    ok = [(c,r) for c,r in found if 'raised' not in r]
    def bad(key): return [dict(c, **r) for c,r in ok if r[key] is not None and not r[key]<=clearly]
    wrong = {k: bad(k) for k in ('forward', 'backward', 'ours_forward', 'ours')}
    unknown = [w for w in wrong['backward'] if not w['known']]
    summary = dict(calls=len(cases), compared=len(ok), raised=dict(raised), died=len(died),
        never_run=dict(Counter(k for _,r in ok for k in r['deadly'])), wrong={k: len(v) for k,v in wrong.items()},
        backward_wrong_and_not_known_by_condition=len(unknown), corrected=dict(Counter(k for _,r in ok for k in r['corrected'])),
        known_by_condition=sum(r['known'] for _,r in ok), by_dtype=dict(Counter(c['dtype'] for c,_ in ok)),
        backward_wrong_by_dtype=dict(Counter(w['dtype'] for w in wrong['backward'])), seconds=round(time.time()-start))
    print(json.dumps(summary, indent=1))
    for o in (*died[:5], *wrong['ours'][:5], *wrong['ours_forward'][:5], *wrong['forward'][:5], *unknown[:5]): print(o)
    if not tiny: save('faults-cpu', summary=summary, died=died, not_known_by_condition=unknown[:50], **{k: v[:100] for k,v in wrong.items()})
