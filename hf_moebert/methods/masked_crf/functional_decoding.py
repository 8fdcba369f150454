"""Decoding: the tag sequences with the highest scores, none of which contains a move that scores -inf."""

import torch
from torch import Tensor

from .functional_numpy import EMISSION_LIMIT, viterbi as numpy_viterbi
from .functional_passes import Scores, at_last_word


MAX_NUMPY_SCORES = 2048  # batch * tags^2 up to which numpy is faster than torch


def make_finite(emissions: Tensor) -> Tensor:
    """Clamp emissions to a range in which their sums stay finite; NaN becomes the lowest value.

    Args:
        emissions: Any shape.

    Returns:
        The same shape, in float32, or in float64 if they were.
    """
    raised = emissions.to(torch.promote_types(emissions.dtype, torch.float32))
    return raised.nan_to_num(nan=-EMISSION_LIMIT).clamp(-EMISSION_LIMIT, EMISSION_LIMIT)


@torch.no_grad()
def viterbi(emissions: Tensor, lengths: Tensor, scores: Scores) -> Tensor:
    """Find the best tag sequence of each row; of equal ones, that with the lowest tags at its end.

    Args:
        emissions: Finite, or -inf at tags that a word must not have. Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Scores of the chain.

    Returns:
        Tags; undefined where a row has no more words, or where each of its sequences is forbidden.
        Shape `(words, batch)`, int64.
    """
    words, batch, tags = emissions.shape
    if not words or not batch:
        return lengths.new_zeros(words, batch)
    relative = emissions - emissions.amax(2, keepdim=True).clamp(min=-EMISSION_LIMIT)
    if emissions.device.type == "cpu" and batch * tags * tags <= MAX_NUMPY_SCORES:
        found = numpy_viterbi(
            relative.numpy(),
            lengths.numpy(),
            scores.transitions.numpy(),
            start=scores.start.numpy(),
            end=scores.end.numpy(),
        )
        return torch.from_numpy(found)
    into = scores.transitions.T.contiguous()  # (tags, tags): next, previous
    best = torch.empty_like(relative)  # (words, batch, tags): of the paths that end in each tag
    steps, emission = best.unbind(), relative.unbind()
    torch.add(emission[0], scores.start, out=steps[0])
    for word in range(1, words):
        reach = steps[word - 1][:, None, :] + into  # (batch, tags, tags)
        torch.amax(reach, 2, out=steps[word]).add_(emission[word])
    return _follow_back(best, into, lengths, scores.end)


def _follow_back(best: Tensor, into: Tensor, lengths: Tensor, end: Tensor) -> Tensor:
    """Trace the best path of each row from its last word to its first."""
    last = (at_last_word(best, lengths) + end).argmax(1)  # (batch,)
    ends = torch.arange(1, len(best) + 1, device=lengths.device)[:, None] == lengths  # (words, batch)
    path = [last]
    for step, is_end in zip(reversed(best.unbind()[:-1]), reversed(ends.unbind()[:-1]), strict=True):
        before = (step + into[path[-1]]).argmax(1)  # (batch,)
        path.append(torch.where(is_end, last, before))
    return torch.stack(path[::-1])


@torch.no_grad()
def best_sequences(emissions: Tensor, lengths: Tensor, scores: Scores, *, number: int) -> tuple[Tensor, Tensor]:
    """Find the `number` best tag sequences of each row, best first.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Scores of the chain.
        number: Number of sequences.

    Returns:
        Tags, shape `(number, words, batch)`, and the scores of the sequences, -inf where a row has fewer that are
        legal, shape `(number, batch)`.
    """
    words = len(emissions)
    ranks = torch.arange(number, device=emissions.device)
    best = torch.where(ranks == 0, (emissions[0] + scores.start)[..., None], -torch.inf)  # (batch, tags, number)
    steps, origins = [best], []
    for word in range(1, words):
        reach = best[..., None] + scores.transitions[:, None, :]  # (batch, tags, number, tags)
        values, origin = reach.flatten(1, 2).topk(number, dim=1)  # (batch, number, tags): index of tag and rank
        best = values.transpose(1, 2) + emissions[word][..., None]
        steps.append(best)
        origins.append(origin.transpose(1, 2))
    finals = (at_last_word(torch.stack(steps), lengths) + scores.end[:, None]).flatten(1)  # (batch, tags * number)
    total, state = finals.topk(number, dim=1)  # (batch, number)
    path = [state]
    for word in range(words - 2, -1, -1):
        before = origins[word].flatten(1).gather(1, path[-1])  # (batch, number)
        path.append(torch.where((lengths == word + 1)[:, None], state, before))
    return torch.stack(path[::-1]).permute(2, 0, 1) // number, total.T
