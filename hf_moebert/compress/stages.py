"""Stages of a compression that every method shares, dispatched by the model."""

from transformers import PreTrainedModel

from hf_moebert.methods import mixture_of_masks, platon


def shrink(model: PreTrainedModel, *, multiple_of: int = 1, uniform: bool = False) -> PreTrainedModel:
    """Remove what a compressed model does not use: zero neurons and heads, or the units that fixed masks close.

    The outputs stay the same up to rounding.

    Args:
        model: A model whose units were pruned by PLATON, or one with fixed masks. It is not changed.
        multiple_of: Round the number of neurons of a pruned model up to a multiple of this: kernels prefer multiples
            of 8. Must be 1 for masks, whose widths follow from their `group_size`.
        uniform: Give all layers of a pruned model one width, so that the result is a stock model, which loads without
            this package: as many neurons as the widest one, and as many heads where the configuration has `head_dim`;
            other heads all stay. Must be False for masks.

    Returns:
        A smaller model with the same head.

    Raises:
        ValueError: If the model has no form without its unused units, its masks are not fixed, or `multiple_of` or
            `uniform` does not apply.
    """
    if not hasattr(getattr(model, "config", None), "mask_stage"):
        return platon.shrink(model, multiple_of=multiple_of, uniform=uniform)
    if multiple_of != 1:
        raise ValueError(
            f"`multiple_of` must be 1 for a model with masks, got {multiple_of!r}. Its widths follow from its masks: "
            f"use `from_dense(..., group_size={multiple_of!r})`."
        )
    if uniform:
        raise ValueError("`uniform` must be False for a model with masks, got True. Its widths follow from its masks.")
    return mixture_of_masks.shrink(model)
