"""Split single-task models into a trunk and branches, and join these again."""

import copy
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.bert.modeling_bert import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.stacks import refuse_forms
from hf_moebert.architectures.stock import stock_classes
from hf_moebert.architectures.surgery import get_part
from hf_moebert.methods.masked_crf.modeling_masked_crf import BertCrfForTokenClassification

from .configuration_multitask import multitask_config
from .modeling_trunk import Trunk, layers_of, new_branch, new_trunk, row_of


HEADS: dict[str, type[PreTrainedModel]] = {
    head.__name__: head
    for head in (
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
        BertCrfForTokenClassification,
    )
}


FAMILIES = sorted(family for family, row in ARCHITECTURES.items() if row.trunk is not None)
KINDS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
STOCK_LAYERS = "Merge the dense models: trunk and branches are of stock layers, and see no token ids to route by"
OF_ALL_LAYERS = "embeddings.shared."  # in a trunk: what all layers read


def find_head(name: str) -> type[PreTrainedModel] | None:
    """Return the class of a single-task model by its name, or None if there is no such class for tasks."""
    if name in HEADS:
        return HEADS[name]
    head: Any = getattr(transformers, name, None)
    dense: Any = getattr(head, "config_class", None)
    if getattr(dense, "model_type", None) not in FAMILIES:
        return None
    known = stock_classes(dense)
    return head if head in [known.get(kind) for kind in KINDS] else None


def trunk_config(model: PreTrainedModel, num_layers: int) -> Any:
    """Return the configuration of the trunk of a single-task model."""
    if isinstance(model.config, BertConfig):
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = num_layers
        return config
    config = multitask_config(type(model.config)).from_single_task(model.config, num_layers)
    config._attn_implementation = model.config._attn_implementation
    return config


def take_trunk(model: PreTrainedModel, num_layers: int) -> Trunk:
    """Copy the embeddings and the first layers of a single-task model.

    Args:
        model: One of `HEADS`. It is not changed.
        num_layers: Number of layers of the trunk.

    Raises:
        ValueError: If the model is of another class, or has fewer layers.
    """
    check_single_task(model)
    if not 0 <= num_layers <= model.config.num_hidden_layers:
        raise ValueError(
            f"`num_layers` must be in [0, {model.config.num_hidden_layers}], got {num_layers}. Use "
            "`model.config.frozen_layers`."
        )
    config = trunk_config(model, num_layers)
    with no_init_weights():
        trunk = new_trunk(config)
    fill(trunk, trunk_state(model, num_layers))
    return trunk.to(model.device)


def take_branch(model: PreTrainedModel, frozen_layers: int, num_layers: int | None = None) -> PreTrainedModel:
    """Copy the layers of a single-task model above its first ones, and its head.

    Args:
        model: One of `HEADS`. It is not changed.
        frozen_layers: Number of first layers that belong to the trunk, as do the embeddings.
        num_layers: Number of layers of the branch, by default all above.

    Returns:
        A model of the same class, in eval mode, that takes the trunk's states as `inputs_embeds`.

    Raises:
        ValueError: If the model is of another class, or has fewer layers.
    """
    check_single_task(model)
    depth = model.config.num_hidden_layers
    if not 0 <= frozen_layers < depth:
        raise ValueError(f"`frozen_layers` must be in [0, {depth}), got {frozen_layers}. Leave a layer to the task.")
    count = depth - frozen_layers if num_layers is None else num_layers
    if not 0 < count <= depth - frozen_layers:
        raise ValueError(
            f"`num_layers` must be in [1, {depth - frozen_layers}] after {frozen_layers} of {depth} layers, got "
            f"{count}. Leave it out to take all."
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.frozen_layers = count, frozen_layers
    with no_init_weights():
        branch = new_branch(type(model), config)
    state = model.state_dict()
    layers = f"{model.base_model_prefix}.{row_of(model).stacks[0].path}."
    for name in branch.state_dict():
        if name.startswith(layers):
            index, _, rest = name.removeprefix(layers).partition(".")
            state[name] = model.get_parameter(f"{layers}{int(index) + frozen_layers}.{rest}").detach()
    fill(branch, {name: state[name] for name in branch.state_dict()})
    return branch.to(model.device).eval()


def join(trunk: Trunk, branch: PreTrainedModel) -> PreTrainedModel:
    """Join a trunk and a branch to a plain single-task model.

    Args:
        trunk: Trunk of at least the branch's `config.frozen_layers` layers. It is not changed.
        branch: Branch from `take_branch`. It is not changed.

    Returns:
        A model of the branch's class, in eval mode; its `config.frozen_layers` is where it was split.

    Raises:
        ValueError: If the trunk is not deep enough.
    """
    frozen, own = branch.config.frozen_layers, branch.config.num_hidden_layers
    if frozen > len(trunk.layer):
        raise ValueError(f"`trunk` must have at least {frozen} layers, got {len(trunk.layer)}. Take a deeper one.")
    config = copy.deepcopy(branch.config)
    config.num_hidden_layers = frozen + own
    with no_init_weights():
        model = type(branch)(config)
    row, prefix = row_of(branch), f"{branch.base_model_prefix}."
    layers, shared = f"{prefix}{row.stacks[0].path}.", trunk.state_dict()
    words = {name: tensor for name, tensor in shared.items() if name.startswith("embeddings.")}
    state = {f"{prefix}{name}": x for name, x in words.items() if not name.startswith(OF_ALL_LAYERS)}
    for name, tensor in shared.items():
        if name.startswith("layer.") and int(name.split(".")[1]) < frozen:
            state[f"{layers}{name.removeprefix('layer.')}"] = tensor
    for name, tensor in branch.state_dict().items():  # what all layers read is in both
        if name.startswith(layers):
            index, _, rest = name.removeprefix(layers).partition(".")
            name = f"{layers}{int(index) + frozen}.{rest}"
        state[name] = tensor
    fill(model, state)
    return model.to(branch.device).eval()


def trunk_state(model: PreTrainedModel, num_layers: int) -> dict[str, Tensor]:
    """Return the tensors of a single-task model's embeddings and first layers, named as in a trunk."""
    base: Any = model.base_model
    parts = {"embeddings": base.embeddings} | {f"layer.{i}": layers_of(model)[i] for i in range(num_layers)}
    for path in row_of(model).trunk or ():
        if (part := get_part(base, path)) is not None:
            parts[f"{OF_ALL_LAYERS}{path.rpartition('.')[2]}"] = part
    return {f"{path}.{name}": x for path, part in parts.items() for name, x in part.state_dict().items()}


def check_single_task(model: PreTrainedModel) -> None:
    """Refuse everything but a plain single-task BERT with all its weights in memory.

    Raises:
        ValueError: If the model is of another class, quantized, a branch, a decoder, or offloaded, or has adapters.
    """
    refuse_forms(
        model,
        "dense to become a task",
        *("adapters", "chains"),
        experts=STOCK_LAYERS,
        masks=STOCK_LAYERS,
        shrunk="Give its layers one width, by `shrink(pruned, uniform=True)` or `prune_structured(..., uniform=True)`",
        tasks="Add its tasks one by one, as `extract_task` returns them",
    )
    if find_head(type(model).__name__) is not type(model):
        raise ValueError(
            f"`model` must be one of {', '.join(HEADS)}, or have such a head on a body of one of {FAMILIES}, got "
            f"{type(model).__name__}. Merge adapters, and load the checkpoint with one of these classes."
        )
    if (method := getattr(model, "quantization_method", None)) is not None:
        raise ValueError(f"`model` must be dense, but its form is {method!r}. Load it in its own dtype.")
    if model.main_input_name == "inputs_embeds":
        raise ValueError("`model` must have embeddings, got a branch. `join` it with its trunk first.")
    if get_part(model.base_model, "encoder.conv") is not None:
        raise ValueError("`model` must be of layers alone, but a convolution follows its first one. Use another one.")
    if getattr(model.config, "is_decoder", False) or getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            "`model` must be an encoder, but `config.is_decoder` is set. Load it with `is_decoder=False`."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are not. Load it without offloading.")


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all weights of a module to copies of those of a state, in their own dtypes."""
    module.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
