"""Backward of InstanceNorm2d with a batch of one is wrong on the CPU if the gradient of its output is in channels last."""
import sys, torch
from torch import nn

torch.manual_seed(0)
norm = nn.InstanceNorm2d(2)
x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
g = torch.randn(1, 2, 2, 2, dtype=torch.float64)
want, = torch.autograd.grad(norm(x), x, g)
got, = torch.autograd.grad(norm(x), x, g.contiguous(memory_format=torch.channels_last)) # the same numbers
error = ((got-want).norm()/want.norm()).item()
print('expected: the gradient of the input does not depend on the memory format of g (relative difference below 1e-6)')
print(f'seen: relative difference {error:.2g}')
sys.exit(error>1e-6)
