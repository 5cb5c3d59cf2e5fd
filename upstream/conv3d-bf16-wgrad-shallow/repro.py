"""The weight gradient of a padded Conv3d in bfloat16 is wrong if the input is less deep than the kernel (CPU)."""
import copy, sys
import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
conv = nn.Conv3d(16, 1, 3, padding=1, bias=False).bfloat16()
x = torch.randn(1, 16, 2, 8, 8).bfloat16() # two planes, the kernel has three
grad = torch.randn(1, 1, 2, 8, 8).bfloat16()

def weight_gradient(conv, x, grad):
    conv.weight.grad = None
    conv(x).backward(grad)
    return conv.weight.grad.double()

exact = weight_gradient(copy.deepcopy(conv).double(), x.double(), grad.double())

def error(x): return ((weight_gradient(conv, x, grad) - exact).abs().max() / exact.abs().max()).item()

contiguous, last = error(x), error(x.contiguous(memory_format=torch.channels_last_3d))
print('expected: error below 0.02 times the largest gradient (bfloat16 against float64), in both memory formats')
print(f'seen: error {contiguous:.2g} contiguous, {last:.2g} in channels last')
sys.exit(not (contiguous < 0.02 and last < 0.02))
