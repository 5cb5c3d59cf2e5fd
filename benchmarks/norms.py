"""Normalizations in channels last on a CPU: forward and backward pass, how fast and how far from double precision: `python benchmarks/norms.py`

Instance normalization contiguous, in channels last as torch computes it, and in `tuned_kernels`; group normalization in both formats. The
values have the standard deviation 1 and a mean of 0 or 10. Paired and interleaved; writes results/norms-cpu.json and .md."""
import statistics
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from fastxtend_cl.format import channels_last_formats
from fastxtend_cl.kernels import tuned_kernels
from common import conditions, interleave, interval, results, save

shapes = [(8, 32, 128, 128), (8, 128, 32, 32), (4, 512, 8, 8), (2, 16, 32, 32, 32), (2, 64, 16, 16, 16)]
def instance(x, w, b): return F.instance_norm(x, weight=w, bias=b)
def group(x, w, b): return F.group_norm(x, 8, w, b)
def tuned(x, w, b):
    with tuned_kernels(): return F.instance_norm(x, weight=w, bias=b)
arms = {'instance, contiguous': (instance, False), 'instance, channels last': (instance, True), 'instance, tuned': (tuned, True),
    'group, contiguous': (group, False), 'group, channels last': (group, True)}

def step(f, last, x, g, w, b):
    "A function that returns output and input gradient"
    fmt = channels_last_formats[x.ndim] if last else torch.contiguous_format
    x,g = x.contiguous(memory_format=fmt),g.contiguous(memory_format=fmt)
    def run():
        a = x.detach().requires_grad_()
        y = f(a, w, b)
        y.backward(g)
        return y.detach(),a.grad
    return run

def error(got, want): return max(((a.double()-e).norm()/e.norm()).item() for a,e in zip(got, want))

def measure(shape, dtype, rounds):
    torch.manual_seed(0)
    w,b,x,g = torch.rand(shape[1]).requires_grad_(),torch.rand(shape[1]).requires_grad_(),torch.randn(shape),torch.randn(shape).to(dtype)
    steps,rows = {n: step(f, last, x.to(dtype), g, w, b) for n,(f,last) in arms.items()},{n: {} for n in arms}
    for mean in (0, 10):
        a = (x+mean).to(dtype)
        for n,(f,last) in arms.items():
            exact = step(f if f is group else instance, False, a.double(), g.double(), w.double(), b.double())()
            rows[n][f'error, mean {mean}'] = error(step(f, last, a, g, w, b)(), exact)
    seconds = interleave(steps, rounds, 4, progress=False)
    return [dict(shape=list(shape), dtype=str(dtype)[6:], arm=n, ms=1e3*statistics.median(t),
        ratio=interval([p/q for p,q in zip(seconds[n.split(',')[0]+', contiguous'], t)]), **rows[n]) for n,t in seconds.items()]

def page(rows):
    c = conditions()
    head = f"Times as fast as contiguous (median and its 95 % interval), and the largest relative distance from double precision. {c['cpu']}, {c['cores']} thread, torch {c['torch']}, {c['date']}."
    lines = ['| shape | dtype | | ms | ratio | error, mean 0 | error, mean 10 |', '|---|---|---|--:|--:|--:|--:|']
    lines += [f"| {'x'.join(map(str, r['shape']))} | {r['dtype']} | {r['arm']} | {r['ms']:.2f} | {r['ratio'][0]:.2f} ({r['ratio'][1]:.2f} to {r['ratio'][2]:.2f}) | "
        f"{r['error, mean 0']:.1e} | {r['error, mean 10']:.1e} |" for r in rows]
    return head+'\n\n'+'\n'.join(lines)+'\n'

@call_parse
def main(
    rounds:int=12, # In each, every arm runs a block of 4
    tiny:bool=False, # Small and short; writes nothing
):
    "Measure and write benchmarks/results/norms-cpu.json and .md"
    rows = [r for s in ([(2, 16, 32, 32)] if tiny else shapes) for d in (torch.float32, torch.bfloat16) for r in measure(s, d, 2 if tiny else rounds)]
    print(page(rows))
    if tiny: return
    save('norms-cpu', rows=rows)
    (results/'norms-cpu.md').write_text(page(rows))
