"""The table and the picture at the top of the README, made from results/kernels-cpu.json: `python benchmarks/headline.py`

Prints the table and the figures that nbs/index.ipynb shows, and writes the picture to images/ and nbs/images/: for the README, and for the site."""
from pathlib import Path
from xml.sax.saxutils import escape
from fastcore.script import call_parse
from common import geometric, markdown, read
from networks import models

root = Path(__file__).resolve().parent.parent
columns = {'fastai': "fastai's to_channelslast()", 'ours, fp32': 'use_amp=False', 'ours, not tuned': 'tune=False', 'ours': 'to_channelslast()'}

def rows():
    "For each of the twelve networks its name and batch, and the ratio to contiguous fp32 of each column"
    res = []
    for f in read('kernels-cpu')['found']:
        if f['model'] not in models: continue
        arms = {r['arm']: r['ratio'][0] for r in f['rows']}
        res.append((f['model'], 'x'.join(map(str, f['shape'])), {k: arms.get(a, 'fails') for k,a in columns.items()}))
    return res

def means(found):
    "Geometric mean of each column that has a figure for every network"
    return {k: geometric([c[k] for _,_,c in found]) for k in columns if all(isinstance(c[k], float) for _,_,c in found)}

def claims():
    "What else the README says of these results: the other networks, and the time of tuning"
    found = read('kernels-cpu')['found']
    others = [r['ratio'][0] for f in found if f['model'] not in models for r in f['rows'] if r['arm']==columns['ours']]
    tuning = [f['to_channelslast()']['tuning'] for f in found if f['model'] in models]
    return [f'{geometric(others):.2f} ({min(others):.2f} to {max(others):.2f})', f'{min(tuning):.1f} to {max(tuning):.1f} seconds']

def table(found):
    "Markdown, the fastest of each row in bold"
    def line(name, cols):
        best = max(f'{v:.2f}' for v in cols.values() if isinstance(v, float))
        def cell(v): return v or '' if not isinstance(v, float) else f'**{v:.2f}**' if f'{v:.2f}'==best else f'{v:.2f}'
        return [name, *map(cell, cols.values())]
    m = means(found)
    return markdown(['network, batch', *columns], [*[line(f'{n}, {shape}', c) for n,shape,c in found], line('geometric mean', {k: m.get(k) for k in columns})])

colors = {'fastai': '#7d8894', 'ours': '#d9541e'}
style = """<style>
text { fill: #1d2733 } .ground { fill: #ffffff } line { stroke: #1d2733 } .figure { stroke: #ffffff; stroke-width: 3; paint-order: stroke }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .ground { fill: #14181d } line { stroke: #e6edf3 } .figure { stroke: #14181d }
}
</style>"""

def text(x, y, s, **kw):
    attrs = ' '.join(f'{k.rstrip("_").replace("_", "-")}="{v}"' for k,v in kw.items())
    return f'<text x="{x}" y="{y:.1f}" {attrs}>{escape(s)}</text>'

def svg(found, width=360, left=134, bar=13, row=37, top=70):
    "Bars for each network, as wide as a phone, in the reader's light or dark"
    drawn = [*[(n, {k: c[k] for k in colors}) for n,_,c in found], ('geometric mean', {'ours': means(found)['ours']})]
    most,height = max(v for _,c in drawn for v in c.values() if isinstance(v, float)),top+row*len(drawn)+4
    def say(v): return f'{v:.2f}' if isinstance(v, float) else v
    unit = (width-left-40)/most
    figures = '; '.join(f'{n} ' + ', '.join(f'{k} {say(v)}' for k,v in c.items()) for n,c in drawn)
    about = f'Training speed as a multiple of contiguous fp32: {figures}'
    head = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {head} font-family="sans-serif" font-size="13">', f'<title>{escape(about)}</title>', style,
        f'<rect width="{width}" height="{height}" rx="6" class="ground"/>', text(10, 22, 'Training speed, contiguous fp32 = 1', font_weight='bold')]
    x = 10
    for k,label in {'fastai': "fastai's channels last", 'ours': 'ours'}.items():
        out += [f'<rect x="{x}" y="37" width="12" height="12" fill="{colors[k]}"/>', text(x+18, 48, label)]
        x += 176
    one = f'{left+unit:.1f}'
    out.append(f'<line x1="{one}" x2="{one}" y1="{top-8}" y2="{height-4}" stroke-width="1" stroke-dasharray="3 3"/>')
    for i,(n,c) in enumerate(drawn):
        y = top+i*row
        out.append(text(left-8, y+18, n, text_anchor='end', **({'font_weight': 'bold'} if n=='geometric mean' else {})))
        for j,(k,color) in enumerate(colors.items()):
            if k not in c: continue
            wide,at = c[k]*unit if isinstance(c[k], float) else 0.,y+j*(bar+1)
            out += [f'<rect x="{left}" y="{at}" width="{wide:.1f}" height="{bar}" fill="{color}"/>',
                text(f'{left+wide+4:.1f}', at+bar-2, say(c[k]), font_size=12, class_='figure')]
    return '\n'.join([*out, '</svg>'])+'\n'

@call_parse
def main():
    "Write the picture and print the table"
    found = rows()
    for folder in (root/'images', root/'nbs/images'):
        folder.mkdir(exist_ok=True)
        (folder/'speed.svg').write_text(svg(found))
    print(table(found), *claims(), sep='\n')
