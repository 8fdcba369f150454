"""Models whose layers differ in width: pruned models without their zero units."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import ModelOutput, logging

from .configuration_shrunk import (
    ShrunkBertConfig,
    ShrunkConfig,
    ShrunkDistilBertConfig,
    ShrunkRobertaConfig,
    ShrunkViTConfig,
)
from .modeling_strict import StrictModel
from .modeling_units import narrow_layers


logger = logging.get_logger(__name__)


def can_shrink(model: PreTrainedModel) -> bool:
    """Check whether there is a registered class for the shrunk form of a model."""
    return type(model) in shrunk_classes() or isinstance(model, ShrunkModel)


def shrunk_classes() -> dict[type[PreTrainedModel], type["ShrunkModel"]]:
    """Return the shrunk class for each stock class."""
    return {cls.__bases__[1]: cls for cls in ShrunkModel.__subclasses__()}


def _without_empty_loss(forward: Callable) -> Callable:
    """Wrap the forward of a stock class: a mean over labels that are all -100, which is NaN, becomes zero."""

    @functools.wraps(forward)  # with its signature, by which transformers chooses columns
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        outputs, labels = forward(self, *args, **kwargs), kwargs.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or torch.compiler.is_compiling():
            return outputs
        if isinstance(outputs, ModelOutput) and not (labels != -100).any():
            outputs["loss"] = outputs["logits"].sum() * 0.0
        return outputs

    return wrapped


class ShrunkModel(StrictModel):
    """Base of all shrunk models: layers of different widths, and how they are saved."""

    config: ShrunkConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ShrunkModel in cls.__bases__:
            cls.forward = _without_empty_loss(cls.__bases__[1].forward)  # type: ignore[attr-defined]

    def __init__(self, config: ShrunkConfig, *args: Any, **kwargs: Any) -> None:
        layers = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # transformers builds the dense model
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.per_layer_config = layers
        narrow_layers(self, config.widths)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the modules' own names and all classes of the family in `auto_map`."""
        family = [cls for cls in ShrunkModel.__subclasses__() if cls.config_class is self.config_class]
        code = {c._auto_class: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in family if c._auto_class}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | code
        kwargs.setdefault("save_original_format", False)  # else a ViT's names would depend on its head
        super().save_pretrained(*args, **kwargs)


class ShrunkBertModel(ShrunkModel, BertModel):
    """BERT with layers of different widths."""

    config: ShrunkBertConfig


class ShrunkBertForSequenceClassification(ShrunkModel, BertForSequenceClassification):
    """BERT with layers of different widths, for sequence classification."""

    config: ShrunkBertConfig


class ShrunkBertForTokenClassification(ShrunkModel, BertForTokenClassification):
    """BERT with layers of different widths, for token classification."""

    config: ShrunkBertConfig


class ShrunkBertForQuestionAnswering(ShrunkModel, BertForQuestionAnswering):
    """BERT with layers of different widths, for question answering."""

    config: ShrunkBertConfig


class ShrunkBertForMaskedLM(ShrunkModel, BertForMaskedLM):
    """BERT with layers of different widths, for masked language modelling."""

    config: ShrunkBertConfig


class ShrunkRobertaModel(ShrunkModel, RobertaModel):
    """RoBERTa with layers of different widths."""

    config: ShrunkRobertaConfig


class ShrunkRobertaForSequenceClassification(ShrunkModel, RobertaForSequenceClassification):
    """RoBERTa with layers of different widths, for sequence classification."""

    config: ShrunkRobertaConfig


class ShrunkRobertaForTokenClassification(ShrunkModel, RobertaForTokenClassification):
    """RoBERTa with layers of different widths, for token classification."""

    config: ShrunkRobertaConfig


class ShrunkRobertaForQuestionAnswering(ShrunkModel, RobertaForQuestionAnswering):
    """RoBERTa with layers of different widths, for question answering."""

    config: ShrunkRobertaConfig


class ShrunkRobertaForMaskedLM(ShrunkModel, RobertaForMaskedLM):
    """RoBERTa with layers of different widths, for masked language modelling."""

    config: ShrunkRobertaConfig


class ShrunkDistilBertModel(ShrunkModel, DistilBertModel):
    """DistilBERT with layers of different widths."""

    config: ShrunkDistilBertConfig


class ShrunkDistilBertForSequenceClassification(ShrunkModel, DistilBertForSequenceClassification):
    """DistilBERT with layers of different widths, for sequence classification."""

    config: ShrunkDistilBertConfig


class ShrunkDistilBertForTokenClassification(ShrunkModel, DistilBertForTokenClassification):
    """DistilBERT with layers of different widths, for token classification."""

    config: ShrunkDistilBertConfig


class ShrunkDistilBertForQuestionAnswering(ShrunkModel, DistilBertForQuestionAnswering):
    """DistilBERT with layers of different widths, for question answering."""

    config: ShrunkDistilBertConfig


class ShrunkDistilBertForMaskedLM(ShrunkModel, DistilBertForMaskedLM):
    """DistilBERT with layers of different widths, for masked language modelling."""

    config: ShrunkDistilBertConfig


class ShrunkViTModel(ShrunkModel, ViTModel):
    """ViT with layers of different widths."""

    config: ShrunkViTConfig


class ShrunkViTForImageClassification(ShrunkModel, ViTForImageClassification):
    """ViT with layers of different widths, for image classification."""

    config: ShrunkViTConfig


__all__ = [
    "ShrunkBertForMaskedLM",
    "ShrunkBertForQuestionAnswering",
    "ShrunkBertForSequenceClassification",
    "ShrunkBertForTokenClassification",
    "ShrunkBertModel",
    "ShrunkDistilBertForMaskedLM",
    "ShrunkDistilBertForQuestionAnswering",
    "ShrunkDistilBertForSequenceClassification",
    "ShrunkDistilBertForTokenClassification",
    "ShrunkDistilBertModel",
    "ShrunkRobertaForMaskedLM",
    "ShrunkRobertaForQuestionAnswering",
    "ShrunkRobertaForSequenceClassification",
    "ShrunkRobertaForTokenClassification",
    "ShrunkRobertaModel",
    "ShrunkViTForImageClassification",
    "ShrunkViTModel",
]
