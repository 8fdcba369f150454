"""The equations of a linear-chain CRF: sums over all tag sequences, some of them forbidden.

A sequence `y` scores `start[y_1] + sum_t emissions_t[y_t] + sum_t transitions[y_t, y_(t+1)] + end[y_T]`; what is
forbidden scores -inf, and is never reached. The words of a row come first (`pack_words`), time is the first dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional_passes import Scores, pass_forwards, smooth_words, smooth_words_exactly


def sequence_score(emissions: Tensor, tags: Tensor, lengths: Tensor, scores: Scores) -> Tensor:
    """Score one tag sequence per row.

    Args:
        emissions: Shape `(words, batch, tags)`.
        tags: Shape `(words, batch)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Scores of the chain.

    Returns:
        The scores, 0 for a row without words, -inf for a forbidden sequence. Shape `(batch,)`.
    """
    if not len(emissions):
        return emissions.sum((0, 2))  # (batch,): zeros that a gradient can pass
    real = torch.arange(len(tags), device=tags.device)[:, None] < lengths  # (words, batch)
    steps = emissions.gather(2, tags[..., None])[..., 0]  # (words, batch)
    moves = scores.transitions[tags[:-1], tags[1:]]  # (words - 1, batch)
    last = tags.gather(0, (lengths - 1).clamp(min=0)[None])[0]  # (batch,)
    total = torch.where(real, steps, 0).sum(0) + torch.where(real[1:], moves, 0).sum(0)  # (batch,)
    return torch.where(lengths > 0, total + scores.start[tags[0]] + scores.end[last], 0)


def log_partition(emissions: Tensor, lengths: Tensor, scores: Scores) -> Tensor:
    """Compute the logarithm of the sum of the exponentiated scores of all tag sequences.

    Its gradient with respect to the emissions is the marginals. It can be differentiated once.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Scores of the chain.

    Returns:
        One logarithm per row, 0 for a row without words, -inf where every sequence is forbidden. Shape `(batch,)`.
    """
    if not emissions.numel():
        return emissions.sum((0, 2))  # (batch,): zeros that a gradient can pass
    return LogPartition.apply(emissions, lengths, *scores)


class LogPartition(torch.autograd.Function):
    """The log partition with a hand-written gradient: a forward and a backward pass, one matrix product per word."""

    @staticmethod
    def forward(
        ctx: Any, emissions: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """Return the logarithm for each row; see `log_partition`."""
        with torch.autocast(emissions.device.type, enabled=False):
            result, at_end, filtered, ctx.exact = pass_forwards(emissions, lengths, Scores(transitions, start, end))
        ctx.save_for_backward(filtered.share, filtered.inflow, at_end, lengths, transitions)
        return torch.where(lengths > 0, result, 0).to(emissions.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the expected number of times that each score is used, weighted by the gradient of its row."""
        share, inflow, at_end, lengths, transitions = ctx.saved_tensors
        counts = (gradient != 0) & (lengths > 0)  # (batch,): other rows may hold NaN, and 0 * NaN is NaN
        weighted = torch.where(counts[:, None], at_end * gradient[:, None], 0)  # (batch, tags)
        with torch.autocast(share.device.type, enabled=False):
            smooth = smooth_words_exactly if ctx.exact else smooth_words
            expected, moves = smooth(share, inflow, weighted, lengths, transitions.to(share.dtype))
        found = (expected, moves, expected[0].sum(0), weighted.sum(0))
        first, *rest = (part.to(transitions.dtype) for part in found)
        return first, None, *rest


@torch.no_grad()
def marginals(emissions: Tensor, lengths: Tensor, scores: Scores) -> Tensor:
    """Compute the probability of each tag of each word, over all tag sequences.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Scores of the chain.

    Returns:
        Probabilities that add up to 1; zeros where a row has no more words. Shape `(words, batch, tags)`.
    """
    if not emissions.numel():
        return torch.zeros_like(emissions)
    _, at_end, filtered, exact = pass_forwards(emissions, lengths, scores)
    smooth = smooth_words_exactly if exact else smooth_words
    at_end = torch.where(lengths[:, None] > 0, at_end, 0)  # (batch, tags)
    transitions = scores.transitions.to(at_end.dtype)
    return smooth(filtered.share, filtered.inflow, at_end, lengths, transitions)[0].to(emissions.dtype)
