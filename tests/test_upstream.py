"""The reports to upstream: each script shows its fault where it was seen, and this test fails when upstream has fixed it

What was seen is in upstream/results.json, for one machine; where the CPU has other instructions, a script only has to run."""
import ast, json, re, sys
import pytest
import torch

@pytest.fixture(scope='module')
def run(script): return script('upstream', 'run')

def folders():
    from pathlib import Path
    return sorted(p.parent for p in (Path(__file__).resolve().parent.parent/'upstream').glob('*/repro.py'))

each_fault = pytest.mark.parametrize('folder', folders(), ids=lambda p: p.name)

@each_fault
def test_upstream_has_not_fixed_it(run, folder):
    results = run.read()
    expected = run.expected(results, folder.name, torch.__version__)
    same = folder.name.startswith('fastai-') or run.instruction_set()==results['instruction_set'] and sys.platform=='linux'
    seen,printed = run.outcome(sys.executable, folder/'repro.py', tries=5 if same and run.is_fault(expected) else 1)
    assert not seen.startswith('does not run'), f'{seen}\n{printed}'
    assert 'expected:' in printed and 'seen:' in printed
    if not same: pytest.skip(f'{seen}; recorded with {results["instruction_set"]}: {expected}')
    if run.is_fault(expected): assert run.is_fault(seen), run.fixed_text(folder.name, torch.__version__, printed)
    else: assert not run.is_fault(seen), f'{folder.name} is back in torch {torch.__version__}: {printed}'

@each_fault
def test_this_package_is_not_affected(run, folder):
    "The same script after the one line that a user adds: `tuned_kernels`, or the import that replaces fastai's method"
    if not (around := run.with_package(folder.name)): pytest.skip('see the table: the script does not call what this package replaces')
    for _ in range(3 if folder.name.endswith('-slow') else 1): # times on a busy machine
        seen,printed = run.outcome(sys.executable, around)
        if seen=='right': return
    pytest.fail(f'{seen}\n{printed}')

@each_fault
def test_a_report_can_be_sent(run, folder):
    "A short script of plain torch, and a report in the tracker's form that holds this script and where the fault was seen"
    script,report = (folder/'repro.py').read_text(),(folder/'report.md').read_text()
    assert len(script.splitlines())<30
    modules = {a.name.partition('.')[0] for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Import) for a in n.names} | {
        n.module.partition('.')[0] for n in ast.walk(ast.parse(script)) if isinstance(n, ast.ImportFrom)}
    theirs = {'torch', 'fastai'} if folder.name.startswith('fastai-') else {'torch'}
    assert modules<=theirs | sys.stdlib_module_names
    assert report==run.report_of(folder.name, run.read()), 'python upstream/run.py --texts writes it anew'
    assert script.rstrip() in report
    parts = ('**Describe the bug**', '**To Reproduce**', '**Expected behavior**') if folder.name.startswith('fastai-') else ('### 🐛 Describe the bug', '#### Conditions', '### Versions')
    assert report.startswith('# ') and all(p in report for p in parts) and 'seen:' in report.partition('<!-- end -->')[2]

def test_outcomes(run, tmp_path):
    "What each end of a script means"
    def outcome(code, **kwargs):
        (tmp_path/'repro.py').write_text(code)
        return run.outcome(sys.executable, tmp_path/'repro.py', **kwargs)
    head = "import os, sys; print('expected: 1', flush=True)\n"
    assert outcome(head+"print('seen: 1')")==('right', 'expected: 1\nseen: 1')
    assert outcome(head+"print('seen: 2'); sys.exit(True)")==('faulty', 'expected: 1\nseen: 2')
    assert outcome(head+'os.abort()')==('crashes', 'expected: 1\nseen: SIGABRT')
    assert outcome(head+'import nothing_of_this_name')[0]=="does not run: ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert outcome(head+"print('seen: 2'); sys.exit(3)")[0].startswith('does not run')
    assert outcome("import os; print('expected: seen:', os.environ['ONEDNN_MAX_CPU_ISA'])", limit='AVX2')[1].endswith('AVX2')
    count = f"p = {str(tmp_path/'n')!r}; n = len(open(p, 'a+').read()) if 0 else os.path.exists(p) and os.path.getsize(p); open(p, 'a').write('x')\n"
    assert outcome(head+count+"print('seen:', n); sys.exit(n==2)", tries=5)==('faulty', 'expected: 1\nseen: 2') # the third time
    assert (tmp_path/'n').read_text()=='xxx'

def test_texts_of_versions(run):
    tried = ['2.9.1', '2.10.0', '2.11.0', '2.14.1', '2.15.0', '2.8.0']
    assert run.ranges({*tried}, tried)=='2.8 to 2.15'
    assert run.ranges({'2.8.0', '2.10.0', '2.11.0'}, tried)=='2.8, 2.10 to 2.11'
    assert run.ranges(set(), tried)=='none'
    results = dict(outcomes=dict(a={'2.8.0': dict(all='faulty'), '2.14.1': dict(all='right'), '2.15.0': dict(all='does not run: no such function')}))
    assert [run.expected(results, 'a', v) for v in ('2.8.0+cpu', '2.9.1', '2.14.0', '2.14.1', '2.16.0.dev20270101+cpu', '2.7.1')]==[
        'faulty', 'faulty', 'right', 'right', 'right', 'faulty']
    assert run.versions_with(results['outcomes']['a'])==({'2.8.0'}, ['2.8.0', '2.14.1'])

def test_tables_are_those_of_the_results(run, root):
    "README.md of upstream, and the page of the site"
    results = run.read()
    assert set(run.ours)==set(results['outcomes'])==set(run.names())
    assert run.table(results) in (root/'upstream/README.md').read_text(), 'python upstream/run.py --texts writes it anew'
    cells = json.loads((root/'nbs/upstream.ipynb').read_text())['cells']
    shown = [''.join(o['data'].get('text/markdown', '')) for c in cells for o in c.get('outputs', []) if 'data' in o]
    assert run.table(results) in shown, 'nbdev-test nbs/upstream.ipynb --save runs the page anew'
    for name in run.names(): assert f'upstream/{name}/report.md' in run.table(results)
    newest = max((v for o in results['outcomes'].values() for v in o), key=run.version)
    assert re.fullmatch(r'2\.\d+\.\d+', newest)
