"""Images per second of a whole training step in mixed precision on a GPU: `python benchmarks/gpu_speed.py`

Each arm trains its own copy of a network on one random batch that is already on the device: zero_grad, forward under autocast, loss,
backward (through GradScaler in fp16), SGD. Arms are paired. A row's ratio is that of its speed to the contiguous arm's, the median of the
rounds with their minimum and maximum (rows of 2026-11-26 have the mean of a block's steps, later ones the median). Passes (`--passes`),
the most important first: fp16; on, fp16 with `torch.backends.cudnn.benchmark`, as fastai's `setup_cuda()` sets it, whose search makes the first step long;
compiled, fp16; bf16; small, fp16 with batches of 8, whose steps wait for the processor; fp32, for the 7x7 depthwise convolutions of
convnext_tiny.
Writes results/speed-DEVICE.json and .md after each network. The next run continues where it was interrupted: rows with the same
torch and card are kept, also failures; `--refresh` measures the named networks again. `--precompile` only fills inductor's cache on disk, in processes
side by side. Kernels are tuned anew unless FASTXTEND_CL_CACHE names a folder."""
import gc, math, os, statistics, subprocess, sys, tempfile, time, warnings
from contextlib import nullcontext
warnings.simplefilter('ignore', FutureWarning) # torch's own, when fastai.vision is imported
import torch
from fastcore.script import call_parse
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.layout import as_channels_last, channels_last_formats
from fastxtend_cl.kernels import kernel_count, kernel_table, tuned_kernels, tuning_line
from fastxtend_cl.timing import device_clock, pairs_of, why_failed
from common import cell, machine, markdown, ms_of, paired, read, results, save
from gpu_common import network, random_batch, sizes, tiny_sizes

base,again,plain,ours,compiled,maxed = ('contiguous', 'contiguous, again', "channels last, torch's kernels", 'ours', 'ours, compiled',
    'ours, max-autotune')
base_compiled = 'contiguous, compiled'
eager,mine = [base, again, plain, ours],[ours, compiled, maxed]
compiled_twice = ['resnet50', 'mobilenetv2_100', 'regnetx_032', 'unet3d'] # contiguous, too
# Pass to dtype, cudnn.benchmark, arms
settings = {'fp16': (torch.float16, False, eager), 'on': (torch.float16, True, eager),
    'compiled': (torch.float16, False, [base, base_compiled, ours, compiled, maxed]), 'bf16': (torch.bfloat16, False, eager),
    'small': (torch.float16, False, eager), 'fp32': (torch.float32, False, eager)}
bytes_per_image = 478e6 # resnet50 at 224 pixels, eager training in 16 bits

def stepper(arm, name, x, y, dtype):
    "A function that trains one step and returns its loss, and the model"
    device,last = x.device,arm not in (base, again, base_compiled)
    torch.manual_seed(0)
    with device: model = network(name, x.shape).to(device).train()
    if arm==plain: model.to(memory_format=channels_last_formats[x.ndim]) # fastai's own callback raises on volumes
    if arm in mine: apply_channels_last(model)
    if arm in (compiled, base_compiled): model.compile()
    if arm==maxed: model.compile(mode='max-autotune-no-cudagraphs')
    opt,scaler = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),torch.amp.GradScaler(device.type, enabled=dtype==torch.float16)
    def step():
        with tuned_kernels(model=model) if arm in mine else nullcontext():
            opt.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype!=torch.float32):
                out = model(as_channels_last(x) if last else x)
                loss = torch.nn.functional.cross_entropy(out.float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            return loss.detach()
    return step,model

def begin(arm, name, x, y, dtype, warm):
    "The step of an arm, what its first step showed, and the seconds of a step after `warm` further ones"
    clock,since,start_bytes = device_clock(x.device),kernel_count(),0
    if x.is_cuda: start_bytes = torch.cuda.memory_allocated(x.device)-x.nbytes-y.nbytes # of the other arms
    step,model = stepper(arm, name, x, y, dtype)
    losses = []
    first = clock.steps(lambda: losses.append(step().item()), 1)[0, 0]
    row = dict(first_seconds=first, loss=losses[0],
        grad_norm=torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
    if arm in mine: row['tuning'] = dict(line=tuning_line(since), seconds=kernel_table(since).seconds)
    if not warm: return step,row,None
    if x.is_cuda: torch.cuda.reset_peak_memory_stats(x.device)
    seconds = clock.steps(step, warm)[0].min()
    if x.is_cuda: row['peak_mib'] = (torch.cuda.max_memory_allocated(x.device)-start_bytes)/2**20 # weights, batch and all of a step
    return step,row,seconds

def attempt(f, *args):
    "What `f` returns and None, or None and why it failed"
    try: return f(*args),None
    except Exception as e: return None,why_failed(e)[:200]

def out_of_memory(why): return why is not None and any(s in why for s in ('out of memory', 'ALLOC_FAILED'))

def free(device):
    gc.collect()
    if device.type=='cuda': attempt(torch.cuda.empty_cache)

def lost(device):
    "Whether an error has left CUDA unusable in this process"
    return device.type=='cuda' and attempt(torch.cuda.synchronize, device)[1] is not None

def clocks(device):
    "State of the card, only read"
    if device.type!='cuda': return None
    query = 'name,clocks.sm,clocks.mem,power.draw,driver_version,temperature.gpu'
    r,why = attempt(lambda: subprocess.run(['nvidia-smi', f'--query-gpu={query}', '--format=csv,noheader'], capture_output=True,
        text=True, timeout=20))
    return why or r.stdout.strip() or r.stderr.strip()[:200]

def copy_bandwidth(device):
    "Bytes read and written per second by a copy of 2 GiB on the device, the best of 10"
    a,b = (torch.randn(1<<29, device=device) for _ in range(2))
    return 2*a.nbytes/device_clock(device).steps(lambda: b.copy_(a), 10)[0].min()

def differences(row, want):
    "How the first step of an arm differs from the contiguous one's, as entries of its row"
    res,(a,b) = {},(row['loss'],want['loss'])
    if not abs(a-b)<=0.05*abs(b)+0.05: res['wrong'] = f'loss {a:.4g}, contiguous {b:.4g}'
    a,b = row['grad_norm'],want['grad_norm'] # not finite where the first scale is too high for fp16; sensitive to rounding in small batches
    if math.isfinite(b) and not abs(a-b)<=0.2*b: res['doubt'] = f'norm of all gradients {a:.4g}, contiguous {b:.4g}'
    return res

def first_arm(name, size, device, dtype, warm):
    x,y = random_batch(name, size, device)
    return x,y,begin(base, name, x, y, dtype, warm)

def start_arms(name, tries, device, dtype, arms, warm, over):
    "The largest size that the contiguous arm trains on, the steps of all arms, their seconds and what they showed; None if time is over"
    for size in tries:
        first,why = attempt(first_arm, name, size, device, dtype, warm)
        if not out_of_memory(why): break
        free(device)
    found,steps,times = {a: {} for a in arms},{},{}
    for arm in arms:
        if arm!=base:
            if over(): return None
            got,why = (None,'not run: contiguous failed') if first is None else attempt(begin, arm, name, *first[:2], dtype, warm)
        else: got = first and first[2]
        if why:
            found[arm]['failed'] = why
            free(device)
            if lost(device):
                for a in arms: found[a].setdefault('failed', f'not run: CUDA cannot be used after "{arm}" failed')
                return size,{},{},found
        else: steps[arm],found[arm],times[arm] = got
    return size,steps,times,found

def finish_row(row, first, timed, size, rounds, block):
    "Times of an arm, and its speed relative to contiguous"
    pairs,seconds = pairs_of(first.seconds, timed.seconds),ms_of(timed)/1e3
    row.update(ms=1e3*seconds, wall_ms=1e3*statistics.median(timed.walls), images=size[0]/seconds, ratio=[statistics.median(pairs), min(pairs), max(pairs)],
        pairs=len(pairs), block=block)
    if len(pairs)<min(rounds, 8): row['cut'] = True

def measure(section, name, tries, device, arms, rounds, block, seconds, warm, bandwidth, over):
    "Rows of one network in one pass, or None if time is over before the first round"
    (dtype,benchmark,_),before,start = settings[section],clocks(device),time.time()
    if device.type=='cpu' and dtype==torch.float16: dtype = torch.bfloat16 # fp16 is very slow there
    torch.backends.cudnn.benchmark = benchmark
    started = start_arms(name, tries, device, dtype, arms, warm, over)
    if started is None: return None
    size,steps,times,found = started
    want = dict(found[base])
    if times: block = max(2, min(block, int(seconds/rounds/sum(times.values())))) # slow networks: shorter blocks, not fewer rounds
    timed,why = attempt(lambda: paired(steps, rounds, block, device, over=over, drop=True)) if base in steps else ({}, None)
    for arm,row in found.items():
        row.update(section=section, model=name, arm=arm, batch=size[0], size=list(size), dtype=str(dtype)[6:], benchmark=benchmark)
        if timed and arm in timed and timed[arm].failed: row['failed'] = timed[arm].failed[:200]
        elif not timed or timed[base].failed: row.setdefault('failed', why or 'not timed: contiguous failed')
        elif arm in timed:
            finish_row(row, timed[base], timed[arm], size, rounds, block)
            row.update(differences(row, want))
            if name=='resnet50' and arm in eager and bandwidth: row['share_of_roof'] = bytes_per_image*row['images']/bandwidth
    found[base].update(clocks=[before, clocks(device)], seconds=time.time()-start)
    return [*found.values()]

def fill_cache(names, shapes, device, arms, over):
    "One training step of each compiled arm"
    for name in names:
        for arm in [a for a in arms(name) if a in (base_compiled, compiled, maxed)]:
            if over(): return print(f'time is over before {name}')
            start = time.time()
            dtype = torch.bfloat16 if device.type=='cpu' else torch.float16
            why = attempt(lambda: begin(arm, name, *random_batch(name, shapes[name], device), dtype, 0))[1]
            print(f'{name}, {arm}: {why or "compiled"}, {time.time()-start:.0f} s', flush=True)
            torch.compiler.reset()
            free(device)

def said(row):
    "Ratio of a row in a table"
    if row is None: return ''
    if 'failed' in row: return 'failed'
    few = f", n={row['pairs']}" if row['pairs']<8 else ''
    return cell(row['ratio'])+few+', wrong'*('wrong' in row)

def table(rows, section):
    "Markdown: a row for each network of a pass"
    found,(_,benchmark,arms) = {(r['model'], r['arm']): r for r in rows if r['section']==section},settings[section]
    arms = [a for a in arms if a!=base and any(k[1]==a for k in found)]
    def images(r): return f"{r['images']:,.0f}" if r and 'images' in r else ''
    dtype,more = next(iter(found.values()))['dtype'],', compiled'*(section=='compiled')
    lines = [[n, r['batch'], images(r) or 'failed', *(said(found.get((n, a))) for a in arms), images(found.get((n, ours)))]
        for n in sizes if (r := found.get((n, base)))]
    return (f"{dtype}{more}, cudnn.benchmark {'on' if benchmark else 'off'}\n\n"
        + markdown(['', 'batch', 'contiguous, images/s', *arms, 'ours, images/s'], lines))

def page(rows, head):
    "Markdown: a table for each pass, where ours is behind, and what failed"
    found = {(r['section'], r['model'], r['arm']): r['ratio'] for r in rows if 'ratio' in r}
    behind = [f'{m} ({s})' for (s,m,a),r in found.items() if a==ours and any((s, m, o) in found and r[2]<found[s, m, o][1] for o in (again, plain))]
    notes = [f"- {r['model']} ({r['section']}), {r['arm']}: {k}: {r[k]}" for r in rows for k in ('failed', 'wrong', 'doubt') if k in r]
    return '\n\n'.join([head, *(table(rows, s) for s in settings if any(r['section']==s for r in rows)),
        f"Behind contiguous or torch's own channels last by more than the noise (their ranges do not meet): {', '.join(behind) or 'none'}.",
        '\n'.join(notes) or 'No arm failed, and all losses agree.'])+'\n'

def readme_table(rows):
    "Markdown for the README: passes without a search of cuDNN's, the faster of the eager arms in bold"
    found = {(r['section'], r['model'], r['arm']): r for r in rows if 'ratio' in r}
    head,lines = ['network, batch on a GPU', 'channels last', 'ours', 'ours, images/s', 'ours, compiled'],[]
    for n in [n for n in sizes if ('fp16', n, base) in found]:
        def images(section, arm): return f"{found[section, n, arm]['images']:,.0f}"
        def ratio(section, arm): return f"{found[section, n, arm]['ratio'][0]:.2f}" if (section, n, arm) in found else ''
        eager_two = [ratio('fp16', a) for a in (plain, ours)]
        cells = [f'**{r}**' if r==max(eager_two) and r>'1.02' else r for r in eager_two]
        lines.append([f"{n}, {'x'.join(map(str, found['fp16', n, base]['size']))}", *cells, images('fp16', ours), ratio('compiled', compiled)])
    return markdown(head, lines)

def header():
    cudnn = torch.backends.cudnn
    return (f"A training step: times as fast as contiguous, the median of paired rounds and their range (of 8 it covers the true median with 99.2 %; "
        f"n tells fewer). {machine()}, cuDNN {cudnn.version()}, TF32 in cuDNN {'on' if cudnn.allow_tf32 else 'off'}, "
        f"matmul precision {torch.get_float32_matmul_precision()}.")

class Sweep:
    "Which networks and arms are measured in each pass, and the rows there are"
    def __init__(self, names, passes, names_on, device, max_autotune, tiny):
        self.names,self.passes,self.names_on,self.tiny,self.max_autotune = names.split(','),passes.split(','),names_on.split(','),tiny,max_autotune
        bad = ({*self.passes}-{*settings}) | ({*self.names, *self.names_on}-{*sizes})
        if bad: sys.exit(f'unknown pass or network: {", ".join(bad)}')
        self.device,self.title,self.shapes = device,f'speed-{device.type}',tiny_sizes if tiny else sizes
        self.card = torch.cuda.get_device_name(device) if device.type=='cuda' else device.type
        old = {} if tiny else read(self.title)
        same = old and (old['card'], old['conditions']['torch'])==(self.card, torch.__version__)
        self.rows = old['rows'] if same else []

    def arms(self, section, name):
        return [a for a in settings[section][2] if (a!=maxed or self.max_autotune) and (a!=base_compiled or name in compiled_twice)]

    def cases(self, refresh):
        "Pass and network, but for what has been measured in full"
        for section in self.passes:
            some = ['resnet18'] if self.tiny and section!='fp16' else sizes
            if section in ('on', 'small') and not self.tiny: some = self.names_on
            if section=='fp32': some = ['convnext_tiny']
            for name in [n for n in self.names if n in some]:
                done = {r['arm']: r for r in self.rows if (r['section'], r['model'])==(section, name)}
                if refresh or not all(a in done and not done[a].get('cut') for a in self.arms(section, name)): yield section,name

    def tries(self, section, name):
        "Batches: half of one that does not fit, and half of that"
        n,*shape = self.shapes[name]
        if section=='small': n = min(n, 8)
        return [(m, *shape) for m in (n>>i for i in range(1 if self.tiny else 3)) if m]

    def add(self, section, name, new, bandwidth):
        self.rows = [r for r in self.rows if (r['section'], r['model'])!=(section, name)]+new
        print(f"{section:9}{name:16}", *[f"{r['arm']}: {r.get('failed') or format(r['ratio'][0], '.2f')}" for r in new[1:]],
            new[0].get('failed') or f"{new[0]['images']:.0f}/s contiguous, batch {new[0]['batch']}", f"{new[0]['seconds']:.0f} s", sep='  ', flush=True)
        if self.tiny: return
        save(self.title, rows=self.rows, card=self.card, cudnn=torch.backends.cudnn.version(), tf32=torch.backends.cudnn.allow_tf32,
            matmul=torch.get_float32_matmul_precision(), copy_bandwidth=bandwidth, bytes_per_image=bytes_per_image)
        (results/f'{self.title}.md').write_text(page(self.rows, header()))

@call_parse
def main(
    names:str=','.join(sizes), # Networks, separated by commas
    passes:str=','.join(settings), # Passes, separated by commas
    names_on:str='resnet50,resnet18,regnetx_032', # Of them, those for the passes `on` and `small`
    device:str='cuda' if torch.cuda.is_available() else 'cpu',
    rounds:int=8, # Rounds; in each, every arm runs one block
    block:int=4, # Steps a block; the first is dropped
    seconds:float=15, # For the rounds of a network; slow ones run blocks of 2 or 3 steps
    limit:float=420, # Seconds for everything
    max_autotune:bool=False, # Also compile with mode max-autotune
    precompile:bool=False, # Only fill inductor's cache on disk with the compiled arms
    refresh:bool=False, # Measure again what has been measured, of these networks and passes
    tiny:bool=False, # Batches of 2, small images, one round; writes nothing
):
    "Measure and write benchmarks/results/speed-DEVICE.json and .md"
    sweep,start = Sweep(names, passes, names_on, torch.device(device), max_autotune, tiny),time.time()
    device,(rounds,block,warm) = sweep.device,(1, 2, 1) if tiny else (rounds, block, 3)
    def over(): return time.time()-start>limit
    if not tiny and rounds<2: sys.exit('one round is for --tiny')
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        os.environ.setdefault('FASTXTEND_CL_CACHE', folder)
        if precompile:
            known = {r['model']: r['size'] for r in sweep.rows if r['arm']==base} # the batch that fitted
            return fill_cache(sweep.names, sweep.shapes | known, device, lambda n: sweep.arms('compiled', n), over)
        bandwidth = copy_bandwidth(device) if device.type=='cuda' else None
        for section,name in [*sweep.cases(refresh)]:
            new = None if over() else measure(section, name, sweep.tries(section, name), device, sweep.arms(section, name), rounds, block, seconds, warm,
                bandwidth, over)
            if new is None: print(f'{limit:g} s are over before {name} ({section}); run it again to go on'); break
            sweep.add(section, name, new, bandwidth)
            if section=='compiled': torch.compiler.reset() # else the limit of recompilations is met after a few networks
            free(device)
            if lost(device): sys.exit(f'CUDA cannot be used any more in this process, after {name} ({section}): run it again to go on')
    print(page(sweep.rows, header()))
