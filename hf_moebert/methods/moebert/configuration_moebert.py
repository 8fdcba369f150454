"""The configurations of models whose feed-forward networks are mixtures of experts, one for each family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import transformers
from transformers import PreTrainedConfig
from transformers.models.bert.configuration_bert import BertConfig

from .configuration_families import ARCHITECTURES
from .configuration_strict import INSTALL, StrictConfig, strict
from .configuration_widths import LayerWidths


HASH_ROUTINGS = ("hash-random", "hash-balanced")
GATE_ROUTINGS = ("gate-token", "gate-sentence")
GATE_SCALINGS = ("straight-through", "probability", "reference")
SHIPPED = frozenset(ARCHITECTURES)  # all others are registered by a user
# Families of this package's table whose models read texts or images whole, and predict no next token
ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "deit", "dinov2", "distilbert", "electra", "ernie"),
    *("eurobert", "jina_embeddings_v3", "modernbert", "mpnet", "nomic_bert", "roberta", "vit", "xlm-roberta"),
)
PREFIX = "MoE"  # of the names of all classes, before the name of transformers' class


@dataclass(kw_only=True)
class MoEFields(LayerWidths):
    """The fields that all configurations of this method add to those of the family.

    The width of the dense feed-forward networks stays under the family's own name, such as `intermediate_size`: the
    experts were cut from it, and layers that stay dense have it. A narrowed model has the widths of its layers in
    `per_layer_config`; its experts have the default sizes for them.

    Args:
        num_experts: Experts per converted layer, 1 to 256.
        expert_size: Neurons per expert; at most `num_shared_neurons + (width - num_shared_neurons) // num_experts`. By
            default `width // num_experts`, as in the paper.
        num_shared_neurons: Most important neurons of the dense layer, copied into every expert. The copies are trained
            separately. By default `width // 6`, as in the paper, but at most two thirds of an expert, the paper's
            share, so that many experts still differ.
        routing: How a token finds its expert. `hash-random`, the default, is a random table of the vocabulary for each
            layer, `hash-balanced` one table for all layers that gives each expert the same share of a corpus,
            `gate-token` or `gate-sentence`, the default for images, a trained linear gate on the token, or on the mean
            of the sentence.
        top_k: Experts per token; more than one only with a gate.
        gate_scaling: How the gate's probability scales the output. `straight-through` (the chosen probabilities
            divided by their detached sum: they add up to 1, and carry a gradient; our own design), `probability` (each
            expert's output is multiplied by its probability; paper, eq. 2) or `reference` (the output after residual
            and LayerNorm is multiplied, as in the paper's code; for layers that compute as BERT's do).
        router_aux_loss_coef: Weight of the load-balancing loss of the gates in the model's loss.
        layers: Layers that are converted, ascending from 0; `None` converts all.
        routing_seed: Seed of the hash tables.
        output_router_logits: Whether the gates' logits are returned.
        output_expert_load: Whether the number of real tokens that each expert processed is returned.

    Raises:
        ValueError: If a value has the wrong type or breaks a rule; the message names rule and remedy.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.
    """

    before_use: ClassVar[list[Callable[[type], None]]] = []  # called with the class of every configuration

    num_experts: int = 4
    expert_size: int | None = None
    num_shared_neurons: int | None = None
    routing: str = "hash-random"
    top_k: int = 1
    gate_scaling: str = "straight-through"
    router_aux_loss_coef: float | int = 0.0
    layers: list[int] | None = None
    routing_seed: int = 0
    output_router_logits: bool = False
    output_expert_load: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names: dict[str, str] = cls.attribute_map  # type: ignore[attr-defined]  # of the family
        cls.attribute_map = names | {"moe_layers": "layers"}  # type: ignore[attr-defined]  # its name in 0.1.0
        ignored = list(getattr(cls, "keys_to_ignore_at_inference", ()))
        cls.keys_to_ignore_at_inference = [*ignored, "router_logits", "expert_load", "aux_loss"]  # type: ignore[attr-defined]

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the sizes of the experts where none are given."""
        for prepare in self.before_use:
            prepare(type(self))
        super().__post_init__(**kwargs)  # type: ignore[misc]  # of the family
        if not self.is_heterogeneous:  # type: ignore[attr-defined]  # of transformers
            self.expert_size, self.num_shared_neurons = self.sizes_for(self.width)
        elif self.expert_size is not None or self.num_shared_neurons is not None:
            raise ValueError(
                "`expert_size` and `num_shared_neurons` must be left out where layers differ in width, got "
                f"{self.expert_size} and {self.num_shared_neurons}: they follow the width of each layer."
            )

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **fields: Any) -> Self:
        """Take over everything a dense configuration says (head, labels, sizes) and add the experts.

        Args:
            config: Configuration of a model of the family, or of its shrunk form.
            **fields: Fields of this class.

        Raises:
            ValueError: If the configuration is that of another family, or a field does not exist.
        """
        known = cls._dense_types()  # type: ignore[attr-defined]  # of `StrictConfig`
        if config.model_type.removeprefix("shrunk_") not in known:
            raise ValueError(
                f"`model` must be of the family {sorted(known)} to become one of {cls.__name__}, got "
                f"{config.model_type!r}. Use `hf_moebert.methods.moebert.from_dense`, which finds the class."
            )
        return cls(**(cls.fields_of_dense(config) | fields))  # type: ignore[attr-defined]  # of `StrictConfig`

    @property
    def width(self) -> int:
        """Neurons of a dense feed-forward network."""
        config: Any = self
        for name in ("intermediate_size", "hidden_dim"):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        width = int(config.hidden_size * config.mlp_ratio)
        return (width * 2 // 3 + 7) // 8 * 8 if config.use_swiglu_ffn else width  # as `Dinov2SwiGLUFFN` computes it

    def sizes_for(self, width: int) -> tuple[int, int]:
        """Return the neurons of an expert cut from a network, and those that all experts share, `(size, shared)`.

        Args:
            width: Neurons of the network.
        """
        size = width // max(self.num_experts, 1) if self.expert_size is None else self.expert_size
        shared = min(width // 6, size * 2 // 3) if self.num_shared_neurons is None else self.num_shared_neurons
        return size, shared

    @property
    def num_networks(self) -> int:
        """Feed-forward networks of the dense model; those that layers share count once."""
        config: Any = self
        if hasattr(config, "inner_group_num"):
            return config.inner_group_num * config.num_hidden_groups
        return config.num_hidden_layers

    @property
    def converted_layers(self) -> list[int]:
        """The layers that hold experts, ascending."""
        return list(range(self.num_networks)) if self.layers is None else self.layers

    @property
    def uses_gate(self) -> bool:
        """True if routing is learned by gates, False if it is looked up in hash tables."""
        return self.routing in GATE_ROUTINGS

    def validate_experts(self) -> None:
        """Refuse sizes that no dense layer can be cut into."""
        if not 1 <= self.num_experts <= 256:
            raise ValueError(f"`num_experts` must be in [1, 256], got {self.num_experts}. The paper uses 4.")
        size, shared = self.sizes_for(self.width)
        if not 0 <= shared <= size or size < 1:
            raise ValueError(
                f"`num_shared_neurons` must be in [0, expert_size], got {shared} with `expert_size` {size}. Lower it, "
                "or make the experts larger."
            )
        own = max(self.width - shared, 0) // self.num_experts
        largest = min(shared + own, self.width)
        if size > largest:
            raise ValueError(
                f"`expert_size` must be at most {largest} for {self.num_experts} experts that share {shared} of "
                f"{self.width} neurons, got {size}. Use {largest}, or share more neurons."
            )

    def validate_routing(self) -> None:
        """Refuse routings that do not exist or contradict the other fields."""
        if self.routing not in HASH_ROUTINGS + GATE_ROUTINGS:
            raise ValueError(f"`routing` must be one of {HASH_ROUTINGS + GATE_ROUTINGS}, got {self.routing!r}.")
        if not self.uses_gate and not hasattr(self, "vocab_size"):
            raise ValueError(
                f"`routing` must be one of {GATE_ROUTINGS} for images, which have no token ids, got {self.routing!r}."
            )
        if self.gate_scaling not in GATE_SCALINGS:
            raise ValueError(f"`gate_scaling` must be one of {GATE_SCALINGS}, got {self.gate_scaling!r}.")
        largest = self.num_experts if self.uses_gate and self.gate_scaling != "reference" else 1
        if not 1 <= self.top_k <= largest:
            raise ValueError(
                f"`top_k` must be in [1, {largest}] for {self.num_experts} experts with `routing` {self.routing!r} "
                f"and `gate_scaling` {self.gate_scaling!r}, got {self.top_k}. More than one expert per token needs a "
                'gate and a scaling other than "reference".'
            )
        if not 0 <= self.router_aux_loss_coef < float("inf"):
            raise ValueError(f"`router_aux_loss_coef` must be finite and >= 0, got {self.router_aux_loss_coef}.")

    def validate_layers(self) -> None:
        """Refuse layers that do not exist, and what would cut a route apart."""
        config: Any = self
        self.layers = self.layers  # checks the type of what came under the name of version 0.1, too
        layers = self.layers or []
        if layers != sorted(set(layers)) or any(not 0 <= layer < self.num_networks for layer in layers):
            raise ValueError(
                f"`layers` must name layers from 0 to {self.num_networks - 1}, ascending and each once, got {layers}."
            )
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ValueError("`is_decoder` and `add_cross_attention` must be False: a mixture is an encoder.")
        if config.chunk_size_feed_forward:
            raise ValueError(
                "`chunk_size_feed_forward` must be 0, because a route is that of a whole batch, got "
                f"{config.chunk_size_feed_forward}. Leave it out."
            )


@strict
class MoEBertConfig(MoEFields, StrictConfig, BertConfig):
    """Configuration of a BERT whose feed-forward networks are mixtures of experts.

    Takes all arguments of `BertConfig` and those of `MoEFields`.
    """

    model_type = "moebert"


_made: dict[type, type[PreTrainedConfig]] = {BertConfig: MoEBertConfig}  # by the dense configuration


def moe_config(dense: type[PreTrainedConfig]) -> Any:
    """Return the configuration of the mixtures of a family, which the first call makes.

    Args:
        dense: Configuration of transformers, of a family of encoders in the table.
    """
    if dense in _made:
        return _made[dense]
    body: dict[str, Any] = {
        "__doc__": f"Configuration of mixtures of the family {dense.model_type!r}: its arguments and `MoEFields`.",
        "__module__": __name__,
        "model_type": f"moe_{dense.model_type}",
        "undeclared": ARCHITECTURES[dense.model_type].undeclared,
    }
    if dense.model_type not in SHIPPED:
        body["package"] = f"{INSTALL}`hf_moebert.register_architecture({dense.model_type!r}, ...)`)"
    if not hasattr(dense(), "vocab_size"):  # images have no ids to look up
        body |= {"__annotations__": {"routing": str}, "routing": "gate-sentence"}
    cls: Any = strict(type(f"{PREFIX}{dense.__name__}", (MoEFields, StrictConfig, dense), body))
    globals()[cls.__name__] = _made[dense] = cls
    return cls


def why_not_experts(family: str) -> str:
    """Return why a family's networks are not cut into experts, as the end of a sentence; empty if they can be."""
    if family not in ARCHITECTURES:
        return "no row says where it keeps them"
    decoder = family in SHIPPED and family not in ENCODERS  # what a user registers may be an encoder
    return "its models are no encoders; mixtures of masks take decoders" if decoder else ""


def __getattr__(name: str) -> Any:
    """Make the configuration of a family when it is asked for by name, such as `MoERobertaConfig`."""
    dense: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if why_not_experts(getattr(dense, "model_type", "")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return moe_config(dense)


__all__ = ["MoEBertConfig"]
