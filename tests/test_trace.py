"""`trace_formats` and `Learner.trace_channelslast`: planted losses are named with module, phase, kind and line; clean
networks show none; nothing is left behind"""
import dataclasses, inspect, itertools, json, re, time
import pytest, torch, torchvision
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from fastai.vision.all import CrossEntropyLossFlat
from hypothesis import given, settings, strategies as st
from torchvision.models.resnet import BasicBlock
from fastxtend_cl.all import *
from fastxtend_cl import timing, trace as trace_module
from fastxtend_cl.internals import storage_id
from fastxtend_cl.internals import storage_id
from fastxtend_cl.layout import layout_of
from fastxtend_cl.tracer import Tracer
from helpers import device, tiny_cnn, tiny_learner
from test_kernels import every_way, force

def block(i, o, **kw): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **kw), nn.BatchNorm2d(o), nn.ReLU())

def network(*middle, width=8):
    torch.manual_seed(0)
    return nn.Sequential(block(3, width), *middle, block(width, width, stride=2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(width, 4))

def step_of(model, bs=4, size=16, channels=3, loss=F.cross_entropy, y=None, **kw):
    torch.manual_seed(1)
    y = torch.randint(0, 4, (bs,)) if y is None else y
    return TrainingStep(model.to(device), torch.randn(bs, channels, size, size).to(device), y.to(device), loss, **kw)

def trace(model, **kw): return trace_formats(step_of(model, **kw))

def line_of(f, text):
    "File and line in the source of `f` that holds `text`"
    lines,first = inspect.getsourcelines(f)
    return f'{inspect.getsourcefile(f)}:{first+next(i for i,l in enumerate(lines) if text in l)}'

class Copies(nn.Module):
    def forward(self, x):
        return x.contiguous()

class CopiesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        return g.contiguous()

class InBackward(nn.Module):
    def forward(self, x): return CopiesBackward.apply(x)

class CopyingBlock(BasicBlock):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = out.contiguous()
        return self.relu(self.bn2(self.conv2(out)) + x)

def resnet(planted=False):
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    if planted: model.layer2[1] = CopyingBlock(128, 128)
    return model

# clean, planted, and in a custom backward

def test_a_clean_resnet_shows_none():
    res = trace(resnet(), size=64)
    assert res.ok and res and res.rows==[] and res.share==0 and res.bytes==0
    assert str(res).startswith('keeps channels last: no operator on images loses the format') and res.kept['forward']==1 and res.kept['backward']>0.99
    assert ([(r.module, r.phase) for r in res.by_design]
        ==[('avgpool', 'backward')]), "the head's gradient comes back contiguous, and is reported apart"
    assert re.search(r'; the classifier head flattens by design \(<?[\d.]+ % of the step\)$', res.reason)
    assert 'avgpool' in res.table() and 'avgpool' not in repr(res)

def test_a_copy_in_a_resnet_is_named():
    res = trace(resnet(planted=True), size=64)
    assert [(r.module, r.cls, r.op, r.phase, r.kind, r.where) for r in res.rows]==[
        ('layer2.1', 'CopyingBlock', 'contiguous', 'forward', 'explicit', line_of(CopyingBlock.forward, 'out.contiguous()'))]
    r = res.rows[0]
    assert (r.format_in, r.format_out, r.shape, r.dtype, r.code)==('channels_last', 'contiguous', (4, 128, 8, 8),
        'float32', 'out = out.contiguous()')
    assert r.back==['layer2.1.conv2: convolution (forward)', 'layer2.1.conv2: convolution_backward (backward)']
    assert r.bytes==3*4*128*8*8*4, 'the copy, and two conversions back'
    assert str(res).startswith('loses channels last: 1 place takes ') and '`layer2.1`' in str(res) and 'memory_format=torch.channels_last' in r.advice
    assert repr(res)==str(res) and r.where.split('/')[-1] in repr(res)

def test_the_plot_of_a_trace_without_operators_says_so():
    import matplotlib
    matplotlib.use('Agg')
    assert [t.get_text() for t in FormatTrace('nothing to show').plot().texts]==['no operator on images']

@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_a_copy_in_a_custom_backward_is_named(autocast):
    res = trace(network(InBackward()), autocast=autocast)
    assert ([(r.module, r.phase, r.kind, r.where) for r in res.rows]
        ==[('1', 'backward', 'explicit', line_of(CopiesBackward.backward, 'g.contiguous()'))])

# kinds

@torch.library.custom_op('fxcl_test::loses', mutates_args=())
def loses(x:torch.Tensor) -> torch.Tensor: return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)*2
loses.register_autograd(lambda ctx, g: g*2)

class Loses(nn.Module):
    def forward(self, x): return loses(x)

def test_an_operator_with_contiguous_output_is_named():
    res = trace(network(Loses()))
    assert [(r.module, r.op, r.phase, r.kind) for r in res.rows]==[('1', 'loses', 'forward', 'lost')]
    assert res.rows[0].back[0]=='2.0: convolution (forward)'

class AddsNoise(nn.Module):
    def forward(self, x): return x + torch.zeros(x.shape, device=x.device)

def test_a_tensor_made_contiguous_is_hidden():
    res = trace(network(AddsNoise()))
    assert [(r.module, r.op, r.phase, r.format_in, r.back) for r in res.rows]==[('1', 'zeros', 'forward', None, ['1: add (forward)'])]

class Parts(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        a,b = x.chunk(2, dim=1)
        return torch.cat([a, self.conv(b)], 1)

def test_slices_are_named_forward_and_backward():
    rows = {(r.module, r.op, r.phase, r.kind):r for r in trace(network(Parts())).rows}
    assert set(rows)=={('1', 'split', 'forward', 'sliced'), ('1', 'cat', 'backward', 'sliced')}
    assert (rows['1', 'split', 'forward', 'sliced'].where==line_of(Parts.forward, 'chunk')
        and rows['1', 'cat', 'backward', 'sliced'].where==line_of(Parts.forward, 'cat('))

def test_slices_that_are_only_copied_cost_nothing():
    class Swap(nn.Module):
        def forward(self, x): return torch.cat(x.chunk(2, 1)[::-1], 1)
    assert not any(r.phase=='forward' for r in trace(network(Swap())).rows)

def test_what_follows_a_loss_belongs_to_it():
    "A ReLU on contiguous memory begins no loss of its own"
    rows = trace(network(nn.Sequential(Copies(), nn.ReLU(), nn.MaxPool2d(2)))).rows
    assert [(r.module, r.op, r.phase) for r in rows]==[('1.0', 'contiguous', 'forward')] and '2.0: convolution (forward)' in rows[0].back

def test_a_copy_that_is_used_and_never_converted_back_is_named():
    rows = trace(nn.Sequential(block(3, 8), Copies(), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))).rows
    assert ('1', 'contiguous', 'forward') in [(r.module, r.op, r.phase) for r in rows]

def test_a_sampling_grid_does_not_count():
    "It has four dimensions and is contiguous, and the operator works in channels last"
    class Warp(nn.Module):
        def forward(self, x):
            theta = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
            return x + F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    assert not any('grid' in b for r in trace(network(Warp())).rows for b in r.back)

class Attention(nn.Module):
    def forward(self, x):
        t = x.flatten(2)
        o = torch.bmm(t, torch.softmax(torch.bmm(t.transpose(1, 2), t), 1))
        return o.view(x.shape)

def test_attention_in_the_middle_is_a_leak():
    rows = trace(network(Attention())).rows
    assert ('1', 'view', 'forward', 'explicit',
        line_of(Attention.forward, 'o.view')) in [(r.module, r.op, r.phase, r.kind, r.where) for r in rows]

def test_attention_at_the_end_leaves_by_design():
    class Last(Attention):
        def forward(self, x): return super().forward(x).mean((2, 3))
    res = trace(nn.Sequential(block(3, 8), Last(), nn.Linear(8, 4)))
    assert res.rows==[] and res.by_design, res

class Shuffle(nn.Module):
    def forward(self, x):
        n,c,h,w = x.shape
        return x.view(n, 2, c//2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

def test_a_shuffle_is_named_in_both_directions():
    rows = trace(network(Shuffle())).rows
    assert {(r.module, r.op, r.phase) for r in rows}=={('1', 'contiguous', 'forward'), ('1', 'contiguous', 'backward')}
    assert all('shuffle' in r.advice and r.format_in=='other' for r in rows)

def test_in_place_on_a_slice():
    "Its gradient goes through a contiguous copy of autograd's own"
    class Sliced(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(8, 16, 1)
        def forward(self, x): return F.relu(self.conv(x)[:, :8], inplace=True)
    rows = [r for r in trace(network(Sliced())).rows if r.kind=='lost']
    assert [(r.module, r.phase) for r in rows]==[('1', 'backward')] and 'inplace=False' in rows[0].advice

@pytest.mark.parametrize('name', ['cross_entropy', 'fastai', 'rows'])
def test_the_loss_is_named(name):
    "torch's on images leaves channels last, and so does fastai's; what the advice says does not"
    def rows(p, y): return F.cross_entropy(p.permute(0, 2, 3, 1).flatten(0, 2), y.flatten())
    loss = {'cross_entropy': F.cross_entropy, 'fastai': CrossEntropyLossFlat(axis=1), 'rows': rows}[name]
    res = trace(nn.Sequential(block(3, 8), nn.Conv2d(8, 4, 3, padding=1)), loss=loss, y=torch.randint(0, 4, (4, 16, 16)))
    expected = {'cross_entropy': [('loss_func', '_log_softmax', 'forward', 'lost')],
        'fastai': [('loss_func', 'view', 'backward', 'hidden')], 'rows': []}
    assert [(r.module, r.op, r.phase, r.kind) for r in res.rows]==expected[name]
    assert all('permute(0, 2, 3, 1)' in r.advice for r in res.rows)

# what does not count

class NormLast(nn.LayerNorm):
    def forward(self, x): return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

@pytest.mark.skipif(device.type!='cpu', reason='says what kernels of the CPU keep')
@pytest.mark.parametrize('middle',
    [lambda: NormLast(8), lambda: nn.Dropout2d(0.3), lambda: nn.MaxPool2d(2), lambda: nn.Upsample(scale_factor=2),
        lambda: nn.GELU(),
    lambda: nn.AvgPool2d(2), lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), lambda: nn.ConvTranspose2d(8, 8, 2, 2),
    lambda: nn.GroupNorm(2, 8), lambda: nn.ReflectionPad2d(1)])
def test_layers_that_keep_it(middle):
    res = trace(network(middle()))
    assert res.rows==[], str(res)

@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.sampled_from([1, 2, 8]), st.sampled_from([(1, 1), (1, 6), (6, 1), (4, 4)]), st.booleans())
def test_sizes_of_one_lose_nothing(bs, c, hw, bias):
    "Whatever is ambiguous is not counted, also through a copy"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, c, 1, bias=bias), Copies() if c==1 or hw==(1, 1) else nn.Identity(),
        nn.Conv2d(c, 4, 1), nn.Flatten(), nn.Linear(4*hw[0]*hw[1], 4))
    res = trace_formats(TrainingStep(model.to(device), torch.randn(bs, 3, *hw, device=device),
        torch.randint(0, 4, (bs,), device=device), F.cross_entropy))
    assert res.rows==[], str(res)

@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(['clean', 'copy', 'backward', 'shuffle']), min_size=1, max_size=4))
def test_exactly_what_is_planted_is_found(plan):
    kinds = {'clean': nn.Identity, 'copy': Copies, 'backward': InBackward, 'shuffle': Shuffle}
    res = trace(network(*[nn.Sequential(kinds[k](), block(8, 8)) for k in plan]))
    expected = {(f'{i+1}.0', p) for i,k in enumerate(plan)
        for p in {'clean': (), 'copy': ('forward',), 'backward': ('backward',), 'shuffle': ('forward', 'backward')}[k]}
    assert {(r.module, r.phase) for r in res.rows}==expected, str(res)

def test_volumes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), Copies(), nn.Conv3d(4, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 4))
    res = trace_formats(TrainingStep(model.to(device), torch.randn(2, 1, 8, 8, 8, device=device),
        torch.randint(0, 4, (2,), device=device), F.cross_entropy))
    assert [(r.module, r.shape) for r in res.rows]==[('1', (2, 4, 6, 6, 6))]

def test_layout_of():
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    assert [layout_of(o) for o in (x, x[:, :3], x[:, :, ::2], x[:, :, 1:3, 1:3], x.contiguous()[:, :3],
        x.contiguous()[..., :2], x[:, ::2], x.mT, x[0], x[:, :1])]==[
        'channels_last', 'sliced', 'sliced', 'sliced', 'contiguous', 'contiguous', 'other', 'other', None, 'contiguous']

# bookkeeping

def test_checkpointed_modules_are_named():
    class Saved(nn.Module):
        def __init__(self): super().__init__(); self.inner = nn.Sequential(block(8, 8), Copies(), block(8, 8))
        def forward(self, x): return checkpoint(self.inner, x, use_reentrant=False)
    rows = trace(network(Saved())).rows
    assert rows and {r.module for r in rows}=={'1.inner.1'}

def test_tied_and_unregistered_modules():
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.hidden = [Copies()]
        def forward(self, x): return self.hidden[0](x)
    assert [r.module for r in trace(network(Own())).rows]==['1.<Copies>']

def test_the_step_is_not_changed_by_the_trace():
    "The same loss and gradients, bit for bit, with and without the dispatch mode"
    step = step_of(network(Parts(), nn.Dropout(0.5), Shuffle()))
    def run(traced):
        with step.preserved():
            step.convert('channels_last'); torch.manual_seed(3)
            if not traced: return step.run()
            with Tracer(step): return step.run()
    a,b = run(False),run(True)
    assert torch.equal(a.loss, b.loss) and a.grads.keys()==b.grads.keys() and all(torch.equal(g, b.grads[n]) for n,g in a.grads.items())

def test_hooks_are_removed():
    step = step_of(network())
    def count(): return [len(getattr(nn.modules.module, n)) for n in ('_global_forward_hooks','_global_forward_pre_hooks')]
    before = count()
    with Tracer(step): assert count()!=before
    assert count()==before

def state(step):
    ps = [(n,p.detach().clone(),p.stride(),id(p),p.grad) for n,p in step.model.named_parameters()]
    hooks = [len(m._forward_hooks)+len(m._forward_pre_hooks) for m in step.model.modules()]
    every = [len(getattr(nn.modules.module, n)) for n in ('_global_forward_hooks','_global_forward_pre_hooks')]
    opt = step.optimizer.state_dict()['state'] if step.optimizer else {}
    return (ps,[b.clone() for b in step.model.buffers()],torch.get_rng_state(),hooks,every,
        [m.training for m in step.model.modules()],
        {k:{n:(t.clone(),t.stride()) if t.ndim else t.clone() for n,t in v.items()} for k,v in opt.items()})

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    return a==b

class Breaks(nn.Module):
    def __init__(self, error, calls): super().__init__(); self.error,self.calls = error,calls
    def forward(self, x):
        self.calls.append(1)
        if len(self.calls)==4: raise self.error
        return x

@pytest.mark.parametrize('error', [None, RuntimeError('stop'), KeyboardInterrupt()])
def test_nothing_is_left(error):
    "Also when the traced run, the fourth, breaks off"
    step = step_of(network(Parts(), nn.Dropout(0.5), *([Breaks(error, [])] if error else [])))
    step.optimizer = torch.optim.AdamW(step.model.parameters(), lr=0.1)
    step.run(); step.model.eval()
    before = state(step)
    if error is None: trace_formats(step)
    else:
        with pytest.raises(type(error)): trace_formats(step)
    assert same(before, state(step))

def test_learner():
    learn = tiny_learner(model=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Copies(), *list(tiny_cnn())[3:]))
    rng = torch.get_rng_state()
    res = learn.trace_channelslast()
    assert [r.module for r in res.rows]==['1'] and learn.opt is None and torch.equal(rng, torch.get_rng_state())
    assert all(p.is_contiguous() for p in learn.model.parameters()) and res.conditions['shape']==[4, 3, 8, 8]

def test_compiled_models_are_traced_in_eager_mode():
    def backend(*args): raise AssertionError('compiled')
    model = torch.compile(network(Copies()), backend=backend)
    res = trace(model)
    assert [r.module for r in res.rows]==['1'] and 'a compiled model, traced in eager mode' in str(res)
    assert not trace(network()).conditions['compiled']

# cost

def test_costs_are_what_was_measured(monkeypatch):
    "With a clock that charges one second a copy: each conversion counts once for each time that it happens"
    monkeypatch.setattr(trace_module, '_cost_seconds', lambda cost, clock: 10. if cost.replay else 1.)
    monkeypatch.setattr(trace_module, '_step_seconds', lambda *args: 100.)
    res = trace(network(Copies(), nn.Conv2d(8, 8, 1)))
    assert [r.seconds for r in res.rows]==[3.] and res.share==res.rows[0].share==0.03 and res.conditions['estimated']==0
    res = trace(network(Copies()))
    assert [r.seconds for r in res.rows]==[3.], 'the convolution converts inside, twice'
    res = trace(network(AddsNoise()))
    assert [r.seconds for r in res.rows]==[10.], 'an addition of two formats is run again'
    class Twice(nn.Module):
        def forward(self, x): return torch.addcmul(x, torch.ones(x.shape, device=x.device), torch.zeros(x.shape, device=x.device))
    assert sum(r.seconds for r in trace(network(Twice())).rows if r.phase=='forward')==10, 'once, whoever is to blame'

def test_rows_are_sorted_by_cost_and_groups_too():
    res = trace(network(Copies(), block(8, 8), Shuffle(), block(8, 8), Parts()))
    assert [r.seconds for r in res.rows]==sorted((r.seconds for r in res.rows), reverse=True) and len(res.rows)>=5

def test_a_short_time_estimates(monkeypatch):
    model,calls,run = network(Copies(), nn.Conv2d(8, 16, 3), Copies(), nn.Conv2d(16, 8, 3)),[],TrainingStep.run
    monkeypatch.setattr(TrainingStep, 'run', lambda self, **kw: calls.append(1) or run(self, **kw))
    res = trace_formats(step_of(model), seconds=1e-9)
    n = res.conditions['estimated']
    assert n>0 and all(r.seconds>0 for r in res.rows) and len(calls)==2, 'a step, and the traced one'
    assert f'{n} conversions estimated from the others, for lack of time: try seconds={res.conditions["enough"]}' in str(res)
    res = trace_formats(step_of(model), seconds=60)
    assert res.conditions['estimated']==0 and 'estimated' not in str(res) and len(calls)==6

@pytest.mark.parametrize('bar', [True, False])
def test_a_progress_bar_after_two_seconds(bar, monkeypatch):
    shown = []
    class Bar:
        def __init__(self, gen, leave): pass
        def update(self, n): shown.append(n)
    monkeypatch.setattr(timing, 'progress_bar', Bar)
    trace_formats(step_of(network(Copies())), bar=bar)
    assert not shown, 'it was fast'
    monkeypatch.setattr(time, 'perf_counter', itertools.count(0., 0.5).__next__) # each look at the clock half a second later
    trace_formats(step_of(network(Copies())), bar=bar)
    assert bool(shown)==bar and shown==sorted(shown) and (not bar or shown[-1]==100)

# the result

def test_result():
    res = trace(network(Copies(), Parts()))
    d = json.loads(json.dumps(res.to_dict()))
    assert (d['ok'] is False and d['verdict']=='loses channels last' and len(d['rows'])==len(res.rows)
        and d['rows'][0].keys()>={'module','op','phase','kind','bytes','seconds','where','advice'})
    md,text = res._repr_markdown_(),repr(res)
    assert md.startswith('**loses channels last**: 2 places take ') and md.count('\n|')==len(res.rows)+2, 'a row each, below two of the head'
    assert text.splitlines()[1].split()==['place','operator','phase','kind','MB','of','the','step']
    for kind in ('explicit', 'sliced'): assert f'`{kind}`: {trace_module.trace_kinds[kind]}' in text and kind in md
    for r in res.rows: assert r.where in res.table() and r.advice in res.table() and r.advice in text and r.advice in md

def result_of(rows):
    return FormatTrace('a reason', rows, conditions=dict(device_name='cpu', torch='', threads=1, shape=[1], precision='fp32', compiled=False))

def test_file_and_line_are_never_cut():
    row = trace(network(Copies())).rows[0]
    name = '.'.join(['a_module_with_a_long_name']*8)
    res = result_of([dataclasses.replace(row, module=name, where='/a_long_folder/'*9+'models/a_file_with_a_long_name_for_layers.py:12345')])
    head,*table = str(res).splitlines()[1:3]
    assert all(len(l)<=100 for l in (head, *table)) and '…' in table[0]
    for shown in (str(res), res._repr_markdown_()): assert 'models/a_file_with_a_long_name_for_layers.py:12345`: `'+row.code in shown
    assert name in res.table() and res.rows[0].where in res.table()

def test_long_tables_are_cut():
    row = trace(network(Copies())).rows[0]
    long,short = (result_of([dataclasses.replace(row, where=f'model.py:{i}') for i in range(n)]) for n in (13, 10))
    for text in (repr(long), long._repr_markdown_()): assert 'And 3 lines more: `.table()` shows all.' in text and 'model.py:9`' in text and 'model.py:10`' not in text
    assert 'lines more' not in repr(short) and len(long.table().splitlines())==14

class SelfAttention(nn.Module):
    "Tokens through 1-D convolutions, as fastai's `SelfAttention`"
    def __init__(self, c):
        super().__init__()
        self.query,self.value = nn.Conv1d(c, c, 1),nn.Conv1d(c, c, 1)
    def forward(self, x):
        q,v = (l(x.flatten(2)) for l in (self.query, self.value))
        return (v@F.softmax(q.transpose(1, 2)@q, 1)).view(x.shape).contiguous()+x

@pytest.mark.skipif(device.type!='cpu', reason='the ways of a CPU')
def test_a_trace_does_not_depend_on_the_kernels_that_were_fastest(monkeypatch):
    found = []
    for way in every_way:
        force(monkeypatch, way)
        res = trace(network(nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), SelfAttention(8), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.ReLU()), tuned=True)
        found.append((res.kept, sorted((r.module, r.op, r.kind, r.phase, r.shape, r.back) for r in (*res.rows, *res.by_design))))
    assert found[0][1] and all(o==found[0] for o in found), found

def test_a_freed_tensors_address_is_not_taken_for_another():
    with Tracer(step_of(network())) as tracer:
        tracer.modules.seen = True
        seen = {storage_id(torch.zeros(3, 3)) for _ in range(50)}
    assert len(seen)==50

@pytest.mark.parametrize('n', [1, 20])
def test_plot(n):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    res = trace(network(Copies(), *[block(8, 8) for _ in range(n)]))
    ax = res.plot()
    marks = [x for l in ax.lines if l.get_marker() in ('v','^') for x in l.get_xdata()]
    assert (len(marks)==sum(o['loses'] for o in res.ops)==1 and sum(len(c.get_paths()) for c in ax.collections)==len(res.ops)
        and [t.get_text() for t in ax.get_yticklabels()]==['forward', 'backward'])
    assert ax.figure.get_size_inches()[0]<=7, 'for a phone'
    plt.close('all')

def test_the_plot_on_a_dark_style_and_in_grey():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with plt.style.context('dark_background'): ax = trace(network(Copies(), Parts())).plot()
    assert all(l.get_color()=='white' for l in ax.lines)
    looks = {(c.get_hatch(), round(0.3*r+0.59*g+0.11*b, 1)) for c in ax.collections for r,g,b,_ in c.get_facecolor()}
    assert len(looks)==len({o for h,o in looks})>=3, 'a lightness of its own for each format'
    plt.close('all')

def test_errors():
    with pytest.raises(ValueError, match='seconds must be above 0, got 0'): trace_formats(step_of(network()), seconds=0)
    with pytest.raises(ValueError, match='there is nothing to trace: Sequential has no convolution'):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 4)))
    class Viewed(nn.Module):
        def forward(self, x): return x.view(len(x), -1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Viewed(), nn.Linear(8*14*14, 4))
    with pytest.raises(ValueError, match=r'(?s)the step fails in channels last, at tests.test_trace.py:\d+: '
            r'`def forward\(self, x\): return x.view\(len\(x\), -1\)`.*use `.flatten` or `.reshape`'):
        trace(model)
