"""Configurations of models whose layers differ in width."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import transformers
from transformers import PreTrainedConfig

from .configuration_families import ARCHITECTURES
from .configuration_strict import INSTALL, StrictConfig, strict
from .configuration_widths import LayerWidths


SHIPPED = frozenset(ARCHITECTURES)  # all others are registered by a user


class ShrunkConfig(LayerWidths, StrictConfig, PreTrainedConfig):
    """Base of the configurations of all shrunk families: the widths of each layer, in `per_layer_config`.

    Raises:
        ValueError: If a width does not exist or is not in [1, that of the dense model].
    """

    before_use: ClassVar[list[Callable[[type], None]]] = []  # called with the class of every configuration

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


_made: dict[type, type[ShrunkConfig]] = {}  # by the dense configuration


def shrunk_config(dense: type[PreTrainedConfig]) -> type[ShrunkConfig]:
    """Return the configuration of the shrunk models of a family, which the first call makes.

    Args:
        dense: Configuration of transformers, of a family in the table whose units can be removed.
    """
    if dense in _made:
        return _made[dense]
    row = ARCHITECTURES[dense.model_type]
    body: dict[str, Any] = {
        "__doc__": f"Configuration of a model of the family {dense.model_type!r} with layers of different widths.",
        "__module__": __name__,
        "model_type": f"shrunk_{dense.model_type}",
        "undeclared": row.undeclared,
    }
    if dense.model_type not in SHIPPED:
        body["package"] = f"{INSTALL}`hf_moebert.register_architecture({dense.model_type!r}, ...)`)"
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
