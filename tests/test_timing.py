"""Intervals, looks and deadlines of `timing`, on simulated machines. No test asserts a time"""
import math
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from fastxtend_cl.timing import (Clock, Deadline, Schedule, TimedArm, _error, _kth, block_size, interval, is_converged, least_pairs, leave_out,
    looks, measure, next_look, noise_of, pairs_of, seconds_for_all, verdict_of, warm_up)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.floats(0.1, 10))
def test_interval(pairs, k):
    mid,low,high = interval(pairs)
    n = max((o for o in looks if o<=len(pairs)), default=0)
    if n<least_pairs: assert (low,high)==(0., math.inf)
    else:
        assert min(pairs[:n])<=low<=mid<=high<=max(pairs[:n])
        assert interval(pairs[:n])==(mid,low,high), 'what comes after a look does not count before the next'
        assert sum(p<low for p in pairs[:n])<_kth(n) and sum(p>high for p in pairs[:n])<_kth(n)
    assert interval([k*p for p in pairs])==pytest.approx((k*mid, k*low, k*high))

def test_looks():
    errors = {n: _error(n, _kth(n)) for n in looks}
    assert errors[8]==2/2**8 and max(e for n,e in errors.items() if n>8)<=3e-4 and sum(errors.values())<0.01
    assert all(_error(n, _kth(n)+1)>3e-4 for n in looks), 'the narrowest interval'
    assert [next_look(n) for n in (0, 7, 8, 16, 100, 192)]==[8, 8, 17, 17, 136, math.inf]

def at_looks(pairs, error=3e-4):
    "Lower and upper ends of the intervals of many measurements (rows), by look"
    return {n: np.sort(pairs[:,:n], axis=1)[:,[_kth(n, error)-1,-_kth(n, error)]] for n in looks}

many,rounds = 20_000,np.arange(looks[-1])
def machine(name, rng, n=many):
    "Times of a step, a row for each measurement"
    shape = n,looks[-1]
    return {'normal': lambda: 1+0.02*rng.standard_normal(shape), 'skewed': lambda: 1+0.1*rng.exponential(size=shape),
        'heavy': lambda: np.exp(0.02*rng.standard_t(2, shape)), 'drift': lambda: (1+0.01*rounds)*(1+0.1*rng.exponential(size=shape)),
        'grows': lambda: 1+(0.01+0.002*rounds)*rng.exponential(size=shape),
        'load': lambda: (1+(rounds//7%2))*np.where(rng.random(shape)<0.1, 3, 1)*(1+0.05*rng.exponential(size=shape))}[name]()

machines = 'normal','skewed','heavy','drift','grows','load'

@pytest.mark.parametrize('name', machines)
def test_intervals_hold_at_each_stopping_point(name):
    "At all looks together in 99 % of measurements, and so at the one that ends it, whatever the rule"
    rng = np.random.default_rng(0)
    pairs = 1.2*machine(name, rng)/machine(name, rng) # the median of the ratio of two that are alike is 1
    wrong = {n: (o[:,0]>1.2) | (o[:,1]<1.2) for n,o in at_looks(pairs).items()}
    def at_most(rate, error): return rate<=error+4*math.sqrt(error/many)
    assert all(at_most(w.mean(), _error(n, _kth(n))) for n,w in wrong.items()), {n: w.mean() for n,w in wrong.items()}
    assert at_most(np.any([*wrong.values()], axis=0).mean(), 0.01)

def test_intervals_hold_for_arms_of_different_noise():
    "An arm whose noise is skewed and one whose noise is not: the median of the ratio is known from a million of them"
    rng = np.random.default_rng(1)
    def ratios(n): return machine('normal', rng, n)/machine('skewed', rng, n)
    true = np.median(ratios(10_000))
    wrong = np.any([(o[:,0]>true) | (o[:,1]<true) for o in at_looks(ratios(many)).values()], axis=0)
    assert wrong.mean()<=0.01+4*math.sqrt(0.01/many)

def verdicts(base, repeat, arm, rel_tol=0.04):
    "'faster' as `race` would say it, of many measurements: it stops at the first look where both are converged, or after any"
    ratios = base/arm,base/repeat
    mine,noise,n = at_looks(ratios[0]),at_looks(ratios[1], 0.05),len(base)
    stopped,converged,res = np.zeros(n, bool),np.full(n, 0),np.zeros(n, bool)
    last = np.zeros((n, 2)),np.zeros(n)
    worst = np.zeros(n, bool)
    for k in looks:
        mid = np.median(ratios[0][:,:k], axis=1)
        new = converged==0 # an arm that is converged is not measured on
        last[0][new],last[1][new] = mine[k][new],mid[new]
        narrow = (last[0][:,1]-last[0][:,0]<=rel_tol*last[1]) | (last[0][:,1]<0.9)
        converged[new & narrow] = k
        quiet = noise[k][:,1]-noise[k][:,0]<=rel_tol*np.median(ratios[1][:,:k], axis=1)
        faster = (last[0][:,0]>1) & (last[1]>noise[k][:,1])
        worst |= faster & ~stopped # where time is over here
        end = ~stopped & (converged>0) & quiet
        res[end] = faster[end]
        stopped |= end
    res[~stopped] = faster[~stopped]
    return res,worst

@pytest.mark.parametrize('name', machines)
def test_identical_arms_are_never_faster(name):
    "At most one in a thousand, by the rule that stops; also for who stops at the worst of all looks"
    rng = np.random.default_rng(2)
    at_end,worst = verdicts(*(machine(name, rng) for _ in range(3)))
    assert at_end.mean()<=1e-3 and worst.mean()<=1e-3, (at_end.mean(), worst.mean())

def test_the_simulated_verdicts_follow_the_rule():
    "The same as `interval`, `is_converged` and `verdict_of` say, one measurement after another"
    rng = np.random.default_rng(3)
    base,repeat,arm = (machine('skewed', rng, 60) for _ in range(3))
    arm = arm/np.linspace(0.9, 1.15, 60)[:,None]
    def one(b, r, a):
        arms = [TimedArm(n, None) for n in 'bra']
        for i in range(looks[-1]):
            for o,s in zip(arms, (b, r, a)):
                if o.live: o.seconds[i] = s[i]
            arms[2].converged = arms[2].converged or is_converged(arms[0], arms[2], 0.04)
            if arms[2].converged and is_converged(arms[0], arms[1], 0.04, 0.05): break
        noise,pairs = (pairs_of(arms[0].seconds, o.seconds) for o in arms[1:])
        return verdict_of(*interval(pairs), noise_of(noise))=='faster'
    found = [one(*o) for o in zip(base, repeat, arm)]
    assert found==[*verdicts(base, repeat, arm)[0]] and 10<sum(found)<50

@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 2), st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.2), st.floats(0, 0.2))
def test_verdict(ratio, a, b, c, d):
    low,high,noise = ratio-a,ratio+b,(1-c,1+d)
    v = verdict_of(ratio, low, high, noise)
    assert v!='faster' or low>1 and ratio>noise[1]
    assert v!='slower' or high<1 and ratio<noise[0]
    if low<=1<=high or noise[0]<=ratio<=noise[1]: assert v=='tie'

class FakeClock(Clock):
    def __init__(self): super().__init__(); self.t = 0.
    def now(self): return self.t
    cpu = now
    def arm(self, seconds): 
        it = iter(seconds) if isinstance(seconds, list) else None
        def f(): self.t += next(it) if it else seconds
        return f

@pytest.mark.parametrize('seconds', [1e-4, 0.01, 0.1, 1., 20.])
@pytest.mark.parametrize('n', [2, 6])
def test_block_size(seconds, n):
    arms = [TimedArm(str(i), None, warm=[9*seconds, seconds, seconds]) for i in range(n)]
    block = block_size(arms, 60.)
    assert 2<=block<=50 and (block==2 or 1.2*8*n*block*seconds<=60)
    if 1.2*24*n*5*seconds<=60: assert block>=3
    for a in arms: a.extra = 3*seconds
    assert 2<=block_size(arms, 60.)<=50

def test_warm_until_steady():
    clock = FakeClock()
    arm = TimedArm('a', lambda body, f=clock.arm([5., 1., 0.5, 0.3, 0.2, 0.2, 0.2, 0.2]): body(f))
    warm_up(arm, Deadline(60., clock))
    assert arm.warm==pytest.approx([5., 1., 0.5, 0.3, 0.2, 0.2, 0.2]) and arm.prepared==pytest.approx(7.4)
    for kw,n in ((dict(seconds=10.), 2), (dict(reserve=1e9), 1)):
        endless = TimedArm('b', lambda body: body(clock.arm(1e3)))
        warm_up(endless, Deadline(1e4, clock), **kw)
        assert len(endless.warm)==n, 'its own time, or that of all, ends it'

def test_a_block_ends_with_the_deadline():
    clock = FakeClock()
    assert [clock.steps(clock.arm(1.), 9, left and clock.t+left).shape[1] for left in (None, 100., 3.5)]==[9, 9, 4]

def test_the_slowest_are_left_out():
    "Of those that can be; the baseline and its repeat stay"
    def left(seconds, least=0):
        costs = dict(baseline=9., repeat=9., a=1., b=3., c=2., broken=1.)
        arms = [TimedArm(n, None, warm=[s]*3) for n,s in costs.items()]
        arms[-1].failed = 'so'
        leave_out(arms, 8, 2, seconds, least)
        return ''.join(a.name for a in arms[2:] if a.live)
    of = 1.2*2*8 # seconds for each second of a step
    assert [left(of*s+1e-6) for s in (24, 23.9, 21, 20.9, 19, 18.9)]==['abc', 'ac', 'ac', 'a', 'a', ''] and left(1., 1)=='a'

# Deadlines

class Machine(FakeClock):
    "A machine that gets slower at a time; knows the longest thing that it was asked to do at once"
    def __init__(self, slow_at=math.inf, factor=5): super().__init__(); self.slow_at,self.factor,self.longest = slow_at,factor,0.
    def spend(self, seconds):
        took = seconds*(self.factor if self.t>=self.slow_at else 1)
        self.t,self.longest = self.t+took,max(self.longest, took)

def bounded(n, step, seconds, prepare=0., first=0., judge=0., slow_at=math.inf, factor=5, reserve=0., costs=None):
    "`n` arms with steps of `step` seconds, measured in `seconds`; checks the bound"
    clock = Machine(slow_at, factor)
    def arm(name, cost):
        def run(body): clock.spend(prepare); return body(lambda: clock.spend(cost))
        def begin(f): clock.spend(first+cost)
        return TimedArm(name, run, begin)
    arms = [arm(n, step) for n in ('baseline', 'baseline (repeat)')] + [arm(f'arm {i}', step*(costs[i] if costs else 1)) for i in range(n)]
    def judge_of(base):
        def judged(arm, over):
            for _ in range(10):
                if over(): arm.left_out = True; return
                clock.spend(judge)
        return judged
    deadline = Deadline(seconds, clock)
    _,block = measure(arms, deadline, Schedule(seconds, bar=False, reserve=reserve), judge_of if judge else None)
    assert clock.t<=1.1*seconds+prepare*(clock.factor if slow_at<math.inf else 1)+clock.longest, (clock.t, clock.longest)
    return arms,block,seconds_for_all(arms, deadline)

@pytest.mark.parametrize('slow_at', [math.inf, 1., 20., 40., 55.])
@pytest.mark.parametrize('step', [0.001, 0.05, 1., 3., 20.])
@pytest.mark.parametrize('seconds', [2., 10., 60., 300.])
def test_the_bound_holds(seconds, step, slow_at):
    "For one to six arms, slow preparation, first steps and judges, and a machine that is five times as slow from some time on"
    for n in range(1, 7):
        for kw in ({}, dict(prepare=3.), dict(first=8.), dict(judge=step), dict(reserve=seconds/10)):
            arms,block,_ = bounded(n, step, seconds, slow_at=slow_at, **kw)
            if slow_at==math.inf:
                assert all(a.left_out or len(a.seconds)>=least_pairs for a in arms[2:]), 'fewer arms rather than too few rounds'

@pytest.mark.parametrize('kw', [dict(step=1.), dict(step=3.), dict(step=0.5, prepare=2.), dict(step=0.2, first=10.), dict(step=0.3, judge=0.5)])
def test_the_suggested_seconds_are_enough(kw):
    for n in (1, 4, 6):
        arms,_,enough = bounded(n, seconds=2., **kw)
        assert all(a.left_out for a in arms[2:]) and arms[0].warm
        for _ in range(3): # it may know better after having seen more
            arms,_,more = bounded(n, seconds=enough, **kw)
            if not any(a.left_out for a in arms): break
            assert more>enough
            enough = more
        assert all(len(a.seconds)>=least_pairs for a in arms), 'said, and done'

def test_fewer_arms_are_measured():
    "Of steps of a second: as many as fit into the time"
    left = {s: [a.name for a in bounded(4, 1., s, costs=[2., 1., 0.5, 1.5])[0][2:] if not a.left_out] for s in (10., 70., 95., 120., 160.)}
    assert left[10.]==[] and [len(o) for o in left.values()]==sorted(len(o) for o in left.values()) and len(left[160.])==4

def test_blocks_get_shorter_before_an_arm_is_left_out():
    "Where the machine takes twice as long after a while"
    arms,block,_ = bounded(2, 0.05, 10., slow_at=3., factor=2)
    assert block>2 and all(len(a.seconds)>=least_pairs for a in arms)
