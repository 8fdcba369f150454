"""The equations of a linear-chain CRF: sums and maxima over all tag sequences, some of them forbidden.

A sequence `y` scores `start[y_1] + sum_t emissions_t[y_t] + sum_t transitions[y_t, y_(t+1)] + end[y_T]`; what is
forbidden scores -inf, and is never reached. The words of a row come first (`pack_words`), time is the first dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


# A sum below this may have lost terms to underflow that matter: half of the exponents of float32 lie below it.
SMALLEST_SUM = 1e-20


class Scores(NamedTuple):
    """What a chain is scored by: `transitions (tags, tags)`, row = previous; `start (tags,)` and `end (tags,)`."""

    transitions: Tensor
    start: Tensor
    end: Tensor


def pack_words(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the words of each row to its front, in their order, and drop what no row needs.

    Args:
        values: One entry per position. Shape `(batch, seq, ...)`.
        mask: True at words; any pattern, also none. Shape `(batch, seq)`.

    Returns:
        The entries, zero where a row has no more words, shape `(words, batch, ...)`; the number of words of each row,
        shape `(batch,)`; and the position that each came from, shape `(batch, words)`.
    """
    lengths = mask.sum(1)  # (batch,)
    words = int(lengths.max()) if len(lengths) else 0
    real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]  # (batch, seq)
    if torch.equal(real, mask):  # the words already come first
        positions = torch.arange(words, device=mask.device).expand(len(mask), words)
    else:
        positions = torch.argsort(~mask, dim=1, stable=True)[:, :words]  # (batch, words)
        values = values[torch.arange(len(mask), device=mask.device)[:, None], positions]
    packed = values[:, :words].transpose(0, 1).contiguous()  # (words, batch, ...)
    if not real[:, :words].all():
        absent = ~real[:, :words].T  # (words, batch)
        packed = packed.masked_fill(absent.view(*absent.shape, *[1] * (packed.dim() - 2)), 0)
    return packed, lengths, positions


def unpack_words(packed: Tensor, mask: Tensor, positions: Tensor, *, fill: float) -> Tensor:
    """Put the entries of words back to where `pack_words` took them from, and `fill` everywhere else.

    Args:
        packed: Shape `(words, batch, ...)`.
        mask: As for `pack_words`. Shape `(batch, seq)`.
        positions: From `pack_words`. Shape `(batch, words)`.
        fill: The entry of positions that are no words.

    Returns:
        Shape `(batch, seq, ...)`.
    """
    spread = packed.new_zeros(*mask.shape, *packed.shape[2:])  # (batch, seq, ...)
    rows = torch.arange(len(mask), device=mask.device)[:, None]  # (batch, 1)
    spread[rows, positions] = packed.transpose(0, 1)
    return spread.masked_fill(~mask.view(*mask.shape, *[1] * (packed.dim() - 2)), fill)


def sequence_score(emissions: Tensor, tags: Tensor, lengths: Tensor, scores: Scores) -> Tensor:
    """Score one tag sequence per row.

    Args:
        emissions: Shape `(words, batch, tags)`.
        tags: Shape `(words, batch)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Of the chain.

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
    """Sum over all tag sequences: the logarithm of the sum of their exponentiated scores.

    Its gradient with respect to the emissions are the marginals. It can be differentiated once.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Of the chain.

    Returns:
        One logarithm per row, 0 for a row without words, -inf where every sequence is forbidden. Shape `(batch,)`.
    """
    if not emissions.numel():
        return emissions.sum((0, 2))  # (batch,): zeros that a gradient can pass
    return LogPartition.apply(emissions, lengths, *scores)


class Filtered(NamedTuple):
    """What is known of each word from the words up to it.

    Attributes:
        share: Probability of each tag over that of the likeliest one. Shape `(words, batch, tags)`.
        inflow: Sum of what reaches each tag from the word before, over its own scale. Shape as `share`; row 0 unused.
        log_scale: Logarithm of what all has been divided by, up to each word. Shape `(words, batch)`, float64.
        smallest: The smallest sum that was formed, of those that are not zero by rule. Shape `()`.
    """

    share: Tensor
    inflow: Tensor
    log_scale: Tensor
    smallest: Tensor


class LogPartition(torch.autograd.Function):
    """`log_partition`, with its gradient written out: one pass forwards, one backwards, a matrix product per word.

    Both passes work on exponentials relative to the likeliest tag of each word. Where a favourite tag is a dead end,
    all that is worth summing may underflow: this is noticed, and such a batch is done in logarithms and float64.
    """

    @staticmethod
    def forward(
        ctx: Any, emissions: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """Return the logarithm for each row; see `log_partition`."""
        with torch.autocast(emissions.device.type, enabled=False):
            result, at_end, filtered, ctx.exact = _pass_forwards(emissions, lengths, Scores(transitions, start, end))
        ctx.save_for_backward(filtered.share, filtered.inflow, at_end, lengths, transitions)
        return torch.where(lengths > 0, result, 0).to(emissions.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the expected number of times that each score is used, weighted by row."""
        share, inflow, at_end, lengths, transitions = ctx.saved_tensors
        counts = (gradient != 0) & (lengths > 0)  # (batch,): the others may hold NaN, which no zero weighs down
        weighted = torch.where(counts[:, None], at_end * gradient[:, None], 0)  # (batch, tags)
        with torch.autocast(share.device.type, enabled=False):
            smooth = smooth_words_exactly if ctx.exact else smooth_words
            expected, moves = smooth(share, inflow, weighted, lengths, transitions.to(share.dtype))
        found = (expected, moves, expected[0].sum(0), weighted.sum(0))
        first, *rest = (part.to(transitions.dtype) for part in found)
        return first, None, *rest


def _pass_forwards(emissions: Tensor, lengths: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Filtered, bool]:
    """Filter the fast way, or the exact one where sums get too small.

    Returns:
        The logarithm of each row's total, `(batch,)`; the shares of the last tag in it, `(batch, tags)`; what was
        found on the way, and whether exactly.
    """
    filtered = filter_words(emissions, scores)
    result, at_end, total = _close(filtered, lengths, scores.end)
    smallest = torch.minimum(filtered.smallest, torch.where(lengths > 0, total, 1).min())
    if smallest >= SMALLEST_SUM:  # not so if it is not a number
        return result, at_end, filtered, False
    wide = _widest(emissions.device)
    scores = Scores(*(score.to(wide) for score in scores))
    filtered = filter_words_exactly(emissions.to(wide), scores)
    return *_close_exactly(filtered, lengths, scores.end), filtered, True


def filter_words(emissions: Tensor, scores: Scores) -> Filtered:
    """Pass forwards: how likely is each tag, given the words so far; see `Filtered`."""
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
    """Sum the logarithms of scales up to each word, in float64: there are hundreds, often of one sign."""
    wide = _widest(scale.device)
    moves = torch.arange(len(scale), device=scale.device, dtype=wide)[:, None]  # (words, 1)
    return scale[..., 0].to(wide).cumsum(0) + moves * per_move  # (words, batch)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _relative_exponential(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentiate relative to the highest score, and return that one too."""
    top = scores.max()
    return (scores - top).exp(), top


def at_last_word(values: Tensor, lengths: Tensor) -> Tensor:
    """Pick each row's entry at its last word; `values` has the shape `(words, batch, ...)`."""
    return values[(lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)]  # (batch, ...)


def _close(filtered: Filtered, lengths: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step from the last word to the end: the logarithm of the total, the shares of the last tag in it, and it."""
    rate, top = _relative_exponential(end)
    flow = at_last_word(filtered.share, lengths) * rate  # (batch, tags)
    total = flow.sum(1, keepdim=True)  # (batch, 1)
    return at_last_word(filtered.log_scale, lengths) + (total.log() + top)[:, 0], flow / total, total[:, 0]


def smooth_words(
    share: Tensor, inflow: Tensor, at_end: Tensor, lengths: Tensor, transitions: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass backwards: how likely is each tag and each move, given all words.

    A tag gets from each next tag the part of its probability that had come from there, so nothing can overflow.

    Args:
        share: From `filter_words`. Shape `(words, batch, tags)`.
        inflow: From `filter_words`. Shape `(words, batch, tags)`.
        at_end: Probability of each last tag, times any weight of the row. Shape `(batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        transitions: Shape `(tags, tags)`.

    Returns:
        Probability of each tag, shape `(words, batch, tags)`, and sum of those of each move, shape `(tags, tags)`;
        both times the weights.
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
    """Pass forwards like `filter_words`, with logarithms for `share` and `inflow`: slower, and no sum is too small."""
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
    """Pass backwards like `smooth_words`, from what `filter_words_exactly` found."""
    expected, moves = _place_at_last_word(at_end, lengths, share), torch.zeros_like(transitions)
    for word in range(len(share) - 1, 0, -1):
        origin = share[word - 1][:, :, None] + transitions - inflow[word][:, None, :]  # (batch, tags, tags)
        flow = origin.exp().nan_to_num(nan=0.0) * expected[word][:, None, :]  # NaN: nothing flows into that tag
        expected[word - 1] += flow.sum(2)
        moves += flow.sum(0)
    return expected, moves


@torch.no_grad()
def marginals(emissions: Tensor, lengths: Tensor, scores: Scores) -> Tensor:
    """Compute the probability of each tag of each word, over all tag sequences.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Words of each row. Shape `(batch,)`.
        scores: Of the chain.

    Returns:
        Probabilities that add up to 1; zeros where a row has no more words. Shape `(words, batch, tags)`.
    """
    if not emissions.numel():
        return torch.zeros_like(emissions)
    _, at_end, filtered, exact = _pass_forwards(emissions, lengths, scores)
    smooth = smooth_words_exactly if exact else smooth_words
    at_end = torch.where(lengths[:, None] > 0, at_end, 0)  # (batch, tags)
    transitions = scores.transitions.to(at_end.dtype)
    return smooth(filtered.share, filtered.inflow, at_end, lengths, transitions)[0].to(emissions.dtype)
