"The backward pass of GroupNorm in channels last ends the process if its input needs no gradient (CPU, up to torch 2.13)"
import torch
from torch import nn

torch.manual_seed(0)
norm = nn.GroupNorm(1, 2)
x = torch.randn(2, 2, 2, 2)
exact = torch.autograd.grad(norm(x).square().sum(), norm.weight)[0]
print('expected: no crash, and the gradient of the weight as for a contiguous input', flush=True)
last = torch.autograd.grad(norm(x.to(memory_format=torch.channels_last)).square().sum(), norm.weight)[0]
diff = (last-exact).abs().max().item()
print(f'seen: no crash, a difference of {diff:.1g}')
raise SystemExit(diff>1e-4)
