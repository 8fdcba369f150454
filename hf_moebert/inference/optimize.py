"""Make a model faster at inference on the machine it is on, and undo it.

Only the classes of modules change: while a model is optimised, its attention, feed-forward networks, experts and other
linear layers have classes that try a faster computation first, and otherwise do what they always did. Weights, state
dict and checkpoint stay what they are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_moebert.architectures.families import find_bert_like_classes
from hf_moebert.architectures.protocols import SortedExperts

from .caching import Derived
from .linears import PRECISIONS, InferenceLinear, Precision, make_linear, unsupported_reason
from .optimized import (
    OptimizedAttention,
    OptimizedDistilAttention,
    OptimizedDistilNetwork,
    OptimizedExperts,
    OptimizedFeedForward,
    OptimizedLinear,
    OptimizedModule,
    is_plain_linear,
    make_optimized_class,
)
from .smoothing import measure_inputs
from .unpadding import Unpadding, unpadding_unsupported_reason


logger = logging.get_logger(__name__)

ATTENTIONS = find_bert_like_classes("Attention")
LAYERS = find_bert_like_classes("Layer")
DISTIL = "transformers.models.distilbert.modeling_distilbert."


@torch.no_grad()
def optimize_for_inference(
    model: PreTrainedModel, *, precision: Precision = "float32", prepack: bool = True, skip_padding: bool = True
) -> PreTrainedModel:
    """Make a model faster at inference, without a trace in its weights or its checkpoint.

    Linear layers and stacked experts are packed for oneDNN, with one product for queries, keys and values and with the
    activation within the product; and padding is left out. Heads stay as they are. What this machine or this model
    does not support is skipped with a warning of one line.

    Calls that train, compile, export, or record more than the last hidden states run as before. In others, layers may
    see one row of all real tokens, and do not call the modules within them. Packed weights are copies: they take
    memory beside the weights. oneDNN keeps a program for each shape it meets: a model whose layers all differ in width
    needs a larger `ONEDNN_PRIMITIVE_CACHE_CAPACITY` than 1024.

    Args:
        model: A transformers model in float32. All parts apply to MoEBERT, DistilBERT, models with the layers of BERT,
            RoBERTa, XLM-RoBERTa, CamemBERT and Electra, and a CRF around these; others get packed linear layers.
        precision: Precision of linear layers and experts. `float32` changes outputs by rounding alone, by which a
            gate may decide a tie differently; `bfloat16` and `int8` (weights quantised per output, activations
            dynamically per row) cost accuracy: measure it. In int8, too, a text's answer does not depend on the
            others in its batch. `int8` first runs the model on drawn ids, to see which channels are large.
        prepack: Whether oneDNN multiplies packed weights; in `int8` it always does.
        skip_padding: Whether only real tokens run through the encoder, whose outputs are then zero at padding. A batch
            in which a sentence begins with padding keeps it, because heads read the first place of each row.

    Returns:
        The same model, in eval mode. `revert_optimizations` undoes it; calling this again replaces it. Copies, also
        in other processes, are optimised as well, and so is a model that was moved to another dtype and back.

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
    precision, prepack, skip_padding = check_support(model, precision, prepack, skip_padding)
    base = body_of(model)
    if prepack or skip_padding or precision != "float32":
        peaks = measure_inputs(base) if precision == "int8" else {}
        swap_classes(base, partial(make_linear, precision=precision, packed=prepack), peaks)
    if skip_padding:
        base.unpadding = Unpadding(base)
    return model


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without its heads, also where one is around another, as a CRF is around any tagger."""
    base = model.base_model
    return base if base is model or not isinstance(base, PreTrainedModel) else body_of(base)


def revert_optimizations(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize_for_inference`; a model that is not optimised stays as it is.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            module.__class__ = type(module).__bases__[1]
            for name in ("make_linear", "optimized_device", "built", "peaks"):
                module.__dict__.pop(name, None)
        elif "unpadding" in module.__dict__:
            module.__dict__.pop("unpadding").remove()
    return model


def check_support(
    model: PreTrainedModel, precision: Precision, prepack: bool, skip_padding: bool
) -> tuple[Precision, bool, bool]:
    """Return the options that this machine and this model support, and warn of each that is dropped."""
    elsewhere = None if model.device.type == "cpu" else f"it needs the CPU, the model is on {model.device}"
    if precision == "int8" and (reason := elsewhere or unsupported_reason("int8", True)):
        logger.warning(f"`precision` 'int8' is skipped, float32 stays: {reason}.")
        precision = "float32"
    if precision == "bfloat16" and not elsewhere and (reason := unsupported_reason("bfloat16", False)):
        logger.warning(f"`precision` 'bfloat16' is skipped, float32 stays: {reason}.")
        precision = "float32"
    if prepack and precision != "int8" and (reason := elsewhere or unsupported_reason(precision, True)):
        logger.warning(f"`prepack` is skipped: {reason}.")
        prepack = False
    if skip_padding and (reason := elsewhere or unpadding_unsupported_reason(body_of(model), is_known_attention)):
        logger.warning(f"`skip_padding` is skipped: {reason}.")
        skip_padding = False
    return precision, prepack, skip_padding


def swap_classes(
    base: PreTrainedModel, make: Callable[..., InferenceLinear], peaks: Mapping[nn.Module, Tensor]
) -> None:
    """Give every module that can be faster its optimised class, and warn of those that stay as they are."""
    covered: set[nn.Module] = set()
    unchanged = []
    for name, module in list(base.named_modules()):
        mixin = find_optimized_class(module)
        if mixin is None or module in covered:
            continue
        module.__class__ = make_optimized_class(mixin, type(module))  # type: ignore[arg-type]  # classes are hashable
        module.make_linear, module.optimized_device, module.built = make, base.device, Derived()
        module.peaks = peaks.get(module.first_reader())
        covered.update(module.replaced_linears())
        with torch.autocast(base.device.type, enabled=False):
            if module.inference_linears(torch.empty(1, 1, device=base.device)) is None:  # now, not in the first call
                unchanged.append(name)
    if unchanged:
        logger.warning(f"Linear layers that are wrapped, hooked or not in float32 stay as they are, in {unchanged}.")
    if others := [name for name, module in base.named_modules() if is_other_linear(module)]:
        logger.warning(
            f"Linear layers of other forms, such as chains of cores, stay as they are, {len(others)} of them, first "
            f"{others[0]!r}. Make the model dense first, as by `to_dense`."
        )
    experts = getattr(base.config, "_experts_implementation", None)
    if experts in ("grouped_mm", "batched_mm"):
        logger.warning(f"Experts stay as they are: their implementation is {experts!r}, not 'sorted_mm' or 'eager'.")


def is_other_linear(module: nn.Module) -> bool:
    """Check whether a module is a linear layer of a form that has no faster class: chains, adapters, `Conv1D`."""
    return not isinstance(module, nn.Linear) and (hasattr(module, "in_features") or hasattr(module, "nf"))


def find_optimized_class(module: nn.Module) -> type[OptimizedModule] | None:
    """Return the class that makes a module faster, or None if there is none."""
    if is_bert_attention(module) and module.self.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        return OptimizedAttention
    if class_name(module) == f"{DISTIL}DistilBertSelfAttention":
        return OptimizedDistilAttention if module.config._attn_implementation == "sdpa" else None  # type: ignore[union-attr]
    if class_name(module) == f"{DISTIL}FFN":
        return OptimizedDistilNetwork
    if class_name(module) in LAYERS and has_own_network(module):
        return OptimizedFeedForward
    if isinstance(module, SortedExperts):
        return OptimizedExperts
    return OptimizedLinear if is_plain_linear(module) else None


def has_own_network(layer: Any) -> bool:
    """Check whether a layer's feed-forward network is the one it was built with, and was not replaced by experts."""
    stem = class_name(layer).removesuffix("Layer")
    return (class_name(layer.intermediate), class_name(layer.output)) == (f"{stem}Intermediate", f"{stem}Output")


def is_bert_attention(module: Any) -> bool:
    """Check whether a module is attention as BERT computes it: bidirectional, and within the sentence."""
    return class_name(module) in ATTENTIONS and not module.is_cross_attention and not module.self.is_causal


def is_known_attention(module: Any) -> bool:
    """Check whether a module is attention that has an optimised class, which keeps sentences apart."""
    return is_bert_attention(module) or class_name(module) == f"{DISTIL}DistilBertSelfAttention"


def class_name(module: Any) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
