"""Make a model faster at inference, on the machine it is on: `optimize_for_inference`, and the way back.

Modules change their class, and nothing else: while a model is optimised, its attention, feed-forward networks, experts
and other linear layers have classes that first look for a faster way, and otherwise do what they always did. Weights,
state dict and checkpoint stay what they are.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moebert.architectures.families import find_bert_like_classes

from .caching import Derived
from .linears import PRECISIONS, LinearForm, Precision, make_linear, why_not
from .optimized import (
    Optimized,
    OptimizedAttention,
    OptimizedExperts,
    OptimizedFeedForward,
    OptimizedLinear,
    is_plain,
)
from .unpadding import Unpadding, why_not_unpadded


logger = logging.get_logger(__name__)

ATTENTIONS = find_bert_like_classes("Attention")
LAYERS = find_bert_like_classes("Layer")


@torch.no_grad()
def optimize_for_inference(
    model: PreTrainedModel, *, precision: Precision = "float32", prepack: bool = True, skip_padding: bool = True
) -> PreTrainedModel:
    """Make a model faster at inference, without a trace in its weights or its checkpoint.

    Linear layers and stacked experts are packed for oneDNN, with one product for queries, keys and values and with the
    activation within the product; and padding is left out. Heads stay as they are. What this machine or this model
    does not support is skipped, with one line that says so.

    Calls that train, compile, export, or record more than the last hidden states run as before. In others, layers may
    see one row of all real tokens, and do not call the modules within them. Packed weights are copies: they take
    memory beside the weights. oneDNN keeps a program for each shape it meets: a model whose layers all differ in width
    needs a larger `ONEDNN_PRIMITIVE_CACHE_CAPACITY` than 1024.

    Args:
        model: A transformers model in float32. All parts apply to MoEBERT and to models with the layers of BERT,
            RoBERTa, XLM-RoBERTa, CamemBERT and Electra; others get packed linear layers.
        precision: What linear layers and experts compute in. `float32` changes outputs by rounding alone, by which a
            gate may decide a tie differently; `bfloat16` and `int8` (weights by output, activations by tensor as they
            come) cost accuracy: measure it.
        prepack: Whether oneDNN multiplies packed weights; in `int8` it always does.
        skip_padding: Whether only real tokens run through the encoder, whose outputs are then zero at padding. A batch
            in which a sentence begins with padding keeps it: heads read the first place of each row.

    Returns:
        The same model, in eval mode. `revert_optimizations` undoes it, and has to before `pickle`; calling this again
        replaces it.

    Raises:
        ValueError: If the precision does not exist, or the model is not one of transformers in float32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}, got {precision!r}.")
    if not isinstance(model, PreTrainedModel) or model.dtype != torch.float32:
        raise ValueError(
            f"`model` must be a transformers model in float32, got {type(model).__name__} in "
            f'{getattr(model, "dtype", None)}. Merge adapters first, and load with `dtype="float32"`.'
        )
    revert_optimizations(model).eval()
    precision, prepack, skip_padding = what_works(model, precision, prepack, skip_padding)
    if prepack or skip_padding or precision != "float32":
        change_classes(model.base_model, partial(make_linear, precision=precision, packed=prepack))
    if skip_padding:
        model.base_model.unpadding = Unpadding(model.base_model)
    return model


def revert_optimizations(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize_for_inference`; a model that is not optimised stays as it is.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, Optimized):
            module.__class__ = type(module).__bases__[1]
            for name in ("make_linear", "made_for", "made"):
                module.__dict__.pop(name, None)
        elif "unpadding" in module.__dict__:
            module.__dict__.pop("unpadding").remove()
    return model


def what_works(
    model: PreTrainedModel, precision: Precision, prepack: bool, skip_padding: bool
) -> tuple[Precision, bool, bool]:
    """Take away what this machine or this model does not support, and say so."""
    elsewhere = None if model.device.type == "cpu" else f"it needs a processor, the model is on {model.device}"
    if precision == "int8" and (reason := elsewhere or why_not("int8", True)):
        logger.warning(f"`precision` 'int8' is skipped, float32 stays: {reason}.")
        precision = "float32"
    if precision == "bfloat16" and not elsewhere and (reason := why_not("bfloat16", False)):
        logger.warning(f"`precision` 'bfloat16' is skipped, float32 stays: {reason}.")
        precision = "float32"
    if prepack and precision != "int8" and (reason := elsewhere or why_not(precision, True)):
        logger.warning(f"`prepack` is skipped: {reason}.")
        prepack = False
    if skip_padding and (reason := elsewhere or why_not_unpadded(model.base_model, is_attention)):
        logger.warning(f"`skip_padding` is skipped: {reason}.")
        skip_padding = False
    return precision, prepack, skip_padding


def change_classes(base: PreTrainedModel, make: Callable[..., LinearForm]) -> None:
    """Give every module that has a faster way the class that knows it, and say which cannot go it."""
    covered: set[nn.Module] = set()
    stuck = []
    for name, module in list(base.named_modules()):
        kind = kind_of(module)
        if kind is None or module in covered:
            continue
        module.__class__ = optimized_class(kind, type(module))  # type: ignore[arg-type]  # classes are hashable
        module.make_linear, module.made_for, module.made = make, base.device, Derived()
        covered.update(module.linears())
        with torch.autocast(base.device.type, enabled=False):
            if module.forms(torch.empty(1, 1, device=base.device)) is None:  # now, not in the first call
                stuck.append(name)
    if stuck:
        logger.warning(f"Linear layers that are wrapped, hooked or not in float32 stay as they are, in {stuck}.")
    experts = getattr(base.config, "_experts_implementation", None)
    if experts in ("grouped_mm", "batched_mm"):
        logger.warning(f"Experts stay as they are: their implementation is {experts!r}, not 'sorted_mm' or 'eager'.")


def kind_of(module: nn.Module) -> type[Optimized] | None:
    """Say which faster way a module has."""
    if is_attention(module) and module.self.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        return OptimizedAttention
    if class_name(module) in LAYERS and has_own_network(module):
        return OptimizedFeedForward
    if hasattr(module, "run_sorted"):
        return OptimizedExperts
    return OptimizedLinear if is_plain(module) else None


def has_own_network(layer: Any) -> bool:
    """Whether a layer's feed-forward network is the one that it was built with, and not experts in its place."""
    stem = class_name(layer).removesuffix("Layer")
    return (class_name(layer.intermediate), class_name(layer.output)) == (f"{stem}Intermediate", f"{stem}Output")


def is_attention(module: Any) -> bool:
    """Whether a module is attention as BERT computes it, to both sides and within the sentence."""
    return class_name(module) in ATTENTIONS and not module.is_cross_attention and not module.self.is_causal


def class_name(module: Any) -> str:
    """Name a module's class and where it is from."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


@cache
def optimized_class(kind: type, original: type) -> type:
    """Make the class of an optimised module; the original class stays among its bases."""
    return type(f"Optimized{original.__name__}", (kind, original), {"__module__": original.__module__})
