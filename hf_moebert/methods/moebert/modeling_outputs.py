"""The outputs of mixtures of experts: those of transformers, and what the routers decided."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    ImageClassifierOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from .modeling_routing import RoutingOutput


@dataclass
class MoEBertOutput(RoutingOutput):
    """The fields that every output has besides those of the base class.

    Args:
        expert_load: Real tokens that each expert of each converted layer processed, `(experts,)`.
    """

    expert_load: tuple[Tensor, ...] | None = None


@dataclass
class MoEBertModelOutput(MoEBertOutput, BaseModelOutputWithPooling):
    """Output of a body, with or without a pooler."""


@dataclass
class MoEBertSequenceClassifierOutput(MoEBertOutput, SequenceClassifierOutput):
    """Output of a sequence classifier."""


@dataclass
class MoEBertTokenClassifierOutput(MoEBertOutput, TokenClassifierOutput):
    """Output of a token classifier."""


@dataclass
class MoEBertQuestionAnsweringOutput(MoEBertOutput, QuestionAnsweringModelOutput):
    """Output of a model that finds answers."""


@dataclass
class MoEBertMultipleChoiceOutput(MoEBertOutput, MultipleChoiceModelOutput):
    """Output of a model that chooses among continuations."""


@dataclass
class MoEBertMaskedLMOutput(MoEBertOutput, MaskedLMOutput):
    """Output of a masked language model."""


@dataclass
class MoEBertImageClassifierOutput(MoEBertOutput, ImageClassifierOutput):
    """Output of an image classifier."""


OUTPUTS: dict[type[ModelOutput], type[MoEBertOutput]] = {
    BaseModelOutput: MoEBertModelOutput,
    BaseModelOutputWithCrossAttentions: MoEBertModelOutput,
    BaseModelOutputWithPastAndCrossAttentions: MoEBertModelOutput,
    BaseModelOutputWithPooling: MoEBertModelOutput,
    BaseModelOutputWithPoolingAndCrossAttentions: MoEBertModelOutput,
    SequenceClassifierOutput: MoEBertSequenceClassifierOutput,
    TokenClassifierOutput: MoEBertTokenClassifierOutput,
    QuestionAnsweringModelOutput: MoEBertQuestionAnsweringOutput,
    MultipleChoiceModelOutput: MoEBertMultipleChoiceOutput,
    MaskedLMOutput: MoEBertMaskedLMOutput,
    ImageClassifierOutput: MoEBertImageClassifierOutput,
}


def with_routing(outputs: ModelOutput, **decisions: Any) -> MoEBertOutput:
    """Return an output of transformers with what the routers decided, without what only decoders have."""
    fields = {name: value for name, value in outputs.items() if name not in ("cross_attentions", "past_key_values")}
    return OUTPUTS[type(outputs)](**fields, **decisions)
