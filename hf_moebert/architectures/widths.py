"""Layers of different widths in a configuration: a mixin for those of narrowed models."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .families import ARCHITECTURES


class LayerWidths:
    """The widths of each layer, in `per_layer_config`, which is transformers' own field for layers that differ.

    The widths outside of `per_layer_config` are those of the dense model. They define the size of a head, and they
    hold for the layers that `per_layer_config` does not name. It stands before `StrictConfig` among the base classes.

    Raises:
        ValueError: If a width does not exist or is not in [1, that of the dense model].
    """

    unit_names: ClassVar[dict[str, str]] = {}  # names of the widths in this family
    base_model_tp_plan = None  # the base class's plan expects equal layers

    def __init_subclass__(cls, **kwargs: Any) -> None:
        dense: Any = cls.__bases__[-1]
        row = ARCHITECTURES.get(getattr(dense, "model_type", ""))
        if row is not None:  # not a base of configurations
            cls._describe(dense, {kind: getattr(row, kind) for kind in row.units})
        super().__init_subclass__(**kwargs)
        # The generated ones read the global widths, which transformers forbids.
        cls.__eq__ = PreTrainedConfig.__eq__  # type: ignore[method-assign]
        cls.__repr__ = PreTrainedConfig.__repr__  # type: ignore[method-assign]

    @classmethod
    def _describe(cls, dense: Any, unit_names: dict[str, str]) -> None:
        """Take the names of a family's widths, and let all other rules see those of the dense model alone."""
        cls.unit_names = unit_names
        for name in dir(cls):
            if name.startswith("validate_") and name != "validate_widths":
                setattr(cls, name, _of_dense(getattr(cls, name)))
        fields = {field.name for field in dataclasses.fields(dense)}
        for name in unit_names.values():
            if name not in fields and name not in dense.attribute_map:  # some compute it of other fields
                cls.__annotations__ = inspect.get_annotations(cls) | {name: int | None}
                setattr(cls, name, None)

    @property
    def widths(self) -> list[dict[str, int]]:
        """Number of units of each layer, by kind."""
        layers: Any = self.per_layer_config  # type: ignore[attr-defined]  # of transformers
        return [{kind: getattr(layer, name) for kind, name in self.unit_names.items()} for layer in layers]

    def validate_widths(self) -> None:
        """Refuse widths to which a dense layer cannot be cut."""
        stored = self.to_dict()  # type: ignore[attr-defined]  # of transformers
        layers = stored.get("per_layer_config") or {}
        names = set(self.unit_names.values())
        names |= {"num_attention_heads"} if "num_key_value_heads" in names else set()
        for index, layer in layers.items():
            for name, value in layer.items():
                if name not in names:
                    raise ValueError(
                        f"`per_layer_config` must name only {sorted(names)}, got {name!r} in layer {int(index)}."
                    )
                if stored.get(name) is None:
                    raise ValueError(f"`{name}` must be the dense model's beside `per_layer_config`, got None.")
                if not 1 <= value <= stored[name]:
                    raise ValueError(
                        f"`{name}` of a layer must be in [1, {stored[name]}], the dense model's, got {value} in layer "
                        f"{int(index)}."
                    )


@contextmanager
def as_equal(config: Any) -> Iterator[None]:
    """Hide the widths of single layers, while something reads those of the dense model."""
    layers = config.to_dict().get("per_layer_config") if config.is_heterogeneous else None
    if layers is None:
        yield
        return
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = layers


@contextmanager
def as_dense(config: Any) -> Iterator[None]:
    """Make a configuration one of the dense model, of equal layers, while transformers builds that model."""
    own, nested = type(config), "base_model_tp_plan" in vars(config)
    # By name, because code that travels with a checkpoint may be loaded twice
    ours = [base for base in own.__mro__ if "StrictConfig" in {parent.__name__ for parent in base.__mro__}]
    dense = next(base for base in own.__mro__ if base not in ours and issubclass(base, PreTrainedConfig))
    with as_equal(config):
        object.__setattr__(config, "__class__", dense)  # some heads ask `AutoModel` for a body by it
        object.__setattr__(config, "base_model_tp_plan", None)  # its plan would be that of the dense model
        try:
            yield
        finally:
            object.__setattr__(config, "__class__", own)
            if not nested:
                object.__delattr__(config, "base_model_tp_plan")


def _of_dense(rule: Callable[[Any], None]) -> Callable[[Any], None]:
    """Check a rule on the widths of the dense model."""

    @functools.wraps(rule)
    def checked(self: Any) -> None:
        with as_equal(self):
            rule(self)

    return checked


__all__ = ["LayerWidths", "as_dense", "as_equal"]
