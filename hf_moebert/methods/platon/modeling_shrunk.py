"""Models whose layers differ in width: pruned models without their zero units."""

import functools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_families import ARCHITECTURES
from .configuration_shrunk import ShrunkConfig, shrunk_config
from .configuration_widths import as_dense
from .modeling_empty_losses import zero_empty_loss
from .modeling_stock import refuse_other_classes, stock_classes
from .modeling_strict import StrictModel
from .modeling_units import narrow_layers


logger = logging.get_logger(__name__)


def refuse_unshrinkable(model: PreTrainedModel) -> None:
    """Refuse a model whose class has no shrunk form.

    Raises:
        ValueError: If it is neither shrunk nor of a class that has a shrunk form.
    """
    if not isinstance(model, ShrunkModel):
        refuse_other_classes(model, stock_classes(type(model.config)).values())


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
