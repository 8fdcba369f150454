"""The parts of a study of masks: runs, one-shot plans, equal training for all, which units are used, pictures."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from study import Run, StudyOptions
from torch import Tensor
from transformers import PreTrainedModel

from hf_moebert import measure_importance
from hf_moebert.architectures.functional_routing import expert_load
from hf_moebert.methods.mixture_of_masks.functional import active_share
from hf_moebert.methods.mixture_of_masks.functional_plans import (
    clustered_masks,
    dealt_masks,
    kept_mask,
    random_masks,
    unit_magnitude,
)
from hf_moebert.methods.mixture_of_masks.modeling_routing import recording
from hf_moebert.methods.mixture_of_masks.modeling_surgery import find_feed_forwards, matrix_of
from hf_moebert.reporting.pictures import plot_curves, plot_stacks


LEARNED = ("masks", "guided", "single", "guided-single")
ONE_SHOT = ("random", "clustered", "importance", "importance-single", "magnitude")
UNROUTED = ("single", "guided-single", "importance-single", "magnitude")  # one expert
GUIDED = ("guided", "guided-single")
IMPORTANCE = ("importance", "importance-single")


@dataclass
class MaskOptions(StudyOptions):
    """Runs of the study."""

    kinds: list[str] = field(
        default_factory=lambda: ["guided-single", *ONE_SHOT], metadata={"help": "Rows of the table."}
    )
    keep_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.25, 0.1], metadata={"help": "Shares of units that stay."}
    )
    num_experts: int = field(default=4, metadata={"help": "Experts of each block."})
    group_size: int = field(default=1, metadata={"help": "Units that share a learned mask."})
    budget: str = field(default="global", metadata={"help": "See `from_dense`.", "choices": ("global", "layer")})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "See `from_dense`; of all splits."})
    taught: bool = field(default=False, metadata={"help": "Let the start teach all that go on from it."})
    importance_batches: int = field(default=32, metadata={"help": "Training batches that measure the importance."})
    pretrain_steps: int = field(default=0, metadata={"help": "Steps of the start; 0 leaves a named model as it is."})
    pretrain_rate: float = field(default=1e-3, metadata={"help": "Its learning rate."})

    def __post_init__(self) -> None:
        """Refuse what does not exist before anything is trained."""
        if unknown := set(self.kinds) - {*LEARNED, *ONE_SHOT}:
            raise ValueError(f"`kinds` must be among {', '.join((*LEARNED, *ONE_SHOT))}, got {sorted(unknown)}.")
        if not all(0 < share < 1 for share in self.keep_ratios):
            raise ValueError(f"`keep_ratios` must be in (0, 1), got {self.keep_ratios}. Use 0.5.")


@dataclass(frozen=True)
class MaskRun(Run):
    """One model of the study.

    Attributes:
        kind: What makes the masks; `dense` has none.
        keep_ratio: Share of the units that stay.
        steps: Optimiser steps.
    """

    kind: str = "dense"
    keep_ratio: float = 1.0
    steps: int = 0


def plan_masks(
    kind: str,
    model: PreTrainedModel,
    examples: list[Any],
    *,
    data_collator: Callable | None = None,
    num_experts: int,
    keep_ratio: float,
    seed: int,
) -> Tensor:
    """Split the feed-forward networks of a dense model in one shot.

    Args:
        kind: One of `ONE_SHOT`.
        model: Dense.
        examples: Training data on which the importance of units is measured, if the kind needs it.
        data_collator: Makes a batch of examples.
        num_experts: Of each network; one if the kind has no router.
        keep_ratio: Share of the units of each expert.
        seed: Of what is random.

    Returns:
        Shape `(layers, experts, units)`, bool, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    importance = measure_importance(model, examples, data_collator) if kind in IMPORTANCE else None  # (layers, units)
    masks = []
    for layer, network in enumerate(find_feed_forwards(model)):
        parts = [network.part(name) for name in ("gate", "up") if network.part(name) is not None]
        rows = [matrix_of(part).detach().cpu().float() for part in parts]  # (units, hidden)
        writer = matrix_of(network.part("down")).detach().cpu().float()  # (hidden, units)
        if importance is not None:
            masks.append(dealt_masks(importance[layer], num_experts, keep_ratio))
        elif kind == "clustered":
            masks.append(clustered_masks(rows[0], num_experts, keep_ratio, generator=generator))
        elif kind == "magnitude":
            masks.append(kept_mask(unit_magnitude(rows, writer), keep_ratio))
        else:
            masks.append(random_masks(network.num_units, num_experts, keep_ratio, generator=generator))
    return torch.stack(masks)


def read_rows(rows: Dataset, count: int, *, seed: list[int]) -> Dataset:
    """Return `count` rows of a random order, in which all come before one comes again."""
    generator = np.random.default_rng(seed)
    passes = -(-count // len(rows))
    order = np.concatenate([generator.permutation(len(rows)) for _ in range(passes)])
    return rows.select(order[:count])


def collate_for_both(collator: Callable[[list[dict]], dict], model: PreTrainedModel, rows: list[dict]) -> dict:
    """Make a batch for a student and a teacher, who sees no labels: a decoder's inputs must be there without them."""
    batch = collator(rows)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return batch


@torch.no_grad()
def measure_use(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, list]:
    """Return for each network of a model with fixed masks what its units are, and how tokens use them.

    Args:
        model: Top-k routing, or one expert.
        batches: Inputs without padding.

    Returns:
        By network: `units`, how many are shared, specific and inactive; `load`, the share of the choices that each
        expert gets; `used`, the share of the units that a token uses, in the mean.
    """
    networks = list(model.masked_networks().values())
    chosen: dict[int, list[Tensor]] = {network.block: [] for network in networks}
    for batch in batches:
        with recording() as records:
            model(**batch)
        for record in records:
            chosen[record.network.block].append(record.chosen)
    load, used = [], []
    for network in networks:
        masks = network.masks()  # (experts, units)
        nothing = torch.zeros(1, 1, dtype=torch.long, device=masks.device)  # to decide, with one expert
        index = nothing if network.router is None else torch.cat(chosen[network.block])  # (tokens, top_k)
        real = torch.ones_like(index[:, 0], dtype=torch.bool)
        counts = expert_load(index, real, len(masks))
        load.append((counts / counts.sum()).tolist())
        used.append(float(active_share(masks, index, real)))
    return {"units": list(model.count_units().values()), "load": load, "used": used}


def draw_learning(log: list[dict], units: list[dict[str, int]], folder: Path) -> dict[str, Path]:
    """Draw how masks were learned, and what became of the units of each block.

    Args:
        log: Of the run that learned them.
        units: Of each masked block, how many are shared, specific and inactive.
        folder: Where the pictures are left.

    Returns:
        File of each picture by its caption.
    """
    entries = [entry for entry in log if "mom_target" in entry]
    steps = [entry["step"] for entry in entries]
    blocks = [key for key in entries[0] if key.startswith("mom_open/")]
    openness = {key.replace("mom_open/", "block "): (steps, [entry[key] for entry in entries]) for key in blocks}
    sparsity = {
        "target": (steps, [entry["mom_target"] for entry in entries]),
        "expected": (steps, [entry["mom_sparsity"] for entry in entries]),
        "closed without noise": (steps, [1 - entry["mom_active"] for entry in entries]),
    }
    parts = {kind: [of_block[kind] for of_block in units] for kind in units[0]}
    captions = {"openness": "open masks", "sparsity": "target and reached sparsity", "units": "kinds of units"}
    files = {name: folder / f"{name}.png" for name in captions}
    plot_curves(openness, files["openness"], x="step", y="share of masks that are open")
    plot_curves(sparsity, files["sparsity"], x="step", y="sparsity")
    plot_stacks(parts, files["units"], x="block", y="units")
    return {captions[name]: file for name, file in files.items()}
