"""How a model's outputs are moved, without labels: directions of the outputs, and moments of a layer's inputs.

A small change `d` of a classifier's logits moves its distribution by `d^T F d / 2` nats (Kullback and Leibler), where
`F = diag(p) - p p^T`. A direction `v` with `E[v v^T] = F` turns that into `(v^T d)^2`, so that one backward of `v^T
logits` gives, at any layer, a sample of what changes there do to the model's own outputs.

Source: Martens 2014 (natural gradient and Gauss-Newton), https://arxiv.org/abs/1412.1193; Martens and Grosse 2015
(K-FAC), https://arxiv.org/abs/1503.05671. That tokens count by their gradients is our own design.
"""

from typing import Literal

import torch
from torch import Tensor


Kind = Literal["classes", "labels", "numbers"]


def draw_direction(outputs: Tensor, kind: Kind, generator: torch.Generator) -> Tensor:
    """Draw a random direction whose second moments are the curvature of the divergence from the outputs.

    Args:
        outputs: Shape `(..., outputs)`.
        kind: Logits of one of several "classes", of independent "labels", or "numbers", whose squares count alike.
        generator: Of the draw, on a CPU.

    Returns:
        Shape of `outputs`.
    """
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    if kind == "numbers":
        return noise
    if kind == "labels":
        share = outputs.sigmoid()
        return (share * (1 - share)).sqrt() * noise
    share = outputs.softmax(dim=-1)
    noise = share.sqrt() * noise
    return noise - share * noise.sum(dim=-1, keepdim=True)


def with_constant(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Append a constant of 1 to inputs `(tokens, in)` of a layer that has a bias."""
    return inputs if bias is None else torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Append a bias to a weight `(out, in)` as one more column, in float64."""
    columns = [weight] if bias is None else [weight, bias[:, None]]
    return torch.cat(columns, dim=1).detach().double()
