"""The tables of nbs/compatibility.ipynb, made from benchmarks/results: `python benchmarks/compatibility.py` updates that page and cheat_sheet.ipynb

The page calls these functions, so running it does the same. Networks that were not measured and columns without values are left out."""
import json, math, re, statistics
from collections import Counter
from html import escape
from pathlib import Path
from fastcore.script import call_parse

here = Path(__file__).resolve().parent
results,pages = here/'results',[here.parent/f'nbs/{n}.ipynb' for n in ('compatibility', 'cheat_sheet')]
repo = 'https://github.com/fastxtend-cl/fastxtend_cl/blob/main/benchmarks/results'
failures = {'died': 'crashes', 'hung': 'hangs', 'raised': 'raises'}
verdicts = {True: 'OK', False: 'wrong', None: 'inconclusive'}
arms = {'channels last fp32': 'channels last fp32', 'contiguous mixed': 'contiguous, mixed precision',
    'channels last mixed': 'channels last, mixed precision', 'tuned fp32': 'tuned, fp32',
    'tuned': '`to_channelslast()`: tuned, mixed precision', 'compiled': 'the fastest compiled model'}

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
    if isinstance(res['naive'], float): res['naive_verdict'] = verdicts[chk.get('ok')]
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
            if a := arms_of(f['rows'], n): (row := at(n, 'timm')).update(arms={**row.get('arms', {}), **a}, measured=(f'{name}-{device}.json', f['shape'] or next(r['shape'] for r in f['rows'] if 'shape' in r)))
    for r in res.values():
        if r.get('screened', 1)<0.97: r['notes'].insert(0, 'slower in channels last when screened')
    return dict(sorted(res.items(), key=lambda o: (o[0].partition('/')[2].lower(), o[0])))

ranks = ['wrong', 'crashes', 'hangs', 'raises', 'see details', 'inconclusive', 'OK'] # the order of a sorted column: problems first

def word_cell(word, small=''): return dict(text=word, small=small, sort=ranks.index(word) if word in ranks else '')

def check_cell(r):
    "The verdict on the tuned step in bf16 if there is one, or else on the step in fp32"
    tuned,fp32 = r.get('tuned_verdict'),r.get('verdict')
    if tuned and (tuned!='not checked' or not fp32): return word_cell(tuned, '' if tuned=='not checked' else 'bf16')
    return word_cell(fp32 or 'not checked', 'fp32' if fp32 in ranks else '')

def percent(v): return f'{math.floor(1000*v)/10:g}'

def kept_cell(r):
    "Format kept, forward and backward; nothing if unknown"
    if not (k := r.get('kept')): return
    text = 'kept' if min(k)==1 else f'{percent(k[0])} %' if k[0]==k[1] else f'{percent(k[0])} / {percent(k[1])} %'
    return dict(text=text, small='traced' if r.get('traced') else '', sort=min(k))

def speed_cell(r):
    "The best known figure: the default call as measured, or channels last in fp32 as measured or else screened"
    arms_ = r.get('arms', {})
    for k,small in {'tuned': 'default call', 'channels last fp32': 'fp32'}.items():
        if k in arms_: return dict(text=f'{arms_[k][0]:.2f}', small=small, sort=arms_[k][0])
    if v := r.get('screened'): return dict(text=f'{v:.2f}', small='fp32, screened', sort=v)

def naive_cell(r):
    v = r.get('naive')
    if isinstance(v, str): return word_cell(v)
    if any('timed side by side' in n for n in r['notes']): return word_cell('see details')
    return v and word_cell(r['naive_verdict'])

columns = {'Check': check_cell, 'Format kept': kept_cell, 'Speed': speed_cell, 'Naive conversion': naive_cell}

def code(text): return re.sub('`(.+?)`', r'<code>\1</code>', escape(text, quote=False))

def cell_html(c):
    if not c: return '<td></td>'
    value = ' data-v="{}"'.format(c['sort'] if isinstance(c['sort'], (int, str)) else f"{c['sort']:.4f}")
    return f"<td{value}>{escape(c['text'])}{' <small>'+c['small']+'</small>' if c['small'] else ''}</td>"

def details(r):
    "HTML: everything that is known of a model"
    def size(shape): return 'x'.join(map(str, shape))
    items = []
    if p := r.get('params'): items.append(f'Parameters: {p/1e6:.1f} million')
    if v := r.get('verdict'): items.append(f'Check in fp32: {v}')
    if v := r.get('tuned_verdict'): items.append(f'Check in bf16, tuned: {v}')
    if k := r.get('kept'): items.append(f"Format kept: {percent(k[0])} % forward, {percent(k[1])} % backward, of the {'elements of images, traced' if r.get('traced') else 'convolutions'}")
    found = [f'{w} {r[k]:.2f}' for k,w in (('screened','channels last fp32'), ('naive','naive conversion')) if isinstance(r.get(k), float)]
    if found: items.append(f"Screened with {size(r['shape'])}: {', '.join(found)}")
    if a := r.get('arms'):
        def arm(k, h): return f"<li>{code(h)}{' ('+code(a[k][3])+')' if k=='compiled' else ''}: {a[k][0]:.2f} ({a[k][1]:.2f} to {a[k][2]:.2f})</li>"
        items.append(f"Measured with {size(r['measured'][1])} ({r['measured'][0]}), with 95 % intervals: <ul>{''.join(arm(k, h) for k,h in arms.items() if k in a)}</ul>")
    items += [code(n[0].upper()+n[1:]) for n in r['notes']]
    return f"<ul>{''.join(f'<li>{i}</li>' for i in items)}</ul>"

def row(r, n):
    "HTML: the two lines of a model, whose second one is shown on demand"
    source,_,name = r['name'].partition('/')
    return f'''<tbody><tr><th scope="row"><button type="button" aria-expanded="false" aria-controls="{n}">{escape(name).replace('_', '_<wbr>')}</button> <small>{source}</small></th>{"".join(cell_html(f(r)) for f in columns.values())}</tr>
<tr class="more" id="{n}"><td colspan="{len(columns)+1}">{details(r)}</td></tr></tbody>'''

def table(device='cpu'):
    "HTML: a row for each model, with details on demand, which can be searched and sorted"
    rows,n = [*rows_of(device).values()],f'models-{device}'
    heads = ''.join(f'<th scope="col" aria-sort="none"><button type="button">{h}</button></th>' for h in ('Model', *columns))
    body = '\n'.join(row(r, f'{n}-{i}') for i,r in enumerate(rows))
    return f'''<div class="compat" id="{n}">
<p><label for="{n}-filter">Search for a model, a source or a word:</label> <input type="search" id="{n}-filter"> <span aria-live="polite">{len(rows)} of {len(rows)}</span></p>
<div class="scroll">
<table data-quarto-disable-processing="true"><caption>Models on {device.upper()}. Click a heading to sort, a model for its details.</caption>
<thead><tr>{heads}</tr></thead>
{body}
</table></div>
<script>
{script.replace('ID', n)}
</script></div>'''

script = '''(() => {
  const all = document.getElementById('ID'), table = all.querySelector('table'), bodies = [...table.tBodies], count = all.querySelector('[aria-live]')
  const heads = [...all.querySelectorAll('th[aria-sort]')], box = all.querySelector('input')
  all.classList.add('ready') // without this script all details are shown
  for (const b of bodies) {
    const button = b.querySelector('button')
    button.onclick = () => {
      button.setAttribute('aria-expanded', b.classList.toggle('open'))
      b.rows[1].cells[0].colSpan = heads.filter(h => h.offsetWidth).length // fewer on a phone
    }
  }
  box.oninput = () => {
    const words = box.value.toLowerCase().split(/\\s+/)
    for (const b of bodies) b.hidden = !words.every(w => b.textContent.toLowerCase().includes(w))
    count.textContent = bodies.filter(b => !b.hidden).length + ' of ' + bodies.length
  }
  heads.forEach((th, i) => th.firstChild.onclick = () => {
    const down = th.getAttribute('aria-sort') == 'ascending' ? -1 : 1
    for (const o of heads) o.setAttribute('aria-sort', o == th ? (down == 1 ? 'ascending' : 'descending') : 'none')
    const key = b => { const c = b.rows[0].cells[i]; return c.dataset.v ?? c.textContent.toLowerCase() }
    bodies.sort((a, b) => {
      const [x, y] = [key(a), key(b)]
      if (x === '' || y === '') return (x === '') - (y === '') // models without a value come last
      return down * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y)
    })
    table.append(...bodies)
  })
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
    top,step = max(counts.values()),400/n
    def x(v): return 10+400*(v-low)/(high-low)
    bars = [f'<rect x="{11+i*step:.1f}" y="{200-170*c/top:.1f}" width="{step-2:.1f}" height="{170*c/top:.1f}" fill="{"#d55e00" if low+(i+1)*width<1.001 else "#0072b2"}"/>'
        f'<text x="{10+(i+.5)*step:.1f}" y="{194-170*c/top:.1f}" text-anchor="middle">{c}</text>' for i,c in sorted(counts.items())]
    ticks = [f'<text x="{x(v/10):.1f}" y="216" text-anchor="middle">{v/10:g}</text>' for v in range(math.ceil(10*low+.001), math.floor(10*high)+1)]
    slower = sum(v<1 for v in ratios)
    return f'''<svg viewBox="0 0 420 240" role="img" aria-label="Histogram: of {len(ratios)} networks, {slower} are slower than contiguous and {len(ratios)-slower} are as fast or faster in channels last fp32" style="max-width:36rem;width:100%;height:auto" fill="currentColor" font-size="12" font-family="sans-serif">
<line x1="10" x2="410" y1="200" y2="200" stroke="currentColor"/>
{"".join(bars)}{"".join(ticks)}
<text x="210" y="235" text-anchor="middle">speed in channels last fp32 (contiguous: 1); networks per bar</text>
</svg>'''

def machines():
    "Markdown: the conditions of each file of results"
    lines = []
    what = {'zoo': 'screened: CPU time, median of 3 rounds, batches of 2 at 128 pixels or the size that the model requires; checked against double precision',
        'trace': 'traced, batches of 8 at 128 pixels', 'formats': 'measured: formats and precisions', 'peers': 'measured: other tools',
        'kernels': 'measured: tuned kernels', 'zoo-tuned': 'two training steps and a check of `to_channelslast()`, in bf16 with tuned kernels'}
    for device in devices():
        for name,text in what.items():
            if not (c := read(f'{name}-{device}.json').get('conditions')): continue
            threads = f"{c['cores']} thread{'s' if c['cores']!=1 else ''}"
            lines.append(f"- [{name}-{device}]({repo}/{name}-{device}.json): {text}. {c['gpu'] or c['cpu']}, {threads}, torch {c['torch']}, fastai {c['fastai']}, {c['date']}.")
    return '\n'.join(lines)

@call_parse
def main():
    "Run the pages and save them"
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    for page in pages:
        CaptureShell(path=page.parent).execute(page, page, exc_stop=True)
        nb = read_nb(page)
        clean_nb(nb)
        write_nb(nb, page)
        print(f'written: {page.relative_to(here.parent)}')
