"""fastai's Learner.to_channelslast() raises "required rank 4 tensor" at fit for a model with a 3-D convolution."""
import sys
from fastai.basics import *
from fastai.callback.channelslast import *

data = [(torch.randn(3, 4, 4, 4), torch.tensor(0)) for _ in range(8)]
dls = DataLoaders.from_dsets(data, data, bs=4, device='cpu', num_workers=0)
model = nn.Sequential(nn.Conv3d(3, 2, 4), nn.Flatten())
learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss())
print('expected: the Learner trains')
faulty = False
with learn.no_bar(), learn.no_logging():
    learn.fit(1) # contiguous: trains
    try: learn.to_channelslast(use_amp=False).fit(1)
    except RuntimeError as e: faulty = str(e).splitlines()[-1].strip()
print('seen:', faulty or 'it trains')
sys.exit(bool(faulty))
