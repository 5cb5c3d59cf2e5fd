"Everything public, for notebooks: `from fastxtend_cl.all import *`. Hand-written; modules import what they need by name"
from fastxtend_cl.format import (FormatWarning, NoConvolutionWarning, NoEffectWarning, align_state, apply_channels_last,
    apply_contiguous, as_channels_last, as_contiguous, contiguous_meanwhile, format_of)
from fastxtend_cl.memory import can_keep_memory, kept_memory
from fastxtend_cl.ways import deadly_layers
from fastxtend_cl.kernels import KernelTable, fixed_kernels, kernel_count, kernel_table, tuned_kernels, tuning_line
from fastxtend_cl.amp import DeviceMixedPrecision, amp_modes, cpu_bf16, native_amp_mode
from fastxtend_cl.channelslast import ChannelsLastCallback, ChannelsLastTfm, less_random
from fastxtend_cl.step import StepResult, TrainingStep
from fastxtend_cl.check import CheckRow, FormatCheck, check_formats
from fastxtend_cl.trace import FormatTrace, TraceRow, trace_format
from fastxtend_cl.bench import Arm, BenchRow, FormatBench, bench_formats, format_arms
from fastxtend_cl.plan import FormatPlan, plan_formats
from fastxtend_cl.race import RaceCallback
from fastxtend_cl.learner import WrongStepError # and methods of `Learner` and `TrainingStep`

__all__ = ['Arm', 'BenchRow', 'ChannelsLastCallback', 'ChannelsLastTfm', 'CheckRow', 'DeviceMixedPrecision',
    'FormatBench', 'FormatCheck', 'FormatPlan', 'FormatTrace', 'FormatWarning', 'KernelTable',
    'NoConvolutionWarning', 'NoEffectWarning', 'RaceCallback', 'StepResult', 'TraceRow', 'TrainingStep', 'WrongStepError',
    'align_state', 'amp_modes', 'apply_channels_last', 'apply_contiguous', 'as_channels_last', 'as_contiguous',
    'bench_formats', 'can_keep_memory', 'check_formats', 'contiguous_meanwhile', 'cpu_bf16', 'deadly_layers',
    'fixed_kernels', 'format_arms', 'format_of', 'kept_memory', 'kernel_count', 'kernel_table', 'less_random',
    'native_amp_mode', 'plan_formats', 'trace_format', 'tuned_kernels', 'tuning_line']
