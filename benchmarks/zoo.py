"""How do training steps of many networks behave in channels last? `python benchmarks/zoo.py`

Every family of timm and torchvision below 60 million parameters, fastai's own networks, 5-D ones, and networks of other packages
(segmentation_models_pytorch, MONAI, nnU-Net's architectures, torchvision's detectors). Each in child processes, contiguous, converted
naively by `model.to(memory_format=...)`, and converted by this package: whether it crashes, hangs, raises or computes wrong results, where
the format is lost, and CPU time. `--tuned` does what `to_channelslast()` does, in bf16 and tuned.
Each row is added to results/zoo-DEVICE.jsonl at once, a summary goes to zoo-DEVICE.json; the next run continues where it was interrupted."""
import contextlib, json, multiprocessing, statistics, time, warnings
from collections import Counter
from functools import cache, partial
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastxtend_cl.timing import pairs_of
from torch.utils._pytree import tree_leaves
from common import conditions, paired, results

classes,batch,image = 10,2,128
small = dict(image=64, batch=4) # for the check, whose double precision is slow
torchvision_models = '''alexnet convnext_tiny densenet121 densenet169 efficientnet_b0 efficientnet_b3 efficientnet_v2_s
googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf
regnet_x_3_2gf regnet_y_400mf regnet_y_8gf resnet18 resnet50 resnet101 resnext50_32x4d shufflenet_v2_x0_5
shufflenet_v2_x1_0 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t deeplabv3_mobilenet_v3_large
deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large'''.split()
video_models = 'r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b swin3d_t'.split()
fastai_models = ('xresnet18 xresnet34 xresnet50 xresnext50 xse_resnet18 xse_resnext50 xresnet18+sa xresnet50+sa '
    'unet+resnet18 unet+resnet34 unet+xresnet18 unet+resnet18+sa'.split())

# Need `pip install segmentation_models_pytorch monai dynamic_network_architectures`; measured where they are named
smp_models = 'Unet+resnet18 UnetPlusPlus+resnet18 FPN+efficientnet-b0 DeepLabV3Plus+mobilenet_v2 MAnet+resnet18 Segformer+mit_b0'.split()
monai_models = 'UNet+2 UNet+3 AttentionUnet+3 SegResNet+3 DenseNet121+2 VNet+3'.split()
nnunet_models = 'PlainConvUNet+2 PlainConvUNet+3 ResidualEncoderUNet+2 ResidualEncoderUNet+3'.split()
detection_models = 'ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn'.split()

class Detector(torch.nn.Module):
    "A detector of torchvision with a box for each image: it returns its losses"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x):
        box = dict(boxes=x.new_tensor([[8., 8., 40., 40.]]), labels=torch.ones(1, dtype=torch.int64, device=x.device))
        return self.model([*x], [box]*len(x))

def elsewhere(source, n, image, batch):
    "A network of another package, and the shape of its input"
    arch,_,option = n.partition('+')
    if source=='smp':
        import segmentation_models_pytorch as smp
        return getattr(smp, arch)(option, encoder_weights=None, classes=classes),(batch, 3, image, image)
    if source=='detection':
        import torchvision
        return Detector(torchvision.models.get_model(n, weights=None, weights_backbone=None, num_classes=classes)),(batch, 3, image, image)
    nd = int(option)
    shape = (batch, 1, image, image) if nd==2 else (2, 1, 32, 32, 32)
    if source=='monai':
        from monai.networks import nets
        more = {'UNet': dict(channels=(16, 32, 64), strides=(2, 2), num_res_units=2), 'AttentionUnet': dict(channels=(16, 32, 64), strides=(2, 2))}.get(arch, {})
        size = {} if arch=='VNet' and nd==3 else dict(spatial_dims=nd)
        return getattr(nets, arch)(in_channels=1, out_channels=classes, **size, **more),shape
    from dynamic_network_architectures.architectures import unet
    conv,norm = (torch.nn.Conv2d,torch.nn.InstanceNorm2d) if nd==2 else (torch.nn.Conv3d,torch.nn.InstanceNorm3d)
    blocks = 'n_blocks_per_stage' if arch.startswith('Residual') else 'n_conv_per_stage'
    return getattr(unet, arch)(1, 4, [16, 32, 64, 128], conv, 3, [1, 2, 2, 2], **{blocks: 2}, num_classes=classes, n_conv_per_stage_decoder=[2]*3,
        conv_bias=True, norm_op=norm, norm_op_kwargs=dict(affine=True), nonlin=torch.nn.LeakyReLU, deep_supervision=True),shape

def timm_names(per_family=2, below=60e6):
    "Up to `per_family` sizes of each of timm's families: the smallest, the largest, and what is between"
    import timm
    path,names = results/'zoo-timm.json',[]
    if path.exists() and (kept := json.loads(path.read_text()))['timm']==timm.__version__: return kept['names']
    for family in progress_bar(timm.list_modules(), leave=False):
        sizes = {}
        for n in timm.list_models(module=family):
            if any(o in n for o in ('giant', 'gigantic', 'enormous', '_xxl', 'huge')): continue
            with contextlib.suppress(Exception), torch.device('meta'), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                sizes[n] = sum(p.numel() for p in timm.create_model(n).parameters())
        fit = sorted((n for n in sizes if sizes[n]<below), key=sizes.get)
        names += [fit[round(i*(len(fit)-1)/max(1, per_family-1))] for i in range(per_family)] if len(fit)>per_family else fit
    path.write_text(json.dumps(dict(timm=timm.__version__, names=(names := list(dict.fromkeys(names)))), indent=1)+'\n')
    return names

def build(name, image=image, batch=batch, own_size=False):
    "Model and input of `source/name`, the same weights and numbers each time; `own_size` is what the model is made for"
    source,_,n = name.partition('/')
    torch.manual_seed(0)
    shape = (batch, 3, image, image)
    if source=='timm':
        import timm
        try: model = timm.create_model(n, num_classes=classes, **({} if own_size else dict(img_size=image)))
        except TypeError: model = timm.create_model(n, num_classes=classes)
        cfg,patches = model.default_cfg,getattr(model, 'patch_embed', None)
        fixed = own_size or cfg.get('fixed_input_size') and not getattr(patches, 'img_size', None)
        shape = (batch, cfg['input_size'][0], *(cfg['input_size'][1:] if fixed else getattr(patches, 'img_size', None) or (image, image)))
    elif source in ('torchvision', 'video'):
        import torchvision
        kw = (dict(weights_backbone=None) if n.startswith(('deeplab', 'fcn', 'lraspp'))
            else dict(init_weights=True) if n in ('googlenet', 'inception_v3') else {})
        if n=='maxvit_t': kw['input_size'],shape = (224, 224),(batch, 3, 224, 224)
        elif source=='video': shape = (1, 3, 16, 224, 224) if own_size or n.startswith('mvit') else (2, 3, 8, 64, 64)
        elif own_size: shape = (batch, 3, 299, 299) if n=='inception_v3' else (batch, 3, 224, 224)
        model = torchvision.models.get_model(n, weights=None, num_classes=classes, **kw)
    elif source in ('smp', 'monai', 'nnunet', 'detection'): model,shape = elsewhere(source, n, image, batch)
    else:
        from fastai.vision import all as fv
        arch,*options = n.split('+')
        if arch=='unet':
            model = fv.DynamicUnet(fv.create_body(getattr(fv, options[0])(), pretrained=False), classes, (image, image),
                self_attention='sa' in options)
        else: model = getattr(fv, arch)(n_out=classes, sa='sa' in options)
    return model.train(),torch.randn(shape)

def loss_func(out, y):
    outs = [o for o in tree_leaves(out) if isinstance(o, torch.Tensor) and o.is_floating_point()]
    return sum(F.cross_entropy(o, y) if o.ndim==2 and len(o)==len(y) else o.pow(2).mean() for o in outs)

def naive(model, x):
    fmt = torch.channels_last_3d if x.ndim==5 else torch.channels_last
    return model.to(memory_format=fmt),x.to(memory_format=fmt)

def stepper(model, x, device, around=contextlib.nullcontext, low=False):
    y,opt = (torch.arange(len(x))%classes).to(device),torch.optim.SGD(model.parameters(), lr=1e-5)
    def step():
        with around():
            with torch.autocast(device.type, torch.bfloat16, enabled=low): loss = loss_func(model(x), y)
            loss.backward(); opt.step(); opt.zero_grad()
    return step

def kept(model, x):
    "Share of the convolutions whose input arrives in channels last, forward, and of those whose gradient does"
    from fastxtend_cl.convert import convolutions
    from fastxtend_cl.layout import format_of
    seen = Counter()
    def note(phase, t):
        if isinstance(t, torch.Tensor) and (f := format_of(t)): seen[phase, f in ('channels_last', 'ambiguous')] += 1
    def hook(m, args, out):
        note('forward', args[0])
        if out.requires_grad: out.register_hook(lambda g: note('backward', g))
    handles = [m.register_forward_hook(hook) for m in convolutions(model).values()]
    loss_func(model(x), torch.arange(len(x), device=x.device)%classes).backward()
    for h in handles: h.remove()
    model.zero_grad()
    return {p: seen[p,True]/max(1, seen[p,True]+seen[p,False]) for p in ('forward', 'backward')}

def failed(res): return bool({'died', 'hung', 'raised'} & res.keys())

class Child:
    "The phases of one model in a process; each result is sent at once, so that a crash loses only its own phase"
    def __init__(self, conn, name, device, rounds, block, known, tuned):
        self.conn,self.name,self.device,self.rounds,self.block,self.known,self.tuned = conn,name,torch.device(device),rounds,block,known,tuned
        self.arms,self.own = {},{}

    def phase(self, n, func):
        if n in self.known: return
        self.conn.send(dict(phase=n))
        try: self.known[n] = func()
        except Exception as e: self.known[n] = dict(raised=f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'[:300])
        self.conn.send({n: self.known[n]})

    def fresh(self, **size):
        model,x = build(self.name, **size, **self.own)
        return model.to(self.device),x.to(self.device)

    def run(self, no_check):
        self.phase('contiguous', self.contiguous)
        if 'contiguous' not in self.arms or not self.known['contiguous']['convolutions']: return
        self.phase('ours', self.ours)
        if not no_check and not failed(self.known['ours']): self.phase('check', self.check)
        if self.tuned: return
        self.phase('naive', self.naive)
        if not failed(self.known['naive']): self.phase('naive_check', self.naive_check)
        self.phase('times', self.times)

    def contiguous(self):
        try: return self.contiguous_at()
        except Exception: self.own['own_size'] = True # it accepts no other size
        return self.contiguous_at()

    def contiguous_at(self):
        from fastxtend_cl.convert import convolutions
        model,x = self.fresh()
        self.arms['contiguous'] = stepper(model, x, self.device)
        self.arms['contiguous']()
        return dict(params=sum(p.numel() for p in model.parameters()), convolutions=len(convolutions(model)), shape=list(x.shape))

    def ours(self):
        from fastxtend_cl.convert import apply_channels_last
        from fastxtend_cl.layout import as_channels_last
        from fastxtend_cl.kernels import kernel_table, tuned_kernels, tuning_line
        model,x = self.fresh()
        model,x = apply_channels_last(model),as_channels_last(x)
        self.arms['ours'] = stepper(model, x, self.device, tuned_kernels, self.tuned)
        if 'ours' in self.known: return
        with tuned_kernels(): res = dict(kept=kept(model, x))
        for _ in range(2): self.arms['ours']()
        return dict(res, tuning=kernel_table().seconds, line=tuning_line(), finite=all(p.isfinite().all().item() for p in model.parameters()),
            corrected=[f'{c.kernel} {k}' for k,c in kernel_table().rows if c.corrected])

    def naive(self):
        model,x = naive(*self.fresh())
        self.arms['naive'] = stepper(model, x, self.device)
        self.arms['naive']()
        return {}

    def checked(self):
        "A check, as small as it can be"
        try: res = self.check_at(**small)
        except Exception: return self.check_at() # too small for it
        return res if res.ok is not None else self.check_at(image=96, batch=8) # BatchNorm on few numbers amplifies rounding

    def check_at(self, **size):
        from fastxtend_cl.check import check_formats
        from fastxtend_cl.step import TrainingStep
        if size!=small: shared_runs().kept.clear()
        model,x = self.fresh(**size)
        return check_formats(TrainingStep(model, x, torch.arange(len(x), device=self.device)%classes, loss_func,
            torch.optim.SGD(model.parameters(), lr=0.01), autocast=torch.bfloat16 if self.tuned else None, tuned=True))

    def check(self):
        start,res = time.process_time(),self.checked()
        return dict(ok=res.ok, reason=res.reason, wrong=res.wrong[:5], first=res.first, seconds=round(time.process_time()-start, 1))

    def naive_check(self):
        "The same check with the conversion replaced by the naive one"
        from fastxtend_cl import step
        real,fmt = step.convert_format,torch.channels_last_3d if self.name.startswith('video/') else torch.channels_last
        step.convert_format = lambda m, f, *a, **kw: m.to(memory_format=fmt) if f=='channels_last' else real(m, f, *a, **kw)
        try: res = self.checked()
        finally: step.convert_format = real
        return dict(ok=res.ok, reason=res.reason, wrong=res.wrong[:5], first=res.first)

    def times(self):
        "Seconds of each arm, CPU seconds on a CPU, and speed relative to contiguous"
        for n,f in dict(ours=self.ours, naive=self.naive).items():
            lost = failed(self.known[n]) or n=='naive' and failed(self.known.get('naive_check', {}))
            if lost: self.arms.pop(n, None)
            elif n not in self.arms: f()
        timed = paired(self.arms, self.rounds, self.block, self.device)
        secs = {n: a.seconds if self.device.type=='cuda' else a.cpu for n,a in timed.items()}
        return dict(seconds={n: statistics.median(v.values()) for n,v in secs.items()},
            ratio={n: statistics.median(pairs_of(secs['contiguous'], v)) for n,v in secs.items() if n!='contiguous'})

@cache
def shared_runs():
    "Contiguous runs of a check, those in double precision among them, serve the check of the naive conversion too"
    from fastxtend_cl import check
    class Shared(check._RecordedRuns):
        kept = {}
        def record(self, memory_format, dtype, *watches):
            k = (self.shift, memory_format, dtype, *(w.seed for w in watches))
            if memory_format=='channels_last': return super().record(memory_format, dtype, *watches)
            if k not in self.kept: self.kept[k] = super().record(memory_format, dtype, *watches)
            return self.kept[k]
    check._RecordedRuns = Shared
    return Shared

def child(conn, *args, no_check):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    shared_runs()
    Child(conn, *args).run(no_check)
    conn.close()

def one(ctx, name, device, rounds, block, limit, tuned, no_check):
    "The row of one model: child processes until all phases are known"
    row,start = dict(name=name),time.time()
    while True:
        here,there = ctx.Pipe(duplex=False)
        known = {k: v for k,v in row.items() if k not in ('name', 'contiguous')}
        p = ctx.Process(target=partial(child, no_check=no_check), args=(there, name, device, rounds, block, known, tuned), daemon=True)
        p.start(); there.close()
        doing,hung = None,False
        while not hung:
            try:
                if not here.poll(limit): hung = True; p.kill(); break
                msg = here.recv()
            except EOFError: break
            if 'phase' in msg: doing = msg['phase']
            else: row |= msg; doing = None
        p.join()
        if doing is None or doing in row and doing!='contiguous': break
        row[doing] = dict(hung=limit) if hung else dict(died=-p.exitcode)
        if doing=='contiguous': break
    return row | dict(wall=round(time.time()-start, 1))

def verdict(row, arm):
    "The outcome of an arm in one word"
    res = row.get('ours' if arm=='ours' else 'naive', {})
    chk = row.get('check' if arm=='ours' else 'naive_check', {})
    for r in (res, chk):
        for word in ('died', 'hung', 'raised'):
            if word in r: return word
    return {True: 'OK', False: 'wrong', None: 'inconclusive'}[chk['ok']] if 'ok' in chk else 'unknown'

def of_arm(usable, arm):
    "The outcomes of an arm as counts, and its speed relative to contiguous"
    ratios = sorted(r['times']['ratio'][arm] for r in usable if arm in r.get('times', {}).get('ratio', {}))
    words = {r['name']: verdict(r, arm) for r in usable}
    return {**Counter(words.values()), 'timed': len(ratios), 'median_ratio': statistics.median(ratios) if ratios else None,
        'faster_by_5_percent': sum(r>1.05 for r in ratios), 'slower_by_3_percent': sum(r<0.97 for r in ratios),
        'not OK': {n: w for n,w in words.items() if w!='OK'}}

def summary(rows):
    "What the rows say"
    usable = [r for r in rows if not failed(r['contiguous']) and r['contiguous']['convolutions']]
    out = dict(models=len(rows), with_convolutions=len(usable))
    for arm in ('naive', 'ours') if any('naive' in r for r in rows) else ('ours',): out[arm] = of_arm(usable, arm)
    if mine := [r['ours'] for r in usable if 'tuning' in r.get('ours', {})]:
        out['tuning'] = dict(median_seconds=statistics.median(o['tuning'] for o in mine), most_seconds=max(o['tuning'] for o in mine),
            not_finite=[r['name'] for r in usable if not r.get('ours', {}).get('finite', True)],
            corrected_in={r['name']: len(r['ours']['corrected']) for r in usable if r.get('ours', {}).get('corrected')})
    out['format lost in'] = sum(min(r['ours'].get('kept', {}).get(p, 1) for p in ('forward', 'backward'))<1 for r in usable if 'ours' in r)
    return out

def all_names():
    return [f'{source}/{n}' for source,names in dict(torchvision=torchvision_models, video=video_models, fastai=fastai_models, timm=timm_names()).items()
        for n in names]

@call_parse
def main(
    names:str='', # Models as source/name, separated by commas; none: all
    device:str='cuda' if torch.cuda.is_available() else 'cpu', # Where to run
    rounds:int=3, # Rounds of timing
    block:int=3, # Steps a block; the first is dropped
    limit:int=300, # Seconds that a phase may take
    tuned:bool=False, # What `to_channelslast()` does: two steps and a check; writes zoo-tuned-DEVICE.jsonl and .json
    no_check:bool=False, # With `tuned`: only two steps, which show whether it crashes, raises or is not finite
    tiny:bool=False, # Three models; writes nothing
    report:bool=False, # Only summarise what is there
):
    "Measure, row by row, and write benchmarks/results/zoo-DEVICE.jsonl and .json"
    path = results/f'zoo-{"tuned-" if tuned else ""}{device}.jsonl'
    rows = [json.loads(l) for l in path.read_text().splitlines()] if path.exists() and not tiny else []
    if tiny: rounds,block,names = 1,2,names or 'timm/test_resnet,torchvision/squeezenet1_1,video/r3d_18'
    if not report:
        done,ctx = {r['name'] for r in rows},multiprocessing.get_context('spawn' if device.startswith('cuda') else 'forkserver')
        if not device.startswith('cuda'): ctx.set_forkserver_preload(['torch', 'torchvision', 'timm', 'fastai.vision.all', 'fastxtend_cl.check'])
        for name in progress_bar([n for n in (names.split(',') if names else all_names()) if n not in done]):
            rows.append(row := one(ctx, name, device, rounds, block, limit, tuned, no_check))
            if tiny: print(row, verdict(row, 'naive'), verdict(row, 'ours'))
            else:
                with path.open('a') as f: f.write(json.dumps(row)+'\n')
    print(json.dumps(res := summary(rows), indent=1))
    if not tiny: path.with_suffix('.json').write_text(json.dumps(dict(conditions={**conditions(), 'cores': 1}, batch=batch,
        image=image, check=small, rounds=rounds, block=block, **res), indent=1)+'\n')
