"""Configurations of the models whose experts share central tensors."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.t5.configuration_t5 import T5Config

from hf_moebert.checkpoints.strict_config import StrictConfig, strict
from hf_moebert.methods.mpo.functional_decomposition import GAUGES
from hf_moebert.methods.mpo.functional_shapes import (
    cap_bonds,
    check_bonds,
    check_cap,
    check_num_cores,
    factor_matrix,
    full_bonds,
)


ROUTERS = {"reference": 0.0, "switch": 0.01}  # and the weight of their balance losses
GRANULARITIES = ("tensor", "element")


@dataclass(kw_only=True)
class MPOEFields:
    """The fields that every config here adds to that of the dense architecture.

    Args:
        num_experts: Experts of each converted block, 1 to 256.
        num_cores: Tensors in the chain of each matrix, odd; the experts share the one in the middle.
        bond: Largest size of each bond; `None` truncates nothing.
        gauge: Which tensors carry the norm after the decomposition: `symmetric`, `left`, `centre` or `even`.
        router: `reference` (the gate, of value 1, multiplies the input, no balance loss: the authors' code) or
            `switch` (the gate multiplies the output, and there is a balance loss).
        router_aux_loss_coef: Weight of the balance loss; `None` is 0 for `reference` and 0.01 for `switch`.
        share_centre: Whether the experts of a block share the central tensors; if not, each has its own.
        mpoe_layers: Blocks that are converted, ascending from 0, in T5 counted through the encoder and then through
            the decoder; `None` converts all.
        mpoe_shapes: `rows`, `columns` and `bonds` of the chain of each matrix; filled in when a model is built.
        output_router_logits: Whether the routers' logits are returned.

    Raises:
        ValueError: If a value has the wrong type or breaks a rule; the message names rule and remedy.

    Source: Gao et al. 2022, https://arxiv.org/abs/2203.01104.
    """

    dense_model_type: ClassVar[str]

    num_experts: int = 8
    num_cores: int = 5
    bond: int | None = None
    gauge: str = "symmetric"
    router: str = "reference"
    router_aux_loss_coef: float | int | None = None
    share_centre: bool = True
    mpoe_layers: list[int] | None = None
    mpoe_shapes: dict[str, dict[str, list[int]]] | None = None
    output_router_logits: bool = False

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **fields: Any) -> Self:
        """Copy the config of a dense model, and add the experts.

        Args:
            config: Config of a model of the dense architecture.
            **fields: Fields of this class.

        Raises:
            ValueError: If the config is of another architecture.
        """
        if config.model_type != cls.dense_model_type:
            raise ValueError(
                f"`model` must be dense and have the architecture {cls.dense_model_type!r}, got "
                f"{config.model_type!r}. T5, GPT-2 and BERT have a class each."
            )
        return cls(**(cls.fields_of_dense(config) | fields))  # type: ignore[attr-defined]  # of `StrictConfig`

    @property
    def num_blocks(self) -> int:
        """The number of blocks that can be converted."""
        return self.num_hidden_layers  # type: ignore[attr-defined]  # of the base class

    @property
    def converted_layers(self) -> list[int]:
        """The blocks that hold experts, ascending."""
        return list(range(self.num_blocks)) if self.mpoe_layers is None else self.mpoe_layers

    @property
    def balance_coef(self) -> float:
        """The weight of the balance loss; by default that of the router."""
        return ROUTERS[self.router] if self.router_aux_loss_coef is None else self.router_aux_loss_coef

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """Return output and input features of each matrix of one expert; the last one is the down-projection."""
        raise NotImplementedError

    def matrix_std(self, name: str) -> float:
        """Return the standard deviation that a matrix is initialised with."""
        return self.initializer_range  # type: ignore[attr-defined]  # of the base class

    def plan_shapes(self) -> dict[str, dict[str, list[int]]]:
        """Return `mpoe_shapes`, computed from the sizes if they are not given."""
        if self.mpoe_shapes is not None:
            return self.mpoe_shapes
        shapes = {}
        for name, (rows, columns) in self.matrix_sizes().items():
            sides = factor_matrix(rows, columns, self.num_cores)
            row_sizes, column_sizes = map(list, sides)
            bonds = list(cap_bonds(row_sizes, column_sizes, self.bond))
            shapes[name] = {"rows": row_sizes, "columns": column_sizes, "bonds": bonds}
        return shapes

    def validate_experts(self) -> None:
        """Refuse options of experts and routers that are out of range."""
        if not 1 <= self.num_experts <= 256:
            raise ValueError(f"`num_experts` must be in [1, 256], got {self.num_experts}. Use 8, or leave it out.")
        check_num_cores(self.num_cores)
        check_cap(self.bond)
        for name, known in (("gauge", GAUGES), ("router", tuple(ROUTERS))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}. Leave it out for "
                    f"{known[0]!r}."
                )
        if not 0 <= self.balance_coef < math.inf:
            raise ValueError(
                f"`router_aux_loss_coef` must be finite and >= 0, got {self.router_aux_loss_coef}. Use 0.01, or "
                "leave it out for the router's own."
            )

    def validate_layers(self) -> None:
        """Refuse blocks that do not exist."""
        layers = self.mpoe_layers or []
        if layers != sorted(set(layers)) or any(not 0 <= layer < self.num_blocks for layer in layers):
            raise ValueError(
                f"`mpoe_layers` must name blocks from 0 to {self.num_blocks - 1}, ascending and each once, got "
                f"{layers}. Leave it out to convert all."
            )

    def validate_shapes(self) -> None:
        """Refuse chains that do not fit the model's matrices."""
        if self.mpoe_shapes is None:
            return
        sizes = self.matrix_sizes()
        if self.mpoe_shapes.keys() != sizes.keys():
            raise ValueError(f"`mpoe_shapes` must name {sorted(sizes)}, got {sorted(self.mpoe_shapes)}. Leave it out.")
        for name, chain in self.mpoe_shapes.items():
            if chain.keys() != {"rows", "columns", "bonds"}:
                raise ValueError(f"`mpoe_shapes.{name}` must hold rows, columns and bonds, got {sorted(chain)}.")
            sides = chain["rows"], chain["columns"]
            products = tuple(math.prod(side) if min(side, default=0) > 0 else 0 for side in sides)
            lengths = {len(side) for side in sides}
            if lengths != {self.num_cores} or any(a < b for a, b in zip(products, sizes[name], strict=True)):
                raise ValueError(
                    f"`mpoe_shapes.{name}` must have {self.num_cores} positive factors on each side that multiply to "
                    f"{sizes[name]} or more, got {sides}. Leave `mpoe_shapes` out."
                )
            check_bonds(chain["bonds"], full_bonds(*sides))
            if chain["bonds"] != (expected := list(cap_bonds(*sides, self.bond))):
                raise ValueError(
                    f"`mpoe_shapes.{name}` must have the bonds {expected} that `bond` {self.bond} gives, got "
                    f"{chain['bonds']}. Convert the dense model again for another `bond`."
                )


@strict
class MPOET5Config(MPOEFields, StrictConfig, T5Config):
    """Configuration of a T5 whose feed-forward networks are experts: the arguments of `T5Config` and `MPOEFields`."""

    model_type = "mpoe_t5"
    dense_model_type = "t5"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "aux_loss", "router_logits"]

    @property
    def num_blocks(self) -> int:
        """The number of blocks of encoder and decoder together."""
        return self.num_layers + self.num_decoder_layers

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """See `MPOEFields`; a gated network has two up-projections."""
        names = ("wi_0", "wi_1") if self.is_gated_act else ("wi",)
        return dict.fromkeys(names, (self.d_ff, self.d_model)) | {"wo": (self.d_model, self.d_ff)}

    def matrix_std(self, name: str) -> float:
        """Return T5's standard deviation, which depends on the input features."""
        return self.initializer_factor * self.matrix_sizes()[name][1] ** -0.5


@strict
class MPOEGPT2Config(MPOEFields, StrictConfig, GPT2Config):
    """Configuration of a GPT-2 whose feed-forward networks are experts, with the arguments of `GPT2Config`."""

    model_type = "mpoe_gpt2"
    dense_model_type = "gpt2"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "aux_loss", "router_logits"]

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """See `MPOEFields`."""
        inner = 4 * self.n_embd if self.n_inner is None else self.n_inner
        return {"c_fc": (inner, self.n_embd), "c_proj": (self.n_embd, inner)}


@strict
class MPOEBertConfig(MPOEFields, StrictConfig, BertConfig):
    """Configuration of a BERT whose feed-forward networks are experts, with the arguments of `BertConfig`."""

    model_type = "mpoe_bert"
    dense_model_type = "bert"
    keys_to_ignore_at_inference = ["aux_loss", "router_logits"]

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """See `MPOEFields`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {"up": (inner, hidden), "down": (hidden, inner)}


__all__ = [
    "MPOEBertConfig",
    "MPOEGPT2Config",
    "MPOET5Config",
]
