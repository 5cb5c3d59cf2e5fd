"""The layers that `sentinel.py` runs: `python benchmarks/layers.py` collects them and writes layers.json

Those of the networks of the compatibility page, with the number of networks that have them, and random convolutions as in `faults.py`.
A layer is a class of `torch.nn`, its arguments and the shape of its input. Batch, then height and width, are halved until a layer has
at most 40 million multiplications, so that double precision is fast enough."""
import inspect, json, math, random, warnings
from collections import defaultdict
from pathlib import Path
import torch
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from torch import nn
from faults import draw, usable
from sentinel_worker import with_tuples
from zoo import build

path = Path(__file__).resolve().parent/'layers.json'
most = 40e6 # multiplications
convs = 'Conv1d', 'Conv2d', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d'
others = ('BatchNorm2d', 'BatchNorm3d', 'InstanceNorm2d', 'InstanceNorm3d', 'GroupNorm', 'MaxPool2d', 'MaxPool3d', 'AvgPool2d', 'AvgPool3d',
    'AdaptiveAvgPool2d', 'AdaptiveAvgPool3d', 'Upsample', 'PixelShuffle', 'PixelUnshuffle', 'ReLU', 'ReLU6', 'LeakyReLU', 'SiLU', 'Hardswish', 'Hardsigmoid',
    'GELU', 'Sigmoid', 'Mish', 'ELU', 'PReLU')

def plain(v):
    "As one writes it, and as JSON returns it: one number for several that are equal"
    if isinstance(v, (tuple, list)): return v[0] if len({*v})==1 else [*v]
    return v

def described(m):
    "The class of `torch.nn` that a module is of, and the arguments that differ from the defaults"
    cls = next((c for c in type(m).__mro__ if c.__module__.startswith('torch.nn.') and c.__name__ in (*convs, *others)), None)
    if cls is None: return
    kw = {}
    for k,p in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue # it has no `__init__` of its own
        v = plain(getattr(m, k, p.default))
        if k=='bias' and cls.__name__ in convs: v = m.bias is not None
        if k in ('device', 'dtype', 'inplace', '_stacklevel'): continue
        if isinstance(v, (torch.Tensor, nn.Parameter)): continue
        if v!=plain(p.default) or p.default is p.empty: kw[k] = v
    return cls.__name__,kw

def multiplications(name, kw, shape):
    "Of a convolution's forward pass; of other layers the elements"
    if name not in convs: return math.prod(shape)*20
    transposed = name.startswith('ConvTranspose')
    def each(k, default): return v if isinstance(v := kw.get(k, default), list) else [v]*(len(shape)-2)
    kernel,stride = each('kernel_size', 1),each('stride', 1)
    positions = math.prod(shape[2:]) if transposed else math.prod(-(-n//s) for n,s in zip(shape[2:], stride))
    return shape[0]*positions*math.prod(kernel)*kw['in_channels']*kw['out_channels']/kw.get('groups', 1)

def reduced(name, kw, shape):
    shape = [*shape]
    while multiplications(name, kw, shape)>most and shape[0]>1: shape[0] //= 2
    while multiplications(name, kw, shape)>most and min(shape[2:])>16: shape[2:] = [n//2 for n in shape[2:]]
    return shape

def runs(layer, kwargs, x):
    "Whether a layer takes an input of this shape: some networks pad it first"
    try:
        with torch.device('meta'): getattr(nn, layer)(**with_tuples(kwargs))(torch.empty(x))
    except RuntimeError: return False
    return True

def of_network(name, own_size=False):
    "Layers of a network, each once"
    model,x = build(name, batch=8, own_size=own_size)
    found = set()
    def hook(m, args, out):
        if not args or not isinstance(args[0], torch.Tensor) or args[0].ndim not in (3, 4, 5) or (d := described(m)) is None: return
        layer = dict(layer=d[0], kwargs=d[1], x=reduced(*d, args[0].shape))
        if runs(**layer): found.add(json.dumps(layer))
    for m in model.modules(): m.register_forward_hook(hook)
    try:
        with torch.no_grad(): model(x)
    except (RuntimeError, AssertionError, IndexError):
        if own_size: raise
        return of_network(name, own_size=True)
    return found

def of_random(rng):
    "A random convolution"
    while not usable(c := draw(rng)): pass
    (stride,padding,dilation,transposed,extra,groups),nd,w = c['args'],len(c['x'])-2,c['w']
    c_in,c_out = (w[0], w[1]*groups) if transposed else (w[1]*groups, w[0])
    name = f'Conv{"Transpose"*transposed}{nd}d'
    extra = dict(output_padding=extra) if transposed else {}
    with torch.device('meta'): m = getattr(nn, name)(c_in, c_out, w[2:], stride, padding, dilation=dilation, groups=groups, bias=c['bias'], **extra)
    return dict(zip(('layer', 'kwargs'), described(m)), x=c['x'])

def frequent_and_random(seen, n, rng):
    "Half of them the most frequent, the others at random"
    names = sorted(seen, key=lambda k: (-len(seen[k]), k))
    return names[:n//2] + rng.sample(names[n//2:], n-n//2)

def of_each_class(seen, n, rng):
    "The most frequent of each class, more of those that are in many networks"
    by_class = defaultdict(list)
    for k in sorted(seen, key=lambda k: (-len(seen[k]), k)): by_class[json.loads(k)['layer']].append(k)
    rank = {k: i/math.sqrt(sum(len(seen[o]) for o in ks)) for ks in by_class.values() for i,k in enumerate(ks)}
    return sorted(rank, key=lambda k: (rank[k], k))[:n]

@call_parse
def main(
    n_conv:int=420, # Convolutions of networks
    n_other:int=90, # Other layers of networks
    n_random:int=200, # Random convolutions
):
    "Collect the layers and write benchmarks/layers.json"
    warnings.simplefilter('ignore')
    networks = [json.loads(l)['name'] for l in (path.parent/'results/zoo-tuned-cpu.jsonl').read_text().splitlines()]
    seen,missing,rng = defaultdict(list),[],random.Random(0)
    for name in progress_bar(networks):
        try: layers = of_network(name)
        except Exception as e: missing.append(f'{name}: {type(e).__name__}: {str(e)[:80]}'); continue
        for o in layers: seen[o].append(name)
    groups = [{k: v for k,v in seen.items() if (json.loads(k)['layer'] in convs)==conv} for conv in (True, False)]
    rows = [dict(json.loads(k), networks=len(seen[k]), such_as=min(seen[k], key=len))
        for g,n,f in zip(groups, (n_conv, n_other), (frequent_and_random, of_each_class)) for k in f(g, n, rng)]
    rows += [of_random(rng) for _ in range(n_random)]
    path.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    print(f'{len(networks)-len(missing)} networks have {len(groups[0])} distinct convolutions and {len(groups[1])} other layers; written: {len(rows)} layers')
    if missing: print('not built:', *missing, sep='\n')
