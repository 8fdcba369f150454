"""MPOE: the feed-forward networks become experts that share the central tensor of a matrix product operator."""

from .configuration_mpoe import GradientMaskConfig, MPOEBertConfig, MPOEGPT2Config, MPOET5Config
from .modeling_bert import MPOEBertForSequenceClassification
from .modeling_gpt2 import MPOEGPT2LMHeadModel
from .modeling_t5 import MPOET5ForConditionalGeneration
from .training import MPOEGradientMaskCallback


__all__ = [
    "GradientMaskConfig",
    "MPOEBertConfig",
    "MPOEBertForSequenceClassification",
    "MPOEGPT2Config",
    "MPOEGPT2LMHeadModel",
    "MPOEGradientMaskCallback",
    "MPOET5Config",
    "MPOET5ForConditionalGeneration",
]
