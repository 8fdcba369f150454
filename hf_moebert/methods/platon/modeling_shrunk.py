"""Models whose layers differ in width: pruned models without their zero units."""

import functools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .configuration_families import ARCHITECTURES
from .configuration_shrunk import ShrunkConfig, as_dense, shrunk_config
from .modeling_empty_losses import zero_empty_loss
from .modeling_strict import StrictModel
from .modeling_units import narrow_layers


logger = logging.get_logger(__name__)


# Where transformers names the class of each family for a head, by the name of the Auto class
HEADS: dict[str, Any] = {
    "AutoModel": modeling_auto.MODEL_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}


def stock_classes(dense: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Return the classes of a family that have a shrunk form, by the name of the Auto class.

    Args:
        dense: Configuration of the family.
    """
    found = {}
    for auto, mapping in HEADS.items():
        stock = mapping.get(dense, None)
        if stock is not None and not (auto == "AutoModelForCausalLM" and "AutoModelForMaskedLM" in found):
            found[auto] = stock[0] if isinstance(stock, tuple) else stock
    return found


def refuse_unshrinkable(model: PreTrainedModel) -> None:
    """Refuse a model whose class has no shrunk form.

    Raises:
        ValueError: If it is neither shrunk nor of a class that has a shrunk form.
    """
    known = stock_classes(type(model.config)).values()
    if not isinstance(model, ShrunkModel) and type(model) not in known:
        raise ValueError(
            f"`model` must be one of {sorted(stock.__name__ for stock in known)}, got {type(model).__name__}. Load "
            "the checkpoint with one of these, or shrink its base model."
        )


def _without_empty_loss(forward: Callable) -> Callable:
    """Wrap the forward of a stock class, so that a loss over no label is zero."""

    @functools.wraps(forward)  # with its signature, by which transformers chooses columns
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return zero_empty_loss(self, args, kwargs, forward(self, *args, **kwargs))

    return wrapped


class ShrunkModel(StrictModel):
    """Base of all shrunk models: layers of different widths, and how they are saved."""

    config: ShrunkConfig
    _tp_plan: dict[str, str] = {}  # nothing is sharded: see `base_model_tp_plan` of the configuration

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ShrunkModel in cls.__bases__:
            cls.forward = _without_empty_loss(cls.__bases__[1].forward)  # type: ignore[attr-defined]

    def __init__(self, config: ShrunkConfig, *args: Any, **kwargs: Any) -> None:
        with as_dense(config):
            super().__init__(config, *args, **kwargs)
        narrow_layers(self, config.widths)

    def initialize_weights(self) -> None:
        """Draw the weights that are not loaded."""
        with as_dense(self.config):  # rotations ask for the number of heads
            super().initialize_weights()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the modules' own names and all classes of the family in `auto_map`."""
        family = [cls for cls in ShrunkModel.__subclasses__() if cls.config_class is self.config_class]
        code = {c._auto_class: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in family if c._auto_class}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | code
        kwargs.setdefault("save_original_format", False)  # else a ViT's names would depend on its head
        super().save_pretrained(*args, **kwargs)


_made: dict[type, type[ShrunkModel]] = {}  # by the stock class


def shrunk_class(stock: type[PreTrainedModel]) -> type[ShrunkModel]:
    """Return the class of the shrunk form of a stock class, which the first call makes.

    Args:
        stock: A class of a family in the table whose units can be removed.
    """
    if stock in _made:
        return _made[stock]
    body = {
        "__doc__": f"A {stock.__name__} with layers of different widths.",
        "__module__": __name__,
        "config_class": shrunk_config(stock.config_class),
    }
    cls: Any = type(f"Shrunk{stock.__name__}", (ShrunkModel, stock), body)
    globals()[cls.__name__] = _made[stock] = cls
    return cls


def __getattr__(name: str) -> Any:
    """Make the class of a shrunk model when it is asked for by name."""
    stock: Any = getattr(transformers, name.removeprefix("Shrunk"), None) if name.startswith("Shrunk") else None
    row = ARCHITECTURES.get(getattr(getattr(stock, "config_class", None), "model_type", ""))
    if row is None or not row.units:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shrunk_class(stock)


__all__ = ["ShrunkModel", "shrunk_class"]
