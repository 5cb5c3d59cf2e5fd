"""fastai's MixedPrecision is hard-coded to CUDA: on a CPU, learn.to_bf16() trains in fp32."""
import sys
from fastai.basics import *
from fastai.callback.fp16 import *

data = [(torch.randn(3, 8, 8), torch.tensor(0)) for _ in range(8)]
dls = DataLoaders.from_dsets(data, data, bs=4, device='cpu', num_workers=0)
model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss()).to_bf16()
dtypes = set()
model[0].register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
with learn.no_bar(), learn.no_logging(): learn.fit(1)
print("expected: the convolution outputs {torch.bfloat16}, as it does under torch.autocast('cpu', dtype=torch.bfloat16)")
print(f'seen: {dtypes}')
sys.exit(dtypes!={torch.bfloat16})
