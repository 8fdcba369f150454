"""Dimension squeezing: cut the bonds of a model a little at a time while the stock `Trainer` repairs it."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback
from hf_moebert.checkpoints.tensor_files import read_tensors, save_tensors

from .functional_decomposition import round_cores
from .modeling_matrix import MPOMatrix, list_matrices
from .recipe import MPOSqueezingConfig


logger = logging.get_logger(__name__)
STATE_FILE = "mpo_squeezing_state.safetensors"


class MPOSqueezingCallback(CheckpointManifestCallback):
    """Cut the bonds that cost the least error after every evaluation, as long as the metric does not suffer.

    The first evaluation from `start_step` on gives the reference. Every later one judges the cuts before it: if the
    metric is worse than the reference by more than the allowance, the weights from before these cuts are restored and
    training stops; otherwise the next cuts are made. The steps between evaluations repair the model. Frozen central
    tensors stay frozen, though every cut changes their values.

    Cut parameters stay the same objects, and their optimizer state is reset. `trainer.state.log_history` holds every
    cut. Checkpoints hold the weights to go back to, so that a resumed run decides as an uninterrupted one.

    Args:
        config: The recipe; by default `MPOSqueezingConfig()`.
        resume_from: Folder of the checkpoint a run is resumed from, if it does not lie in its `output_dir`.
        allow_changes: As for `CheckpointManifestCallback`.

    Raises:
        ValueError: When training begins, if the model has no matrix product operators, if nothing is evaluated, if
            several processes or GPUs train, if the best model is to be loaded at the end, or if the state of a
            checkpoint is missing or of another run, and as `CheckpointManifestCallback`; later if no evaluation has
            the metric, or if it is not finite in the first one.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205, for the idea; how cuts are judged is our design.
    """

    def __init__(
        self,
        config: MPOSqueezingConfig | None = None,
        *,
        resume_from: str | Path | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(resume_from=resume_from, allow_changes=allow_changes)
        self.config = MPOSqueezingConfig() if config is None else config
        self.reference: float | None = None
        self.squeezes = 0
        self.before: dict[str, Tensor] = {}  # weights from before the cuts that no evaluation has judged yet
        self._cuts = False  # True while training goes on and no cut was undone
        self._in_step = False  # stays True if a run is interrupted within a step
        self._seen: set[str] = set()  # metrics of evaluations so far, until one has the metric that decides

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run, and restore the state of a checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        _check(args, kwargs["model"])
        self.refuse_changes(state, asdict(self.config) | {"total_steps": state.max_steps})
        events = _events(state)
        self.reference = next((event["mpo_reference"] for event in events if "mpo_reference" in event), None)
        self.squeezes = sum("mpo_cuts" in event for event in events)
        self._cuts, self._seen, self.before = not any("mpo_undone" in event for event in events), set(), {}
        self._in_step = False
        if state.global_step:
            self.before = _load(self.find_checkpoint(args, state) / STATE_FILE, events)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a metric that none of a round of evaluations returned."""
        if self._seen and self.reference is None:
            raise ValueError(
                f"`metric` must be one that evaluations return, got {self.config.metric!r}. Choose from "
                f"{', '.join(sorted(self._seen))}."
            )
        self._in_step = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allow evaluations to judge again."""
        self._in_step = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Judge the last cuts, and make the next ones."""
        if not self._cuts or self._in_step or state.global_step < self.config.start_step:
            return
        if self.config.metric not in metrics:  # an evaluation of another data set
            self._seen |= metrics.keys()
            return
        value, model, optimizer = metrics[self.config.metric], kwargs["model"], kwargs["optimizer"]
        if self.reference is None:
            if not math.isfinite(value):
                raise ValueError(
                    f"`{self.config.metric}` must be finite before the first cut, got {value}. Train longer."
                )
            self.reference = value
            self._note(state, mpo_reference=value)
        elif self.before and self._is_too_bad(value):
            self._undo(model, optimizer)
            self._note(state, mpo_undone=value, mpo_parameters=_count(model))
            self._cuts, control.should_training_stop = False, True
            return
        self.before = {}
        limit = self.config.max_squeezes
        if state.global_step < state.max_steps and (limit < 0 or self.squeezes < limit):
            cuts = self._squeeze(model, optimizer)
            if cuts:
                self._note(state, mpo_cuts=cuts, mpo_parameters=_count(model))

    def save_state(self, folder: Path, state: TrainerState) -> None:
        """Save the weights to go back to in the checkpoint."""
        save_tensors(folder / STATE_FILE, self.before, {"events": json.dumps(_events(state))})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo cuts that no evaluation has judged, and stop cutting."""
        super().on_train_end(args, state, control)
        if self.before:
            logger.warning("Training ended before an evaluation judged the last cuts, which are undone.")
            self._undo(kwargs["model"], kwargs["optimizer"])
        self._cuts = False

    def _note(self, state: TrainerState, **event: Any) -> None:
        state.log_history.append({"step": state.global_step, **event})

    def _is_too_bad(self, value: float) -> bool:
        assert self.reference is not None
        loss = self.reference - value if self.config.higher_is_better else value - self.reference
        return not loss <= self.config.allowance  # also for NaN

    @torch.no_grad()
    def _squeeze(self, model: nn.Module, optimizer: Any) -> dict[str, list[int]]:
        """Make the cheapest cuts, and return the new bonds of the matrices that were cut."""
        matrices = list_matrices(model)
        bonds = self._choose_cuts(matrices)
        if not bonds:
            return {}
        self.squeezes += 1
        self.before = _snapshot(model)
        for path, wanted in bonds.items():
            matrices[path].set_cores(round_cores(matrices[path].chain(), wanted, gauge=_gauge(model))[0])
            _reset_moments(optimizer, matrices[path])
        return {path: list(matrices[path].bonds) for path in bonds}

    def _choose_cuts(self, matrices: dict[str, MPOMatrix]) -> dict[str, list[int]]:
        values, bonds = {}, {}
        for path, matrix in matrices.items():
            _, values[path] = round_cores(matrix.chain(), gauge="left")
            bonds[path] = [len(spectrum) for spectrum in values[path]]
        cut: dict[str, list[int]] = {}
        for _ in range(self.config.cuts):
            prices = [
                (self._price(spectrum, bonds[path][k], values[path]), path, k)
                for path in matrices
                for k, spectrum in enumerate(values[path])
                if bonds[path][k] > self.config.min_bond
            ]
            if prices:
                _, path, k = min(prices)
                bonds[path][k] = max(bonds[path][k] - self.config.directions, self.config.min_bond)
                cut[path] = bonds[path]
        return cut

    def _price(self, spectrum: Tensor, bond: int, spectra: list[Tensor]) -> float:
        """Return the error that the next cut of a bond adds, from its Schmidt values alone."""
        dropped = spectrum[max(bond - self.config.directions, self.config.min_bond) : bond]
        norm = float(spectra[0].norm()) if self.config.relative else 1.0
        return float(dropped.norm()) / (norm or 1.0)

    @torch.no_grad()
    def _undo(self, model: nn.Module, optimizer: Any) -> None:
        for path, matrix in list_matrices(model).items():
            matrix.set_cores([self.before[f"{path}.cores.{k}"] for k in range(len(matrix.cores))])
            _reset_moments(optimizer, matrix)
        for name, parameter in model.named_parameters():
            if name in self.before:
                parameter.copy_(self.before[name])
        self.before = {}


def _count(model: nn.Module) -> int:
    return sum(core.numel() for matrix in list_matrices(model).values() for core in matrix.chain())


def _events(state: TrainerState) -> list[dict[str, Any]]:
    """Return the entries that the callback has logged, which the Trainer saves in every checkpoint."""
    return [entry for entry in state.log_history if any(key.startswith("mpo_") for key in entry)]


def _load(file: Path, events: list[dict[str, Any]]) -> dict[str, Tensor]:
    remedy = "Resume from an earlier checkpoint."
    if not file.is_file():
        raise ValueError(
            f"A run that squeezes must be resumed with {str(file)!r}, which is missing. Name the folder of the "
            "checkpoint with `resume_from`, or start a new run from the model."
        )
    tensors, texts = read_tensors(file, remedy=remedy)
    try:
        saved = json.loads(texts["events"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{str(file)!r} must list the cuts of a run, but does not: {error!r}. {remedy}") from error
    if saved != json.loads(json.dumps(events)):
        raise ValueError(
            f"{str(file)!r} must belong to the run that is resumed, but was written after other cuts. Name the folder "
            "of its checkpoint with `resume_from`."
        )
    return tensors


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy all tensors that cuts and training change."""
    cores = {core for matrix in list_matrices(model).values() for core in matrix.chain()}
    changing = {name: p for name, p in model.named_parameters() if p.requires_grad or p in cores}
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in changing.items()}


def _reset_moments(optimizer: Any, matrix: MPOMatrix) -> None:
    """Drop moments, which mean nothing in the new basis."""
    for core in matrix.chain():
        getattr(optimizer, "optimizer", optimizer).state.pop(core, None)


def _gauge(model: nn.Module) -> str:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "gauge", "symmetric")


def _check(args: TrainingArguments, model: nn.Module) -> None:
    matrices = list_matrices(model)
    for wrong, rule, remedy in (
        (not matrices, "`model` must have matrix product operators, got none", "Call `compress_mpo` first"),
        (
            args.eval_strategy == IntervalStrategy.NO,
            "`eval_strategy` must be 'steps' or 'epoch' to squeeze, got 'no'",
            "The steps between two evaluations repair the model",
        ),
        (
            args.world_size > 1,
            f"Squeezing must run in one process, got {args.world_size}",
            "Start it without torchrun",
        ),
        (
            args.load_best_model_at_end,
            "`load_best_model_at_end` must be False to squeeze",
            "It would load a model from before the cuts; the callback itself undoes the last ones",
        ),
    ):
        if wrong:
            raise ValueError(f"{rule}. {remedy}.")
