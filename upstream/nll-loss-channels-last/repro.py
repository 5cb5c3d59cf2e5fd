"""Backward of a per-pixel NLLLoss raises "grad_input must be contiguous" if its input is in channels last."""
import sys, torch
from torch import nn

torch.manual_seed(0)
target = torch.zeros(1, 2, 2, dtype=torch.long)
x = torch.randn(1, 2, 2, 2, requires_grad=True)
nn.NLLLoss()(x, target).backward()
last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() # the same numbers
print('expected: the same gradient as for a contiguous input')
try:
    nn.NLLLoss()(last, target).backward()
    faulty = not torch.equal(last.grad, x.grad)
    print(f'seen: {"another" if faulty else "the same"} gradient')
except RuntimeError as e:
    faulty = True
    print(f'seen: RuntimeError: {e}')
sys.exit(faulty)
