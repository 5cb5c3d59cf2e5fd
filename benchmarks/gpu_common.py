"What the scripts for a GPU share: networks and their batches, and small tools"
import contextlib, warnings
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch, torchvision
from torch import nn
from fastxtend_cl.layout import channels_last_formats
from fastxtend_cl.kernels import tuned_kernels

# Networks

sizes = {'resnet50': (256, 3, 224, 224), 'resnet18': (256, 3, 224, 224), 'efficientnet_b0': (256, 3, 224, 224),
    'mobilenetv2_100': (256, 3, 224, 224), 'regnetx_032': (256, 3, 224, 224), 'regnety_032': (256, 3, 224, 224),
    'resnest50d': (256, 3, 224, 224), 'convnext_tiny': (256, 3, 224, 224), 'densenet121': (128, 3, 224, 224),
    'unet_resnet34': (64, 3, 224, 224), 'r3d_18': (32, 3, 8, 112, 112), 'unet3d': (2, 1, 128, 128, 128)}
tiny_sizes = {n: (2, 3, 32, 32) for n in sizes} | {'r3d_18': (2, 3, 4, 32, 32), 'unet3d': (2, 1, 16, 16, 16)}

def block3d(i, o):
    return nn.Sequential(*[m for c in (i, o) for m in (nn.Conv3d(c, o, 3, padding=1, bias=False), nn.BatchNorm3d(o), nn.ReLU())])

class UNet3d(nn.Module):
    "A small 3-D U-Net: two steps down, two up, with concatenations"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.d,self.e = (block3d(i, o) for i,o in ((1, 32), (32, 64), (64, 128), (128, 64), (64, 32)))
        self.up1,self.up2,self.head,self.pool = nn.ConvTranspose3d(128, 64, 2, 2),nn.ConvTranspose3d(64, 32, 2, 2),nn.Conv3d(32, 2, 1),nn.MaxPool3d(2)
    def forward(self, x):
        a = self.a(x); b = self.b(self.pool(a))
        d = self.d(torch.cat([b, self.up1(self.c(self.pool(b)))], 1))
        return self.head(self.e(torch.cat([a, self.up2(d)], 1)))

def network(name, size):
    "The network of that name with random weights, made on the default device"
    if name=='unet3d': return UNet3d()
    if name=='r3d_18': return torchvision.models.video.r3d_18()
    if name=='unet_resnet34':
        from fastai.vision.all import create_unet_model
        return create_unet_model(torchvision.models.resnet34, 10, size[-2:], pretrained=False)
    import timm
    return timm.create_model(name)

def random_batch(name, size, device):
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(size, generator=gen, device=device)
    target = (size[0], *size[2:]) if name.startswith('unet') else size[:1]
    return x,torch.randint(2 if name=='unet3d' else 10, target, generator=gen, device=device)

# Tools

precisions = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16'}

def in_format(t, last, dtype=None):
    fmt = channels_last_formats.get(t.ndim, torch.contiguous_format) if last else torch.contiguous_format
    return t.to(dtype or t.dtype, copy=True, memory_format=fmt)

def kernels(mode): return tuned_kernels(mode) if mode else contextlib.nullcontext()

@contextlib.contextmanager
def cudnn(**flags):
    "A context with these settings; torch's own sets all others, too"
    old = {k: getattr(torch.backends.cudnn, k) for k in flags}
    try:
        for k,v in flags.items(): setattr(torch.backends.cudnn, k, v)
        yield
    finally:
        for k,v in old.items(): setattr(torch.backends.cudnn, k, v)

def alive(device):
    "Raise if the device has been lost"
    torch.ones(1, device=device).add(1).item()

def relative(got, want):
    "Distance of lists of tensors, over the norm of `want`"
    d = sum((a.double()-b.double()).square().sum().item() for a,b in zip(got, want))
    return (d/max(sum(b.double().square().sum().item() for b in want), 1e-60))**.5
