"Files that keep measurements between processes: damaged ones, other versions, several writers, folders that cannot be written"
import json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from fastxtend_cl.cache import CacheFile, CacheWarning, cache_folder, conditions, cpu_name, fixed_conditions
from helpers import caught_warnings

file = CacheFile('test.json', 3, 'results of a test')
once_per_test = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTXTEND_CL_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def write(text):
    file.path.parent.mkdir(exist_ok=True)
    file.path.write_bytes(text if isinstance(text, bytes) else text.encode())

def messages(f, *args):
    "What `f` returns, and the texts of its warnings"
    with caught_warnings() as w: res = f(*args)
    assert all(o.category is CacheWarning and o.filename==__file__ for o in w), [(o.category, o.filename) for o in w]
    return res,[str(o.message) for o in w]

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=10)
contents = st.dictionaries(st.text(), st.dictionaries(st.text(), plain))

@once_per_test
@given(contents, contents)
def test_what_is_written_is_read(a, b):
    def same(d): assert messages(file.read)==(d, []) and [o.name for o in file.path.parent.iterdir()]==['test.json']
    file.update(lambda old: a)
    same(a)
    file.update(lambda old: {**old, **b})
    same({**a, **b})

@once_per_test
@given(st.binary() | st.text().map(str.encode) | plain.map(lambda o: json.dumps(o).encode()) | st.fixed_dictionaries({}, optional=dict(version=st.sampled_from([3, 2, None, '3']), data=plain)).map(lambda o: json.dumps(o).encode()))
def test_any_other_file_is_one_warning_and_replaced(text):
    write(text)
    got,texts = messages(file.read)
    if texts:
        assert got=={} and len(texts)==1
        assert texts[0].startswith(f'the results of a test in {file.path} cannot be used and will be measured again: ')
    else: assert json.loads(text)['version']==3 and got==json.loads(text)['data']
    assert messages(file.update, lambda old: {**old, 'a': {}})==(None, []), 'the warning came with the first read'
    assert messages(file.read)==({**got, 'a': {}}, [])

@pytest.mark.parametrize('text,why', [('', 'JSONDecodeError: '), ('{', 'JSONDecodeError: '), (b'\xff\xfe', 'UnicodeDecodeError: '), ('['*100_000, 'RecursionError: '), ('[]', 'not a cache file'),
    ('{}', 'not a cache file'), ('{"version": 2, "data": {}}', 'version 2 instead of 3'), ('{"version": "3"}', "version '3' instead of 3"),
    ('{"version": 3}', 'unexpected structure'), ('{"version": 3, "data": []}', 'unexpected structure'), ('{"version": 3, "data": {"a": 1}}', 'unexpected structure')])
def test_a_warning_says_why(text, why):
    write(text)
    (_,(warning,)) = messages(file.read)
    assert f' will be measured again: {why}' in warning

def test_no_file_is_no_warning(): assert messages(file.read)==({}, [])

def test_a_folder_in_place_of_the_file():
    file.path.mkdir(parents=True)
    assert messages(file.read)[0]=={} and len(messages(file.update, lambda old: {})[1])==1
    assert [o.name for o in file.path.parent.iterdir()]==['test.json'], 'no temporary file is left'

def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FASTXTEND_CL_CACHE', str(tmp_path/'file'/'folder'))
    assert messages(file.read)==({}, [])
    (_,(text,)) = messages(file.update, lambda old: {'a': {}})
    assert text.startswith('cannot save the results of a test for the next process: ') and text.endswith('; FASTXTEND_CL_CACHE sets another folder')

@pytest.mark.parametrize('where', ['mkstemp', 'replace'])
def test_a_disk_that_is_full(where, monkeypatch):
    import fastxtend_cl.cache as module
    file.update(lambda old: {'a': {}})
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module.tempfile if where=='mkstemp' else module.os, where, full)
    assert 'No space left on device' in messages(file.update, lambda old: {'b': {}})[1][0]
    assert messages(file.read)==({'a': {}}, []) and len([*file.path.parent.iterdir()])==1, 'the old file stays, and no temporary one'

def test_an_error_of_the_caller_leaves_the_file():
    file.update(lambda old: {'a': {}})
    with pytest.raises(ZeroDivisionError): file.update(lambda old: 1/0)
    with pytest.raises(TypeError): file.update(lambda old: {'b': {'c': object()}})
    assert messages(file.read)==({'a': {}}, []) and len([*file.path.parent.iterdir()])==1

def test_threads_leave_a_whole_file():
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: file.update(lambda old: {**old, str(i): {}}), range(40)))
    got,texts = messages(file.read)
    assert got and not texts and len([*file.path.parent.iterdir()])==1

writer = '''
import sys
from fastxtend_cl.cache import CacheFile
file = CacheFile('test.json', 3, 'results of a test')
for i in range(50):
    file.update(lambda old: {**old, sys.argv[1]: {'i': i, 'text': 'x'*10_000}})
    assert file.read()
'''

@pytest.mark.skipif(sys.platform=='win32', reason='a file that another process reads cannot be replaced on Windows: a CacheWarning')
def test_two_processes_leave_a_whole_file(root):
    "Each sees whole files only; the last update of either is there"
    env = {**os.environ, 'PYTHONPATH': str(root)}
    ps = [subprocess.Popen([sys.executable, '-W', 'error::fastxtend_cl.cache.CacheWarning', '-c', writer, name], env=env, stderr=subprocess.PIPE, text=True) for name in 'ab']
    errors = [p.communicate(timeout=300)[1] for p in ps]
    assert [p.returncode for p in ps]==[0, 0], errors
    got,texts = messages(file.read)
    assert not texts and set(got)<={'a', 'b'} and any(o['i']==49 for o in got.values())

# Folders and conditions

@pytest.mark.skipif(sys.platform=='win32', reason='paths of POSIX')
@pytest.mark.parametrize('platform,env,folder', [('linux', {}, '.cache'), ('linux', dict(XDG_CACHE_HOME='/x'), '/x'), ('darwin', {}, 'Library/Caches'), ('win32', dict(LOCALAPPDATA='/local'), '/local')])
def test_folders_of_the_systems(platform, env, folder, monkeypatch):
    for n in ('FASTXTEND_CL_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA'): monkeypatch.delenv(n, raising=False)
    for n,v in env.items(): monkeypatch.setenv(n, v)
    monkeypatch.setattr(sys, 'platform', platform)
    assert cache_folder()==Path.home()/folder/'fastxtend_cl'

def test_the_processor_has_a_name_where_proc_is_missing(monkeypatch):
    assert isinstance(cpu_name(), str)
    monkeypatch.setattr(Path, 'read_text', lambda self, **kw: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr('platform.processor', lambda: 'Apple M2')
    assert cpu_name()=='Apple M2'

def test_settings_change_the_conditions():
    n,before = torch.get_num_threads(),conditions()
    try:
        torch.set_num_threads(n+1)
        assert conditions()!=before
    finally: torch.set_num_threads(n)
    assert conditions()==before and fixed_conditions() is fixed_conditions()
