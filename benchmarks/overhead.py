"""Microseconds that `ChannelsLastCallback` adds to a batch, against fastai's `ChannelsLast`: a tiny CNN, whole batches, paired;
and microseconds that `tuned_kernels` adds to a call of an operator, on the smallest tensors: `python benchmarks/overhead.py`"""
import statistics, time
import torch
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TensorCategory, TensorImage
from fastcore.script import call_parse
from fastxtend_cl.callbacks import ChannelsLastCallback
from fastxtend_cl.kernels import tuned_kernels
from common import interleave, interval, save

def learner(cb, bs, size):
    torch.manual_seed(0)
    ds = [(TensorImage(torch.randn(3, size, size)),TensorCategory(i%2)) for i in range(bs)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def operators():
    "Operators on tiny channels-last tensors"
    def make(*shape): return torch.randn(shape).contiguous(memory_format=torch.channels_last)
    aten,x,w,g,args = torch.ops.aten,make(1, 2, 4, 4),make(2, 2, 3, 3),make(1, 2, 2, 2),([1,1], [0,0], [1,1], False, [0,0], 1)
    return {'convolution': lambda: aten.convolution(x, w, None, *args),
        'convolution_backward': lambda: aten.convolution_backward(g, x, w, None, *args, [True, True, False]),
        'threshold_backward': lambda: aten.threshold_backward(x, x, 0), 'mean': lambda: x.mean((2, 3))}

def microseconds(fs, blocks=60, n=200):
    "The least of many blocks, in turns"
    best = dict.fromkeys(fs, float('inf'))
    for _ in range(blocks):
        for name,f in fs.items():
            start = time.perf_counter()
            for _ in range(n): f()
            best[name] = min(best[name], 1e6*(time.perf_counter()-start)/n)
    return best

def of_kernels():
    "Rows: an operator before `tuned_kernels` was ever used, outside of it, and inside"
    fs = operators()
    before = microseconds(fs)
    with tuned_kernels():
        for f in fs.values(): f()
    inactive = microseconds(fs)
    with tuned_kernels(): active = microseconds(fs)
    def context():
        with tuned_kernels(): pass
    rows = [dict(operator=n, torch_us=before[n], inactive_adds_us=inactive[n]-before[n], active_adds_us=active[n]-before[n]) for n in fs]
    return rows + [dict(operator='entering and leaving `tuned_kernels`', active_adds_us=microseconds({'': context})[''])]

@call_parse
def main(
    rounds:int=400, # Rounds; in each, every arm runs one block
    block:int=20, # Batches a block; the first is dropped
    bs:int=4, size:int=8,
):
    "Measure and write benchmarks/results/overhead.json"
    torch.set_num_threads(1)
    kernels = of_kernels()
    for r in kernels: print(f"{r['operator']:40}" + '  '.join(f'{k} {v:.1f}' for k,v in r.items() if k!='operator'))
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
    save('overhead', kernels=kernels, rows=rows, rounds=rounds, block=block, batch=[bs,3,size,size], threads=1)
