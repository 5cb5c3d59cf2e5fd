"""The weight gradient of a strided, padded Conv2d in bfloat16 is wrong if the input is narrower than the stride (CPU)."""
import copy, sys
import torch
from torch import nn

torch.manual_seed(0)
conv = nn.Conv2d(16, 1, 3, stride=2, padding=1, bias=False).bfloat16()
x = torch.randn(1, 16, 8, 1).bfloat16() # narrower than the stride

def weight_gradient(conv, x):
    conv.weight.grad = None
    conv(x).sum().backward()
    return conv.weight.grad.double()

exact = weight_gradient(copy.deepcopy(conv).double(), x.double())

def wrong(x):
    "In how many of 20 calls, with memory that holds NaN until it is written"
    count = 0
    for _ in range(20):
        free_memory = [torch.full((n,), float('nan')) for n in range(8, 8192, 8)]
        del free_memory
        count += not torch.allclose(weight_gradient(conv, x), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    return count

contiguous, last = wrong(x), wrong(x.to(memory_format=torch.channels_last))
print('expected: 0 of 20 weight gradients are off from float64 by more than 2 % of the largest, in both memory formats')
print(f'seen: {contiguous} of 20 contiguous, {last} of 20 in channels last')
sys.exit(contiguous + last > 0)
