"One training step of torchvision models in each format and precision, paired: the table of the README"
import statistics
import torch, torchvision
from fastcore.script import call_parse
from fastxtend_cl.amp import amp_dtypes, native_amp_mode
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.layout import as_channels_last
from common import interleave, interval, save

models = {'resnet18': (16, 3, 128, 128), 'resnet50': (8, 3, 128, 128), 'densenet121': (8, 3, 128, 128),
    'mobilenet_v2': (16, 3, 128, 128), 'r3d_18': (2, 3, 8, 56, 56)}

def stepper(name, shape, device, channels_last, dtype):
    torch.manual_seed(0)
    model,x = torchvision.models.get_model(name).to(device),torch.randn(shape, device=device)
    y = torch.randint(0, 10, shape[:1], device=device)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6)
    if channels_last: apply_channels_last(model, opt); x = as_channels_last(x)
    def step():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None): loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward(); opt.step(); opt.zero_grad()
        if device.type=='cuda': torch.cuda.synchronize(device)
    return step

@call_parse
def main(
    names:str=','.join(models), # torchvision models, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    tiny:bool=False, # Small batches, to try the script
):
    "Measure and write benchmarks/results/formats-DEVICE.json"
    device = torch.device(device)
    mode = native_amp_mode(device)
    native = amp_dtypes.get(mode)
    rows = []
    for name in names.split(','):
        shape = (2, *models[name][1:]) if tiny else models[name]
        kinds = {'contiguous fp32': (False, None), 'contiguous fp32, again': (False, None), 'channels last fp32': (True, None)}
        if mode: kinds |= {f'contiguous {mode.value}': (False, native), f'channels last {mode.value}': (True, native)}
        seconds = interleave({k: stepper(name, shape, device, *v) for k,v in kinds.items()}, rounds, block)
        for k,s in seconds.items():
            rows.append(dict(model=name, shape=list(shape), arm=k, ms=1e3*statistics.median(s),
                ratio=interval([b/a for a,b in zip(s, seconds['contiguous fp32'])])))
            print('{model:14}{arm:30}{ms:10.1f} ms'.format(**rows[-1])
                + '{:8.2f} ({:.2f} to {:.2f})'.format(*rows[-1]['ratio']), flush=True)
    if not tiny: save(f'formats-{device.type}', rows=rows, rounds=rounds, block=block)
