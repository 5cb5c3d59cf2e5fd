"""Which kernels of a convolution are slower in channels last, and by how much? `python benchmarks/gpu.py --parts kernels`

Forward, dgrad and wgrad of the distinct convolutions of eleven networks, in both formats, in fp16, fp32 and bf16: seconds and error of each
way that `tuned_kernels` chooses from, verified and timed as it does. Writes results/convolutions-DEVICE.json and .md after each network."""
import json, time, warnings
from collections import Counter, defaultdict
from dataclasses import replace
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastxtend_cl.choose import bench_of, clear_margins
from fastxtend_cl.layout import dense_strides, channels_last_formats
from fastxtend_cl.ways import Call, as_is, candidates, device_name
from common import conditions, markdown, results
from gpu_common import network, sizes, tiny_sizes

networks = ('regnetx_032', 'resnest50d', 'mobilenetv2_100', 'efficientnet_b0', 'convnext_tiny', 'unet3d', 'r3d_18', 'regnety_032', 'resnext50_32x4d',
    'resnet50', 'densenet121')


class Calls(TorchDispatchMode):
    "The distinct calls of `aten::convolution_backward`, and how often each is made"
    def __init__(self): super().__init__(); self.found = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            call = Call.of(args)
            self.found[replace(call, mask=(call.mask[0], True, False))] += 1
        return func(*args, **(kwargs or {}))

def convolutions_of(name, tiny):
    "The distinct convolutions of a training step of a network, from a run without values"
    shape = tiny_sizes.get(name, (2, 3, 32, 32)) if tiny else sizes[name] if name in ('unet3d', 'r3d_18') else (256, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = network(name, shape).to('meta')
        with Calls() as calls: model(torch.randn(shape, device='meta')).sum().backward()
    return calls.found

def set_as(call, last, dtype, device):
    "`call` in a format and dtype on a device"
    def meta(m):
        shape = m[0]
        return shape,torch.empty(shape, device='meta', memory_format=channels_last_formats[len(shape)]).stride() if last else dense_strides(shape),dtype
    return replace(call, g=meta(call.g), x=meta(call.x), w=meta(call.w), device=device_name(device))

def kernel_rows(call, device, rounds=5):
    "Milliseconds of the GPU and of the call, and error, of each way to compute each kernel of a call; the least of a few interleaved rounds"
    res,aten = {},torch.ops.aten
    for name in ('forward', 'dgrad', 'wgrad') if call.mask[0] else ('forward', 'wgrad'):
        one = replace(call, mask=(False,)*3) if name=='forward' else call
        bench = bench_of(aten.convolution if name=='forward' else aten.convolution_backward, one, name, device)
        try:
            errors = {w: why or error for w in candidates(one, name) for error,why in [bench.verify(w)]}
            rows = {w: [] for w,e in errors.items() if not isinstance(e, str)}
            for i in range(rounds):
                for w in [w for w in rows if i<2 or min(rows[w])[0]<2*min(min(r)[0] for r in rows.values())]:
                    seconds = bench.marks(w, bench.many)[:2] if one.gpu else bench.run(w, bench.many)[:1]*2
                    if i: rows[w].append(seconds) # the first run may be a search of cuDNN's
            res[name] = {str(w): dict(zip(('ms', 'call_ms'), (round(1e3*min(o), 5) for o in zip(*rows[w]))) if rows.get(w) else (), error=e)
                for w,e in errors.items()}
        except RuntimeError as e: res[name] = dict(failed=str(e).splitlines()[0][:200])
    return res

def kind_of(call):
    groups = call.groups>1 and ('depthwise' if call.w[0][1]==1 else 'grouped')
    return f'{len(call.stride)}-D {groups or "ordinary"}'

def totals(rows):
    "Milliseconds of all convolutions of a step, by network, dtype, kind and kernel: contiguous, channels last, and the best of the ways there"
    res,cut = defaultdict(lambda: [0., 0., 0.]),{(r['model'], r['dtype']) for r in rows if 'left_out' in r}
    for r in rows:
        if (r['model'], r['dtype']) in cut: continue
        for name,ways in r.get('channels last', {}).items():
            plain,last = r['contiguous'].get(name, {}).get(str(as_is)),ways.get(str(as_is))
            if not (plain and last and 'ms' in plain and 'ms' in last): continue
            right = [o['ms'] for o in ways.values() if 'ms' in o and not isinstance(o['error'], str) and o['error']<=1]
            best = min([o for o in right if o<clear_margins[True]*last['ms']], default=last['ms'])
            for key in ((r['model'], r['dtype'], 'all', 'all'), (r['model'], r['dtype'], r['kind'], name)):
                for i,ms in enumerate((plain['ms'], last['ms'], best)): res[key][i] += r['count']*ms
    return [dict(zip(('model', 'dtype', 'kind', 'kernel', 'contiguous', 'channels_last', 'best'), (*k, *(round(o, 4) for o in v)))) for k,v in res.items()]

columns,formats = ['ms', 'call_ms', 'error'],('contiguous', 'channels last') # milliseconds of the GPU and of the call; multiples of rounding

def page(rows, head):
    "Markdown: what all convolutions of a step take, by network and precision, and by kind and kernel"
    def table(found, names):
        return markdown([*names, 'contiguous, ms', 'channels last, ms', 'best way in channels last, ms'],
            [[*(t[n] for n in names), *(f'{t[k]:.2f}' for k in ('contiguous', 'channels_last', 'best'))] for t in found], len(names))
    found = totals(rows)
    return '\n\n'.join([head, table([t for t in found if t['kind']=='all'], ['model', 'dtype']),
        table([t for t in found if t['kind'] not in ('all', '2-D ordinary')], ['model', 'dtype', 'kind', 'kernel'])])+'\n'

def save(device, rows, **about):
    "Write what was found, a row a line"
    text = json.dumps(dict(conditions=conditions(), **about, totals=totals(rows), columns=columns), indent=1)[:-2]
    def short(ways): return {w: [o.get(k) for k in columns] if isinstance(o, dict) else o for w,o in ways.items()}
    def plain(r): return {k: {n: short(ways) for n,ways in v.items()} if k in formats else v for k,v in r.items()}
    lines = ',\n'.join(json.dumps(plain(r)) for r in rows if 'left_out' not in r)
    (results/f'convolutions-{device.type}.json').write_text(f'{text},\n "rows": [\n{lines}]}}\n')
    c = conditions()
    (results/f'convolutions-{device.type}.md').write_text(page(rows, f"All convolutions of a training step: milliseconds of the GPU, forward, dgrad and "
        f"wgrad. {c['gpu'] or c['cpu']}, torch {c['torch']}, cuDNN {torch.backends.cudnn.version()}, {c['date']}. 256 images of 224 pixels (of large layers as "
        'many as make 64 million elements); a way counts where its error is within rounding and it is 5 % faster than torch.'))

def run_kernels(device, tiny, seconds=110):
    "Measure each distinct convolution once; written after each network"
    start,seen,rows = time.time(),{},[]
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        for name in ['mobilenetv2_100', 'unet3d'] if tiny else networks:
            for call,count in convolutions_of(name, tiny).items():
                row = dict(model=name, call=str(call).split(' fp')[0], dtype=str(dtype)[6:], kind=kind_of(call), count=count)
                rows.append(row)
                if time.time()-start>seconds: row['left_out'] = True; continue
                for label,last in zip(formats, (False, True)):
                    one = set_as(call, last, dtype, device)
                    if one not in seen: seen[one] = kernel_rows(one, device)
                    row[label] = seen[one]
            print(f'{name:20}{str(dtype)[6:]:10}{sum("left_out" not in r for r in rows):5} measured, {time.time()-start:.0f} s', flush=True)
            if not tiny: save(device, rows, benchmark=torch.backends.cudnn.benchmark, tf32=torch.backends.cudnn.allow_tf32)
    for t in totals(rows):
        if t['kind']=='all': print(f"{t['model']:20}{t['dtype']:10}{t['contiguous']:9.2f}{t['channels_last']:9.2f}{t['best']:9.2f} ms")
    wrong = [(r['model'], r['call'], r['dtype'], label, k, w, o['error']) for r in rows for label in formats
        for k,ways in r.get(label, {}).items() for w,o in ways.items() if isinstance(o, dict) and not isinstance(o['error'], str) and o['error']>1]
    print(f'{len(rows)} rows; {len(wrong)} kernels further from the reference than rounding explains', *wrong[:20], sep='\n')
