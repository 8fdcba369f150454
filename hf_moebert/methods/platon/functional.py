"""The equations of PLATON on tensors: statistics of weights and gradients, and masks.

A name that ends in `_` changes the tensors it is given, as in torch: the statistics take three times the memory of the
pruned weights, and new tensors at every step would cost more than the arithmetic. Everything runs in chunks that fit
into the cache.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


# Elements per chunk: few enough for the cache of a CPU core, enough to keep a GPU busy. Multiples of four.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 22
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


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


def sum_sensitivity(weight: Tensor, gradient: Tensor | None, dim: int) -> Tensor:
    """Sum the sensitivities of a matrix over its rows or columns, without a second matrix of them.

    Args:
        weight: Shape `(rows, columns)`.
        gradient: Of the loss; without it, sizes of weights are summed. Same shape.
        dim: The dimension that stays.

    Returns:
        Float32. Shape `(rows,)` for 0, `(columns,)` for 1.
    """
    rows, columns = weight.shape
    total = torch.zeros(weight.shape[dim], device=weight.device)
    scratch = _scratch(weight)
    height = max(1, len(scratch) // columns)
    for top in range(0, rows, height):
        some = slice(top, min(top + height, rows))
        values = scratch[: (some.stop - top) * columns].view(-1, columns)  # (height, columns)
        if gradient is None:
            torch.abs(weight[some].float(), out=values)
        else:
            sensitivity(weight[some], gradient[some], out=values)
        if dim == 0:
            total[some] = values.sum(1)
        else:
            total += values.sum(0)
    return total


def update_window_(window: Tensor, s: Tensor, position: int) -> None:
    """Add one step to the running mean of the sensitivity: `window = (window * position + s) / (position + 1)`.

    Args:
        window: Float32 mean so far. Shape `(n,)`.
        s: Sensitivity of the step. Shape `(n,)`.
        position: Number of steps in the mean so far.
    """
    window.lerp_(s, 1 / (position + 1))


def close_window_(
    window: Tensor, importance: Tensor, uncertainty: Tensor | None, s: Tensor, *, beta1: float, beta2: float
) -> None:
    """Update the averages with the mean of a window, and begin a new window with the current step.

    The uncertainty is the distance between the mean and the average after its update.

    Args:
        window: Float32 mean of the past window; becomes the sensitivity of the current step. Shape `(n,)`.
        importance: Average of the sensitivity. Shape `(n,)`.
        uncertainty: Average of its uncertainty, if that is to be known. Shape `(n,)`.
        s: Sensitivity of the current step. Shape `(n,)`.
        beta1: Decay of `importance`.
        beta2: Decay of `uncertainty`.

    Source: Zhang et al. 2022; AdaLoRA, eqs. 10 to 12. The window is that of the paper's code.
    """
    importance.lerp_(window, 1 - beta1)
    if uncertainty is not None:
        uncertainty.lerp_((window - importance).abs_(), 1 - beta2)
    window.copy_(s)


def update_movement_(movement: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Accumulate how far gradient descent pushes each weight away from zero: `movement -= weight * gradient`.

    Args:
        movement: Float32 sum so far. Shape `(n,)`.
        weight: Value of the weight, or the value it would have without its mask. Shape `(n,)`.
        gradient: Shape `(n,)`.

    Source: Sanh et al. 2020, https://arxiv.org/abs/2005.07683, section 4, up to the learning rate.
    """
    for part in chunks(movement.numel(), movement.device):
        movement[part].addcmul_(weight[part].float(), gradient[part].float(), value=-1)


def apply_mask_(weight: Tensor, keep: Tensor) -> None:
    """Set the weights that are not kept to +0.0, even NaN, and leave every bit of the others unchanged.

    Args:
        weight: Shape `(n,)`.
        keep: True at the weights that are kept. Shape `(n,)`.
    """
    weight.view(INTEGER_OF_SIZE[weight.element_size()]).mul_(keep)  # several times faster than `masked_fill_` on a CPU


def checksum(masks: Sequence[Tensor]) -> Tensor:
    """Hash masks to one number that almost certainly differs for different masks, int64, shape `(1,)`."""
    total = torch.zeros(1, dtype=torch.long, device=masks[0].device)
    for mask in masks:
        for part in chunks(mask.numel(), mask.device):
            places = torch.arange(1, part.stop - part.start + 1, device=mask.device)  # (n,)
            total = total * 1_000_003 + places[mask[part]].square().sum()  # wraps around
    return total


def fingerprint(weight: Tensor) -> int:
    """Sum the bits of a tensor, read as integers: equal for equal tensors, and almost never for different ones.

    Args:
        weight: Of a floating point type. Shape `(n,)`.
    """
    bits = weight.view(INTEGER_OF_SIZE[weight.element_size()])
    return sum(int(bits[part].sum(dtype=torch.long)) for part in chunks(weight.numel(), weight.device))


def _scratch(like: Tensor) -> Tensor:
    row = like.shape[1]  # of which at least one has to fit
    size = next(chunks(like.numel(), like.device), slice(0, 0))
    return torch.empty(max(size.stop - size.start, row), device=like.device)
