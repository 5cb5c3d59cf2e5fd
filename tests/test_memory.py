"""`kept_memory` and `KeepMemoryCallback`: page faults are counted in processes of their own, what the allocator was told
is noted elsewhere. No test asserts a time"""
import os, shutil, subprocess, sys, threading
from pathlib import Path
import pytest, torch
import fastai.callback.schedule # fit_one_cycle
from fastai.callback.core import Callback
from torch import nn
from fastxtend_cl import memory, plan as plans
from fastxtend_cl.all import *
from fastxtend_cl.timing import least_pairs
from fastxtend_cl.memory import _glibc
from helpers import caught_warnings, quiet, tiny_learner

root = Path(__file__).resolve().parent.parent
glibc = pytest.mark.skipif(_glibc() is None, reason='not the allocator of glibc, or told otherwise by the environment')

# Page faults

head = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) # PR_SET_THP_DISABLE: how many huge pages there are changes from one second to the next
from fastxtend_cl.memory import kept_memory
def faults(n=10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n): torch.ones(1<<25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt-before
usual = faults()
if usual<100_000: raise SystemExit(77) # huge pages: a tensor is faulted in at once
"""

measuring = """
with kept_memory() as told:
    faults(20)
    assert told and faults()<usual/4
    with kept_memory(False) as inner: assert inner is False and faults(1)>usual/20
    faults(20)
    assert faults()<usual/4
assert faults(1)>usual/20
"""

training = """
import sys
sys.path.insert(0, 'tests')
from fastxtend_cl.all import *
from helpers import *
class Count(Callback):
    def __init__(self): self.seen = []
    def after_batch(self): self.seen.append(faults(4))
def seen(learn, n=4):
    with quiet(learn): learn.fit(n, cbs=(count := Count()))
    return count.seen[-1]
learn = tiny_learner()
assert seen(learn)>usual/5
assert seen(learn.to_channelslast(keep_memory=True))<usual/10 and faults(1)>usual/20
assert seen(learn.to_contiguous())>usual/5
"""

@glibc
@pytest.mark.parametrize('program', [measuring, training], ids=['measuring', 'training'])
def test_memory_is_kept_meanwhile_and_given_back_afterwards(program):
    """In a process of its own: here a hole in the heap might serve as well

    Given back is what was free at the end; a hole that lies between other pieces of the heap is faulted in once more and then serves again"""
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'THP_MEM_ALLOC_ENABLE': '0'}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', head+program], env=env, capture_output=True, text=True, timeout=600,
        cwd=root)
    if r.returncode==77: pytest.skip('the kernel gives huge pages')
    assert r.returncode==0, r.stderr

@glibc
def test_environment_has_the_last_word(monkeypatch):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '100')
    assert not can_keep_memory()
    with kept_memory() as told: assert told is False

left = """
def busy(sizes=(1, 2, 4, 6, 30), n=10):
    "Page faults of steps that take and free tensors of so many MiB"
    def step():
        ts = [torch.ones(s<<18) for s in sizes]
    for _ in range(3): step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n): step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt-before
alone = busy()
with kept_memory(): busy()
assert busy()<=alone+100, (alone, busy())
ctypes.CDLL(None).mallopt(-3, 128<<10); ctypes.CDLL(None).mallopt(-1, 128<<10); ctypes.CDLL(None).malloc_trim(0)
initial = busy()
assert initial>alone+1000, (alone, initial)
"""

@glibc
def test_the_thresholds_left_behind_take_no_more_page_faults_than_glibcs_own():
    "They are fixed from then on; the initial ones, fixed, would be worse"
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'THP_MEM_ALLOC_ENABLE': '0'}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', head+left], env=env, capture_output=True, text=True, timeout=600)
    if r.returncode==77: pytest.skip('the kernel gives huge pages')
    assert r.returncode==0, r.stderr

# Other allocators

stand_in = """
#include <stddef.h>
extern void *__libc_malloc(size_t);
extern void *__libc_memalign(size_t, size_t);
#ifdef ALIGNED
int posix_memalign(void **p, size_t a, size_t n) { *p = __libc_memalign(a, n); return *p ? 0 : 12; }
#else
void *malloc(size_t n) { return __libc_malloc(n); }
#endif
"""

asks = """
from fastxtend_cl.memory import can_keep_memory, kept_memory, poisoned_memory, _not_kept
with kept_memory() as kept, poisoned_memory() as poisoned: print(can_keep_memory(), kept, poisoned, _not_kept(), sep=';')
"""

def asked(**env):
    env = {**{k:v for k,v in os.environ.items() if k!='LD_PRELOAD'}, 'PYTHONPATH': str(root), **env}
    r = subprocess.run([sys.executable, '-c', asks], env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode==0, r.stderr
    return r.stdout.strip().split(';')

@glibc
@pytest.mark.parametrize('flags', [[], ['-DALIGNED']], ids=['malloc', 'posix_memalign'])
def test_an_allocator_that_stands_in_for_glibcs_is_seen(flags, tmp_path):
    if not (gcc := shutil.which('gcc')): pytest.skip('there is no gcc')
    (tmp_path/'a.c').write_text(stand_in)
    so = tmp_path/'libother.so.2'
    subprocess.run([gcc, '-shared', '-fPIC', *flags, '-o', so, tmp_path/'a.c'], check=True)
    assert asked()==['True', 'True', 'True', 'None']
    assert asked(LD_PRELOAD=str(so))==['False', 'False', 'False', "this is for glibc's allocator, here it is that of libother.so.2"]

def test_a_c_library_without_glibcs_functions(monkeypatch):
    "As musl, and the C library of macOS"
    monkeypatch.setattr(memory.ctypes, 'CDLL', lambda name: object())
    assert not can_keep_memory() and memory._not_kept()=="this is for glibc's allocator, here it is that of a C library other than glibc"
    with kept_memory() as kept, memory.poisoned_memory() as poisoned: assert kept is poisoned is False

# What the allocator is told

class Libc:
    "Notes whether memory is kept, and how often what is free was given back"
    def __init__(self): self.kept,self.trims,self.values = False,0,{}
    def mallopt(self, what, value):
        self.values[what] = value
        self.kept = self.values.get(-1)==-1
    def malloc_trim(self, pad): self.trims += 1

@pytest.fixture
def libc(monkeypatch):
    monkeypatch.setattr(memory, '_glibc', lambda libc=Libc(): libc)
    return memory._glibc()

def test_contexts_nest(libc):
    with kept_memory():
        assert libc.kept
        with kept_memory(): assert libc.kept
        assert libc.kept and libc.trims==0, 'the inner one is not the last'
        with kept_memory(False):
            assert not libc.kept and libc.trims==1
            with kept_memory(): assert libc.kept
            assert not libc.kept and libc.trims==2
        assert libc.kept
    assert not libc.kept and libc.trims==3 and libc.values=={-1: 64<<20, -3: 32<<20, -4: 65536}
    with kept_memory(False): assert libc.trims==3, 'nothing changes'

def test_contexts_of_two_threads_may_overlap(libc):
    entered,leave = threading.Event(),threading.Event()
    def other():
        with kept_memory() as told:
            assert told is False, 'large tensors of another thread are given back all the same'
            entered.set(); leave.wait(60)
    t = threading.Thread(target=other)
    t.start(); entered.wait(60)
    with kept_memory() as told: assert told and libc.kept
    assert libc.kept, 'the other has not left'
    leave.set(); t.join()
    assert not libc.kept and not memory._wishes

# Training

class See(Callback):
    "What the allocator has been told while batches are trained"
    def __init__(self, libc, raises=None): self.libc,self.raises,self.seen = libc,raises,[]
    def after_batch(self):
        self.seen.append(self.libc.kept)
        if self.raises: raise self.raises

def trained(learn, libc, *cbs, raises=None):
    see = See(libc, raises)
    with quiet(learn): learn.fit(1, cbs=[see, *cbs])
    return {*see.seen}

def test_training_keeps_memory(libc):
    learn = tiny_learner()
    assert trained(learn, libc)=={False} and trained(learn, libc, KeepMemoryCallback())=={True} and not libc.kept
    assert not learn._grab_cbs(KeepMemoryCallback)
    learn.add_cb(KeepMemoryCallback())
    assert trained(learn, libc)=={True} and not libc.kept
    with quiet(learn): learn.fit_one_cycle(1, 1e-3, cbs=(see := See(libc)))
    assert {*see.seen}=={True} and not libc.kept

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError('out of memory')], ids=['Ctrl-C', 'error'])
def test_interrupted_training_leaves_the_allocator_as_it_was(libc, error):
    learn = tiny_learner().to_channelslast(use_amp=False, keep_memory=True)
    with pytest.raises(type(error) if isinstance(error, Exception) else error): trained(learn, libc, raises=error)
    assert not libc.kept and not memory._wishes
    assert trained(learn, libc)=={True} and not libc.kept

def test_the_argument(libc):
    learn = tiny_learner()
    def has(): return len(learn._grab_cbs(KeepMemoryCallback))
    assert not learn.to_channelslast(use_amp=False)._grab_cbs(KeepMemoryCallback)
    learn.to_channelslast(use_amp=False, keep_memory=True).to_channelslast(use_amp=False, keep_memory=True)
    assert has()==1
    learn.to_channelslast(use_amp=False)
    assert has()==0, 'as this call alone'
    learn.add_cb(KeepMemoryCallback()).to_channelslast(use_amp=False, keep_memory=True).to_channelslast(use_amp=False)
    assert has()==1, "the user's own stays"
    learn.to_channelslast(use_amp=False, keep_memory=False)
    assert has()==0
    learn.to_channelslast(use_amp=False, keep_memory=True).to_contiguous()
    assert has()==0 and not learn._grab_cbs(ChannelsLastCallback)
    with pytest.raises(TypeError, match='keep_memory is True, False or None, received 1'): learn.to_channelslast(keep_memory=1)
    assert not learn._grab_cbs(ChannelsLastCallback)

def test_without_effect_it_is_said(monkeypatch):
    from fastxtend_cl import channelslast
    learn = tiny_learner()
    monkeypatch.setenv('MALLOC_ARENA_MAX', '1')
    with pytest.warns(NoEffectWarning, match=r'keep_memory=True has no effect: the environment sets the '
        r'allocator \(MALLOC_ARENA_MAX\)'): learn.to_channelslast(use_amp=False, keep_memory=True)
    assert learn._grab_cbs(ChannelsLastCallback) and not learn._grab_cbs(KeepMemoryCallback)
    monkeypatch.setattr(channelslast, 'learner_device', lambda learn: torch.device('cuda:1'))
    said = channelslast._no_keep(learn)
    assert str(said[0])=='keep_memory=True has no effect: the model is on cuda:1, whose allocator keeps memory by itself'

def test_exports_are_without(libc, tmp_path):
    learn = tiny_learner(path=tmp_path).to_channelslast(use_amp=False, keep_memory=True)
    learn.export('export.pkl')
    assert b'fastxtend_cl' not in (tmp_path/'export.pkl').read_bytes() and learn._grab_cbs(KeepMemoryCallback)

# Plans

def proven(verdict):
    "What `bench_formats` says of an arm with memory kept"
    row = lambda arm, **kw: BenchRow(arm, pairs=least_pairs, seconds=1., **kw)
    return FormatBench([row('now', verdict='now', ratio=1.), row('now, again', verdict='noise', ratio=1.),
        row('memory kept', verdict=verdict, ratio=1.2, low=1.1, high=1.3)], (0.99, 1.01))

def planned_with(monkeypatch, verdict, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    step = TrainingStep(model, torch.randn(4, 3, 16, 16), torch.arange(4), nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
    real,seen = bench_formats,[]
    def planted(step, arms, **kw):
        if kw['now'].keep_memory is not False: return real(step, arms, **kw)
        seen.append((kw['now'], *arms))
        return proven(verdict)
    monkeypatch.setattr(plans, 'bench_formats', planted)
    return plan_formats(step, None, budget=3, bar=False, cache=False, **kwargs),seen

@pytest.mark.parametrize('verdict', ['faster', 'tie', 'slower'])
def test_a_plan_keeps_memory_unless_that_is_slower(libc, monkeypatch, verdict):
    p,((now,kept),) = planned_with(monkeypatch, verdict)
    assert (now.name,now.keep_memory,kept.name,kept.keep_memory)==('now', False, 'memory kept', True)
    assert (now.memory_format,now.dtype,now.setup,now.compile)==(kept.memory_format, kept.dtype, kept.setup, kept.compile)
    assert p.arm=='now' or now.memory_format==p.memory_format
    keeps = verdict=='faster' or verdict=='tie' and p.changes
    assert p.keep_memory==keeps and p.memory.rows==proven(verdict).rows
    assert f'Keeping freed memory: a further 1.20x, 1.10 to 1.30 ({verdict}); it {"is" if keeps else "is not"} kept.' in p.notes
    again = FormatPlan.from_dict(p.to_dict())
    assert again.keep_memory==p.keep_memory and again.memory==p.memory

def test_what_changes_nothing_else_has_to_be_faster():
    assert [plans._keeps(proven(v), True) for v in ('faster', 'tie', 'inconclusive', 'slower', 'failed')]==[True, True, True, False, False]
    assert [plans._keeps(proven(v), False) for v in ('faster', 'tie', 'inconclusive', 'slower', 'failed')]==[True, False, False, False, False]
    failed = proven('failed')
    failed['memory kept'].reason = 'out of memory'
    assert plans._memory_note(failed, False)=='Keeping freed memory could not be measured: out of memory.'
    few = proven('inconclusive')
    few['memory kept'].low,few['memory kept'].reason = None,'8 rounds needed, 3 measured'
    assert plans._memory_note(few, True)=='Keeping freed memory: inconclusive (8 rounds needed, 3 measured); it is kept.'

def test_a_plan_does_not_measure_what_has_no_effect(libc, monkeypatch):
    p,seen = planned_with(monkeypatch, 'faster', memory=False)
    assert not seen and not p.keep_memory and p.memory is None and 'freed memory' not in str(p)
    monkeypatch.setattr(plans, 'can_keep_memory', lambda: False)
    p,seen = planned_with(monkeypatch, 'faster')
    assert not seen and not p.keep_memory and p.memory is None

@pytest.mark.parametrize('arm', ['now', 'channels last fp32'])
def test_a_learner_keeps_memory_by_its_plan(libc, arm):
    p = FormatPlan(arm, None if arm=='now' else 'channels_last', keep_memory=True)
    for asked in (None, True):
        learn = tiny_learner(model=nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        with caught_warnings() as w: learn.to_channelslast(plan=p, keep_memory=asked)
        assert not w and learn._grab_cbs(KeepMemoryCallback) and learn.channels_last.plan is p
        assert learn.channels_last.memory_format==(None if arm=='now' else 'channels_last')
        assert trained(learn, libc)=={True}
    learn.to_channelslast(plan=p, keep_memory=False)
    assert not learn._grab_cbs(KeepMemoryCallback)
    learn = tiny_learner(model=nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    learn.to_channelslast(plan=FormatPlan('channels last fp32', 'channels_last'))
    assert not learn._grab_cbs(KeepMemoryCallback)

poison = '''
import torch
from fastxtend_cl.memory import poisoned_memory
def fresh(): return torch.empty(100_000).abs().min().item()
def huge(): return min(fresh() for _ in range(5))>1e38
before = huge()
with poisoned_memory() as told: inside = huge()
print(before, told, inside, huge())
'''

@pytest.mark.skipif(not can_keep_memory() or 'LD_PRELOAD' in os.environ, reason="this is for glibc's allocator")
@pytest.mark.parametrize('own', [None, '128'])
def test_memory_is_poisoned_meanwhile(own):
    "What torch gets holds huge numbers; afterwards it is as the user has set it"
    env = {**os.environ, **({} if own is None else {'MALLOC_PERTURB_': own})}
    r = subprocess.run([sys.executable, '-c', poison], capture_output=True, text=True, env=env)
    assert r.stdout.split()==[str(own is not None), 'True', 'True', str(own is not None)], r.stderr
