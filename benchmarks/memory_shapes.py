"""Does keeping memory need more memory if batches have many shapes? `OMP_NUM_THREADS=1 python benchmarks/memory_shapes.py`

Training in bf16 with tuned kernels, with the default allocator and with memory kept, each in its own process: images of one
shape, of random sizes (96 to 224 pixels), progressive resizing, training and validation in turns, and a detector with images of random
sizes. CPU time and page faults of a step, the largest resident set, and what is resident after the last step and after the context.
Writes results/memory-shapes-cpu.json and .md after each kind and continues where it was interrupted."""
import contextlib, json, random, resource, statistics, time, warnings
from pathlib import Path
warnings.simplefilter('ignore', FutureWarning) # torch's own, when torchvision is imported
import torch, torchvision
from fastcore.script import call_parse
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.kernels import tuned_kernels
from fastxtend_cl.memory import can_keep_memory, kept_memory
from common import Results, machine, markdown, run_child

rng = random.Random(1)
def images(n, size): return torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last),torch.randint(1000, (n,))

def scenes():
    "Two images of random sizes with boxes"
    sizes,targets = [(rng.randrange(240, 400), rng.randrange(240, 400)) for _ in range(2)],[]
    for _ in sizes:
        corner = 100*torch.rand(n := rng.randrange(1, 8), 2)
        targets.append(dict(boxes=torch.cat([corner, corner+20+80*torch.rand(n, 2)], 1), labels=torch.randint(1, 10, (n,))))
    return [torch.rand(3, *s) for s in sizes],targets

tv = torchvision.models
# Model, and the batch of step `i` of `n`
kinds = {'one shape': (tv.mobilenet_v2, lambda i, n: images(16, 128)),
    'random sizes': (tv.resnet18, lambda i, n: images(8, rng.randrange(96, 225, 8))),
    'progressive resizing': (tv.resnet18, lambda i, n: images(16, (64, 128, 192)[3*i//n])),
    'with validation': (tv.mobilenet_v2, lambda i, n: images(16, 96)),
    'detector': (lambda: tv.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=10), lambda i, n: scenes())}

def resident(): return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmRSS'))/1024
def usage(): return resource.getrusage(resource.RUSAGE_SELF)

def in_process(kind, keep, steps):
    "Train in this process"
    torch.manual_seed(0)
    make,batch = kinds[kind]
    model = apply_channels_last(make().train())
    opt,times,faults = torch.optim.AdamW(model.parameters(), 1e-6),[],[]
    with kept_memory() if keep else contextlib.nullcontext(), tuned_kernels(), torch.autocast('cpu', torch.bfloat16):
        for i in range(steps):
            x,y = batch(i, steps)
            before,start = usage().ru_minflt,time.thread_time()
            loss = sum(model(x, y).values()) if kind=='detector' else torch.nn.functional.cross_entropy(model(x), y)
            loss.backward(); opt.step(); opt.zero_grad()
            del loss
            if kind=='with validation' and i%5==4:
                with torch.no_grad(): model.eval()(images(32, 96)[0])
                model.train()
            times.append(time.thread_time()-start); faults.append(usage().ru_minflt-before)
        after = resident()
    counted = slice(steps//3, None)
    return dict(ms=1e3*statistics.mean(times[counted]), faults=statistics.mean(faults[counted]), peak=usage().ru_maxrss/1024, after=after,
        end=resident())

def measure(kind, steps):
    "A row: the default, and with memory kept"
    return dict(model=kind, steps=steps, **{n: run_child(__file__, child=kind, keep=n=='kept', steps=steps) for n in ('usual', 'kept')})

def table(found):
    "Markdown"
    head = ['', 'steps', 'ms', 'kept', 'gain', 'peak, MiB', 'kept', 'after the fit, MiB', 'kept']
    def cells(steps, a, b):
        return [steps, f"{a['ms']:.0f}", f"{b['ms']:.0f}", f"{a['ms']/b['ms']:.2f}", *(f'{o[k]:,.0f}' for k in ('peak', 'end') for o in (a, b))]
    rows = [[f['model'], *cells(f['steps'], f['usual'], f['kept'])] for f in found]
    worst = max(found, key=lambda f: f['kept']['peak']/f['usual']['peak'])
    return '\n'.join([markdown(head, rows), '', f"The largest resident set is at most {worst['kept']['peak']/worst['usual']['peak']:.3f} times "
        f"as large with memory kept ({worst['model']})."])

def page(found): return f'{machine()}; CPU time.\n\n{table(found)}'

@call_parse
def main(
    names:str=','.join(kinds), # Kinds of batches, separated by commas
    steps:int=100, # Steps of a process; the first third does not count. A third of them for the detector
    child:str=None, # Train this kind in this process and write nothing
    keep:bool=False, # In a child: with memory kept
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # A few steps; writes nothing
):
    "Measure and write benchmarks/results/memory-shapes-cpu.json and .md"
    if child: return print(json.dumps(in_process(child, keep, steps)))
    if not can_keep_memory(): raise SystemExit("nothing to measure: the allocator is not glibc's, or the environment sets it")
    found = Results('memory-shapes-cpu', names, refresh, tiny, key='found', page=page, steps=steps)
    for kind in found: found.add(measure(kind, 6 if tiny else steps//3 if kind=='detector' else steps))
    print(table(found.rows))
