"Private names of torch: that they are there, what happens where one is not, and that modules import where the system lacks something"
import os, subprocess, sys
import pytest, torch
from torch import nn
from fastxtend_cl import internals
from fastxtend_cl.internals import compiled_call, find_internal, set_compiled_call, storage_id

public = [n for n in internals.__all__ if n not in ('find_internal', 'raise_missing')]

def test_this_version_of_torch_has_all_names():
    "If this fails, torch has renamed one: find its new name, and let `find_internal` know it"
    assert len(public)>12
    assert not [n for n in public if getattr(getattr(internals, n), '__name__', '')=='missing']

def test_a_missing_name_is_an_error_where_it_is_used():
    for path in ('_C._gone', '_gone._twice._over'):
        f = find_internal(path) # no error yet
        with pytest.raises(RuntimeError, match=f'^torch {torch.__version__} has no torch.{path}, which fastxtend_cl needs: install another version of torch or a newer fastxtend_cl$'.replace('+', r'\+')):
            f(1, a=2)

def test_a_default_is_used_in_place_of_a_missing_name():
    assert find_internal('_C._gone', (nn.Conv2d,))==(nn.Conv2d,) and find_internal('nn.Conv2d', nn.Conv1d) is nn.Conv2d

planted = '''
import torch
{plant}
import fastxtend_cl.internals as internals
from torch import nn
{test}
print('passed')
'''

plants = {
    'a function': ('del torch._C._current_autograd_node', '''
from fastxtend_cl.kernels import tuned_kernels # everything imports
try: internals.current_autograd_node()
except RuntimeError as e: assert 'torch._C._current_autograd_node' in str(e)
else: raise AssertionError'''),
    'the class of all convolutions': ('del torch.nn.modules.conv._ConvNd', '''
assert all(isinstance(o, internals.conv_types) for o in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.LazyConv2d(1, 1)))
assert not isinstance(nn.Linear(1, 1), internals.conv_types)'''),
    'the compiled call': ('del torch.nn.Module._compiled_call_impl', '''
for f in (internals.compiled_call, lambda m: internals.set_compiled_call(m, None)):
    try: f(nn.Linear(1, 1))
    except RuntimeError as e: assert 'torch.nn.Module._compiled_call_impl' in str(e)
    else: raise AssertionError''')}

def in_a_process(code, root):
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True, timeout=300)
    assert r.returncode==0 and r.stdout.strip()=='passed', r.stderr[-2000:]

@pytest.mark.parametrize('name', plants)
def test_the_package_without_a_name_of_torch(name, root):
    plant,test = plants[name]
    in_a_process(planted.format(plant=plant, test=test), root)

def test_storages_are_told_apart():
    a,b = torch.zeros(4),torch.zeros(4)
    assert storage_id(a)==storage_id(a[1:])==storage_id(a.untyped_storage())!=storage_id(b)
    assert storage_id(torch.empty(3, device='meta'))!=storage_id(torch.empty(3, device='meta'))

def test_the_compiled_call_is_put_back():
    m = nn.Linear(2, 2)
    m.compile(backend='eager')
    own = compiled_call(m)
    set_compiled_call(m, None)
    assert compiled_call(m) is None is m._compiled_call_impl
    set_compiled_call(m, own)
    assert m._compiled_call_impl is own is not None

as_elsewhere = '''
import os, sys, torch
import fastai.callback.schedule # what it imports itself is not ours
for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'): sys.modules[name] = None
for name in ('sysconf', 'fork', 'getloadavg', 'getuid', 'sched_getaffinity', 'register_at_fork'): hasattr(os, name) and delattr(os, name)
import signal
for name in ('SIGALRM', 'SIGKILL', 'setitimer', 'pthread_sigmask'): hasattr(signal, name) and delattr(signal, name)
import fastxtend_cl.all
from fastxtend_cl import cli, memory
assert memory.faulted_memory()==0
print('passed')
'''

def test_all_modules_import_without_what_windows_lacks(root): in_a_process(as_elsewhere, root)

def test_memory_without_an_allocator_to_set(root):
    "As on Windows: no C library is asked for"
    in_a_process('''
import os
from fastxtend_cl import memory
os.name = 'nt'
with memory.kept_memory() as kept, memory.poisoned_memory() as poisoned: assert kept is poisoned is False
assert not memory.can_keep_memory() and memory.given_back_from() is None and memory.free_memory()==0
memory.touch_memory(1<<20)
print('passed')''', root)
