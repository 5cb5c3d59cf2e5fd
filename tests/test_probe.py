"The child process that runs layers: what becomes of each kind of failure"
import os, signal, threading
import pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st
from fastxtend_cl.amp import cpu_bf16
from fastxtend_cl.probe import LayerSpec, Probe, layer_specs, run_layer

good = LayerSpec.of(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8))

@pytest.fixture(scope='module')
def probe():
    with Probe() as p: yield p

def test_right(probe):
    r = probe.run(good)
    assert r.ok and r.status=='right' and r.reason=='' and set(r.errors)=={'output', 'weight', 'bias'}

def test_one_child_serves_many(probe):
    probe.run(good)
    pid = probe.child.pid
    assert all(probe.run(good, memory_format=f).ok for f in ('contiguous', 'channels_last')) and probe.child.pid==pid

def test_death_is_an_answer_and_the_child_is_replaced(probe, monkeypatch):
    probe.run(good)
    real,pid = probe._answer,probe.child.pid
    def kill_first(timeout):
        os.kill(probe.child.pid, signal.SIGSEGV); probe.child.wait()
        monkeypatch.undo()
        probe.buffer = b''
        os.read(probe.child.stdout.fileno(), 1<<16)
        return real(timeout)
    monkeypatch.setattr(probe, '_answer', kill_first)
    r = probe.run(good)
    assert (r.status,r.reason)==('died', 'the process died of SIGSEGV')
    assert probe.run(good).ok and probe.child.pid!=pid

def test_a_child_that_is_dead_before_it_is_asked(probe):
    probe.run(good)
    probe.child.kill(); probe.child.wait()
    assert probe.run(good).status=='died'
    assert probe.run(good).ok

def test_hang_is_an_answer():
    with Probe(timeout=0.5) as p:
        p.run(good)
        os.kill(p.child.pid, signal.SIGSTOP)
        r = p.run(good)
        assert (r.status,r.reason)==('hung', 'no answer in 0.5 seconds')
        assert p.run(good).ok

def test_raising_is_an_answer(probe):
    r = probe.run(LayerSpec.of(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 2, 2)))
    assert r.status=='raised' and r.reason.startswith('RuntimeError') and "Kernel size can't be greater" in r.reason

def test_interrupt_leaves_no_answer_behind(probe, monkeypatch):
    "After Ctrl-C the next layer gets its own answer, not the interrupted one's"
    def interrupt(timeout): raise KeyboardInterrupt
    with monkeypatch.context() as mp:
        mp.setattr(probe, '_answer', interrupt)
        with pytest.raises(KeyboardInterrupt): probe.run(good)
    assert probe.child is None
    assert set(probe.run(LayerSpec.of(nn.Conv2d(3, 8, 3, bias=False), torch.randn(2, 3, 8, 8))).errors)=={'output', 'weight'}

def test_no_child_is_left(probe):
    with Probe() as p:
        p.run(good)
        child = p.child
    assert child.poll() is not None

@pytest.mark.skipif(cpu_bf16()!='AVX512-BF16', reason='seen with AVX512-BF16 only')
def test_wrong_is_named(probe):
    spec = LayerSpec.of(nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32), torch.randn(1, 32, 9, 40))
    r = probe.run(spec, precision='bf16', guarded=False, rounds=3)
    assert r.status in ('wrong', 'died') and (r.status=='died' or 'weight' in r.reason and 'contiguous' in r.reason)
    assert probe.run(spec, precision='bf16', rounds=3).ok

def test_a_planted_wrong_gradient_is_named(monkeypatch):
    from fastxtend_cl import probe as module
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w): return w.clone()
        @staticmethod
        def backward(ctx, g): return g*1.01
    def planted(self, x, w, b): return nn.functional.conv2d(x, Wrong.apply(w) if x.dtype==torch.float32 and not x.is_contiguous() else w, b)
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', planted)
    assert run_layer(good)['wrong']==['weight'] and run_layer(good, memory_format='contiguous')['wrong']==[]

def test_specs_of_a_model():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), shared, shared, nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 2, 2)))
    specs = layer_specs(model, torch.randn(1, 3, 8, 8))
    assert sorted(specs.values())==[['0'], ['1', '3'], ['5'], ['6']]
    assert [s.input_grad for s in specs]==[False, True, True, True]
    assert {s.kind for s in specs}=={'Conv2d', 'ConvTranspose2d'}
    assert not any(m._forward_hooks for m in model.modules())

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_layers_are_right(data):
    draw,nd = data.draw,data.draw(st.sampled_from((2,3)))
    ints = lambda lo,hi: tuple(draw(st.lists(st.integers(lo, hi), min_size=nd, max_size=nd)))
    g = draw(st.sampled_from((1,2,4)))
    kind = f'Conv{draw(st.sampled_from(("", "Transpose")))}{nd}d'
    m = getattr(nn, kind)(4*draw(st.integers(1, 5)), 4*draw(st.integers(1, 5)), ints(1, 3), stride=ints(1, 2),
        padding=ints(0, 1), groups=g, bias=draw(st.booleans()))
    spec = LayerSpec.of(m, torch.randn(draw(st.integers(1, 3)), m.in_channels, *ints(4, 9)).requires_grad_(draw(st.booleans())))
    assert LayerSpec.of(spec.build(), torch.randn(spec.shape).requires_grad_(spec.input_grad))==spec
    try: res = run_layer(spec)
    except RuntimeError as e: assert 'output size is too small' in str(e) or "Kernel size can't be greater" in str(e); return
    assert res['wrong']==[], (spec, res)

# Times of single kernels

inner = LayerSpec.of(nn.Conv2d(8, 8, 5, padding=2, groups=8), torch.randn(2, 8, 9, 9).requires_grad_())

def test_times_of_each_kernel(probe):
    t = probe.times(inner, precisions=('fp32', 'bf16'), seconds=0.1)
    kernels = {'forward', 'input', 'weight', 'weight tiled'}
    assert ({k for k in t.seconds if k[2] in kernels}
        =={(f,p,k) for f in ('contiguous', 'channels_last') for p in ('fp32', 'bf16') for k in kernels}
            - {k for k in t.lost if len(k)==3})
    assert all(0<s<60 for s in t.seconds.values()) and ('channels_last', 'fp32', 'output to bf16') in t.seconds
    assert t.get('channels_last', 'fp32', 'nothing')==float('inf')
    assert not any(k=='input' for *_,k in probe.times(good, seconds=0.05).seconds), 'the data needs no gradient'

def test_death_and_hang_lose_the_candidate_only(probe, monkeypatch):
    real = probe._ask
    def ask(task, spec, request):
        if 'bf16' in request['precisions'] and 'channels_last' in request['formats']: return 'died','the process died of SIGSEGV'
        return real(task, spec, request)
    monkeypatch.setattr(probe, '_ask', ask)
    t = probe.times(inner, precisions=('fp32', 'bf16'), seconds=0.05)
    assert t.lost=={('channels_last','bf16'): 'died: the process died of SIGSEGV'}
    assert {k[:2] for k in t.seconds}=={('contiguous','fp32'), ('contiguous','bf16'), ('channels_last','fp32')}

def test_a_layer_that_raises_has_no_times(probe):
    t = probe.times(LayerSpec.of(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 2, 2)), seconds=0.05)
    assert not t.seconds and all("Kernel size can't be greater" in why for why in t.lost.values()) and len(t.lost)==2

def test_a_planted_wrong_kernel_is_no_candidate(monkeypatch):
    from fastxtend_cl import probe as module
    real = module._kernels
    def planted(x, w, b, g, args):
        res = real(x, w, b, g, args)
        if x.dtype==torch.bfloat16: right = res['weight']; res['weight'] = lambda: right()*1.2
        return res
    monkeypatch.setattr(module, '_kernels', planted)
    res = module.time_layer(inner, precisions=('fp32', 'bf16'), seconds=0.02)
    assert {tuple(k[:3]) for k in res['wrong']}=={(f,'bf16','weight') for f in ('contiguous', 'channels_last')}
    t = module.LayerTimes(inner).add(res)
    assert (t.get('channels_last', 'bf16', 'weight')==float('inf')
        and t.lost['channels_last','bf16','weight'].startswith('relative distance from double precision'))

@pytest.mark.parametrize('padding,mode,args',
    [('same', 'zeros', ([1, 1], [1, 2], [1, 1], False, [0, 0], 1)),
        ('valid', 'zeros', ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)), (1, 'reflect', None)])
def test_what_a_convolution_is_called_with(padding, mode, args):
    from fastxtend_cl.probe import conv_args
    assert conv_args(nn.Conv2d(3, 8, (3, 5), padding=padding, padding_mode=mode))==args
    assert conv_args(nn.Conv2d(3, 8, 4, padding='same')) is None, 'more on one side than on the other'
    assert conv_args(nn.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1))==([2, 2], [0, 0], [1, 1], True, [1, 1], 1)
