"""Models whose feed-forward networks have masks for experts: one class for each base class."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
)

from .configuration_mixture_of_masks import (
    MoMBertConfig,
    MoMGPT2Config,
    MoMLlamaConfig,
    MoMMistralConfig,
    MoMQwen2Config,
    MoMQwen3Config,
    MoMT5Config,
)
from .modeling_masked import MoMModel


class MoMLlamaForCausalLM(MoMModel, LlamaForCausalLM):
    """Llama whose feed-forward networks have masks for experts."""

    config: MoMLlamaConfig


class MoMMistralForCausalLM(MoMModel, MistralForCausalLM):
    """Mistral whose feed-forward networks have masks for experts."""

    config: MoMMistralConfig


class MoMQwen2ForCausalLM(MoMModel, Qwen2ForCausalLM):
    """Qwen2 whose feed-forward networks have masks for experts."""

    config: MoMQwen2Config


class MoMQwen3ForCausalLM(MoMModel, Qwen3ForCausalLM):
    """Qwen3 whose feed-forward networks have masks for experts."""

    config: MoMQwen3Config


class MoMGPT2LMHeadModel(MoMModel, GPT2LMHeadModel):
    """GPT-2 whose feed-forward networks have masks for experts."""

    config: MoMGPT2Config


class MoMT5ForConditionalGeneration(MoMModel, T5ForConditionalGeneration):
    """T5, T5 1.1 or FLAN-T5 whose feed-forward networks have masks for experts."""

    config: MoMT5Config
    accepts_loss_kwargs = False  # the base class's loss is the mean over the batch
    _predicts_next = False
    _keep_in_fp32_modules = ["wo", "down"]

    def _token_mask(self, network: nn.Module, given: dict[str, Any]) -> Tensor | None:
        if network.block < self.config.num_layers:
            return given.get("attention_mask")
        labels = given.get("labels")
        return given.get("decoder_attention_mask") if labels is None else labels != -100


class MoMBertForSequenceClassification(MoMModel, BertForSequenceClassification):
    """BERT whose feed-forward networks have masks for experts."""

    config: MoMBertConfig
    accepts_loss_kwargs = False  # the base class's loss is the mean over the batch
    _predicts_next = False


def masked_classes() -> dict[type[PreTrainedModel], type[MoMModel]]:
    """Return the class with masks for each stock class."""
    return {cls.__bases__[1]: cls for cls in MoMModel.__subclasses__()}


__all__ = [
    "MoMBertForSequenceClassification",
    "MoMGPT2LMHeadModel",
    "MoMLlamaForCausalLM",
    "MoMMistralForCausalLM",
    "MoMQwen2ForCausalLM",
    "MoMQwen3ForCausalLM",
    "MoMT5ForConditionalGeneration",
]
