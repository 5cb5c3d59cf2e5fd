"The backward pass of a strided Conv3d whose windows overhang both ends of the depth overwrites the heap (CPU)"
import torch
from torch import nn

torch.manual_seed(0)
layer = nn.Conv3d(1, 1, (4, 3, 3), stride=(2, 1, 1), padding=(3, 1, 1), bias=False)
x = torch.randn(2, 1, 2, 16, 16)
print('expected: no crash', flush=True)

for _ in range(200):
    layer(x).sum().backward()  # its weight gradient writes past a buffer
    tensors = [torch.randn(n) for n in (100, 1000, 10_000, 100_000)]  # use the heap meanwhile
print('seen: no crash')
