"""Skip padding: the real tokens of a batch run through an encoder as one row, and go back to their places after it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


# Outputs that hold a value for each token, also for padding
PER_TOKEN_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
# Arguments that let a token attend to more than its sentence, or to less
CROSS_SENTENCE_ARGUMENTS = (
    "cache",
    "past_key_values",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "is_causal",
)


@dataclass(frozen=True)
class Sentences:
    """The places that the tokens of one row came from.

    Attributes:
        index: Place of each real token in the flat batch. Shape `(tokens,)`.
        lengths: Real tokens of each sentence, one for each row of the batch.
        shape: `(batch, seq)`.
    """

    index: Tensor
    lengths: list[int]
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Sentences":
        """Read the places from a mask that is True at real tokens, `(batch, seq)`."""
        return cls(mask.flatten().nonzero().squeeze(1), mask.sum(dim=1).tolist(), (mask.shape[0], mask.shape[1]))

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens, `(batch, seq, ...)` to `(1, tokens, ...)`."""
        return x.expand(*self.shape, *x.shape[2:]).flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """Put the tokens back, `(1, tokens, hidden)` to `(batch, seq, hidden)`; padding is zero."""
        batch, seq = self.shape
        padded = x.new_zeros(batch * seq, x.shape[-1])
        return padded.index_copy_(0, self.index, x.squeeze(0)).view(batch, seq, -1)


def attend(qkv: Tensor, mask: Tensor | None, sentences: Sentences | None, *, scale: float) -> Tensor:
    """Let tokens attend to those of their own sentence.

    One call for each run of sentences of the same length is several times faster than one call with a block mask.

    Args:
        qkv: Queries, keys and values. Shape `(batch, seq, 3, heads, head_size)`.
        mask: Mask of torch's attention, or None.
        sentences: If given, the batch is one row of sentences, and there is no mask.
        scale: Factor of the products of queries and keys.

    Returns:
        Shape `(batch, seq, heads * head_size)`.
    """
    if sentences is None:
        return _attend(qkv, mask, scale)
    runs = [(length, len(list(run))) for length, run in groupby(n for n in sentences.lengths if n)]
    parts = qkv.squeeze(0).split([length * count for length, count in runs])  # (tokens of a run, 3, heads, head_size)
    parts = [part.unflatten(0, (count, length)) for part, (length, count) in zip(parts, runs, strict=True)]
    return torch.cat([_attend(part, None, scale).flatten(0, 1) for part in parts]).unsqueeze(0)


def _attend(qkv: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, seq, head_size) each
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return context.transpose(1, 2).flatten(2)


class Unpadding:
    """Hooks that pack the inputs of a base model, and unpack the output of its encoder.

    The places of the tokens travel with the call, as the argument `sentences`: nothing is kept on the model, so
    threads may share it.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.handles: list[RemovableHandle] = [
            base.register_forward_pre_hook(self.pack, with_kwargs=True),
            encoder_of(base).register_forward_hook(self.unpack, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def pack(self, base: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Replace a padded batch by one row of its real tokens; anything else passes as it is."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or base.training:
            return None
        kind: Any = type(base)
        given = signature_of(kind).bind(base, *args, **kwargs).arguments
        given.pop("self")
        given |= given.pop("kwargs", {})
        mask, tokens = given.get("attention_mask"), given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if mask is None or tokens is None or mask.shape != tokens.shape[:2] or not self.can_unpad(given) or mask.all():
            return None
        mask = mask.to(torch.bool)
        if not torch.equal(mask[:, 0], mask.any(dim=1)):
            return None  # heads read the first place of each row, which would here be padding
        sentences = Sentences.from_mask(mask)
        if not len(sentences.index):
            return None
        given["position_ids"] = self.position_ids(given)
        for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
            if given.get(name) is not None:
                given[name] = sentences.pack(given[name])
        return (), given | {"attention_mask": None, "sentences": sentences}

    def can_unpad(self, given: dict[str, Any]) -> bool:
        """Check whether this call stays within sentences, and records nothing for each token."""
        config = self.base.config
        if any(given.get(name) or getattr(config, name, False) for name in PER_TOKEN_OUTPUTS):
            return False
        if (
            any(given.get(name) is not None for name in CROSS_SENTENCE_ARGUMENTS)
            or given["attention_mask"].device.type != "cpu"
        ):
            return False
        counts_ids = hasattr(self.base.embeddings, "create_position_ids_from_input_ids")  # RoBERTa skips padding
        if config._attn_implementation != "sdpa" or (counts_ids and given.get("input_ids") is None):
            return False
        return all(
            has_class_forward(layer) and has_class_forward(layer.attention) for layer in encoder_of(self.base).layer
        )

    def position_ids(self, given: dict[str, Any]) -> Tensor:
        """Return the position of every token of the padded batch, `(batch or 1, seq)`."""
        if given.get("position_ids") is not None:
            return given["position_ids"]
        embeddings, ids = self.base.embeddings, given.get("input_ids")
        if ids is not None and hasattr(embeddings, "create_position_ids_from_input_ids"):
            return embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        mask = given["attention_mask"]
        limit = self.base.config.max_position_embeddings
        if mask.shape[1] > limit:
            raise ValueError(f"Sequences must have 1 to {limit} tokens, got {mask.shape[1]}. Truncate longer ones.")
        return torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)

    def unpack(self, encoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Put the last hidden states back into the batch."""
        sentences = kwargs.get("sentences")
        if sentences is None:
            return None
        if isinstance(output, tuple):
            return sentences.unpack(output[0]), *output[1:]
        output.last_hidden_state = sentences.unpack(output.last_hidden_state)
        return output


def encoder_of(base: Any) -> Any:
    """Return the stack of layers of a base model, or None."""
    return getattr(base, "encoder", None) or getattr(base, "transformer", None)


@cache
def signature_of(kind: type[PreTrainedModel]) -> inspect.Signature:
    """Return the signature of a class's `forward`, `self` included."""
    return inspect.signature(kind.forward)


def unpadding_unsupported_reason(base: PreTrainedModel, is_known_attention: Callable[[Any], bool]) -> str | None:
    """Return why a base model cannot run on packed tokens, or None where it can."""
    layers = getattr(encoder_of(base), "layer", [])
    if not layers or not all(is_known_attention(getattr(layer, "attention", None)) for layer in layers):
        return f"the attention of {type(base).__name__} is not known to keep sentences apart"
    if base.config._attn_implementation != "sdpa":
        return f"attention is {base.config._attn_implementation!r}, not 'sdpa'"
    if not all(
        has_class_forward(layer) and has_class_forward(layer.attention) and accepts_sentences(layer)
        for layer in layers
    ):
        return "the layers' forward is not the one known here"
    return None


def has_class_forward(module: nn.Module) -> bool:
    """Check whether a module has the `forward` of its class; accelerate, for one, gives single modules another."""
    return "forward" not in module.__dict__


def accepts_sentences(layer: nn.Module) -> bool:
    """Check whether a layer treats tokens one by one, as those of transformers do, or takes `sentences`."""
    if type(layer).__module__.startswith("transformers.models."):
        return True
    return "sentences" in inspect.signature(layer.forward).parameters
