"""The routing that chooses among experts, and the networks that the experts live in."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_moebert import MoEFields
from .functional import balanced_table, choose_experts, masked_mean, random_table, sentence_means
from .functional_routing import real_tokens
from .modeling_experts import Dispatch, MoEBertExperts, plan_dispatch, should_slice
from .modeling_routing import Routing, record, recording
from .modeling_surgery import FeedForward


class Route(NamedTuple):
    """The batch that runs through a model, as far as its networks need to know it.

    Attributes:
        token_mask: True at real tokens, `(batch, seq)`; `None` if all are.
        lengths: Tokens of each sentence, where the batch is one row of them without padding.
        tables: Of each network, the expert of each token `(tokens,)` and the tokens sorted by it; `None` with gates.
    """

    token_mask: Tensor | None
    lengths: list[int] | None
    tables: list[tuple[Tensor, Dispatch | None]] | None


class _Thread(threading.local):
    """State that the layers between a model and its experts do not pass on, of the forward pass of this thread."""

    route: Route | None = None
    scale: Tensor | None = None  # of the last network, for what follows it in its layer


_thread = _Thread()


@contextmanager
def routing(route: Route) -> Iterator[None]:
    """Run what is inside with a route."""
    outer, _thread.route = _thread.route, route
    try:
        yield
    finally:
        _thread.route = outer


def keep_route(checkpoint: Callable) -> Callable:
    """Wrap a function that checkpoints activations, so that a layer that runs again takes the route it took at first.

    What its networks recorded becomes an output of the layer, since with reentrant checkpointing only outputs have
    gradients.
    """

    @functools.wraps(checkpoint)
    def wrapped(function: Callable, *args: Any, **kwargs: Any) -> Any:
        route, records = _thread.route, []  # type: ignore[var-annotated]  # of this call
        if route is None:
            return checkpoint(function, *args, **kwargs)

        def run(*inputs: Any) -> tuple[Any, ...]:
            with routing(route), recording() as inner:
                output = function(*inputs)
            records[:] = inner
            single = not isinstance(output, tuple)
            return (single, *((output,) if single else output), *(decision.logits for decision in inner))

        single, *outputs = checkpoint(run, *args, **kwargs)
        first = len(outputs) - len(records)
        for decision, logits in zip(records, outputs[first:], strict=True):
            record(decision._replace(logits=logits))
        return outputs[0] if single else tuple(outputs[:first])

    return wrapped


def scale_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Multiply the end of a layer by the probability of its expert, as the paper's code does: a forward hook."""
    scale, _thread.scale = _thread.scale, None
    return output if scale is None else output * scale.view(*output.shape[:2], 1).to(output.dtype)


class MoEBertHashRouter(nn.Module):
    """The expert of every token id in every converted layer, as tables that travel with the weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        shape = (len(self.config.converted_layers), self.config.vocab_size)
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

    def forward(self, input_ids: Tensor) -> list[tuple[Tensor, Dispatch | None]]:
        """Look up the experts of all tokens in every converted layer, and sort the tokens where slices will be run."""
        index = self.table[:, input_ids.flatten()].long()  # (layers, tokens)
        plans: list[Any] = [None] * len(index)
        if self.config._experts_implementation == "sorted_mm" and should_slice(input_ids):
            plans = plan_dispatch(index, self.config.num_experts)
        return list(zip(index, plans, strict=True))


class MoEBertGate(nn.Linear):
    """A linear gate whose logits are computed in float32, whatever the model's dtype or autocast."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Score the experts, `(..., experts)`."""
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():  # entering autocast takes time
            return F.linear(hidden_states.float(), self.weight.float())


class MoEBertFeedForward(nn.Module):
    """A mixture of experts in the place of a feed-forward network; residual and normalisation stay the layer's own.

    Args:
        dense: The network whose place it takes.
        config: Configuration of the model.
        index: Its number among the mixtures of the model.
    """

    def __init__(self, dense: FeedForward, config: MoEFields, index: int) -> None:
        super().__init__()
        self.index, self.top_k, self.scaling = index, config.top_k, config.gate_scaling
        self.by_sentence = config.routing == "gate-sentence"
        self.experts = MoEBertExperts(dense, config)
        hidden = self.experts.down_proj.shape[1]
        self.gate = MoEBertGate(hidden, config.num_experts, bias=False) if config.uses_gate else None
        self.dropout = dense.part("outer_dropout") or nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route, and run the experts.

        Args:
            hidden_states: What the dense network reads. Shape `(batch, seq, hidden)`.

        Returns:
            Shape `(batch, seq, hidden)`.

        Raises:
            ValueError: If it runs outside of its model, which knows the route, or gets a part of the tokens.

        Source: eqs. 2 and 3.
        """
        route = _thread.route
        if route is None:
            raise ValueError("A layer of experts must run within its model, which knows the tokens. Call the model.")
        dispatch = None
        if route.tables is not None:
            expert_index, dispatch = route.tables[self.index]
            if expert_index.shape[0] != hidden_states.shape[0] * hidden_states.shape[1]:
                raise ValueError(
                    f"A layer of experts must get all {expert_index.shape[0]} tokens of its batch at once, got "
                    f"{tuple(hidden_states.shape[:2])}. Set `chunk_size_feed_forward` to 0."
                )
            logits, index = None, expert_index.unsqueeze(-1)  # (tokens, 1)
            weights = None if dispatch else torch.ones_like(index, dtype=hidden_states.dtype)
        else:
            logits, index, weights = self.route(hidden_states, route)
            weights = weights.to(hidden_states.dtype)
            if self.scaling == "reference":
                weights, _thread.scale = torch.ones_like(weights), weights
        record(Routing(self, logits, index))
        tokens = hidden_states.flatten(0, 1)  # (tokens, hidden)
        return self.dropout(self.experts(tokens, index, weights, dispatch).view_as(hidden_states))

    def route(self, hidden_states: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
        """Ask the gate: logits `(batch, [seq,] experts)`, index and weights of each token `(batch * seq, top_k)`."""
        assert self.gate is not None  # a hash router would have given the experts
        logits, lengths = self.gate(hidden_states), route.lengths
        if self.by_sentence and lengths is not None:
            logits = sentence_means(logits, lengths)
        elif (
            self.by_sentence
        ):  # a gate is linear: the mean of its logits is its logits of the mean, and takes less time
            mask = real_tokens(None, logits.shape[:2]) if route.token_mask is None else route.token_mask
            logits = masked_mean(logits, mask.to(logits.device))
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
