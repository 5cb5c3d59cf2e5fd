"""AdamW(fused=True) on the CPU ignores strides: after a change of memory format it trains wrong weights, without an error."""
import sys, torch
from torch import nn

def train(fused):
    torch.manual_seed(0)
    model = nn.Conv2d(2, 1, 2).double()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    for i in range(2):
        if i==1: model.to(memory_format=torch.channels_last) # exp_avg and exp_avg_sq stay contiguous
        opt.zero_grad()
        model(torch.randn(1, 2, 4, 4).double()).square().mean().backward()
        opt.step()
    return model.weight.detach()

diff = (train(fused=True)-train(fused=False)).abs().max().item()
print('expected: fused and unfused AdamW train the same weights (difference below 1e-6)')
print(f'seen: the weights differ by {diff:.2g} after 2 steps with lr=0.01')
sys.exit(diff>1e-6)
