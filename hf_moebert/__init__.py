"""Compress pre-trained transformers with the stock Hugging Face tools, and measure what it brought."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .distillation import DistillationConfig, DistillationTrainer
from .inference import optimize_for_inference, revert_optimizations
from .masked_crf import (
    BertCrfForTokenClassification,
    CrfForTokenClassification,
    CrfTokenClassificationPipeline,
    MaskedCRF,
)
from .masked_crf.configuration_masked_crf import BertCrfConfig, CrfConfig
from .mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig, add_masks, compact
from .mixture_of_masks.configuration_mixture_of_masks import (
    MoMBertConfig,
    MoMGPT2Config,
    MoMLlamaConfig,
    MoMMistralConfig,
    MoMQwen2Config,
    MoMQwen3Config,
    MoMT5Config,
)
from .mixture_of_masks.modeling_mixture_of_masks import (
    MoMBertForSequenceClassification,
    MoMGPT2LMHeadModel,
    MoMLlamaForCausalLM,
    MoMMistralForCausalLM,
    MoMQwen2ForCausalLM,
    MoMQwen3ForCausalLM,
    MoMT5ForConditionalGeneration,
)
from .moebert import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
    measure_importance,
)
from .mpo import MPOConfig, MPOSqueezingCallback, MPOSqueezingConfig, compress_mpo
from .mpoe import (
    GradientMaskConfig,
    MPOEBertForSequenceClassification,
    MPOEGPT2LMHeadModel,
    MPOEGradientMaskCallback,
    MPOET5ForConditionalGeneration,
)
from .mpoe.configuration_mpoe import MPOEBertConfig, MPOEGPT2Config, MPOET5Config
from .multitask import (
    MultiTaskBertModel,
    MultiTaskPipeline,
    MultiTaskSweep,
    SweepConfig,
    SweepTask,
)
from .multitask.configuration_multitask import MultiTaskBertConfig
from .packing import save_packed
from .platon import PlatonConfig, PlatonPruningCallback, shrink
from .platon.configuration_shrunk import (
    ShrunkBertConfig,
    ShrunkDistilBertConfig,
    ShrunkRobertaConfig,
    ShrunkViTConfig,
)
from .platon.modeling_shrunk import (
    ShrunkBertForMaskedLM,
    ShrunkBertForQuestionAnswering,
    ShrunkBertForSequenceClassification,
    ShrunkBertForTokenClassification,
    ShrunkBertModel,
    ShrunkDistilBertForMaskedLM,
    ShrunkDistilBertForQuestionAnswering,
    ShrunkDistilBertForSequenceClassification,
    ShrunkDistilBertForTokenClassification,
    ShrunkDistilBertModel,
    ShrunkRobertaForMaskedLM,
    ShrunkRobertaForQuestionAnswering,
    ShrunkRobertaForSequenceClassification,
    ShrunkRobertaForTokenClassification,
    ShrunkRobertaModel,
    ShrunkViTForImageClassification,
    ShrunkViTModel,
)


__version__ = "0.1.0"

__all__ = [
    "BertCrfForTokenClassification",
    "CrfForTokenClassification",
    "CrfTokenClassificationPipeline",
    "DistillationConfig",
    "DistillationTrainer",
    "GradientMaskConfig",
    "MPOConfig",
    "MPOEBertForSequenceClassification",
    "MPOEGPT2LMHeadModel",
    "MPOEGradientMaskCallback",
    "MPOET5ForConditionalGeneration",
    "MPOSqueezingCallback",
    "MPOSqueezingConfig",
    "MaskSparsityCallback",
    "MaskSparsityConfig",
    "MaskedCRF",
    "MoEBertConfig",
    "MoEBertForQuestionAnswering",
    "MoEBertForSequenceClassification",
    "MoEBertForTokenClassification",
    "MoEBertModel",
    "MultiTaskBertModel",
    "MultiTaskPipeline",
    "MultiTaskSweep",
    "PlatonConfig",
    "PlatonPruningCallback",
    "SweepConfig",
    "SweepTask",
    "add_masks",
    "compact",
    "compress_mpo",
    "measure_importance",
    "optimize_for_inference",
    "revert_optimizations",
    "save_packed",
    "shrink",
]

# What `AutoModel….from_pretrained` finds after `import hf_moebert`; and, but for what stays, what `save_pretrained`
# ships as code, for users without this package (`trust_remote_code=True`).
_TABLE: dict[Any, dict[Any, Any]] = {
    MoEBertConfig: {
        AutoModel: MoEBertModel,
        AutoModelForSequenceClassification: MoEBertForSequenceClassification,
        AutoModelForTokenClassification: MoEBertForTokenClassification,
        AutoModelForQuestionAnswering: MoEBertForQuestionAnswering,
    },
    ShrunkBertConfig: {
        AutoModel: ShrunkBertModel,
        AutoModelForSequenceClassification: ShrunkBertForSequenceClassification,
        AutoModelForTokenClassification: ShrunkBertForTokenClassification,
        AutoModelForQuestionAnswering: ShrunkBertForQuestionAnswering,
        AutoModelForMaskedLM: ShrunkBertForMaskedLM,
    },
    ShrunkRobertaConfig: {
        AutoModel: ShrunkRobertaModel,
        AutoModelForSequenceClassification: ShrunkRobertaForSequenceClassification,
        AutoModelForTokenClassification: ShrunkRobertaForTokenClassification,
        AutoModelForQuestionAnswering: ShrunkRobertaForQuestionAnswering,
        AutoModelForMaskedLM: ShrunkRobertaForMaskedLM,
    },
    ShrunkDistilBertConfig: {
        AutoModel: ShrunkDistilBertModel,
        AutoModelForSequenceClassification: ShrunkDistilBertForSequenceClassification,
        AutoModelForTokenClassification: ShrunkDistilBertForTokenClassification,
        AutoModelForQuestionAnswering: ShrunkDistilBertForQuestionAnswering,
        AutoModelForMaskedLM: ShrunkDistilBertForMaskedLM,
    },
    ShrunkViTConfig: {
        AutoModel: ShrunkViTModel,
        AutoModelForImageClassification: ShrunkViTForImageClassification,
    },
    BertCrfConfig: {AutoModelForTokenClassification: BertCrfForTokenClassification},
    CrfConfig: {AutoModelForTokenClassification: CrfForTokenClassification},
    MPOEBertConfig: {AutoModelForSequenceClassification: MPOEBertForSequenceClassification},
    MPOEGPT2Config: {AutoModelForCausalLM: MPOEGPT2LMHeadModel},
    MPOET5Config: {AutoModelForSeq2SeqLM: MPOET5ForConditionalGeneration},
    MoMLlamaConfig: {AutoModelForCausalLM: MoMLlamaForCausalLM},
    MoMMistralConfig: {AutoModelForCausalLM: MoMMistralForCausalLM},
    MoMQwen2Config: {AutoModelForCausalLM: MoMQwen2ForCausalLM},
    MoMQwen3Config: {AutoModelForCausalLM: MoMQwen3ForCausalLM},
    MoMGPT2Config: {AutoModelForCausalLM: MoMGPT2LMHeadModel},
    MoMT5Config: {AutoModelForSeq2SeqLM: MoMT5ForConditionalGeneration},
    MoMBertConfig: {AutoModelForSequenceClassification: MoMBertForSequenceClassification},
    MultiTaskBertConfig: {AutoModel: MultiTaskBertModel},
}
_STAY = (MPOEBertConfig, MPOEGPT2Config, MPOET5Config, MultiTaskBertConfig)  # two systems make them: too much to ship
for _config, _models in _TABLE.items():
    AutoConfig.register(_config.model_type, _config)
    for _auto, _model in _models.items():
        _auto.register(_config, _model)
        if not issubclass(_config, _STAY):
            _model.register_for_auto_class(_auto.__name__)
    if not issubclass(_config, _STAY):
        _config.register_for_auto_class()

# What `pipeline(name, model=...)` finds.
PIPELINE_REGISTRY.register_pipeline(
    "masked-crf", pipeline_class=CrfTokenClassificationPipeline, pt_model=AutoModelForTokenClassification, type="text"
)
PIPELINE_REGISTRY.register_pipeline("multitask", pipeline_class=MultiTaskPipeline, pt_model=AutoModel, type="text")
