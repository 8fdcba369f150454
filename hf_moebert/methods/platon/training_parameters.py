"""The choice of the parameters to prune: by the module they belong to, never by parts of their names."""

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_moebert.architectures.stacks import refuse_forms

from .modeling_units import UnitGroup
from .recipe import PlatonConfig


logger = logging.get_logger(__name__)
UNFREEZE = "Unfreeze them by `model.requires_grad_(True)`: PEFT's `merge_and_unload` leaves all weights frozen."


def find_prunable(model: nn.Module, config: PlatonConfig) -> dict[str, nn.Parameter]:
    """Choose the weights of linear layers and of stacked experts, with their biases for `include_bias`.

    Args:
        model: Any model; frozen parameters are left out, tied ones count once.
        config: The recipe, which names the modules; by default those inside any `nn.ModuleList` of the model without
            its head, which are the repeated layers.

    Returns:
        Parameters by name, in the order of the model.

    Raises:
        ValueError: If nothing is left, with the possible modules, or the model is one of chains or many tasks.
    """
    refuse_forms(model, "dense to lose single weights", "chains", "tasks")
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}  # of torch.compile
    for path in config.modules or []:
        if path not in modules:
            raise ValueError(f"`modules` must be paths of modules of the model, got {path!r}. {_choices(modules)}")
    body = set(getattr(model, "base_model", model).modules())
    roots = config.modules or [
        n for n, module in modules.items() if isinstance(module, nn.ModuleList) and module in body
    ]
    found: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        if any(name == root or name.startswith(f"{root}.") for root in roots):
            for key, parameter in _weights_of(module, config.include_bias):
                found.setdefault(parameter, f"{name}.{key}")  # a tied parameter has its first name
    chosen = {name: parameter for parameter, name in found.items() if parameter.requires_grad}
    if not chosen:
        what = "all of them are frozen" if found else f"there are none in {roots or 'the model'}"
        remedy = UNFREEZE if found and not config.modules else _choices(modules)
        raise ValueError(f"`modules` must hold trainable linear layers, but {what}. {remedy}")
    if len(chosen) < len(found):
        logger.warning(f"{len(found) - len(chosen)} of {len(found)} parameters are frozen and so not pruned.")
    if config.granularity == "2:4":
        _check_widths(chosen)
        _check_orientation(chosen, modules)
    return chosen


def find_grouped(model: nn.Module, groups: list[UnitGroup]) -> dict[str, nn.Parameter]:
    """Choose the parameters of whole units: the readers' weights and biases, and the writers' weights.

    Raises:
        ValueError: If one of them is frozen.
    """
    members = {p for group in groups for p in (*group.reader_parameters, group.writer.weight)}
    chosen = {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters() if p in members}
    frozen = [name for name, parameter in chosen.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"Neurons and heads must be trainable to be pruned whole, but {', '.join(frozen)} are frozen. {UNFREEZE}"
        )
    return chosen


def _weights_of(module: nn.Module, include_bias: bool) -> Iterator[tuple[str, nn.Parameter]]:
    # Exact types: a router is a subclass of a linear layer, and a quantized layer has no weights to prune.
    linear = type(module) in (nn.Linear, Conv1D)
    stacked = hasattr(module, "num_experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))
    if linear or stacked:
        for key, parameter in module.named_parameters(recurse=False):
            is_bias = parameter.dim() < (3 if stacked else 2)
            if parameter.is_floating_point() and (include_bias or not is_bias):
                yield key, parameter


def _choices(modules: dict[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if next(_weights_of(module, False), None)]
    return f"Choose from {', '.join(names)}, or modules around them." if names else "It has no linear layer at all."


def _check_widths(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.shape[-1] % 4:
            raise ValueError(
                f"With granularity '2:4' the width of every matrix must be a multiple of 4, `{name}` is"
                f" {tuple(parameter.shape)}. Leave it out with `modules`, and biases with include_bias=False."
            )


def _check_orientation(parameters: dict[str, nn.Parameter], modules: dict[str, nn.Module]) -> None:
    for name in parameters:
        owner = modules[name.rpartition(".")[0]]
        if type(owner) is Conv1D or getattr(owner, "is_transposed", False):
            raise ValueError(
                f"With granularity '2:4' the inputs must be the last dimension of a matrix, but `{name}` of a"
                f" {type(owner).__name__} has them first. Prune single weights with granularity 'unstructured'."
            )
