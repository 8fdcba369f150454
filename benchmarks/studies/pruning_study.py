"""What the pruning examples share: runs that leave a checkpoint each, and one table and report over all of them."""

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from hf_moebert import (
    DistillationConfig,
    DistillationTrainer,
    PlatonConfig,
    PlatonPruningCallback,
    save_packed,
    shrink,
)
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.measuring.latency import compare_latency, environment
from hf_moebert.measuring.scores import Interval, Score, bootstrap_interval, paired_bootstrap
from hf_moebert.reporting.pictures import plot_pruning, plot_sparsity
from hf_moebert.reporting.report import picture_link
from hf_moebert.reporting.tables import Rows, escape_markdown, markdown_table, short_number


class Task(Protocol):
    """What is learned: the data, the models for it, and what their predictions are worth."""

    auto_class: type  # that loads a checkpoint
    train_dataset: Sequence[dict]
    collator: Callable[[list[dict]], dict]
    tokenizer: PreTrainedTokenizerBase | None
    references: np.ndarray  # (examples,)
    metrics: dict[str, Score]
    number: str  # the format of a score

    def new_model(self) -> PreTrainedModel:
        """Make an untrained model; its values come from the seed that was set last."""

    def predict(self, model: PreTrainedModel) -> list:
        """Predict the validation examples, in a form that JSON knows."""


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        name: Also of its folder.
        recipe: How it is pruned, if it is.
        start: The run whose model it goes on with, instead of a new one.
        teacher: The run whose model teaches it.
        peer: The run it is compared with.
    """

    name: str
    recipe: PlatonConfig | None = None
    start: str | None = None
    teacher: str | None = None
    peer: str | None = None


def plan_runs(
    recipe: PlatonConfig,
    criteria: list[str],
    ratios: list[float],
    *,
    baseline: Run,
    prefix: str = "",
    distil: bool = False,
) -> list[Run]:
    """One run for each ratio and criterion, all from one start; magnitude is what the others have to beat.

    With `distil`, PLATON is also run once for each ratio while the model of the baseline teaches it.
    """
    runs = []
    for ratio in ratios:
        for criterion in criteria:
            plan = replace(recipe, keep_ratio=ratio, criterion=criterion)
            simple = f"{prefix}magnitude-{ratio:g}"
            peer = simple if "magnitude" in criteria and criterion != "magnitude" else baseline.name
            runs.append(Run(f"{prefix}{criterion}-{ratio:g}", plan, start=baseline.start, peer=peer))
    for ratio in ratios if distil else []:
        plan = replace(recipe, keep_ratio=ratio, criterion="platon")
        peer = f"{prefix}platon-{ratio:g}" if "platon" in criteria else baseline.name
        runs.append(Run(f"{prefix}distilled-platon-{ratio:g}", plan, teacher=baseline.name, peer=peer))
    return runs


class PruningStudy:
    """All runs of a comparison. One that is complete on disk is not repeated when the example is run again."""

    def __init__(self, task: Task, args: TrainingArguments, distillation: DistillationConfig | None = None) -> None:
        self.task, self.args, self.distillation = task, args, distillation
        self.output = Path(args.output_dir)

    def folder(self, name: str, seed: int) -> Path:
        """Say where a run leaves what it makes."""
        return self.output / f"seed-{seed}" / name

    def load(self, name: str, seed: int) -> PreTrainedModel:
        """Load what a run saved."""
        return self.task.auto_class.from_pretrained(self.folder(name, seed))

    def make(self, run: Run, seed: int) -> None:
        """Train, prune and save a model, then load it again and evaluate that."""
        folder, settings = self.folder(run.name, seed), self.settings(run)
        if (folder / "result.json").exists():
            if (made := self.result(run.name, seed)["settings"]) != settings:
                raise SystemExit(f"{folder} was made by {made}, not by {settings}. Choose another --output_dir.")
            return
        print(f"Seed {seed}: {run.name}", flush=True)
        trainer = self.train(run, seed)
        self.save(trainer.model.eval(), run, folder)
        if self.task.tokenizer is not None:
            self.task.tokenizer.save_pretrained(folder)
        if run.recipe is not None:
            plot_sparsity(trainer.state.log_history, folder / "sparsity.png")
            plot_pruning(trainer.state.log_history, folder / "pruning.png")
        result = {
            "predictions": self.task.predict(self.load(run.name, seed).to(self.args.device)),
            "sizes": self.sizes(trainer.model, run, seed),
            "settings": settings,
            "command": " ".join(["python", *sys.argv]),
            **self.findings(trainer, run),
        }
        (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")

    def save(self, model: PreTrainedModel, run: Run, folder: Path) -> None:
        """Save what was trained, as small as it has become."""
        save(model, run.recipe, folder)

    def sizes(self, model: PreTrainedModel, run: Run, seed: int) -> dict[str, int]:
        """Count the weights of what a run trained and saved, and its bytes on disk."""
        folder = self.folder(run.name, seed)
        footprint = measure_footprint(self.load(run.name, seed), seq_len=1, folder=folder)
        return {"stored": footprint.total, "not zero": footprint.nonzero, "bytes": footprint.bytes_on_disk}

    def findings(self, trainer: Trainer, run: Run) -> dict[str, Any]:
        """Say what else is worth keeping of a run, in a form that JSON knows."""
        return {}

    def settings(self, run: Run) -> dict:
        """Say what decides how a run ends, in a form that JSON knows."""
        names = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "bf16")
        settings: dict[str, Any] = {name: getattr(self.arguments(run), name) for name in names}
        return settings | {"recipe": None if run.recipe is None else asdict(run.recipe)}

    def arguments(self, run: Run) -> TrainingArguments:
        """Say what a run is trained with; all alike, unless a study says otherwise."""
        return self.args

    def distillation_of(self, run: Run) -> DistillationConfig | None:
        """Say how a run follows its teacher; all alike, unless a study says otherwise."""
        return self.distillation

    def extras(self, run: Run) -> dict[str, Any]:
        """Say what else the Trainer is given for a run."""
        return {"callbacks": [] if run.recipe is None else [PlatonPruningCallback(run.recipe)]}

    def start(self, run: Run, seed: int) -> PreTrainedModel:
        """Make the model that a run trains."""
        return self.task.new_model() if run.start is None else self.load(run.start, seed)

    def train(self, run: Run, seed: int) -> Trainer:
        """Train with the stock Trainer, or with its one subclass if there is a teacher."""
        set_seed(seed)
        args = copy.deepcopy(self.arguments(run))
        args.seed, args.logging_first_step = seed, True  # the pictures need a point, however short the run
        args.output_dir = str(self.folder("checkpoints", seed))
        teaching: dict[str, Any] = {}
        if run.teacher is not None:
            teaching = {"teacher": self.load(run.teacher, seed), "distillation": self.distillation_of(run)}
        trainer = (DistillationTrainer if teaching else Trainer)(
            model=self.start(run, seed),
            args=args,
            train_dataset=self.task.train_dataset,
            data_collator=self.task.collator,
            processing_class=self.task.tokenizer,
            **teaching,
            **self.extras(run),
        )
        trainer.train()
        return trainer

    def result(self, name: str, seed: int) -> dict:
        """Read what one run brought."""
        return json.loads((self.folder(name, seed) / "result.json").read_text(encoding="utf-8"))

    def rows(self, runs: list[Run], seeds: list[int]) -> list[dict[str, str]]:
        """One row for each run: means over the seeds, with intervals over the validation examples."""
        results = {run.name: [self.result(run.name, seed) for seed in seeds] for run in runs}
        predictions = {
            name: np.stack([result["predictions"] for result in of_run], axis=1) for name, of_run in results.items()
        }  # (examples, seeds)
        rows = []
        for run in runs:
            row = {"run": run.name}
            for metric, score in self.task.metrics.items():
                row |= self.score_row(metric, score, predictions[run.name], predictions.get(run.peer), run.peer)
            of_run = [result["sizes"] for result in results[run.name]]
            sizes = {key: short_number(round(np.mean([of[key] for of in of_run]))) for key in of_run[0]}
            row |= {f"weights {key}": size for key, size in sizes.items() if key != "bytes"}
            row["on disk"] = sizes["bytes"] + "B"
            rows.append(row)
        return rows

    def score_row(
        self, metric: str, score: Score, mine: np.ndarray, other: np.ndarray | None, peer: str | None
    ) -> dict[str, str]:
        """Score the predictions of all seeds, `(examples, seeds)`, and compare them with another run's."""
        gold, mean, number = self.task.references, partial(mean_over_seeds, score), self.task.number
        row = {metric: show(bootstrap_interval(mean, mine, gold), number)}
        if mine.shape[1] > 1:
            row[f"{metric} of each seed"] = " ".join(f"{score(column, gold):{number}}" for column in mine.T)
        row[f"{metric} difference"] = "–"
        if other is not None:
            row[f"{metric} difference"] = f"{show(paired_bootstrap(mean, mine, other, gold), '+' + number)} to {peer}"
        return row

    def speed_rows(self, names: list[str], seed: int, inputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        """Time models on one batch against the first of them, on one thread of the processor."""
        torch.set_num_threads(1)
        calls = {name: torch.no_grad()(partial(self.load(name, seed), **inputs)) for name in names}
        ratios = compare_latency(calls, baseline=names[0], clock="cpu")
        return [
            {"run": name, f"speed-up over {names[0]}": f"{r.median:.2f}x [{r.low:.2f}, {r.high:.2f}]"}
            for name, r in ratios.items()
        ]

    def report(self, title: str, about: str, runs: list[Run], seeds: list[int], *, speed: Rows = ()) -> None:
        """Write report.md: tables, what they were made by, and pictures; print the tables."""
        tables = [markdown_table(self.rows(runs, seeds)), *([markdown_table(speed)] if speed else [])]
        commands = dict.fromkeys(self.result(run.name, seed)["command"] for seed in seeds for run in runs)
        facts = {"command": "; ".join(commands), **environment()}
        pictures = [picture_link(self.output, *picture) for picture in self.pictures(runs, seeds)]
        intervals = "Means over the seeds; intervals (95 %) are bootstrapped over the validation examples."
        facts_table = markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()])
        parts = [f"# {escape_markdown(title)}", escape_markdown(about), *tables, intervals, facts_table, *pictures]
        report = self.output / "report.md"
        report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print("\n\n".join([about, *tables, f"Report: {report}"]))

    def pictures(self, runs: list[Run], seeds: list[int]) -> list[tuple[str, Path]]:
        """Return caption and file of the pictures of the report: those of the first seed."""
        return [
            (f"{run.name}: {caption}", self.folder(run.name, seeds[0]) / file)
            for run in runs
            if run.recipe is not None
            for caption, file in (("zeros of each matrix", "sparsity.png"), ("course", "pruning.png"))
        ]


def save(model: PreTrainedModel, recipe: PlatonConfig | None, folder: Path) -> None:
    """Save a model: without its zero units if whole ones were pruned, without its zeros if single weights were."""
    if recipe is None:
        model.save_pretrained(folder)
    elif recipe.granularity == "structured":
        shrink(model, multiple_of=8).save_pretrained(folder)
    else:
        save_packed(model, folder)


def mean_over_seeds(score: Score, predictions: np.ndarray, references: np.ndarray) -> float:
    """Score the predictions of each seed, `(examples, seeds)`, and take the mean."""
    return float(np.mean([score(column, references) for column in predictions.T]))


def show(interval: Interval, number: str) -> str:
    """Write a value with its interval."""
    return f"{interval.value:{number}} [{interval.low:{number}}, {interval.high:{number}}]"
