"""A strided grouped Conv2d in bfloat16 and channels last computes a wrong output if it is one column wide (CPU)."""
import copy, sys
import torch
from torch import nn

torch.manual_seed(0)
conv = nn.Conv2d(2, 64, (1, 2), stride=(1, 2), groups=2, bias=False).bfloat16()
x = torch.randn(1, 2, 16, 2).bfloat16()
exact = copy.deepcopy(conv).double()(x.double())

def error(x): return ((conv(x).double() - exact).abs().max() / exact.abs().max()).item()

contiguous, last = error(x), error(x.to(memory_format=torch.channels_last))
free_memory = [torch.full((n,), float('nan')) for n in range(8, 8192, 8) for _ in range(4)]
del free_memory # from here on, newly allocated memory holds NaN until it is written
nan = error(x.to(memory_format=torch.channels_last))
print('expected: error below 0.02 times the largest output (bfloat16 against float64), in both memory formats')
print(f'seen: error {contiguous:.2g} contiguous, {last:.2g} in channels last, {nan:.2g} if free memory was filled with NaN')
sys.exit(not (last < 0.02 and nan < 0.02))
