"""Normalizations in channels last on a CPU: forward and backward pass, how fast and how far from double precision: `python benchmarks/norms.py`

Instance normalization contiguous, in channels last as torch computes it, and in `tuned_kernels`; group normalization in both formats. The
values have the standard deviation 1 and a mean of 0 or 10. Then whole training steps of networks with instance normalization (MONAI,
nnU-Net; the development extra has them). Paired and interleaved, memory kept; writes results/norms-cpu.json and .md."""
import statistics, warnings
from contextlib import nullcontext
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.layout import as_channels_last, channels_last_formats
from fastxtend_cl.kernels import tuned_kernels
from fastxtend_cl.memory import kept_memory
from common import conditions, interleave, interval, results, save
import zoo

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

networks = 'nnunet/PlainConvUNet+2', 'nnunet/PlainConvUNet+3', 'nnunet/ResidualEncoderUNet+2', 'monai/UNet+2', 'monai/UNet+3'

def measure_network(name, low, rounds):
    "Seconds of a training step, contiguous, in channels last as torch computes it, and with tuned kernels"
    steps = {}
    for arm,around in {'contiguous': nullcontext, 'channels last': nullcontext, 'tuned': tuned_kernels}.items():
        model,x = zoo.build(name)
        if arm!='contiguous': model,x = apply_channels_last(model),as_channels_last(x)
        steps[arm] = zoo.stepper(model, x, torch.device('cpu'), around, low)
        for _ in range(2): steps[arm]()
    seconds = interleave(steps, rounds, 3, progress=False)
    return [dict(network=name, dtype='bfloat16' if low else 'float32', arm=a, ms=1e3*statistics.median(t),
        ratio=interval([p/q for p,q in zip(seconds['contiguous'], t)])) for a,t in seconds.items()]

def page(rows, nets):
    c = conditions()
    head = f"Times as fast as contiguous (median and its 95 % interval), and the largest relative distance from double precision. {c['cpu']}, {c['cores']} thread, torch {c['torch']}, {c['date']}."
    lines = ['| shape | dtype | | ms | ratio | error, mean 0 | error, mean 10 |', '|---|---|---|--:|--:|--:|--:|']
    lines += [f"| {'x'.join(map(str, r['shape']))} | {r['dtype']} | {r['arm']} | {r['ms']:.2f} | {r['ratio'][0]:.2f} ({r['ratio'][1]:.2f} to {r['ratio'][2]:.2f}) | "
        f"{r['error, mean 0']:.1e} | {r['error, mean 10']:.1e} |" for r in rows]
    lines += ['', '| network | dtype | | ms a step | ratio |', '|---|---|---|--:|--:|']
    lines += [f"| {r['network']} | {r['dtype']} | {r['arm']} | {r['ms']:.1f} | {r['ratio'][0]:.2f} ({r['ratio'][1]:.2f} to {r['ratio'][2]:.2f}) |" for r in nets]
    return head+'\n\n'+'\n'.join(lines)+'\n'

@call_parse
def main(
    rounds:int=12, # In each, every arm runs a block of 4
    tiny:bool=False, # Small and short; writes nothing
):
    "Measure and write benchmarks/results/norms-cpu.json and .md"
    warnings.simplefilter('ignore')
    with kept_memory():
        rows = [r for s in ([(2, 16, 32, 32)] if tiny else shapes) for d in (torch.float32, torch.bfloat16) for r in measure(s, d, 2 if tiny else rounds)]
        nets = [r for n in networks[:1 if tiny else None] for low in (False, True) for r in measure_network(n, low, 2 if tiny else rounds)]
    print(page(rows, nets))
    if tiny: return
    save('norms-cpu', rows=rows, networks=nets)
    (results/'norms-cpu.md').write_text(page(rows, nets))
