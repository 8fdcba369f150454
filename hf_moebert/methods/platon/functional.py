"""The equations of PLATON on tensors.

A name that ends in `_` changes the tensors it is given, as in torch: the statistics of a model are three times its
pruned weights, and fresh ones at every step would cost more than the arithmetic. Everything runs in chunks that stay
in the cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


# Scores `(n,)` of a flat slice of one piece, in float32; the tensor may be overwritten by the next call.
ScoreOf = Callable[[int, slice], Tensor]

# Elements at a time: what stays in the cache of a CPU core, and what keeps a GPU busy. Multiples of four.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 22
SAMPLE = 1 << 17  # scores that guess where the threshold is
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of the size of a float


def chunks(numel: int, device: torch.device) -> Iterator[slice]:
    """Cut `numel` elements into slices of a size that suits the device."""
    size = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return (slice(start, min(start + size, numel)) for start in range(0, numel, size))


def sensitivity(weight: Tensor, gradient: Tensor, out: Tensor | None = None) -> Tensor:
    """Estimate how much the loss changes when a weight becomes zero: |weight * gradient|, in float32.

    Args:
        weight: Any shape.
        gradient: Of the loss. Same shape.
        out: Float32 tensor to write to. Same shape.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2206.12562, restated in Zhang et al. 2023 (AdaLoRA), eq. 10.
    """
    return torch.mul(weight.float(), gradient.float(), out=out).abs_()


def update_window_(window: Tensor, weight: Tensor, gradient: Tensor, position: int) -> None:
    """Add one step to the running mean of the sensitivity: `window = (window * position + s) / (position + 1)`.

    Args:
        window: Float32 mean so far. Shape `(n,)`.
        weight: Shape `(n,)`.
        gradient: Shape `(n,)`.
        position: Steps that the mean holds.
    """
    scratch = _scratch(window)
    for part in chunks(window.numel(), window.device):
        s = sensitivity(weight[part], gradient[part], out=scratch[: part.stop - part.start])
        window[part].lerp_(s, 1 / (position + 1))


def close_window_(
    window: Tensor,
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    gradient: Tensor,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """Feed a window's mean to the averages, and begin a new window with the step at hand.

    The uncertainty is the distance between the mean and the average that has just taken it in.

    Args:
        window: Float32 mean of the past window; becomes the sensitivity of this step. Shape `(n,)`.
        importance: Average of the sensitivity. Shape `(n,)`.
        uncertainty: Average of its uncertainty. Shape `(n,)`.
        weight: Shape `(n,)`.
        gradient: Shape `(n,)`.
        beta1: Decay of `importance`.
        beta2: Decay of `uncertainty`.

    Source: Zhang et al. 2022; AdaLoRA, eqs. 10 to 12. The window is that of the paper's code.
    """
    scratch = _scratch(window)
    for part in chunks(window.numel(), window.device):
        mean, smooth = window[part], importance[part]
        smooth.lerp_(mean, 1 - beta1)
        distance = torch.sub(mean, smooth, out=scratch[: part.stop - part.start]).abs_()
        uncertainty[part].lerp_(distance, 1 - beta2)
        sensitivity(weight[part], gradient[part], out=mean)


def update_movement_(movement: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Add up how far descent pushes each weight away from zero: `movement -= weight * gradient`.

    Args:
        movement: Float32 sum so far. Shape `(n,)`.
        weight: Its value, or what it would be without its mask. Shape `(n,)`.
        gradient: Shape `(n,)`.

    Source: Sanh et al. 2020, https://arxiv.org/abs/2005.07683, section 4, up to the learning rate.
    """
    for part in chunks(movement.numel(), movement.device):
        movement[part].addcmul_(weight[part].float(), gradient[part].float(), value=-1)


def count_zeros(numel: int, ratio: float) -> int:
    """Say how many of `numel` weights are zero when `ratio` of them is kept, rounded to the nearest."""
    return round((1 - ratio) * numel)


def kth_smallest(score_of: ScoreOf, sizes: Sequence[int], k: int, device: torch.device) -> tuple[float, int]:
    """Find the k-th smallest of all scores without holding them.

    A sample says between which two scores it must lie; one pass counts the scores up to the lower and collects those
    between; a few are left to select from. If the sample misled, the bracket widens. The result is exact.

    Args:
        score_of: Scores of a slice of a piece; none is NaN.
        sizes: Scores in each piece.
        k: Rank, from 1 to the number of scores.
        device: Where the scores are.

    Returns:
        The score, and how many are smaller.

    Raises:
        ValueError: If there is no such rank.
        FloatingPointError: If a score is NaN.
    """
    total = sum(sizes)
    if not 1 <= k <= total:
        raise ValueError(f"`k` must be from 1 to the number of scores, {total}, got {k}.")
    sample = _sample(score_of, sizes).sort().values  # (about SAMPLE,)
    share = k / total
    middle, margin = share * len(sample), 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    while True:
        low, high = (_at(sample, middle + side * margin) for side in (-1, 1))
        up_to_low, inside = _count_and_collect(score_of, sizes, device, low, high)
        if k <= up_to_low:  # many scores tie at `low`, or the sample misled
            just_below = float(np.nextafter(np.float32(low), np.float32(-math.inf)))
            below, _ = _count_and_collect(score_of, sizes, device, just_below, low)
            if below < k:
                return low, below
        elif k <= up_to_low + len(inside):
            score = float(inside.kthvalue(k - up_to_low).values)
            return score, up_to_low + int((inside < score).sum())
        elif low < high:  # perhaps many tie at `high`
            up_to_high, _ = _count_and_collect(score_of, sizes, device, high, high)
            if k <= up_to_high:
                return high, up_to_low + len(inside)
        if low == -math.inf and high == math.inf:
            raise FloatingPointError("`score_of` must give numbers, got NaN: weights or gradients have diverged.")
        margin *= 8


def _sample(score_of: ScoreOf, sizes: Sequence[int]) -> Tensor:
    # An odd stride that is no multiple of three meets all columns of matrices whose width is 3 * 2^n.
    stride = max(1, sum(sizes) // SAMPLE) // 6 * 6 + 1
    scores, offset = [], 0
    for piece, size in enumerate(sizes):
        scores.append(score_of(piece, slice(offset, size, stride)).clone())
        offset = (offset - size) % stride
    return torch.cat(scores)


def _at(sample: Tensor, position: float) -> float:
    if position < 0:
        return -math.inf
    return float(sample[int(position)]) if position < len(sample) else math.inf


def _count_and_collect(
    score_of: ScoreOf, sizes: Sequence[int], device: torch.device, low: float, high: float
) -> tuple[int, Tensor]:
    """Count the scores up to `low`, and gather those above it and below `high`."""
    count: Tensor | int = 0
    inside = []
    for piece, size in enumerate(sizes):
        for part in chunks(size, device):
            scores = score_of(piece, part)
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
    """What `select_` did.

    Attributes:
        threshold: The smallest score that is kept; minus infinity if all are, infinity if none is.
        revived: How many are kept that were not before.
        emptied: How many pieces have nothing left.
    """

    threshold: float
    revived: int
    emptied: int


def select_(keep: Sequence[Tensor], score_of: ScoreOf, zeros: int, *, reference: bool = False) -> Selection:
    """Mark all but the `zeros` smallest scores as kept, counted over all pieces together.

    Equal scores at the threshold fall in the order of pieces and positions, so that the number is met exactly.

    Args:
        keep: The last masks, to be replaced by the new ones: a flat boolean tensor for each piece. Shapes `(n,)`.
        score_of: Scores of a slice of a piece.
        zeros: How many are not kept, from 0 to the number of scores.
        reference: Drop what lies strictly below the `zeros`-th smallest score, as the paper's code does.
    """
    sizes, device = [mask.numel() for mask in keep], keep[0].device
    ties = 0  # scores that equal the threshold and yet fall
    if zeros in (0, sum(sizes)):
        threshold = -math.inf if zeros == 0 else math.inf
        ties = zeros  # infinite scores fall too if nothing is kept
    else:
        threshold, below = kth_smallest(score_of, sizes, zeros if reference else zeros + 1, device)
        ties = 0 if reference else zeros - below
    revived: Tensor | int = 0
    emptied: Tensor | int = 0
    for piece, mask in enumerate(keep):
        kept_of_piece: Tensor | int = 0
        for part in chunks(sizes[piece], device):
            scores = score_of(piece, part)
            kept = _at_least(scores, threshold)
            if ties:
                tied = (scores == threshold).nonzero().squeeze(1)[:ties]
                kept[tied] = False
                ties -= len(tied)
            revived = revived + _count(_and_not(kept, mask[part]))
            kept_of_piece = kept_of_piece + _count(kept)
            mask[part] = kept
        emptied = emptied + (kept_of_piece == 0)
    return Selection(threshold, int(revived), int(emptied))


# On a CPU numpy compares, counts and picks several times faster than torch; on a GPU nothing waits for a count.


def _at_least(scores: Tensor, threshold: float) -> Tensor:
    return torch.from_numpy(scores.numpy() >= threshold) if scores.device.type == "cpu" else scores >= threshold


def _and_not(first: Tensor, second: Tensor) -> Tensor:
    if first.device.type == "cpu":
        return torch.from_numpy(np.greater(first.numpy(), second.numpy()))
    return first & ~second


def _count(mask: Tensor) -> Tensor | int:
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else torch.count_nonzero(mask)


def apply_mask_(weight: Tensor, keep: Tensor) -> None:
    """Set the weights that are not kept to +0.0, whatever they are, and leave every bit of the others.

    Args:
        weight: Shape `(n,)`.
        keep: True at the kept ones. Shape `(n,)`.
    """
    weight.view(BITS[weight.element_size()]).mul_(keep)  # several times faster than `masked_fill_` on a CPU


def best_two_of_four(scores: Tensor) -> Tensor:
    """Mark the two largest of every four consecutive scores; the first of equal ones.

    Args:
        scores: Shape `(n,)`, a multiple of four.

    Returns:
        Boolean, two of each four true. Shape `(n,)`.
    """
    order = scores.view(-1, 4).argsort(dim=1, descending=True, stable=True)[:, :2]  # (n / 4, 2)
    return torch.zeros_like(scores, dtype=torch.bool).view(-1, 4).scatter_(1, order, True).flatten()


def balance_factors(totals: Tensor) -> Tensor:
    """Factors that give every expert of a layer the same total score; one without any score keeps its zero.

    Args:
        totals: Sum of the scores of each expert, at least 0. Shape `(experts,)`.
    """
    return torch.where(totals > 0, totals.mean() / totals, torch.ones_like(totals))


def checksum(masks: Sequence[Tensor]) -> Tensor:
    """Condense masks to one number that tells different ones apart with near certainty, int64, shape `(1,)`."""
    total = torch.zeros(1, dtype=torch.long, device=masks[0].device)
    for mask in masks:
        for part in chunks(mask.numel(), mask.device):
            places = torch.arange(1, part.stop - part.start + 1, device=mask.device)  # (n,)
            total = total * 1_000_003 + places[mask[part]].square().sum()  # wraps around
    return total


def fingerprint(weight: Tensor) -> int:
    """Sum the bits of a tensor, read as integers: equal for equal tensors, and hardly ever for others.

    Args:
        weight: Of a floating point type. Shape `(n,)`.
    """
    bits = weight.view(BITS[weight.element_size()])
    return sum(int(bits[part].sum(dtype=torch.long)) for part in chunks(weight.numel(), weight.device))


def _scratch(like: Tensor) -> Tensor:
    size = next(chunks(like.numel(), like.device), slice(0, 0))
    return torch.empty(size.stop - size.start, device=like.device)
