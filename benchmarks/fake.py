"""Do fake tensors say what real ones do? The formats that each operator hands on, in a real step and in one of fake
tensors on the same device, operator by operator

Without a GPU, `--device cpu` compares on the CPU, and then runs the fake step on a fake CUDA device as far as it
goes. Writes results/fake-DEVICE.json."""
import warnings
from collections import Counter
import torch, torchvision
import torch.nn.functional as F
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.layout import as_channels_last
from fastxtend_cl.step import TrainingStep
from fastxtend_cl.tracer import Tracer
from common import save
from traces import supported

def fake_like(t, device):
    res = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return nn.Parameter(res, t.requires_grad) if isinstance(t, nn.Parameter) else res

def make_fake(model, device):
    "Put fake tensors in the place of parameters and buffers"
    for m in model.modules():
        for d in (m._parameters, m._buffers):
            for n,t in d.items():
                if t is not None: d[n] = fake_like(t, device)

def formats(model, x, y):
    "Counts of (phase, module, format in, format out) of the operators of a step, and what stopped it"
    tracer,error = Tracer(TrainingStep(model, x, y, F.cross_entropy)),None
    with tracer:
        try: F.cross_entropy(model(x), y).backward()
        except RuntimeError as e: error = str(e).splitlines()[0]
    return Counter((p.phase, p.module, a, b) for p,a,b,_ in tracer.ops),error

def compare(name, device, fake_device, bs, size):
    torch.manual_seed(0)
    model = apply_channels_last(torchvision.models.get_model(name)).to(device).train()
    x,y = as_channels_last(torch.randn(bs, 3, size, size, device=device)),torch.zeros(bs, dtype=torch.long, device=device)
    real,_ = formats(model, x, y)
    model.zero_grad()
    with FakeTensorMode():
        make_fake(model, fake_device)
        fake,error = formats(model, fake_like(x, fake_device), fake_like(y, fake_device))
    res = dict(model=name, device=str(device), fake_device=str(fake_device), error=error)
    for phase in ('forward','backward'):
        a,b = (Counter({k:v for k,v in c.items() if k[0]==phase}) for c in (real, fake))
        res[phase] = dict(operators=a.total(), same=(a&b).total(), real_only=[list(k[1:]) for k in (a-b)][:10],
            fake_only=[list(k[1:]) for k in (b-a)][:10])
    return res

@call_parse
def main(
    names:str=','.join(supported), # torchvision models, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    bs:int=2, size:int=64,
    tiny:bool=False, # One model, nothing is written
):
    "Compare and write benchmarks/results/fake-DEVICE.json"
    rows = []
    for n in progress_bar(['shufflenet_v2_x0_5'] if tiny else names.split(',')):
        for fake_device in dict.fromkeys((device, 'cuda')):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                rows.append(compare(n, torch.device(device),
                    torch.device(fake_device, 0) if fake_device=='cuda' else torch.device(fake_device), bs, size))
    for r in rows:
        print(f"{r['model']:20} real {r['device']}, fake {r['fake_device']:7}"
            + ''.join(f"{p:>10} {r[p]['same']} of {r[p]['operators']}" for p in ('forward','backward')) + f"  {r['error'] or ''}")
    if not tiny: save(f'fake-{device}', rows=rows, bs=bs, size=size)
