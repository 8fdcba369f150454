"""Compress pre-trained transformers with the stock Hugging Face tools, and measure what it brought."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .distillation import DistillationConfig, DistillationTrainer
from .moebert import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
    measure_importance,
)


__version__ = "0.1.0"

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "MoEBertConfig",
    "MoEBertForQuestionAnswering",
    "MoEBertForSequenceClassification",
    "MoEBertForTokenClassification",
    "MoEBertModel",
    "measure_importance",
]

# What `AutoModel….from_pretrained` finds after `import hf_moebert`; and what `save_pretrained` ships as code, for
# users without this package (`trust_remote_code=True`).
for _config, _models in {
    MoEBertConfig: {
        AutoModel: MoEBertModel,
        AutoModelForSequenceClassification: MoEBertForSequenceClassification,
        AutoModelForTokenClassification: MoEBertForTokenClassification,
        AutoModelForQuestionAnswering: MoEBertForQuestionAnswering,
    },
}.items():
    AutoConfig.register(_config.model_type, _config)
    _config.register_for_auto_class()
    for _auto, _model in _models.items():
        _auto.register(_config, _model)
        _model.register_for_auto_class(_auto.__name__)
