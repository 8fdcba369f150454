"""The clock of a pruning run: when statistics become masks, and when masks are applied."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_moebert.architectures.protocols import UnitCosts
from hf_moebert.training.schedules import cubic_decay
from hf_moebert.training.sharding import plain_classes

from .conversion import refuse_other_forms
from .functional import apply_mask_, checksum, fingerprint
from .functional_selection import ALONE
from .modeling_shrunk import refuse_unshrinkable
from .modeling_units import UnitGroup, find_unit_groups
from .recipe import PlatonConfig
from .training_latency import TimedUnitSelector
from .training_parameters import find_grouped, find_prunable
from .training_selection import UnitSelector, WeightSelector
from .training_state import NUMBERS, STATE_FILE, read_state
from .training_statistics import Statistics, UnitStatistics


logger = logging.get_logger(__name__)

MAX_DROPPED = 3  # consecutive windows with a gradient that is not finite


class Pruner:
    """The pruning of one model: it collects statistics and sets the least important weights to zero on schedule.

    Call `observe` in every optimiser step while the gradients exist, and `advance` once the weights are updated.

    Args:
        model: Its weights are changed in place.
        config: The recipe.
        total_steps: Optimiser steps of the run.
        latency: What units cost, for `speed_up`.

    Attributes:
        parameters: The parameters whose scores count, by name.
        keep: Masks, by name: of all parameters, or of the writers of whole units. Shapes `(numel,)`, of the elements
            that are in this process.
        clock: Number of counted steps; a step skipped for an overflow does not count.
        ratio: Share of the weights that the last mask was to keep.
        threshold: Smallest score that the last mask kept.
        revived: Share of the weights that the last mask kept and the one before did not.

    Raises:
        ValueError: If nothing can be pruned, or if the run is too short; at its end, if all gradients were zero.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2206.12562.
    """

    def __init__(
        self, model: nn.Module, config: PlatonConfig, total_steps: int, *, latency: UnitCosts | None = None
    ) -> None:
        self.config, self.total_steps = config, total_steps
        self.begin, self.end = config.resolve_steps(total_steps)
        groups = []
        with plain_classes(model):
            if config.granularity == "structured":
                refuse_other_forms(model)
                groups = find_unit_groups(model)
                refuse_unshrinkable(getattr(model, "_orig_mod", model))  # before training, not after
            self.parameters = find_grouped(model, groups) if groups else find_prunable(model, config)
        _check_placement(self.parameters)
        self.statistics, self.selector = _make_statistics(self.parameters, config, groups, latency)
        self.keep = {
            name: torch.ones_like(self.statistics.weight(name), dtype=torch.bool) for name in self.selector.sizes
        }
        self.clock, self.dropped = 0, 0
        self.ratio, self.threshold, self.revived = 1.0, -math.inf, 0.0
        self._observed = False
        if config.final_share == 1:
            logger.warning("`keep_ratio` is 1: nothing will be pruned.")

    @property
    def is_final(self) -> bool:
        """True once the final ratio has been reached, so that the weights are sparse after every step."""
        return self.clock > self.end or self.config.final_share == 1

    def observe(self) -> None:
        """Take in the gradients of the current step, number `clock + 1`.

        Raises:
            RuntimeError: If no prunable parameter has a gradient.
            FloatingPointError: If gradients were not finite in several windows in a row.
        """
        position = (self.clock + 1) % self.config.window
        if position == 0 and self.statistics.has_windows:
            self._drop_bad_window()
        if not self.statistics.observe(position):
            raise RuntimeError(
                "The optimizer must leave gradients for the callback to read, but no prunable parameter has one. Use"
                " an optimizer that does not step inside the backward pass, and a loss that reaches the encoder."
            )
        self._observed = True

    def _drop_bad_window(self) -> None:
        """Leave a window out of the averages if one of its gradients is not finite."""
        if self.statistics.is_finite():
            self.dropped = 0
            return
        self.dropped += 1
        logger.warning(f"A gradient was NaN or infinite: the window up to step {self.clock} is left out.")
        if self.dropped >= MAX_DROPPED:
            self._raise_for_gradients(f", in {self.dropped} windows of {self.config.window} steps in a row")
        self.statistics.reset_window()

    def _raise_for_gradients(self, detail: str = "") -> None:
        raise FloatingPointError(
            f"Gradients must be finite, but up to step {self.clock} some were not{detail}. Lower the learning rate,"
            " clip with `max_grad_norm`, or train in bf16 instead of fp16."
        )

    def advance(self) -> None:
        """Count the observed step, and set weights to zero as scheduled."""
        if not self._observed:
            return
        self._observed = False
        self.clock += 1
        self.statistics.store_values(self.keep)
        if self.clock <= self.begin:
            return
        # Scores change at the end of a window only, and the ratio until the final phase: in between, masks stay.
        window_ends = self.clock % self.config.window == 0
        if window_ends or (self.is_final and self.ratio != self.config.final_share):
            self._renew_masks()
        if self.statistics.restore_values() or window_ends or self.is_final:
            self.apply_masks()

    def apply_masks(self) -> None:
        """Set the weights to zero that the last masks do not keep."""
        for name, keep in self.keep.items():
            apply_mask_(self.statistics.weight(name), keep)

    def _renew_masks(self) -> None:
        if not self.statistics.has_windows and not self.statistics.is_finite():  # NaN cannot be ranked
            self._raise_for_gradients()
        if self.statistics.is_zero():  # no reason to prune one weight rather than another
            if self.dropped or not self.is_final:  # those of new adapters are zero at first
                return
            raise ValueError(
                f"Gradients must tell weights apart to prune them, but all were zero up to step {self.clock}. Check "
                "the labels: where all are -100, there is no loss."
            )
        self.ratio = cubic_decay(self.clock, begin=self.begin, end=self.end, final=self.config.final_share)
        selection = self.selector.update_masks_(self.keep, self.ratio)
        self.threshold, self.revived = selection.threshold, selection.revived / self.numel
        self._compare_processes()
        if selection.emptied:
            logger.warning_once(  # without numbers: another text would be said again
                "Nothing is left of a parameter whose `platon_sparsity/...` in `log_history` is 1. Use `min_keep` to"
                " keep a share of each."
            )

    def _compare_processes(self) -> None:
        """Check that all processes prune the same weights, as they see the same gradients or the same threshold."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        masks = list(self.keep.values())
        whole = self.statistics.processes is ALONE
        checksum_here = checksum(masks) if whole else torch.tensor([self.threshold], device=masks[0].device)
        everyone = [torch.zeros_like(checksum_here) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, checksum_here)
        if any(not torch.equal(checksum_here, other) for other in everyone):
            raise RuntimeError(
                f"All processes must have the same mask, but at step {self.clock} they differ. Their gradients or"
                " weights have diverged: check that every parameter takes part in the all-reduce."
            )

    @property
    def numel(self) -> int:
        """Number of weights that can be pruned."""
        return sum(self.selector.sizes.values())

    def measure_sparsity(self) -> dict[str, float]:
        """Return the share of zeros of each parameter that has a mask, by name."""
        counts = torch.stack([torch.count_nonzero(self.statistics.weight(name)) for name in self.keep])
        left = zip(self.keep, self.statistics.processes.add(counts).tolist(), strict=True)
        return {name: 1 - count / self.parameters[name].numel() for name, count in left}

    def average_sparsity(self, sparsity: dict[str, float]) -> float:
        """Average the shares of `measure_sparsity`: of single weights, or of weights of units without a writer."""
        return sum(round(share * self.selector.sizes[name]) for name, share in sparsity.items()) / self.numel

    def _fingerprint(self) -> int:
        """Hash the weights to a number that shows whether a state belongs to them."""
        here = sum(fingerprint(self.statistics.weight(name)) for name in self.parameters) % (1 << 62)
        device = next(iter(self.keep.values())).device
        return self.statistics.processes.count(here, device) % (1 << 62)  # a sum that wraps around at 2^64 may do so

    def _tensors(self) -> dict[str, Tensor]:
        """Return the statistics and masks of this process by the names that they have in a checkpoint."""
        tensors = {f"{kind}.{n}": t for kind, named in self.statistics.tensors.items() for n, t in named.items()}
        return tensors | {f"keep.{name}": keep for name, keep in self.keep.items()}

    def _part(self, key: str) -> slice:
        """Return which elements of a tensor of a checkpoint are in this process."""
        kind, _, name = key.partition(".")
        return self.statistics.parts[name] if kind == "keep" else self.statistics.part(name)

    def _length(self, key: str) -> int:
        """Return how many elements a tensor of a checkpoint has in all processes."""
        kind, _, name = key.partition(".")
        return self.parameters[name].numel() if kind == "keep" else self.statistics.sizes[name]

    def collect(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return everything that a resumed run needs; where parameters are sharded, all processes call this at once.

        Args:
            step: The Trainer's step, which also counts skipped steps.

        Returns:
            Fields and tensors for `write_state`: whole ones in the first process, whatever the number of processes.
        """
        state = {
            "config": asdict(self.config),
            "total_steps": self.total_steps,
            "step": step,
            "weights": self._fingerprint(),
            "numbers": {key: getattr(self, key) for key in NUMBERS},
        }
        tensors, processes = self._tensors(), self.statistics.processes
        for key, tensor in tensors.items() if processes is not ALONE else ():
            if key.startswith("keep.") or not self.statistics.replicated:
                whole = processes.join(tensor)  # one at a time, and not to stay on the accelerator
                tensors[key] = whole.cpu() if processes.rank == 0 else tensor
        return state, tensors

    def load(self, folder: Path, step: int, *, allow_changes: bool = False) -> None:
        """Read what `collect` returned, and `write_state` wrote.

        Args:
            folder: The checkpoint.
            step: The Trainer's step in that checkpoint.
            allow_changes: Whether recipe and length of the run may have changed.

        Raises:
            ValueError: If the file is missing or broken, or belongs to another step, model, recipe or length of run.
        """
        state, tensors = read_state(folder)
        file = folder / STATE_FILE
        if state["step"] != step:
            raise ValueError(
                f"{file} must be of the step the Trainer resumes from, {step}, but it is of step {state['step']}. Pass"
                " the folder of that checkpoint as `resume_from`."
            )
        changes = self.config.differences(state["config"])
        if state["total_steps"] != self.total_steps:
            changes.append(f"total steps: {state['total_steps']} -> {self.total_steps}")
        if changes and not allow_changes:
            raise ValueError(
                f"A resumed run must have the recipe it began with, but {'; '.join(changes)}. Undo the change, or pass"
                " allow_changes=True to the callback."
            )
        own = self._tensors()
        reshaped = [key for key in own.keys() & tensors.keys() if tensors[key].shape != (self._length(key),)]
        if mismatched := sorted(own.keys() ^ tensors.keys()) + reshaped:
            raise ValueError(
                f"{file} must hold the statistics of this model and criterion, but these are missing, extra or of"
                f" another shape: {', '.join(mismatched)}. Resume the run that wrote it, with the release that did."
            )
        if state["weights"] != self._fingerprint():
            raise ValueError(
                f"{file} must be of the checkpoint the Trainer resumes from, but it was saved beside other weights."
                " Pass the folder of that checkpoint as `resume_from`."
            )
        for key, tensor in own.items():
            tensor.copy_(tensors[key][self._part(key)])
        for key, value in state["numbers"].items():
            setattr(self, key, value)


def _make_statistics(
    parameters: dict[str, nn.Parameter], config: PlatonConfig, groups: list[UnitGroup], latency: UnitCosts | None
) -> tuple[Statistics, Any]:
    """Make the statistics of single weights or of whole units, and what selects by them."""
    if not groups:
        weights = Statistics(parameters, config)
        return weights, WeightSelector(weights)
    units = UnitStatistics(parameters, config, groups)
    return units, UnitSelector(units) if latency is None else TimedUnitSelector(units, latency)


def _check_placement(parameters: dict[str, nn.Parameter]) -> None:
    devices = {str(parameter.device) for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"The pruned parameters must be on one device to be ranked together, got {sorted(devices)}. Load the model"
            " without `device_map`."
        )
    if len({isinstance(parameter, DTensor) for parameter in parameters.values()}) > 1:
        raise ValueError(
            "The pruned parameters must all be sharded or none, got some of both. Leave FSDP2's `ignored_modules` out"
            " with `modules`, and add adapters before the model is sharded."
        )
    for name, parameter in parameters.items():
        if not parameter.is_contiguous():
            raise ValueError(
                f"The pruned parameters must be contiguous in memory, `{name}` is not. Assign its `.contiguous()`."
            )
