"""Are normalizations as fast and as accurate in channels last on a CPU? `OMP_NUM_THREADS=1 python benchmarks/norms.py`

Forward and backward pass of instance normalization, contiguous, in channels last as torch computes it, and in `tuned_kernels`, and of
group normalization in both formats: milliseconds, and the distance from double precision. The values have the standard deviation 1 and
a mean of 0 or 10. Then whole training steps of networks with instance normalization (MONAI, nnU-Net; the development extra has them).
Memory is kept. Writes results/norms-cpu.json and .md."""
import warnings
from contextlib import nullcontext
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.layout import as_channels_last, channels_last_formats
from fastxtend_cl.kernels import tuned_kernels
from fastxtend_cl.memory import kept_memory
from common import cell, compared, machine, markdown, ms_of, paired, ratio_of, results, save
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
    "Rows of a shape: time and errors of each arm"
    torch.manual_seed(0)
    w,b,x,g = torch.rand(shape[1]).requires_grad_(),torch.rand(shape[1]).requires_grad_(),torch.randn(shape),torch.randn(shape).to(dtype)
    steps,rows = {n: step(f, last, x.to(dtype), g, w, b) for n,(f,last) in arms.items()},{n: {} for n in arms}
    for mean in (0, 10):
        a = (x+mean).to(dtype)
        for n,(f,last) in arms.items():
            exact = step(f if f is group else instance, False, a.double(), g.double(), w.double(), b.double())()
            rows[n][f'error, mean {mean}'] = error(step(f, last, a, g, w, b)(), exact)
    timed = paired(steps, rounds, 4)
    return [dict(shape=list(shape), dtype=str(dtype)[6:], arm=n, ms=ms_of(a), ratio=ratio_of(timed[n.split(',')[0]+', contiguous'], a), **rows[n])
        for n,a in timed.items()]

networks = 'nnunet/PlainConvUNet+2', 'nnunet/PlainConvUNet+3', 'nnunet/ResidualEncoderUNet+2', 'monai/UNet+2', 'monai/UNet+3'

def measure_network(name, low, rounds):
    "Seconds of a training step, contiguous, in channels last as torch computes it, and with tuned kernels"
    steps = {}
    for arm,around in {'contiguous': nullcontext, 'channels last': nullcontext, 'tuned': tuned_kernels}.items():
        model,x = zoo.build(name)
        if arm!='contiguous': model,x = apply_channels_last(model),as_channels_last(x)
        steps[arm] = zoo.stepper(model, x, torch.device('cpu'), around, low)
        for _ in range(2): steps[arm]()
    return [dict(network=name, dtype='bfloat16' if low else 'float32', **r) for r in compared(paired(steps, rounds, 3))]

def page(rows, nets):
    head = f'Times as fast as contiguous (median and its 95 % interval), and the largest relative distance from double precision. {machine()}.'
    def errors(r): return [f"{r[f'error, mean {m}']:.1e}" for m in (0, 10)]
    single = [['x'.join(map(str, r['shape'])), r['dtype'], r['arm'], f"{r['ms']:.2f}", cell(r['ratio']), *errors(r)] for r in rows]
    whole = [[r['network'], r['dtype'], r['arm'], f"{r['ms']:.1f}", cell(r['ratio'])] for r in nets]
    return '\n\n'.join([head, markdown(['shape', 'dtype', '', 'ms', 'ratio', 'error, mean 0', 'error, mean 10'], single, 3),
        markdown(['network', 'dtype', '', 'ms a step', 'ratio'], whole, 3)])+'\n'

@call_parse
def main(
    rounds:int=12, # In each, every arm runs a block of 4
    tiny:bool=False, # Small and short; writes nothing
):
    "Measure and write benchmarks/results/norms-cpu.json and .md"
    warnings.simplefilter('ignore')
    if tiny: rounds = 2
    cases = [(s, d) for s in ([(2, 16, 32, 32)] if tiny else shapes) for d in (torch.float32, torch.bfloat16)]
    wholes = [(n, low) for n in networks[:1 if tiny else None] for low in (False, True)]
    with kept_memory():
        rows = [r for o in progress_bar(cases) for r in measure(*o, rounds)]
        nets = [r for o in progress_bar(wholes) for r in measure_network(*o, rounds)]
    print(page(rows, nets))
    if tiny: return
    save('norms-cpu', rows=rows, networks=nets)
    (results/'norms-cpu.md').write_text(page(rows, nets))
