"The backward pass of a strided 1x1 transposed convolution with few output channels in channels last overwrites the heap (CPU)"
import torch
from torch import nn

torch.manual_seed(0)
layer = nn.ConvTranspose2d(2, 1, 1, stride=2, output_padding=1, bias=False).to(memory_format=torch.channels_last)
x = torch.randn(2, 2, 32, 32).to(memory_format=torch.channels_last)
print('expected: no crash', flush=True)

for _ in range(200):
    layer(x).sum().backward()  # its weight gradient writes past a buffer
    tensors = [torch.randn(n) for n in (100, 1000, 10_000, 100_000)]  # use the heap meanwhile
print('seen: no crash')
