"""`compare`, `bench_formats` and `Learner.bench_channelslast`: the statistics on a simulated clock, planted faults as
rows, and nothing left behind. No test asserts a time"""
import json, math, random, sys
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
import numpy as np
import pytest, torch, torchvision
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
import helpers
from fastxtend_cl import arms as arms_module, bench, limits, memory, report
from fastxtend_cl.arms import Arm, ArmState, format_arms
from fastxtend_cl.bench import FormatBench, _rows, bench_formats, compare
from fastxtend_cl.limits import count_flops, peak_flops
from fastxtend_cl.precision import native_dtypes
from fastxtend_cl.convert import apply_channels_last
from fastxtend_cl.operators import switch
from fastxtend_cl.memory import can_keep_memory, kept_memory
from fastxtend_cl.step import TrainingStep
from fastxtend_cl.timing import Clock, TimedArm, least_pairs
from helpers import Faulty, adamw, process_group, two_processes

class Simulated(Clock):
    "A clock moved on by a machine with noise, a load that comes and goes, drift, and a first step after another arm's that costs more"
    def __init__(self, noise=0.05, load=0., drift=0., switch=1., seed=0):
        super().__init__()
        self.t,self.noise,self.load,self.drift,self.switch,self.rng,self.last,self.log = (0.,noise,load,drift,
            switch,random.Random(seed),None,[])
    def now(self): return self.t
    cpu = now
    def spend(self, name, seconds, switch=None):
        busy = (1 + self.load*(int(self.t)//7%2))*(1 + self.drift*self.t)
        self.t += seconds*busy*(1 + self.noise*self.rng.expovariate(1))*(1 + (self.switch if switch is None else switch)*(self.last!=name))
        self.last = name
        self.log.append(name)
    def arm(self, name, seconds, **kw): return lambda: self.spend(name, seconds, **kw)

def race(*others, seed=0, seconds=60., rounds=192, switch_of=None, **kw):
    clock = Simulated(seed=seed, **kw)
    arms = {'baseline': clock.arm('baseline', 0.1), **{f'other {i}':clock.arm(f'other {i}', 0.1/r, switch=switch_of) for i,r in enumerate(others)}}
    return compare(arms, clock=clock, bar=False, seconds=seconds, rounds=rounds),clock

machines = {'quiet': dict(noise=0.01), 'noisy': dict(noise=0.1), 'load': dict(load=1.), 'drift': dict(drift=0.02),
    'slow start': dict(switch=5.)}

@pytest.mark.parametrize('name', machines)
def test_a_planted_difference_is_found_and_a_planted_zero_is_a_tie(name):
    for planted,verdict,least in ((1.05, 'faster', 10), (1/1.05, 'slower', 10), (1.15, 'faster', 12),
            (1/1.15, 'slower', 12), (1., 'tie', 12)):
        found = Counter(race(planted, seed=s, seconds=200., **machines[name])[0]['other 0'].verdict for s in range(12))
        assert found[verdict]>=least, (planted, found)
        if verdict!='tie': assert set(found)<={verdict, 'tie'}, (planted, found)

def test_ratio_is_near_the_planted_one():
    for planted in (0.5, 0.95, 1.3, 3.):
        row = race(planted, noise=0.02)[0]['other 0']
        assert row.low<=planted<=row.high and abs(row.ratio/planted-1)<0.02

def test_first_step_of_a_block_does_not_count():
    "One arm alone pays 20 times for its first step"
    assert race(1., switch_of=20., noise=0.02)[0]['other 0'].verdict=='tie'
    clock = Simulated(noise=0.02)
    def always_first():
        clock.last = None
        clock.spend('other', 0.1)
    assert (compare({'baseline': clock.arm('baseline', 0.1), 'other': always_first}, clock=clock, bar=False)['other'].ratio
        ==pytest.approx(0.5, rel=0.05)), 'the simulation does charge for it'

def test_arms_take_turns_in_random_order_in_blocks():
    res,clock = race(1.01, 1.02, noise=0.02, rounds=least_pairs)
    block = res.conditions['block']
    log = clock.log[-4*block*least_pairs:]
    blocks = [log[i:i+block] for i in range(0, len(log), block)]
    assert all(len(set(b))==1 for b in blocks)
    orders = [tuple(b[0] for b in blocks[i:i+4]) for i in range(0, len(blocks), 4)]
    assert {tuple(sorted(o)) for o in orders}=={('baseline', 'baseline', 'other 0', 'other 1')} and len(set(orders))>least_pairs/2
    assert race(1.01, 1.02, noise=0.02, rounds=least_pairs)[1].log==clock.log, 'the same seed, the same order'

def test_stops_early_when_every_interval_is_narrow_and_at_the_deadline_otherwise():
    quick,_ = race(1.5, noise=0.001)
    assert quick.baseline.pairs==least_pairs and quick.seconds<20
    for r in quick.rows[1:]: assert r.high-r.low<0.04*r.ratio
    slow,_ = race(1.02, noise=1.)
    assert 30<slow.seconds<=60 and slow['other 0'].high-slow['other 0'].low>0.04

def test_a_clearly_slower_arm_is_dropped_early():
    res,_ = race(0.2, 1.02, noise=0.3, seconds=120.)
    assert res['other 0'].pairs==least_pairs<res['other 1'].pairs and res['other 0'].verdict=='slower'

def test_too_little_time_is_inconclusive():
    res,_ = race(2., seconds=3.)
    assert res.baseline.pairs<least_pairs and res.noise is None and res.verdict=='inconclusive' and res.best is res.baseline
    assert res['other 0'].verdict=='inconclusive' and res['other 0'].reason=='not enough time' and res['other 0'].left_out and res['other 0'].low is None
    assert str(res).startswith('inconclusive: not enough time for 1 arm: try seconds=')
    n = res.conditions['enough']
    assert f'try seconds={n}' in str(res)
    assert race(2., seconds=n)[0].verdict=='faster', 'what it says is enough'

@pytest.mark.parametrize('rounds', [1, 7])
def test_too_few_rounds_are_inconclusive(rounds):
    "As on a GPU once: 1.21 times as fast in each of seven rounds"
    base = 1+0.01*np.arange(rounds)
    rows,noise = _rows(after_race(baseline=base, repeat=base, fast=base/1.21, slow=base*2))
    res = FormatBench(rows, noise, {'enough': 90})
    assert [r.verdict for r in rows]==['baseline', 'noise', 'inconclusive', 'inconclusive'] and res.verdict=='inconclusive'
    assert [line.split()[1] for line in repr(res).splitlines()[4:6]]==['inconclusive']*2 and ' tie' not in repr(res)+res._repr_markdown_()
    assert rows[2].ratio==pytest.approx(1.21) and rows[2].reason==f'8 rounds needed, {rounds} measured'

def test_one_arm_that_is_inconclusive_leaves_no_tie():
    "It may be faster; where another is, that is enough"
    base = 1+0.001*np.arange(12)
    def of(**arms): return FormatBench(*_rows(after_race(baseline=base, repeat=base, **arms))).verdict
    few = base[:5]/1.5
    assert of(few=few, same=base)==of(few=few, slow=base*2)==of(few=few)=='inconclusive'
    assert of(few=few, fast=base/1.5)=='faster' and of(same=base, slow=base*2)=='tie' and of(slow=base*2)=='fastest already'

@pytest.mark.parametrize('arms,drawn,said', [
    (dict(fast=[0.5]*9, slow=[2.]*9), 2, ''), (dict(fast=[0.5]*3, slow=[2.]*3), 2, 'inconclusive: 8 rounds needed, 3 measured'),
    (dict(broken=None), 0, 'broken: RuntimeError: planted'), ({}, 0, 'there is no other arm to compare the baseline with')])
def test_the_plot_is_never_empty(arms, drawn, said):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    n = len(arms.get('fast') or [0]*9)
    timed = after_race(baseline=[1.]*n, repeat=[1.]*n, **{k: v or [] for k,v in arms.items()})
    for a in timed[2:]: a.failed = None if a.seconds else 'RuntimeError: planted'
    ax = FormatBench(*_rows(timed)).plot()
    marks = [l for l in ax.lines if l.get_marker()=='o']
    assert len(marks)==drawn and said in ' '.join([ax.get_title(), *(t.get_text() for t in ax.texts)]).replace('\n', ' ')
    plt.close('all')

def after_race(**blocks):
    "Arms as after a race: name to seconds by round"
    return [TimedArm(n, None, seconds=dict(enumerate(s)), cpu=dict(enumerate(s))) for n,s in blocks.items()]

def test_noise_floor_overrules_an_interval():
    "Two identical arms 20 % apart: a difference of 15 % is nothing, however narrow its interval"
    wobble = 1+0.001*np.arange(20)
    rows,noise = _rows(after_race(baseline=wobble, repeat=wobble/1.2, less=wobble/1.15, more=wobble/1.4))
    assert noise[0]>1.1 and {r.arm:r.verdict for r in rows[2:]}=={'less': 'tie', 'more': 'faster'}
    assert 'The baseline and its repeat differ by more than chance' in bench._noise_notes(noise)[0]
    rows,noise = _rows(after_race(baseline=wobble, repeat=wobble, less=wobble/1.15))
    assert rows[2].verdict=='faster' and bench._noise_notes(noise)==[]

def test_pairs_are_of_the_same_round():
    "Rounds get ten times slower one after another; the ratio within each is the same"
    base = 10.**np.arange(10)
    rows,_ = _rows(after_race(baseline=base, repeat=base, other=base/2))
    assert (rows[2].ratio,rows[2].low,rows[2].high)==(2,2,2)
    a,b,c = after_race(baseline=base, repeat=base, other=base/2)
    for i in (0,3): del c.seconds[i], c.cpu[i]
    assert _rows([a,b,c])[0][2].pairs==8

class Backwards(Simulated):
    def __init__(self, every, **kw): super().__init__(**kw); self.every,self.looks = every,0
    def now(self):
        self.looks += 1
        return self.t - 3600*(self.looks%self.every==0)

def test_a_clock_that_goes_backwards():
    clock = Backwards(97, noise=0.01)
    res = compare({'baseline': clock.arm('baseline', 0.1), 'other': clock.arm('other', 0.1/1.2)}, clock=clock, bar=False)
    assert res['other'].verdict=='faster' and all(s>0 for r in res.rows for s in r.blocks.values()) and abs(res['other'].ratio-1.2)<0.05
    clock = Backwards(2)
    with pytest.raises(ValueError, match=r'nothing could be measured: the clock went backwards in each of \d+ blocks'):
        compare({'baseline': clock.arm('baseline', 0.1)}, clock=clock, bar=False, seconds=1e6)
    a,b,c = after_race(baseline=[1.]*8, repeat=[1.]*8, other=[])
    c.backwards = 8
    row = _rows([a,b,c])[0][2]
    assert (row.verdict,row.reason)==('failed', 'the clock went backwards in each of 8 blocks')

def test_failures_are_rows():
    clock,n = Simulated(),Counter()
    def later():
        n['later'] += 1
        if n['later']>30: raise RuntimeError('broke\nand a long trace')
        clock.spend('later', 0.1)
    def at_once(): raise KeyError('gone')
    def huge(): return torch.empty(1<<60)
    res = compare({'baseline': clock.arm('baseline', 0.1), 'later': later, 'at once': at_once, 'huge': huge,
        'fine': clock.arm('fine', 0.05)}, clock=clock, bar=False)
    assert res['later'].verdict==res['at once'].verdict==res['huge'].verdict=='failed' and res.best.arm=='fine'
    assert (res['later'].reason=='RuntimeError: broke' and res['at once'].reason=="KeyError: 'gone'"
        and res['huge'].reason.startswith('out of memory: '))
    assert res['later'].pairs>0 and res['later'].ratio is None
    none = compare({'baseline': clock.arm('baseline', 0.1), 'at once': at_once}, clock=clock, bar=False)
    assert none.verdict=='inconclusive' and none.reason=='all other arms failed' and none.baseline.seconds>0

def test_a_failing_baseline_is_an_error():
    clock,n = Simulated(),Counter()
    def later():
        n['f'] += 1
        if n['f']>40: raise RuntimeError('broke')
        clock.spend('baseline', 0.1)
    with pytest.raises(ValueError, match='baseline failed while it was measured: RuntimeError: broke'):
        compare({'baseline': later}, clock=clock, bar=False)
    with pytest.raises(ValueError, match='baseline cannot be measured: RuntimeError: broke'): compare({'baseline': later}, clock=clock, bar=False)

@pytest.mark.parametrize('at,rounds', [(1, 0), (10, 0), (100, 3), (400, 17)])
def test_ctrl_c_returns_the_partial_result(at, rounds):
    clock = Simulated(noise=0.2)
    def arm(name, seconds):
        def f():
            if len(clock.log)>=at: raise KeyboardInterrupt
            clock.spend(name, seconds)
        return f
    res = compare({'baseline': arm('baseline', 0.1), 'other': arm('other', 0.05)}, clock=clock, bar=False, seconds=600, rel_tol=0.001)
    assert res.interrupted and res.baseline.pairs>=rounds and (rounds==0)==(res.baseline.pairs==0)
    assert res.verdict==('faster' if res['other'].pairs>=least_pairs else 'inconclusive') and 'Interrupted after' in str(res)
    if not rounds: assert res['other'].reason=='interrupted before it was measured'

def test_arguments():
    f = {'baseline': lambda: None}
    for kw,text in ((dict(seconds=0), 'seconds must be above 0, got 0'),
                    (dict(rounds=1), 'rounds must be at least 8 for a verdict, got 1'),
                    (dict(block=1), 'block must be at least 2, since its first step does not count, got 1'),
                    (dict(rel_tol=4), 'rel_tol must be between 0 and 1, such as 0.04, got 4')):
        with pytest.raises(ValueError, match=text): compare(f, **kw)
    with pytest.raises(ValueError, match='arms must be a dict of names and functions, got none'): compare({})

# operations

@settings(max_examples=30, deadline=None)
@given(st.data())
def test_flops_are_the_products_counted(data):
    "Ones convolved with ones sum up to the number of products; padding would hide some"
    draw = data.draw
    g,transposed,nd = draw(st.sampled_from((1, 2, 3))),draw(st.booleans()),draw(st.integers(1, 3))
    i,o,k,s,d = g*draw(st.integers(1, 3)),g*draw(st.integers(1, 3)),draw(st.integers(1, 3)),draw(st.integers(1, 2)),draw(st.integers(1, 2))
    cls = getattr(nn, f'Conv{"Transpose" if transposed else ""}{nd}d')
    m = cls(i, o, k, stride=s, dilation=d, groups=g, bias=False)
    nn.init.ones_(m.weight)
    x = torch.ones(draw(st.integers(1, 3)), i, *[draw(st.integers(5, 7)) for _ in range(nd)], requires_grad=draw(st.booleans()))
    products = int(m(x).sum().item())
    assert count_flops(lambda: m(x))==2*products
    assert count_flops(lambda: m(x).sum().backward())==2*products*(3 if x.requires_grad else 2)

def test_torchs_count_of_a_grouped_backward_is_still_too_high():
    "When this fails, torch counts rightly and our formula may go"
    m,x = nn.Conv2d(8, 8, 3, groups=8),torch.randn(1, 8, 6, 6, requires_grad=True)
    with FlopCounterMode(display=False) as torchs: m(x).sum().backward()
    assert torchs.get_total_flops()>count_flops(lambda: m(x).sum().backward())==3*2*(16*8*9)

def test_matrix_products_are_counted():
    m,x = nn.Linear(5, 7),torch.randn(3, 5, requires_grad=True)
    assert count_flops(lambda: m(x).sum().backward())==3*2*3*5*7

def test_bytes_are_inputs_and_outputs():
    a,b,small = torch.zeros(100),torch.zeros(100),torch.zeros(1)
    for f,n in ((lambda: a+b, 1200), (lambda: a.add_(b), 1200), (lambda: torch._foreach_add_([a, b], 1.), 1600), (lambda: a.view(10, 10).t(), 0),
            (lambda: torch.empty(1000), 0), (lambda: a.copy_(small.expand(100)), 404+400), (lambda: torch.add(a, b, out=torch.empty(100)), 1200)):
        assert limits.count_bytes(f)==n
    x = torch.zeros(100, requires_grad=True)
    assert limits.count_bytes(lambda: x.relu().backward(torch.ones(100)))>=400+800+1200, 'ones, forward, backward'

def test_the_larger_share_of_the_peak_is_shown():
    def shown(memory, compute): return bench._share(bench.BenchRow('a', 'faster', of_memory=memory, of_peak=compute))
    assert [shown(*o) for o in ((0.5, 0.3), (0.2, 0.3), (None, 0.3), (None, None))]==['50% memory', '30% compute', '30% compute', '']

def test_the_table_fits():
    rows = [bench.BenchRow(n, v, ratio=1.234, low=1.123, high=12.345, seconds=123.4e-3, memory=12345<<20, of_memory=0.99, of_peak=0.9, first_seconds=123.4)
        for n,v in (('baseline', 'baseline'), ('baseline (repeat)', 'noise'), ('channels last bf16, tuned', 'faster'), ('contiguous fp32', 'inconclusive'))]
    res = FormatBench(rows, (0.99, 1.01))
    assert max(map(len, repr(res).splitlines()[1:6]))<=100 and len(res.cells()[0])==6 and 'noise: ±1.0 %' in repr(res)
    assert 'peak MiB' in res.table() and 'GB/s' not in res.table(), 'columns that are not empty'

def test_a_machine_that_changes_is_a_note():
    def base(*s): return after_race(baseline=s)[0]
    assert bench._drift_notes(base(*[1.]*9), {}, {})==bench._drift_notes(base(*[1.]*3, *[9.]*3), {}, {})==bench._drift_notes(base(), {}, {})==[]
    assert bench._drift_notes(base(*[1.]*6, *[1.2]*3), {}, {})==['The machine changed: in the last third of the rounds a step took 1.20 times as long as in the first.']
    assert bench._drift_notes(base(*[1.]*9), dict(clock=1980), dict(clock=1755))==['The clock of the GPU changed from 1980 to 1755 MHz during the measurement.']
    assert bench._drift_notes(base(*[1.]*6, *[1.2]*3), dict(clock=1980), dict(clock=1950))==[], 'the clock knows better'

def test_conditions_are_recorded_and_printed(capsys, monkeypatch):
    state = iter((dict(clock=1000, power=80., load=0.5), dict(clock=2000, power=300., load=0.5)))
    monkeypatch.setattr(bench, 'state_of', lambda device: next(state))
    clock = Simulated(noise=0.01)
    res = compare({'baseline': clock.arm('baseline', 0.1), 'other': clock.arm('other', 0.1)}, clock=clock, bar=False)
    assert {'threads', 'torch', 'instructions', 'onednn', 'cudnn_benchmark', 'tf32', 'before', 'after', 'seconds', 'date'}<=set(res.conditions)
    assert res.notes[-1].startswith('The clock of the GPU changed from 1000 to 2000 MHz')
    json.dumps(res.to_dict())
    res.about()
    said = capsys.readouterr().out.splitlines()
    assert 'before           clock 1000, power 80, load 0.5' in said and len(said)==len(res.conditions)
    monkeypatch.undo()
    assert report.state_of('cpu').keys()<={'load'}

def test_peak_flops_leaves_the_generators_alone():
    state = torch.get_rng_state()
    assert 1e8<peak_flops('cpu', seconds=0.01)<1e15 and torch.equal(state, torch.get_rng_state())

# steps

class Tick(nn.Module):
    "Moves a simulated clock on, by format and precision"
    # in a list, for a step to leave it alone
    def __init__(self, clock, seconds): super().__init__(); self.clock,self.seconds = [clock],seconds
    def forward(self, x):
        key = ('channels last' if not x.is_contiguous() else 'contiguous') + (' bf16' if torch.is_autocast_enabled('cpu') else ' fp32')
        clock_of(self).spend(key, self.seconds[key])
        return x

clocks = {}
def clock_of(tick): return clocks['baseline']

def network(*middle, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *middle,
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))

step_of = partial(helpers.step_of, bs=6, size=12)
quick = dict(seconds=60., bar=False, block=2, rounds=8)

@pytest.fixture(autouse=True)
def fixed_peak(request, monkeypatch):
    if not any(o in request.node.name for o in ('peak_flops', 'operations')): monkeypatch.setattr(bench, 'peak_flops', lambda *a, **kw: 1e12)

def simulated(seconds, **kw):
    clocks['baseline'] = clock = Simulated(noise=0.02, **kw)
    return step_of(network(Tick(None, seconds)), opt=adamw),clock

costs = {'contiguous fp32': 0.1, 'channels last fp32': 0.1/1.05, 'contiguous bf16': 0.1, 'channels last bf16': 0.13}

def test_a_step_whose_speed_is_known(monkeypatch):
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [torch.bfloat16])
    step,clock = simulated(costs)
    res = bench_formats(step, ['channels last fp32', 'contiguous bf16, tuned', 'channels last bf16'], clock=clock, bar=False)
    assert {r.arm:r.verdict for r in res.rows}=={'baseline': 'baseline', 'baseline (repeat)': 'noise', 'channels last fp32': 'faster',
        'contiguous bf16, tuned': 'tie', 'channels last bf16': 'slower'}
    assert res.best.arm=='channels last fp32' and res.conditions['baseline']=='contiguous fp32' and abs(res.best.ratio-1.05)<0.02
    assert res.break_even==math.ceil(res.seconds/(res.baseline.seconds-res.best.seconds)) and res.best.samples==pytest.approx(6/res.best.seconds)
    assert str(res).startswith(f'faster: channels last fp32 is {res.best.ratio:.2f} times as fast as '
        'the baseline (contiguous fp32), 1.0')

def test_all_verdicts(monkeypatch):
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [])
    for cost,verdict,words in ((0.2, 'fastest already', 'the baseline (contiguous fp32) is faster than all other arms'),
            (0.1, 'tie', 'no faster setting found; keeping the baseline (contiguous fp32)')):
        step,clock = simulated({**costs, 'channels last fp32': cost})
        res = bench_formats(step, clock=clock, bar=False)
        assert res.verdict==verdict and res.reason.startswith(words) and res.best is res.baseline and res.break_even is None

def test_baseline_in_channels_last_and_bf16(monkeypatch):
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [torch.bfloat16])
    step,clock = simulated({**costs, 'channels last bf16': 0.05})
    step.autocast = torch.bfloat16
    for baseline in (None, Arm('baseline', 'channels_last')):
        res = bench_formats(step, clock=clock, bar=False, baseline=baseline)
        assert res.conditions['baseline']==('contiguous bf16' if baseline is None else 'channels last bf16')
        assert ('channels last bf16, tuned' in [r.arm for r in res.rows]
            and res.baseline.seconds==pytest.approx(0.1 if baseline is None else 0.05, rel=0.1))
    apply_channels_last(step.model, step.optimizer)
    assert bench_formats(step, clock=clock, bar=False).conditions['baseline']=='mixed bf16'
    step.convert('channels_last')
    assert bench_formats(step, clock=clock, bar=False).conditions['baseline']=='channels last bf16'

@pytest.mark.parametrize('seconds', [5., 60., 200.])
@pytest.mark.parametrize('cost,slower', [(0.1, 1), (1., 1), (1., 5), (8., 1)])
def test_seconds_are_a_bound(monkeypatch, seconds, cost, slower):
    "Of the whole call, with extras and loader; the machine may get slower after a third"
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [torch.bfloat16])
    monkeypatch.setattr(bench, 'peak_bandwidth', lambda *a, **kw: 1e10)
    longest = [0.]
    class Slower(Simulated):
        def spend(self, name, s, switch=None):
            before = self.t
            super().spend(name, s*(slower if self.t>seconds/3 else 1), switch)
            longest[0] = max(longest[0], self.t-before)
    clocks['baseline'] = clock = Slower(noise=0.02)
    step = step_of(network(Tick(None, {k: cost*v/0.1 for k,v in costs.items()})), opt=adamw)
    res = bench_formats(step, clock=clock, bar=False, seconds=seconds, loader=Loader(clock, step, cost/10))
    assert clock.t<=1.1*seconds+longest[0] and res.seconds==pytest.approx(clock.t, rel=0.01)
    for r in res.rows[2:]: assert r.pairs>=least_pairs or r.verdict=='inconclusive' and r.left_out or slower>1
    if seconds==5. and cost==1.:
        assert str(res).startswith('inconclusive: not enough time for 4 arms: try seconds=') and res.baseline.seconds>0
        assert res.notes[0].startswith('Left out for lack of time: channels last bf16, tuned; channels last fp32, tuned; channels last fp32; contiguous bf16, tuned (seconds=')
    if seconds==200. and cost==1. and slower==1:
        assert any(r.pairs>=least_pairs for r in res.rows[2:]) and any(n.startswith('Not enough time for ') for n in res.notes)
    if seconds==200. and cost==0.1: assert not [n for n in res.notes if 'time' in n] and res.loader and res.baseline.memory and res.baseline.flops

class Slow(torch.optim.AdamW):
    "Its step takes simulated time"
    cost = 0.05
    def step(self, closure=None):
        clock_of(None).spend('optimizer', self.cost, switch=0.)
        clock_of(None).last = None
        return super().step(closure)

@pytest.mark.parametrize('cost,opt,said', [(0.05, {}, 'of the step of baseline: with `fused=True`, Slow is faster'), (0.05, dict(fused=True), 'of the step of baseline.'), (0.001, {}, '')])
def test_the_share_of_the_optimizer(cost, opt, said, monkeypatch):
    monkeypatch.setattr(Slow, 'cost', cost)
    step,clock = simulated(costs, switch=0.)
    step.optimizer = Slow(step.model.parameters(), **opt)
    res = bench_formats(step, ['contiguous fp32'], clock=clock, bar=False)
    found = [n for n in res.notes if 'optimizer' in n]
    assert len(found)==bool(said) and said in ''.join(found) and 'step' not in vars(step.optimizer)

def test_fastais_optimizers_have_no_fused_hint():
    from fastai.optimizer import Adam, OptimWrapper
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Slow, 'cost', 0.05)
    for opt,hint in ((lambda m: OptimWrapper([*m.parameters()], Slow), True), (lambda m: Adam([*m.parameters()], lr=0.1), False)):
        step,clock = simulated(costs, switch=0.)
        step.optimizer = opt(step.model)
        if not hint: step.optimizer.cbs = [*step.optimizer.cbs, lambda p, **kw: clock.spend('optimizer', 0.02, switch=0.)]
        found = [n for n in bench_formats(step, ['contiguous fp32'], clock=clock, bar=False).notes if 'optimizer' in n]
        assert len(found)==1 and ('fused' in found[0])==hint, found
    monkey.undo()

class Loader:
    "Batches that take `seconds` of simulated time"
    def __init__(self, clock, step, seconds, n=20):
        self.clock,self.batch,self.seconds,self.n = clock,(step.inputs[0].clone(),step.targets[0].clone()),seconds,n
    def __iter__(self):
        for _ in range(self.n):
            self.clock.t += self.seconds
            yield self.batch

@pytest.mark.parametrize('wait', [0., 0.1, 0.9])
def test_whole_epoch(wait, monkeypatch):
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [])
    step,clock = simulated({**costs, 'channels last fp32': 0.05}, switch=0.)
    res = bench_formats(step, clock=clock, bar=False, seconds=200., loader=Loader(clock, step, wait))
    assert res.loader['share']==pytest.approx(wait/(wait+0.102), abs=0.02)
    assert (res.loader['ratio']==pytest.approx((wait+0.102)/(wait+0.051), rel=0.05)
        and res.loader['low']<=res.loader['ratio']<=res.loader['high'])
    assert f'of the time of a batch; whole epochs with {res.best.arm} are' in str(res)

def test_whole_epoch_with_too_few_batches(monkeypatch):
    step,clock = simulated(costs)
    assert bench_formats(step, ['channels last fp32'], clock=clock, bar=False, loader=Loader(clock, step, 0.1, n=1)).loader=={}

def state(step):
    opt = step.optimizer.state_dict() if step.optimizer else {}
    return ([(n,p.detach().clone(),p.stride(),id(p),'none' if p.grad is None else p.grad.clone())
                for n,p in step.model.named_parameters()],
            [(n,b.clone()) for n,b in step.model.named_buffers()], torch.get_rng_state(), random.getstate()[1],
            [t.clone() for s in opt.get('state', {}).values() for t in s.values() if isinstance(t, torch.Tensor)],
            step.tuned, [m.training for m in step.model.modules()],
            [len(m._forward_hooks) for m in step.model.modules()],
            id(step.inputs[0]), id(step.targets[0]), step.inputs[0].stride(),
            step.loss_scale, 'none' if step.model._compiled_call_impl is None else 'compiled', len(list(step.model.modules())))

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b) and a.dtype==b.dtype
    return len(a)==len(b) and all(map(same, a, b)) if isinstance(a, (list,tuple)) else a==b

def test_same():
    step = step_of(network(), opt=adamw)
    before = state(step)
    assert same(state(step), before)
    step.run()
    assert not same(state(step), before)

def interrupt(at):
    n = [0]
    def setup(step):
        apply_channels_last(step.model, step.optimizer)
        step.model[2].inplace = True
        def f():
            n[0] += 1
            if n[0]==at: raise KeyboardInterrupt
            return step.run(keep='loss')
        return f
    return setup

@pytest.mark.parametrize('fault', [None, 'raises', 'interrupted at 1', 'interrupted at 12', 'changes all'])
@pytest.mark.parametrize('trained', [False, True])
def test_nothing_is_left_behind(fault, trained):
    step = step_of(network(), opt=adamw)
    if trained: step.run(); step.model.eval()
    def raises(s): apply_channels_last(s.model, s.optimizer); s.model[2].inplace = True; raise MemoryError('planted')
    def changes(s):
        s.model.append(nn.Identity())
        s.model[0].weight.data = s.model[0].weight.data.clone()
        s.inputs = (s.inputs[0].clone(),)
        s.targets = (s.targets[0].clone(),)
        s.loss_scale = 3.
        random.random()
    arms = ({None: {}, 'raises': {'own': raises}, 'changes all': {'own': changes}}.get(fault)
        if fault is None or 'at' not in fault else {'own': interrupt(int(fault.split()[-1]))})
    before = state(step)
    res = bench_formats(step, ['contiguous bf16', 'channels last fp32', 'channels last bf16', *arms.items()],
        loader=[(step.inputs[0]+1, step.targets[0])]*8, **quick)
    assert same(state(step), before)
    assert res.interrupted==(fault is not None and 'interrupted' in fault)
    if fault=='raises': assert res['own'].reason=='out of memory: MemoryError: planted'
    if fault=='changes all': assert res['own'].verdict!='failed'

def test_steps_that_cannot_be_made():
    model = network()
    cases = [(TrainingStep(model, torch.randn(2, 3, 12, 12), torch.tensor([0, 1]), lambda p,t: p.detach().mean()),
        'baseline cannot be measured: ValueError: the loss has no gradient'),
             (TrainingStep(model, torch.randn(2, 5, 12, 12), torch.tensor([0, 1]), F.cross_entropy),
                 'baseline cannot be measured: RuntimeError: .*expected input.* to have 3 channels, but got 5'),
             (TrainingStep(model, torch.randn(2, 3, 12, 12)*math.nan, torch.tensor([0, 1]), F.cross_entropy),
                 'baseline cannot be measured: its loss is nan')]
    for step,text in cases:
        with pytest.raises(ValueError, match=text): bench_formats(step, **quick)
    with pytest.raises(ValueError, match="unknown arm 'contiguous fp8': it must be one of 'contiguous fp32', 'channels last fp32'"):
        bench_formats(step_of(model), ['contiguous fp8'])
    with pytest.raises(ValueError, match="names of arms must be unique, got 'baseline' twice"):
        bench_formats(step_of(model), {'baseline': print})
    with pytest.raises(TypeError, match="the arm 'x' must be a function of the step, got int"): bench_formats(step_of(model), {'x': 3})
    with pytest.raises(ValueError, match="memory_format must be 'contiguous', 'channels_last' or None, got 'nhwc'"): Arm('x', 'nhwc')

def test_an_arm_that_computes_something_else_is_rejected():
    def loses_gradients(step):
        step.model[0].requires_grad_(False)
        step.model[4].requires_grad_(False)
        step.loss_func = lambda p,t: F.cross_entropy(p.detach()+0.01*p, t)
    arms = {'loss': lambda s: s.model[-1].weight.data.mul_(50), 'nan': lambda s: s.model[0].weight.data.fill_(math.nan),
        'gradients': loses_gradients, 'right': lambda s: None}
    res = bench_formats(step_of(network(), opt=adamw), arms, **quick)
    assert res['loss'].reason.startswith('rejected: loss ') and res['nan'].reason=='its loss is nan'
    assert res['gradients'].reason.startswith('rejected: norm of the gradient of ') and res['right'].verdict!='failed'

def test_rounding_is_not_rejected():
    "Batch normalization over two values multiplies the rounding of bf16: gradients of five times the norm are still OK"
    import torchvision
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    res = bench_formats(TrainingStep(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), F.cross_entropy),
        [Arm('bf16', 'channels_last', torch.bfloat16)], **quick)
    assert res['bf16'].verdict!='failed', res['bf16'].reason

class Scaled(torch.autograd.Function):
    "The identity, with a gradient `k` times too large"
    @staticmethod
    def forward(ctx, x, k): ctx.k = k; return x.view_as(x)
    @staticmethod
    def backward(ctx, g): return ctx.k*g, None

def tiny_batch(bs, size=32, seed=0):
    "Batch normalization over few values, the last of them over `bs`; where that is two, the gradient before it is all rounding"
    torch.manual_seed(seed)
    def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    model = nn.Sequential(*[block(3 if i==0 else 8, 8) for i in range(round(math.log2(size)))], nn.Flatten(), nn.Linear(8, 4))
    return TrainingStep(model, torch.randn(bs, 3, size, size), torch.randint(0, 4, (bs,)), F.cross_entropy, adamw(model))

def scaled_loss(k):
    "Three times too large, turned round, or lost"
    def setup(step):
        old = step.loss_func
        step.loss_func = lambda p,t: old(Scaled.apply(p, k), t)
    return setup

def lost_body(step): step.model[-1].register_forward_pre_hook(lambda m, a: (Scaled.apply(a[0], 0.),))

def judged(step, *arms):
    "What the first steps of `arms` are found to be: name to reason"
    base,*others = [arms_module.step_arm(step, a, False) for a in (Arm('baseline'), *arms)]
    for a in (base, *others): a.attempt(a.first)
    judge = arms_module.Judge(step, base)
    for a in others:
        if not a.failed: judge(a)
    return {a.name: a.failed for a in others}

low = torch.bfloat16
@pytest.mark.parametrize('bs,size', [(2, 32), (2, 64), (3, 32), (4, 32), (16, 32)])
@pytest.mark.parametrize('seed', range(3))
def test_tiny_batches_are_judged_by_what_rounding_does_to_them(bs, size, seed, monkeypatch):
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [low])
    step = tiny_batch(bs, size, seed)
    before = state(step)
    right = judged(step, *format_arms(step).values(), Arm('as is', setup=lambda s: None))
    assert len(right)==7+1 and not any(right.values()), right
    faults = {'triple': scaled_loss(3.), 'third': scaled_loss(1/3), 'lost': scaled_loss(0.), 'lost body': lost_body, 'nan': scaled_loss(math.nan)}
    wrong = judged(step, *[Arm(f'{n} {d}', f, d, setup=s) for n,s in faults.items() for f,d in (('channels_last', None), ('contiguous', low))])
    assert all(wrong.values()), wrong
    assert {v for k,v in wrong.items() if 'nan' in k}=={'its gradients are not finite'}
    assert all(v.startswith('rejected: norm of the gradient of ') for k,v in wrong.items() if 'nan' not in k), wrong
    assert same(state(step), before)

def test_a_weight_whose_scale_the_next_norm_removes_is_no_fault(monkeypatch):
    "Its gradient is rounding alone: in fp32 a small part of what it is in the bf16 of the baseline"
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [low])
    torch.manual_seed(0)
    model = nn.Sequential(torchvision.models.densenet121().features[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4))
    step = TrainingStep(model, torch.randn(4, 3, 32, 32), torch.arange(4), F.cross_entropy, autocast=low)
    right = judged(step, *format_arms(step).values())
    assert not any(right.values()), right
    wrong = judged(step, Arm('third', 'channels_last', None, setup=scaled_loss(1/3)), Arm('lost', 'channels_last', None, setup=scaled_loss(0.)))
    assert all(wrong.values()), wrong

@pytest.mark.parametrize('bs,size', [(2, 32), (8, 48)])
def test_a_bias_before_a_batch_norm_has_a_gradient_of_rounding_alone(bs, size):
    "What of it is left is how the sum over pixels rounds: of another size in each format"
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(32, 10))
        step = TrainingStep(model, torch.randn(bs, 3, size, size), torch.arange(bs), F.cross_entropy)
        right = judged(step, *format_arms(step).values())
        assert not any(right.values()), right

def test_random_layers_are_no_fault():
    "Dropout of a batch of two draws other numbers in another memory format"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.7), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    step = TrainingStep(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), F.cross_entropy)
    res = judged(step, Arm('cl', 'channels_last'), Arm('low', 'channels_last', low))
    assert not any(res.values()), res

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.head,self.aux = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),nn.Linear(8, 4),nn.Linear(8, 4)
    def forward(self, x): return self.head(h := self.body(x)),self.aux(h)

def test_a_lost_term_is_found():
    "The loss is the same, and one of its two terms has no gradient"
    def loss(term): return lambda ps,t: F.cross_entropy(ps[0], t)+0.3*F.cross_entropy(term(ps[1]), t)
    def without(step): step.loss_func = loss(torch.Tensor.detach)
    step = step_of(TwoHeads())
    step.loss_func = loss(lambda p: p)
    for dtype in (None, low):
        res = judged(step, Arm('lost', 'channels_last', dtype, setup=without), Arm('right', 'channels_last', dtype))
        assert res['right'] is None and res['lost'].startswith('rejected: norm of the gradient of aux.'), res
    res = judged(step, Arm('half', setup=lambda s: s.model.head.weight.register_hook(lambda g: 0.5*g)))
    assert res['half'].startswith('rejected: norm of the gradient of head.weight') and not step.model.head.weight._backward_hooks

def test_what_a_function_returns_decides_what_is_compared():
    "Nothing, or its own tensors: these are no gradients"
    step = step_of(network())
    res = judged(step, Arm('nothing', setup=lambda s: lambda: None), Arm('output', setup=lambda s: lambda: s.model(*s.inputs)))
    assert not any(res.values()), res

def test_a_wrong_arm_is_found_by_the_check():
    step = step_of(network(Faulty()), bs=8)
    res = bench_formats(step, ['channels last fp32', 'contiguous fp32'], check=True, **quick)
    assert (res['channels last fp32'].verdict=='failed' and res['channels last fp32'].reason.startswith('wrong: ')
        and 'it starts in the backward pass of `3`' in res['channels last fp32'].reason)
    assert res['contiguous fp32'].verdict!='failed'
    assert bench_formats(step, ['channels last fp32'], **quick)['channels last fp32'].verdict!='failed', 'the comparison of norms lets 5 % pass'

@pytest.mark.parametrize('bar', [False, True])
def test_the_check_shows_a_bar_only_where_the_measurement_does(bar, monkeypatch):
    "On a slow machine it would stand in front of the JSON of a command"
    seen,real = [],bench.check_formats
    monkeypatch.setattr(bench, 'check_formats', lambda s, **kw: seen.append(kw['bar']) or real(s, **{**kw, 'bar': False}))
    bench_formats(step_of(network()), ['channels last fp32'], check=True, **{**quick, 'bar': bar})
    assert seen==[bar]

@pytest.mark.parametrize('always', [False, True])
def test_fp16_steps_that_make_no_update_do_not_count(always):
    "A loss of 300 overflows at a scale of 1024"
    step = step_of(network(), opt=adamw)
    factor = 1e30 if always else 3e3
    step.loss_func = lambda p,t: factor*F.cross_entropy(p, t)
    res = bench_formats(step, [Arm('fp16', dtype=torch.float16)], **quick)
    if always: assert res['fp16'].reason.startswith('gradients overflow in fp16 even at a loss scale of') and res['fp16'].verdict=='failed'
    else: assert res['fp16'].verdict!='failed'
    assert step.loss_scale==1024

def test_arms_by_device_and_model(monkeypatch):
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [torch.float16, torch.bfloat16])
    plain = [f'{f} {p}' for p in ('fp32', 'fp16', 'bf16') for f in ('contiguous', 'channels last')]
    arms = format_arms(step_of(network()))
    assert [*arms]==[*plain, *[f'{n}, tuned' for n in plain[1:]]]
    assert {a.tuned for n,a in arms.items() if n.endswith('tuned')}=={True} and {arms[n].tuned for n in plain}=={False}
    last = [n for n in arms if n.startswith('channels')]
    assert [*format_arms(step_of(network()), compile=True)][len(arms):]==['baseline, compiled', *[f'{n}, compiled' for n in last]]
    linear = TrainingStep(nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2), F.mse_loss)
    assert list(format_arms(linear))==['contiguous fp32', 'contiguous fp16', 'contiguous bf16']
    assert list(format_arms(step_of(network().double())))==['contiguous fp64', 'channels last fp64', 'channels last fp64, tuned']
    step = step_of(network())
    monkeypatch.setattr(TrainingStep, 'device', torch.device('cuda'))
    assert [*format_arms(step)]==plain==[a.name for a in arms_module.usual_arms(step)], 'tuned kernels are for a CPU'

def test_arms_by_default(monkeypatch):
    "A low precision with tuned kernels only, and not the setting of the baseline"
    monkeypatch.setattr(arms_module, 'native_dtypes', lambda device: [torch.bfloat16])
    tuned = ['contiguous bf16, tuned', 'channels last fp32, tuned', 'channels last bf16, tuned']
    def names(step, compile=False, **kw): return {a.name for a in arms_module.chosen_arms(step, None, compile, Arm('baseline', **kw))}
    step = step_of(network())
    assert names(step)=={'channels last fp32', *tuned}
    step.tuned = True
    assert names(step, memory_format='channels_last')=={'contiguous fp32', 'channels last fp32', *tuned}-{'channels last fp32, tuned'}
    assert names(step, memory_format='channels_last', tuned=False)=={'contiguous fp32', *tuned}
    assert names(step_of(network()), True)-names(step_of(network()))=={'baseline, compiled',
        *[f'{n}, compiled' for n in ('channels last fp32', *tuned[1:])]}

kernels_of = {} # not in reach of the step, which would be put back
@pytest.mark.parametrize('inference', [False, True])
def test_each_arm_computes_with_its_own_kernels(monkeypatch, inference):
    "Also for inference and for functions of the user; the baseline and plain arms compute as torch does"
    kernels_of.clear()
    step,real = step_of(network()),arms_module._prepare
    step.model.register_forward_pre_hook(lambda m, args: kernels_of.setdefault(kernels_of['arm'], set()).add(switch.mode))
    monkeypatch.setattr(arms_module, '_prepare', lambda step, arm, *a: kernels_of.update(arm=arm.name) or real(step, arm, *a))
    monkeypatch.setattr(bench, '_count', lambda *a: (0,0)) # counts without an arm
    def own(step): return lambda: step.model(*step.inputs)
    arms = ['channels last fp32', 'channels last fp32, tuned', Arm('as the step'), Arm('own', setup=own, tuned=True)]
    bench_formats(step, arms, inference=inference, **quick)
    assert {k:v for k,v in kernels_of.items() if k!='arm'}=={'baseline': {'survive'}, 'channels last fp32': {'survive'},
        'channels last fp32, tuned': {'tuned'}, 'as the step': {'survive'}, 'own': {'tuned'}}
    assert switch.mode is None and step.tuned is False

def test_a_check_computes_as_the_arm_does(monkeypatch):
    seen = []
    def fake(step, seconds, bar):
        seen.append((step.autocast, step.tuned))
        res = check_formats(step, bar=bar)
        return res
    from fastxtend_cl.check import check_formats
    monkeypatch.setattr(bench, 'check_formats', fake)
    step = step_of(network())
    assert not bench._wrong_arms(step, [*format_arms(step).values()], 15.)
    assert {t for _,t in seen}=={False, True} and len(set(seen))==len(seen)

@pytest.mark.skipif(not can_keep_memory(), reason="not glibc's allocator, or told otherwise by the environment")
def test_memory_is_as_the_arm_says(monkeypatch):
    "ArmState and found there, or given back from where the baseline's first steps gave it back; a process in which no arm keeps it is left alone"
    monkeypatch.setattr(bench, 'given_back_from', lambda: 5<<20)
    monkeypatch.setattr(arms_module, 'free_memory', lambda: 7<<20)
    monkeypatch.setattr(arms_module, 'faulted_memory', lambda n=count(0, 9<<20): next(n))
    monkeypatch.setattr(arms_module, 'touch_memory', lambda n: touched.append(n))
    step,touched = step_of(network()),[]
    def asked(**keep):
        "Per arm, what the allocator was told meanwhile: None is to keep memory"
        touched.clear()
        seen = {n: set() for n in ('baseline', *keep)}
        def arm(name, keep=None):
            def run(): seen[name].add(memory._open[-1].threshold if memory._open else 'alone')
            return Arm(name, setup=lambda step: run, keep_memory=keep)
        b = bench_formats(step, [arm(n, k) for n,k in keep.items()], baseline=arm('baseline'), **quick)
        assert len(b.rows)==2+len(keep) and not memory._open
        return seen
    assert asked(a=None)==dict(baseline={'alone'}, a={'alone'}) and asked(a=False)==dict(baseline={'alone'}, a={32<<20}) and not touched
    assert asked(a=True, b=None, c=False)==dict(baseline={'alone', 5<<20}, a={None}, b={5<<20}, c={5<<20})
    assert touched[0]==0 and {*touched[1:]}=={7<<20}

def test_no_more_memory_is_touched_than_an_arm_took(monkeypatch):
    "Whatever else is free in the heap: the process may have freed data before"
    monkeypatch.setattr(arms_module, 'free_memory', lambda: 1<<50)
    monkeypatch.setattr(arms_module, 'faulted_memory', lambda n=iter([0, 5, 7, 7, 8, 10]): next(n))
    monkeypatch.setattr(arms_module, 'touch_memory', lambda n: touched.append(n))
    kept,touched = ArmState(),[]
    for _ in range(3):
        with arms_module._memory(True, kept): pass
    assert touched==[0, 5, 5] and kept.memory==7

@pytest.mark.skipif(not can_keep_memory(), reason="not glibc's allocator, or told otherwise by the environment")
def test_inside_kept_memory_the_baseline_keeps_it(monkeypatch):
    seen,step = set(),step_of(network())
    def run(): seen.add(memory._open[-1].threshold)
    with kept_memory(): bench_formats(step, [Arm('a', setup=lambda step: run, keep_memory=True)], baseline=Arm('baseline', setup=lambda step: run), **quick)
    assert seen=={None}

@pytest.mark.parametrize('kind', ['torch', 'fastai', 'bare'])
def test_gradients_are_zeroed_as_the_optimizer_does(kind):
    "fastai's own optimizers zero them in place, which costs time; torch's remove them; for one that cannot, the step does"
    from fastai.optimizer import SGD
    class Bare:
        "No `zero_grad`"
        def __init__(self, ps): self.param_groups,self.state = [dict(params=[*ps])],{}
        def step(self): pass
    step,seen = step_of(network(), opt=lambda m: dict(torch=adamw, fastai=lambda m: SGD(m.parameters(), 1e-3), bare=lambda m: Bare(m.parameters()))[kind](m)),[]
    p = next(step.model.parameters())
    with step.preserved():
        f = arms_module._prepare(step, Arm('a'), False, ArmState())
        for _ in range(3):
            p.register_hook(lambda g: seen.append(None if p.grad is None else float(p.grad.abs().sum())))
            f()
            assert float(p.grad.norm())>0
    assert seen[0] is None and {*seen[1:]}==({0.} if kind=='fastai' else {None})

def test_a_precision_is_a_dtype():
    for bad in ('bf16', 'fp32', ''):
        with pytest.raises(ValueError, match="dtype must be 'as is', None, torch.float16 or torch.bfloat16, got "): Arm('low', dtype=bad)

def test_precisions_of_this_processor():
    from fastxtend_cl.precision import cpu_bf16
    assert native_dtypes('cpu')==([torch.bfloat16] if cpu_bf16() else [])

def test_compiled():
    step = step_of(network())
    import torch._dynamo.utils as dynamo
    torch.compiler.reset() # else what an earlier test has compiled for an equal network would be taken
    before = dynamo.counters['stats']['unique_graphs']
    res = bench_formats(step, ['baseline, compiled', 'channels last fp32, compiled'], seconds=60., rounds=least_pairs, bar=False)
    assert res['baseline, compiled'].verdict!='failed', res['baseline, compiled'].reason
    assert res['channels last fp32, compiled'].verdict!='failed', res['channels last fp32, compiled'].reason
    assert res['baseline, compiled'].first_seconds>res['baseline, compiled'].seconds and step.model._compiled_call_impl is None
    assert res.baseline.pairs>=least_pairs
    graphs = dynamo.counters['stats']['unique_graphs']-before
    assert 0<graphs<=8, f'{graphs} graphs: blocks compile anew'

modes = [] # a list that the step can reach would be put back
def test_inference():
    step = step_of(network())
    step.model[2].register_forward_hook(lambda m, a, o: modes.append((m.training, torch.is_inference_mode_enabled())))
    step.loss_func = lambda p,t: 1/0
    res = bench_formats(step, inference=True, **quick)
    assert (set(modes)=={(False, True)} and res.conditions['optimizer']=='inference'
        and all(r.verdict!='failed' for r in res.rows) and step.model.training)
    assert res.baseline.flops*res.baseline.seconds==pytest.approx(2*(6*144*8*27+6*36*8*72+6*32*4))

def test_operations_of_a_step():
    step = step_of(network())
    res = bench_formats(step, **quick)
    conv = 6*144*8*27*2+6*36*8*72*3+6*32*4*3 # the first layer's input needs no gradient
    assert res.baseline.flops*res.baseline.seconds==pytest.approx(2*conv)
    assert set(res.peak)>={'fp32', 'memory'} and res.baseline.of_peak==pytest.approx(res.baseline.flops/res.peak['fp32'])

def test_memory_of_a_step():
    "Activations of one layer, kept for the backward pass, and the gradients of its weights"
    x = torch.randn(4, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Sigmoid())
    res = bench_formats(TrainingStep(model, x, torch.zeros(()), lambda p,t: p.sum()+t), ['contiguous fp32'], **quick)
    one = 4*32*256*4
    assert 2*one<=res.baseline.memory<=5*one

def test_result_is_a_value():
    step = step_of(network(), opt=adamw)
    res = bench_formats(step, {'broken': lambda s: 1/0, 'right': lambda s: None}, **{**quick, 'seconds': 60.})
    d = json.loads(json.dumps(res.to_dict()))
    assert (d['best']==res.best.arm and d['verdict']==res.verdict and d['rows'][0]['arm']=='baseline'
        and len(d['rows'][1]['blocks'])==res['baseline (repeat)'].pairs)
    assert {'device', 'torch', 'threads', 'shape', 'optimizer', 'block', 'baseline', 'date'}<=set(d['conditions'])
    assert (res._repr_markdown_().startswith(f'**{res.verdict}**: ') and '| broken | failed |' in res._repr_markdown_()
        and 'ZeroDivisionError' in str(res))
    import matplotlib
    matplotlib.use('Agg')
    ax = res.plot()
    assert [t.get_text() for t in ax.get_yticklabels()]==['right'] and res.plot(ax) is ax
    width = {len(l) for l in res._repr_markdown_().splitlines() if l.startswith('|') and '---' in l}
    assert len(width)==1

def test_progress(capsys):
    clock = Simulated()
    compare({'baseline': clock.arm('baseline', 0.1), 'other': clock.arm('other', 0.1)}, clock=clock, bar=True)
    assert '[100/100' in capsys.readouterr().out
    compare({'baseline': clock.arm('baseline', 0.1)}, clock=clock, bar=False)
    assert capsys.readouterr()==('', '')

# Learner

def learner(model, n=32, **kw):
    from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TensorCategory, TensorImage
    import fastxtend_cl.all
    torch.manual_seed(0); random.seed(0)
    ds = [(TensorImage(torch.randn(3, 12, 12)),TensorCategory(i%4)) for i in range(n)]
    return Learner(DataLoaders.from_dsets(ds, ds[:8], bs=8, device='cpu', **{'num_workers': 0, **kw}), model,
        loss_func=CrossEntropyLossFlat())

@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('fitted', [False, True])
def test_learner_method(fitted, workers):
    learn,same = learner(network(), num_workers=workers),learner(network(), num_workers=workers)
    for l in (learn, same):
        torch.manual_seed(3); random.seed(3)
        if fitted:
            with l.no_bar(), l.no_logging(): l.fit(1, 1e-2)
    res = learn.bench_channelslast(['channels last fp32'], **{**quick, 'seconds': 30.})
    assert res.conditions['baseline']=='contiguous fp32' and 0<=res.loader['share']<1 and res.loader['workers']==workers
    assert (learn.opt is None)==(not fitted)
    for l in (learn, same):
        torch.manual_seed(4); random.seed(4)
        with l.no_bar(), l.no_logging(): l.fit(1, 1e-2)
    assert all(torch.equal(a, b)
        for a,b in zip(learn.model.state_dict().values(), same.model.state_dict().values())), \
        'the next fit is what it would have been'

def test_learner_method_knows_what_fit_would_do():
    learn = learner(network()).to_channelslast(use_amp=False)
    res = learn.bench_channelslast(epochs=False, **quick)
    arms = [r.arm for r in res.rows]
    assert (res.conditions['baseline']=='channels last fp32, tuned' and res.loader=={}
        and 'channels last fp32' in arms and 'channels last fp32, tuned' not in arms)
    assert learn.model[0].weight.is_contiguous(), 'converted by fit, not before'

def test_learner_method_keeps_memory_as_fit_does(monkeypatch):
    from fastxtend_cl import learner as module
    monkeypatch.setattr(module, 'bench_formats', lambda step, arms, baseline=None, keep_memory=None, **kw: (baseline.keep_memory, keep_memory))
    learn = learner(network())
    def asked(**kw): return learn.bench_channelslast(epochs=False, **kw)
    assert asked()==(None, True), 'a fit without the callback does not keep it'
    learn.to_channelslast(use_amp=False)
    assert asked()==(True, True) and asked(keep_memory=None)==(True, None)
    learn.channels_last.keep_memory = False
    assert asked()==(False, False)
    monkeypatch.setattr(module, 'learner_device', lambda learn, now=False: torch.device('cpu' if now else 'cuda'))
    assert asked()==(None, None), 'the allocator of the CPU is left alone'

# Two processes

def worker(folder):
    "Rank 1 takes twice as long, and one arm fails on it alone"
    with process_group() as rank:
        clock = Simulated(noise=0.02*(1+rank), seed=rank)
        def fails():
            if rank==1 and len(clock.log)>60: raise RuntimeError('on one rank')
            clock.spend('fails', 0.1)
        a,c = clock.arm('baseline', 0.1*(1+rank)),clock.arm('other', 0.05*(1+rank))
        sums = []
        def together():
            t = torch.ones(())
            torch.distributed.all_reduce(t)
            sums.append(t.item()); clock.spend('together', 0.08*(1+rank))
        res = compare({'baseline': a, 'other': c, 'fails': fails, 'together': together}, clock=clock, bar=rank==0, seconds=40)
        log = clock.log[:]
        step = step_of(network(), opt=adamw)
        formats = bench_formats(step, ['channels last fp32', 'contiguous bf16'], **quick)
        torch.save(dict(rows=[vars(r) for r in res.rows], noise=res.noise, log=log, ranks=res.conditions['ranks'],
            sums=set(sums), formats={r.arm:(r.seconds,r.ratio,r.samples) for r in formats.rows}), Path(folder)/f'{rank}.pth')

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    two_processes(__file__, folder)
    return [torch.load(folder/f'{i}.pth', weights_only=False) for i in range(2)]

def test_ranks_measure_the_same_and_agree(two):
    a,b = two
    assert (a['ranks']==b['ranks']==2
        and [[n for n in o['log'] if n!='fails'] for o in two][0]==[n for n in b['log'] if n!='fails']
        and a['noise']==b['noise'] and a['sums']==b['sums']=={2.})
    assert [r['blocks'] for r in a['rows']]==[r['blocks'] for r in b['rows']] and a['formats']==b['formats']

def test_the_slowest_rank_counts(two):
    rows = {r['arm']:r for r in two[0]['rows']}
    assert (rows['baseline']['seconds']==pytest.approx(0.2, rel=0.1) and rows['other']['ratio']==pytest.approx(2, rel=0.05)
        and rows['other']['verdict']=='faster')
    seconds,_,samples = two[0]['formats']['baseline']
    assert samples==pytest.approx(12/seconds)

def test_an_arm_that_fails_on_one_rank_fails_on_all(two):
    for o in two:
        row = next(r for r in o['rows'] if r['arm']=='fails')
        assert (row['verdict'],row['reason'])==('failed', 'RuntimeError: on one rank')

if __name__=='__main__': worker(*sys.argv[1:])
