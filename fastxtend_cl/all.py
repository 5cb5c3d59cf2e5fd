"Everything public, for notebooks: `from fastxtend_cl.all import *`. Hand-written; modules import what they need by name"
from fastxtend_cl.format import (FormatWarning, NoConvolutionWarning, NoEffectWarning, align_state, apply_channels_last, apply_contiguous,
    as_channels_last, as_contiguous, contiguous_meanwhile, format_of)
from fastxtend_cl.amp import DeviceMixedPrecision, amp_modes, cpu_bf16, native_amp_mode
from fastxtend_cl.channelslast import ChannelsLastCallback, ChannelsLastTfm, less_random
from fastxtend_cl.step import Preserved, StepResult, TrainingStep
import fastxtend_cl.learner # methods of `Learner` and `TrainingStep`

__all__ = ['ChannelsLastCallback', 'ChannelsLastTfm', 'DeviceMixedPrecision', 'FormatWarning', 'NoConvolutionWarning', 'NoEffectWarning', 'Preserved', 'StepResult', 'TrainingStep', 'align_state',
    'amp_modes', 'apply_channels_last', 'apply_contiguous', 'as_channels_last', 'as_contiguous', 'contiguous_meanwhile', 'cpu_bf16', 'format_of',
    'less_random', 'native_amp_mode']
