"""The group Taylor importance of Torch-Pruning, as a rival: which units its pruner would remove, for a speed-up.

Molchanov et al. 2019, as in `torch-pruning` (`pip install --no-deps torch-pruning`), which is no dependency. Its
pruner ranks the neurons of all layers together, and the heads of all layers together, by importances whose mean is 1
in every layer; the same share of both goes. The smallest share at which the model is fast enough by a latency table is
found by halving, and what the package names is removed by `shrink`.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_moebert import shrink
from hf_moebert.architectures.surgery import matrix_of
from hf_moebert.architectures.units import UnitGroup, find_unit_groups
from hf_moebert.measuring.unit_latency import LatencyTable


HALVINGS = 7  # of the interval in which the share lies


def is_installed() -> bool:
    """Return whether the package is there."""
    return importlib.util.find_spec("torch_pruning") is not None


def prune_by_group_taylor(
    model: PreTrainedModel, examples: Any, collator: Callable, *, speed_up: float, latency: LatencyTable
) -> PreTrainedModel:
    """Remove the units that Torch-Pruning would remove, so many that a table says the speed-up is reached.

    Args:
        model: A fine-tuned BERT; it is not changed.
        examples: Labelled examples, whose gradients tell units apart.
        collator: Makes batches of them.
        speed_up: Time of the dense model over that of the pruned one.
        latency: What units cost.
    """
    watched = copy.deepcopy(model).eval()
    watched.set_attn_implementation("eager")  # whose graph the package can follow
    for batch in DataLoader(examples, 32, collate_fn=collator):
        watched(**batch).loss.backward()
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        removed = name_removed(watched, share)
        groups = find_unit_groups(watched)
        widths: list[dict[str, int]] = [{} for _ in range(watched.config.num_hidden_layers)]
        for group in groups:
            widths[group.layer][group.kind] = _round_up(group, group.num_units - len(removed.get(group.writer, ())))
        low, high = (share, high) if latency.estimate(widths) > 1 / speed_up else (low, share)
    removed = name_removed(watched, high)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for group, same in zip(find_unit_groups(pruned), groups, strict=True):
            columns = matrix_of(group.writer).unflatten(1, (group.num_units, group.unit_size))
            columns[:, removed.get(same.writer, [])] = 0
    return shrink(pruned, multiple_of=8)


def name_removed(model: PreTrainedModel, share: float) -> dict[nn.Module, list[int]]:
    """Ask the package which units it would remove at this share, by writer; gradients must be there."""
    import torch_pruning

    groups = find_unit_groups(model)
    roots = {reader for group in groups for reader in group.readers}
    heads = {reader: group.num_units for group in groups if group.kind == "heads" for reader in group.readers}
    others = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in roots]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": torch.ones(1, 8, dtype=torch.long)},
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=share,
        head_pruning_ratio=share,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        root_module_types=[nn.Linear],
        ignored_layers=[*others, *(m for m in model.modules() if isinstance(m, nn.Embedding | nn.LayerNorm))],
        output_transform=lambda output: output.logits.sum(),
    )
    by_writer = {group.writer: group for group in groups}
    removed: dict[nn.Module, set[int]] = {}
    for coupled in pruner.step(interactive=True):
        for dependency, columns in coupled:
            group = by_writer.get(dependency.target.module)
            if group is not None:
                removed.setdefault(group.writer, set()).update(int(column) // group.unit_size for column in columns)
    return {
        writer: sorted(units)[: by_writer[writer].num_units - 1]  # one stays in every layer
        for writer, units in removed.items()
    }


def _round_up(group: UnitGroup, count: int) -> int:
    return -(-count // 8) * 8 if group.kind == "neurons" else max(count, 1)
