"""Models whose feed-forward networks have masks for experts: one class for each base class."""

from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, T5ForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_families import name_family
from .configuration_mixture_of_masks import MoMT5Config, masked_config, why_not_masked
from .modeling_masked import MoMModel
from .modeling_stock import refuse_other_classes, stock_classes


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


_made: dict[type, type[MoMModel]] = {T5ForConditionalGeneration: MoMT5ForConditionalGeneration}  # by the stock class


def masked_class(stock: type[PreTrainedModel]) -> type[MoMModel]:
    """Return the class with masks of a stock class, which the first call makes.

    Args:
        stock: A class of a family in the table that can be masked.
    """
    if stock in _made:
        return _made[stock]
    body: dict[str, Any] = {
        "__doc__": f"A {stock.__name__} whose feed-forward networks have masks for experts.",
        "__module__": __name__,
        "config_class": masked_config(stock.config_class),
    }
    if stock.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # their loss is the mean over the batch
        body |= {"accepts_loss_kwargs": False, "_predicts_next": False}
    cls: Any = type(f"MoM{stock.__name__}", (MoMModel, stock), body)
    globals()[cls.__name__] = _made[stock] = cls
    return cls


def classes_to_mask(dense: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Return the classes of a family that have a loss, by the name of the Auto class."""
    return {auto: stock for auto, stock in stock_classes(dense).items() if auto != "AutoModel"}


def find_masked_class(model: PreTrainedModel) -> type[MoMModel]:
    """Return the class with masks for a stock model.

    Raises:
        ValueError: If its family takes no masks, or its class is not one of transformers for the family.
    """
    if type(model) in _made:
        return _made[type(model)]
    family = name_family(model)
    if reason := why_not_masked(family):
        raise ValueError(
            f"`model` must be of a family whose networks take masks, got {family!r}, of which they do not, because "
            f"{reason}. Load a dense checkpoint of another family."
        )
    refuse_other_classes(model, classes_to_mask(type(model.config)).values())
    return masked_class(type(model))


def __getattr__(name: str) -> Any:
    """Make the class of a masked model when it is asked for by name."""
    stock: Any = getattr(transformers, name.removeprefix("MoM"), None) if name.startswith("MoM") else None
    if why_not_masked(getattr(getattr(stock, "config_class", None), "model_type", "")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return masked_class(stock)


__all__ = ["MoMT5ForConditionalGeneration", "find_masked_class", "masked_class"]
