"""The selection of the largest scores: an exact threshold over many tensors without sorting or holding all scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .functional import chunks


# Scores `(n,)` of a flat slice of one tensor, in float32; the next call may overwrite the result.
ScoreOf = Callable[[int, slice], Tensor]

SAMPLE_SIZE = 1 << 17  # scores from which the threshold is estimated


def _of_one(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Processes:
    """The processes that hold the scores together, each those of some part of every tensor.

    Attributes:
        rank: Number of this one.
        join: Joins the values that each process has, in the order of ranks. Shapes `(n,)` to `(total,)`.
    """

    rank: int = 0
    join: Callable[[Tensor], Tensor] = _of_one

    def add(self, values: Tensor) -> Tensor:
        """Add the values of all processes: in one order, so that each has the same sums. Shapes `(n,)`."""
        return self.join(values).view(-1, len(values)).sum(0)

    def count(self, number: int, device: torch.device) -> int:
        """Add a number of each process."""
        return int(self.add(torch.tensor([number], device=device)))


ALONE = Processes()


def count_zeros(numel: int, ratio: float) -> int:
    """Return how many of `numel` weights are zero when the share `ratio` is kept, rounded to the nearest."""
    return round((1 - ratio) * numel)


def kth_smallest(
    score_of: ScoreOf, sizes: Sequence[int], k: int, device: torch.device, processes: Processes = ALONE
) -> tuple[float, int]:
    """Find the k-th smallest of all scores without holding them in memory at once.

    A sample gives two scores between which the result very likely lies. One pass counts the scores up to the lower
    one and collects those in between, from which the result is selected. If the sample was misleading, the bracket is
    widened. The result is exact.

    Args:
        score_of: Scores of a slice of a tensor; none is NaN.
        sizes: Number of scores of each tensor, in this process.
        k: Rank, from 1 to the number of scores.
        device: Device of the scores.
        processes: Which hold the scores; each calls this at once and gets the same. They exchange counts, the sample
            and the scores between the two.

    Returns:
        The score, and the number of smaller ones.

    Raises:
        ValueError: If there is no such rank.
        FloatingPointError: If a score is NaN.
    """
    total = processes.count(sum(sizes), device)
    if not 1 <= k <= total:
        raise ValueError(f"`k` must be from 1 to the number of scores, {total}, got {k}.")

    def count_and_collect(low: float, high: float) -> tuple[int, Tensor]:
        up_to_low, inside = _count_and_collect(score_of, sizes, device, low, high)
        return processes.count(up_to_low, device), processes.join(inside)

    sample = processes.join(_draw_sample(score_of, sizes, total)).sort().values  # (about SAMPLE_SIZE,)
    share = k / total
    middle, margin = share * len(sample), 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    while True:
        low, high = _value_at(sample, middle - margin), _value_at(sample, middle + margin)
        up_to_low, inside = count_and_collect(low, high)
        if k <= up_to_low:  # many scores equal `low`, or the sample was misleading
            just_below = float(np.nextafter(np.float32(low), np.float32(-math.inf)))
            below, _ = count_and_collect(just_below, low)
            if below < k:
                return low, below
        elif k <= up_to_low + len(inside):
            score = float(inside.kthvalue(k - up_to_low).values)
            return score, up_to_low + int((inside < score).sum())
        elif low < high:  # many scores may equal `high`
            up_to_high, _ = count_and_collect(high, high)
            if k <= up_to_high:
                return high, up_to_low + len(inside)
        if low == -math.inf and high == math.inf:
            raise FloatingPointError("`score_of` must give numbers, got NaN: weights or gradients have diverged.")
        margin *= 8


def _draw_sample(score_of: ScoreOf, sizes: Sequence[int], total: int) -> Tensor:
    # A stride that is neither even nor a multiple of three meets all columns of matrices whose width is 3 * 2^n.
    stride = max(1, total // SAMPLE_SIZE) // 6 * 6 + 1
    scores, offset = [], 0
    for index, size in enumerate(sizes):
        scores.append(score_of(index, slice(offset, size, stride)).clone())
        offset = (offset - size) % stride
    return torch.cat(scores)


def _value_at(sample: Tensor, position: float) -> float:
    """Return the value at a position of a sorted sample, minus or plus infinity outside of it."""
    if position < 0:
        return -math.inf
    return float(sample[int(position)]) if position < len(sample) else math.inf


def _count_and_collect(
    score_of: ScoreOf, sizes: Sequence[int], device: torch.device, low: float, high: float
) -> tuple[int, Tensor]:
    """Count the scores up to `low`, and collect those above it and below `high`."""
    count: Tensor | int = 0
    inside = [torch.empty(0, device=device)]  # there may be no score in this process
    for index, size in enumerate(sizes):
        for part in chunks(size, device):
            scores = score_of(index, part)
            if device.type == "cpu":
                array = scores.numpy()
                low_enough = array <= low
                count += int(np.count_nonzero(low_enough))
                inside.append(torch.from_numpy(array[np.greater(array < high, low_enough)]))
            else:
                count = count + torch.count_nonzero(scores <= low)
                inside.append(scores[(scores > low) & (scores < high)])
    return int(count), torch.cat(inside)


class Selection(NamedTuple):
    """The outcome of a selection.

    Attributes:
        threshold: The smallest score that is kept; minus infinity if all are kept, infinity if none is.
        revived: Number of scores that are kept and were not before.
        emptied: Number of tensors of which nothing is kept.
    """

    threshold: float
    revived: int
    emptied: int


def keep_largest_(
    keep: Sequence[Tensor],
    score_of: ScoreOf,
    zeros: int,
    *,
    reference_parity: bool = False,
    processes: Processes = ALONE,
) -> Selection:
    """Mark all but the `zeros` smallest scores of all tensors together as kept.

    Where scores equal the threshold, the first ones are dropped, so that the number is met exactly.

    Args:
        keep: Flat boolean masks, one for each tensor, which are overwritten. Shapes `(n,)`.
        score_of: Scores of a slice of a tensor.
        zeros: How many are not kept, from 0 to the number of scores.
        reference_parity: Drop only the scores strictly below the `zeros`-th smallest, as the paper's code does.
        processes: Which hold masks and scores, as in `kth_smallest`; the selection is that of all of them.
    """
    sizes, device = [mask.numel() for mask in keep], keep[0].device
    ties = 0  # scores that equal the threshold and are dropped all the same
    if zeros in (0, processes.count(sum(sizes), device)):
        threshold = -math.inf if zeros == 0 else math.inf
        ties = zeros  # infinite scores are dropped, too, if nothing is kept
    else:
        k = zeros if reference_parity else zeros + 1
        threshold, below = kth_smallest(score_of, sizes, k, device, processes)
        ties = 0 if reference_parity else zeros - below
    shares = _share_ties(score_of, sizes, threshold, ties, device, processes) if ties else [0] * len(sizes)
    revived: Tensor | int = 0
    counts: list[Tensor | int] = []
    for index, (mask, left) in enumerate(zip(keep, shares, strict=True)):
        kept_of_tensor: Tensor | int = 0
        for part in chunks(sizes[index], device):
            scores = score_of(index, part)
            kept = _at_least(scores, threshold)
            if left:
                tied = (scores == threshold).nonzero().squeeze(1)[:left]
                kept[tied] = False
                left -= len(tied)
            revived = revived + _count(_and_not(kept, mask[part]))
            kept_of_tensor = kept_of_tensor + _count(kept)
            mask[part] = kept
        counts.append(kept_of_tensor)
    totals = processes.add(torch.stack([torch.as_tensor(number, device=device) for number in (revived, *counts)]))
    return Selection(threshold, int(totals[0]), int((totals[1:] == 0).sum()))


def _share_ties(
    score_of: ScoreOf, sizes: Sequence[int], threshold: float, ties: int, device: torch.device, processes: Processes
) -> list[int]:
    """Return how many ties of each tensor are dropped in this process: the first ones, by tensor and then by rank."""
    here = [
        sum(int((score_of(i, part) == threshold).sum()) for part in chunks(n, device)) for i, n in enumerate(sizes)
    ]
    counts = processes.join(torch.tensor(here, device=device)).view(-1, len(sizes)).T  # (tensors, processes)
    before = counts.flatten().cumsum(0).view(counts.shape) - counts
    return (ties - before).clamp(min=0).minimum(counts)[:, processes.rank].tolist()


# On a CPU, numpy compares, counts and selects several times faster than torch; on a GPU, counts must not synchronise.


def _at_least(scores: Tensor, threshold: float) -> Tensor:
    return torch.from_numpy(scores.numpy() >= threshold) if scores.device.type == "cpu" else scores >= threshold


def _and_not(first: Tensor, second: Tensor) -> Tensor:
    if first.device.type == "cpu":
        return torch.from_numpy(np.greater(first.numpy(), second.numpy()))
    return first & ~second


def _count(mask: Tensor) -> Tensor | int:
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else torch.count_nonzero(mask)


def best_two_of_four(scores: Tensor) -> Tensor:
    """Mark the two largest of every four consecutive scores; of equal scores, the first.

    Args:
        scores: Shape `(n,)`, a multiple of four.

    Returns:
        Boolean, two of each four true. Shape `(n,)`.
    """
    order = scores.view(-1, 4).argsort(dim=1, descending=True, stable=True)[:, :2]  # (n / 4, 2)
    return torch.zeros_like(scores, dtype=torch.bool).view(-1, 4).scatter_(1, order, True).flatten()


def balance_factors(totals: Tensor) -> Tensor:
    """Return factors that give every expert of a layer the same total score; a total of zero stays zero.

    Args:
        totals: Sum of the scores of each expert, at least 0. Shape `(experts,)`.
    """
    return torch.where(totals > 0, totals.mean() / totals, torch.ones_like(totals))
