"""The weight gradient of a dilated ConvTranspose2d in bfloat16 is wrong on a CPU in channels last."""
import copy, sys
import torch
from torch import nn

torch.manual_seed(0)
conv = nn.ConvTranspose2d(1, 17, 3, dilation=2, bias=False).bfloat16()
x = torch.randn(1, 1, 1, 29).bfloat16()
grad = torch.randn(1, 17, 5, 33).bfloat16()

def weight_gradient(conv, x, grad):
    conv.weight.grad = None
    conv(x).backward(grad)
    return conv.weight.grad.double()

exact = weight_gradient(copy.deepcopy(conv).double(), x.double(), grad.double())

def error(format):
    got = weight_gradient(conv.to(memory_format=format), x.to(memory_format=format), grad)
    return ((got - exact).abs().max() / exact.abs().max()).item()

contiguous, last = error(torch.contiguous_format), error(torch.channels_last)
print('expected: error below 0.02 times the largest gradient (bfloat16 against float64), in both memory formats')
print(f'seen: error {contiguous:.2g} contiguous, {last:.2g} in channels last')
sys.exit(not last < 0.02)
