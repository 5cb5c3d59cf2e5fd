"""What is the overhead of the package for tiny computations? `OMP_NUM_THREADS=1 python benchmarks/overhead.py`

Microseconds that `ChannelsLastCallback` adds to a batch of a tiny CNN, against fastai's `ChannelsLast`, and microseconds that
`tuned_kernels` adds to a call of an operator on the smallest tensors. Writes results/overhead.json."""
import statistics
from functools import partial
import torch
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TensorCategory, TensorImage
from fastcore.script import call_parse
from fastxtend_cl.callbacks import ChannelsLastCallback
from fastxtend_cl.kernels import tuned_kernels
from common import markdown, paired, save, spread

def learner(cb, bs, size):
    "A Learner inside of its first fit"
    torch.manual_seed(0)
    ds = [(TensorImage(torch.randn(3, size, size)),TensorCategory(i%2)) for i in range(bs)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu'), model, loss_func=CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn('before_fit'); learn('before_epoch'); learn.dl = learn.dls.train; learn.n_iter = 1; learn('before_train')
    for o in learn.cbs.filter(lambda o: o.name in ('recorder','progress','cast_to_tensor')): o.run = o.name=='cast_to_tensor'
    return learn

def operators():
    "Operators on tiny channels-last tensors"
    def make(*shape): return torch.randn(shape).contiguous(memory_format=torch.channels_last)
    aten,x,w,g,args = torch.ops.aten,make(1, 2, 4, 4),make(2, 2, 3, 3),make(1, 2, 2, 2),([1,1], [0,0], [1,1], False, [0,0], 1)
    return {'convolution': lambda: aten.convolution(x, w, None, *args),
        'convolution_backward': lambda: aten.convolution_backward(g, x, w, None, *args, [True, True, False]),
        'threshold_backward': lambda: aten.threshold_backward(x, x, 0), 'mean': lambda: x.mean((2, 3))}

def repeated(f, n):
    for _ in range(n): f()

def microseconds(fs, rounds=60, n=200):
    "Microseconds of a call, the minimum of the rounds"
    timed = paired({name: partial(repeated, f, n) for name,f in fs.items()}, rounds, 3)
    return {name: 1e6*min(a.seconds.values())/n for name,a in timed.items()}

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

def of_callbacks(rounds, block, bs, size):
    "Rows: a whole batch, and the events of the callback alone, with fastai's callback and with ours"
    learns = {n: learner(cb(), bs, size) for n,cb in {"fastai's ChannelsLast": ChannelsLast, "fastai's ChannelsLast, again": ChannelsLast,
        'ChannelsLastCallback': ChannelsLastCallback}.items()}
    batches = {n: l.dls.train.one_batch() for n,l in learns.items()}
    def events(learn, batch):
        learn._split(batch)
        learn.channels_last('before_batch')
    whole = paired({n: partial(l.one_batch, 0, batches[n]) for n,l in learns.items()}, rounds, block, bar=True)
    alone = paired({n: partial(repeated, partial(events, l, batches[n]), 50) for n,l in learns.items()}, rounds//4, block, bar=True)
    def added(timed, n, each=1):
        base = next(iter(timed.values())).seconds
        return [1e6*o/each for o in spread(s-base[i] for i,s in timed[n].seconds.items())]
    return [dict(arm=n, batch_us=1e6*statistics.median(whole[n].seconds.values()), added_us=added(whole, n), event_added_us=added(alone, n, 50))
        for n in learns]

@call_parse
def main(
    rounds:int=60, # Rounds; in each, every arm runs one block
    block:int=20, # Batches a block; the first is dropped
    bs:int=4, # Images a batch
    size:int=8, # Pixels
    tiny:bool=False, # Few rounds; writes nothing
):
    "Measure and write benchmarks/results/overhead.json"
    torch.set_num_threads(1)
    if tiny: rounds = 16
    kernels,rows = of_kernels(),of_callbacks(rounds, block, bs, size)
    names = 'torch_us','inactive_adds_us','active_adds_us'
    print(markdown(['operator', *names], [[r['operator'], *(f'{r[k]:.1f}' if k in r else '' for k in names)] for r in kernels]), '', sep='\n')
    def three(r): return '{:.1f} ({:.1f} to {:.1f})'.format(*r)
    print(markdown(['', 'batch, us', 'added to a batch, us', 'events alone, us'],
        [[r['arm'], f"{r['batch_us']:.1f}", three(r['added_us']), three(r['event_added_us'])] for r in rows]))
    if not tiny: save('overhead', kernels=kernels, rows=rows, rounds=rounds, block=block, batch=[bs,3,size,size], threads=1)
