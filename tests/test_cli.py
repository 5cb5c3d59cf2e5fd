"The command line: what is printed where, exit statuses, and one line for each wrong argument"
import functools, importlib, inspect, json, re, subprocess, sys, types
import pytest, torch
from torch import nn
from fastxtend_cl import cli
from fastxtend_cl.precision import native_dtypes
from fastxtend_cl.cli import any_loss, main, model_step

tiny = ['--bs', '2', '--size', '32', '--device', 'cpu']

@pytest.fixture
def own(tmp_path, monkeypatch):
    "A module in the current folder, with models that are right, wrong, and none"
    (tmp_path/'own_models.py').write_text('''
import torch
from torch import nn
from fastxtend_cl.step import TrainingStep
from helpers import Faulty
def net(*middle):
    return nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), *middle, nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
def right(): return net()
def wrong(): return net(Faulty(1.5))
def step(): return TrainingStep(net(), torch.randn(2, 5, 16, 16), torch.randn(2, 10), nn.functional.mse_loss)
def number(): return 3
def wrong_small(): return nn.Sequential(nn.Conv2d(3, 8, 3, 4), Faulty(1.5), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
def small(): return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
''')
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop('own_models', None)
    sys.path[:] = [p for p in sys.path if p!=str(tmp_path)]

def test_bench_piped_is_plain(own, capsys, tmp_path):
    assert main(['bench', 'own_models:right', '--seconds', '2', '--plot', str(tmp_path/'a.png'), *tiny])==0
    out,err = capsys.readouterr()
    verdict,head,*rows = out.splitlines()
    assert verdict.split(':')[0] in ('faster', 'tie', 'fastest already', 'inconclusive') and '█' not in out and '\x1b' not in out and err==''
    assert 'ratio' in head.split() and rows[0].startswith('baseline ') and rows[1].startswith('baseline (repeat)')
    assert (tmp_path/'a.png').read_bytes().startswith(b'\x89PNG')

def test_json_is_one_object(own, capsys):
    assert main(['bench', 'own_models:step', '--seconds', '1', '--json', '--inference'])==0
    d = json.loads(capsys.readouterr().out)
    assert d['rows'][0]['arm']=='baseline' and d['conditions']['shape']==[2,5,16,16] and d['conditions']['optimizer']=='inference'
    assert main(['check', 'own_models:right', '--json', '--amp', 'bf16', *tiny])==0
    d = json.loads(capsys.readouterr().out)
    assert d['ok'] is True and d['conditions']['shape']==[2,5,32,32] and d['conditions']['autocast']=='bf16'

def test_check_of_a_wrong_step_is_status_1(own, capsys):
    assert main(['check', 'own_models:wrong', *tiny])==1
    assert capsys.readouterr().out.startswith('wrong: ')
    assert main(['check', 'own_models:right', *tiny])==0

@pytest.mark.parametrize('amp,precision', [([], None), (['--amp', 'none'], 'fp32'), (['--amp', 'bf16'], 'bf16')])
def test_kernels_shows_how_each_convolution_is_computed(own, capsys, tmp_path, amp, precision):
    assert main(['kernels', 'own_models:right', '--json', '--plot', str(tmp_path/'a.png'), *amp, *tiny])==0
    rows = json.loads(capsys.readouterr().out)['rows']
    native = 'bf16' if native_dtypes('cpu') else 'fp32'
    assert [r['call'] for r in rows if r['call'].startswith('3x3, 8 to 8') and r['call'].endswith(precision or native)]
    assert (tmp_path/'a.png').read_bytes().startswith(b'\x89PNG')
    assert main(['kernels', 'own_models:right', *tiny])==0 and 'kernels replaced' in capsys.readouterr().out.splitlines()[0]
    assert main(['kernels', 'own_models:right', '--amp', 'int8', *tiny])==2
    assert '--amp must be fp16, bf16, native or none, got int8' in capsys.readouterr().err

def test_check_and_trace_compute_as_training_does(own, monkeypatch):
    from fastxtend_cl import check, trace
    seen = []
    def stop(step, **kwargs): seen.append(step.kernels); raise ValueError('seen')
    monkeypatch.setattr(check, 'check_formats', stop); monkeypatch.setattr(trace, 'trace_formats', stop)
    for command in ('check', 'trace'): assert main([command, 'own_models:right', *tiny])==2
    assert main(['check', 'own_models:step'])==2
    assert seen==['tuned', 'tuned', 'survive'], "a step of the user's own says so itself"

def test_bench_check_leaves_out_the_wrong(own, capsys):
    assert main(['bench', 'own_models:wrong', '--check', '--seconds', '1', '--json', *tiny])==0
    rows = {r['arm']:r for r in json.loads(capsys.readouterr().out)['rows']}
    assert rows['channels last fp32']['verdict']=='failed' and rows['channels last fp32']['reason'].startswith('wrong: ')

@pytest.mark.parametrize('command', [['bench', '--seconds', '1'], ['check'], ['trace']], ids=lambda c: c[0])
def test_json_is_alone_whatever_else_is_printed(own, capsys, monkeypatch, command):
    module,name = importlib.import_module(f'fastxtend_cl.{command[0]}'),f'{command[0]}_formats'
    real,bars = getattr(module, name),[]
    @functools.wraps(real)
    def noisy(step, **kwargs):
        print('a progress bar')
        bars.append(kwargs.get('bar'))
        return real(step, **kwargs)
    monkeypatch.setattr(module, name, noisy)
    assert main([command[0], 'own_models:right', *command[1:], '--json', *tiny])==0
    out,err = capsys.readouterr()
    assert json.loads(out) and 'a progress bar' in err and bars[0] is not True

def test_a_terminal_gets_rich_tables(own, capsys, monkeypatch):
    monkeypatch.setattr(cli, '_terminal', lambda: True)
    assert main(['kernels', 'own_models:right', *tiny])==0
    out = capsys.readouterr().out
    assert ('━' in out or '─' in out) and '</' not in out and '**' not in out

def test_trace_calls_trace_formats(own, capsys, monkeypatch):
    class Answer:
        def __str__(self): return 'nothing is lost'
        def to_dict(self): return dict(rows=[])
    seen = []
    fake = types.ModuleType('fastxtend_cl.trace')
    fake.trace_formats = lambda step, seconds, bar: seen.append((step, seconds, bar)) or Answer()
    monkeypatch.setitem(sys.modules, 'fastxtend_cl.trace', fake)
    assert main(['trace', 'own_models:right', *tiny])==0 and capsys.readouterr().out=='nothing is lost\n'
    assert main(['trace', 'own_models:right', '--json', *tiny])==0 and json.loads(capsys.readouterr().out)=={'rows': []}
    assert [(tuple(s.inputs[0].shape), *more) for s,*more in seen]==[((2,5,32,32), 10., False)]*2

@pytest.mark.parametrize('args,text', [
    (['bench'], 'the following arguments are required: model'),
    (['bench', 'resnet19'], "unknown model 'resnet19'; use one of torchvision or timm, such as resnet18, or your own as module:function"),
    (['bench', 'no_such_module:f'], 'no_such_module:f: no_such_module cannot be imported'),
    (['bench', 'own_models:f'], 'own_models:f: own_models has no f'),
    (['bench', 'own_models:number'], 'own_models:number must return a torch.nn.Module or a TrainingStep, got int'),
    (['bench', 'resnet18', '--bs', '0'], '--bs must be 1 to 65536, got 0'),
    (['bench', 'resnet18', '--bs', 'many'], "argument --bs: invalid int value: 'many'"),
    (['bench', 'resnet18', '--size', '4'], '--size must be 8 to 4096, got 4'),
    (['check', 'resnet18', '--classes', '0'], '--classes must be 1 to 100000, got 0'),
    (['trace', 'resnet18', '--device', 'gpu'], "unknown device 'gpu'; use one such as cpu"),
    (['bench', 'resnet18', '--device', 'meta'], "device 'meta' is not available on this machine"),
    (['check', 'resnet18', '--amp', 'fp8'], '--amp must be fp16, bf16, native or none, got fp8'),
    (['bench', 'resnet18', '--seconds', '0'], '--seconds must be 1 to 86400, got 0.0'),
    (['bench', 'resnet18', '--plot', 'a.doc'], '--plot must be a file of type '),
    (['bench', 'resnet18', '--plot', 'no_such_folder/a.png'], '--plot no_such_folder/a.png: folder no_such_folder does not exist'),
    (['bench', 'vgg11', '--bs', '2', '--size', '8', '--device', 'cpu'], 'vgg11: baseline cannot be measured: RuntimeError: Given input size'),
    (['check', 'vit_b_16', '--bs', '2', '--size', '32', '--device', 'cpu'], 'vit_b_16: '),
    (['trace', 'resnet18', '--seconds', '0'], '--seconds must be 1 to 86400, got 0.0'),
    (['plan', 'own_models:right', '--amp', 'int8'], '--amp must be fp16, bf16, native or none, got int8'),
    (['demo', '--arch', 'resnet1001'], "unknown model 'resnet1001'; use one of torchvision or timm"),
    (['demo', '--arch', 'own_models:number'], 'own_models:number must return a torch.nn.Module'),
    (['demo', '--epochs', '0'], '--epochs must be 1 to 100, got 0'),
    (['benhc', 'resnet18'], "unknown command 'benhc'; did you mean 'bench'?"),
    (['train', 'resnet18'], "unknown command 'train'; did you mean 'trace'?"),
    (['export'], 'unknown command \'export\'; choose from demo, bench, check, trace, plan, kernels')])
def test_wrong_arguments_are_one_line_and_status_2(own, capsys, args, text):
    assert main(args)==2
    out,err = capsys.readouterr()
    assert out=='' and err.startswith(f'fastxtend-cl: {text}') and err.count('\n')==1

def arguments(command):
    "Name to default of the options of `command`, as `--help` shows them"
    return {k: v.default for k,v in inspect.signature(cli.commands[command]).parameters.items() if k!='model'}

def test_commands_share_their_arguments(capsys):
    shared = dict(bs=16, size=128, classes=10, device=None, amp='none', json=False, plot=None)
    own = dict(bench={}, check=dict(bs=4, size=64), trace=dict(bs=4, size=64), plan=dict(amp='native'), kernels=dict(amp='native'))
    for command,defaults in own.items():
        wanted = {**shared, **defaults}
        if command=='check': del wanted['plot']
        assert wanted.items()<=arguments(command).items(), command
        with pytest.raises(SystemExit): main([command, '--help'])
        text = ' '.join(capsys.readouterr().out.split())
        assert all(f'--{o}' in text for o in arguments(command)) and 'Samples a batch' in text and 'Print one JSON object' in text
    assert all(('seconds' in arguments(c))==(c!='kernels') for c in own)

quick = ['--device', 'cpu', '--epochs', '1', '--size', '32', '--bs', '256', '--seconds', '2']

def test_demo_says_how_long_it_takes_and_ends_with_one_sentence(own, capsys):
    assert main(['demo', '--arch', 'own_models:small', *quick])==0
    out = capsys.readouterr().out
    first,second = out.splitlines()[:2]
    assert first.startswith('Trains own_models:small on handwritten digits') and re.fullmatch(r'Estimated time on cpu: \d+0 seconds', second)
    head,base,cl,conditions,blank,last = out[out.rindex('correct and faster?'):].splitlines()[2:]
    assert head.split()[:2]==['accuracy', 'validation'] and base.startswith('contiguous fp32') and cl.startswith('channels last ') and not blank
    assert last.split(':')[0] in ('faster', 'tie', 'fastest already', 'inconclusive') and last.endswith('the training step is correct') and 'own_models:small' in conditions

def test_demo_of_a_wrong_step_is_status_1(own, capsys):
    assert main(['demo', '--arch', 'own_models:wrong_small', *quick])==1
    assert 'the training step is WRONG: ' in capsys.readouterr().out.splitlines()[-1]

def demo_result(verdict, ok=True, **row):
    base,again,arm = (types.SimpleNamespace(**{**dict(ratio=1., low=None, high=None), **o}) for o in ({}, {}, row))
    bench = types.SimpleNamespace(verdict=verdict, reason='8 rounds needed, 3 measured', rows=[base, again, arm])
    arms = [dict(arm=n, seconds=s, accuracy=a, valid_loss=0.1) for n,s,a in (('contiguous fp32', 10., 0.97), ('channels last bf16', 5., 0.98))]
    return cli.DemoResult(arms, types.SimpleNamespace(ok=ok, reason='weight of 0'), bench, dict(arch='net'))

@pytest.mark.parametrize('verdict,row,said', [('faster', dict(ratio=1.9, low=1.8, high=2.), 'a step of net in channels last bf16 is 1.90 times as fast as contiguous fp32 (1.80 to 2.00); the accuracy is 0.980 (contiguous: 0.970)'),
    ('fastest already', dict(ratio=0.9, low=0.8, high=0.95), 'channels last bf16 does not pay for net here: a step is 0.90 times as fast as contiguous fp32 (0.80 to 0.95)'),
    ('tie', dict(ratio=1., low=0.9, high=1.1), 'no difference in speed is shown for net; the accuracy'), ('inconclusive', {}, 'the speed of net is not known (8 rounds needed, 3 measured); the accuracy')])
def test_what_the_demo_ends_with(verdict, row, said):
    assert demo_result(verdict, **row).reason.startswith(said) and demo_result(verdict, **row).reason.endswith('the training step is correct')
    assert demo_result(verdict, None, **row).reason.endswith('the training step could not be judged: weight of 0')
    assert demo_result(verdict, False, **row).reason.endswith('the training step is WRONG: weight of 0')

def test_ctrl_c_is_status_130(monkeypatch, capsys):
    def interrupted(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'model_step', interrupted)
    assert main(['check', 'resnet18'])==130 and capsys.readouterr().err=='interrupted\n'

def test_models_by_name():
    for name,shape in (('mobilenet_v3_small', (2,3,32,32)), ('r3d_18', (2,3,8,32,32)), ('fcn_resnet50', (2,3,32,32)),
            ('test_resnet.r160_in1k', (2,3,32,32))):
        step = model_step(name, bs=2, size=32, device='cpu', classes=7)
        assert tuple(step.inputs[0].shape)==shape
        with step.preserved(): assert torch.isfinite(step.run().loss)
    assert model_step('resnet18', bs=2, size=32, device='cpu', amp='bf16').autocast==torch.bfloat16

def test_loss_of_any_output():
    y = torch.tensor([0, 1])
    scores = torch.randn(2, 3)
    assert any_loss(scores, y)==nn.functional.cross_entropy(scores, y)
    assert any_loss({'a': scores, 'b': [scores, y]}, y)==2*scores.square().mean()

def test_as_a_program(own):
    r = subprocess.run([sys.executable, '-c', 'import sys; from fastxtend_cl.cli import main; '
        'sys.exit(main(["check", "resnet18", "--bs", "zero"]))'], capture_output=True, text=True)
    assert r.returncode==2 and r.stdout=='' and r.stderr.count('\n')==1
