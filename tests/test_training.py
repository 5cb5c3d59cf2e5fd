import ast
import copy
import inspect
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
import cloudpickle
import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision, NonNativeMixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.text.data import TensorText
from fastai.torch_core import TensorBase, TensorCategory, TensorImage, TensorMask
from fastai.vision.augment import aug_transforms
from fastai.vision.data import ImageDataLoaders, SegmentationDataLoaders
from fastai.vision.learner import unet_learner, vision_learner
from fastai.vision.models.xresnet import xresnet18
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from helpers import (AveragedCopy, SeeBatch, assert_same_snapshot, caught_warnings, device, dls_of, fit, furthest, labels, of_class, quiet,
    random_images, snapshot, state_follows, tensor_dls, tiny_cnn, tiny_double, tiny_learner)
from fastxtend_cl import convert as fmt
import fastxtend_cl.channelslast # the methods of `Learner`
from fastxtend_cl.amp import DeviceMixedPrecision, kernels_mode
from fastxtend_cl.callbacks import ChannelsLastCallback, ChannelsLastTfm
from fastxtend_cl.kernels import less_random
from fastxtend_cl.plan import FormatPlan
from fastxtend_cl.convert import FormatWarning, NoConvolutionWarning
from fastxtend_cl.layout import as_channels_last, format_of
from warm import run_python

fused_adamw = partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)
root = Path(__file__).resolve().parent.parent

def conv_formats(model): return {format_of(p) for p in model.parameters() if p.ndim in (4, 5)}
def is_channels_last(learn): return 'channels_last' in conv_formats(learn.model)<={'channels_last', 'ambiguous'}
def is_contiguous(learn): return 'contiguous' in conv_formats(learn.model)<={'contiguous', 'ambiguous'}
def fp32(learn): return learn.to_channelslast(use_amp=False)

@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "24 small pictures in two folders, dark and light ones"
    path,rng = tmp_path_factory.mktemp('pictures'),np.random.default_rng(0)
    for name,low in (('dark', 0), ('light', 128)):
        (path/name).mkdir()
        for i in range(12): Image.fromarray(rng.integers(low, low+128, (40, 40, 3), dtype=np.uint8)).save(path/name/f'{i}.png')
    return path

@pytest.fixture
def image_dls(pictures):
    return ImageDataLoaders.from_folder(pictures, valid_pct=0.33, seed=0, bs=8, num_workers=0, device=device,
        batch_tfms=aug_transforms(size=32))

@pytest.fixture
def vision(image_dls, tmp_path):
    torch.manual_seed(0)
    learn = vision_learner(image_dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path).to_channelslast(use_amp=False)
    with quiet(learn): yield learn

# The commands of a Learner

def test_fit(vision):
    vision.fit(1, 1e-3)
    assert is_channels_last(vision) and state_follows(vision.model, vision.opt)

def test_fit_one_cycle(vision):
    vision.fit_one_cycle(2, 1e-3)
    assert is_channels_last(vision) and len(vision.recorder.values)==2

def test_fine_tune(vision):
    vision.fine_tune(1, freeze_epochs=1)
    assert is_channels_last(vision) and state_follows(vision.model, vision.opt) and all(p.requires_grad for p in vision.model.parameters())

def test_lr_find_leaves_the_weights(vision):
    before = {n:t.clone() for n,t in vision.model.state_dict().items()}
    vision.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(t.cpu(), before[n].cpu()) for n,t in vision.model.state_dict().items()) # fit moves the model
    vision.fit(1, 1e-3)
    assert is_channels_last(vision) and state_follows(vision.model, vision.opt)

@pytest.mark.parametrize('first', [lambda l: l.validate(), lambda l: l.get_preds()], ids=['validate', 'get_preds'])
def test_evaluation_before_any_fit_converts(vision, first):
    first(vision)
    assert is_channels_last(vision)

def test_training_goes_on_after_predicting_in_inference_mode():
    learn = fp32(tiny_learner())
    with torch.inference_mode(): preds_of(learn)
    assert is_channels_last(fit(learn))

def test_evaluation_equals_the_contiguous_one(vision):
    vision.fit(1, 1e-3)
    item = vision.dls.valid_ds[0][0]
    cl = vision.validate(),vision.get_preds()[0],vision.predict(item)[2],vision.tta(n=1)[0]
    assert is_channels_last(vision)
    assert is_contiguous(vision.to_contiguous())
    c = vision.validate(),vision.get_preds()[0],vision.predict(item)[2]
    for a,b in zip(cl, c): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-4)
    assert cl[3].shape==(len(vision.dls.valid_ds), 2)

def test_show_results(vision):
    import matplotlib.pyplot as plt
    vision.fit(1, 1e-3)
    plt.close('all')
    vision.show_results(max_n=2)
    assert len(plt.gcf().axes)==2
    plt.close('all')

def test_freeze_and_unfreeze_between_fits(vision):
    vision.freeze(); vision.fit(1, 1e-3); frozen = vision.model[0][0].weight.detach().clone()
    vision.fit(1, 1e-3)
    assert torch.equal(frozen, vision.model[0][0].weight)
    vision.unfreeze(); vision.fit(1, 1e-3)
    assert not torch.equal(frozen, vision.model[0][0].weight)
    assert is_channels_last(vision) and state_follows(vision.model, vision.opt)

# Architectures

def dark_or_light(f): return (np.array(Image.open(f))[..., 0]>128).astype(np.uint8)

def tiny_unet(pictures, path):
    dls = SegmentationDataLoaders.from_label_func(pictures, sorted(pictures.rglob('*.png'))[::3], dark_or_light,
        codes=['dark', 'light'], bs=4, num_workers=0,
        device=device, batch_tfms=aug_transforms(size=32))
    return unet_learner(dls, resnet18, pretrained=False, path=path, cbs=SeeBatch)

def test_unet_learner(pictures, tmp_path):
    learn = fit(tiny_unet(pictures, tmp_path).to_channelslast(use_amp=False))
    assert is_channels_last(learn) and learn.see_batch.x=={'nhwc'} and learn.see_batch.y=={3} and learn.see_batch.pred_=={'nhwc'}
    with quiet(learn): learn.show_results(max_n=2)

def test_xresnet_with_self_attention():
    learn = tiny_learner(dls_of(random_images(4, (3, 32, 32)), labels(4), bs=2), xresnet18(sa=True, n_out=2), cbs=ChannelsLastCallback)
    fit(learn)
    assert is_channels_last(learn) and state_follows(learn.model, learn.opt)

def test_3d_network_on_volumes():
    model = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    learn = fp32(tiny_learner(dls_of(random_images(8, (2, 4, 6, 8)), labels(8)), model, cbs=SeeBatch))
    fit(learn)
    assert learn.see_batch.x=={'nhwc'} and all(m.weight.is_contiguous(memory_format=torch.channels_last_3d) for m in (model[0], model[3]))
    assert state_follows(learn.model, learn.opt)

@pytest.mark.parametrize('cls', [TensorImage, TensorMask])
def test_image_to_image_target_and_prediction_are_channels_last(cls):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    learn = fp32(tiny_learner(dls_of(random_images(), random_images(seed=1, cls=cls), n_inp=1), model,
        loss_func=MSELossFlat(), cbs=SeeBatch))
    fit(learn)
    assert (learn.see_batch.x, learn.see_batch.y, learn.see_batch.pred_)==({'nhwc'}, {'nhwc'}, {'nhwc'})

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.head = nn.Conv2d(3, 4, 3),nn.Conv2d(3, 4, 3),nn.Linear(8, 2)
    def forward(self, x, y): return self.head(torch.cat([self.a(x).mean((2, 3)), self.b(y).mean((2, 3))], 1))

def test_two_inputs():
    learn = fp32(tiny_learner(dls_of(random_images(), random_images(seed=1), labels(), n_inp=2), TwoInputs(), cbs=SeeBatch))
    fit(learn)
    assert is_channels_last(learn) and learn.see_batch.x=={'nhwc'}

def test_batches_of_one():
    learn = fp32(tiny_learner(dls_of(random_images(3), labels(3), bs=1), cbs=SeeBatch))
    fit(learn)
    assert is_channels_last(learn) and learn.see_batch.x=={'nhwc'}

class TensorMine(TensorBase): pass

def test_own_type_added_after_the_learner_was_made():
    learn = fp32(tiny_learner(dls_of(random_images(cls=TensorMine), labels()), cbs=SeeBatch))
    fit(learn)
    assert learn.see_batch.x=={'nchw'}
    @ChannelsLastTfm
    def encodes(self, x:TensorMine): return as_channels_last(x)
    fit(learn)
    assert learn.see_batch.x=={'nhwc'}

# Formats that the model sees

def test_the_transform_leaves_other_ranks_and_types():
    same = [TensorMask(torch.zeros(2, 4, 4)), TensorImage(torch.zeros(3, 4, 4)), torch.zeros(2, 3, 4, 4), TensorCategory(1), 'text', None]
    tfm = ChannelsLastTfm()
    assert all(a is b for a,b in zip(tfm(tuple(same)), same))
    changed = [TensorMask(torch.zeros(2, 3, 4, 4)), TensorImage(torch.zeros(2, 3, 4, 4)), TensorImage(torch.zeros(2, 3, 4, 4, 4))]
    for a,b in zip(tfm(tuple(changed)), changed): assert type(a) is type(b) and format_of(a)=='channels_last' and torch.equal(a, b)
    assert tfm.decode(changed[0]) is changed[0]

def test_batches_and_predictions_are_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    make = partial(tiny_learner, loss_func=lambda p,y: p.square().mean())
    assert fit(make(model=copy.deepcopy(model), cbs=SeeBatch)).see_batch.x=={'nchw'}
    learn = fit(make(model=model, cbs=[SeeBatch, ChannelsLastCallback]))
    assert (learn.see_batch.x, learn.see_batch.pred_)==({'nhwc'}, {'nhwc'})

def test_a_callback_behind_cast_to_tensor_never_sees_a_typed_batch():
    late = ChannelsLastCallback()
    late.order = 11
    assert fit(tiny_learner(cbs=[SeeBatch, late])).see_batch.x=={'nchw'}

def test_as_batch_transform():
    learn = fit(tiny_learner(tensor_dls(after_batch=[ChannelsLastTfm()]), cbs=SeeBatch))
    assert learn.see_batch.x=={'nhwc'} and is_contiguous(learn)

@pytest.mark.parametrize('cb', [ChannelsLastCallback, ChannelsLastCallback(), [ChannelsLastCallback], [ChannelsLastCallback()]],
    ids=['class', 'instance', 'classes', 'instances'])
def test_callback_as_class_and_as_instance(cb):
    learn = tiny_learner(cbs=cb)
    assert is_channels_last(fit(learn)) and isinstance(learn.channels_last, ChannelsLast)
    assert is_channels_last(fit(fp32(learn))) and len(learn._grab_cbs(ChannelsLast))==1

def test_callback_of_one_fit():
    learn = tiny_learner()
    assert is_channels_last(fit(learn, cbs=ChannelsLastCallback())) and not hasattr(learn, 'channels_last')

# Equivalence

def trained(convert, n=5, **kwargs):
    "Losses of 4*`n` training steps in fp64, as many of validation, and the Learner"
    learn = convert(tiny_double(**kwargs))
    losses = []
    learn.add_cb(Callback(after_batch=lambda cb: losses.append(cb.loss.item())))
    fit(learn, n)
    return losses,learn

def assert_equal_training(a, b):
    assert max(abs(x-y) for x,y in zip(a[0], b[0]))<1e-10 and len(a[0])==len(b[0])>0
    assert furthest(a[1].model, b[1].model)<1e-9

def nothing(learn): return learn

@pytest.mark.parametrize('opt', [{}, dict(opt_func=fused_adamw)], ids=['fastai', 'fused'])
def test_twenty_steps_equal_contiguous_ones(opt):
    a,b = trained(nothing, **opt),trained(fp32, **opt)
    assert is_contiguous(a[1]) and is_channels_last(b[1]) and len(a[0])==40
    assert_equal_training(a, b)

@pytest.mark.parametrize('cb', [lambda: GradientAccumulation(8), AveragedCopy], ids=['GradientAccumulation', 'AveragedCopy'])
def test_callbacks_train_the_same(cb):
    a,b = (trained(f, cbs=cb(), opt_func=fused_adamw) for f in (nothing, fp32))
    assert_equal_training(a, b)
    assert is_channels_last(b[1]) and state_follows(b[1].model, b[1].opt)

def test_averaged_copy_is_made_of_the_converted_model():
    a,b = (trained(f, cbs=AveragedCopy)[1] for f in (nothing, fp32))
    assert 'channels_last' in conv_formats(b.averaged_copy.averaged)
    assert furthest(a.averaged_copy.averaged, b.averaged_copy.averaged)<1e-9

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_batches_stay_channels_last(mix):
    learn = fit(fp32(tiny_learner(cbs=[mix(), SeeBatch])), 2)
    assert learn.see_batch.x=={'nhwc'} and is_channels_last(learn)

@pytest.mark.parametrize('opt', [{}, dict(opt_func=fused_adamw)], ids=['fastai', 'fused'])
def test_there_and_back_between_fits(opt):
    def steps(*converts):
        learn = tiny_double(**opt)
        for f in converts: fit(f(learn))
        return learn
    a = steps(nothing, nothing, nothing, nothing)
    b = steps(fp32, lambda l: l.to_contiguous(), fp32, lambda l: l.to_contiguous())
    assert furthest(a.model, b.model)<1e-9 and is_contiguous(b) and state_follows(b.model, b.opt)

def test_early_stopping():
    learn = fit(fp32(tiny_learner(cbs=EarlyStoppingCallback(min_delta=100, patience=2))), 9)
    assert len(learn.recorder.values)==3 and is_channels_last(learn)

def test_save_model_callback_brings_back_the_best(tmp_path):
    learn = fp32(tiny_learner(path=tmp_path, opt_func=fused_adamw, cbs=SaveModelCallback(with_opt=True)))
    fit(learn, 3, 0.5)
    assert is_channels_last(learn) and state_follows(learn.model, learn.opt)
    fit(learn)
    saved = torch.load(tmp_path/'models/model.pth', weights_only=False)['model']
    assert {format_of(t) for t in saved.values() if t.ndim==4}=={'contiguous'}

@pytest.mark.parametrize('fails', [False, True])
def test_less_random_repeats_and_restores(fails):
    def state():
        return (random.getstate(),[str(o) for o in np.random.get_state()],torch.get_rng_state().tolist(),
            torch.backends.cudnn.benchmark,torch.backends.cudnn.deterministic)
    before,drawn = state(),[]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), less_random(7):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
            if fails: 1/0
    assert drawn[0]==drawn[1] and state()==before

# save and load

@pytest.mark.parametrize('opt', [{}, dict(opt_func=fused_adamw)], ids=['fastai', 'fused'])
@pytest.mark.parametrize('one,other', list(product([nothing, fp32], repeat=2)), ids=['c-c', 'c-cl', 'cl-c', 'cl-cl'])
def test_save_and_load_across_formats(one, other, opt, tmp_path):
    def make(f): return f(tiny_double(path=tmp_path, **opt))
    never = fit(fit(make(nothing)))
    fit(make(one)).save('a')
    for already in (False, True):
        learn = make(other)
        if already: fit(learn)
        assert learn.load('a') is learn and (not already or state_follows(learn.model, learn.opt))
        fit(learn)
        assert state_follows(learn.model, learn.opt) and furthest(never.model, learn.model)<1e-9

def test_saved_file_is_contiguous_and_plain(tmp_path):
    learn = fit(fp32(tiny_learner(path=tmp_path, opt_func=fused_adamw)))
    saved = torch.load(learn.save('a'), weights_only=False)
    found = [format_of(t)
        for t in [*saved['model'].values(), *(t for s in saved['opt']['state'].values() for t in s.values())] if t.ndim==4]
    assert len(found)==6 and set(found)=={'contiguous'} and is_channels_last(learn) and state_follows(learn.model, learn.opt)

def test_a_file_of_plain_fastai_loads_at_the_next_fit(tmp_path):
    make = partial(tiny_learner, path=tmp_path, opt_func=fused_adamw)
    fit(make()).save('a')
    learn = fit(fp32(make()))
    saved = torch.load(tmp_path/'models/a.pth', weights_only=False)
    learn.model.load_state_dict(saved['model']); learn.opt.load_state_dict(saved['opt'])
    assert not state_follows(learn.model, learn.opt)
    fit(learn)
    assert state_follows(learn.model, learn.opt)

# export

loader = '''
import importlib.abc, sys, warnings
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]=='fastxtend_cl': raise ImportError('fastxtend_cl is not here')
sys.meta_path.insert(0, Block())
warnings.simplefilter('ignore')
import torch
from fastai.learner import load_learner
from helpers import random_images
learn = load_learner('export.pkl')
dl = learn.dls.test_dl([(x,) for x in random_images()])
with learn.no_bar(): preds = learn.get_preds(dl=dl)[0]
models = [learn.model, *(cb.averaged for cb in learn.cbs if hasattr(cb, 'averaged'))]
formats = {(p.is_contiguous(), p.stride()==torch.empty(p.shape).stride()) for m in models for p in (*m.parameters(), *m.buffers())}
torch.save(dict(preds=preds, formats=formats, models=len(models),
    tfms=[type(f).__name__ for f in learn.dls.after_batch.fs], cbs=[type(cb).__name__ for cb in learn.cbs]), 'found.pth')
'''

def load_elsewhere(folder):
    "What a process without this package finds in an export"
    env = {**os.environ, 'PYTHONPATH': str(root/'tests'), 'OMP_NUM_THREADS': '1'}
    res = run_python('-c', loader, cwd=folder, env=env)
    assert res.returncode==0, res.stderr
    return torch.load(folder/'found.pth')

def preds_of(learn):
    with quiet(learn): return learn.get_preds(dl=learn.dls.test_dl([(x,) for x in random_images()]))[0]

@pytest.mark.parametrize('name,kwargs,amp,tfms',
    [('plain', {}, False, []), ('averaged', dict(cbs=AveragedCopy), False, []), ('tfm', {}, False, [ChannelsLastTfm]),
    ('all', dict(cbs=AveragedCopy, opt_func=fused_adamw), 'bf16', [ChannelsLastTfm])], ids=lambda o: o if isinstance(o, str) else '')
def test_export_loads_without_this_package(name, kwargs, amp, tfms, tmp_path):
    learn = fit(tiny_learner(tensor_dls(after_batch=[f() for f in tfms]), path=tmp_path, **kwargs).to_channelslast(amp_mode=amp))
    preds = preds_of(learn)
    learn.export()
    found = load_elsewhere(tmp_path)
    torch.testing.assert_close(found['preds'], preds, rtol=1e-4, atol=1e-4 if not amp else 1e-2)
    assert found['formats']=={(True, True)} and found['models']==(2 if 'cbs' in kwargs else 1)
    assert ('ChannelsLastTfm' not in found['tfms']
        and not {'ChannelsLast', 'ChannelsLastCallback', 'DeviceMixedPrecision'} & set(found['cbs']))
    assert b'fastxtend_cl' not in b''.join(f.read_bytes() for f in tmp_path.glob('export.pkl'))

def test_the_loader_would_notice_this_package(tmp_path):
    torch.save(ChannelsLastCallback(), tmp_path/'export.pkl')
    with pytest.raises(AssertionError, match="UnboundLocalError: .*'res'"): load_elsewhere(tmp_path) # what fastai makes of an ImportError

def strides_in(file, monkeypatch):
    "Formats of all tensors that a pickled file brings, wherever they hang"
    seen,rebuild = [],torch._utils._rebuild_tensor_v2
    def note(storage, offset, size, stride, *args):
        seen.append(torch.empty_strided(size, stride, device='meta'))
        return rebuild(storage, offset, size, stride, *args)
    with monkeypatch.context() as m, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m.setattr(torch._utils, '_rebuild_tensor_v2', note)
        load_learner(file)
    return {format_of(t) for t in seen} - {None}

def test_export_of_averaged_tensors_in_a_list_is_contiguous(tmp_path, monkeypatch):
    class Shadow(Callback):
        def after_fit(self): self.shadow = dict(params=[p.detach().clone() for p in self.model.parameters()])
    learn = fit(fp32(tiny_learner(path=tmp_path, cbs=Shadow)))
    learn.export()
    assert strides_in(tmp_path/'export.pkl', monkeypatch)=={'contiguous'}
    assert format_of(learn.shadow.shadow['params'][0])=='channels_last'

def test_export_of_a_unet_that_keeps_activations_is_contiguous(pictures, tmp_path, monkeypatch):
    learn = fit(tiny_unet(pictures, tmp_path).to_channelslast(use_amp=False))
    learn.export()
    assert 'channels_last' not in strides_in(tmp_path/'export.pkl', monkeypatch)

def state_of(learn):
    "All that an export must leave"
    return [id(learn.dls), id(learn.opt), [id(cb) for cb in learn.cbs], [vars(cb).keys() for cb in learn.cbs],
        learn.channels_last, getattr(learn, 'mixed_precision', None),
        [[type(f) for f in dl.after_batch.fs] for dl in learn.dls], [cb.learn is learn for cb in learn.cbs]]

@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_a_failed_export_leaves_the_learner(error, tmp_path, monkeypatch):
    learn = fit(tiny_learner(tensor_dls(after_batch=[ChannelsLastTfm()]), path=tmp_path, opt_func=fused_adamw,
        cbs=AveragedCopy).to_channelslast(amp_mode='bf16'))
    before,tensors,averaged = state_of(learn),snapshot(learn.model, learn.opt),snapshot(learn.averaged_copy.averaged)
    def fail(*args, **kwargs): raise error('planted')
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', fail)
        with pytest.raises(error, match='planted'): learn.export()
    assert state_of(learn)==before
    assert_same_snapshot(tensors, snapshot(learn.model, learn.opt)); assert_same_snapshot(averaged, snapshot(learn.averaged_copy.averaged))
    fit(learn)

def test_an_export_that_runs_out_of_memory(tmp_path, monkeypatch):
    restride,save,calls,on_entry = fmt.restride,torch.save,[],[]
    def failing(at):
        def f(*args):
            calls.append(1)
            if len(calls)==at: raise MemoryError('planted')
            return restride(*args)
        return f
    for k in range(1, 99):
        learn = fit(tiny_learner(path=tmp_path, opt_func=fused_adamw, cbs=AveragedCopy).to_channelslast(use_amp=False))
        before,tensors = state_of(learn),snapshot(learn.model, learn.opt)
        calls.clear(); on_entry.clear()
        with monkeypatch.context() as m:
            m.setattr(fmt, 'restride', failing(k))
            m.setattr(torch, 'save', lambda *args, **kw: (on_entry.append(1), save(*args, **kw)))
            try: learn.export()
            except MemoryError: pass
            else: break
        # otherwise the file is written, and what failed is the way back: the Learner is whole, and the next fit converts it
        if not on_entry:
            assert state_of(learn)==before
            assert_same_snapshot(tensors, snapshot(learn.model, learn.opt))
        assert all(torch.equal(a[2], t) for a,t in zip(tensors, learn.model.parameters()))
        assert is_channels_last(fit(learn)) and state_follows(learn.model, learn.opt)
    assert k>4

@pytest.mark.parametrize('opt', [{}, dict(opt_func=fused_adamw)], ids=['fastai', 'fused'])
def test_training_goes_on_after_an_export(opt, tmp_path):
    def train(export):
        learn = fit(fp32(tiny_double(path=tmp_path, **opt)))
        if export: learn.export()
        assert is_channels_last(learn) and state_follows(learn.model, learn.opt)
        return fit(learn)
    assert furthest(train(False).model, train(True).model)<1e-12

def test_vision_export_predicts_the_same(vision, tmp_path):
    vision.fit(1, 1e-3)
    item = vision.dls.valid_ds[0][0]
    expected = vision.predict(item)
    vision.export()
    served = load_learner(tmp_path/'export.pkl')
    with quiet(served): found = served.predict(item)
    assert found[0]==expected[0] and torch.allclose(found[2], expected[2], atol=1e-4)

# Copies

@pytest.mark.parametrize('copied', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('amp', [False, 'bf16'])
def test_copies_of_a_learner_train_on_and_apart(copied, amp):
    learn = fit(tiny_learner(opt_func=fused_adamw).to_channelslast(amp_mode=amp))
    other = copied(learn)
    before = snapshot(learn.model, learn.opt)
    fit(other, 2)
    assert is_channels_last(other) and state_follows(other.model, other.opt)
    assert_same_snapshot(before, snapshot(learn.model, learn.opt))
    assert (other.to_channelslast(use_amp=False) is other and not hasattr(other, 'mixed_precision')
        and hasattr(learn, 'mixed_precision')==bool(amp))
    assert other.to_contiguous() is other and is_contiguous(other) and is_channels_last(learn)

# torch.compile

def test_compiled_model():
    learn = fp32(tiny_learner(opt_func=fused_adamw))
    learn.model.compile(backend='aot_eager')
    fit(learn, 2)
    assert is_channels_last(learn) and state_follows(learn.model, learn.opt)
    assert is_contiguous(fit(learn.to_contiguous()))

def test_model_compiled_between_fits_trains_the_same():
    def train(compile):
        learn = fit(fp32(tiny_double()))
        if compile: learn.model.compile(backend='aot_eager')
        return fit(learn)
    assert furthest(train(False).model, train(True).model)<1e-9

def test_compiled_by_inductor():
    learn = fp32(tiny_learner())
    learn.model.compile()
    fit(learn)
    assert is_channels_last(learn) and preds_of(learn).isfinite().all()

def test_wrapped_by_torch_compile():
    learn = fp32(tiny_learner(model=torch.compile(tiny_cnn(), backend='aot_eager')))
    assert is_channels_last(fit(learn))

# A Learner that does not use this package

patched = 'one_batch','fit','save','load','export'

def fastais(name):
    "fastai's own method behind ours"
    return getattr(Learner, name)._wrapped

def test_all_wrapped_methods_are_known():
    assert {n for n in vars(Learner) if hasattr(getattr(Learner, n), '_wrapped')}==set(patched)
    assert all(fastais(n).__module__=='fastai.learner' for n in patched)

@pytest.mark.parametrize('name', patched)
def test_signatures_are_fastais(name): assert inspect.signature(getattr(Learner, name))==inspect.signature(fastais(name))

def test_our_own_methods_begin_as_fastais():
    code = ('import inspect; from fastai.vision.all import *; '
        'print([*inspect.signature(Learner.to_channelslast).parameters], [*inspect.signature(Learner.to_contiguous).parameters])')
    res = run_python('-W', 'ignore', '-c', code)
    assert res.returncode==0, res.stderr
    theirs,back = map(ast.literal_eval, re.findall(r'\[.*?\]', res.stdout))
    ours = [*inspect.signature(Learner.to_channelslast).parameters]
    assert ours[:3]==theirs[:3] and set(theirs)-set(ours)<={'device'} and [*inspect.signature(Learner.to_contiguous).parameters]==back

class Plain:
    "fastai's own methods in place of ours"
    def __init__(self, monkeypatch):
        for n in patched: monkeypatch.setattr(Learner, n, fastais(n))

calls = [('fit', (1, 1e-3, None, None, True), {}), ('fit', (1, 1e-3, 0.1, [AveragedCopy()], False, 1), {}), ('fit', (2,), dict(start_epoch=1)),
    ('fit', (), {}), ('fit', (1, 1e-3, None, None, True, 0, 7), {}), ('fit', (1,), dict(epochs=3)), ('save', ('a',), {}), ('save', ('a',), dict(with_opt=False, pickle_protocol=4)),
    ('save', ('a', True, 2), {}), ('save', ('a',), dict(with_optt=False)), ('load', ('kept',), {}), ('load', ('kept', 'cpu'), {}), ('load', ('kept', None), dict(strict=False)),
    ('load', ('kept', 'cpu', True), {}), ('export', (), {}), ('export', ('z.pkl',), {}), ('export', ('z.pkl', cloudpickle, 2), {}), ('export', ('z.pkl', pickle), {}),
    ('export', ('z.pkl',), dict(pickle_protocol=4)), ('export', ('z.pkl', cloudpickle, 2, 3), {}), ('export', (), dict(protocol=4))]

@pytest.mark.parametrize('name,args,kwargs', calls, ids=[f'{n}{a}{k}'.replace(str(root), '') for n,a,k in calls])
@pytest.mark.parametrize('to', [nothing, fp32])
def test_calls_of_fastais_methods(to, name, args, kwargs, tmp_path, monkeypatch):
    "By position and by name: with ours as with fastai's own, also where that raises"
    def outcome(learn):
        with quiet(learn):
            learn.fit(1); learn.save('kept')
            try: getattr(learn, name)(*args, **kwargs)
            except TypeError as e: return re.sub(r'^(Learner\.)?(\w+\.)?', '', str(e)).split(' ', 1)[1]
        files = {f.name for f in tmp_path.rglob('*') if f.is_file()}
        return files,furthest(learn.model, tiny_learner().model),len(learn.recorder.values)
    ours = outcome(to(tiny_learner(path=tmp_path)))
    with monkeypatch.context() as m:
        Plain(m)
        theirs = outcome(tiny_learner(path=tmp_path))
    if isinstance(theirs, str) or isinstance(ours, str): assert ours==theirs
    else: assert ours[::2]==theirs[::2] and ours[1]==pytest.approx(theirs[1], rel=1e-3)

def test_a_learner_that_does_not_use_this_package_trains_bit_for_bit_the_same(monkeypatch):
    ours = fit(tiny_learner(cbs=[SeeBatch, AveragedCopy]), 2)
    with monkeypatch.context() as m:
        Plain(m)
        theirs = fit(tiny_learner(cbs=[SeeBatch, AveragedCopy]), 2)
    assert furthest(ours.model, theirs.model)==0 and ours.recorder.losses[-1]==theirs.recorder.losses[-1]
    assert [type(cb) for cb in ours.cbs]==[type(cb) for cb in theirs.cbs] and kernels_mode(ours) is None
    assert is_contiguous(ours) and ours.see_batch.x=={'nchw'}

def test_names_of_version_0_1_are_where_they_were():
    got = {}
    exec('from fastxtend_cl.channelslast import *', got)
    from fastxtend_cl import callbacks, channelslast, kernels
    for n,module in dict(ChannelsLastCallback=callbacks, ChannelsLastTfm=callbacks, less_random=kernels).items():
        assert got[n] is getattr(channelslast, n) is getattr(module, n)

class Stateless:
    "An optimizer that keeps what it knows in its own way"
    def __init__(self, params, lr=None, state=None, **kwargs):
        self.param_lists = [list(params)]
        self.hypers,self.state,self.lr = [dict(lr=lr)],state,lr
    def set_hypers(self, **kwargs): self.hypers[0].update(kwargs); self.lr = self.hypers[0]['lr']
    def freeze_to(self, n): pass
    def clear_state(self): pass
    def all_params(self, n=slice(None), with_grad=False): return [(p,None,{},{}) for p in self.param_lists[0]]
    def state_dict(self): return dict(lr=self.lr)
    def load_state_dict(self, sd): self.lr = sd['lr']
    def zero_grad(self):
        for p in self.param_lists[0]: p.grad = None
    @torch.no_grad()
    def step(self):
        for p in self.param_lists[0]:
            if p.grad is not None: p -= self.lr*p.grad

@pytest.mark.parametrize('state', [None, [], [torch.zeros(3)], 3, 'no attribute'], ids=str)
def test_load_with_an_optimizer_that_has_no_mapping(state, tmp_path):
    def make():
        learn = tiny_learner(path=tmp_path, opt_func=partial(Stateless, state=state), wd_bn_bias=True, train_bn=False)
        learn.create_opt()
        if state=='no attribute': del learn.opt.state
        return learn
    learn = fit(make(), 2)
    learn.save('a'); learn.export()
    other = make()
    assert other.load('a') is other and furthest(other.model, learn.model)==0
    fit(other)

def test_fastais_channels_last_is_not_ours(tmp_path, monkeypatch):
    "What a Learner with fastai's own callback writes is as without this package"
    learn = fit(tiny_learner(path=tmp_path, cbs=ChannelsLast))
    assert {format_of(t) for t in torch.load(learn.save('a', with_opt=False)).values() if t.ndim==4}=={'channels_last'}
    learn.export()
    assert 'channels_last' in strides_in(tmp_path/'export.pkl', monkeypatch)

# Data without fastai's loaders

def torch_dl(cls=torch.Tensor, n=8):
    items = [(cls(x), y%2) for x,y in zip(torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)), range(n))]
    return torch.utils.data.DataLoader(items, batch_size=4)

class OwnDls:
    "Loaders of one's own class"
    def __init__(self, train, valid): self.train,self.valid = train,valid
    def __getitem__(self, i): return (self.train, self.valid)[i]

class OwnDlsOnDevice(OwnDls): device = str(device)

def plain_dls(kind):
    dl = torch_dl(TensorImage if kind=='images' else torch.Tensor)
    if kind=='batches': return DataLoaders(list(dl), list(dl))
    if kind=='tuples': return DataLoaders([(x,y) for x,y in dl], [(x,y) for x,y in dl])
    if kind in ('own', 'own on a device'): return (OwnDls if kind=='own' else OwnDlsOnDevice)(dl, dl)
    return DataLoaders(dl, dl)

plain_kinds = 'torch','images','batches','tuples','own','own on a device'
ways = {'default': lambda l: l.to_channelslast(), 'fp32': fp32, 'bf16': lambda l: l.to_channelslast(amp_mode='bf16'),
    'memory': lambda l: l.to_channelslast(keep_memory=False), 'auto': lambda l: l.to_channelslast(plan='auto'), 'plan': lambda l: l.to_channelslast(plan=low_plan),
    'contiguous plan': lambda l: l.to_channelslast(plan=FormatPlan('contiguous bf16', 'contiguous', 'bf16')),
    'amp': lambda l: l.add_cb(DeviceMixedPrecision('bf16')),
    'native amp': lambda l: l.add_cb(DeviceMixedPrecision()), 'nothing': nothing}
low_plan = FormatPlan('channels last bf16', 'channels_last', 'bf16')

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('way', ways)
@pytest.mark.parametrize('kind', plain_kinds)
def test_plain_loaders(kind, way):
    torch.manual_seed(0)
    learn = Learner(plain_dls(kind), tiny_cnn().to(device), loss_func=nn.functional.cross_entropy, cbs=SeeBatch)
    assert ways[way](learn) is learn
    fit(learn, 2)
    with quiet(learn): learn.validate()
    converted = way not in ('contiguous plan', 'auto', 'amp', 'native amp', 'nothing')
    assert (is_channels_last if converted else is_contiguous)(learn)
    assert learn.see_batch.x=={'nhwc' if converted and kind=='images' else 'nchw'}
    assert np.isfinite(learn.recorder.values[-1]).all()
    assert is_contiguous(learn.to_contiguous(to_fp32=True)) and not learn._grab_cbs((ChannelsLast, MixedPrecision))
    fit(learn)

# Bad input

@pytest.mark.parametrize('dls', [lambda: None, DataLoaders], ids=['None', 'DataLoaders'])
def test_learner_without_data(dls):
    learn = Learner(dls(), tiny_cnn(), loss_func=CrossEntropyLossFlat())
    assert learn.to_channelslast() is learn and isinstance(learn.channels_last, ChannelsLastCallback)
    learn.dls = tensor_dls()
    assert is_channels_last(fit(learn)) and is_contiguous(learn.to_contiguous(to_fp32=True))

def test_model_on_meta_is_said_once():
    learn = Learner(None, tiny_cnn().to('meta'), loss_func=CrossEntropyLossFlat())
    with caught_warnings() as caught: assert learn.to_channelslast(use_amp=False).to_channelslast(use_amp=False) is learn
    assert len(caught)==1 and 'on the meta device' in str(caught[0].message)
    learn.model.to_empty(device=device).apply(lambda m: getattr(m, 'reset_parameters', lambda: None)())
    learn.dls = tensor_dls()
    assert is_channels_last(fit(learn))

def tabular(cbs=None):
    df = pd.DataFrame(dict(a=np.arange(32.)%7, b=list('xy')*16, c=list('pq')*16))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['b'], cont_names=['a'], y_names='c',
        y_block=CategoryBlock(), bs=8, num_workers=0, device=device)
    return tabular_learner(dls, layers=[8], cbs=cbs)

def text(cbs=None):
    tokens = [TensorText(t) for t in torch.randint(0, 20, (16, 12))]
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(96, 2))
    return tiny_learner(dls_of(tokens, labels()), model, cbs=cbs)

@pytest.mark.parametrize('make', [tabular, text])
@pytest.mark.parametrize('by_callback', [False, True])
def test_other_data_is_said_once_and_trains(make, by_callback):
    with caught_warnings() as caught:
        learn = make(ChannelsLastCallback) if by_callback else make().to_channelslast(use_amp=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(2); learn.validate(); learn.fit(1)
        if not by_callback: learn.to_channelslast(use_amp=False)
    assert ([str(w.message) for w in of_class(caught, FormatWarning)]
        ==[f'channels last has no effect: {type(learn.model).__name__} has no convolution of two or three dimensions'])
    assert of_class(caught, NoConvolutionWarning) and np.isfinite(learn.recorder.values[-1]).all()

def autocasts(): return torch.is_autocast_enabled('cpu'),torch.is_autocast_enabled('cuda')

class FailOnce(nn.Module):
    def __init__(self, error): super().__init__(); self.error = error
    def forward(self, x):
        error,self.error = self.error,None
        if error: raise error('planted')
        return x

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('which', ['fit', 'validate', 'lr_find'])
def test_an_error_inside_leaves_no_autocast_and_a_usable_learner(error, which, tmp_path):
    learn = tiny_learner(model=tiny_cnn().append(FailOnce(error)), path=tmp_path).to_channelslast(amp_mode='bf16')
    with quiet(learn), pytest.raises(error, match='planted'): getattr(learn, which)(*[1][:which=='fit'])
    assert autocasts()==(False, False)
    assert is_channels_last(fit(learn)) and autocasts()==(False, False) and preds_of(learn).isfinite().all()
    assert is_contiguous(learn.to_contiguous(to_fp32=True)) and is_contiguous(fit(learn))

# to_channelslast as a table of states

def with_amp(name):
    "A Learner in one of the states that `to_channelslast` may find"
    learn = tiny_learner()
    if name=='fp16': learn.to_fp16(growth_interval=9)
    if name=='bf16': learn.to_bf16()
    if name=='device': learn.add_cb(DeviceMixedPrecision('bf16'))
    if name=='channels_last': learn.add_cb(ChannelsLast())
    if name=='both': learn.add_cbs([ChannelsLast(), MixedPrecision('bf16')])
    return learn

arguments = [{}, dict(use_amp=False), dict(amp_mode=False), dict(amp_mode='bf16'), dict(amp_mode=AMPMode.FP16),
    dict(to_fp16=True), dict(to_fp16=False),
    dict(growth_interval=5), dict(amp_mode='fp16', init_scale=8., enabled=False)]

def state(learn):
    amp = learn._grab_cbs(MixedPrecision)
    assert len(amp)<=1 and (getattr(learn, 'mixed_precision', None) is (amp[0] if amp else None))
    assert [type(cb) for cb in learn._grab_cbs(ChannelsLast)]==[ChannelsLastCallback] and learn.channels_last in learn.cbs
    assert all(cb.learn is learn for cb in learn.cbs)
    return [(type(cb), cb.amp_mode, cb.kwargs) for cb in amp],sorted(type(cb).__name__ for cb in learn.cbs)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('initial', ['nothing', 'fp16', 'bf16', 'device', 'channels_last', 'both'])
def test_calls_end_where_the_last_one_alone_would(initial):
    alone = [state(with_amp(initial).to_channelslast(**kw)) for kw in arguments]
    for n in (2, 3):
        for calls in product(range(len(arguments)), repeat=n):
            learn = with_amp(initial)
            for i in calls: assert learn.to_channelslast(**arguments[i]) is learn
            assert state(learn)==alone[calls[-1]], [arguments[i] for i in calls]

@pytest.mark.filterwarnings('ignore')
def test_the_table_itself():
    def amp(initial, **kw): return state(with_amp(initial).to_channelslast(**kw))[0]
    D = DeviceMixedPrecision
    assert amp('nothing')==amp('channels_last')==amp('nothing', to_fp16=True)==[(D, None, {})]
    assert amp('nothing', use_amp=False)==amp('bf16', use_amp=False)==amp('device', amp_mode=False)==amp('fp16', to_fp16=False)==[]
    assert amp('bf16')==[(MixedPrecision, AMPMode.BF16, {})] and amp('device')==[(D, AMPMode.BF16, {})]
    assert amp('fp16', amp_mode='bf16')==[(D, AMPMode.BF16, dict(growth_interval=9))]
    assert amp('fp16', init_scale=8.)==[(D, AMPMode.FP16, dict(growth_interval=9, init_scale=8.))]
    assert amp('nothing', amp_mode='fp16', enabled=False)==[(D, AMPMode.FP16, dict(enabled=False))]

def amp_of(learn): return [cb.amp_mode for cb in learn._grab_cbs(MixedPrecision)]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('initial', ['bf16', 'fp16', 'device'])
def test_the_users_own_callback_comes_back(initial):
    learn = with_amp(initial)
    own = learn.mixed_precision
    assert learn.to_channelslast().mixed_precision is own
    assert learn.to_channelslast(amp_mode='fp16', init_scale=8.).mixed_precision is not own
    assert learn.to_channelslast(use_amp=False).to_channelslast().mixed_precision is own

@pytest.mark.filterwarnings('ignore')
def test_what_the_user_does_between_calls_is_theirs():
    assert amp_of(tiny_learner().to_channelslast(amp_mode='bf16').to_fp32().to_channelslast())==[None]
    learn = tiny_learner().to_channelslast(amp_mode='fp16').to_fp32().to_bf16()
    bf16 = learn.mixed_precision
    assert learn.to_channelslast().mixed_precision is bf16 and learn._grab_cbs(MixedPrecision)==[bf16]

@pytest.mark.filterwarnings('ignore')
def test_to_bf16_added_to_ours_is_what_the_user_said_last():
    learn = tiny_learner().to_channelslast(amp_mode='fp16').to_bf16().to_channelslast()
    assert amp_of(learn)==[AMPMode.BF16] and learn.mixed_precision is learn._grab_cbs(MixedPrecision)[0]

@pytest.mark.filterwarnings('ignore')
def test_fastais_callback_added_to_ours_leaves_one():
    learn = fp32(tiny_learner()).add_cb(ChannelsLast())
    fp32(learn)
    assert ([type(cb) for cb in learn._grab_cbs(ChannelsLast)]==[ChannelsLastCallback]
        and learn.channels_last is learn._grab_cbs(ChannelsLast)[0])

def test_the_learner_is_returned():
    learn = tiny_learner()
    assert learn.to_contiguous() is learn and learn.to_contiguous(to_fp32=True) is learn
    assert fp32(learn) is learn and fp32(learn) is learn and learn.to_contiguous().to_contiguous() is learn

def test_to_contiguous_takes_away_what_is_asked():
    learn = fit(tiny_learner(opt_func=fused_adamw).to_channelslast(amp_mode='bf16'))
    learn.to_contiguous()
    assert (is_contiguous(learn) and state_follows(learn.model, learn.opt) and not hasattr(learn, 'channels_last')
        and hasattr(learn, 'mixed_precision'))
    fit(learn)
    assert is_contiguous(learn.to_contiguous(to_fp32=True)) and not hasattr(learn, 'mixed_precision')

def test_to_contiguous_undoes_fastais_own():
    learn = tiny_learner(cbs=ChannelsLast)
    fit(learn)
    assert is_channels_last(learn)
    assert is_contiguous(learn.to_contiguous()) and state_follows(learn.model, learn.opt) and not learn._grab_cbs(ChannelsLast)

def everything(learn):
    return [*learn.cbs, *(copy.copy({k:v for k,v in vars(cb).items() if k!='learn'}) for cb in learn.cbs),
        sorted(k for k in vars(learn)), [cb.learn for cb in learn.cbs]]

wrong = [(dict(growth=2), TypeError, r"^unknown argument 'growth'; did you mean 'growth_factor'\?$"),
    (dict(ampmode='bf16'), TypeError, r"^unknown argument 'ampmode'; did you mean 'amp_mode'\?$"),
    (dict(keep_memry=True), TypeError, r"^unknown argument 'keep_memry'; did you mean 'keep_memory'\?$"),
    (dict(device='cpu'), TypeError, "^unknown argument 'device'; choose from use_amp, amp_mode, .*, enabled$"),
    (dict(seconds=10), TypeError, r"^unknown argument 'seconds'; it belongs to `plan_channelslast`: "
        r"`to_channelslast\(plan=learn.plan_channelslast\(seconds=10\)\)`$"),
    (dict(init_scale='big'), TypeError, "arguments of GradScaler must be numbers, got init_scale='big'"),
    (dict(growth_factor=0.5), ValueError, 'The growth factor must be > 1.0'),
    (dict(use_amp=1), TypeError, '^use_amp must be True or False, got 1$'),
    (dict(use_amp=None), TypeError, '^use_amp must be True or False, got None$'),
    (dict(use_amp='bf16'), TypeError, "^use_amp must be True or False, got 'bf16'$"),
    (dict(to_fp16='yes'), TypeError, "^to_fp16 must be True or False, got 'yes'$"),
    (dict(amp_mode='fp8'), ValueError, "^amp_mode must be 'fp16' or 'bf16', got 'fp8'$"),
    (dict(amp_mode=True), ValueError, 'amp_mode must be'),
    (dict(use_amp=False, amp_mode='bf16'), ValueError,
        "^use either amp_mode='bf16' or use_amp=False, not both$"),
    (dict(to_fp16=False, amp_mode='bf16'), ValueError, "^use either amp_mode='bf16' or to_fp16=False, not both$"),
    (dict(to_fp16=True, amp_mode=False), ValueError, '^use either to_fp16=True or amp_mode=False, not both$')]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs,error,match', wrong, ids=lambda o: str(o) if isinstance(o, dict) else '')
def test_wrong_arguments_change_nothing(kwargs, error, match):
    for initial in ('nothing', 'bf16', 'channels_last'):
        for before_it in (nothing, lambda l: l.to_channelslast(amp_mode='fp16')):
            learn = before_it(with_amp(initial))
            before = everything(learn)
            with pytest.raises(error, match=match): learn.to_channelslast(**kwargs)
            assert everything(learn)==before

def test_impossible_mode_changes_nothing(monkeypatch):
    learn = Learner(None, tiny_cnn().to('meta'), loss_func=CrossEntropyLossFlat())
    before = everything(learn)
    with pytest.raises(ValueError, match='bf16 mixed precision is not available on meta: train in fp32 with `use_amp=False`'):
        learn.to_channelslast(amp_mode='bf16')
    assert everything(learn)==before

def test_non_native_mixed_precision():
    learn = tiny_learner(cbs=NonNativeMixedPrecision)
    with pytest.raises(ValueError, match='call `learn.to_non_native_fp32'): learn.to_channelslast(amp_mode='bf16')
    assert not learn.to_channelslast()._grab_cbs(MixedPrecision) and learn._grab_cbs(NonNativeMixedPrecision)

warned = [('no convolution', text, {}), ('scaler without effect', tiny_learner, dict(amp_mode='bf16', growth_interval=3)),
    ('scaler off', tiny_learner, dict(use_amp=False, growth_interval=3)),
    ('fastai on CPU', lambda: with_amp('bf16'), {}),
    ('meta', lambda: Learner(None, tiny_cnn().to('meta'), loss_func=CrossEntropyLossFlat()), {}),
    ('after ours', lambda: tiny_learner().to_channelslast(amp_mode='fp16'), dict(amp_mode='bf16', growth_interval=3))]

@pytest.mark.skipif(device.type!='cpu', reason='about processors')
@pytest.mark.parametrize('name,make,kwargs', warned, ids=[o[0] for o in warned])
def test_warnings_as_errors_leave_the_learner(name, make, kwargs):
    learn = make()
    before = everything(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(2):
            with pytest.raises(FormatWarning): learn.to_channelslast(**kwargs)
            assert everything(learn)==before

@pytest.mark.parametrize('order', [('fastai.vision.all', 'fastxtend_cl.all'), ('fastxtend_cl.all', 'fastai.vision.all'),
    ('fastai.vision.all', 'fastxtend_cl.all', 'fastai.vision.all'),
    ('fastxtend_cl.channelslast', 'fastai.vision.all', 'fastai.text.all')], ids=' then '.join)
def test_import_order_does_not_matter(order):
    code = '\n'.join(f'from {o} import *' for o in order) + textwrap.dedent('''
        import inspect, fastxtend_cl.channelslast, fastai.callback.all
        from fastai.learner import Learner
        for n in ('to_channelslast', 'to_contiguous', 'save', 'load', 'export', 'one_batch'):
            module = inspect.unwrap(getattr(Learner, n)).__module__
            assert module.startswith('fastxtend_cl.'), (n, module)
        assert ('to_fp16' in inspect.signature(Learner.to_channelslast).parameters
            and 'growth_interval' in inspect.signature(Learner.to_channelslast).parameters)
    ''')
    env = {**os.environ, 'PYTHONPATH': str(root)}
    if order[0].startswith('fastai.'): res = run_python('-W', 'ignore', '-c', code, env=env) # there, fastai is the first as well
    else: res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True, timeout=600)
    assert res.returncode==0, res.stderr
