"""Build a model anew for another configuration, and what such a model must be."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_moebert.architectures.stacks import refuse_forms


def check_model(model: Any) -> None:
    """Refuse what is no model of plain weights in memory.

    Raises:
        ValueError: If it is wrapped, offloaded, quantized, decomposed, or holds an adapter.
    """
    refuse_forms(model, "plain to be trimmed", "adapters")
    is_model = isinstance(model, PreTrainedModel) and not hasattr(model, "_orig_mod")  # of torch.compile
    if not is_model:
        raise ValueError(
            f"`model` must be a model of transformers, got {type(model).__name__}. Unwrap it (`.module`, "
            "`._orig_mod`), and merge an adapter by `merge_and_unload`."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")
    form = getattr(model.config, "quantization_config", None)
    if form is not None:
        name = getattr(form, "quant_method", type(form).__name__)
        raise ValueError(
            f"`model` must hold plain weights, got the form {str(name)!r}. Trim the model first, and decompose or "
            "quantize it afterwards."
        )


def name_nested(model: PreTrainedModel) -> str:
    """Return the name of a model within a model, if its configuration is within that one's, too; else nothing."""
    prefix = model.base_model_prefix
    return prefix if isinstance(getattr(model.config, prefix or "-", None), PreTrainedConfig) else ""


def edit_config(config: PreTrainedConfig, edit: Callable[[dict[str, Any]], None]) -> PreTrainedConfig:
    """Return a copy of a configuration whose fields were edited as config.json holds them, and are checked again."""
    fields = copy.deepcopy(config.to_dict())
    edit(fields)
    edited = type(config).from_dict(fields)
    edited._attn_implementation = config._attn_implementation
    edited.name_or_path = config.name_or_path
    return edited


def build_like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of the same class, dtype, device and mode; its weights hold anything."""
    pooling = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    with torch.random.fork_rng(devices=[]), no_init_weights():
        built = type(model)(config, **pooling)
    return built.to(dtype=model.dtype, device=model.device).train(model.training)


def fill(built: PreTrainedModel, state: dict[str, Tensor], model: PreTrainedModel) -> None:
    """Load weights into a model that was built like another one, and what else that one holds.

    Raises:
        ValueError: If the weights are not those of the class, because a module of the model was replaced.
    """
    try:
        built.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"`model` must be as {type(model).__name__} builds it, but its weights are others: "
            f"{' '.join(str(error).split())[:200]}. Undo optimizations, and merge adapters."
        ) from error
    built.tie_weights()
    if model.can_generate():
        built.generation_config = copy.deepcopy(model.generation_config)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
