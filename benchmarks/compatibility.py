"""The tables of nbs/compatibility.ipynb, made from benchmarks/results: `python benchmarks/compatibility.py` updates the page after a measurement

The page calls these functions, so running the page does the same. Networks that were not measured and columns without values are left out."""
import json, math, re, statistics
from collections import Counter
from html import escape
from pathlib import Path
from fastcore.script import call_parse

here = Path(__file__).resolve().parent
results,page = here/'results',here.parent/'nbs/compatibility.ipynb'
repo = 'https://github.com/fastxtend-cl/fastxtend_cl/blob/main/benchmarks/results'
failures = {'died': 'crashes', 'hung': 'hangs', 'raised': 'raises'}
verdicts = {True: 'OK', False: 'wrong', None: 'inconclusive'}
arms = {'channels last fp32': 'channels last fp32', 'contiguous mixed': 'contiguous, mixed precision',
    'channels last mixed': 'channels last, mixed precision', 'tuned fp32': 'tuned, fp32',
    'tuned': '`to_channelslast()`: tuned, mixed precision', 'compiled': 'compiled, the fastest'}

def read(name):
    p = results/name
    if not p.exists(): return [] if name.endswith('l') else {}
    return [json.loads(l) for l in p.read_text().splitlines()] if name.endswith('l') else json.loads(p.read_text())

def devices(): return sorted({m[1] for p in results.iterdir() if (m := re.fullmatch(r'(?:zoo|zoo-tuned|trace|formats|peers|kernels)-(cpu|cuda|mps|xpu)\.jsonl?', p.name))})

def full_name(name, known, other):
    "`source/model` for the name that a benchmark uses; torchvision's if several packages have it"
    name = re.sub('^unet[ _]', 'unet+', name).replace(' self-attention', '+sa')
    if name.startswith('unet+'): return f'fastai/{name}'
    return next((f for s in ('torchvision', 'video', 'timm') if (f := f'{s}/{name}') in known), f'{other}/{name}')

def failed(o): return next((w for k,w in failures.items() if k in o), None)

def reason_of(chk):
    "The reason of a check, in the words of today: older results say it in others"
    reason = re.sub('^rounding alone moves (.+) of (.+) results by half their size or more', r'\1 of \2 results are too sensitive to rounding to judge', chk['reason'])
    return re.sub(', (.+) are free:', r' and \1 is free:', reason)

def naive_note(word, raised):
    text = dict(crashes='crashes the process', hangs='never ends', raises=f'raises: {raised}')[word]
    return f'`model.to(memory_format=...)` {text}'

def zoo_row(r):
    "What the zoo found of a model"
    chk,ratio,res = r.get('check', {}),r.get('times', {}).get('ratio', {}),dict(name=r['name'], notes=[])
    if word := failed(r['contiguous']): return res | dict(verdict=f'{word} when contiguous, too')
    res |= dict(params=r['contiguous']['params'], shape=r['contiguous']['shape'])
    if not r['contiguous']['convolutions']: return res | dict(verdict='no convolution')
    word = failed(r.get('ours', {})) or failed(chk)
    res['verdict'] = word or verdicts.get(chk.get('ok', ''), 'not checked')
    if word: res['notes'].append(f"{word}: {(r['ours'] | chk).get('raised', '')}".strip(': '))
    if res['verdict']=='OK' and 'one by one' in chk['reason']: res['notes'].append('checked layer by layer: the whole step does not fit into memory in double precision')
    if res['verdict'] in ('wrong', 'inconclusive'): res['notes'].append(reason_of(chk))
    kept = r.get('ours', {}).get('kept')
    if isinstance(kept, dict) and 'forward' in kept: res['kept'] = [kept['forward'], kept['backward']]
    if 'ours' in ratio: res['screened'] = ratio['ours']
    naive,chk = r.get('naive', {}),r.get('naive_check', {})
    res['naive'] = failed(naive) or failed(chk) or ('wrong' if chk.get('ok') is False else ratio.get('naive'))
    if res['naive'] in failures.values(): res['notes'].append(naive_note(res['naive'], naive.get('raised', chk.get('raised', ''))))
    if word := failed(r.get('times', {})):
        text = dict(crashes='crashed', hangs='hung', raises='raised an error')[word]
        res['notes'].append(f'the process {text} while this conversion and a naive one were timed side by side; this one alone had passed its check')
    return res

def arms_of(rows, name):
    "Ratio and interval for each column, from the rows of one model in formats, peers or kernels; the fastest of compiled arms"
    res = {}
    for r in rows:
        if 'ratio' not in r: continue
        if 'compile' in r['arm'] or r['arm']=='pytorch-autotune':
            if 'compile' in r['arm'] and ('compiled' not in res or r['ratio'][0]>res['compiled'][0]): res['compiled'] = [*r['ratio'], r['arm']]
            continue
        known = {"fastai's to_channelslast()": 'channels last fp32', 'tune=False': 'channels last mixed', 'use_amp=False': 'tuned fp32',
            'to_channelslast()': 'tuned'}
        k = known.get(r['arm'], re.sub(' (bf16|fp16)$', ' mixed', r['arm']))
        if k in arms: res[k] = [*r['ratio'], re.sub('^ours: ', '', r['arm'])]
    return res

def rows_of(device):
    "A dict for each model, by its full name"
    res = {r['name']: zoo_row(r) for r in read(f'zoo-{device}.jsonl')}
    def at(n, other): return res.setdefault(f := full_name(n, res, other), dict(name=f, notes=[]))
    for t in read(f'trace-{device}.json').get('rows', []):
        r,places = at(t['model'], 'torchvision'),sum(t['places'].values())
        if 'kept' not in r: r['kept'],r['traced'] = [t['kept']['forward'], t['kept']['backward']],True
        r['notes'].append('trace: the format is kept throughout' if not places else
            f"trace: {places} place{'s lose' if places>1 else ' loses'} the format, {100*t['share']:.1f} % of the step")
    for r in read(f'zoo-tuned-{device}.jsonl'):
        row = res.setdefault(r['name'], dict(name=r['name'], notes=[]))
        row['tuned_verdict'] = zoo_row(r)['verdict']
        if n := len(r.get('ours', {}).get('corrected', [])): row['notes'].append(f"{n} kernel{'s' if n>1 else ''} corrected")
    for name in ('formats', 'peers', 'kernels'): # a later file replaces the arms that both have
        d = read(f'{name}-{device}.json')
        found = {f['model']: f for f in d.get('found', [])}
        for r in d.get('rows', []): found.setdefault(r['model'], dict(rows=[], shape=r.get('shape')))['rows'].append(r)
        for n,f in found.items():
            if a := arms_of(f['rows'], n): (row := at(n, 'timm')).update(arms={**row.get('arms', {}), **a}, measured=(name, f['shape'] or next(r['shape'] for r in f['rows'] if 'shape' in r)))
    for r in res.values():
        if r.get('screened', 1)<0.97: r['notes'].insert(0, 'slower in channels last when screened')
        if m := r.get('measured'): r['notes'].append(f"measured with {'x'.join(map(str, m[1]))} ({m[0]}-{device}.json)")
    return dict(sorted(res.items(), key=lambda o: (o[0].partition('/')[2].lower(), o[0])))

def number(v, text=None, title=''): return dict(text=f'{v:.2f}' if text is None else text, sort=v, title=title)

def columns(rows):
    "(group, heading, function from a row to its cell) of each column that is not empty"
    def ratio(k):
        def cell(r):
            if k not in r.get('arms', {}): return
            v,low,high,arm = r['arms'][k]
            return number(v, f'{v:.2f} ({low:.2f} to {high:.2f})', arm)
        return cell
    def kept(i): return lambda r: r.get('kept') and number(r['kept'][i], f"{math.floor(1000*r['kept'][i])/10:g} %{' †' if r.get('traced') else ''}", 'share of image elements, traced' if r.get('traced') else 'share of convolutions')
    def naive(r):
        v = r.get('naive')
        return v and (number(v) if isinstance(v, float) else dict(text=v, sort=-1))
    cols = [('', 'Source', lambda r: dict(text=r['name'].partition('/')[0])), ('', 'Parameters, millions', lambda r: r.get('params') and number(r['params']/1e6, f"{r['params']/1e6:.1f}")),
        ('Check', 'in fp32', lambda r: r.get('verdict') and dict(text=r['verdict'])),
        ('Check', 'in bf16, tuned', lambda r: r.get('tuned_verdict') and dict(text=r['tuned_verdict'])),
        ('Format kept', 'forward', kept(0)), ('Format kept', 'backward', kept(1)),
        ('Screened', 'channels last fp32', lambda r: r.get('screened') and number(r['screened'], title=f"input {'x'.join(map(str, r['shape']))}")), ('Screened', 'naive conversion', naive),
        *(('Measured, with interval', h, ratio(k)) for k,h in arms.items()), ('', 'Notes', lambda r: r['notes'] and dict(text='; '.join(r['notes'])))]
    return [c for c in cols if any(c[2](r) for r in rows)]

def cell_html(c):
    if not c: return '<td></td>'
    text = re.sub('`(.+?)`', r'<code>\1</code>', escape(c['text'], quote=False))
    value = ' data-v="{:.4f}"'.format(c['sort']) if 'sort' in c else ''
    title = ' title="{}"'.format(escape(c['title'])) if c.get('title') else ''
    return f'<td{value}{title}>{text}</td>'

def table(device='cpu'):
    "HTML: a row for each model, which can be searched and sorted"
    rows = [*rows_of(device).values()]
    cols,n = columns(rows),f'models-{device}'
    groups = [(g, sum(c[0]==g for c in cols)) for g in dict.fromkeys(c[0] for c in cols) if g]
    def th(h, span=''): return f'<th scope="col" aria-sort="none"{span}><button type="button">{escape(h)}</button></th>'
    top,second = [th('Model', ' rowspan="2"')],[]
    for i,(g,h,_) in enumerate(cols):
        if not g: top.append(th(h, ' rowspan="2"')); continue
        if cols[i-1][0]!=g: top.append(f'<th scope="colgroup" colspan="{dict(groups)[g]}">{g}</th>')
        second.append(th(h))
    body = '\n'.join(f'<tr><th scope="row">{escape(r["name"].partition("/")[2])}</th>{"".join(cell_html(f(r)) for *_,f in cols)}</tr>' for r in rows)
    return f'''<div class="compat" id="{n}">
<p><label for="{n}-filter">Search for a model, a source or a word:</label> <input type="search" id="{n}-filter"> <span aria-live="polite">{len(rows)} of {len(rows)}</span></p>
<div class="scroll" tabindex="0" role="region" aria-label="Models on {device}, scrollable">
<table data-quarto-disable-processing="true"><caption>Models on {device}. Click a heading to sort by its column.</caption>
<thead><tr>{"".join(top)}</tr><tr>{"".join(second)}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<script>
{script.replace('ID', n)}
</script></div>'''

script = '''(() => {
  const all = document.getElementById('ID'), body = all.querySelector('tbody'), rows = [...body.rows], count = all.querySelector('[aria-live]')
  const heads = [...all.querySelectorAll('th[aria-sort]')], box = all.querySelector('input')
  // The position of each heading among the cells of a row: a group of the first line spans several
  const [first, second] = all.querySelectorAll('thead tr'), order = [], under = [...second.cells]
  for (const th of first.cells) order.push(...(th.scope == 'colgroup' ? under.splice(0, th.colSpan) : [th]))
  box.oninput = () => {
    const words = box.value.toLowerCase().split(/\\s+/)
    for (const r of rows) r.hidden = !words.every(w => r.textContent.toLowerCase().includes(w))
    count.textContent = rows.filter(r => !r.hidden).length + ' of ' + rows.length
  }
  for (const th of heads) th.firstChild.onclick = () => {
    const i = order.indexOf(th), down = th.getAttribute('aria-sort') == 'ascending' ? -1 : 1
    for (const o of heads) o.setAttribute('aria-sort', o == th ? (down == 1 ? 'ascending' : 'descending') : 'none')
    const key = r => r.cells[i].dataset.v ?? r.cells[i].textContent.toLowerCase()
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)]
      if (x === '' || y === '') return (x === '') - (y === '') // rows without a value come last
      return down * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y)
    })
    body.append(...rows)
  }
})()'''

def summary(device='cpu'):
    "Markdown: the zoo in a few sentences"
    rows = [r for r in rows_of(device).values() if r.get('verdict', 'no convolution')!='no convolution']
    verdict,naive = Counter(r['verdict'] for r in rows),Counter(r['naive'] for r in rows if isinstance(r.get('naive'), str))
    ratios = [r['screened'] for r in rows if 'screened' in r]
    lost = sum(min(r.get('kept', [1]))<1 for r in rows)
    words = ', '.join(f'{v} {k}' for k,v in verdict.most_common())
    says = dict(crashes='{} crashed', hangs='{} never ended', raises='{} raised an error', wrong='{} computed wrong results')
    naively = [says[k].format(v) for k,v in naive.most_common()]
    if crashed := sum('crashed while' in n for r in rows for n in r['notes']): naively.append(f'{crashed} more crashed while both conversions were timed side by side')
    return f'''On {device}, of {len(rows)} networks with convolutions: {words}. Channels last in fp32 on one thread: {sum(r>1.05 for r in ratios)} are more than 5 % faster, {sum(r<0.97 for r in ratios)} more than 3 % slower, the median is {statistics.median(ratios):.2f}. {lost} lose the format somewhere. The naive conversion, `model.to(memory_format=torch.channels_last)`: {", ".join(naively) or "no failures"}.'''

def histogram(device='cpu', low=0.7, high=1.6, width=0.05):
    "SVG: how many networks gain how much, as screened"
    ratios = [r['screened'] for r in rows_of(device).values() if 'screened' in r]
    n = round((high-low)/width)
    counts = Counter(min(n-1, max(0, math.floor((v-low)/width+1e-9))) for v in ratios)
    top,step = max(counts.values()),640/n
    def x(v): return 40+640*(v-low)/(high-low)
    bars = [f'<rect x="{41+i*step:.1f}" y="{200-170*c/top:.1f}" width="{step-2:.1f}" height="{170*c/top:.1f}" fill="{"#d55e00" if low+(i+1)*width<1.001 else "#0072b2"}"/>'
        f'<text x="{40+(i+.5)*step:.1f}" y="{194-170*c/top:.1f}" text-anchor="middle">{c}</text>' for i,c in sorted(counts.items())]
    ticks = [f'<text x="{x(v/10):.1f}" y="218" text-anchor="middle">{v/10:g}</text>' for v in range(math.ceil(10*low+.001), math.floor(10*high)+1)]
    slower = sum(v<1 for v in ratios)
    return f'''<svg viewBox="0 0 720 245" role="img" aria-label="Histogram: of {len(ratios)} networks, {slower} are slower than contiguous and {len(ratios)-slower} are as fast or faster in channels last fp32" style="min-width:34rem;max-width:45rem;width:100%;height:auto" fill="currentColor" font-size="12" font-family="sans-serif">
<line x1="40" x2="680" y1="200" y2="200" stroke="currentColor"/>
{"".join(bars)}{"".join(ticks)}
<text x="360" y="238" text-anchor="middle">speed in channels last fp32, contiguous is 1 (networks per bar; the outer bars include all beyond)</text>
</svg>'''

def machines():
    "Markdown: the conditions of each file of results"
    lines = ['| results | what | machine | threads | torch | fastai | date |', '|---|---|---|--:|---|---|---|']
    what = {'zoo': 'screened: CPU time, median of 3 rounds, batches of 2 at 128 pixels or the size that the model requires; checked against double precision',
        'trace': 'traced, batches of 8 at 128 pixels', 'formats': 'measured: formats and precisions', 'peers': 'measured: other tools',
        'kernels': 'measured: tuned kernels', 'zoo-tuned': 'two training steps and a check of `to_channelslast()`, in bf16 with tuned kernels'}
    for device in devices():
        for name,text in what.items():
            if not (c := read(f'{name}-{device}.json').get('conditions')): continue
            lines.append(f"| [{name}-{device}]({repo}/{name}-{device}.json) | {text} | {c['gpu'] or c['cpu']} | {c['cores']} | {c['torch']} | {c['fastai']} | {c['date']} |")
    return '\n'.join(lines)

@call_parse
def main():
    "Run the page and save it"
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    CaptureShell(path=page.parent).execute(page, page, exc_stop=True)
    nb = read_nb(page)
    clean_nb(nb)
    write_nb(nb, page)
    print(f'written: {page.relative_to(here.parent)}')
