"""Which networks keep the format, forward and backward? `python benchmarks/traces.py`

Traces of the 28 torchvision models that PyTorch's channels-last tutorial lists as fully supported, and of fastai's unets. Formats do not
depend on the machine; of the times only the share of the step is saved.
Writes results/trace-DEVICE.json after each model and continues where it was interrupted."""
import gc, os, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch, torchvision
from fastai.layers import NormType
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from fastcore.script import call_parse
from fastxtend_cl.amp import amp_dtypes
from fastxtend_cl.step import TrainingStep
from fastxtend_cl.trace import trace_formats
from common import Results, markdown

supported = ['alexnet', 'mnasnet0_5', 'mnasnet0_75', 'mnasnet1_0', 'mnasnet1_3', 'mobilenet_v2', 'resnet18', 'resnet34',
    'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d', 'shufflenet_v2_x0_5', 'shufflenet_v2_x1_0',
    'shufflenet_v2_x1_5', 'shufflenet_v2_x2_0', 'squeezenet1_0', 'squeezenet1_1', 'vgg11', 'vgg11_bn', 'vgg13',
    'vgg13_bn', 'vgg16', 'vgg16_bn', 'vgg19', 'vgg19_bn', 'wide_resnet50_2', 'wide_resnet101_2']
unets = {'unet resnet18': {}, 'unet resnet34': {}, 'unet resnet34 self-attention': dict(self_attention=True),
    'unet resnet34 blur': dict(blur=True, blur_final=True),
    'unet resnet18 instance norm': dict(norm_type=NormType.Instance), 'unet xresnet34': {}}

def step_of(name, bs, size, device, autocast):
    torch.manual_seed(0)
    if name in unets:
        arch = name.split()[1]
        model = create_unet_model(getattr(torchvision.models, arch, None) or getattr(xresnet, arch), 4, (size, size),
            pretrained=False, **unets[name])
        y,loss = torch.randint(0, 4, (bs, size, size)),CrossEntropyLossFlat(axis=1)
    else: model,y,loss = torchvision.models.get_model(name),torch.randint(0, 10, (bs,)),torch.nn.functional.cross_entropy
    return TrainingStep(model.to(device), torch.randn(bs, 3, size, size, device=device), y.to(device), loss, autocast=autocast)

def row_of(name, t):
    def place(r):
        return dict(module=r.module, op=r.op, phase=r.phase, kind=r.kind, count=r.count, bytes=r.bytes,
            share=round(r.share, 5), where=r.where and os.sep.join(r.where.split(os.sep)[-2:]), back=r.back[:3])
    return dict(model=name, kept={k:round(v, 4) for k,v in t.kept.items()},
        places={p:sum(r.phase==p for r in t.rows) for p in ('forward','backward')}, mb=t.bytes/1e6, share=round(t.share, 5),
        head_share=round(sum(r.share for r in t.by_design), 5), reason=t.reason,
        cost_of_trace=round(t.seconds/t.step_seconds, 1), rows=[place(r) for r in t.rows])

def table(rows):
    "Markdown"
    def percent(share): return f'{100*share:.1f} %'
    head = ['model', 'kept forward', 'kept backward', 'places, forward', 'backward', 'MB', 'of the step', 'head', 'cost of the trace, steps']
    return markdown(head, [[r['model'], *map(percent, r['kept'].values()), *r['places'].values(), f"{r['mb']:.1f}", percent(r['share']),
        percent(r['head_share']), r['cost_of_trace']] for r in rows])

@call_parse
def main(
    names:str=','.join([*supported, *unets]), # Models, separated by commas
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    bs:int=8, # Images a batch
    size:int=128, # Pixels
    autocast:str='', # 'fp16', 'bf16' or none
    refresh:bool=False, # Measure again what has been measured
    tiny:bool=False, # A batch of two small images; writes nothing
):
    "Trace and write benchmarks/results/trace-DEVICE.json"
    if tiny: bs,size = 2,64
    dtype = {k.value: v for k,v in amp_dtypes.items()}.get(autocast)
    found = Results('-'.join(['trace', device, *[autocast]*bool(autocast)]), names, refresh, tiny, bs=bs, size=size, autocast=autocast)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trace_formats(step_of('resnet18', 2, 64, torch.device(device), None)) # what a process does only once
        for n in found:
            gc.collect()
            found.add(row_of(n, trace_formats(step_of(n, bs, size, torch.device(device), dtype))))
    print(table(found.rows))
