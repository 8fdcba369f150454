"""Configurations of models whose layers differ in width."""

from typing import Any, Self

from transformers import BertConfig, DistilBertConfig, PreTrainedConfig, RobertaConfig, ViTConfig

from .configuration_strict import StrictConfig, strict


class ShrunkConfig(StrictConfig, PreTrainedConfig):
    """Base of the configurations of all shrunk families: the widths of each layer, in `per_layer_config`.

    The widths outside of `per_layer_config` are those of the dense model. They define the size of a head, and they
    hold for the layers that `per_layer_config` does not name.

    Raises:
        ValueError: If a width does not exist or is not in [1, that of the dense model].
    """

    unit_names = {"neurons": "intermediate_size", "heads": "num_attention_heads"}  # names of the widths in this family

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The generated ones read the global widths, which transformers forbids.
        cls.__eq__ = PreTrainedConfig.__eq__  # type: ignore[method-assign]
        cls.__repr__ = PreTrainedConfig.__repr__  # type: ignore[method-assign]

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, widths: list[dict[str, int]]) -> Self:
        """Copy a dense configuration (head, labels, sizes) and add the widths.

        Args:
            config: Configuration of a dense model of the family, or of a shrunk one.
            widths: Number of units of each layer, by kind.
        """
        dense = cls.fields_of_dense(config)
        dense.pop("per_layer_config", None)
        layers = {
            index: {cls.unit_names[kind]: count for kind, count in layer.items()} for index, layer in enumerate(widths)
        }
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
        for index, layer in stored.get("per_layer_config", {}).items():
            for name, value in layer.items():
                if name not in self.unit_names.values():
                    raise ValueError(
                        f"`per_layer_config` must name only {sorted(self.unit_names.values())}, got {name!r} in layer "
                        f"{int(index)}."
                    )
                if not 1 <= value <= stored[name]:
                    raise ValueError(
                        f"`{name}` of a layer must be in [1, {stored[name]}], the dense model's, got {value} in layer "
                        f"{int(index)}."
                    )


@strict
class ShrunkBertConfig(ShrunkConfig, BertConfig):
    """Configuration of a BERT with layers of different widths."""

    model_type = "shrunk_bert"


@strict
class ShrunkRobertaConfig(ShrunkConfig, RobertaConfig):
    """Configuration of a RoBERTa with layers of different widths."""

    model_type = "shrunk_roberta"


@strict
class ShrunkDistilBertConfig(ShrunkConfig, DistilBertConfig):
    """Configuration of a DistilBERT with layers of different widths."""

    model_type = "shrunk_distilbert"
    unit_names = {"neurons": "hidden_dim", "heads": "n_heads"}


@strict
class ShrunkViTConfig(ShrunkConfig, ViTConfig):
    """Configuration of a ViT with layers of different widths."""

    model_type = "shrunk_vit"


__all__ = ["ShrunkBertConfig", "ShrunkDistilBertConfig", "ShrunkRobertaConfig", "ShrunkViTConfig"]
