"""The equations of learned masks on tensors: hard concrete draws, routing, the budget, and classes of units.

The paper (Liu et al. 2025, "Masks Can be Learned as an Alternative to Experts", ACL) publishes the idea: each expert
is a mask on the activations of a feed-forward network, learned with an L0 penalty from all open to half open. Its
parametrisation, router and schedule are not known to us: everything here is our own design, after the standard
methods named as sources.
"""

import math

import torch
from torch import Tensor

from .functional_routing import expert_load


TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as in its paper
SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # the score at which a mask is open with probability 1/2
NOISE_MARGIN = 1e-6  # noise of 0 or 1 would have infinite logits
SHARE_TOLERANCE, MOST_ROUNDS = 1e-6, 50  # of the search for a budget; halving alone needs fewer rounds


def draw_masks(scores: Tensor, noise: Tensor) -> Tensor:
    """Draw masks from the hard concrete distribution, in which 0 and 1 both have a positive probability.

    Args:
        scores: `log alpha` of each mask. Any shape.
        noise: Uniform in [0, 1]. Same shape.

    Returns:
        In [0, 1], with a gradient for the scores where a mask is strictly between. Float32, same shape.

    Source: Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eqs. 10 and 11.
    """
    logits = noise.float().clamp(NOISE_MARGIN, 1 - NOISE_MARGIN).logit()
    return _stretch(torch.sigmoid((logits + scores.float()) / TEMPERATURE))


def settle_masks(scores: Tensor) -> Tensor:
    """Return the masks without noise, in [0, 1]: their values outside of training.

    Source: Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eq. 13.
    """
    return _stretch(torch.sigmoid(scores.float()))


def open_probability(scores: Tensor) -> Tensor:
    """Return the probability that a drawn mask is not zero.

    The probability of a one is 1 minus this function of the negative scores, as the distribution is symmetric.

    Source: Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eq. 12.
    """
    return torch.sigmoid(scores.float() - SHIFT)


def _stretch(values: Tensor) -> Tensor:
    return (values * (HIGH - LOW) + LOW).clamp(0, 1)


def choose_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the most probable experts of each token, and the weight of each.

    Args:
        logits: Logits of the router. Shape `(tokens, experts)`.
        top_k: Number of experts of a token.

    Returns:
        Indices, where ties go to the lowest, and weights that sum to 1; a single expert has the weight 1, which
        carries the router's gradient (straight-through). Both `(tokens, top_k)`, weights in float32.
    """
    probabilities = logits.float().softmax(dim=-1)
    if top_k == 1:  # no need to sort
        kept, index = probabilities.max(dim=-1, keepdim=True)
        return index, kept / kept.detach()
    values, index = probabilities.sort(dim=-1, descending=True, stable=True)
    index, kept = index[:, :top_k], values[:, :top_k]
    return index, kept / kept.sum(dim=-1, keepdim=True)


def mix_masks(masks: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Add up the masks of each token's experts.

    Args:
        masks: Shape `(experts, units)`.
        index: Shape `(tokens, top_k)`.
        weights: Shape `(tokens, top_k)`.

    Returns:
        Shape `(tokens, units)`, in the dtype of the masks.
    """
    spread = masks.new_zeros(len(index), len(masks)).scatter(1, index, weights.to(masks.dtype))  # (tokens, experts)
    return spread @ masks  # a product, whose backward is one, too: an index would need a scatter


def active_share(open_masks: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Return the share of the units of a layer that a token uses, averaged over tokens.

    A token uses a unit if any of its experts has an open mask there; masks are independent of each other.

    Args:
        open_masks: Probability that each mask is open, or 0 and 1. Shape `(experts, units)`.
        index: Experts of each token. Shape `(tokens, top_k)`.
        real: True at tokens that count; if none does, all count. Shape `(tokens,)`.

    Returns:
        Scalar, with a gradient for `open_masks`, but none for the shares of the experts.
    """
    real = real | ~real.any()  # a batch of padding alone must not count as sparse
    if index.shape[1] == 1:
        load = expert_load(index, real, len(open_masks))  # (experts,)
        # Not `@`, which autocast computes in half precision
        return (load / real.sum().clamp(min=1) * open_masks.mean(dim=1)).sum()
    sets, counts = index[real].sort(dim=1).values.unique(dim=0, return_counts=True)  # few distinct sets
    closed = (1 - open_masks)[sets].prod(dim=1)  # (sets, units)
    return (counts / counts.sum().clamp(min=1) * (1 - closed).mean(dim=1)).sum()


def shift_to_share(scores: Tensor, share: float) -> Tensor:
    """Return what to add to all scores, so that their masks are open with a given mean probability.

    Newton's method, in a bracket that is halved where a step would leave it.

    Args:
        scores: `log alpha` of each mask. Any shape.
        share: Mean probability that a mask is not zero, in (0, 1).

    Returns:
        Scalar, float32; the mean probability is right up to 1e-6.

    Source: Our own design; Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eq. 12, for the probability.
    """
    scores = scores.float()
    goal = math.log(share / (1 - share)) + SHIFT  # the score of a mask that is open with this probability
    low, high = goal - scores.max(), goal - scores.min()  # at which too little is open, and too much
    shift = torch.zeros((), device=scores.device).clamp(low, high)
    for _ in range(MOST_ROUNDS):
        probability = open_probability(scores + shift)
        gap = probability.mean() - share
        if gap.abs() <= SHARE_TOLERANCE:
            break
        low, high = (low, shift) if gap > 0 else (shift, high)
        step = shift - gap / (probability * (1 - probability)).mean()
        shift = step if low < step < high else (low + high) / 2
    return shift


def choose_masks(scores: Tensor, keep_ratio: float | None, *, by_layer: bool = False) -> Tensor:
    """Choose the masks that stay open permanently.

    Each layer keeps as many masks as it has among the highest scores of all layers. All of its experts keep the same
    number of masks, those with their highest scores: so a token uses that many units, whichever expert it goes to.

    Args:
        scores: Shape `(layers, experts, groups)`.
        keep_ratio: Share of the masks that stay open, in (0, 1]. `None` keeps as many as are open with a probability
            of at least 1/2.
        by_layer: Whether each layer has the same share.

    Returns:
        Bool, same shape. At least one mask of every expert is open; ties go to the lowest index.

    Raises:
        ValueError: If scores are not finite, or the share is not in (0, 1].
    """
    if not scores.isfinite().all():
        raise ValueError("`scores` must be finite, got NaN or infinity. Train again with a smaller `score_rate`.")
    if keep_ratio is None:
        keep_ratio = float((scores >= SHIFT).float().mean())
    elif type(keep_ratio) not in (int, float) or not 0 < keep_ratio <= 1:
        raise ValueError(
            f"`keep_ratio` must be a number in (0, 1], got {keep_ratio!r}. Use 0.5 to keep half of the units."
        )
    layers, _, groups = scores.shape
    if by_layer:
        widths = torch.full((layers,), max(round(keep_ratio * groups), 1))
    else:
        widths = _share_out(scores, max(round(keep_ratio * layers * groups), layers))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(groups) < widths[:, None, None]  # (layers, 1, groups)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, first.to(scores.device).expand_as(scores))


def _share_out(scores: Tensor, total: int) -> Tensor:
    """Divide a total width among the layers by their shares of the highest scores, `(layers,)`."""
    layers, experts, groups = scores.shape
    best = scores.flatten().argsort(descending=True, stable=True)[: total * experts]
    wanted = (best // (experts * groups)).bincount(minlength=layers).cpu() / experts  # (layers,)
    widths = wanted.floor().clamp(1, groups)
    while gap := total - int(widths.sum()):  # due to rounding, and to layers that must keep one
        room = widths < groups if gap > 0 else widths > 1
        need = torch.where(room, wanted - widths, -math.inf if gap > 0 else math.inf)
        widths[need.argmax() if gap > 0 else need.argmin()] += 1 if gap > 0 else -1
    return widths.long()


def classify_units(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classify units: those that all experts use, those that some use, and those that none uses.

    Args:
        masks: Bool. Shape `(..., experts, units)`.

    Returns:
        Masks of the shared, the specific and the inactive units, each unit in exactly one. Bool, each `(..., units)`.

    Source: The three kinds are the paper's.
    """
    shared, inactive = masks.all(dim=-2), ~masks.any(dim=-2)
    return shared, ~(shared | inactive), inactive
