"""The weight gradient of a strided, padded Conv1d in bfloat16 depends on memory that was never written (CPU)."""
import copy, sys
import torch
from torch import nn

torch.manual_seed(0)
conv = nn.Conv1d(16, 1, 3, stride=2, padding=1, bias=False).bfloat16()
x = torch.randn(1, 16, 1).bfloat16() # shorter than the stride

def weight_gradient(conv, x):
    conv.weight.grad = None
    conv(x).sum().backward()
    return conv.weight.grad.double()

exact = weight_gradient(copy.deepcopy(conv).double(), x.double())
wrong = []
for _ in range(50):
    free_memory = [torch.full((n,), float('nan')) for n in range(8, 4096, 8)]
    del free_memory # from here on, newly allocated memory holds NaN until it is written
    got = weight_gradient(conv, x)
    if not torch.allclose(got, exact, rtol=0.02, atol=0.02): wrong.append(got)

def text(gradient): return ', '.join(f'{v:.2g}' for v in gradient.flatten()[:6])

print(f'expected: 50 of 50 weight gradients agree with float64 to 0.02: {text(exact)}, ...')
print(f'seen: {len(wrong)} of 50 do not' + (f', for example {text(wrong[-1])}, ...' if wrong else ''))
sys.exit(len(wrong) > 0)
