"""The experts, the routing that chooses among them, and the layers they live in."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    grouped_mm_experts_forward,
    use_experts_implementation,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertAttention, BertLayer

from .configuration_moebert import MoEBertConfig
from .functional import (
    balanced_table,
    choose_experts,
    expert_load,
    masked_mean,
    random_table,
    sentence_means,
    sort_by_expert,
    weigh_experts,
)
from .modeling_export import export_experts_forward, is_exporting


# Slots in order of their expert, the inverse permutation, slots per expert
Dispatch = tuple[Tensor, Tensor, list[int]]
# Expert of each token `(tokens,)` where a table says it, and the tokens sorted by it
Route = tuple[Tensor | None, Dispatch | None]


@use_experts_implementation(has_gate=False, has_bias=True)
class MoEBertExperts(nn.Module):
    """The experts of one layer: up-projection, activation, down-projection, stacked along the first dimension."""

    prefers_slices = False  # whether `sorted_mm` multiplies slices on any device

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.active_fraction = config.top_k / config.num_experts  # read by `measure_footprint`
        experts, size, hidden = config.num_experts, config.expert_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(experts, size, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor | None,
        dispatch: Dispatch | None = None,
    ) -> Tensor:
        """Multiply each expert with its slice of the sorted tokens: the "eager" implementation.

        Args:
            hidden_states: Shape `(tokens, hidden)`.
            top_k_index: Shape `(tokens, top_k)`.
            top_k_weights: Shape `(tokens, top_k)`; `None` where one expert of weight 1 serves each token.
            dispatch: The sorted slots, where they are known beforehand.

        Returns:
            Weighted sum of the chosen experts' outputs. Shape `(tokens, hidden)`.
        """
        return self.run_slices(hidden_states, top_k_index, top_k_weights, dispatch)

    def run_slices(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None, dispatch: Dispatch | None
    ) -> Tensor:
        """See `forward`, which the host replaces with the chosen implementation."""
        tokens, top_k = top_k_index.shape
        if self.num_experts == 1:
            return self.run_sorted(hidden_states, [tokens])
        counts = dispatch[2] if dispatch else top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
        if tokens * top_k in counts:  # one expert for all tokens: nothing to sort
            output = self.run_sorted(hidden_states, counts)
        else:
            order, inverse, _ = dispatch or plan_dispatch(top_k_index.reshape(1, -1), self.num_experts)[0]
            slots = hidden_states.index_select(0, order if top_k == 1 else order // top_k)
            output = self.run_sorted(slots, counts).index_select(0, inverse)  # (tokens * top_k, hidden)
        return output if top_k_weights is None else weigh_experts(output, top_k_weights).to(hidden_states.dtype)

    def run_sorted(self, slots: Tensor, counts: list[int]) -> Tensor:
        """Apply each expert to its slice of the sorted slots, of `counts` rows, `(slots, hidden)`."""
        slots = self.act_fn(multiply_slices(slots, counts, self.up_proj, self.up_proj_bias))
        return multiply_slices(slots, counts, self.down_proj, self.down_proj_bias)


def multiply_slices(slots: Tensor, counts: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    """Apply each expert's linear map to its slice of the sorted slots, `(slots, in)` to `(slots, out)`."""
    if len(slots) in counts:  # one slice is all
        expert = counts.index(len(slots))
        return F.linear(slots, weight[expert], bias[expert])
    # `unbind` once: the backward of an index into a stack zero-fills the whole stack for every expert
    experts = zip(slots.split(counts), weight.unbind(0), bias.unbind(0), strict=True)
    return torch.cat([F.linear(*expert) for expert in experts])


def plan_dispatch(expert_index: Tensor, num_experts: int) -> list[Dispatch]:
    """Sort the slots of all layers at once, `(layers, slots)`."""
    order, inverse, counts = sort_by_expert(expert_index, num_experts)
    return list(zip(order, inverse, counts.tolist(), strict=True))


def runs_slices(hidden_states: Tensor, everywhere: bool = False) -> bool:
    """Whether `sorted_mm` multiplies slices here by choice: inference on a CPU, or on any device."""
    inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_exporting())
    return inference and (everywhere or hidden_states.device.type == "cpu")


def sorted_mm_experts_forward(
    self: MoEBertExperts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    dispatch: Dispatch | None = None,
) -> Tensor:
    """Run the experts the fastest way that is known for the device: the default implementation.

    CPU inference multiplies sorted slices, and what is exported there collects each expert's tokens. Elsewhere the
    host's `grouped_mm` does the work, and slices again where it cannot: a single expert, float64, rows that are no
    multiple of 16 bytes, and autocast, which it ignores.
    """
    if is_exporting() and hidden_states.device.type == "cpu":
        return export_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if runs_slices(hidden_states, self.prefers_slices):
        return self.run_slices(hidden_states, top_k_index, top_k_weights, dispatch)
    dtype, sizes = self.up_proj.dtype, self.up_proj.shape[1:]
    grouped = dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in sizes)
    if not torch.compiler.is_compiling():
        grouped = grouped and not torch.is_autocast_enabled(hidden_states.device.type)
    if grouped and self.num_experts > 1:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return self.run_slices(hidden_states, top_k_index, top_k_weights, dispatch)


ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)


class MoEBertHashRouter(nn.Module):
    """The expert of every token id in every converted layer, as tables that travel with the weights."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        self.config = config
        shape = (len(config.converted_layers), config.vocab_size)
        self.table: Tensor = nn.Buffer(torch.empty(shape, dtype=torch.uint8))  # (layers, vocab)

    def draw_table(self, vocab_size: int, token_counts: Tensor | None = None) -> Tensor:
        """Make the tables of a vocabulary from the seed, and from a corpus for `hash-balanced`, `(layers, vocab)`."""
        layers, experts = self.table.shape[0], self.config.num_experts
        generator = torch.Generator("cpu").manual_seed(self.config.routing_seed)
        if self.config.routing == "hash-random":
            return torch.stack([random_table(vocab_size, experts, generator=generator) for _ in range(layers)])
        counts = torch.zeros(vocab_size, dtype=torch.long, device="cpu") if token_counts is None else token_counts
        return balanced_table(counts, experts, generator=generator).repeat(layers, 1)

    def resize(self, vocab_size: int) -> None:
        """Follow the vocabulary: known ids keep their experts, new ones get random experts."""
        known = self.table[:, :vocab_size]
        drawn = self.draw_table(vocab_size)[:, known.shape[1] :].to(known.device)
        self.table = torch.cat([known, drawn], dim=1)

    def forward(self, input_ids: Tensor) -> list[Route]:
        """Look up the experts of all tokens in every converted layer, and sort them where slices will be run."""
        index = self.table[:, input_ids.flatten()].long()  # (layers, tokens)
        sorts = self.config._experts_implementation == "sorted_mm" and runs_slices(input_ids)
        plan = plan_dispatch(index, self.config.num_experts) if sorts else [None] * len(index)
        return list(zip(index, plan, strict=True))


class MoEBertGate(nn.Linear):
    """A linear gate whose logits are computed in float32, whatever the model's dtype or autocast."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Score the experts, `(..., experts)`."""
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():  # a context takes its time
            return F.linear(hidden_states.float(), self.weight.float())


class MoEBertBlock(nn.Module):
    """The mixture of experts in the place of a feed-forward network, with its residual and LayerNorm."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        self.top_k, self.scaling = config.top_k, config.gate_scaling
        self.by_sentence = config.routing == "gate-sentence"
        self.gate = MoEBertGate(config) if config.uses_gate else None
        self.experts = MoEBertExperts(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor, hash_route: Route, lengths: list[int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Route, run the experts, add the residual and normalise.

        Args:
            hidden_states: Output of the attention. Shape `(batch, seq, hidden)`.
            token_mask: True at real tokens. Shape `(batch, seq)`.
            hash_route: What the hash router says; `(None, None)` with a gate.
            lengths: Tokens of each sentence, where the batch is one row of them without padding.

        Returns:
            Output of the block, the gate's logits, and the experts of each token, `(batch * seq, top_k)`.

        Source: eqs. 2 and 3.
        """
        tokens = hidden_states.flatten(0, 1)  # (tokens, hidden)
        logits, scale = None, None
        expert_index, dispatch = hash_route
        if expert_index is not None:
            index = expert_index.unsqueeze(-1)  # (tokens, 1)
            weights = None if dispatch else torch.ones_like(index, dtype=hidden_states.dtype)
        else:
            logits, index, weights = self.route(hidden_states, token_mask, lengths)
            weights = weights.to(hidden_states.dtype)
            if self.scaling == "reference":
                weights, scale = torch.ones_like(weights), weights
        extra = {"dispatch": dispatch} if dispatch else {}  # unknown to the host's implementations
        output = self.experts(tokens, index, weights, **extra).view_as(hidden_states)
        output = self.LayerNorm(self.dropout(output) + hidden_states)
        if scale is not None:
            output = output * scale.view(*output.shape[:2], 1).to(output.dtype)
        return output, logits, index

    def route(
        self, hidden_states: Tensor, token_mask: Tensor, lengths: list[int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ask the gate: logits `(batch, [seq,] experts)`, index and weights of each token `(batch * seq, top_k)`."""
        assert self.gate is not None  # a hash router would have given the route
        logits = self.gate(hidden_states)
        if self.by_sentence:  # a gate is linear: the mean of its logits is its logits of the mean, and takes less time
            logits = masked_mean(logits, token_mask) if lengths is None else sentence_means(logits, lengths)
        scaling = "straight-through" if self.scaling == "straight-through" else "probability"
        index, weights = choose_experts(logits, self.top_k, scaling)
        if self.by_sentence and lengths is not None:  # every token of a sentence goes with it
            index, weights = (x.repeat_interleave(torch.tensor(lengths), dim=0) for x in (index, weights))
            return logits, index, weights
        if self.by_sentence:
            index, weights = (x.unsqueeze(1).expand(-1, hidden_states.shape[1], -1) for x in (index, weights))
        return logits, index.flatten(0, 1), weights.flatten(0, 1)


class MoEBertLayer(GradientCheckpointingLayer):
    """A BERT layer with a mixture of experts."""

    def __init__(self, config: MoEBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.attention = BertAttention(config, layer_idx=layer_idx)
        self.moe = MoEBertBlock(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor,
        hash_route: Route,
        output_expert_load: bool = False,
        sentences: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the hidden states, the gate's logits, and the experts' load if asked for.

        `sentences` says how one row of tokens without padding divides; whoever gives it has attention that knows it.
        """
        packed = {} if sentences is None else {"sentences": sentences}
        hidden_states, _ = self.attention(hidden_states, attention_mask, **packed, **kwargs)
        lengths = None if sentences is None else sentences.lengths
        hidden_states, logits, index = self.moe(hidden_states, token_mask, hash_route, lengths)
        load = expert_load(index, token_mask.flatten(), self.num_experts) if output_expert_load else None
        return hidden_states, logits, load


class MoEBertEncoder(nn.Module):
    """The layers, dense and converted."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        kinds = dict.fromkeys(config.converted_layers, MoEBertLayer)
        self.layer = nn.ModuleList(
            [kinds.get(i, BertLayer)(config, layer_idx=i) for i in range(config.num_hidden_layers)]
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor,
        hash_routes: list[Route],
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last hidden states, and the gates' logits of each converted layer."""
        router_logits, routes = [], iter(hash_routes)
        for layer in self.layer if hidden_states.shape[0] else []:  # the host's attention cannot take an empty batch
            if isinstance(layer, MoEBertLayer):
                hidden_states, logits, _ = layer(hidden_states, attention_mask, token_mask, next(routes), **kwargs)
                router_logits.append(logits)
            else:
                hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states, router_logits
