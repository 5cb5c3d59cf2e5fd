"The command line: what is printed where, exit statuses, and one line for each wrong argument"
import json, subprocess, sys, types
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
    assert head.split()[0]=='ratio' and rows[0].startswith('now ') and rows[1].startswith('baseline (repeat)')
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
    assert main(['kernels', 'own_models:right', *tiny])==0 and 'computed in another way than torch does' in capsys.readouterr().out.splitlines()[0]
    assert main(['kernels', 'own_models:right', '--amp', 'int8', *tiny])==2
    assert '--amp must be fp16, bf16 or none, got int8' in capsys.readouterr().err

def test_check_and_trace_compute_as_training_does(own, monkeypatch):
    from fastxtend_cl import check, trace
    seen = []
    def stop(step): seen.append(step.kernels); raise ValueError('seen')
    monkeypatch.setattr(check, 'check_formats', stop); monkeypatch.setattr(trace, 'trace_formats', stop)
    for command in ('check', 'trace'): assert main([command, 'own_models:right', *tiny])==2
    assert main(['check', 'own_models:step'])==2
    assert seen==['tuned', 'tuned', 'survive'], "a step of the user's own says so itself"

def test_bench_check_leaves_out_the_wrong(own, capsys):
    assert main(['bench', 'own_models:wrong', '--check', '--seconds', '1', '--json', *tiny])==0
    rows = {r['arm']:r for r in json.loads(capsys.readouterr().out)['rows']}
    assert rows['channels last fp32']['verdict']=='failed' and rows['channels last fp32']['reason'].startswith('wrong: ')

@pytest.mark.parametrize('command', [['bench', '--check', '--seconds', '1'], ['check'], ['trace']], ids=lambda c: c[0])
def test_slow_commands_print_nothing_but_json(own, capsys, monkeypatch, command):
    "As if all took longer than the two seconds after which a bar is shown"
    from fastxtend_cl import check, trace
    monkeypatch.setattr(check._Pace, 'wall', lambda self: 3.)
    make = trace._Costs.__init__
    monkeypatch.setattr(trace._Costs, '__init__', lambda self, device, budget: make(self, device, 3.))
    assert main([command[0], 'own_models:right', *command[1:], '--json', *tiny])==0
    json.loads(capsys.readouterr().out)

def test_a_terminal_gets_rich_tables(own, capsys, monkeypatch):
    monkeypatch.setattr(cli, '_terminal', lambda: True)
    assert main(['check', 'own_models:right', *tiny])==0
    out = capsys.readouterr().out
    assert ('━' in out or '─' in out) and '<details>' not in out

def test_trace_asks_trace_format(own, capsys, monkeypatch):
    class Answer:
        def __str__(self): return 'nothing is lost'
        def to_dict(self): return dict(rows=[])
    seen = []
    fake = types.ModuleType('fastxtend_cl.trace')
    fake.trace_formats = lambda step: seen.append(step) or Answer()
    monkeypatch.setitem(sys.modules, 'fastxtend_cl.trace', fake)
    assert main(['trace', 'own_models:right', *tiny])==0 and capsys.readouterr().out=='nothing is lost\n'
    assert main(['trace', 'own_models:right', '--json', *tiny])==0 and json.loads(capsys.readouterr().out)=={'rows': []}
    assert [tuple(s.inputs[0].shape) for s in seen]==[(2,5,32,32)]*2

@pytest.mark.parametrize('args,text', [
    (['bench'], 'the following arguments are required: model'),
    (['bench', 'resnet19'], 'resnet19 is not known to torchvision or timm'),
    (['bench', 'no_such_module:f'], 'no_such_module:f: no_such_module cannot be imported'),
    (['bench', 'own_models:f'], 'own_models:f: own_models has no f'),
    (['bench', 'own_models:number'], 'own_models:number returns a int: a torch.nn.Module or a TrainingStep is needed'),
    (['bench', 'resnet18', '--bs', '0'], '--bs 0 is out of range: it takes 1 to 65536'),
    (['bench', 'resnet18', '--bs', 'many'], "argument --bs: invalid int value: 'many'"),
    (['bench', 'resnet18', '--size', '4'], '--size 4 is out of range: it takes 8 to 4096'),
    (['check', 'resnet18', '--classes', '0'], '--classes 0 is out of range'),
    (['trace', 'resnet18', '--device', 'gpu'], '--device gpu is no device: name one such as cpu'),
    (['bench', 'resnet18', '--device', 'meta'], '--device meta is not available on this machine'),
    (['check', 'resnet18', '--amp', 'fp8'], '--amp must be fp16 or bf16, got fp8'),
    (['bench', 'resnet18', '--seconds', '0'], '--seconds 0.0 is out of range'),
    (['bench', 'resnet18', '--plot', 'a.doc'], '--plot a.doc is no kind of picture: it takes '),
    (['bench', 'resnet18', '--plot', 'no_such_folder/a.png'], '--plot no_such_folder/a.png: there is no folder no_such_folder'),
    (['bench', 'vgg11', '--bs', '2', '--size', '8', '--device', 'cpu'], 'vgg11: now cannot be measured: RuntimeError: Given input size'),
    (['check', 'vit_b_16', '--bs', '2', '--size', '32', '--device', 'cpu'], 'vit_b_16: '),
    (['bensh', 'resnet18'], 'bensh is no command: it takes demo, bench, check, trace')])
def test_wrong_arguments_are_one_line_and_status_2(own, capsys, args, text):
    assert main(args)==2
    out,err = capsys.readouterr()
    assert out=='' and err.startswith(f'fastxtend-cl: {text}') and err.count('\n')==1

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
