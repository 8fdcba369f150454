"""The configuration of a MoEBERT."""

from typing import Any, Self

from transformers import PreTrainedConfig
from transformers.models.bert.configuration_bert import BertConfig

from .configuration_strict import StrictConfig, strict


HASH_ROUTINGS = ("hash-random", "hash-balanced")
GATE_ROUTINGS = ("gate-token", "gate-sentence")
GATE_SCALINGS = ("straight-through", "probability", "reference")


@strict
class MoEBertConfig(StrictConfig, BertConfig):
    """Configuration of a BERT whose feed-forward networks are mixtures of experts.

    Takes all arguments of `BertConfig`; `intermediate_size` is the width of the dense feed-forward network that the
    experts were cut from, and of the layers that stay dense.

    Args:
        num_experts: Experts per converted layer, 1 to 256.
        expert_size: Neurons per expert; at most `num_shared_neurons + (intermediate_size - num_shared_neurons) //
            num_experts`.
        num_shared_neurons: Most important neurons of the dense layer, copied into every expert. The copies are
            trained separately.
        routing: How a token finds its expert. `hash-random` (a random table of the vocabulary for each layer),
            `hash-balanced` (one table for all layers that gives each expert the same share of a corpus),
            `gate-token` or `gate-sentence` (a trained linear gate on the token, or on the mean of the sentence).
        top_k: Experts per token; more than one only with a gate.
        gate_scaling: How the gate's probability scales the output. `straight-through` (the chosen probabilities
            divided by their detached sum: they add up to 1, and carry a gradient; our own design), `probability` (each
            expert's output is multiplied by its probability; paper, eq. 2) or `reference` (the output after residual
            and LayerNorm is multiplied, as in the paper's code).
        router_aux_loss_coef: Weight of the load-balancing loss of the gates in the model's loss.
        layers: Layers that are converted, ascending from 0; `None` converts all.
        routing_seed: Seed of the hash tables.
        output_router_logits: Whether the gates' logits are returned.
        output_expert_load: Whether the number of real tokens that each expert processed is returned.

    Raises:
        ValueError: If a value has the wrong type or breaks a rule; the message names rule and remedy.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.
    """

    model_type = "moebert"
    keys_to_ignore_at_inference = ["router_logits", "expert_load", "aux_loss"]
    attribute_map = {"moe_layers": "layers"}  # as checkpoints of version 0.1 write it

    num_experts: int = 4
    expert_size: int = 768
    num_shared_neurons: int = 512
    routing: str = "hash-random"
    top_k: int = 1
    gate_scaling: str = "straight-through"
    router_aux_loss_coef: float | int = 0.0
    layers: list[int] | None = None
    routing_seed: int = 0
    output_router_logits: bool = False
    output_expert_load: bool = False

    @classmethod
    def from_dense(cls, config: PreTrainedConfig, **fields: Any) -> Self:
        """Take over everything a dense BERT's config says (head, labels, sizes) and add the experts.

        Args:
            config: Config of a model of BERT's architecture.
            **fields: Fields of this class.

        Raises:
            ValueError: If the config is not BERT's, or a field does not exist.
        """
        if config.model_type != "bert":
            raise ValueError(
                f'`model` must have BERT\'s architecture (`model_type` "bert"), got {config.model_type!r}. Other '
                "architectures are not supported yet."
            )
        return cls(**(cls.fields_of_dense(config) | fields))

    @property
    def converted_layers(self) -> list[int]:
        """The layers that hold experts, ascending."""
        return list(range(self.num_hidden_layers)) if self.layers is None else self.layers

    @property
    def uses_gate(self) -> bool:
        """True if routing is learned by gates, False if it is looked up in hash tables."""
        return self.routing in GATE_ROUTINGS

    def validate_experts(self) -> None:
        """Refuse sizes that no dense layer can be cut into."""
        if not 1 <= self.num_experts <= 256:
            raise ValueError(f"`num_experts` must be in [1, 256], got {self.num_experts}. The paper uses 4.")
        if not 0 <= self.num_shared_neurons <= self.expert_size or self.expert_size < 1:
            raise ValueError(
                f"`num_shared_neurons` must be in [0, expert_size], got {self.num_shared_neurons} with "
                f"`expert_size` {self.expert_size}. Lower it, or make the experts larger."
            )
        own = max(self.intermediate_size - self.num_shared_neurons, 0) // self.num_experts
        largest = min(self.num_shared_neurons + own, self.intermediate_size)
        if self.expert_size > largest:
            raise ValueError(
                f"`expert_size` must be at most {largest} for {self.num_experts} experts that share "
                f"{self.num_shared_neurons} of {self.intermediate_size} neurons, got {self.expert_size}. Use "
                f"{largest}, or share more neurons."
            )

    def validate_routing(self) -> None:
        """Refuse routings that do not exist or contradict the other fields."""
        if self.routing not in HASH_ROUTINGS + GATE_ROUTINGS:
            raise ValueError(f"`routing` must be one of {HASH_ROUTINGS + GATE_ROUTINGS}, got {self.routing!r}.")
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
        """Refuse layers that do not exist, and decoders."""
        self.layers = self.layers  # checks the type of what came under the name of version 0.1, too
        layers = self.layers or []
        if layers != sorted(set(layers)) or any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`layers` must name layers from 0 to {self.num_hidden_layers - 1}, ascending and each once, got "
                f"{layers}."
            )
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("`is_decoder` and `add_cross_attention` must be False: MoEBERT is an encoder.")


__all__ = ["MoEBertConfig"]
