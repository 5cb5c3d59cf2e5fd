"""`kept_memory`, in `Learner.fit` too: page faults are counted in processes of their own; other tests record how the allocator was set.
No test asserts a time"""
import os, shutil, subprocess, sys, threading
from pathlib import Path
import pytest, torch
import fastai.callback.schedule # fit_one_cycle
from fastai.callback.core import Callback
from fastxtend_cl import memory
from fastxtend_cl.all import *
from fastxtend_cl.memory import can_keep_memory, is_memory_error
from helpers import caught_warnings, fit, quiet, tiny_learner

root = Path(__file__).resolve().parent.parent
glibc = pytest.mark.skipif(not can_keep_memory(), reason="macOS, Windows, or an allocator other than glibc's, or one set by the environment")

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

def alone(program):
    "Run `program` after `head` in a process of its own"
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'THP_MEM_ALLOC_ENABLE': '0'}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', head+program], env=env, capture_output=True, text=True, timeout=600, cwd=root)
    if r.returncode==77: pytest.skip('the kernel gives huge pages')
    assert r.returncode==0, r.stderr

measuring = """
with kept_memory() as kept:
    faults(20)
    assert kept and faults()<usual/4
    with kept_memory(False) as inner: assert inner is False and faults(1)>usual/20
    faults(20)
    assert faults()<usual/4
assert faults(1)>usual/20
"""

training = """
import sys
sys.path.insert(0, 'tests')
from fastxtend_cl.all import *
from fastxtend_cl.memory import given_back_from
from helpers import *
class Count(Callback):
    def __init__(self): self.seen = []
    def after_batch(self):
        if self.epoch==self.n_epoch-1: self.seen.append((faults(4), given_back_from()))
def seen(learn, n=4):
    with quiet(learn): learn.fit(n, cbs=(count := Count()))
    return count.seen[-1]
learn = tiny_learner()
assert seen(learn)[0]>usual/5
n,threshold = seen(learn.to_channelslast())
assert n<usual/10 and threshold is None and faults(1)>usual/20
assert seen(learn.to_contiguous())[1] in (32<<20, None) # its page faults depend on what holes the fit before has left
"""

@glibc
@pytest.mark.parametrize('program', [measuring, training], ids=['measuring', 'training'])
def test_memory_is_kept_inside_and_given_back_afterwards(program):
    """In a process of its own: here a hole in the heap might serve as well

    Given back is what was free at the end; a hole that lies between other pieces of the heap is faulted in once more and then serves again"""
    alone(program)

@glibc
def test_environment_has_the_last_word(monkeypatch):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '100')
    assert not can_keep_memory()
    with kept_memory() as kept: assert kept is False

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
    alone(left)

asking = """
from fastxtend_cl.memory import given_back_from
def near(n): return all(n-4096<=given_back_from()<=n+8192 for _ in range(3)) # asking changes nothing
for n in (5<<20, 200<<10, 31<<20):
    ctypes.CDLL(None).mallopt(-3, n)
    assert near(n), n
with kept_memory(): assert given_back_from() is None
assert near(32<<20)
with kept_memory(False, 3<<20):
    assert near(3<<20)
    with kept_memory(): assert given_back_from() is None
    assert near(3<<20)
assert near(32<<20)
"""

adapting = """
from fastxtend_cl.memory import _heap, given_back_from
heap = _heap()
largest = given_back_from()
for n in (3<<20, 12<<20, 7<<20): # glibc takes the largest piece freed so far, up to 32 MiB
    heap.free(heap.malloc(n))
    largest = max(largest, n)
    assert largest-4096<=given_back_from()<=largest+8192, (n, largest, given_back_from())
"""

finding = """
from fastxtend_cl.memory import free_memory, touch_memory
with kept_memory():
    faults(20)
    size = free_memory()
with kept_memory(): alone = faults(1)
with kept_memory():
    touch_memory(size)
    assert alone>usual/20 and (n := faults(1))<alone/10, (n, alone)
"""

newer = pytest.mark.skipif(memory._heap() is None, reason='macOS, Windows, or not glibc 2.33 or later')

@newer
@pytest.mark.parametrize('program', [asking, adapting, finding], ids=['asked', 'adapted', 'touched'])
def test_the_allocator_is_asked_and_prepared(program): alone(program)

def test_an_allocator_that_cannot_be_asked(monkeypatch):
    monkeypatch.setattr(memory, '_glibc', lambda: None)
    assert memory.given_back_from() is None and memory.free_memory()==0 and memory.touch_memory(1<<20) is None

# Other allocators

replacement = """
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
from fastxtend_cl.memory import can_keep_memory, kept_memory, poisoned_memory, other_allocator
with kept_memory() as kept, poisoned_memory() as poisoned: print(can_keep_memory(), kept, poisoned, other_allocator(), sep=';')
"""

def asked(**env):
    env = {**{k:v for k,v in os.environ.items() if k!='LD_PRELOAD'}, 'PYTHONPATH': str(root), **env}
    r = subprocess.run([sys.executable, '-c', asks], env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode==0, r.stderr
    return r.stdout.strip().split(';')

@glibc
@pytest.mark.parametrize('flags', [[], ['-DALIGNED']], ids=['malloc', 'posix_memalign'])
def test_an_allocator_that_replaces_glibcs_is_detected(flags, tmp_path):
    if not (gcc := shutil.which('gcc')): pytest.skip('there is no gcc')
    (tmp_path/'a.c').write_text(replacement)
    so = tmp_path/'libother.so.2'
    subprocess.run([gcc, '-shared', '-fPIC', *flags, '-o', so, tmp_path/'a.c'], check=True)
    assert asked()==['True', 'True', 'True', 'None']
    assert asked(LD_PRELOAD=str(so))==['False', 'False', 'False', 'libother.so.2']

@glibc
def test_the_jumps_of_a_program_are_no_other_allocator(monkeypatch):
    "As of Debian's own Python, which is not position-independent: the address of `malloc` is in the program"
    real = memory._defined_in
    monkeypatch.setattr(memory, '_defined_in', lambda libc, name: ('python', 0x400000) if libc._name is None and name!='gnu_get_libc_version' else real(libc, name))
    assert memory.other_allocator() is None
    monkeypatch.setattr(memory, '_first_library', lambda libc, name: ('libother.so.2', 0x7f0000))
    assert memory.other_allocator()=='libother.so.2'

def test_a_c_library_without_glibcs_functions(monkeypatch):
    "As musl, and the C library of macOS"
    monkeypatch.setattr(memory.ctypes, 'CDLL', lambda name: object())
    assert not can_keep_memory() and memory.other_allocator()=='a C library other than glibc'
    with kept_memory() as kept, memory.poisoned_memory() as poisoned: assert kept is poisoned is False

# How the allocator is set

class Libc:
    "Records whether memory is kept, and how often free memory was given back"
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
            assert not libc.kept and libc.trims==1, 'an inner one leaves what is free between other pieces'
        assert libc.kept
    assert not libc.kept and libc.trims==2 and libc.values=={-1: 64<<20, -3: 32<<20, -4: 65536}
    with kept_memory(False): assert libc.trims==2, 'nothing changes'

def test_thresholds_nest(libc):
    "The default is that of the enclosing context"
    def thresholds(): return libc.values[-3],libc.values[-1]
    usual = 32<<20,64<<20
    with kept_memory(False, 5<<20):
        assert thresholds()==(5<<20, 10<<20) and libc.trims==1
        with kept_memory():
            assert libc.kept
            with kept_memory(False): assert thresholds()==(5<<20, 10<<20) and not libc.kept
        with kept_memory(False): assert thresholds()==(5<<20, 10<<20)
        with kept_memory(False, 6<<20): assert thresholds()==(6<<20, 12<<20)
        assert thresholds()==(5<<20, 10<<20)
    assert thresholds()==usual
    before = libc.trims
    with kept_memory(False, 32<<20):
        with kept_memory(): assert libc.kept
    assert libc.trims==before+1 and thresholds()==usual, 'given back at the end, although no threshold changes then'

def test_contexts_of_two_threads_may_overlap(libc):
    entered,leave = threading.Event(),threading.Event()
    def other():
        with kept_memory() as kept:
            assert kept is False, 'large tensors of another thread are given back all the same'
            entered.set(); leave.wait(60)
    t = threading.Thread(target=other)
    t.start(); entered.wait(60)
    with kept_memory() as kept: assert kept and libc.kept
    assert libc.kept, 'the other has not left'
    leave.set(); t.join()
    assert not libc.kept and not memory._open

# Training

class See(Callback):
    "Whether memory is kept while batches are trained"
    def __init__(self, libc, raises=None): self.libc,self.raises,self.seen = libc,raises,[]
    def after_batch(self):
        self.seen.append(self.libc.kept)
        if self.raises: raise self.raises

def trained(learn, libc, *cbs, raises=None):
    see = See(libc, raises)
    with quiet(learn): learn.fit(1, cbs=[see, *cbs])
    return {*see.seen}

def cl(learn, **kwargs): return learn.to_channelslast(use_amp=False, **kwargs)

def test_training_in_channels_last_keeps_memory(libc):
    "By default, in a fit only, and not for other Learners"
    learn = tiny_learner()
    assert trained(learn, libc)=={False} and trained(learn, libc, ChannelsLastCallback())=={True}=={*trained(learn, libc, ChannelsLastCallback)} and not libc.kept
    assert trained(cl(learn), libc)=={True} and not libc.kept
    with quiet(learn): learn.fit_one_cycle(1, 1e-3, cbs=(see := See(libc)))
    assert {*see.seen}=={True} and not libc.kept
    with quiet(learn): learn.validate(cbs=(see := See(libc)))
    assert {*see.seen}=={False}

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError('out of memory')], ids=['Ctrl-C', 'error'])
def test_interrupted_training_leaves_the_allocator_as_it_was(libc, error):
    learn = cl(tiny_learner())
    with pytest.raises(type(error) if isinstance(error, Exception) else error): trained(learn, libc, raises=error)
    assert not libc.kept and not memory._open
    assert trained(learn, libc)=={True} and not libc.kept

def test_the_argument(libc):
    learn = tiny_learner()
    assert trained(cl(learn, keep_memory=False), libc)=={False} and trained(cl(learn), libc)=={True}, 'as the last call says'
    plan = FormatPlan('contiguous fp32', 'contiguous')
    assert trained(cl(learn, keep_memory=False).to_channelslast(plan=plan), libc)=={True}
    assert trained(learn.to_channelslast(plan=plan, keep_memory=False), libc)=={False} and trained(learn.to_contiguous(), libc)=={False}
    assert trained(learn, libc, ChannelsLastCallback(keep_memory=False))=={False}
    with pytest.raises(TypeError, match='keep_memory must be True or False, got None'): learn.to_channelslast(keep_memory=None)
    assert not learn._grab_cbs(ChannelsLastCallback)

def test_no_warning_without_effect(monkeypatch):
    monkeypatch.setenv('MALLOC_ARENA_MAX', '1')
    with caught_warnings() as w: fit(cl(tiny_learner()))
    assert not w and not memory._open

def test_on_a_gpu_the_allocator_of_the_cpu_is_left_alone(libc, monkeypatch):
    from fastxtend_cl import callbacks
    monkeypatch.setattr(callbacks, 'learner_device', lambda learn: torch.device('cuda:1'))
    assert trained(tiny_learner().add_cb(ChannelsLastCallback()), libc)=={False}

poison = '''
import torch
from fastxtend_cl.memory import poisoned_memory
def fresh(): return torch.empty(100_000).abs().min().item()
def huge(): return min(fresh() for _ in range(5))>1e38
before = huge()
with poisoned_memory() as poisoned: inside = huge()
print(before, poisoned, inside, huge())
'''

@pytest.mark.skipif(not can_keep_memory() or 'LD_PRELOAD' in os.environ, reason="macOS, Windows, or an allocator other than glibc's")
@pytest.mark.parametrize('own', [None, '128'])
def test_memory_is_poisoned_inside(own):
    "torch gets memory with huge numbers; afterwards the user's setting is restored"
    env = {**os.environ, **({} if own is None else {'MALLOC_PERTURB_': own})}
    r = subprocess.run([sys.executable, '-c', poison], capture_output=True, text=True, env=env)
    assert r.stdout.split()==[str(own is not None), 'True', 'True', str(own is not None)], r.stderr

# Out of memory

@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:125] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.'), RuntimeError('MPS backend out of memory')], ids=str)
def test_errors_of_memory_are_known(error): assert is_memory_error(error)

def test_torchs_own_error_of_memory_is_known():
    with pytest.raises(RuntimeError) as e: torch.empty(1<<60, dtype=torch.uint8)
    assert is_memory_error(e.value)

@pytest.mark.parametrize('error', [RuntimeError('shape mismatch'), ValueError('memory_format must be a string'), KeyboardInterrupt(), OSError(28, 'No space left on device')], ids=str)
def test_other_errors_are_not(error): assert not is_memory_error(error)
