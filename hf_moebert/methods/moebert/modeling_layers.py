"""The routing that chooses among experts, and the layers that the experts live in."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertAttention, BertLayer

from .configuration_moebert import MoEBertConfig
from .functional import balanced_table, choose_experts, masked_mean, random_table, sentence_means
from .functional_routing import expert_load
from .modeling_experts import Dispatch, MoEBertExperts, plan_dispatch, should_slice


# Expert of each token `(tokens,)` where a table names it, and the tokens sorted by it
Route = tuple[Tensor | None, Dispatch | None]


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
        """Look up the experts of all tokens in every converted layer, and sort the tokens where slices will be run."""
        index = self.table[:, input_ids.flatten()].long()  # (layers, tokens)
        plans: list[Any] = [None] * len(index)
        if self.config._experts_implementation == "sorted_mm" and should_slice(input_ids):
            plans = plan_dispatch(index, self.config.num_experts)
        return list(zip(index, plans, strict=True))


class MoEBertGate(nn.Linear):
    """A linear gate whose logits are computed in float32, whatever the model's dtype or autocast."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Score the experts, `(..., experts)`."""
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():  # entering autocast takes time
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
            hash_route: What the hash router returns; `(None, None)` with a gate.
            lengths: Tokens of each sentence, where the batch is one row of them without padding.

        Returns:
            Output of the block, the gate's logits, and the experts of each token, `(batch * seq, top_k)`.

        Source: eqs. 2 and 3.
        """
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

        extra = {"dispatch": dispatch} if dispatch else {}  # implementations of transformers do not know it
        tokens = hidden_states.flatten(0, 1)  # (tokens, hidden)
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

        if self.by_sentence:  # every token goes with its sentence
            index, weights = self.spread(index, hidden_states, lengths), self.spread(weights, hidden_states, lengths)
        return logits, index.flatten(0, -2), weights.flatten(0, -2)

    def spread(self, values: Tensor, hidden_states: Tensor, lengths: list[int] | None) -> Tensor:
        """Repeat what each sentence has for its tokens: `(sentences, top_k)` to `([batch,] tokens, top_k)`."""
        if lengths is not None:
            return values.repeat_interleave(torch.tensor(lengths), dim=0)
        return values.unsqueeze(1).expand(-1, hidden_states.shape[1], -1)


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

        `sentences` divides one row of tokens without padding; whoever gives it has attention that knows it.
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
        converted = set(config.converted_layers)
        self.layer = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            layer_class = MoEBertLayer if index in converted else BertLayer
            self.layer.append(layer_class(config, layer_idx=index))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor,
        hash_routes: list[Route],
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last hidden states, and the gates' logits of each converted layer."""
        if hidden_states.shape[0] == 0:  # the attention of transformers cannot take an empty batch
            return hidden_states, []
        router_logits, routes = [], iter(hash_routes)
        for layer in self.layer:
            if isinstance(layer, MoEBertLayer):
                hidden_states, logits, _ = layer(hidden_states, attention_mask, token_mask, next(routes), **kwargs)
                router_logits.append(logits)
            else:
                hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states, router_logits
