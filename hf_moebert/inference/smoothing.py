"""Even out the inputs of int8 layers, whose few largest channels would leave few steps to all others."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.protocols import SortedExperts


DRAWN = (8, 32)  # texts and tokens
SMALLEST = 1e-5  # of a channel and of a column, so that neither is divided by zero


def measure_inputs(base: PreTrainedModel) -> dict[nn.Module, Tensor]:
    """Run a model on drawn ids, and return the largest absolute value of each input channel, by module.

    Which channels are large hardly depends on the text. That drawn ids show them, without any data, is our own find.

    Args:
        base: A model in eval mode without its head.

    Returns:
        For each linear layer and mixture of experts, shape `(in,)`; nothing for a model that needs more than ids.
    """
    peaks: dict[nn.Module, Tensor] = {}
    if base.main_input_name != "input_ids" or not hasattr(base.config, "vocab_size"):
        return peaks

    def watch(module: nn.Module, args: tuple) -> None:
        if args and args[0].numel():
            peak = args[0].detach().abs().flatten(0, -2).amax(dim=0)
            peaks[module] = torch.maximum(peaks[module], peak) if module in peaks else peak

    texts, tokens = DRAWN
    shape = (texts, min(tokens, count_positions(base) or tokens))
    ids = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    modules: list[Any] = [module for module in base.modules() if isinstance(module, nn.Linear | SortedExperts)]
    handles = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        base(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it needs more than ids
        peaks.clear()
    finally:
        for handle in handles:
            handle.remove()
    return peaks


def smoothing_factors(peaks: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return a factor for each input channel, which the columns of the weight are divided by.

    Args:
        peaks: Largest absolute value of each channel, if it is known. Shape `(in,)`.
        weight: Shape `(out, in)`, or `(experts, out, in)`.

    Returns:
        Shape `(in,)`, with the geometric mean 1.

    Source: Xiao et al. 2022, https://arxiv.org/abs/2211.10438, eq. 4 with alpha 0.5.
    """
    if peaks is None or not peaks.isfinite().all():
        return None
    columns = weight.detach().abs().flatten(0, -2).amax(dim=0)
    factors = (columns.clamp(min=SMALLEST) / peaks.clamp(min=SMALLEST)).sqrt()
    return factors / factors.log().mean().exp()
