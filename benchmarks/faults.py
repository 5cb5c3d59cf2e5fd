"""Which CPU kernels compute wrong results or crash, and does `tuned_kernels` use one of them? `python benchmarks/faults.py`

Random convolutions: one to three dimensions, transposed, grouped, dilated, strided, padded, in every dtype and in mixed formats. Each call
is made in a forked child, in memory without zeros, and all three results are compared with double precision, those of torch's own
kernels too. A child that crashes is replayed call by call. Writes results/faults-cpu.json: how many calls were made, which of torch's
kernels were wrong, and whether one of ours was. gpu_faults.py makes the same calls on a GPU."""
import contextlib, json, math, os, random, time, warnings
from collections import Counter
import torch
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.kernels import kernel_count, kernel_table, tuned_kernels
from fastxtend_cl.choose import gradient_error
from fastxtend_cl.memory import poisoned_memory
from fastxtend_cl.ways import Call, can_crash
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
    kernel,stride,dilation = each((1, 2, 3, 5, 7), (4, 2, 6, 2, 1)),each((1, 2, 3, 4), (5, 4, 1, 1)),each((1, 2, 3, 6, 12), (10, 4, 2, 1, 1))
    padding = [rng.randint(0, d*(k-1)//2+(k>1)) for k,d in zip(kernel, dilation)]
    output_padding = [rng.randrange(max(s, d)) if transposed and rng.random()<.3 else 0 for s,d in zip(stride, dilation)]
    most = rng.choices({1: (64, 300), 2: (40, 130), 3: (12, 36)}[nd], (3, 1))[0]
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
    """Errors of torch's kernels, forward and backward (None: known to crash, so not run), and of `tuned_kernels`, as multiples of what
    rounding explains"""
    g,x,w = tensors(c)
    args,dtype,bias = c['args'],dtypes[c['dtype']],[g.shape[1]] if c['bias'] else None
    mask = [True, True, c['bias']]
    exact = [t.double().contiguous() for t in (g, x, w)]
    want,y = aten.convolution_backward(*exact, bias, *args, mask),aten.convolution(*exact[1:], None, *args)
    call,res = Call.of((g, x, w, bias, *args, mask)),dict(forward=None, backward=None)
    res['crashing'] = [k for k in ('forward', 'dgrad', 'wgrad') if can_crash(call, kernel=k)]
    def back(mask=mask): return aten.convolution_backward(g, x, w, bias, *args, mask)
    with poisoned_memory():
        if 'forward' not in res['crashing']: res['forward'] = tell([aten.convolution(x, w, None, *args)], [y], dtype)
        if not {'dgrad', 'wgrad'} & {*res['crashing']}: res['backward'] = tell(back(), want, dtype)
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
    "The answers of a child, and its exit status"
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

def answers_of(cases, each):
    "Pairs of a call and its answer, and the calls that crashed"
    found,died = [],[]
    for i in progress_bar(range(0, len(cases), each), leave=False):
        some = cases[i:i+each]
        while some:
            answers,status = forked(some)
            found += zip(some, answers)
            if not status and len(answers)==len(some): break
            at = some[len(answers)]
            died.append(dict(at, status=status, again=[forked([at])[1] for _ in range(10)]))
            some = some[len(answers)+1:]
    return found,died

def summary_of(found, died, wrong, seconds):
    ok = [(c,r) for c,r in found if 'raised' not in r]
    return dict(calls=len(found)+len(died), compared=len(ok), raised=dict(Counter(r['raised'] for _,r in found if 'raised' in r)), died=len(died),
        never_run=dict(Counter(k for _,r in ok for k in r['crashing'])), wrong={k: len(v) for k,v in wrong.items()},
        corrected=dict(Counter(k for _,r in ok for k in r['corrected'])),
        by_dtype=dict(Counter(c['dtype'] for c,_ in ok)),
        backward_wrong_by_dtype=dict(Counter(w['dtype'] for w in wrong['backward'])), seconds=round(seconds))

@call_parse
def main(
    n:int=20_000, # Calls
    seed:int=0, # Of the calls
    each:int=50, # Calls of a child
    tiny:bool=False, # 100 calls; writes nothing
):
    "Look for faulty kernels and write benchmarks/results/faults-cpu.json"
    os.environ['FASTXTEND_CL_CACHE'] = os.devnull # each child decides by itself
    warnings.simplefilter('ignore')
    rng,cases,start = random.Random(seed),[],time.time()
    while len(cases)<(100 if tiny else n):
        if usable(c := draw(rng)): cases.append(c)
    found,died = answers_of(cases, each)
    def bad(key): return [dict(c, **r) for c,r in found if r.get(key) is not None and not r[key]<=clearly]
    wrong = {k: bad(k) for k in ('forward', 'backward', 'ours_forward', 'ours')}
    summary = summary_of(found, died, wrong, time.time()-start)
    print(json.dumps(summary, indent=1))
    for o in (*died[:5], *wrong['ours'][:5], *wrong['ours_forward'][:5], *wrong['forward'][:5], *wrong['backward'][:5]): print(o)
    if not tiny: save('faults-cpu', summary=summary, died=died, **{k: v[:100] for k,v in wrong.items()})
