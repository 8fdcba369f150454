"""Remove whole units of a trained model in one shot: without labels, and without training."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.inputs import load_inputs
from hf_moebert.architectures.protocols import UnitCosts

from .conversion import check_multiple, find_uniform_kinds, refuse_other_forms, shrink
from .conversion_moments import Influence, measure_influence, read_moment
from .conversion_plan import Budget, plan_widths, time_budget, weight_budget
from .functional_influence import with_bias
from .functional_removal import Removal, invert_moment, remove_units
from .modeling_shrunk import refuse_unshrinkable
from .modeling_units import UnitGroup, find_unit_groups, matrix_of


DAMPING = 1e-2  # of the second moments, relative to their mean


@torch.no_grad()
def prune_structured(
    model: PreTrainedModel,
    dataset: Any,
    processing: PreTrainedTokenizerBase | Callable | None = None,
    *,
    keep_ratio: float | None = None,
    speed_up: float | None = None,
    latency_ms: float | None = None,
    latency: UnitCosts | None = None,
    multiple_of: int = 8,
    uniform: bool = False,
    remove: bool = True,
    max_examples: int = 512,
    batch_size: int = 32,
    seed: int = 0,
) -> PreTrainedModel:
    """Remove the least needed neurons and heads of a trained model, without labels and without training.

    Layer by layer, units go one after another, each time the one whose loss the others of the layer can make up for
    best; the columns of the writer that stay are fitted by least squares to what it wrote before, on what the pruned
    layers in front of it pass on. How many units each layer keeps is chosen for the whole model at once, by how far
    its outputs would move from those of the dense model.

    Args:
        model: A trained model of a family whose units can be removed, with any head. It is not changed.
        dataset: Some hundred texts of the kind that the model is used for, or encoded examples. Labels are not read.
        processing: The tokenizer of the texts; or the collator of encoded examples, by default that of transformers.
        keep_ratio: Share of the weights of all units that stays, in (0, 1).
        speed_up: Time of the dense model over that of the pruned one instead, by the table `latency`.
        latency_ms: Milliseconds of the pruned model instead, by the table `latency`.
        latency: What units cost on this machine, from `measure_unit_latency`.
        multiple_of: Neurons of each layer are a multiple of this, which kernels prefer; or one, or all.
        uniform: Whether all layers keep the same number of neurons, and of heads where the configuration has
            `head_dim`; other heads all stay. The result is a stock model that loads without this package.
        remove: Whether units are removed. Otherwise their columns are zero in a model of the same class, to be trained
            on with `KeepZerosCallback` before `shrink`.
        max_examples: How many of the first examples are used.
        batch_size: Examples in one forward pass.
        seed: Of the random directions in which the outputs are watched.

    Returns:
        A smaller model with the same head, and the same dtype, device and mode.

    Raises:
        ValueError: If the model is wrapped, not in memory or has no units that can be removed; if there are too few
            examples; if what is asked for cannot be reached; or if something in the model is not finite.

    Source: Hassibi and Stork 1992 (optimal brain surgeon); Kurtic et al. 2023 (ZipLM), which removes units at their
    exact error and budgets time, https://arxiv.org/abs/2302.04089; Meng et al. 2024 (OSSCAR),
    https://arxiv.org/abs/2403.12983. To weigh errors by the curvature of the divergence from the model's own outputs
    (K-FAC: Martens and Grosse 2015, https://arxiv.org/abs/1503.05671) is our own combination.
    """
    _check_model(model)
    check_multiple(multiple_of)
    pruned = copy.deepcopy(model).float().eval().requires_grad_(False)
    kinds = find_uniform_kinds(model) if uniform else ["neurons", "heads"]
    groups = [group for group in find_unit_groups(pruned) if group.kind in kinds]
    whole = [group for group in find_unit_groups(pruned) if group.kind not in kinds]
    asked = {"keep_ratio": keep_ratio, "speed_up": speed_up, "latency_ms": latency_ms}
    budget = _make_budget(groups, whole, latency, **asked)
    batches = load_inputs(model, dataset, processing, max_examples=max_examples, batch_size=batch_size)
    influences = measure_influence(pruned, groups, batches, seed=seed)
    values = [_value_units(group, influences[group.writer]) for group in groups]
    together = kinds if uniform else []
    widths = plan_widths(groups, values, budget, multiple_of=multiple_of, together=together)
    plan = {group.writer: (group, width) for group, width in zip(groups, widths, strict=True)}
    for writer, influence in influences.items():  # in the order in which the model runs
        group, width = plan[writer]
        if width < group.num_units:
            moment = read_moment(pruned, writer, batches, influence.counted)
            _write_(group, _remove(group, influence, moment, width))
    pruned = pruned.to(model.dtype).train(model.training)
    for parameter, original in zip(pruned.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return shrink(pruned, uniform=uniform) if remove else pruned


def _check_model(model: Any) -> None:
    is_model = isinstance(model, PreTrainedModel) and not hasattr(model, "_orig_mod")  # of torch.compile
    if not is_model:
        raise ValueError(
            f"`model` must be a model of transformers, got {type(model).__name__}. Unwrap it (`.module`, "
            "`._orig_mod`), and merge an adapter by `merge_and_unload`."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")
    refuse_other_forms(model)
    find_unit_groups(model)
    refuse_unshrinkable(model)


def _make_budget(
    groups: Sequence[UnitGroup],
    whole: Sequence[UnitGroup],
    latency: UnitCosts | None,
    *,
    keep_ratio: float | None,
    speed_up: float | None,
    latency_ms: float | None,
) -> Budget:
    asked = [keep_ratio, speed_up, latency_ms]
    if sum(value is not None for value in asked) != 1:
        raise ValueError(
            f"One of `keep_ratio`, `speed_up` and `latency_ms` must be given, got {asked}. Use `keep_ratio=0.5`."
        )
    if keep_ratio is not None:
        return weight_budget(groups, keep_ratio, whole=whole)
    if latency is None:
        raise ValueError(
            "`latency` must be a table of this machine for `speed_up` and `latency_ms`, got None. Measure it by "
            "`measure_unit_latency(model)`."
        )
    return time_budget(groups, latency, speed_up=speed_up, latency_ms=latency_ms, whole=whole)


def _value_units(group: UnitGroup, influence: Influence) -> Tensor:
    """Return what 1, 2, ... units are worth: minus the divergence without the others. Shape `(units,)`."""
    errors = _remove(group, influence, influence.moment / influence.count, keep=1).errors  # (units - 1,)
    return -torch.cat([errors.new_zeros(1), errors.cumsum(0)]).flip(0).cpu()


def _remove(group: UnitGroup, influence: Influence, moment: Tensor, keep: int) -> Removal:
    """Remove units until so many are left, for these second moments of the writer's inputs."""
    if not moment.isfinite().all() or not influence.metric.isfinite().all():
        raise ValueError(
            f"The inputs of every layer must be finite, but those of the {group.kind} of layer {group.layer}, or "
            "their gradients, are not. Check the model's weights."
        )
    weight = with_bias(matrix_of(group.writer), group.writer.bias)  # (out, in)
    inverse = invert_moment(moment, DAMPING)
    units = {"units": group.num_units, "unit_size": group.unit_size}
    return remove_units(inverse, weight, **units, keep=keep, metric=influence.metric)


def _write_(group: UnitGroup, removal: Removal) -> None:
    """Write the fitted columns of the units that stay, and zeros for the others."""
    matrix = matrix_of(group.writer)  # (out, in)
    columns = torch.zeros_like(matrix).unflatten(1, (group.num_units, group.unit_size))
    columns[:, removal.kept] = removal.columns.unflatten(1, (-1, group.unit_size)).to(matrix)
    matrix.copy_(columns.flatten(1))
    if removal.bias is not None:
        group.writer.bias.copy_(removal.bias)


__all__ = ["prune_structured"]
