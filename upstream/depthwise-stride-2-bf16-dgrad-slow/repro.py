"""Input gradient of a depthwise convolution with stride 2 takes about 10 times as long in bf16 as in fp32 on an AVX512-BF16 CPU."""
import statistics, sys, time, torch
from torch import nn

torch.set_num_threads(1)
last = torch.channels_last

def backward(dtype):
    conv = nn.Conv2d(64, 64, 3, stride=2, groups=64, bias=False).to(dtype, memory_format=last).requires_grad_(False)
    x = torch.randn(1, 64, 32, 32, dtype=dtype).to(memory_format=last).requires_grad_()
    y = conv(x)
    g = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, g, retain_graph=True)

runs = {dtype: backward(dtype) for dtype in (torch.float32, torch.bfloat16)}
times = {dtype: [] for dtype in runs}
for block in range(11): # interleaved; CPU time of this process, so other work on the machine hardly matters
    for dtype,run in runs.items():
        run()
        start = time.process_time()
        for _ in range(20): run()
        times[dtype].append((time.process_time()-start)/20*1e3)
fp32,bf16 = (statistics.median(t) for t in times.values())
print('expected: bf16 takes at most 3 times as long as fp32')
print(f'seen: fp32 {fp32:.3f} ms, bf16 {bf16:.3f} ms: {bf16/fp32:.1f} times as long')
sys.exit(bf16>3*fp32 and torch.ops.mkldnn._is_mkldnn_bf16_supported()) # without that support bf16 does not reach oneDNN
