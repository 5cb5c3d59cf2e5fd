"""Does it pass PyTorch's, Composer's, fastxtend's and fastai's own tests of channels last? `python benchmarks/peers_tests.py`

modules: each case of PyTorch's list of modules (`torch.testing._internal.common_modules`, which needs `pip install expecttest`): converted,
with its images and volumes in channels last, inside `tuned_kernels`, it computes the same outputs and gradients as in contiguous format in
double precision. Cases with convolutions are also checked and traced as training steps.
composer: after the algorithm has been applied to a model, or to a Trainer before its first batch, weights and activations are in channels
last, and a step trains.
fastxtend: the callback and the transform, on the input types of fastai, with and without mixed precision, and back again.
fastai: each cell of its notebooks that needs no GPU and no download, read from `--fastai-nbs FOLDER` (the folder `nbs` of a clone of fastai):
cells that run without this package also run when it is imported, and with every Learner in channels last.
Prints the failures, and exits with 1 if there are any."""
import copy, inspect, json, subprocess, sys, tempfile, time, warnings
from collections import Counter
from functools import partial
from pathlib import Path
warnings.simplefilter('ignore')
import torch
from torch import nn
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import (CrossEntropyLossFlat, DataLoaders, Learner, MixedPrecision, TensorCategory, TensorImage, TensorImageBW, TensorMask)
from fastcore.script import call_parse
from fastxtend_cl.all import ChannelsLastCallback, ChannelsLastTfm, TrainingStep, apply_channels_last, apply_contiguous, check_formats, format_of, trace_formats, tuned_kernels
from fastxtend_cl.convert import convolutions
from fastxtend_cl.layout import as_channels_last

def tensors(o):
    if isinstance(o, torch.Tensor): yield o
    elif isinstance(o, dict): yield from (t for v in o.values() for t in tensors(v))
    elif isinstance(o, (list, tuple)): yield from (t for v in o for t in tensors(v))

def mapped(f, o):
    "`o` with `f` of its tensors; a named tuple stays one"
    if isinstance(o, torch.Tensor): return f(o)
    if isinstance(o, dict): return {k: mapped(f, v) for k,v in o.items()}
    if isinstance(o, tuple) and hasattr(o, '_fields'): return type(o)(*(mapped(f, v) for v in o))
    return type(o)(mapped(f, v) for v in o) if isinstance(o, (list, tuple)) else o

# PyTorch

def results(module, args, kwargs):
    "Outputs, and gradients of a loss that weighs each output differently"
    torch.manual_seed(0)
    args,kwargs = (mapped(lambda t: t.detach().requires_grad_(t.requires_grad), o) for o in (args, kwargs))
    out = [t for t in tensors(module(*args, **kwargs)) if t.is_floating_point() or t.is_complex()]
    gen = torch.Generator().manual_seed(1)
    loss = sum((t*torch.rand(t.shape, generator=gen, dtype=torch.float64).to(t.dtype)).sum() for t in out if t.requires_grad)
    if isinstance(loss, torch.Tensor): (loss.real if loss.is_complex() else loss).backward()
    ts = [t for t in (*module.parameters(), *tensors(args), *tensors(kwargs)) if t.grad is not None]
    return [t.detach() for t in out]+[t.grad for t in ts]

def close(got, want):
    return len(got)==len(want) and all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4*max(1., b.double().abs().max().item() if b.numel() else 0.),
        equal_nan=True) for a,b in zip(got, want) if not a.is_complex())

def to_double(t): return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

def module_case(module, args, kwargs):
    "What is wrong with a case, or None"
    try: module(*args, **kwargs) # a lazy one makes its weights
    except RuntimeError: return # torch refuses single precision there: fractional pools with samples in double
    exact = results(copy.deepcopy(module).double(), *mapped(to_double, (args, kwargs)))
    apply_channels_last(module)
    last = mapped(lambda t: as_channels_last(t.detach()).requires_grad_(t.requires_grad), (args, kwargs))
    for mode in ('correct', 'tuned'):
        with tuned_kernels(mode): got = results(copy.deepcopy(module), *last)
        if not close(got, exact): return f'another result in mode {mode}'
    if not convolutions(module) or kwargs: return
    step = TrainingStep(module, tuple(args), (), lambda out: sum(t.square().mean() for t in tensors(out)), torch.optim.SGD(module.parameters(), 1e-3), tuned=True)
    if check_formats(step).ok is False: return 'check finds it wrong'
    trace_formats(step)

def modules(names):
    try: from torch.testing._internal.common_modules import module_db
    except ModuleNotFoundError as e: sys.exit(f'{e}: pip install expecttest')
    for info in module_db:
        if names and info.name not in names: continue
        for training in (True, False):
            torch.manual_seed(0)
            for i,case in enumerate(info.module_inputs_func(info, device='cpu', dtype=torch.float32, requires_grad=True, training=training)):
                if case.forward_input is None: continue
                def run(case=case):
                    module = info.module_cls(*case.constructor_input.args, **case.constructor_input.kwargs).train(training)
                    return module_case(module, case.forward_input.args, case.forward_input.kwargs)
                yield f'{info.name}, case {i}, {"training" if training else "evaluation"}',run

# Composer

class Simple(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 4, 3, stride=2, groups=4),nn.Linear(4, 2)
    def forward(self, x): return self.head(self.b(self.a(x).relu()).mean((2, 3)))

def all_last(model): return all(format_of(p) in ('channels_last', 'ambiguous') for p in model.parameters() if p.ndim==4)

def learner(cls=TensorImage, shape=(3, 16, 16), target=lambda i: TensorCategory(i%2), model=None, **kwargs):
    ds = [(cls(torch.randn(shape)), target(i)) for i in range(8)]
    return Learner(DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0, device='cpu'), model or Simple(), loss_func=CrossEntropyLossFlat(), **kwargs)

def fitted(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def composer(names):
    def applied():
        model,x = apply_channels_last(Simple()),torch.randn(2, 3, 16, 16)
        if not all_last(model): return 'weights stay contiguous'
        if format_of(model.a(x.contiguous(memory_format=torch.channels_last)))!='channels_last': return 'activations are not in channels last'
    def before_the_first_batch():
        seen = []
        learn = learner().to_channelslast(use_amp=False)
        learn.model.register_forward_pre_hook(lambda m, args: seen.append((all_last(m), format_of(args[0]))))
        fitted(learn)
        if {*seen}!={(True, 'channels_last')}: return f'the model was {seen[0]}'
    yield 'a model',applied
    yield 'before the first batch',before_the_first_batch

# fastxtend

def fastxtend(names):
    def transform():
        tfm,x = ChannelsLastTfm(),torch.randn(2, 3, 8, 8)
        for cls in (TensorImage, TensorImageBW, TensorMask):
            if format_of(tfm(cls(x)))!='channels_last' or type(tfm(cls(x))) is not cls: return f'{cls.__name__} is not converted'
        if format_of(tfm(x))!='contiguous': return 'a plain tensor is converted'
    def callback():
        learn = fitted(learner(cbs=ChannelsLastCallback()))
        if not all_last(learn.model): return 'weights stay contiguous'
    def there_and_back():
        learn = fitted(learner().to_channelslast(amp_mode='bf16'))
        if not (learn._grab_cbs(ChannelsLast) and learn._grab_cbs(MixedPrecision)): return 'a callback is missing'
        learn.to_contiguous(to_fp32=True)
        if learn._grab_cbs(ChannelsLast) or learn._grab_cbs(MixedPrecision): return 'a callback is left'
        if any(format_of(p)=='channels_last' for p in learn.model.parameters()): return 'weights stay in channels last'
        fitted(learn)
    def signature():
        got = {*inspect.signature(Learner.to_channelslast).parameters}
        if missing := {'use_amp', 'amp_mode', 'init_scale', 'growth_interval', 'enabled'}-got: return f'no argument {missing}'
    def plain_function():
        model = apply_contiguous(apply_channels_last(Simple()))
        if any(format_of(p)=='channels_last' for p in model.parameters()): return 'weights stay in channels last'
    for f in (transform, callback, there_and_back, signature, plain_function): yield f.__name__.replace('_', ' '),f

# fastai

with_learners = ('12_optimizer', '13_callback.core', '13a_learner', '13b_metrics', '14_callback.schedule', '14a_callback.data', '15_callback.hook', '15a_vision.models.unet',
    '16_callback.progress', '17_callback.tracker', '18_callback.fp16', '18a_callback.training', '18b_callback.preds', '18c_callback.channelslast', '19_callback.mixup',
    '20_interpret', '20a_distributed', '21_vision.learner', '24_vision.gan')

def cell_results(notebook, mode):
    "What each cell came to, in a process and a folder of its own"
    with tempfile.TemporaryDirectory() as folder:
        r = subprocess.run([sys.executable, '-W', 'ignore', Path(__file__).resolve().with_name('fastai_cells.py'), notebook, mode], cwd=folder, capture_output=True, text=True)
    if r.returncode: sys.exit(f'{notebook.name}, {mode}: {(r.stderr.splitlines() or ["ended"])[-1]}')
    return json.loads(r.stdout.splitlines()[-1])

def fastai(folder, names):
    for name in names or with_learners:
        if not (notebook := Path(folder).resolve()/f'{name}.ipynb').exists(): sys.exit(f'no notebook {notebook}')
        plain = cell_results(notebook, 'plain')
        for mode in ('imported', 'converted'):
            for i,why in cell_results(notebook, mode).items():
                if plain[i]=='ok': yield f'{name}, cell {i}, {mode}',lambda why=why: None if why=='ok' else why

suites = dict(modules=modules, composer=composer, fastxtend=fastxtend)

@call_parse
def main(
    parts:str=','.join(suites), # Suites, separated by commas
    names:str='', # Of PyTorch's modules, such as nn.Conv2d, or of fastai's notebooks, separated by commas; none: all
    fastai_nbs:str='', # Folder of fastai's notebooks; with it the suite fastai runs, too, or alone with `--parts fastai`
):
    "Run the suites and exit with 1 if anything fails"
    if fastai_nbs:
        suites['fastai'] = partial(fastai, fastai_nbs)
        if 'fastai' not in parts.split(','): parts += ',fastai'
    if bad := {*parts.split(',')}-{*suites}: sys.exit(f'unknown suite {", ".join(bad)}: choose from {", ".join(suites)}')
    failed,start = Counter(),time.time()
    for part in parts.split(','):
        n = 0
        for n,(name,run) in enumerate(suites[part](names.split(',') if names else []), 1):
            try: why = run()
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as e: why = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:150]}'
            if why: failed[part] += 1; print(f'{part}: {name}: {why}', flush=True)
        print(f'{part}: {n} cases, {failed[part]} failed, {time.time()-start:.0f} s', flush=True)
    sys.exit(int(bool(failed)))
