"How the package is built: which module may know which, how large a thing may be, and where torch's private names are"
import ast, re
from pathlib import Path
import pytest

folder = Path(__file__).resolve().parent.parent/'fastxtend_cl'
number = {p.stem.partition('_')[2]: p.stem.partition('_')[0] for p in (folder.parent/'nbs').glob('[0-9]*_*.ipynb')}
files = sorted(p for p in folder.glob('[!_]*.py'))
trees = {p.stem: ast.parse(p.read_text()) for p in files}
modules = sorted(number)

def functions(tree):
    "Each function of a module, with the name of its class"
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.Lambda)): yield n

def imported(tree):
    "(module, name) of what a module takes from others of this package"
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('fastxtend_cl')):
            for a in n.names: yield (n.module or '').removeprefix('fastxtend_cl.'),a.name

def test_each_module_has_a_notebook(): assert {p.stem for p in files}-{'all'}==set(modules)

@pytest.mark.parametrize('name', modules)
def test_imports_go_down_only(name):
    "A module imports from those whose notebook has a lower number"
    for module,what in imported(trees[name]):
        if module in number: assert number[module]<number[name], f'{name} imports {what} of {module}'

@pytest.mark.parametrize('name', [*modules, 'all'])
def test_no_private_name_of_another_module(name):
    assert [o for o in imported(trees[name]) if o[1].startswith('_') and not o[1].startswith('__')]==[]

@pytest.mark.parametrize('name', modules)
def test_no_private_method_of_another_module(name):
    "`x._name` is allowed for `self`, `cls`, and where the module itself, or a library, has that name"
    own = {n.name for n in ast.walk(trees[name]) if isinstance(n, (ast.FunctionDef, ast.ClassDef))} | {
        t.attr for n in ast.walk(trees[name]) if isinstance(n, ast.Assign) for o in n.targets for t in ast.walk(o) if isinstance(t, ast.Attribute)}
    theirs = {n.name for m,tree in trees.items() if m!=name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and re.match('_[a-z]', n.name)}
    used = {n.attr for n in ast.walk(trees[name]) if isinstance(n, ast.Attribute) and re.match('_[a-z].*[^_]$', n.attr)}
    assert sorted((used & theirs) - own)==[]

@pytest.mark.parametrize('path', files, ids=lambda p: p.stem)
def test_a_file_has_at_most_500_lines(path): assert len(path.read_text().splitlines())<=500

@pytest.mark.parametrize('name', modules)
def test_functions_of_our_own_have_at_most_six_parameters(name):
    "Those that a user calls may have more: each is an argument of theirs"
    def count(f): return len([a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ('self', 'cls')])
    found = {f.name: count(f) for f in functions(trees[name]) if isinstance(f, ast.FunctionDef) and f.name.startswith('_')}
    assert {n: c for n,c in found.items() if c>6 and n!='__init__'}=={}

compound = ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef

def depth(node):
    "How deep statements are nested below `node`; `elif` is no deeper than its `if`"
    res = 0
    for child in ast.iter_child_nodes(node):
        below = depth(child)
        if isinstance(child, compound) and not (isinstance(node, ast.If) and node.orelse==[child] and isinstance(child, ast.If)): below += 1
        res = max(res, below)
    return res

@pytest.mark.parametrize('name', modules)
def test_nothing_is_nested_deeper_than_four(name):
    found = {f.name: depth(f) for f in functions(trees[name]) if isinstance(f, ast.FunctionDef)}
    assert {n: d for n,d in found.items() if d>4}=={}

@pytest.mark.parametrize('src,found', [('def f():\n for a in b:\n  if c:\n   with d:\n    while e: pass', 4), ('def f():\n if a: pass\n elif b: pass\n elif c: pass', 1)])
def test_depth_is_counted(src, found): assert depth(ast.parse(src).body[0])==found

known = ('torch.utils._python_dispatch', 'torch.utils._pytree', 'torch.nn.modules') # what torch's own documentation and other packages build on

@pytest.mark.parametrize('name', [m for m in modules if m!='internals'])
def test_private_names_of_torch_are_in_internals(name):
    text = (folder/f'{name}.py').read_text()
    assert [m for m in re.findall(r'torch(?:\.\w+)*\._(?!_)\w*|\._compiled_call_impl|\._cdata|import _Conv\w*', text) if not m.startswith(known)]==[]
