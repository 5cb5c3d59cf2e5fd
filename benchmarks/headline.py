"""The table and the picture at the top of the README, made from results/peers-cpu.json and results/plan-cpu.json: `python benchmarks/headline.py`

Prints the table, which nbs/index.ipynb shows, and writes the picture to images/ and nbs/images/: for the README, and for the site."""
import json
from pathlib import Path
from xml.sax.saxutils import escape
from common import geometric, results

root = Path(__file__).resolve().parent.parent
peers = {"fastai's": "fastai's to_channelslast()", "fastxtend's": "fastxtend's to_channelslast()", "Composer's": "Composer's channels last",
    'torch.compile': 'torch.compile', 'ours': 'ours: to_channelslast()'}
planned,compiled = "ours, plan='auto'",'ours, plan and compile'

def read(name): return json.loads((results/f'{name}.json').read_text())

def rows():
    "For each network its name and batch, and the ratio to contiguous fp32 of each column"
    by_peer,res = {(r['model'],r['arm']): r['ratio'][0] for r in read('peers-cpu')['rows'] if 'ratio' in r},[]
    for f in read('plan-cpu')['found']:
        arms = {r['arm']: r['ratio'][0] for r in f['rows']}
        cols = {k: by_peer.get((f['model'],arm)) for k,arm in peers.items()} | {planned: arms['plan'], compiled: arms[f['allowed']['arm']]}
        res.append((f['model'], 'x'.join(map(str, f['shape'])), cols))
    return res

def means(found):
    "Geometric mean of each column that every network has"
    return {k: geometric([c[k] for *_,c in found]) for k in found[0][2] if all(c[k] for *_,c in found)}

def table(found):
    "Markdown, the fastest of each row in bold"
    def line(name, cols):
        best = max(f'{v:.2f}' for v in cols.values() if v)
        return f"| {name} | {' | '.join('' if not v else f'**{v:.2f}**' if f'{v:.2f}'==best else f'{v:.2f}' for v in cols.values())} |"
    names = [*found[0][2]]
    lines = [f"| network, batch | {' | '.join(names)} |", '|---|'+'--:|'*len(names), *[line(f'{n}, {shape}', c) for n,shape,c in found]]
    m = means(found)
    return '\n'.join([*lines, line('geometric mean', {k: m.get(k) for k in names})])

colors = {"fastai's": '#8b97a3', 'ours': '#3b78b5', planned: '#d9541e'}

def text(x, y, s, **kw):
    attrs = ' '.join(f'{k.replace("_", "-")}="{v}"' for k,v in kw.items())
    return f'<text x="{x}" y="{y:.1f}" {attrs}>{escape(s)}</text>'

def svg(found, width=400, left=134, bar=9, row=37, top=66):
    "Bars for each network, as wide as a phone"
    shown = [*[(n, c) for n,_,c in found], ('geometric mean', means(found))]
    most,height = max(v for _,c in shown for k,v in c.items() if k in colors),top+row*len(shown)+8
    unit = (width-left-36)/most
    about = 'Training speed as a multiple of contiguous fp32: ' + '; '.join(f'{n} ' + ', '.join(f'{k} {c[k]:.2f}' for k in colors if c.get(k)) for n,c in shown)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-family="sans-serif" font-size="12" fill="#1d2733">',
        f'<title>{escape(about)}</title>', f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>', text(10, 20, 'Training speed, contiguous fp32 = 1 (longer is faster)', font_weight='bold')]
    x = 10
    for k,color in colors.items():
        out += [f'<rect x="{x}" y="33" width="11" height="11" fill="{color}"/>', text(x+16, 43, k)]
        x += 40+7*len(k)
    out.append(f'<line x1="{left+unit:.1f}" x2="{left+unit:.1f}" y1="{top-8}" y2="{height-8}" stroke="#1d2733" stroke-width="1" stroke-dasharray="3 3"/>')
    for i,(n,c) in enumerate(shown):
        y = top+i*row
        out.append(text(left-8, y+18, n, text_anchor='end', **({'font_weight': 'bold'} if n=='geometric mean' else {})))
        for j,(k,color) in enumerate((k,o) for k,o in colors.items() if c.get(k)):
            out += [f'<rect x="{left}" y="{y+j*(bar+1)}" width="{c[k]*unit:.1f}" height="{bar}" fill="{color}"/>', text(f'{left+c[k]*unit+4:.1f}', y+j*(bar+1)+bar-0.5, f'{c[k]:.2f}', font_size=10, stroke='#ffffff', stroke_width=3, paint_order='stroke')]
    return '\n'.join([*out, '</svg>'])+'\n'

if __name__=='__main__':
    found = rows()
    for folder in (root/'images', root/'nbs/images'):
        folder.mkdir(exist_ok=True)
        (folder/'speed.svg').write_text(svg(found))
    print(table(found))
