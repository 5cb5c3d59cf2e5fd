"Two processes on one CPU, through fastai's `distrib_ctx` and accelerate; this file is its own worker"
import os, sys
from pathlib import Path
import pytest, torch
from helpers import two_processes

def worker(folder, amp, opt):
    "Two fits with a process group of two, then one without; leaves what was found in `folder`"
    import torch.distributed.nn # before there is a group: see `helpers.process_group`
    from functools import partial
    from fastai.callback.channelslast import ChannelsLast
    from fastai.callback.core import Callback
    from fastai.distributed import DistributedDL
    from fastai.optimizer import OptimWrapper
    from helpers import SeeBatch, end_group, quiet, state_follows, tiny_learner
    import fastxtend_cl.channelslast

    def _broadcast(self, t, rank): # fastai's moves the indices to CUDA, which nccl needs and gloo does not
        t = torch.LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast

    class SeeWrapped(Callback):
        order = 20
        def before_fit(self): self.wrapped = type(self.model).__name__
        def after_backward(self):
            self.grads_follow = all(p.grad.stride()==p.stride() for p in self.model.parameters())
            self.batches = getattr(self, 'batches', 0)+1

    opt_func = {} if opt=='fastai' else dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True))
    learn = tiny_learner(seed=int(os.environ['RANK']), cbs=[SeeBatch, SeeWrapped], path=folder, **opt_func)
    if amp!='late': learn.to_channelslast(amp_mode='bf16' if amp=='bf16' else False)
    else:
        learn.add_cb(ChannelsLast())
        learn.channels_last.order = 12
    found = dict(before=[p.detach().clone() for p in learn.model.parameters()])
    with quiet(learn, silent=False):
        with learn.distrib_ctx(sync_bn=False, cpu=True):
            learn.fit(1, 1e-2); learn.fit(1, 1e-2)
            found.update(group=torch.distributed.get_world_size(), backend=torch.distributed.get_backend())
            learn.save('distributed')
        rank = int(os.environ['RANK'])
        found.update(rank=rank, wrapped=learn.see_wrapped.wrapped, grads_follow=learn.see_wrapped.grads_follow,
            batches=learn.see_wrapped.batches, x=learn.see_batch.x,
            params=[p.detach().clone() for p in learn.model.parameters()], strides=[p.stride() for p in learn.model.parameters()],
            follows=state_follows(learn.model, learn.opt), model=type(learn.model).__name__)
        learn.fit(1, 1e-2)
        found.update(alone=learn.see_wrapped.wrapped, follows_alone=state_follows(learn.model, learn.opt))
    torch.save(found, Path(folder)/f'{rank}.pth')
    del learn
    end_group() # accelerate leaves it

def run_two(folder, *args):
    "Run two workers; what each found, and what they wrote to stderr"
    outs = two_processes('-W', 'default', __file__, folder, *args, ACCELERATE_USE_CPU='true')
    return [torch.load(folder/f'{i}.pth') for i in range(2)],'\n'.join(err for _,err in outs)

@pytest.fixture(scope='module', params=['fp32-fastai', 'fp32-fused', 'bf16-fused'])
def two(request, tmp_path_factory): return run_two(tmp_path_factory.mktemp('distributed'), *request.param.split('-'))

def test_two_processes_took_part(two):
    found,_ = two
    assert ([(o['rank'], o['group'], o['backend'], o['wrapped'], o['batches']) for o in found]
        ==[(i, 2, 'gloo', 'DistributedDataParallel', 4) for i in range(2)])

def test_both_have_the_same_weights_and_have_learned(two):
    a,b = two[0]
    assert all(torch.equal(p, q) for p,q in zip(a['params'], b['params']))
    assert not torch.equal(a['params'][0], a['before'][0]) and not torch.equal(a['before'][0], b['before'][0])

def test_channels_last_is_kept(two):
    for o in two[0]:
        assert [s for s in o['strides'] if len(s)==4]==[(27, 1, 9, 3), (72, 1, 24, 8)]
        assert o['grads_follow'] and o['x']=={'nhwc'}

def test_the_optimizers_state_follows(two): assert all(o['follows'] and o['follows_alone'] for o in two[0])

def test_no_warning_of_buckets(two): assert 'Grad strides do not match bucket view' not in two[1]

def test_a_model_converted_behind_the_wrapping_is_warned_of(tmp_path):
    assert 'Grad strides do not match bucket view' in run_two(tmp_path, 'late', 'fastai')[1]

def test_the_learner_is_whole_afterwards(two): assert all((o['model'], o['alone'])==('Sequential', 'Sequential') for o in two[0])

if __name__=='__main__': worker(*sys.argv[1:])
