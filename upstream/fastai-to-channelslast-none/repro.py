"""A second call of fastai's Learner.to_channelslast() returns None and ignores its arguments."""
import sys
from fastai.basics import *
from fastai.callback.channelslast import *

data = [(torch.randn(3, 8, 8), torch.tensor(0)) for _ in range(8)]
dls = DataLoaders.from_dsets(data, data, bs=4, device='cpu', num_workers=0)
learn = Learner(dls, nn.Conv2d(3, 2, 8), loss_func=nn.CrossEntropyLoss())
learn.to_channelslast(use_amp=False)
second = learn.to_channelslast() # by default with mixed precision
amp = hasattr(learn, 'mixed_precision')
print('expected: the second call returns a Learner, with mixed precision')
print(f'seen: it returns a {type(second).__name__}; mixed precision: {amp}')
sys.exit(not (second is learn and amp))
