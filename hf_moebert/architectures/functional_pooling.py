"""How the hidden states of a text become one vector, on tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .embedding_form import POOLINGS


def pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Turn the hidden states of each text into one vector, of its real tokens alone.

    Args:
        states: Last hidden states. Shape `(batch, seq, hidden)`.
        mask: True, or 1, at real tokens, on any side of the padding; without it all are. Shape `(batch, seq)`.
        pooling: `mean` of the tokens, `cls` for the first one, `last` for the last one.

    Returns:
        Vectors in at least float32; zeros for a text without tokens. Shape `(batch, hidden)`.

    Raises:
        ValueError: If there is no such pooling.

    Source: the modes of the same names of sentence-transformers, https://arxiv.org/abs/1908.10084, section 3.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}. Most embedders use mean.")
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    mask = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask.to(states.device, torch.bool)
    states = states.masked_fill(~mask.unsqueeze(-1), 0)  # whatever stands in the padding, even NaN
    if pooling == "mean":
        return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    # `argmax` finds the first of equal ones
    place = mask.int().argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask.int().flip(1).argmax(1)  # (batch,)
    return states[torch.arange(len(states), device=states.device), place]


def unit_length(vectors: Tensor) -> Tensor:
    """Scale vectors to the length 1, so that their products are cosines; zeros stay. Shape `(..., hidden)`."""
    return F.normalize(vectors, dim=-1)
