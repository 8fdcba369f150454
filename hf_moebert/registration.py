"""Register the models, quantizers, pipelines and the PEFT method of this package with transformers and PEFT."""

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

from hf_moebert.methods.mixture_of_masks.configuration_mixture_of_masks import (
    MoMBertConfig,
    MoMGPT2Config,
    MoMLlamaConfig,
    MoMMistralConfig,
    MoMQwen2Config,
    MoMQwen3Config,
    MoMT5Config,
)
from hf_moebert.methods.mixture_of_masks.modeling_mixture_of_masks import (
    MoMBertForSequenceClassification,
    MoMGPT2LMHeadModel,
    MoMLlamaForCausalLM,
    MoMMistralForCausalLM,
    MoMQwen2ForCausalLM,
    MoMQwen3ForCausalLM,
    MoMT5ForConditionalGeneration,
)
from hf_moebert.methods.platon.configuration_shrunk import (
    ShrunkBertConfig,
    ShrunkDistilBertConfig,
    ShrunkRobertaConfig,
    ShrunkViTConfig,
)
from hf_moebert.methods.platon.modeling_shrunk import (
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

from .checkpoints import packing  # noqa: F401 - registers the quantizer `bitmask`
from .methods.masked_crf.configuration_masked_crf import BertCrfConfig, CrfConfig
from .methods.masked_crf.modeling_masked_crf import BertCrfForTokenClassification, CrfForTokenClassification
from .methods.masked_crf.pipeline import CrfTokenClassificationPipeline
from .methods.moebert.configuration_moebert import MoEBertConfig
from .methods.moebert.modeling_heads import (
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
)
from .methods.moebert.modeling_moebert import MoEBertModel
from .methods.mpo import (
    modeling_quantizer,  # noqa: F401 - registers the quantizer `mpo`
    modeling_tuner,  # noqa: F401 - registers the PEFT method `MPO`
)
from .methods.mpoe.configuration_mpoe import MPOEBertConfig, MPOEGPT2Config, MPOET5Config
from .methods.mpoe.modeling_bert import MPOEBertForSequenceClassification
from .methods.mpoe.modeling_gpt2 import MPOEGPT2LMHeadModel
from .methods.mpoe.modeling_t5 import MPOET5ForConditionalGeneration
from .methods.multitask.configuration_multitask import MultiTaskBertConfig
from .methods.multitask.modeling_multitask import MultiTaskBertModel
from .methods.multitask.pipeline import MultiTaskPipeline


# The classes that `AutoModel….from_pretrained` finds after `import hf_moebert`. Their code is saved with a checkpoint
# for users without this package (`trust_remote_code=True`), except for the classes in `_STAY`.
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
_STAY = (
    MPOEBertConfig,
    MPOEGPT2Config,
    MPOET5Config,
    MultiTaskBertConfig,
)
for _config, _models in _TABLE.items():
    AutoConfig.register(_config.model_type, _config)
    for _auto, _model in _models.items():
        _auto.register(_config, _model)
        if not issubclass(_config, _STAY):
            _model.register_for_auto_class(_auto.__name__)
    if not issubclass(_config, _STAY):
        _config.register_for_auto_class()

# The pipelines that `pipeline(name, model=...)` finds.
PIPELINE_REGISTRY.register_pipeline(
    "masked-crf", pipeline_class=CrfTokenClassificationPipeline, pt_model=AutoModelForTokenClassification, type="text"
)
PIPELINE_REGISTRY.register_pipeline("multitask", pipeline_class=MultiTaskPipeline, pt_model=AutoModel, type="text")
