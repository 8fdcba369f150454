"""The clock of a pruning run: when statistics become masks, when masks are applied, and what a checkpoint holds."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from hf_moebert.training.schedules import cubic_decay

from .functional import apply_mask_, checksum, fingerprint
from .modeling_shrunk import can_shrink
from .modeling_units import find_unit_groups
from .recipe import PlatonConfig
from .training_parameters import find_grouped, find_prunable
from .training_selection import Statistics, UnitSelection, WeightSelection


logger = logging.get_logger(__name__)

STATE_FILE = "platon_state.safetensors"
NUMBERS = ("clock", "dropped", "ratio", "threshold", "revived")  # attributes of `Pruner` in that file
MAX_DROPPED = 3  # windows in a row with a gradient that was not finite


class Pruner:
    """Gathers statistics of the prunable parameters, and zeroes the least important ones on schedule.

    Every optimiser step calls `observe` while gradients are there, and `advance` once the weights are updated.

    Args:
        model: Its weights are changed in place.
        config: The recipe.
        total_steps: Optimiser steps of the run.

    Attributes:
        parameters: What is pruned, by name.
        keep: Masks, by name. Shapes `(numel,)`.
        clock: Steps that counted; one skipped for an overflow does not.
        ratio: Share of the weights that the last mask was made for.
        threshold: Smallest score that the last mask kept.
        revived: Share of the weights that the last mask kept and the one before it did not.

    Raises:
        ValueError: If nothing can be pruned, or if the run is too short.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2206.12562.
    """

    def __init__(self, model: nn.Module, config: PlatonConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.begin, self.end = config.resolve_steps(total_steps)
        groups = find_unit_groups(model) if config.granularity == "structured" else []
        self.parameters = find_grouped(model, groups) if groups else find_prunable(model, config)
        _refuse_scattered(self.parameters)
        if groups and not can_shrink(model):
            logger.warning(f"`shrink` cannot remove what is pruned in a {type(model).__name__}: it only gets zeros.")
        self.statistics = Statistics(self.parameters, config)
        self.selection = UnitSelection(self.statistics, groups) if groups else WeightSelection(self.statistics)
        self.keep = {n: torch.ones(p.numel(), dtype=torch.bool, device=p.device) for n, p in self.parameters.items()}
        self.clock, self.dropped = 0, 0
        self.ratio, self.threshold, self.revived = 1.0, -math.inf, 0.0
        self._observed = False
        if config.keep_ratio == 1:
            logger.warning("`keep_ratio` is 1: nothing will be pruned.")

    @property
    def is_final(self) -> bool:
        """Whether the final ratio has been reached, so that the weights are sparse after every step."""
        return self.clock > self.end or self.config.keep_ratio == 1

    def observe(self) -> None:
        """Take in the gradients of the step at hand, number `clock + 1`.

        Raises:
            RuntimeError: If no prunable parameter has a gradient.
            FloatingPointError: If gradients were not finite in several windows in a row.
        """
        position = (self.clock + 1) % self.config.window
        if position == 0 and self.config.criterion == "platon":
            self._drop_bad_window()
        if not self.statistics.observe(position):
            raise RuntimeError(
                "The optimizer must leave gradients for the callback to read, but no prunable parameter has one. Use"
                " an optimizer that does not step inside the backward pass, and a loss that reaches the encoder."
            )
        self._observed = True

    def _drop_bad_window(self) -> None:
        """Leave a window out of the averages if one bad gradient fell into it."""
        if self.statistics.is_finite():
            self.dropped = 0
            return
        self.dropped += 1
        logger.warning(f"A gradient was NaN or infinite: the window up to step {self.clock} is left out.")
        if self.dropped >= MAX_DROPPED:
            self._refuse_bad_gradients(f", in {self.dropped} windows of {self.config.window} steps in a row")
        self.statistics.forget_window()

    def _refuse_bad_gradients(self, where: str = "") -> None:
        raise FloatingPointError(
            f"Gradients must be finite, but up to step {self.clock} some were not{where}. Lower the learning rate,"
            " clip with `max_grad_norm`, or train in bf16 instead of fp16."
        )

    def advance(self) -> None:
        """Count the step that was observed, and zero what the schedule says."""
        if not self._observed:
            return
        self._observed = False
        self.clock += 1
        self.statistics.remember(self.keep)
        if self.clock <= self.begin:
            return
        # Scores are read at the end of a window, and the ratio changes until the final phase; in between masks stay.
        on_grid = self.clock % self.config.window == 0
        if on_grid or (self.is_final and self.ratio != self.config.keep_ratio):
            self._renew_masks()
        if self.statistics.restore() or on_grid or self.is_final:
            self.mask()

    def mask(self) -> None:
        """Zero the weights that the last mask did not keep."""
        for name, parameter in self.parameters.items():
            apply_mask_(parameter.detach().view(-1), self.keep[name])

    def _renew_masks(self) -> None:
        if self.config.criterion != "platon" and not self.statistics.is_finite():  # NaN cannot be ranked
            self._refuse_bad_gradients()
        self.ratio = cubic_decay(self.clock, begin=self.begin, end=self.end, final=self.config.keep_ratio)
        selection = self.selection.select_(self.keep, self.ratio)
        self.threshold, self.revived = selection.threshold, selection.revived / self.numel
        self._refuse_disagreement()
        if selection.emptied:
            logger.warning_once(
                f"Nothing is left of {selection.emptied} of the parameters. Use `min_keep` to keep a share of each."
            )

    def _refuse_disagreement(self) -> None:
        """All processes must prune the same weights: they see the same gradients, so they should."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        mine = checksum(list(self.keep.values()))
        everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        if any(not torch.equal(mine, other) for other in everyone):
            raise RuntimeError(
                f"All processes must have the same mask, but at step {self.clock} they differ. Their gradients or"
                " weights have parted: check that every parameter takes part in the all-reduce."
            )

    @property
    def numel(self) -> int:
        """Number of prunable weights."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def measure_sparsity(self) -> dict[str, float]:
        """Count the zeros: their share of each parameter by name."""
        return {
            name: 1 - int(torch.count_nonzero(parameter)) / parameter.numel()
            for name, parameter in self.parameters.items()
        }

    def _fingerprint(self) -> int:
        """Condense the weights to a number, by which a state is known to belong to them."""
        total = sum(fingerprint(parameter.detach().view(-1)) for parameter in self.parameters.values())
        return total % (1 << 62)

    def save(self, folder: Path, step: int) -> None:
        """Write everything that a resumed run needs into a checkpoint: the whole file or none of it.

        Args:
            folder: The checkpoint.
            step: The Trainer's step, which also counts what was skipped.

        Raises:
            OSError: If the file cannot be written; what lay there before is left as it was.
        """
        tensors = {f"{kind}.{n}": t for kind, named in self.statistics.tensors.items() for n, t in named.items()}
        tensors |= {f"keep.{name}": keep for name, keep in self.keep.items()}
        state = {
            "config": asdict(self.config),
            "total_steps": self.total_steps,
            "step": step,
            "weights": self._fingerprint(),
            "numbers": {key: getattr(self, key) for key in NUMBERS},
        }
        target, draft = folder / STATE_FILE, folder / f".{STATE_FILE}.draft"
        try:
            save_file(tensors, draft, metadata={"platon": json.dumps(state)})
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            draft.replace(target)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise OSError(
                f"The state of the pruning cannot be written to {target}: {error}. Free some space."
            ) from error

    def load(self, folder: Path, step: int, *, allow_changes: bool = False) -> None:
        """Read what `save` wrote.

        Args:
            folder: The checkpoint.
            step: The Trainer's step in that checkpoint.
            allow_changes: Whether recipe and length of the run may have changed.

        Raises:
            ValueError: If the file is missing or broken, or belongs to another step, model, recipe or length of run.
        """
        state, tensors = _read_state(folder / STATE_FILE)
        if state["step"] != step:
            raise ValueError(
                f"{folder / STATE_FILE} must be of the step the Trainer resumes from, {step}, but it is of step"
                f" {state['step']}. Pass the folder of that checkpoint as `resume_from`."
            )
        changes = self.config.differences(state["config"])
        if state["total_steps"] != self.total_steps:
            changes.append(f"total steps: {state['total_steps']} -> {self.total_steps}")
        if changes and not allow_changes:
            raise ValueError(
                f"A resumed run must have the recipe it began with, but {'; '.join(changes)}. Undo the change, or pass"
                " allow_changes=True to the callback."
            )
        mine = {f"{kind}.{n}": t for kind, named in self.statistics.tensors.items() for n, t in named.items()}
        mine |= {f"keep.{name}": keep for name, keep in self.keep.items()}
        odd = sorted(mine.keys() ^ tensors.keys()) + [
            name for name in mine.keys() & tensors.keys() if mine[name].shape != tensors[name].shape
        ]
        if odd:
            raise ValueError(
                f"{folder / STATE_FILE} must hold the statistics of this model and criterion, but these are missing,"
                f" extra or of another shape: {', '.join(odd)}. Resume the run that wrote it."
            )
        if state["weights"] != self._fingerprint():
            raise ValueError(
                f"{folder / STATE_FILE} must be of the checkpoint the Trainer resumes from, but it was saved beside"
                " other weights. Pass the folder of that checkpoint as `resume_from`."
            )
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        for key, value in state["numbers"].items():
            setattr(self, key, value)


def _refuse_scattered(parameters: dict[str, nn.Parameter]) -> None:
    devices = {str(parameter.device) for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"The pruned parameters must be on one device to be ranked together, got {sorted(devices)}. Load the model"
            " without `device_map`."
        )
    for name, parameter in parameters.items():
        if not parameter.is_contiguous():
            raise ValueError(
                f"The pruned parameters must be contiguous in memory, `{name}` is not. Assign its `.contiguous()`."
            )


def _read_state(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            state = json.loads(opened.metadata()["platon"])
            state = {key: state[key] for key in ("config", "total_steps", "step", "weights", "numbers")}
            state["numbers"] = {key: state["numbers"][key] for key in NUMBERS}  # and no other attribute is ever set
            return state, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise ValueError(
            f"The checkpoint must hold {file.name}, but {file} does not exist: its saving was cut short, it was saved"
            " elsewhere, or nothing was pruned in that run. Resume from an earlier checkpoint (see"
            " `last_complete_checkpoint`), or pass its folder as `resume_from` to the callback."
        ) from error
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} must be a whole safetensors file with the state of a pruning, but it is not: {error}. Resume from"
            " an earlier checkpoint."
        ) from error
