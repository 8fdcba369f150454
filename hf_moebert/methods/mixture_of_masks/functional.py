"""The equations of learned masks on tensors: hard concrete draws, routing, the constraint, and classes of units.

What the paper (Liu et al. 2025, "Masks Can be Learned as an Alternative to Experts", ACL) publishes is the idea: each
expert is a mask on the activations of a feed-forward network, learned with an L0 penalty from all open to half open.
Its parametrisation, router and schedule are not known to us: all that is here is our own design after the standard
tools that are named.
"""

import math

import torch
from torch import Tensor


TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as its authors have them
SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # the score at which a mask is open with probability 1/2
NOISE_MARGIN = 1e-6  # noise of 0 or 1 would have infinite logits


def draw_masks(scores: Tensor, noise: Tensor) -> Tensor:
    """Draw masks from the hard concrete distribution: exactly 0 and exactly 1 both have a probability.

    Args:
        scores: `log alpha` of each mask. Any shape.
        noise: Uniform in [0, 1]. Of the same shape.

    Returns:
        In [0, 1], with a gradient for the scores where it is strictly between. Float32, of the same shape.

    Source: Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eqs. 10 and 11.
    """
    logits = noise.float().clamp(NOISE_MARGIN, 1 - NOISE_MARGIN).logit()
    return _stretch(torch.sigmoid((logits + scores.float()) / TEMPERATURE))


def settle_masks(scores: Tensor) -> Tensor:
    """Return what a mask is without noise, in [0, 1]: the value used outside of training.

    Source: Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eq. 13.
    """
    return _stretch(torch.sigmoid(scores.float()))


def open_probability(scores: Tensor) -> Tensor:
    """Return the probability that a drawn mask is not zero.

    That of a one is what is left of the same function of the negative scores: the distribution is symmetric.

    Source: Louizos et al. 2018, https://arxiv.org/abs/1712.01312, eq. 12.
    """
    return torch.sigmoid(scores.float() - SHIFT)


def _stretch(values: Tensor) -> Tensor:
    return (values * (HIGH - LOW) + LOW).clamp(0, 1)


def choose_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the most probable experts of each token, and the weight of each.

    Args:
        logits: Of the router. Shape `(tokens, experts)`.
        top_k: Experts of a token.

    Returns:
        Index, ties going to the lowest, and weights that sum to 1; that of a single expert is of value 1 and carries
        the router's gradient (straight-through). Both `(tokens, top_k)`, weights in float32.
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
    return spread @ masks  # a product, because its backward is one too: an index would have to be scattered


def active_share(open_masks: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Return the share of the units of a layer that a token uses, in the mean over tokens.

    A unit is used if it is open in any of the token's experts; masks are independent of each other.

    Args:
        open_masks: Probability that each mask is open, or whether it is. Shape `(experts, units)`.
        index: Experts of each token. Shape `(tokens, top_k)`.
        real: True at tokens that count; if none does, all do. Shape `(tokens,)`.

    Returns:
        Scalar, with a gradient for `open_masks`, but none for the shares of tokens.
    """
    real = real | ~real.any()  # padding alone must not look like a model without units
    if index.shape[1] == 1:
        chosen = chosen_experts(index, real, len(open_masks)).sum(dim=0)  # (experts,)
        # Not `@`, which autocast would round
        return (chosen / real.sum().clamp(min=1) * open_masks.mean(dim=1)).sum()
    sets, counts = index[real].sort(dim=1).values.unique(dim=0, return_counts=True)  # few: tokens choose the same ones
    closed = (1 - open_masks)[sets].prod(dim=1)  # (sets, units)
    return (counts / counts.sum().clamp(min=1) * (1 - closed).mean(dim=1)).sum()


def chosen_experts(index: Tensor, real: Tensor, num_experts: int) -> Tensor:
    """Mark the experts of each token, none where a token does not count.

    Args:
        index: Shape `(tokens, top_k)`.
        real: True at tokens that count. Shape `(tokens,)`.
        num_experts: How many there are.

    Returns:
        1.0 or 0.0. Shape `(tokens, experts)`.
    """
    chosen = torch.zeros(len(index), num_experts, device=index.device)
    return chosen.scatter(1, index, 1.0) * real[:, None]


def sparsity_penalty(sparsity: Tensor, target: float | Tensor, multipliers: Tensor) -> Tensor:
    """Return the augmented Lagrangian of `sparsity = target`; the multipliers are to be maximised over.

    Args:
        sparsity: Expected share of units that are not used, one for each budget. Shape `(budgets,)`.
        target: What it is to be.
        multipliers: Of the linear and of the squared difference. Shape `(2, budgets)`.

    Returns:
        Scalar, the sum over the budgets.

    Source: Wang et al. 2020, https://arxiv.org/abs/1910.04732, section 3.3.
    """
    gap = sparsity - target
    return (multipliers[0] * gap + multipliers[1] * gap.square()).sum()


def balance_loss(logits: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Penalise a router for using its experts unevenly.

    Args:
        logits: Shape `(tokens, experts)`.
        index: Experts of each token. Shape `(tokens, top_k)`.
        real: True at tokens that count. Shape `(tokens,)`.

    Returns:
        `experts * sum(share of choices * mean probability)`: 1 if both are uniform. Scalar.

    Source: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, section 2.2.
    """
    experts = logits.shape[-1]
    total = real.sum().clamp(min=1)
    probabilities = (logits.float().softmax(dim=-1) * real[:, None]).sum(dim=0) / total  # (experts,)
    shares = chosen_experts(index, real, experts).sum(dim=0) / (total * index.shape[1])  # (experts,)
    return experts * (shares * probabilities).sum()


def choose_masks(scores: Tensor, active: float | None, *, by_layer: bool = False) -> Tensor:
    """Decide which masks stay open for good.

    Each layer gets as many as it has among the highest scores of all. All of its experts get the same number of them,
    their own highest: so a token uses that many units of the layer, whichever expert it goes to.

    Args:
        scores: Shape `(layers, experts, groups)`.
        active: Share of the masks that stay open, in (0, 1]. `None` keeps as many as are open with a probability of at
            least 1/2.
        by_layer: Whether each layer has the same share.

    Returns:
        Bool, of the same shape. At least one mask of every expert is open; ties go to the lowest index.

    Raises:
        ValueError: If scores are not finite, or the share is not in (0, 1].
    """
    if not scores.isfinite().all():
        raise ValueError("`scores` must be finite, got NaN or infinity. Train again with a smaller `score_rate`.")
    if active is None:
        active = float((scores >= SHIFT).float().mean())
    elif type(active) not in (int, float) or not 0 < active <= 1:
        raise ValueError(f"`active` must be a number in (0, 1], got {active!r}. Use 0.5 to use half of the units.")
    layers, _, groups = scores.shape
    if by_layer:
        widths = torch.full((layers,), max(round(active * groups), 1))
    else:
        widths = _share_out(scores, max(round(active * layers * groups), layers))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(groups) < widths[:, None, None]  # (layers, 1, groups)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, first.to(scores.device).expand_as(scores))


def _share_out(scores: Tensor, total: int) -> Tensor:
    """Deal a total width out to layers by how many of the highest scores each has, `(layers,)`."""
    layers, experts, groups = scores.shape
    best = scores.flatten().argsort(descending=True, stable=True)[: total * experts]
    wanted = (best // (experts * groups)).bincount(minlength=layers).cpu() / experts  # (layers,)
    widths = wanted.floor().clamp(1, groups)
    while gap := total - int(widths.sum()):  # rounding, and layers that would have been left without any
        room = widths < groups if gap > 0 else widths > 1
        need = torch.where(room, wanted - widths, -math.inf if gap > 0 else math.inf)
        widths[need.argmax() if gap > 0 else need.argmin()] += 1 if gap > 0 else -1
    return widths.long()


def classify_units(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tell the units that all experts use from those that some use, and those that none uses.

    Args:
        masks: Bool. Shape `(..., experts, units)`.

    Returns:
        Whether each unit is shared, specific, or inactive: exactly one of them. Bool, each `(..., units)`.

    Source: The three kinds are the paper's.
    """
    shared, inactive = masks.all(dim=-2), ~masks.any(dim=-2)
    return shared, ~(shared | inactive), inactive


def real_tokens(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Say which of the newest tokens are not padding.

    Args:
        mask: `None`, or `(batch, past + seq)` of any dtype, or boolean or additive `(batch, 1, seq, past + seq)`,
            where a real token is one that some other may look at.
        shape: `(batch, seq)`.
        device: Of the tokens.

    Returns:
        True at real tokens. Shape `(batch * seq,)`.
    """
    if mask is None:
        return torch.ones(shape.numel(), dtype=torch.bool, device=device)
    if mask.dim() > 2:
        allowed = mask if mask.dtype == torch.bool else mask >= 0  # 0, or very negative
        mask = allowed.flatten(1, -2).any(dim=1)
    return mask.to(device, torch.bool)[:, -shape[1] :].flatten()
