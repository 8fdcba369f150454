from .configuration_mpoe import (
    MPOEBertConfig as MPOEBertConfig,
    MPOEGPT2Config as MPOEGPT2Config,
    MPOET5Config as MPOET5Config,
)
from .conversion import from_dense as from_dense
from .modeling_bert import MPOEBertForSequenceClassification as MPOEBertForSequenceClassification
from .modeling_gpt2 import MPOEGPT2LMHeadModel as MPOEGPT2LMHeadModel
from .modeling_t5 import MPOET5ForConditionalGeneration as MPOET5ForConditionalGeneration
from .recipe import MPOEGradientMaskConfig as MPOEGradientMaskConfig
from .training import MPOEGradientMaskCallback as MPOEGradientMaskCallback
