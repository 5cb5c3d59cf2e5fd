"The recipes of `nbs/tutorials/my_own_loop.ipynb` in two processes on one CPU; this file is its own worker"
import os, sys
from pathlib import Path
import pytest, torch
from helpers import state_follows, two_processes

page = Path(__file__).resolve().parent.parent/'nbs/tutorials/my_own_loop.ipynb'

def recipes():
    "The names that the page's visible cells define"
    from fastcore.nbio import read_nb
    found = {}
    for c in read_nb(page).cells:
        if c.cell_type=='code' and not c.source.startswith('#|'): exec(compile(c.source, page.name, 'exec'), found)
    return found

def loader():
    data = torch.utils.data.TensorDataset(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32)%10)
    return torch.utils.data.DataLoader(data, batch_size=4)

def train_accelerate(page, folder, way):
    "Trained anew, or first contiguous and then resumed in channels last"
    from accelerate.state import AcceleratorState
    saved = None
    if way=='resumed':
        ours = {n: page[n] for n in ('apply_channels_last', 'align_optimizer_state')}
        page.update(dict.fromkeys(ours, lambda model,opt: model))
        accelerator = page['train_accelerate'](page['network'](), loader())
        saved = accelerator.save_state(f'{folder}/state')
        accelerator.wait_for_everyone()
        AcceleratorState._reset_state(True)
        page.update(ours)
    page['train_accelerate'](model := page['network'](), loader(), saved)
    return model

def train_lightning(page, folder, way):
    import lightning as L
    class TooLate(page['LitNetwork']):
        def configure_model(self): pass
        def on_fit_start(self): page['apply_channels_last'](self)
    if way=='too late': page['LitNetwork'] = TooLate
    page['train_lightning'](model := page['network'](), loader(), max_epochs=1, accelerator='cpu', devices=2, strategy='ddp',
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return model

def worker(folder, name, way):
    from fastxtend_cl.operators import switch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.optimizer import register_optimizer_step_post_hook
    rank,found,opts = int(os.environ['RANK']),dict(modes=set(), wrapped=0, images=[], grads=[]),[]
    def seen(m, args, out):
        found['wrapped'] += isinstance(m, DistributedDataParallel)
        if isinstance(m, torch.nn.Conv2d):
            found['modes'].add(switch.mode)
            if m.in_channels==3: found['images'].append(args[0].stride())
            out.register_hook(lambda g: found['modes'].add(switch.mode))
    def stepped(opt, *args):
        opts[:] = [opt]
        found['grads'].append([p.grad.stride()==p.stride() for g in opt.param_groups for p in g['params']])
    names = recipes()
    torch.manual_seed(rank)
    hooks = register_module_forward_hook(seen),register_optimizer_step_post_hook(stepped)
    model = dict(accelerate=train_accelerate, lightning=train_lightning)[name](names, folder, way)
    for h in hooks: h.remove()
    found.update(strides=[p.stride() for p in model.parameters() if p.ndim==4], follows=state_follows(model, opts[0]),
        params=[p.detach().clone() for p in model.parameters()])
    torch.save(found, Path(folder)/f'{rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

def run_two(folder, *args):
    "Run two workers; what each found, and what they wrote to stderr"
    outs = two_processes('-W', 'default', __file__, folder, *args, ACCELERATE_USE_CPU='true')
    return [torch.load(folder/f'{i}.pth') for i in range(2)],'\n'.join(err for _,err in outs)

buckets = 'Grad strides do not match bucket view'

@pytest.mark.parametrize('name,way', [('accelerate', 'new'), ('accelerate', 'resumed'), ('lightning', 'new')])
def test_a_recipe_in_two_processes(tmp_path, name, way):
    found,err = run_two(tmp_path, name, way)
    fits = 2 if way=='resumed' else 1
    for o in found:
        assert o['wrapped']==4*fits and o['modes']=={'tuned'}
        assert o['images']==[(768, 1, 48, 3)]*4*fits
        assert o['strides']==[(27, 1, 9, 3), (144, 1, 48, 16), (288, 1, 96, 32)]
        assert len(o['grads'])==4*fits and all(map(all, o['grads'])) and o['follows']
    assert all(torch.equal(p, q) for p,q in zip(found[0]['params'], found[1]['params']))
    assert buckets not in err

def test_lightning_wraps_before_a_fit_starts(tmp_path): assert buckets in run_two(tmp_path, 'lightning', 'too late')[1]

if __name__=='__main__': worker(*sys.argv[1:])
