"Each text that this package raises or warns with has its entry on the page of troubleshooting"
import ast, json, re
from html import unescape
import pytest

warners = 'FormatWarning','NoEffectWarning','NoConvolutionWarning','CacheWarning'

def name_of(o): return getattr(o.func, 'attr', getattr(o.func, 'id', '')) if isinstance(o, ast.Call) else ''

def text_of(o, tree, func):
    "The text of expression `o`, with … for what is filled in; a name or a function is looked up in `func` and then in the module"
    def sub(q): return text_of(q, tree, func)
    if isinstance(o, ast.Constant): return o.value if isinstance(o.value, str) else '…'
    if isinstance(o, ast.JoinedStr): return ''.join(map(sub, o.values))
    if isinstance(o, ast.BinOp) and isinstance(o.op, ast.Add): return sub(o.left)+sub(o.right)
    if isinstance(o, ast.Name):
        for scope in (func, tree):
            found = [n.value for n in ast.walk(scope) if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id==o.id for t in n.targets)]
            if len(found)==1 and not isinstance(found[0], ast.Name): return sub(found[0])
    if isinstance(o, ast.Call) and isinstance(o.func, ast.Name):
        f = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name==o.func.id), None)
        returned = [n.value for n in ast.walk(f) if isinstance(n, ast.Return)] if f else []
        if len(returned)==1: return text_of(returned[0], tree, f)
    return '…'

def in_function(func):
    "Nodes of `func` that are in no function inside of it"
    for n in ast.iter_child_nodes(func):
        yield n
        if not isinstance(n, ast.FunctionDef): yield from in_function(n)

def said_in(src):
    "(class, text) of each error that `src` raises and each warning that it makes"
    tree = ast.parse(src)
    for func in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        for n in in_function(func):
            call = n.exc if isinstance(n, ast.Raise) else n
            kind = name_of(call)
            if isinstance(n, ast.Raise) and kind or kind in warners: pass
            elif kind=='warn' and call.args and name_of(call.args[0]) not in warners and getattr(call.args[0], 'id', '')!='w': # others are found where they are made
                kind = getattr(call.args[1], 'id', 'UserWarning') if len(call.args)>1 else 'UserWarning'
            else: continue
            text = text_of(call.args[0], tree, func) if call.args else ''
            yield kind,re.sub('…[…\\s]*…', '…', ' '.join(text.split()))

@pytest.fixture(scope='module')
def messages(root): return {(p.name,*o) for p in (root/'fastxtend_cl').glob('*.py') for o in said_in(p.read_text())}

@pytest.fixture(scope='module')
def page(root): return json.loads((root/'nbs/troubleshooting.ipynb').read_text())['cells']

@pytest.fixture(scope='module')
def prose(page): return unescape('\n'.join(''.join(c['source']) for c in page if c['cell_type']=='markdown'))

def test_each_message_has_its_entry(messages, prose):
    assert len(messages)>80
    missing = sorted(f'{file}: {kind}: {text}' for file,kind,text in messages if text.strip('… ') and text not in prose)
    assert not missing, 'say in nbs/troubleshooting.ipynb where these come from, and the way out:\n'+'\n'.join(missing)

def test_texts_made_elsewhere_are_known(messages):
    "What a message says cannot be read here if it is all filled in; these are described by hand"
    assert {(file,kind) for file,kind,text in messages if not text.strip('…: ')}=={('arms.py','ArmFailed'), ('timing.py','ArmFailed'), ('race.py','NotFiniteError'), ('cli.py','UsageError'), ('learner.py','WrongStepError')}

def test_no_entry_is_stale(messages, prose):
    texts = {text for *_,text in messages} | {'unrecognized arguments: …'} # argparse's
    entries = [next(filter(None, m)).strip() for m in re.findall('<code>(.+?)</code>|`([^`\n]+)`', prose)]
    assert [e for e in entries if '…' in e and e not in texts]==[]

def test_what_the_page_shows_is_what_is_said(messages, page):
    "The texts in the saved tables are those of the source, until the part on PyTorch's own"
    ours = [re.compile('.*'.join(map(re.escape, text.split('…')))) for *_,text in messages]
    shown = []
    for c in page:
        if '## Messages of PyTorch' in ''.join(c['source']): break
        for o in c.get('outputs', []): shown += map(unescape, re.findall('<tr><td><code>.*?</code></td><td><code>(.*?)</code>', ''.join(o.get('data', {}).get('text/html', ''))))
    assert len(shown)>50
    said = [re.sub('^(fastxtend-cl|[A-Za-z]+(Error|Warning)): ', '', o) for o in shown]
    assert [o for o in said if not o.startswith('unrecognized arguments') and not any(p.fullmatch(o) for p in ours)]==[]

@pytest.mark.parametrize('src,found', [
    ("raise ValueError(f'a {b} is {c!r}')", ('ValueError', 'a … is …')),
    ("def f():\n    text = f'{n} things'\n    raise RuntimeError(text) from e", ('RuntimeError', '… things')),
    ("_no = 'there is none'\ndef f():\n    def g(): raise ValueError(_no)", ('ValueError', 'there is none')),
    ("def why(d): return f'none on {d}'\nwarnings.warn(why(d), NoEffectWarning, stacklevel=2)", ('NoEffectWarning', 'none on …')),
    ("res.append(FormatWarning('it stays' + (more if more else '')))", ('FormatWarning', 'it stays…')),
    ("class A:\n    def f(self): warnings.warn('so')", ('UserWarning', 'so'))])
def test_messages_are_found(src, found): assert list(said_in(src))==[found]
