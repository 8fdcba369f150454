"""The two passes over a chain: forwards, how likely each tag is given the words so far; backwards, given all words.

The fast passes work on exponentials relative to the likeliest tag of each word. Where a favourite tag is a dead end,
all that is worth summing may underflow: `pass_forwards` notices it, and takes the exact passes in logarithms and
float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


# A smaller sum may have lost terms that matter to underflow: half of the exponents of float32 lie below it.
SMALLEST_SUM = 1e-20


class Scores(NamedTuple):
    """Scores of a chain: `transitions (tags, tags)`, row = previous tag; `start (tags,)` and `end (tags,)`."""

    transitions: Tensor
    start: Tensor
    end: Tensor


class Filtered(NamedTuple):
    """Result of the forward pass: each word's tags, given the words up to it.

    Attributes:
        share: Probability of each tag, divided by that of the likeliest tag. Shape `(words, batch, tags)`.
        inflow: Sum of what reaches each tag from the previous word, before scaling. Shape as `share`; row 0 is unused.
        log_scale: Logarithm of the product of all divisors up to each word. Shape `(words, batch)`, float64.
        smallest: The smallest sum, not counting those that are zero because moves are forbidden. Shape `()`.
    """

    share: Tensor
    inflow: Tensor
    log_scale: Tensor
    smallest: Tensor


def pass_forwards(emissions: Tensor, lengths: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Filtered, bool]:
    """Run the fast forward pass, or the exact one where sums get too small.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Scores of the chain.

    Returns:
        The logarithm of each row's total, `(batch,)`; the share of each last tag in it, `(batch, tags)`; the states
        of the pass; and whether it was the exact one.
    """
    filtered = filter_words(emissions, scores)
    result, at_end, total = _close(filtered, lengths, scores.end)
    smallest = torch.minimum(filtered.smallest, torch.where(lengths > 0, total, 1).min())
    if smallest >= SMALLEST_SUM:  # False for NaN
        return result, at_end, filtered, False
    wide = _widest(emissions.device)
    scores = Scores(*(score.to(wide) for score in scores))
    filtered = filter_words_exactly(emissions.to(wide), scores)
    return *_close_exactly(filtered, lengths, scores.end), filtered, True


def filter_words(emissions: Tensor, scores: Scores) -> Filtered:
    """Run the forward pass: how likely is each tag, given the words so far; see `Filtered`."""
    highest = emissions.amax(2, keepdim=True)  # (words, batch, 1)
    weight = (emissions - highest).exp_()  # (words, batch, tags)
    rate, top = _relative_exponential(scores.transitions)  # (tags, tags)
    first, first_top = _relative_exponential(scores.start)  # (tags,)
    share, inflow, peak = torch.empty_like(weight), torch.ones_like(weight), torch.empty_like(highest)
    shares, inflows, peaks, weights = share.unbind(), inflow.unbind(), peak.unbind(), weight.unbind()
    torch.mul(weights[0], first, out=shares[0])
    for word in range(len(weights)):
        if word:
            torch.mm(shares[word - 1], rate, out=inflows[word])
            torch.mul(inflows[word], weights[word], out=shares[word])
        torch.amax(shares[word], 1, keepdim=True, out=peaks[word])
        shares[word].div_(peaks[word])
    reachable = (rate > 0).any(0)  # (tags,): nothing ever flows into the others
    smallest = torch.minimum(torch.where(reachable, inflow.amin((0, 1)), 1).min(), peak.min())
    return Filtered(share, inflow, _accumulate(peak.log() + highest, top) + first_top, smallest)


def _accumulate(scale: Tensor, per_move: Tensor) -> Tensor:
    """Sum the logarithms of the divisors up to each word, in float64: there are hundreds, often of one sign."""
    wide = _widest(scale.device)
    moves = torch.arange(len(scale), device=scale.device, dtype=wide)[:, None]  # (words, 1)
    return scale[..., 0].to(wide).cumsum(0) + moves * per_move  # (words, batch)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _relative_exponential(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentiate scores relative to the highest one, and return it as well."""
    top = scores.max()
    return (scores - top).exp(), top


def at_last_word(values: Tensor, lengths: Tensor) -> Tensor:
    """Pick each row's entry at its last word; `values` has the shape `(words, batch, ...)`."""
    return values[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]  # (batch, ...)


def _close(filtered: Filtered, lengths: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step from the last word to the end of each row.

    Returns:
        The logarithm of each row's total, `(batch,)`; the share of each last tag in it, `(batch, tags)`; and the
        total relative to the last word, `(batch,)`.
    """
    rate, top = _relative_exponential(end)
    flow = at_last_word(filtered.share, lengths) * rate  # (batch, tags)
    total = flow.sum(1, keepdim=True)  # (batch, 1)
    return at_last_word(filtered.log_scale, lengths) + (total.log() + top)[:, 0], flow / total, total[:, 0]


def smooth_words(
    share: Tensor, inflow: Tensor, at_end: Tensor, lengths: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the backward pass: how likely is each tag and each move, given all words.

    Each tag receives from the next tag the part of its probability that had come from there, so nothing can overflow.

    Args:
        share: From `filter_words`. Shape `(words, batch, tags)`.
        inflow: From `filter_words`. Shape `(words, batch, tags)`.
        at_end: Probability of each last tag, times the weight of the row. Shape `(batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        transitions: Shape `(tags, tags)`.

    Returns:
        Probability of each tag, shape `(words, batch, tags)`, and the sum over words and rows of the probability of
        each move, shape `(tags, tags)`; both times the weights.
    """
    rate, _ = _relative_exponential(transitions)
    back = rate.T.contiguous()  # (tags, tags)
    expected = _place_at_last_word(at_end, lengths, share)  # (words, batch, tags)
    per_inflow = torch.where(inflow > 0, 1 / inflow, 0)  # (words, batch, tags)
    shares, per_inflows, of_word = share.unbind(), per_inflow.unbind(), expected.unbind()
    for word in range(len(share) - 1, 0, -1):
        per_inflows[word].mul_(of_word[word])
        of_word[word - 1].addcmul_(shares[word - 1], per_inflows[word] @ back)
    tags = share.shape[2]
    moves = share[:-1].reshape(-1, tags).T @ per_inflow[1:].reshape(-1, tags)  # (tags, tags)
    return expected, moves * rate


def _place_at_last_word(at_end: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
    placed = torch.zeros_like(like)  # (words, batch, tags)
    placed[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)] = at_end
    return placed


def filter_words_exactly(emissions: Tensor, scores: Scores) -> Filtered:
    """Run the forward pass in logarithms of `share` and `inflow`: slower than `filter_words`, without underflow."""
    highest = emissions.amax(2, keepdim=True)  # (words, batch, 1)
    relative = emissions - highest
    share, inflow, peak = torch.empty_like(relative), torch.zeros_like(relative), torch.empty_like(highest)
    current = relative[0] + scores.start  # (batch, tags)
    for word in range(len(relative)):
        if word:
            inflow[word] = torch.logsumexp(share[word - 1][:, :, None] + scores.transitions, dim=1)
            current = inflow[word] + relative[word]
        peak[word] = current.amax(1, keepdim=True)
        share[word] = current - peak[word]
    zero = scores.start.new_zeros(())
    return Filtered(share, inflow, _accumulate(peak + highest, zero), zero)


def _close_exactly(filtered: Filtered, lengths: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    flow = at_last_word(filtered.share, lengths) + end  # (batch, tags)
    return at_last_word(filtered.log_scale, lengths) + flow.logsumexp(1), flow.softmax(1)


def smooth_words_exactly(
    share: Tensor, inflow: Tensor, at_end: Tensor, lengths: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the backward pass like `smooth_words`, on the result of `filter_words_exactly`.

    The shares of a tag's origins are normalised among themselves: beside emissions of 1e14, the sum that `inflow` is
    has lost its last digits, and the shares in it would add up to more than 1.
    """
    expected, moves = _place_at_last_word(at_end, lengths, share), torch.zeros_like(transitions)
    for word in range(len(share) - 1, 0, -1):
        origin = (share[word - 1][:, :, None] + transitions).softmax(1)  # (batch, tags, tags)
        reached = (inflow[word] > -torch.inf)[:, None, :]  # (batch, 1, tags); NaN where nothing flows into the tag
        flow = torch.where(reached, origin, 0) * expected[word][:, None, :]  # (batch, tags, tags)
        expected[word - 1] += flow.sum(2)
        moves += flow.sum(0)
    return expected, moves
