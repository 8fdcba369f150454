"""Dimension squeezing: cut the bonds of a model a little at a time while the stock `Trainer` repairs it."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .functional_decomposition import round_cores
from .modeling_matrix import MPOMatrix, list_matrices
from .recipe import MPOSqueezingConfig


logger = logging.get_logger(__name__)
STATE_FILE = "mpo_squeezing_state.safetensors"


class MPOSqueezingCallback(TrainerCallback):
    """Cut the bonds that cost the least error after every evaluation, as long as the metric bears it.

    The first evaluation from `start_step` on gives the reference. Every later one decides about the cuts before it:
    if the metric is worse than the reference by more than the allowance, the model goes back to what it was before
    them and training stops; otherwise the next cuts are made. Steps between evaluations repair: central tensors stay
    frozen if they were, though their numbers change with every cut.

    Cut parameters stay the same objects, and the optimizer starts afresh for them. `trainer.state.log_history` holds
    every cut. Checkpoints hold the weights to go back to, so that a resumed run decides as an uninterrupted one.

    Args:
        config: The recipe; by default `MPOSqueezingConfig()`.
        resume_from: Folder of the checkpoint a run is resumed from, if it does not lie in its `output_dir`.

    Raises:
        ValueError: When training begins, if the model has no matrix product operators, if nothing is evaluated, if
            several processes or GPUs train, if the best model is to be loaded at the end, or if a checkpoint's state
            is missing or another run's; later if no evaluation has the metric, or if it is not finite at first.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205, for the idea; when to judge, and what, is our design.
    """

    checkpoint_files = (STATE_FILE,)

    def __init__(self, config: MPOSqueezingConfig | None = None, *, resume_from: str | Path | None = None) -> None:
        self.config = MPOSqueezingConfig() if config is None else config
        self.resume_from = resume_from
        self.reference: float | None = None
        self.squeezes = 0
        self.before: dict[str, Tensor] = {}  # the weights before cuts that no evaluation has judged
        self._cuts = False  # only while training goes on, and nothing was taken back
        self._in_step = False  # in the middle of a step: a run that was interrupted there may leave it so
        self._seen: set[str] = set()  # metrics of evaluations, as long as none had the one that decides

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, and go on where a checkpoint left off."""
        _check(args, kwargs["model"])
        events = _events(state)
        self.reference = next((event["mpo_reference"] for event in events if "mpo_reference" in event), None)
        self.squeezes = sum("mpo_cuts" in event for event in events)
        self._cuts, self._seen, self.before = not any("mpo_undone" in event for event in events), set(), {}
        self._in_step = False
        if state.global_step:
            self.before = _load(Path(self.resume_from or _checkpoint(args, state)) / STATE_FILE, events)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a metric that a whole round of evaluations did not return."""
        if self._seen and self.reference is None:
            raise ValueError(
                f"`metric` must be one that evaluations return, got {self.config.metric!r}. Choose from "
                f"{', '.join(sorted(self._seen))}."
            )
        self._in_step = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let evaluations judge again."""
        self._in_step = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Judge the last cuts, and make the next."""
        if not self._cuts or self._in_step or state.global_step < self.config.start_step:
            return
        if self.config.metric not in metrics:  # of another data set
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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the weights to go back to into the checkpoint."""
        folder = _checkpoint(args, state)
        if args.should_save and not args.save_only_model and folder.is_dir():
            save_file(self.before, folder / STATE_FILE, {"events": json.dumps(_events(state))})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back cuts that no evaluation has judged, and leave the model alone from now on."""
        if self.before:
            logger.warning("Training ended before an evaluation judged the last cuts: they are taken back.")
            self._undo(kwargs["model"], kwargs["optimizer"])
        self._cuts = False

    def _note(self, state: TrainerState, **event: Any) -> None:
        state.log_history.append({"step": state.global_step, **event})

    def _is_too_bad(self, value: float) -> bool:
        assert self.reference is not None
        loss = self.reference - value if self.config.higher_is_better else value - self.reference
        return not loss <= self.config.allowance  # NaN is too bad

    @torch.no_grad()
    def _squeeze(self, model: nn.Module, optimizer: Any) -> dict[str, list[int]]:
        """Make the cuts that cost the least, and return the new bonds of the matrices that were cut."""
        matrices = list_matrices(model)
        bonds = self._choose_cuts(matrices)
        if not bonds:
            return {}
        self.squeezes += 1
        self.before = _snapshot(model)
        for path, wanted in bonds.items():
            matrices[path].set_cores(round_cores(matrices[path].chain(), wanted, gauge=_gauge(model))[0])
            _forget(optimizer, matrices[path])
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
        """Return the error that the next cut of a bond adds, by its Schmidt values alone."""
        dropped = spectrum[max(bond - self.config.directions, self.config.min_bond) : bond]
        norm = float(spectra[0].norm()) if self.config.relative else 1.0
        return float(dropped.norm()) / (norm or 1.0)

    @torch.no_grad()
    def _undo(self, model: nn.Module, optimizer: Any) -> None:
        for path, matrix in list_matrices(model).items():
            matrix.set_cores([self.before[f"{path}.cores.{k}"] for k in range(len(matrix.cores))])
            _forget(optimizer, matrix)
        for name, parameter in model.named_parameters():
            if name in self.before:
                parameter.copy_(self.before[name])
        self.before = {}


def _count(model: nn.Module) -> int:
    return sum(core.numel() for matrix in list_matrices(model).values() for core in matrix.chain())


def _events(state: TrainerState) -> list[dict[str, Any]]:
    """Return what the callback has logged: the host keeps it in every checkpoint."""
    return [entry for entry in state.log_history if any(key.startswith("mpo_") for key in entry)]


def _load(file: Path, events: list[dict[str, Any]]) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(
            f"A run that squeezes must be resumed with {str(file)!r}, which is missing. Name the folder of the "
            "checkpoint with `resume_from`, or start a new run from the model."
        )
    with safe_open(file, framework="pt") as opened:
        saved, names = json.loads(opened.metadata()["events"]), list(opened.keys())
        if saved != json.loads(json.dumps(events)):
            raise ValueError(
                f"{str(file)!r} must belong to the run that is resumed, but was written after other cuts. Name the "
                "folder of its checkpoint with `resume_from`."
            )
        return {name: opened.get_tensor(name) for name in names}


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy everything that cuts and repairs change."""
    cores = {core for matrix in list_matrices(model).values() for core in matrix.chain()}
    changing = {name: p for name, p in model.named_parameters() if p.requires_grad or p in cores}
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in changing.items()}


def _forget(optimizer: Any, matrix: MPOMatrix) -> None:
    """Drop moments that mean nothing in the new basis."""
    for core in matrix.chain():
        getattr(optimizer, "optimizer", optimizer).state.pop(core, None)


def _gauge(model: nn.Module) -> str:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "gauge", "symmetric")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check(args: TrainingArguments, model: nn.Module) -> None:
    matrices = list_matrices(model)
    for wrong, rule, remedy in (
        (not matrices, "`model` must have matrix product operators, got none", "Call `compress_mpo` first"),
        (
            args.eval_strategy == IntervalStrategy.NO,
            "`eval_strategy` must be 'steps' or 'epoch' to squeeze, got 'no'",
            "The steps between two evaluations repair the cuts",
        ),
        (
            args.world_size > 1,
            f"Squeezing must run in one process, got {args.world_size}",
            "Start it without torchrun",
        ),
        (
            args.load_best_model_at_end,
            "`load_best_model_at_end` must be False to squeeze",
            "It would bring back a model before the cuts; the callback itself takes back the last ones",
        ),
    ):
        if wrong:
            raise ValueError(f"{rule}. {remedy}.")
