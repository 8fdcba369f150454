"""Studies of pruning: runs that are pruned by PLATON's schedule, saved as small as they have become, and drawn."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from study import Run, Study, StudyOptions
from timing import Batch, timing_rows
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_moebert import PlatonConfig, PlatonPruningCallback, optimize_for_inference, save_packed, shrink
from hf_moebert.reporting.pictures import plot_pruning, plot_sparsity


@dataclass
class PruningOptions(StudyOptions):
    """Runs of a study that prunes one encoder."""

    keep_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.2, 0.1], metadata={"help": "Shares of the encoder's weights that are kept."}
    )
    criteria: list[str] = field(
        default_factory=lambda: ["magnitude", "movement", "platon"],
        metadata={"help": "See PlatonConfig; all follow one schedule."},
    )
    distil: bool = field(default=True, metadata={"help": "Also run PLATON with the dense model as its teacher."})


@dataclass(frozen=True)
class PrunedRun(Run):
    """A run that may be pruned by a recipe."""

    recipe: PlatonConfig | None = None


def plan_runs(
    recipe: PlatonConfig,
    criteria: Sequence[str],
    ratios: Sequence[float],
    *,
    baseline: Run,
    prefix: str = "",
    distil: bool = False,
) -> list[PrunedRun]:
    """Return one run for each ratio and criterion, all from one start; magnitude is what the others have to beat.

    With `distil`, PLATON is also run once for each ratio while the model of the baseline teaches it.
    """
    runs = []
    for ratio in ratios:
        for criterion in criteria:
            plan = replace(recipe, keep_ratio=ratio, criterion=criterion)
            simple = f"{prefix}magnitude-{ratio:g}"
            peer = simple if "magnitude" in criteria and criterion != "magnitude" else baseline.name
            runs.append(PrunedRun(f"{prefix}{criterion}-{ratio:g}", start=baseline.start, peer=peer, recipe=plan))
    for ratio in ratios if distil else []:
        plan = replace(recipe, keep_ratio=ratio, criterion="platon")
        peer = f"{prefix}platon-{ratio:g}" if "platon" in criteria else baseline.name
        name = f"{prefix}distilled-platon-{ratio:g}"
        runs.append(PrunedRun(name, teacher=baseline.name, peer=peer, recipe=plan))
    return runs


class PruningStudy(Study):
    """Runs that are pruned by their recipe, if they have one."""

    def settings(self, run: PrunedRun) -> dict[str, Any]:
        """Add the recipe."""
        return super().settings(run) | {"recipe": None if run.recipe is None else asdict(run.recipe)}

    def extras(self, run: PrunedRun, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Prune while training."""
        return {"callbacks": [] if run.recipe is None else [PlatonPruningCallback(run.recipe)]}

    def save(self, trainer: Trainer, run: PrunedRun, folder: Path) -> None:
        """Save a model without its zero units if whole ones were pruned, else without its zeros; draw its pruning."""
        if run.recipe is None:
            super().save(trainer, run, folder)
            return
        if run.recipe.granularity == "structured":
            shrink(trainer.model, multiple_of=8).save_pretrained(folder)
        else:
            save_packed(trainer.model, folder)
        plot_sparsity(trainer.state.log_history, folder / "sparsity.png")
        plot_pruning(trainer.state.log_history, folder / "pruning.png")

    def speed_rows(
        self, runs: Sequence[Run], seed: int, inputs: Batch, *, precision: str | None = None
    ) -> list[dict[str, str]]:
        """Time models on one batch against the first of them, in stock torch or optimised to a precision."""
        models = {run.name: self.load(run.name, seed) for run in runs}
        if precision is not None:
            models = {name: optimize_for_inference(model, precision=precision) for name, model in models.items()}
        calls = {name: torch.no_grad()(partial(model, **inputs)) for name, model in models.items()}
        return timing_rows(calls, f"speed-up over {runs[0].name}")

    def pictures(self, runs: Sequence[PrunedRun], seeds: Sequence[int]) -> list[tuple[str, Path]]:
        """Return the pictures of the first seed."""
        return [
            (f"{run.name}: {caption}", self.folder(run.name, seeds[0]) / file)
            for run in runs
            if run.recipe is not None
            for caption, file in (("zeros of each matrix", "sparsity.png"), ("course", "pruning.png"))
        ]
