"""What does each format and precision give by itself? One training step of torchvision models without this package's kernels:
`OMP_NUM_THREADS=1 python benchmarks/formats.py`

Contiguous and channels last, in fp32 and in the device's own mixed precision, with AdamW. Writes results/formats-DEVICE.json after each
network, for nbs/compatibility.ipynb."""
import torch, torchvision
from fastcore.script import call_parse
from fastxtend_cl.amp import amp_dtypes, native_amp_mode
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.layout import as_channels_last
from common import Results, cell, compared, markdown, paired

models = {'resnet18': (16, 3, 128, 128), 'resnet50': (8, 3, 128, 128), 'densenet121': (8, 3, 128, 128),
    'mobilenet_v2': (16, 3, 128, 128), 'r3d_18': (2, 3, 8, 56, 56)}

def stepper(name, shape, device, channels_last, dtype):
    "A function that trains one step"
    torch.manual_seed(0)
    model,x = torchvision.models.get_model(name).to(device),torch.randn(shape, device=device)
    y = torch.randint(0, 10, shape[:1], device=device)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6)
    if channels_last: apply_channels_last(model, opt); x = as_channels_last(x)
    def step():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None): loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward(); opt.step(); opt.zero_grad()
    return step

def measure(name, shape, device, rounds, block):
    "Rows of a network"
    mode = native_amp_mode(device)
    arms = {'contiguous fp32': (False, None), 'contiguous fp32, again': (False, None), 'channels last fp32': (True, None)}
    if mode: arms |= {f'{f} {mode.value}': (f!='contiguous', amp_dtypes[mode]) for f in ('contiguous', 'channels last')}
    timed = paired({n: stepper(name, shape, device, *a) for n,a in arms.items()}, rounds, block, device, bar=True)
    return [dict(model=name, shape=list(shape), **r) for r in compared(timed)]

@call_parse
def main(
    names:str=','.join(models), # Networks, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # Batches of 2; writes nothing
):
    "Measure and write benchmarks/results/formats-DEVICE.json"
    device = torch.device(device)
    found = Results(f'formats-{device.type}', names, refresh, tiny, rounds=rounds, block=block)
    for name in found: found.add(*measure(name, (2, *models[name][1:]) if tiny else models[name], device, rounds, block))
    print(markdown(['', '', 'ms', 'ratio'], [[r['model'], r['arm'], f"{r['ms']:.1f}", cell(r['ratio'])] for r in found.rows], 2))
