"""Configurations of models with masked feed-forward networks, and of their compact form."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import transformers
from transformers import PreTrainedConfig
from transformers.models.t5.configuration_t5 import T5Config

from .configuration_families import ARCHITECTURES
from .configuration_strict import INSTALL, StrictConfig, strict


SHIPPED = frozenset(ARCHITECTURES)  # all others are registered by a user
STAGES = ("learned", "fixed", "compact")
BUDGETS = ("global", "layer")


@dataclass(kw_only=True)
class MoMFields:
    """The fields that all configurations of this method add to those of the base class.

    In a compact model, `per_layer_config` holds the sizes of each block: the number of units that run for every token
    under the base class's own name of the width (`intermediate_size`, `n_inner`, `d_ff`), and the number of further
    units of each expert under `expert_sizes`. With one expert this is the standard of transformers for layers of
    different widths.

    Args:
        num_experts: Number of masks of each block, 1 to 64; with 1 there is no router.
        num_experts_per_tok: Number of masks that a token uses.
        group_size: Number of neighbouring units that share a mask.
        mask_stage: `learned` (scores are trained), `fixed` (masks are 0 or 1) or `compact` (closed units are removed).
        mask_budget: Whether the target sparsity holds for all blocks together (`global`) or for each (`layer`).
        router_aux_loss_coef: Weight of the balance loss of the routers while training.
        layers: Blocks that have masks, ascending from 0; T5 counts its encoder and then its decoder. `None` masks all.
        expert_sizes: Only in `per_layer_config`.

    Raises:
        ValueError: If a value has the wrong type or breaks a rule; the message names rule and remedy.

    Source: Liu et al. 2025, "Masks Can be Learned as an Alternative to Experts", ACL, for masks as experts; the fields
    are our own design.
    """

    dense_model_type: ClassVar[str]
    width_name: ClassVar[str] = "intermediate_size"
    base_model_tp_plan = None  # the base class's plan names missing modules, and would not shard masks

    before_use: ClassVar[list[Callable[[type], None]]] = []  # called with the class of every configuration

    num_experts: int = 1
    num_experts_per_tok: int = 1
    group_size: int = 1
    mask_stage: str = "learned"
    mask_budget: str = "global"
    router_aux_loss_coef: float | int = 0.01
    layers: list[int] | None = None
    expert_sizes: list[int] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names: dict[str, str] = cls.attribute_map  # type: ignore[attr-defined]  # of the base class
        cls.attribute_map = names | {"masked_layers": "layers"}  # type: ignore[attr-defined]  # its name in 0.1.0
        # The generated ones read the global widths, which transformers forbids.
        cls.__eq__ = PreTrainedConfig.__eq__  # type: ignore[method-assign]
        cls.__repr__ = PreTrainedConfig.__repr__  # type: ignore[method-assign]

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields as `StrictConfig` does."""
        for prepare in self.before_use:
            prepare(type(self))
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of `StrictConfig`

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **fields: Any) -> Self:
        """Copy the configuration of a dense model and add the masks.

        Args:
            config: Configuration of a model of the base class, or of this class.
            **fields: Fields of this class.
        """
        return cls(**(cls.fields_of_dense(config) | fields))  # type: ignore[attr-defined]  # of `StrictConfig`

    @property
    def num_blocks(self) -> int:
        """Number of blocks with a feed-forward network."""
        return self.num_hidden_layers  # type: ignore[attr-defined]  # of the base class

    @property
    def blocks(self) -> list[int]:
        """The blocks that have masks, ascending."""
        return list(range(self.num_blocks)) if self.layers is None else self.layers

    def block_sizes(self, block: int) -> tuple[int | None, list[int]]:
        """Return how many units of a compact block run for every token, and how many more each expert has."""
        layer = self.per_layer_config[block]  # type: ignore[attr-defined]  # of the base class
        return getattr(layer, self.width_name), layer.expert_sizes or []

    def write_sizes(self, sizes: dict[int, tuple[int, list[int]]]) -> dict[int, dict[str, Any]]:
        """Return the `per_layer_config` from which `block_sizes` reads these."""
        return {
            block: {self.width_name: width} | ({"expert_sizes": experts} if any(experts) else {})
            for block, (width, experts) in sizes.items()
        }

    def validate_masks(self) -> None:
        """Refuse values that break a rule."""
        if not 1 <= self.num_experts <= 64:
            raise ValueError(f"`num_experts` must be in [1, 64], got {self.num_experts}. Leave it out for 1.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` (`top_k` of `from_dense`) must be in [1, {self.num_experts}], the number of "
                f"experts, got {self.num_experts_per_tok}. Use 1."
            )
        if self.group_size < 1:
            raise ValueError(f"`group_size` must be at least 1, got {self.group_size}. Use 8 for widths of 8.")
        for name, known in (("mask_stage", STAGES), ("mask_budget", BUDGETS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}. Leave it out for "
                    f"{known[0]!r}."
                )
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(
                f"`router_aux_loss_coef` must be finite and >= 0, got {self.router_aux_loss_coef}. Use 0.01, or 0 "
                "for no balance loss."
            )
        if self.chunk_size_feed_forward:  # type: ignore[attr-defined]  # of the base class
            raise ValueError(
                "`chunk_size_feed_forward` must be 0, because routers see all tokens of a batch at once, got "
                f"{self.chunk_size_feed_forward}. Leave it out."  # type: ignore[attr-defined]
            )

    @property
    def names_of_sizes(self) -> set[str]:
        """Names of the sizes in `per_layer_config`."""
        return {self.width_name, "expert_sizes"}

    def validate_sizes(self) -> None:
        """Refuse sizes of blocks that no model is built by."""
        for block, entry in (self.to_dict().get("per_layer_config") or {}).items():  # type: ignore[attr-defined]
            if unknown := sorted(entry.keys() - self.names_of_sizes):
                raise ValueError(
                    f"`per_layer_config` must name only {sorted(self.names_of_sizes)}, got {unknown[0]!r} in layer "
                    f"{int(block)}."
                )

    def validate_blocks(self) -> None:
        """Refuse blocks that do not exist."""
        blocks = self.blocks
        if not blocks or blocks != sorted(set(blocks)) or any(not 0 <= block < self.num_blocks for block in blocks):
            raise ValueError(
                f"`layers` must name blocks from 0 to {self.num_blocks - 1}, ascending and each once, got "
                f"{blocks}. Leave it out to mask all."
            )


@strict
class MoMT5Config(MoMFields, StrictConfig, T5Config):
    """Configuration of a T5 with masked feed-forward networks, with the arguments of `T5Config`.

    `per_layer_config` counts the layers of the encoder: the sizes of the decoder are in the same entries.

    Args:
        d_ff_of_decoder: Only in `per_layer_config`.
        expert_sizes_of_decoder: Only in `per_layer_config`.
    """

    model_type = "mom_t5"
    dense_model_type = "t5"
    width_name = "d_ff"

    d_ff_of_decoder: int | None = None
    expert_sizes_of_decoder: list[int] | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks of encoder and decoder."""
        return self.num_layers + self.num_decoder_layers

    def block_sizes(self, block: int) -> tuple[int | None, list[int]]:
        """Return the sizes of a compact block, as `MoMFields.block_sizes`."""
        if block < self.num_layers:
            return super().block_sizes(block)
        layer = self.per_layer_config[block - self.num_layers]
        return layer.d_ff_of_decoder, layer.expert_sizes_of_decoder or []

    @property
    def names_of_sizes(self) -> set[str]:
        """Names of the sizes in `per_layer_config`, those of the decoder among them."""
        return super().names_of_sizes | {"d_ff_of_decoder", "expert_sizes_of_decoder"}

    def write_sizes(self, sizes: dict[int, tuple[int, list[int]]]) -> dict[int, dict[str, Any]]:
        """Return the `per_layer_config` for these sizes, as `MoMFields.write_sizes`.

        Raises:
            ValueError: If the decoder is deeper than the encoder.
        """
        if self.num_decoder_layers > self.num_layers:
            raise ValueError(
                f"A T5 to shrink must have no more decoder layers than its {self.num_layers} encoder layers, got "
                f"{self.num_decoder_layers}: `per_layer_config` has no place for them. Keep the masks."
            )
        entries: dict[int, dict[str, Any]] = {}
        for block, entry in super().write_sizes(sizes).items():
            in_decoder = block >= self.num_layers
            named = {f"{name}_of_decoder": value for name, value in entry.items()} if in_decoder else entry
            entries[block % self.num_layers] = entries.get(block % self.num_layers, {}) | named
        return entries


_made: dict[type, type] = {T5Config: MoMT5Config}  # by the dense configuration


def masked_config(dense: type[PreTrainedConfig]) -> Any:
    """Return the configuration of the masked models of a family, which the first call makes.

    Args:
        dense: Configuration of transformers, of a family in the table that can be masked.
    """
    if dense in _made:
        return _made[dense]
    row = ARCHITECTURES[dense.model_type]
    body: dict[str, Any] = {
        "__doc__": f"Configuration of a model of the family {dense.model_type!r} with masked feed-forward networks.",
        "__module__": __name__,
        "__annotations__": {},
        "model_type": f"mom_{dense.model_type}",
        "dense_model_type": dense.model_type,
        "width_name": row.neurons,
        "undeclared": row.undeclared,
    }
    if row.neurons not in {field.name for field in dataclasses.fields(dense)}:  # some compute it of other fields
        body |= {row.neurons: None, "__annotations__": {row.neurons: int | None}}
    if dense.model_type not in SHIPPED:
        body["package"] = f"{INSTALL}`hf_moebert.register_architecture({dense.model_type!r}, ...)`)"
    cls: Any = strict(type(f"MoM{dense.__name__}", (MoMFields, StrictConfig, dense), body))
    globals()[cls.__name__] = _made[dense] = cls
    return cls


def why_not_masked(model_type: str) -> str:
    """Return why the networks of a family take no masks, as the end of a sentence; empty if they do."""
    row = ARCHITECTURES.get(model_type)
    if row is None:
        return "it is not in the table"
    if "neurons" not in row.units:
        return row.kept or "its neurons are no units"
    if any(paths.adds_residual for stack in row.stacks for paths in stack.feed_forwards):
        return "its network adds the residual itself"
    return ""


def __getattr__(name: str) -> Any:
    """Make the configuration of a family when it is asked for by name."""
    dense: Any = getattr(transformers, name.removeprefix("MoM"), None) if name.startswith("MoM") else None
    if why_not_masked(getattr(dense, "model_type", None) or ""):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return masked_config(dense)


__all__ = ["MoMFields", "MoMT5Config", "masked_config"]
