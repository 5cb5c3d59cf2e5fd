"The vocabulary of precisions against what torch says, also for devices that are not there; `cpu_bf16` and `native_dtypes` are tested in test_amp.py"
from contextlib import nullcontext
import pytest, torch
from torch import nn
from torch.amp import autocast
from fastxtend_cl.precision import (autocast_dtypes, autocast_to, check_autocast, dtype_name, dtype_names, dtype_of, low_precision, native_dtypes,
    precision_name, tf32_allowed, weights_dtype)

bf16,fp16 = torch.bfloat16,torch.float16

@pytest.mark.parametrize('dtype,name', [(None, 'fp32'), (torch.float32, 'fp32'), (torch.float64, 'fp64'), (bf16, 'bf16'), (fp16, 'fp16'), (torch.int8, 'int8'), (torch.float8_e4m3fn, 'float8_e4m3fn')])
def test_names(dtype, name): assert dtype_name(dtype)==name

def test_names_of_autocast_and_back():
    for dtype in (None, *low_precision): assert dtype_of(dtype_name(dtype))==dtype
    assert dtype_of(None) is None
    for name in ('int8', 'fp64', 'BF16', ''):
        with pytest.raises(KeyError): dtype_of(name)
    assert len({*dtype_names.values()})==len(dtype_names)

@pytest.mark.parametrize('dtype', [None, bf16, fp16])
def test_what_autocast_takes_is_accepted(dtype):
    check_autocast('dtype', dtype); check_autocast('dtype', dtype, 'as is')

@pytest.mark.parametrize('bad', [torch.float32, torch.float64, torch.int8, 'bf16', 'as is', True, 0])
def test_other_dtypes_are_an_error(bad):
    with pytest.raises(ValueError) as e: check_autocast('autocast', bad)
    assert str(e.value)==f'autocast must be None, torch.float16 or torch.bfloat16, got {bad!r}'

def test_other_values_may_be_allowed():
    check_autocast('dtype', 'as is', 'as is', 'default')
    with pytest.raises(ValueError, match="^precision must be 'as is', 'default', None, torch.float16 or torch.bfloat16, got 'fp8'$"):
        check_autocast('precision', 'fp8', 'as is', 'default')

class Counting(nn.Module):
    "Its first parameter is of integers"
    def __init__(self, dtype):
        super().__init__()
        self.n,self.layer = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False),nn.Linear(2, 2).to(dtype)

@pytest.mark.parametrize('model,dtype', [(nn.Linear(2, 2), torch.float32), (nn.Linear(2, 2).double(), torch.float64), (nn.Linear(2, 2).bfloat16(), bf16), (nn.ReLU(), torch.float32),
    (Counting(fp16), fp16), (nn.Linear(2, 2, device='meta', dtype=bf16), bf16), (nn.LazyLinear(2), torch.float32)], ids=lambda o: str(o) if isinstance(o, torch.dtype) else None)
def test_dtype_of_weights(model, dtype): assert weights_dtype(model)==dtype

@pytest.mark.parametrize('weights,autocast,name', [(torch.float32, None, 'fp32'), (torch.float32, bf16, 'bf16'), (bf16, None, 'bf16 weights'), (bf16, fp16, 'fp16'), (torch.float64, None, 'fp64'), (fp16, fp16, 'fp16')])
def test_name_of_a_models_precision(weights, autocast, name): assert precision_name(nn.Linear(2, 2).to(weights), autocast)==name

# Devices

def test_autocast_of_this_cpu_as_torch_has_it():
    "By computing: a matrix product inside has the dtype"
    x = torch.ones(2, 2)
    for dtype in autocast_dtypes('cpu'):
        with autocast('cpu', dtype): assert (x@x).dtype==dtype
    assert bf16 in autocast_dtypes(torch.device('cpu'))

@pytest.mark.parametrize('device', ['meta', 'mps', 'xpu', 'cuda:0', 'hpu'])
def test_dtypes_of_devices_as_torch_refuses_them(device):
    "Here torch disables autocast with a warning, or raises"
    def supported(dtype):
        import warnings
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            try: context = autocast(torch.device(device).type, dtype)
            except RuntimeError: return False
        return not w
    if device.startswith('cuda') and torch.cuda.is_available(): pytest.skip('a GPU is tested in test_amp.py')
    assert autocast_dtypes(device)==[d for d in (fp16, bf16) if supported(d)]
    assert {*native_dtypes(device)}<={*autocast_dtypes(device)}

def fake_autocast(monkeypatch, supported):
    "A device whose autocast supports these dtypes, and warns otherwise as torch does"
    import warnings
    def made(device, dtype):
        if dtype not in supported: warnings.warn(f'In {device} autocast, but the target dtype is not supported. Disabling autocast.')
    monkeypatch.setattr('fastxtend_cl.precision.autocast', made)

@pytest.mark.parametrize('supported', [[], [fp16], [bf16], [fp16, bf16]])
def test_a_device_that_warns(supported, monkeypatch):
    fake_autocast(monkeypatch, supported)
    assert autocast_dtypes('xpu')==supported

@pytest.mark.parametrize('default,native', [(fp16, [fp16]), (bf16, [bf16]), (torch.float32, [])])
def test_other_devices_compute_in_torchs_default(default, native, monkeypatch):
    fake_autocast(monkeypatch, [fp16, bf16])
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda device: device=='xpu')
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device: default)
    assert native_dtypes('xpu:0')==native and native_dtypes('meta')==[]

@pytest.mark.parametrize('outer', [None, fp16, bf16])
@pytest.mark.parametrize('dtype', [None, bf16])
def test_autocast_to_a_dtype_also_inside_another(dtype, outer):
    x = torch.ones(2, 2)
    with autocast('cpu', outer) if outer else nullcontext(), autocast_to(torch.device('cpu'), dtype): assert (x@x).dtype==(dtype or torch.float32)
    assert not torch.is_autocast_enabled('cpu')

def test_autocast_on_a_device_without_it():
    with autocast_to(torch.device('meta'), bf16): assert not torch.is_autocast_enabled('cpu')

# TF32

def test_tf32_as_torch_has_it(monkeypatch):
    for allowed in (True, False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed): assert tf32_allowed()==allowed

def test_tf32_where_torch_refuses_to_tell(monkeypatch):
    "torch raises after its new interface, `fp32_precision`, was used: the tolerance is the larger one"
    class Cudnn:
        @property
        def allow_tf32(self): raise RuntimeError('PyTorch is checking whether allow_tf32 is enabled for cuDNN ... mix of the legacy and new APIs')
    monkeypatch.setattr(torch.backends, 'cudnn', Cudnn())
    assert tf32_allowed()
