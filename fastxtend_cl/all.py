"Everything public, for notebooks: `from fastxtend_cl.all import *`. Hand-written; modules import what they need by name"
from fastxtend_cl.layout import as_channels_last, as_contiguous, format_of
from fastxtend_cl.memory import kept_memory
from fastxtend_cl.kernels import kernel_table, tuned_kernels
from fastxtend_cl.convert import (FormatWarning, NoConvolutionWarning, NoEffectWarning, align_optimizer_state, apply_channels_last,
    apply_contiguous, temporarily_contiguous)
from fastxtend_cl.step import TrainingStep
from fastxtend_cl.check import FormatCheck, check_formats
from fastxtend_cl.trace import FormatTrace, trace_formats
from fastxtend_cl.arms import Arm
from fastxtend_cl.bench import FormatBench, bench_formats
from fastxtend_cl.plan import FormatPlan, plan_formats
from fastxtend_cl.amp import DeviceMixedPrecision, native_amp_mode
from fastxtend_cl.channelslast import ChannelsLastCallback, ChannelsLastTfm, less_random
from fastxtend_cl.learner import WrongStepError # and methods of `Learner` and `TrainingStep`

__all__ = ['Arm', 'ChannelsLastCallback', 'ChannelsLastTfm', 'DeviceMixedPrecision', 'FormatBench', 'FormatCheck', 'FormatPlan', 'FormatTrace',
    'FormatWarning', 'NoConvolutionWarning', 'NoEffectWarning', 'TrainingStep', 'WrongStepError', 'align_optimizer_state', 'apply_channels_last',
    'apply_contiguous', 'as_channels_last', 'as_contiguous', 'bench_formats', 'check_formats', 'format_of', 'kept_memory', 'kernel_table',
    'less_random', 'native_amp_mode', 'plan_formats', 'temporarily_contiguous', 'trace_formats', 'tuned_kernels']
