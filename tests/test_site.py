"What the site is made from: the navigation, the stand-in for Quarto, how functions are shown, and the page of models that a script makes from the results"
import base64, json, re, subprocess, sys
from dataclasses import dataclass, field
import pytest
import yaml
from fastcore.nbio import mk_cell, new_nb, write_nb

def cells_of(p): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(p.read_text())['cells']]

def notebooks(root):
    "The notebooks of the site, relative to `nbs`"
    found = (p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb'))
    return [p for p in found if not any(o[0] in '_.' for o in p.parts)]

def sections(contents, name=None):
    "Notebook and the name of the innermost section that holds it, in the order of the sidebar"
    for o in contents:
        if isinstance(o, dict) and 'section' in o: yield from sections(o['contents'], o['section'])
        else: yield (o['href'] if isinstance(o, dict) else o),name

def sidebar(root): return [*sections(yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents'])]

def test_sidebar_names_every_notebook(root):
    nbs = root/'nbs'
    named,there = [n for n,_ in sidebar(root)],{p.as_posix() for p in notebooks(root)}
    assert len(named)==len(set(named))
    assert there-set(named)==set(), 'add these to nbs/sidebar.yml'
    assert {n for n in named if n not in there and (nbs/n).parent.exists()}==set(), 'in nbs/sidebar.yml, but not there'

def test_quarto_reads_the_same_order(root):
    "nbdev leaves sidebar.yml alone, Quarto reads it, and follows the reader's light or dark"
    q = yaml.safe_load((root/'nbs/_quarto.yml').read_text())
    assert 'sidebar.yml' in q['metadata-files'] and q['website']['navbar']['search']
    page = q['format']['html']
    assert set(page['theme'])=={'light','dark'} and page['respect-user-color-scheme'] and page['code-copy'] is True and page['css']=='styles.css'
    from nbdev.config import get_config
    assert get_config(root/'nbs').custom_sidebar

def test_a_page_of_the_reference_begins_with_what_a_user_needs(root):
    "A task or question as its title, then the main function and examples, and under the last heading how it works"
    where = dict(sidebar(root))
    assert set(where.values())=={None, 'Tutorials', 'Guides', 'Reference', 'Inside'}
    checked = 0
    for name,section in where.items():
        if not re.match(r'\d', name): continue
        cells = cells_of(root/'nbs'/name)
        title = cells[0][1].splitlines()[0].removeprefix('# ')
        assert len(title.split())>1 and title!=name.partition('_')[2].removesuffix('.ipynb'), f'{name}: a task or a question, not the name of the module'
        if section=='Inside': continue
        exported = [i for i,(_,s) in enumerate(cells) if re.search(r'^#\|\s*exporti?\b', s, re.M)]
        shown = [i for i,(_,s) in enumerate(cells) if s.startswith('show_doc(')]
        how = [i for i,(kind,s) in enumerate(cells) if kind=='markdown' and re.search('^## How it works', s, re.M)]
        assert len(how)==1 and all(i>how[0] for i in exported), f'{name}: internals last'
        assert shown and shown[0]<how[0] or name in ('22_race.ipynb', '27_cli.ipynb'), f'{name}: the main function first' # of Learner, and of the shell
        checked += 1
    assert checked>12

def test_readers_see_no_test_code(root):
    "Tests are in hidden cells, or folded; a check at the end of a page's internals may be shown"
    found = []
    for p in notebooks(root):
        for kind,s in cells_of(root/'nbs'/p):
            if kind=='markdown' and re.search('^## How it works', s, re.M): break
            if kind=='code' and not re.search(r'^#\|\s*(hide|exporti?|echo: false|code-fold: true)\b', s, re.M) and re.search(r'fastcore\.test|\btest_(eq|is|ne|close|fail)\(|expect_fail', s): found.append(f'{p.name}: {s[:60]}')
    assert found==[]

def test_every_picture_has_a_text(root):
    "Each cell whose output is a picture has a `fig-alt`; a picture in markdown has its own"
    pictures,found = 0,[]
    for p in (root/'nbs').rglob('*.ipynb'):
        for c in json.loads(p.read_text())['cells']:
            src = ''.join(c['source'])
            n = sum(any(m.startswith('image/') for m in o.get('data', {})) for o in c.get('outputs', []))
            pictures += n
            if n and not re.search(r'^#\|\s*(fig-alt:\s*\S.{9,}|hide\b|include: false)', src, re.M): found.append(f'{p.name}: {src[:60]}')
            if c['cell_type']=='markdown': found += [f'{p.name}: {m}' for m in re.findall(r'!\[\]\(.*?\)', src)]
    assert pictures and found==[]

png = base64.b64encode(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')).decode()

def picture(src): return mk_cell(src, outputs=[dict(output_type='display_data', metadata={}, data={'image/png': png})])

@pytest.fixture
def build(root, tmp_path):
    "Function that makes a site of notebooks, {path: cells}, with the stand-in"
    def _build(contents=('index.ipynb',), **nbs):
        src,out = tmp_path/'nbs',tmp_path/'out'
        for name,cells in {'index': [], **nbs}.items():
            p = src/f"{name.replace('__', '/')}.ipynb"
            p.parent.mkdir(parents=True, exist_ok=True)
            write_nb(new_nb([*([] if cells and cells[0].cell_type=='raw' else [mk_cell(f'---\ntitle: Page {name}\n---', 'raw')]), *cells]), p)
        (src/'nbdev.yml').write_text(yaml.dump(dict(website={'title': 'tiny', 'repo-url': 'https://example.org'})))
        (src/'sidebar.yml').write_text(yaml.dump(dict(website=dict(sidebar=dict(contents=list(contents))))))
        r = subprocess.run([sys.executable, root/'.ci/bin/quarto', 'render', '--output-dir', out], cwd=src, capture_output=True, text=True)
        return r,lambda name: (out/name).read_text()
    return _build

@pytest.mark.parametrize('said,alt', [('"A line: it rises [in m] -- 1. *a* _b_ $c$"', 'A line: it rises [in m] -- 1. *a* _b_ $c$'), ("'It is \"so\" & `x` * y'", 'It is &quot;so&quot; &amp; `x` * y'), ('\'It\'\'s\'', "It's"), ('no quotes here', 'no quotes here'),
    ('a colon: without quotes', 'a colon: without quotes'), ('["a list"]', 'a list')])
def test_alternative_text_is_what_fig_alt_says(build, said, alt):
    r,page = build(index=[picture(f'#| fig-alt: {said}\nplot()')])
    assert r.returncode==0, r.stderr
    tags = re.findall(r'<img\b[^>]*>', page('index.html'))
    assert len(tags)==1 and f'alt="{alt}"' in tags[0].replace('&#39;', "'"), tags
    assert '<figcaption' not in page('index.html') and 'fig-alt' not in page('index.html')

@pytest.mark.parametrize('said', ['', '#| fig-alt:\n', '#| fig-alt: ""\n', '#| echo: false\n'])
def test_a_picture_without_a_text_stops_the_build(build, said):
    r,_ = build(index=[picture(f'{said}plot_of_this()')])
    assert r.returncode!=0 and 'fig-alt' in r.stderr and 'plot_of_this' in r.stderr and 'index.ipynb' in r.stderr

def test_navigation_has_sections_and_takes_in_what_is_new(build):
    contents = [dict(text='Home', href='index.ipynb'), dict(section='Lessons', contents=['lessons/b.ipynb', 'lessons/not_yet.ipynb']), dict(section='Later', contents=['later/c.ipynb'])]
    r,page = build(contents, lessons__b=[], lessons__a=[], deep__er__d=[])
    assert r.returncode==0 and 'lessons/a.ipynb is not in sidebar.yml' in r.stderr and 'b.ipynb is not' not in r.stderr
    nav = re.search(r'<nav id="site".*?</nav>', page('lessons/b.html'), re.S)[0]
    assert re.findall(r'<h2>(.*?)</h2>', nav)==['Lessons'], 'a section without a page is left out'
    assert re.findall(r'<a href="(.*?)"', nav)==['../index.html', '../lessons/b.html', '../lessons/a.html', '../deep/er/d.html']
    assert re.findall(r'<a href="([^"]*)" aria-current="page"', nav)==['../lessons/b.html']
    assert '"../../site.css"' in page('deep/er/d.html') and 'data-up="../../"' in page('deep/er/d.html')

def test_links_between_folders(build):
    r,page = build(a__x=[mk_cell('[up](../index.ipynb#top), [beside](y.ipynb), [over](../b/z.ipynb)', 'markdown')], a__y=[], b__z=[mk_cell('[back](../a/x.ipynb)', 'markdown')])
    assert re.findall(r'<p>.*</p>', page('a/x.html'))==['<p><a href="../index.html#top">up</a>, <a href="y.html">beside</a>, <a href="../b/z.html">over</a></p>']
    assert 'href="../a/x.html">back' in page('b/z.html')

def test_index_of_search(build):
    html = mk_cell('show()', outputs=[dict(output_type='display_data', metadata={}, data={'text/html': '<table><tr><td>in a table</td></tr></table><script>not_this()</script><style>nor_this {}</style>'})])
    r,page = build(index=[mk_cell('Before.\n\n## A heading\n\nSome `text` here.', 'markdown'), html])
    entries = json.loads(page('search-index.js').removeprefix('window.searchIndex = '))
    assert entries[0][:4]==['index.html', 'Page index', '', ''] and 'Before.' in entries[0][4]
    assert entries[1][:4]==['index.html', 'Page index', 'a-heading', 'A heading'] and 'Some text here.' in entries[1][4] and 'in a table' in entries[1][4]
    assert 'not_this' not in str(entries) and 'nor_this' not in str(entries)

def test_tables_scroll_by_themselves(build):
    own = mk_cell('show()', outputs=[dict(output_type='display_data', metadata={}, data={'text/html': '<div class="scroll" tabindex="0">\n<table><tr><td>own</td></tr></table></div>'})])
    _,page = build(index=[mk_cell('| a |\n|---|\n| 1 |', 'markdown'), own])
    assert page('index.html').count('class="scroll"')==2

def test_errors_and_folded_code_are_shown(build):
    error = mk_cell('1/0', outputs=[dict(output_type='error', ename='ZeroDivisionError', evalue='', traceback=['Traceback', 'ZeroDivisionError: division'])])
    _,page = build(index=[error, mk_cell('#| code-fold: true\n#| code-summary: "How"\nx = 1'), mk_cell('#| echo: false\nhidden()'), mk_cell('print("```")', outputs=[dict(output_type='stream', name='stdout', text='```\nx')])])
    text = page('index.html')
    assert 'ZeroDivisionError: division' in text and 'hidden()' not in text
    assert re.search(r'<details>\s*<summary>\s*How\s*</summary>', text) and re.search(r'<pre class="output"><code>```\nx', text)

def test_code_is_coloured_and_outputs_are_not(build):
    _,page = build(index=[mk_cell('for x in y: "<b>"', outputs=[dict(output_type='stream', name='stdout', text='for x in y')]), mk_cell('```\nfor plain\n```', 'markdown')])
    text = page('index.html')
    assert '<pre class="python"><code><span class="k">for</span>' in text and '&lt;b&gt;' in text and '<b>' not in text
    assert '<pre class="output"><code>for x in y' in text and '<code>for plain' in text

def test_classes_of_a_cell(build):
    r,page = build(index=[picture('#| classes: photo\n#| fig-alt: "Seen"\nshow()'), picture('#| fig-alt: "Drawn"\nplot()')])
    assert r.returncode==0 and re.search(r'<div class="photo">.*alt="Seen".*</div>.*alt="Drawn"', page('index.html'), re.S)

def test_layout_of_a_page(build):
    cells = [mk_cell('## A heading', 'markdown')]
    _,page = build(index=cells, wide=[mk_cell('---\ntitle: Wide\npage-layout: full\ntoc: false\n---', 'raw'), *cells])
    assert 'class="columns article"' in page('index.html') and 'id="toc"' in page('index.html')
    assert 'class="columns full no-toc"' in page('wide.html') and 'id="toc"' not in page('wide.html')

def test_section_within_a_section_is_folded(build):
    "As Quarto does from the second level on; open where it holds the page at hand"
    contents = ['index.ipynb', dict(section='Outer', contents=['a.ipynb', dict(section='Inner', contents=['b.ipynb'])])]
    _,page = build(contents, a=[], b=[])
    assert '<h2>Outer</h2>' in page('a.html') and re.search(r'<details><summary>Inner</summary>.*b\.html', page('a.html'))
    assert re.search(r'<details open><summary>Inner</summary>.*b\.html', page('b.html'))

def shown(f):
    from nbdev.showdoc import show_doc
    return show_doc(f, renderer='fastxtend_cl._showdoc.Renderer')._repr_markdown_()

def test_a_function_is_shown_with_a_short_signature_and_a_table(root):
    from nbdev.config import get_config
    assert get_config(root/'nbs').renderer=='fastxtend_cl._showdoc.Renderer'
    def few(a, b:int|None=None): "Does `this`\n\nAnd more."
    assert shown(few).endswith('few\n\n```{.python .signature}\nfew(a, b=None)\n```\n\nDoes `this`\n\nAnd more.')
    assert '.params' not in shown(few), 'nothing is described'
    def many(
        first:str|dict, # One of `a|b` or 'c'|d
        *rest,
        # The
        # second
        second:int|None=None,
        third=lambda: 0,
        long:str='x'*50, **kwargs,
    )->list[int]: # All
        "Does much"
    text = shown(many)
    assert 'many(\n    first,\n    *rest,\n    second=None,\n    third=...,\n    long=str(...),\n    **kwargs,\n)' in text
    for row in (r"| **first** [`str` or `dict`]{.type} | One of `a|b` or \'c\'\|d |", '| **second** [`int`, default `None`]{.type} | The second |', r'| **\*\*kwargs** |  |', '| **third** [default `...`]{.type} |  |', '| *Returns* [`list[int]`]{.type} | All |'): assert row in text.splitlines(), text

def test_classes_and_methods_are_shown(root):
    @dataclass
    class Result:
        "What came out"
        n:int # How many
        rows:list = field(default_factory=list)
        def table(self): "As text"
        @property
        def ok(self): "Whether all is well"
    class Failed(ValueError): "It failed"
    assert 'Result(n, rows=list())' in shown(Result) and '| **rows** [`list`, default `list()`]{.type} |  |' in shown(Result) and 'Returns' not in shown(Result)
    assert '\ntable()\n```\n\nAs text' in shown(Result.table) and '.params' not in shown(Result.table)
    assert '\nok\n```' in shown(Result.ok)
    assert 'class' in shown(Failed) and '(ValueError)' in shown(Failed)

@pytest.fixture(scope='module')
def compatibility(script): return script('benchmarks', 'compatibility')

@pytest.mark.parametrize('page,made', [('compatibility', 4), ('cheat_sheet', 4)])
def test_pages_are_made_from_the_results(root, script, page, made):
    "If this fails, `python benchmarks/compatibility.py` writes the pages anew"
    from IPython.display import HTML, Markdown
    names = vars(script('benchmarks', page)) | dict(HTML=HTML, Markdown=Markdown)
    found = 0
    for c in json.loads((root/f'nbs/{page}.ipynb').read_text())['cells']:
        src,outs = ''.join(c['source']),c.get('outputs', [])
        if not (outs and src.startswith('#| echo: false\n')): continue
        o = eval(src.removeprefix('#| echo: false\n'), names)
        kept = ''.join(outs[0]['data']['text/html' if isinstance(o, HTML) else 'text/markdown'])
        assert kept==o.data, src
        found += 1
    assert found==made

def test_the_recommended_calls_follow_from_the_results(script, monkeypatch):
    sheet = script('benchmarks', 'cheat_sheet')
    sheet.check_calls()
    monkeypatch.setattr(sheet, 'cpu_speeds', lambda arm, names=None: [1.2 if arm==sheet.fp32 else 1.1])
    with pytest.raises(AssertionError): sheet.check_calls()

zoo = dict(contiguous=dict(params=2e6, convolutions=3, shape=[2, 3, 8, 8]), ours=dict(kept=dict(forward=1., backward=0.5)), check=dict(ok=True, reason='fine', wrong=[]),
    naive={}, naive_check=dict(ok=True, reason=''), times=dict(ratio=dict(ours=1.2, naive=1.1)))

def rows(compatibility, monkeypatch, tmp_path, lines=(), **files):
    monkeypatch.setattr(compatibility, 'results', tmp_path)
    (tmp_path/'zoo-cpu.jsonl').write_text('\n'.join(json.dumps(l) for l in lines))
    for n,d in files.items(): (tmp_path/f'{n}-cpu.json').write_text(json.dumps(d))
    return compatibility.rows_of('cpu')

def cells(compatibility, row):
    "What the columns show of a model"
    return [c and f"{c['text']} {c['small']}".strip() for c in (f(row) for f in compatibility.columns.values())]

def test_outcomes_of_a_model(compatibility, monkeypatch, tmp_path):
    some = {'torchvision/a': {}, 'timm/crashes': dict(naive=dict(died=6), times=dict(ratio=dict(ours=0.9))), 'timm/raises': dict(naive=dict(raised='RuntimeError: no')), 'timm/hangs': dict(naive=dict(hung=300)),
        'timm/wrong': dict(check=dict(ok=False, reason='weights', wrong=['w'])), 'timm/unclear': dict(check=dict(ok=None, reason='rounding', wrong=[])), 'timm/naive_wrong': dict(naive_check=dict(ok=False, reason='')),
        'timm/ours_crashes': dict(ours=dict(died=11), check={}), 'timm/linear': dict(contiguous=dict(params=1, convolutions=0, shape=[1])), 'timm/never': dict(contiguous=dict(raised='no')), 'timm/timing': dict(times=dict(died=6))}
    found = rows(compatibility, monkeypatch, tmp_path, [dict(name=n, **{**zoo, **o}) for n,o in some.items()])
    def get(n): r = found[n]; return r['verdict'],r.get('naive'),r.get('screened'),'; '.join(r['notes'])
    assert get('torchvision/a')==('OK', 1.1, 1.2, '') and found['torchvision/a']['kept']==[1., 0.5]
    assert get('timm/crashes')==('OK', 'crashes', 0.9, 'slower in channels last when screened; `model.to(memory_format=...)` crashes the process')
    assert get('timm/raises')[1:]==('raises', 1.2, '`model.to(memory_format=...)` raises: RuntimeError: no')
    assert get('timm/hangs')[1]=='hangs' and get('timm/naive_wrong')[1]=='wrong'
    assert get('timm/wrong')[0]=='wrong' and 'weights' in get('timm/wrong')[3] and get('timm/unclear')[0]=='inconclusive' and 'rounding' in get('timm/unclear')[3]
    assert get('timm/ours_crashes')[0]=='crashes' and get('timm/linear')[0]=='no convolution' and get('timm/never')[0]=='raises when contiguous, too'
    assert get('timm/timing')[1:3]==(None, None) and 'crashed while' in get('timm/timing')[3]
    assert cells(compatibility, found['torchvision/a'])==['OK fp32', '100 / 50 %', '1.20 fp32, screened', 'OK']
    assert [cells(compatibility, found[f'timm/{n}'])[3] for n in ('crashes', 'raises', 'hangs', 'naive_wrong', 'timing')]==['crashes', 'raises', 'hangs', 'wrong', 'see details']
    assert cells(compatibility, found['timm/wrong'])[0]=='wrong fp32' and cells(compatibility, found['timm/linear'])==['no convolution', None, None, None]
    text = compatibility.table()
    assert text.count('<th scope="row">')==text.count('<tr class="more"')==len(some)
    assert 'Screened with 2x3x8x8: channels last fp32 1.20, naive conversion 1.10' in text and 'Parameters: 2.0 million' in text
    assert '1 crashed' in compatibility.summary() and '1 wrong' in compatibility.summary()

def test_later_results_fill_their_columns(compatibility, monkeypatch, tmp_path):
    "In the form that formats.py, peers.py, kernels.py and traces.py write them"
    def arm(model, arm, r): return dict(model=model, shape=[2, 3, 8, 8], arm=arm, ms=1., ratio=[r, r-0.1, r+0.1])
    cond = dict(conditions=dict(cpu='a cpu', gpu=None, cores=2, torch='2', fastai='2', date='today'))
    peers = [arm('a', 'contiguous fp32', 1.), arm('a', "fastai's to_channelslast()", 1.2), arm('a', 'ours: to_channelslast()', 8.), arm('a', 'torch.compile', 1.3), arm('a', 'ours: to_channelslast(), compiled', 1.7),
        arm('a', 'bench: channels last bf16', 9.), dict(model='a', arm='pytorch-autotune', failed='RuntimeError'), arm('unet_resnet18', 'torch.compile', 1.4)]
    kernels = dict(model='a', shape=[4, 3, 8, 8], rows=[arm('a', n, r) for n,r in {"fastai's to_channelslast()": 1.1, 'tune=False': 1.6, 'use_amp=False': 1.4, 'to_channelslast()': 1.9}.items()])
    trace = [dict(model='vgg', kept=dict(forward=1., backward=0.999), places=dict(forward=0, backward=2), share=0.013), dict(model='unet resnet34 self-attention', kept=dict(forward=1., backward=1.), places=dict(forward=0, backward=0), share=0)]
    (tmp_path/'zoo-tuned-cpu.jsonl').write_text(json.dumps(dict(name='torchvision/a', **{**zoo, 'ours': dict(zoo['ours'], corrected=['wgrad of one'])})))
    found = rows(compatibility, monkeypatch, tmp_path, [dict(name='torchvision/a', **zoo)], formats=dict(rows=[arm('a', 'channels last bf16', 5.)], **cond), peers=dict(rows=peers, **cond), kernels=dict(found=[kernels], **cond), trace=dict(rows=trace, **cond))
    assert set(found)=={'torchvision/a', 'fastai/unet+resnet18', 'torchvision/vgg', 'fastai/unet+resnet34+sa'}
    assert {k:v[0] for k,v in found['torchvision/a']['arms'].items()}=={'channels last fp32': 1.1, 'channels last mixed': 1.6, 'tuned fp32': 1.4, 'tuned': 1.9, 'compiled': 1.7}
    assert found['torchvision/a']['tuned_verdict']=='OK' and '1 kernel corrected' in found['torchvision/a']['notes']
    assert cells(compatibility, found['torchvision/a'])==['OK bf16', '100 / 50 %', '1.90 default call', 'OK']
    assert cells(compatibility, found['torchvision/vgg'])==['not checked', '100 / 99.9 % traced', None, None] and cells(compatibility, found['fastai/unet+resnet34+sa'])[1]=='kept traced'
    text = compatibility.table()
    assert '1.90 (1.80 to 2.00)' in text and '9.00' not in text and '8.00' not in text and 'Trace: 2 places lose the format, 1.3 % of the step' in text and 'Trace: the format is kept throughout' in text
    assert 'Measured with 4x3x8x8 (kernels-cpu.json)' in text and '(ours: to_channelslast(), compiled): 1.70 (1.60 to 1.80)' in text and 'Check in fp32: OK</li><li>Check in bf16, tuned: OK' in text
    assert re.search(r'\[peers-cpu\].* a cpu, 2 threads, torch 2, fastai 2, today\.', compatibility.machines())
