"""The tables of nbs/cheat_sheet.ipynb, made from benchmarks/results: `python benchmarks/compatibility.py` updates that page, too

Which call is recommended for a kind of network is written here by hand; `check_calls` fails if the results no longer support it."""
from common import geometric, markdown
from compatibility import read, repo

bench,peers,plans,norms,gpu = 'kernels-cpu','peers-cpu','plan-cpu','norms-cpu','speed-cuda'
fp32,untuned,default,plain = 'use_amp=False','tune=False','to_channelslast()',"channels last, torch's kernels"
depthwise,grouped,volumes = 'Mobile networks (depthwise)','Grouped convolutions','3-D networks'
cpu_kinds = {'ResNets and RepVGG': ['resnet18', 'resnet50', 'repvgg_a0'],
    depthwise: ['mobilenet_v2', 'mobilenet_v3_large', 'mobilenetv4_conv_small', 'mnasnet_100', 'efficientnet_b0', 'ghostnet_100', 'shufflenet_v2_x1_0'],
    f'{grouped} (RegNet)': ['regnetx_004', 'regnety_004'], 'ConvNeXt and EdgeNeXt': ['convnext_atto', 'edgenext_xx_small'], 'DenseNet': ['densenet121'],
    'U-Net with batch norm': ['unet_resnet18'], volumes: ['r3d_18', 'mc3_18']}
gpu_kinds = {'ResNets': ['resnet18', 'resnet50'], depthwise: ['mobilenetv2_100', 'efficientnet_b0'], f'{grouped} (RegNet, ResNeSt)': ['regnetx_032', 'regnety_032', 'resnest50d'],
    'ConvNeXt': ['convnext_tiny'], 'DenseNet': ['densenet121'], "fastai's U-Net": ['unet_resnet34'], volumes: ['r3d_18', 'unet3d']}

def span(values):
    "'1.09 to 1.11' for the extremes of `values`, or one number"
    low,high = f'{min(values):.2f}',f'{max(values):.2f}'
    return low if low==high else f'{low} to {high}'

def linked(text, name): return f'[{text}]({repo}/{name}.md)'

def cpu_speeds(arm, names=None):
    "The speeds of an arm of kernels.py relative to contiguous fp32"
    found = {f['model']: {r['arm']: r['ratio'][0] for r in f['rows'] if 'ratio' in r} for f in read(f'{bench}.json')['found']}
    assert sorted(found)==sorted(n for ns in cpu_kinds.values() for n in ns), 'a network without a kind'
    return [found[n][arm] for n in names or found]

def gpu_speeds(arm, names=None, dtype='float16', section='fp16'):
    "The speeds of an arm of gpu_speed.py relative to contiguous in the same precision; without `names` all that are known"
    found = {r['model']: r['ratio'][0] for r in read(f'{gpu}.json')['rows'] if r['arm']==arm and r['dtype']==dtype and r['section']==section and 'ratio' in r}
    return [found[n] for n in names or found if n in found]

def norm_speeds(arm, dtype): return [r['ratio'][0] for r in read(f'{norms}.json')['networks'] if r['arm']==arm and r['dtype']==dtype]
def group_norms(): return [r['ratio'][0] for r in read(f'{norms}.json')['rows'] if r['arm']=='group, channels last']
def few_convolutions(): return [r['times']['ratio']['ours'] for r in read('zoo-cpu.jsonl') if 1<=r['contiguous'].get('convolutions', 0)<=3 and 'ours' in r.get('times', {}).get('ratio', {})]
def small_on_cpu(best=False):
    "The speed of the default call with a small batch, or that of the fastest of the four settings that a race compares"
    small = [f['small_ms'] for f in read(f'{plans}.json')['found'] if 'channels last bf16' in f.get('small_ms', {})]
    return [o['contiguous fp32']/(min(v for k,v in o.items() if k.endswith(('fp32', 'bf16'))) if best else o['channels last bf16']) for o in small]

def compiled_on_cpu():
    "How many times as fast the default call was with a compiled model as without"
    rows = read(f'{peers}.json')['rows']
    def of(arm): return {r['model']: r['ratio'][0] for r in rows if r['arm']==arm and 'ratio' in r}
    eager,compiled = of('ours: to_channelslast()'),of('ours: to_channelslast(), compiled')
    return [compiled[n]/eager[n] for n in compiled]

def sheet(rows): return '\n'.join(['<div class="sheet">', '', markdown(['network', 'call', 'speed', 'remark'], rows, 4), '', '</div>'])

def machines(*names):
    "Markdown: machine, versions and date of files of results, each once"
    found = {}
    for n in names:
        c = read(f'{n}.json')['conditions']
        device = c['gpu'] or f"{c['cpu']}, {c['cores']} thread{'s' if c['cores']>1 else ''}"
        found.setdefault(f"{device}, torch {c['torch'].partition('+')[0]}, {c['date']}", []).append(n)
    return 'Measured on: '+'; '.join(f"{k} ({', '.join(v)})" for k,v in found.items())+'.'

def cpu_table():
    rows = []
    for kind,names in cpu_kinds.items():
        remark = f'in fp32 {span(cpu_speeds(fp32, names))}'
        if kind==depthwise: remark += f'; in bf16 without tuning {span(cpu_speeds(untuned, names))}'
        if kind==volumes: remark += ': without bf16 stay contiguous'
        rows.append((kind, 'default', linked(span(cpu_speeds(default, names)), bench), remark))
    rows += [('U-Nets with instance norm (nnU-Net, MONAI)', 'default', linked(span(norm_speeds('tuned', 'bfloat16')), norms), f"relative to contiguous bf16; without tuning {span(norm_speeds('channels last', 'bfloat16'))}"),
        ('Networks with group norm', 'race', linked(span(group_norms()), norms), "the layer by itself: PyTorch's is slow in this format"),
        ('Vision transformers, up to 3 convolutions', 'nothing', linked(span(few_convolutions()), 'zoo-cpu').replace('.md', '.json'), 'fp32, screened: little to gain'),
        ('Models without convolutions', 'nothing', '', 'the call gives a warning'),
        ('Small batches (up to 4 images of 64 pixels)', 'race', linked(span(small_on_cpu(best=True)), plans), f'the fastest setting of each network; default {span(small_on_cpu())}'),
        ('Compiled models', 'race, with `compile=True`', linked(span(compiled_on_cpu()), peers), 'default call compiled relative to not compiled, version 0.1.0'),
        ('Any, CPU without bf16', 'default', linked(span(cpu_speeds(fp32)), bench), 'trains in fp32, and a warning says so')]
    return sheet(rows)

def gpu_table():
    rows = []
    for kind,names in gpu_kinds.items():
        f,b,c = gpu_speeds('ours', names),gpu_speeds('ours', names, 'bfloat16', 'bf16'),gpu_speeds('ours, compiled', names, section='compiled')
        call,speed,remark = 'default',f,f'bf16 {span(b)}' + (f'; compiled {span(c)}' if c else '')
        if kind=='ConvNeXt': call,speed,remark = 'compiled',c,f'not compiled {span(f)}: nothing to gain'
        if kind=='DenseNet': call,speed,remark = 'bf16',b,f'default (fp16) {span(f)}, within the noise'
        if kind.startswith('fastai'): call,remark = 'nothing',f'mixed precision only; bf16 {span(b)}'
        if kind.startswith(grouped): remark += f"; PyTorch's channels last {span(gpu_speeds(plain, names))}"
        rows.append((kind, call, linked(span(speed), gpu), remark))
    both = [n for ns in gpu_kinds.values() for n in ns if gpu_speeds('contiguous, compiled', [n], section='compiled')]
    rows += [('Compiled models', 'compiled', linked(span(gpu_speeds('ours, compiled', section='compiled')), gpu),
            f"{len(both)} networks were also contiguous and compiled: {span(gpu_speeds('contiguous, compiled', both, section='compiled'))}; in channels last {span(gpu_speeds('ours, compiled', both, section='compiled'))}"),
        ('Small batches (8 images)', 'nothing', linked(span(gpu_speeds('ours', section='small')), gpu), 'the CPU limits the step: within the noise')]
    return sheet(rows)

def check_calls():
    "Fail if the results no longer support a call that the tables recommend"
    for kind,names in cpu_kinds.items():
        for arm in (fp32, untuned): assert geometric(cpu_speeds(default, names))>0.97*geometric(cpu_speeds(arm, names)), (kind, arm)
        assert min(cpu_speeds(default, names))>1, kind
        if kind==depthwise: assert geometric(cpu_speeds(untuned, names))<geometric(cpu_speeds(fp32, names)), 'tuning is what makes bf16 pay'
    assert max(cpu_speeds(fp32, cpu_kinds[volumes]))<1.05
    assert geometric(norm_speeds('tuned', 'bfloat16'))>1>geometric(norm_speeds('channels last', 'bfloat16')) and min(group_norms())<0.5
    assert 0.97<geometric(few_convolutions())<1.03 and geometric(small_on_cpu(best=True))>1.05*geometric(small_on_cpu())
    for kind,names in gpu_kinds.items():
        f,b = geometric(gpu_speeds('ours', names)),geometric(gpu_speeds('ours', names, 'bfloat16', 'bf16'))
        if kind=='ConvNeXt': assert f<1.05 and geometric(gpu_speeds('ours, compiled', names, section='compiled'))>1.2
        elif kind=='DenseNet': assert f<b
        elif kind.startswith('fastai'): assert f<1.03 and b<1.03
        else: assert f>1.1 and f>0.97*geometric(gpu_speeds(plain, names)), kind
    assert 0.9<geometric(gpu_speeds('ours', section='small'))<1.1
