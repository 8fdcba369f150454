"""Which layers to keep, and how far the outputs of a model move without one."""

from typing import Literal

import torch
from torch import Tensor


Kind = Literal["classes", "labels", "numbers"]


def spread_layers(depth: int, keep: int) -> list[int]:
    """Choose layers that lie evenly, the first and the last among them: 0, 2, 4, 7, 9, 11 of twelve.

    Args:
        depth: Number of layers.
        keep: How many are chosen, in [1, depth]; one is the first.

    Source: the choice of Sanh et al. 2019 (DistilBERT), https://arxiv.org/abs/1910.01108, as their code spells it out
    for six layers of twelve. The rule for other numbers is our own.
    """
    return [round(index * (depth - 1) / max(keep - 1, 1)) for index in range(keep)]


def move_outputs(before: Tensor, after: Tensor, kind: Kind) -> Tensor:
    """Compute how far outputs have moved.

    Args:
        before: Outputs of a model. Shape `(..., outputs)`.
        after: Outputs of another one. Shape `(..., outputs)`.
        kind: Logits of one of several "classes", whose divergence is meant (Kullback and Leibler, in nats); of
            independent "labels", likewise, summed; or "numbers", whose squared distance is meant, relative to their
            squared length.

    Returns:
        Shape `(...)`, float32.
    """
    before, after = before.float(), after.float()
    if kind == "numbers":
        return (after - before).square().sum(dim=-1) / before.square().sum(dim=-1).clamp(min=1e-12)
    if kind == "classes":
        logs, moved = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
        return (logs.exp() * (logs - moved)).sum(dim=-1)
    signs = torch.tensor([1.0, -1.0], device=before.device)
    logs, moved = (torch.nn.functional.logsigmoid(x[..., None] * signs) for x in (before, after))
    return (logs.exp() * (logs - moved)).sum(dim=(-2, -1))
