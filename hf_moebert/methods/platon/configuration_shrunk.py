"""Configurations of models whose layers differ in width."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import transformers
from transformers import PreTrainedConfig

from .configuration_families import ARCHITECTURES
from .configuration_strict import INSTALL, StrictConfig, strict


SHIPPED = frozenset(ARCHITECTURES)  # all others are registered by a user


class ShrunkConfig(StrictConfig, PreTrainedConfig):
    """Base of the configurations of all shrunk families: the widths of each layer, in `per_layer_config`.

    The widths outside of `per_layer_config` are those of the dense model. They define the size of a head, and they
    hold for the layers that `per_layer_config` does not name.

    Raises:
        ValueError: If a width does not exist or is not in [1, that of the dense model].
    """

    unit_names: ClassVar[dict[str, str]] = {}  # names of the widths in this family
    base_model_tp_plan = None  # the base class's plan expects equal layers
    before_use: ClassVar[list[Callable[[type], None]]] = []  # called with the class of every configuration

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The generated ones read the global widths, which transformers forbids.
        cls.__eq__ = PreTrainedConfig.__eq__  # type: ignore[method-assign]
        cls.__repr__ = PreTrainedConfig.__repr__  # type: ignore[method-assign]

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields as `StrictConfig` does."""
        for prepare in self.before_use:
            prepare(type(self))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dense(
        cls, config: PreTrainedConfig, widths: list[dict[str, int]], full: dict[str, int] | None = None
    ) -> Self:
        """Copy a dense configuration (head, labels, sizes) and add the widths.

        Args:
            config: Configuration of a dense model of the family, or of a shrunk one.
            widths: Number of units of each layer, by kind.
            full: Number of units of a layer of the dense model, by kind, for families whose configuration does not
                have it.
        """
        dense = cls.fields_of_dense(config)
        dense.pop("per_layer_config", None)
        for kind, count in (full or {}).items():
            if dense.get(cls.unit_names[kind]) is None:
                dense[cls.unit_names[kind]] = count
        layers = {
            index: {cls.unit_names[kind]: count for kind, count in layer.items()} for index, layer in enumerate(widths)
        }
        for layer in layers.values():
            if (keys := layer.get("num_key_value_heads")) is not None:  # each goes with all heads that read it
                layer["num_attention_heads"] = keys * dense["num_attention_heads"] // dense["num_key_value_heads"]
        return cls(**dense, per_layer_config=layers)

    @property
    def widths(self) -> list[dict[str, int]]:
        """Number of units of each layer, by kind."""
        return [
            {kind: getattr(layer, name) for kind, name in self.unit_names.items()} for layer in self.per_layer_config
        ]

    def validate_widths(self) -> None:
        """Refuse widths to which a dense layer cannot be cut."""
        stored = self.to_dict()
        layers = stored.get("per_layer_config", {})
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
def as_dense(config: ShrunkConfig) -> Iterator[None]:
    """Make a configuration one of the dense model, of equal layers, while transformers builds that model."""
    hidden: Any = config
    layers, own = hidden.to_dict().get("per_layer_config"), type(hidden)
    # By name, because code that travels with a checkpoint may be loaded twice
    ours = [base for base in own.__mro__ if "StrictConfig" in {parent.__name__ for parent in base.__mro__}]
    dense = next(base for base in own.__mro__ if base not in ours and issubclass(base, PreTrainedConfig))
    hidden.per_layer_config = None
    object.__setattr__(hidden, "__class__", dense)  # some heads ask `AutoModel` for a body by it
    try:
        yield
    finally:
        object.__setattr__(hidden, "__class__", own)
        hidden.per_layer_config = layers


def _of_dense(rule: Callable[[Any], None]) -> Callable[[Any], None]:
    """Check a rule of the dense configuration on the widths of the dense model."""

    @functools.wraps(rule)
    def checked(self: ShrunkConfig) -> None:
        with as_dense(self):
            rule(self)

    return checked


_made: dict[type, type[ShrunkConfig]] = {}  # by the dense configuration


def shrunk_config(dense: type[PreTrainedConfig]) -> type[ShrunkConfig]:
    """Return the configuration of the shrunk models of a family, which the first call makes.

    Args:
        dense: Configuration of transformers, of a family in the table whose units can be removed.
    """
    if dense in _made:
        return _made[dense]
    row = ARCHITECTURES[dense.model_type]
    names = {kind: getattr(row, kind) for kind in row.units}
    fields = {field.name for field in dataclasses.fields(dense)}
    body: dict[str, Any] = {
        "__doc__": f"Configuration of a model of the family {dense.model_type!r} with layers of different widths.",
        "__module__": __name__,
        "__annotations__": {},
        "model_type": f"shrunk_{dense.model_type}",
        "unit_names": names,
        "undeclared": row.undeclared,
    }
    if dense.model_type not in SHIPPED:
        body["package"] = f"{INSTALL}`hf_moebert.register_architecture({dense.model_type!r}, ...)`)"
    body |= {name: _of_dense(getattr(dense, name)) for name in dir(dense) if name.startswith("validate_")}
    for name in names.values():
        if name not in fields and name not in dense.attribute_map:  # some compute it of other fields
            body |= {name: None, "__annotations__": body["__annotations__"] | {name: int | None}}
    cls: Any = strict(type(f"Shrunk{dense.__name__}", (ShrunkConfig, dense), body))
    globals()[cls.__name__] = _made[dense] = cls
    return cls


def __getattr__(name: str) -> Any:
    """Make the configuration of a family when it is asked for by name."""
    dense: Any = getattr(transformers, name.removeprefix("Shrunk"), None) if name.startswith("Shrunk") else None
    row = ARCHITECTURES.get(getattr(dense, "model_type", None) or "")
    if row is None or not row.units:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shrunk_config(dense)


__all__ = ["ShrunkConfig", "shrunk_config"]
