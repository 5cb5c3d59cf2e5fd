"""Time of an Adam step after a conversion in the middle of training, against a model never converted: what it costs when
optimizer state does not follow"""
import statistics
import torch, torchvision
from fastcore.script import call_parse
from fastxtend_cl.convert import apply_channels_last
from common import interleave, interval, save

def stepper(convert, arch, **kwargs):
    "One optimizer step of a model that has been converted after three"
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6, **kwargs)
    x = torch.randn(2, 3, 64, 64)
    def backward(): opt.zero_grad(); model(x).mean().backward()
    for _ in range(3): backward(); opt.step()
    convert(model, opt)
    backward()
    return opt.step

@call_parse
def main(
    arch:str='resnet18', # A torchvision model
    rounds:int=80, # Rounds; in each, every arm runs one block
    block:int=6, # Steps a block; the first is dropped
):
    "Measure and write benchmarks/results/state.json"
    torch.set_num_threads(1)
    converts = {'never converted': lambda m,o: None, 'never converted, again': lambda m,o: None,
                'apply_channels_last(model, opt)': apply_channels_last,
                'model.to(memory_format=...)': lambda m,o: m.to(memory_format=torch.channels_last)}
    rows = []
    for kind in ({'foreach': False}, {'foreach': True}):
        seconds = interleave({n: stepper(c, arch, **kind) for n,c in converts.items()}, rounds, block)
        for n,s in seconds.items():
            rows.append(dict(optimizer=f'AdamW({kind})', arm=n, ms=1e3*statistics.median(s),
                times=interval([a/b for a,b in zip(s, seconds['never converted'])])))
    print(f"{'':28}{'':34}{'ms a step':>10}{'times never converted (95 %)':>34}")
    for r in rows:
        print(f"{r['optimizer']:28}{r['arm']:34}{r['ms']:10.2f}{r['times'][0]:16.3f} "
            f"({r['times'][1]:.3f} to {r['times'][2]:.3f})")
    save('state', rows=rows, arch=arch, rounds=rounds, block=block, threads=1)
