"The weight gradient of a contiguous bf16 convolution narrower than its stride reads past the end of the input (CPU)"
import ctypes, mmap
import torch
from torch import nn

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2*page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start+page), page, 0)==0 # no access to the second page

torch.manual_seed(0)
x = torch.frombuffer(memory, dtype=torch.bfloat16, count=2*4*4, offset=page-2*4*4*2).view(2, 4, 4, 1) # ends where the first page does
x.copy_(torch.randn(2, 4, 4, 1))
layer = nn.Conv2d(4, 16, (2, 1), stride=(1, 2), bias=False).bfloat16()
print('expected: no crash', flush=True)
for _ in range(20): layer(x).sum().backward()
print('seen: no crash')
