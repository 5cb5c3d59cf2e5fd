"""Do the cells of one of fastai's own notebooks run with this package? `python fastai_cells.py NOTEBOOK MODE`, in a new folder;
`peers_tests.py --fastai-nbs FOLDER` does that for all

Cells that need a GPU or a download are left out. MODE is 'plain', 'imported' (with this package imported) or 'converted' (also with each
Learner in channels last, tuned, in fp32). The notebook's exports are taken from the installed fastai; small data sets of random images
replace MNIST, pets and CamVid. Prints one line of JSON: cell number to 'ok' or its error."""
import contextlib, importlib, io, json, re, sys, warnings
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot, numpy as np, torch
from PIL import Image
from fastcore.script import call_parse

skipped = r'^\s*#\s*\|\s*(export|exporti|exports|slow|cuda|distributed|default_exp|eval:\s*false)|^\s*[!%]|nbdev_export\(|show_doc\(|^\s*from nbdev|urlsave|download_'

def image(path, size, mode='RGB', high=256):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode=='RGB' else size
    Image.fromarray(np.random.randint(0, high, shape, dtype=np.uint8)).save(path)

def data_sets(folder):
    "Folders in the structure of fastai's"
    for part,n in (('train', 40), ('valid', 20)):
        for c in '37':
            for i in range(n): image(folder/f'mnist_tiny/{part}/{c}/{i}.png', (28, 28), 'L')
    labels = [f'{p}/{c}/{i}.png,{c}' for p,n in (('train', 40), ('valid', 20)) for c in '37' for i in range(n)]
    (folder/'mnist_tiny/labels.csv').write_text('\n'.join(['name,label', *labels]))
    for breed in ('Abyssinian', 'beagle', 'Bombay'):
        for i in range(30): image(folder/f'oxford-iiit-pet/images/{breed}_{i}.jpg', (64, 48))
    for i in range(10):
        image(folder/f'camvid_tiny/images/{i}.png', (96, 128)); image(folder/f'camvid_tiny/labels/{i}_P.png', (96, 128), 'L', 5)
    (folder/'camvid_tiny/codes.txt').write_text('\n'.join('abcde'))

def stand_in(folder):
    def untar_data(url, *args, **kwargs):
        name = {'mnist_sample': 'mnist_tiny', 'camvid': 'camvid_tiny'}.get(n := Path(str(url)).name.split('.')[0], n)
        if not (folder/name).exists(): raise FileNotFoundError(f'no stand-in for {name}')
        return folder/name
    return untar_data

def convert_learners():
    from fastai.learner import Learner
    own = Learner.__init__
    def init(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.to_channelslast(use_amp=False)
    Learner.__init__ = init

def cells(path):
    for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        s = ''.join(c['source'])
        if re.search(skipped, s, re.M): s = '\n'.join(re.findall(r'^if \w+ not in defaults\.callbacks:.*', s, re.M)) # what it does besides definitions
        if c['cell_type']=='code' and s.strip(): yield i,s

def default_callbacks(path):
    "Those that the notebook begins with; some cells test their number, events and outputs"
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import CastToTensor, Recorder, TrainEvalCallback
    if 'default_exp learner"' in (text := path.read_text(encoding='utf-8')): return [TrainEvalCallback]
    return [TrainEvalCallback, Recorder, CastToTensor, *[ProgressCallback]*bool(re.search(r'callback\.progress|(vision|text|tabular|fastai)\.all import', text))]

def namespace(path):
    "What the notebook's module has"
    m = re.search(r'default_exp ([\w.]+)', path.read_text(encoding='utf-8'))
    return {**(vars(importlib.import_module(f'fastai.{m[1]}')) if m else {}), '__name__': '__main__'}

def prepare(mode):
    "Data sets, and Learners as the mode says"
    import fastai.vision.all, fastai.test_utils
    data_sets(data := Path('data').absolute())
    if mode!='plain': import fastxtend_cl.all
    if mode=='converted': convert_learners()
    untar = stand_in(data)
    for m in [m for n,m in sys.modules.items() if n.startswith('fastai')]:
        if hasattr(m, 'untar_data'): m.untar_data = untar

def run_cells(path, mode):
    "Cell number to 'ok' or its error"
    import fastai.learner, fastai.test_utils
    ns,res = {**vars(fastai.test_utils), **namespace(path)},{}
    fastai.learner.defaults.callbacks = default_callbacks(path)
    for i,s in cells(path):
        if mode=='converted' and re.search(r'len\(\w+\.cbs\)', s): continue # there is one more
        torch.manual_seed(i); np.random.seed(i)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                exec(compile(s, f'cell {i}', 'exec'), ns)
            res[i] = 'ok'
        except (Exception, SystemExit) as e: res[i] = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
        matplotlib.pyplot.close('all')
    return res

@call_parse
def main(
    notebook:str, # Path of the notebook
    mode:str, # 'plain', 'imported' or 'converted'
):
    "Run the cells and print a line of JSON"
    prepare(mode)
    print(json.dumps(run_cells(Path(notebook).resolve(), mode)))
