"""Register the models, quantizers, pipelines and the PEFT method of this package with transformers and PEFT."""

from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
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

from .architectures.families import ARCHITECTURES
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
from .methods.platon.configuration_shrunk import ShrunkConfig, shrunk_config
from .methods.platon.modeling_shrunk import shrunk_class, stock_classes


# The classes that `AutoModel….from_pretrained` finds after `import hf_moebert`. Their code is saved with a checkpoint
# for users without this package (`trust_remote_code=True`), except for the classes in `_STAY`.
_TABLE: dict[Any, dict[Any, Any]] = {
    MoEBertConfig: {
        AutoModel: MoEBertModel,
        AutoModelForSequenceClassification: MoEBertForSequenceClassification,
        AutoModelForTokenClassification: MoEBertForTokenClassification,
        AutoModelForQuestionAnswering: MoEBertForQuestionAnswering,
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


def _register(config: Any, models: dict[Any, Any], *, travels: bool) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, model in models.items():
        auto.register(config, model)
        if travels:
            model.register_for_auto_class(auto.__name__)
    if travels:
        config.register_for_auto_class()


# Families of which no shrunk model was made or loaded yet: making all their classes would take a second
_unused: dict[type, tuple[type, bool]] = {}


def _register_shrunk(dense: Any, *, travels: bool) -> None:
    """Register the configuration of the shrunk models of a family, and its models once there is a configuration."""
    config = shrunk_config(dense)
    _register(config, {}, travels=travels)
    _unused[config] = (dense, travels)


def _register_models(config: type) -> None:
    dense, travels = _unused.pop(config, (None, False))
    if dense is not None:
        models = {getattr(transformers, auto): shrunk_class(stock) for auto, stock in stock_classes(dense).items()}
        _register(config, models, travels=travels)


ShrunkConfig.before_use.append(_register_models)
for _config, _models in _TABLE.items():
    _register(_config, _models, travels=not issubclass(_config, _STAY))
for _model_type, _row in ARCHITECTURES.items():
    if _row.units:
        _register_shrunk(CONFIG_MAPPING[_model_type], travels=True)

# The pipelines that `pipeline(name, model=...)` finds.
PIPELINE_REGISTRY.register_pipeline(
    "masked-crf", pipeline_class=CrfTokenClassificationPipeline, pt_model=AutoModelForTokenClassification, type="text"
)
PIPELINE_REGISTRY.register_pipeline("multitask", pipeline_class=MultiTaskPipeline, pt_model=AutoModel, type="text")
