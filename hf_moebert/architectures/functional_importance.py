"""The importance of the neurons of a feed-forward network, on tensors.

Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, eq. 4; the form through activations is our own, and equal
to it.
"""

import torch
from torch import Tensor


def weights_times_gradients(values: Tensor, gradients: Tensor, bias: Tensor | None, num_examples: int) -> Tensor:
    """Multiply each neuron's weights in one matrix by their gradients, and sum, for each example.

    With `z = W x + b`, the product `w_j . dL/dw_j` of the row of neuron j is the sum of `dL/dz_j (z_j - b_j)` over the
    example's tokens; with `y = W h`, that of its column is the sum of `dL/dh_j h_j`. So one backward of the summed
    loss serves the whole batch, and no gradient of a weight is needed.

    Args:
        values: What an up-projection returns, or what the down-projection is given. Shape `(batch, seq, blocks *
            intermediate)`, or with the first two in one.
        gradients: Of the summed loss with respect to `values`. Same shape.
        bias: Of an up-projection, which is not part of the score; `None` for no bias and for the down-projection.
        num_examples: Size of the batch.

    Returns:
        Shape `(batch, blocks * intermediate)`.
    """
    products = gradients * (values if bias is None else values - bias)
    return products.reshape(num_examples, -1, products.shape[-1]).sum(dim=1)


def neuron_importance(products: list[Tensor], num_neurons: int) -> Tensor:
    """Score each neuron of a feed-forward network by how much the loss of each example would change without it.

    To first order that is the absolute value of the sum of all its weights times their gradients: of its rows in the
    up-projection and, if there is one, the gate, and of its column in the down-projection.

    Args:
        products: From `weights_times_gradients`, for each matrix. Shapes `(batch, blocks * intermediate)`; a gate and
            an up-projection in one matrix are two blocks.
        num_neurons: `intermediate`.

    Returns:
        Sum over the examples. Shape `(intermediate,)`.
    """
    per_example = sum(product.unflatten(-1, (-1, num_neurons)).sum(dim=1) for product in products)  # (batch, neurons)
    return per_example.abs().sum(dim=0)


def draw_classes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a class from each distribution, by the inverse of its cumulative sum.

    Args:
        logits: Shape `(..., labels)`.
        uniform: Numbers drawn from [0, 1). Shape `(...)`.

    Returns:
        Classes, int64. Shape `(...)`.
    """
    cumulative = logits.detach().softmax(dim=-1).cumsum(dim=-1)
    place = torch.searchsorted(cumulative, uniform.unsqueeze(-1), right=True).squeeze(-1)
    return place.clamp(max=logits.shape[-1] - 1)  # where rounding leaves the sum below 1
