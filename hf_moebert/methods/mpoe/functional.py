"""Equations of MPOE: routing, the balance loss, and the draws of the gradient mask.

Source: Gao et al. 2022, https://arxiv.org/abs/2203.01104. Our own additions are marked.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def choose_expert(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the most probable expert of each token, and a gate of value 1 that carries the router's gradient.

    Args:
        logits: The router's, in float32. Shape `(tokens, experts)`.

    Returns:
        Index of the expert, the lowest one in ties, `(tokens,)`; and the gate, the probability divided by its own
        detached value, `(tokens, 1)`.

    Source: The authors' code.
    """
    probability, index = logits.softmax(dim=-1).max(dim=-1, keepdim=True)
    return index.squeeze(-1), probability / probability.detach()


def copy_to_experts(core: Tensor, num_experts: int, *, noise: float, generator: torch.Generator) -> Tensor:
    """Stack a copy of a tensor for every expert, with noise if wanted.

    Args:
        core: Any shape.
        num_experts: Number of experts.
        noise: Standard deviation, relative to the root mean square of the entries (our own design: the gauge then
            does not matter).
        generator: Source of the noise.

    Returns:
        Shape `(experts, *core.shape)`.
    """
    stack = core.repeat(num_experts, *[1] * core.dim())
    if noise:
        drawn = torch.randn(stack.shape, generator=generator, device=generator.device).to(core)
        stack += noise * core.square().mean().sqrt() * drawn
    return stack


def draw_mask(
    shape: Sequence[int], keep: float, *, seed: int, step: int, index: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw whether a central tensor, or each of its entries, is updated in one optimiser step.

    Args:
        shape: `()` for the whole tensor, or its shape.
        keep: Probability of an update, in [0, 1].
        seed: Seed of the run.
        step: Optimiser steps done before this one.
        index: Which central tensor.
        device: Device to draw on; devices of one kind draw the same.

    Returns:
        True where updated, of the given shape; independent of the global random state.

    Source: The paper masks the gradient of the central tensor at random; form and probability are our own.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64) < keep


def apply_mask(gradient: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Set a gradient to zero where there is no update, even if it is NaN there, and scale the rest.

    Args:
        gradient: The gradient of a central tensor.
        mask: From `draw_mask`.
        scale: Factor of the remaining gradient.

    Returns:
        Shape of `gradient`.
    """
    return torch.where(mask.to(gradient.device), gradient * scale, torch.zeros_like(gradient))
