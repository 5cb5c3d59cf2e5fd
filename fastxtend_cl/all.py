"Everything public, for notebooks: `from fastxtend_cl.all import *`. Hand-written; modules import what they need by name"
from fastxtend_cl.format import (FormatWarning, NoConvolutionWarning, NoEffectWarning, align_state, apply_channels_last,
    apply_contiguous, as_channels_last, as_contiguous, contiguous_meanwhile, format_of)
from fastxtend_cl.hazards import Hazard, guard, guarded, hazards, unguard
from fastxtend_cl.memory import can_keep_memory, kept_memory
from fastxtend_cl.amp import DeviceMixedPrecision, amp_modes, cpu_bf16, native_amp_mode
from fastxtend_cl.channelslast import ChannelsLastCallback, ChannelsLastTfm, KeepMemoryCallback, less_random
from fastxtend_cl.step import StepResult, TrainingStep
from fastxtend_cl.check import CheckRow, FormatCheck, check_formats
from fastxtend_cl.trace import FormatTrace, TraceRow, trace_format
from fastxtend_cl.repair import FormatRepair, RepairRow, repair_format, repaired, unrepair_format
from fastxtend_cl.probe import LayerSpec, LayerTimes, Probe, ProbeResult, layer_specs
from fastxtend_cl.bench import Arm, BenchRow, FormatBench, bench_formats, format_arms
from fastxtend_cl.plan import FormatPlan, LayerPlan, PlanRow, apply_plan, plan_formats, planned, remove_plan
from fastxtend_cl.learner import WrongStepError # and methods of `Learner` and `TrainingStep`

__all__ = ['Arm', 'BenchRow', 'ChannelsLastCallback', 'ChannelsLastTfm', 'CheckRow', 'DeviceMixedPrecision',
    'FormatBench', 'FormatCheck', 'FormatPlan', 'FormatRepair', 'FormatTrace', 'FormatWarning', 'Hazard',
    'KeepMemoryCallback', 'LayerPlan', 'LayerSpec', 'LayerTimes', 'NoConvolutionWarning', 'NoEffectWarning', 'PlanRow',
    'Probe', 'ProbeResult', 'RepairRow', 'StepResult', 'TraceRow', 'TrainingStep', 'WrongStepError', 'align_state',
    'amp_modes', 'apply_channels_last', 'apply_contiguous', 'apply_plan', 'as_channels_last', 'as_contiguous',
    'bench_formats', 'can_keep_memory', 'check_formats', 'contiguous_meanwhile', 'cpu_bf16', 'format_arms', 'format_of',
    'guard', 'guarded', 'hazards', 'kept_memory', 'layer_specs', 'less_random', 'native_amp_mode', 'plan_formats',
    'planned', 'remove_plan', 'repair_format', 'repaired', 'trace_format', 'unguard', 'unrepair_format']
