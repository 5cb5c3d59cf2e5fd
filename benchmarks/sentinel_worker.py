"""Runs layers for `sentinel.py` in an environment that needs nothing but torch: a job a line on stdin, answers a line each on stdout

A job names a layer, and the arms to run: dtype, format, kernels. Each job runs in a forked child, unless it is `direct`. If that crashes, each arm runs again
in a child of its own, so that a crash has the right name. Inputs, weights and gradients are numbers that bf16 represents, the same in each torch, so
one result in double precision is the reference of all dtypes; of it the norm is kept, since it could be wrong itself. Results are
checked in memory that is filled with the byte 0x7f."""
import copy, ctypes, json, math, os, signal, sys, time
import torch
from torch import nn

dtypes = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
norms = nn.modules.batchnorm._NormBase, nn.GroupNorm

def random(shape, seed):
    "Numbers from -1 to 1 that are the same in each torch"
    n = (torch.arange(math.prod(shape))+seed*10_000_019)*2654435761 & 0xffffffff
    for shift in (15, 13): n = (n^n>>shift)*2246822519 & 0xffffffff
    return (n.double()/2**31-1).bfloat16().double().reshape(shape)

def with_tuples(kw): return {k: tuple(v) if isinstance(v, list) else v for k,v in kw.items()}

class Layer:
    "A layer in double precision, its input, the gradient of its output, and the right results"
    def __init__(self, layer, kwargs, x, **_):
        self.module,self.x = getattr(nn, layer)(**with_tuples(kwargs)).double(),random(x, 0)
        with torch.no_grad():
            for i,p in enumerate(self.module.parameters()): p.copy_((random(p.shape, i+2)/math.sqrt(p[0].numel())).bfloat16())
        m,x = copy.deepcopy(self.module),self.x.clone().requires_grad_()
        y = m(x)
        self.g,params = random(y.shape, 1),[*m.parameters()]
        gx,*gw = torch.autograd.grad(y, [x, *params], self.g)
        self.right = dict(forward=[y.detach()], dgrad=[gx], wgrad=gw)

    def kernels(self, dtype, last):
        "Functions that compute each result in this dtype and format; parameters of normalizations stay in fp32, as under autocast"
        low = torch.float32 if isinstance(self.module, norms) else dtype
        m = copy.deepcopy(self.module).to(low)
        def ready(t, dtype): return t.to(dtype).contiguous(memory_format=channels_last[t.ndim] if last and t.ndim in channels_last else torch.contiguous_format)
        for p in m.parameters(): p.data = ready(p.data, low)
        x,g,params = ready(self.x, dtype).requires_grad_(),ready(self.g, dtype),[*m.parameters()]
        graph = []
        def forward():
            graph[:] = [m(x)]
            return graph
        def grad(inputs):
            if not graph: forward()
            return torch.autograd.grad(graph, inputs, [g.to(graph[0].dtype)], retain_graph=True)
        return dict(forward=forward, dgrad=lambda: grad([x]), wgrad=(lambda: grad(params)) if params else None)

def error(got, want, tolerance):
    "Distance as a multiple of the tolerance: of the norm, or of the worst element, as in `fastxtend_cl.choose.gradient_error`"
    norm,own,rms = tolerance
    diff,size = (got.double()-want).abs(),want.norm().item()
    if size==0: return 0. if diff.max().item()==0 else math.inf
    worst = (diff/(own*want.abs()+rms*size/math.sqrt(want.numel()))).max().item()
    res = max(diff.norm().item()/size/norm, worst)
    return res if math.isfinite(res) else math.inf

def fastest(f, seconds):
    "Seconds of the fastest of up to 50 calls in `seconds`, of at least 3"
    res,end = [],time.perf_counter()+seconds
    while len(res)<3 or len(res)<50 and time.perf_counter()<end:
        start = time.perf_counter()
        f()
        res.append(time.perf_counter()-start)
        if sum(res)>10*seconds: break
    return min(res)

def filled(libc, on):
    if libc: libc.mallopt(-6, 0x80 if on else 0) # M_PERTURB: new memory is filled with the complement

def answers(job, arms):
    libc = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), 'gnu_get_libc_version') else None
    layer = Layer(**job['layer'])
    for dtype,last,wanted in arms:
        res = dict(arm=[dtype, last])
        if dtype=='fp64': yield res | {k: [math.hypot(*(t.norm().item() for t in layer.right[k])), 0.] for k in wanted if layer.right[k]}; continue
        for name,f in layer.kernels(dtypes[dtype], last).items():
            if name not in wanted or f is None: continue
            try:
                filled(libc, True)
                try: got = f()
                finally: filled(libc, False)
                e = max(error(a.detach(), b, job['tolerances'][dtype]) for a,b in zip(got, layer.right[name]))
                del got
                res[name] = [e, fastest(f, job['seconds'])]
            except RuntimeError as e: res[name] = f'raised: {(str(e).splitlines() or [""])[0][:100]}'
        yield res

def write(**answer): os.write(1, (json.dumps(answer)+'\n').encode())

def forked(job, arms):
    "Run arms in a child; its exit status"
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    signal.alarm(120) # seconds, for a kernel that never ends
    try:
        for a in answers(job, arms): write(**a)
    except BaseException as e:
        write(failed=f'{type(e).__name__}: {e}')
    os._exit(0)

def main():
    if len(sys.argv)>1 and hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {int(sys.argv[1])})
    torch.set_num_threads(1)
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    torch.autograd.grad(nn.Conv2d(1, 1, 1)(x), x, torch.ones(1, 1, 4, 4)) # imports and initializes what each child would
    write(torch=torch.__version__, git=torch.version.git_version, cpu_capability=torch.backends.cpu.get_cpu_capability())
    for line in sys.stdin:
        job = json.loads(line)
        if job.get('direct'):
            for a in answers(job, job['arms']): write(**a)
        elif forked(job, job['arms']):
            for arm in job['arms']:
                if status := forked(job, [arm]): write(arm=arm[:2], died=os.WTERMSIG(status))
        write(done=True)

if __name__=='__main__': main()
