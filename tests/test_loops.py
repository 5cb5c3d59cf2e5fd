"The recipes of `nbs/tutorials/my_own_loop.ipynb` in two processes on one CPU, and the figures of `gpu_colab_kaggle.ipynb`; this file is its own worker"
import json, os, re, sys
from pathlib import Path
import pytest, torch
from fastcore.nbio import read_nb
from helpers import state_follows, two_processes

page = Path(__file__).resolve().parent.parent/'nbs/tutorials/my_own_loop.ipynb'

def recipes():
    "The names that the page's visible cells define"
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
    class TooLate(page['LitNet']):
        def configure_model(self): pass
        def on_fit_start(self): page['apply_channels_last'](self)
    if way=='too late': page['LitNet'] = TooLate
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

def test_a_recipe_is_short():
    cells = [c.source.splitlines() for c in read_nb(page).cells if c.cell_type=='code' and re.search('^def train_', c.source, re.M)]
    assert len(cells)==4
    for lines in cells: assert len([l for l in lines if l])<15 and max(map(len, lines))<=88, lines

def test_the_figures_of_the_gpu_page_were_measured(root):
    "Its table is of the results, of the H100's race and of the H200's sweep"
    results = {n: json.loads((root/f'benchmarks/results/{n}-cuda.json').read_text()) for n in ('gpu-plan', 'speed')}
    h100 = {(o['model'], row['arm']): row['ratio'] for o in results['gpu-plan']['rows'] if not o['compile'] for row in o['plan']['rows']}
    h200 = {o['model']: o['ratio'][0] for o in results['speed']['rows'] if o['section']=='fp16' and o['arm']=='ours'}
    text = '\n'.join(''.join(c['source']) for c in json.loads((page.parent/'gpu_colab_kaggle.ipynb').read_text())['cells'])
    lines = re.findall(r'^\| (\w+)(?: \(video\))? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$', text, re.M)
    assert len(lines)==8
    for name,*said in lines:
        measured = h100[name, 'contiguous fp16'],h100[name, 'channels last fp16'],h200[name]
        assert said==[f'{v:.2f}' for v in measured], name
    compiled = next(o['plan']['reason'] for o in results['gpu-plan']['rows'] if o['compile'] and o['model']=='resnet50')
    assert re.search(r'compiled is ([\d.]+ times as fast as contiguous fp32)', compiled)[1] in text
    cards = results['gpu-plan']['conditions']['gpu'],results['speed']['card']
    assert 'H100' in cards[0] and 'H200' in cards[1] and results['gpu-plan']['conditions']['date'] in text

if __name__=='__main__': worker(*sys.argv[1:])
