"Microseconds that `ChannelsLastCallback` adds to a batch, against fastai's `ChannelsLast`: a tiny CNN, whole batches, paired"
import statistics
import torch
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TensorCategory, TensorImage
from fastcore.script import call_parse
from fastxtend_cl.channelslast import ChannelsLastCallback
from common import interleave, interval, save

def learner(cb, bs, size):
    torch.manual_seed(0)
    ds = [(TensorImage(torch.randn(3, size, size)),TensorCategory(i%2)) for i in range(bs)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

@call_parse
def main(
    rounds:int=400, # Rounds; in each, every arm runs one block
    block:int=20, # Batches a block; the first is dropped
    bs:int=4, size:int=8,
):
    "Measure and write benchmarks/results/overhead.json"
    torch.set_num_threads(1)
    arms,events = {},{}
    for name,cb in {"fastai's ChannelsLast": ChannelsLast, "fastai's ChannelsLast again": ChannelsLast,
            'ChannelsLastCallback': ChannelsLastCallback}.items():
        learn = learner(cb(), bs, size)
        batch = learn.dls.train.one_batch()
        learn('before_fit'); learn('before_epoch'); learn.dl = learn.dls.train; learn.n_iter = 1; learn('before_train')
        for o in learn.cbs.filter(lambda o: o.name in ('recorder','progress','cast_to_tensor')): o.run = o.name=='cast_to_tensor'
        arms[name] = lambda learn=learn, batch=batch: learn.one_batch(0, batch)
        def event(learn=learn, batch=batch):
            learn._split(batch)
            learn.channels_last('before_batch')
        events[name] = lambda event=event: [event() for _ in range(50)]
    def difference(seconds, name, each=1):
        base = seconds["fastai's ChannelsLast"]
        return [1e6*o for o in interval([(a-b)/each for a,b in zip(seconds[name], base)])]
    whole,alone = interleave(arms, rounds, block),interleave(events, rounds//4, block)
    rows = [dict(arm=n, batch_us=1e6*statistics.median(whole[n]), added_us=difference(whole, n),
        event_added_us=difference(alone, n, 50)) for n in arms]
    print(f"{'':30}{'batch, us':>10}{'added to a batch, us (95 %)':>32}{'event alone, us (95 %)':>28}")
    for r in rows:
        print(f"{r['arm']:30}{r['batch_us']:10.1f}"
            + ''.join(f'{m:{w}.1f} ({l:.1f} to {h:.1f})' for (m,l,h),w in ((r['added_us'], 16), (r['event_added_us'], 12))))
    save('overhead', rows=rows, rounds=rounds, block=block, batch=[bs,3,size,size], threads=1)
