"A convolution in channels last calls a null pointer if an output column has all its taps in the padding (CPU)"
import torch
from torch import nn

layer = nn.Conv2d(2, 1, 1, stride=(1, 2), padding=(0, 1), dilation=(1, 2)).to(memory_format=torch.channels_last)
x = torch.randn(2, 2, 1, 1).to(memory_format=torch.channels_last)
print('expected: no crash', flush=True)

layer(x)  # two output columns, both read only padding
print('seen: no crash')
