"""The framework of the studies: runs over seeds that leave a checkpoint and a result each, and one report on all."""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timing import shape_of, timing_rows, training_step
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from hf_moebert import DistillationConfig, DistillationTrainer
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.measuring.latency import environment
from hf_moebert.measuring.scores import Interval, Score, bootstrap_interval, paired_bootstrap
from hf_moebert.reporting.report import picture_link
from hf_moebert.reporting.tables import Rows, escape_markdown, markdown_table, short_number
from hf_moebert.training.optimizers import make_adamw


INTERVALS = "Means over the seeds; intervals (95 %) are bootstrapped over the validation examples."


class Task(Protocol):
    """A task to learn: its data, the models for it, and the metrics of their predictions."""

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


@dataclass
class StudyOptions:
    """Options of every study."""

    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Runs of everything."})
    samples: int = field(default=1000, metadata={"help": "Resampled test sets of the intervals."})


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        name: Also of its folder.
        start: The run whose model it goes on with, instead of a new one.
        teacher: The run whose model teaches it.
        peer: The run it is compared with.
    """

    name: str
    start: str | None = None
    teacher: str | None = None
    peer: str | None = None


class Study:
    """All runs of a comparison. One that is complete on disk is not repeated when the program is run again."""

    def __init__(
        self,
        task: Task,
        args: TrainingArguments,
        options: StudyOptions,
        distillation: DistillationConfig | None = None,
    ) -> None:
        self.task, self.args, self.options, self.distillation = task, args, options, distillation
        self.output = Path(args.output_dir)

    # What a study may change

    def folder(self, name: str, seed: int) -> Path:
        """Return where a run leaves what it makes."""
        return self.output / f"seed-{seed}" / name

    def arguments(self, run: Run) -> TrainingArguments:
        """Return the arguments of the Trainer of a run; by default all runs have the same."""
        return self.args

    def distillation_of(self, run: Run) -> DistillationConfig | None:
        """Return how a run follows its teacher; by default all do alike."""
        return self.distillation

    def start(self, run: Run, seed: int) -> PreTrainedModel:
        """Return the model that a run trains."""
        return self.task.new_model() if run.start is None else self.load(run.start, seed)

    def extras(self, run: Run, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Return further arguments of the Trainer of a run; they take precedence over the default ones."""
        return {}

    def save(self, trainer: Trainer, run: Run, folder: Path) -> None:
        """Save the model that was trained."""
        trainer.model.save_pretrained(folder)

    def load(self, name: str, seed: int) -> PreTrainedModel:
        """Load the model that a run saved."""
        return self.task.auto_class.from_pretrained(self.folder(name, seed))

    def sizes(self, model: PreTrainedModel, run: Run, seed: int) -> dict[str, int]:
        """Count the weights of the model that a run trained and saved, and its bytes on disk."""
        footprint = measure_footprint(self.load(run.name, seed), seq_len=1, folder=self.folder(run.name, seed))
        return {"stored": footprint.total, "not zero": footprint.nonzero, "bytes": footprint.bytes_on_disk}

    def findings(self, trainer: Trainer, run: Run) -> dict[str, Any]:
        """Return further results of a run, in a form that JSON knows."""
        return {}

    def settings(self, run: Run) -> dict[str, Any]:
        """Return all that decides how a run ends, in a form that JSON knows."""
        names = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "bf16")
        return {name: getattr(self.arguments(run), name) for name in names}

    def pictures(self, runs: Sequence[Run], seeds: Sequence[int]) -> list[tuple[str, Path]]:
        """Return caption and file of the pictures of the report."""
        return []

    # Making runs

    def make_all(self, runs: Sequence[Run], seeds: Sequence[int]) -> None:
        """Make the runs that are missing."""
        for seed in seeds:
            for run in runs:
                self.make(run, seed)

    def make(self, run: Run, seed: int) -> None:
        """Train and save a model, then load it again and evaluate what was loaded."""
        folder, settings = self.folder(run.name, seed), self.settings(run)
        if (folder / "result.json").exists():
            if (made := self.result(run.name, seed)["settings"]) != settings:
                raise SystemExit(f"{folder} was made by {made}, not by {settings}. Choose another --output_dir.")
            return
        print(f"Seed {seed}: {run.name}", flush=True)
        trainer = self.train(run, seed)
        trainer.model.eval()
        self.save(trainer, run, folder)
        if self.task.tokenizer is not None:
            self.task.tokenizer.save_pretrained(folder)
        result = {
            "predictions": self.task.predict(self.load(run.name, seed).to(self.args.device)),
            "sizes": self.sizes(trainer.model, run, seed),
            "settings": settings,
            "command": command(),
            **self.findings(trainer, run),
        }
        (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")

    def train(self, run: Run, seed: int) -> Trainer:
        """Train with the stock Trainer, or with its one subclass if there is a teacher."""
        set_seed(seed)
        args = copy.deepcopy(self.arguments(run))
        args.seed, args.logging_first_step = seed, True  # the pictures need a point, however short the run
        args.output_dir = str(self.folder("checkpoints", seed))
        options: dict[str, Any] = {"train_dataset": self.task.train_dataset, "data_collator": self.task.collator}
        if run.teacher is not None:
            options |= {"teacher": self.load(run.teacher, seed), "distillation": self.distillation_of(run)}
        model = self.start(run, seed)
        options |= self.extras(run, seed, model, args)
        trainer_class = Trainer if run.teacher is None else DistillationTrainer
        trainer = trainer_class(model=model, args=args, processing_class=self.task.tokenizer, **options)
        trainer.train()
        return trainer

    def choose(self, runs: Sequence[Run], seed: int, score: Callable[[Run], float]) -> Run:
        """Make runs that differ in one setting, and return the one with the best score."""
        self.make_all(runs, [seed])
        if len(runs) == 1:
            return runs[0]
        scores = [score(run) for run in runs]
        print({run.name: value for run, value in zip(runs, scores, strict=True)}, flush=True)
        return runs[int(np.argmax(scores))]

    def refuse_missing(self, runs: Sequence[Run], seeds: Sequence[int]) -> None:
        """End the program if a run is missing; a report trains nothing."""
        for seed in seeds:
            for run in runs:
                if not (self.folder(run.name, seed) / "result.json").exists():
                    raise SystemExit(f"{self.folder(run.name, seed)} holds no run yet. Leave out `--stage report`.")

    # Reporting on them

    def result(self, name: str, seed: int) -> dict[str, Any]:
        """Read the result of one run."""
        return json.loads((self.folder(name, seed) / "result.json").read_text(encoding="utf-8"))

    def predictions(self, name: str, seeds: Sequence[int]) -> np.ndarray:
        """Return the predictions of one run for all seeds, `(examples, seeds)`."""
        return np.stack([self.result(name, seed)["predictions"] for seed in seeds], axis=1)

    def rows(self, runs: Sequence[Run], seeds: Sequence[int]) -> list[dict[str, str]]:
        """Return one row for each run: means over the seeds, with intervals over the validation examples."""
        predictions = {run.name: self.predictions(run.name, seeds) for run in runs}
        rows = []
        for run in runs:
            row = {"run": run.name}
            for metric, score in self.task.metrics.items():
                row |= self.score_row(metric, score, predictions[run.name], predictions.get(run.peer), run.peer)
            of_seeds = [self.result(run.name, seed)["sizes"] for seed in seeds]
            sizes = {key: short_number(round(np.mean([sizes[key] for sizes in of_seeds]))) for key in of_seeds[0]}
            row |= {f"weights {key}": size for key, size in sizes.items() if key != "bytes"}
            row["on disk"] = sizes["bytes"] + "B"
            rows.append(row)
        return rows

    def score_row(
        self, metric: str, score: Score, mine: np.ndarray, other: np.ndarray | None, peer: str | None
    ) -> dict[str, str]:
        """Score the predictions of all seeds, `(examples, seeds)`, and compare them with another run's."""
        gold, number = self.task.references, self.task.number
        row = {metric: with_interval(self.interval(score, mine, gold), number)}
        if mine.shape[1] > 1:
            row[f"{metric} of each seed"] = " ".join(f"{score(column, gold):{number}}" for column in mine.T)
        row[f"{metric} difference"] = "–"
        if other is not None:
            difference = self.difference(score, mine, other, gold)
            row[f"{metric} difference"] = f"{with_interval(difference, '+' + number)} to {peer}"
        return row

    def interval(self, score: Score, predictions: np.ndarray, references: np.ndarray) -> Interval:
        """Score predictions `(examples, seeds)`, mean over the seeds, on resampled examples."""
        mean = partial(mean_over_seeds, score)
        return bootstrap_interval(mean, predictions, references, rounds=self.options.samples)

    def difference(self, score: Score, mine: np.ndarray, other: np.ndarray, references: np.ndarray) -> Interval:
        """Return by how much one run scores above another, mean over the seeds, on resampled examples."""
        mean = partial(mean_over_seeds, score)
        return paired_bootstrap(mean, mine, other, references, rounds=self.options.samples)

    def step_rows(self, runs: Sequence[Run], seed: int, column: str, *, rounds: int) -> list[dict[str, str]]:
        """Time one training step in float32 of each run on one batch, against the first of them."""
        size = self.args.per_device_train_batch_size
        batch = self.task.collator([self.task.train_dataset[index] for index in range(size)])
        calls = {run.name: training_step(self.start(run, seed), batch) for run in runs}
        return timing_rows(calls, column.format(shape=shape_of(batch)), as_cost=True, rounds=rounds, warmup=1)

    def report(self, title: str, about: str, runs: Sequence[Run], seeds: Sequence[int], *, speed: Rows = ()) -> None:
        """Write report.md: tables, pictures, and how they were made; print the tables."""
        tables = [markdown_table(self.rows(runs, seeds)), *([markdown_table(speed)] if speed else [])]
        commands = dict.fromkeys(self.result(run.name, seed)["command"] for seed in seeds for run in runs)
        links = [picture_link(self.output, *picture) for picture in self.pictures(runs, seeds)]
        facts = {"command": "; ".join(commands), **environment()}
        file = write_report(self.output, title, [escape_markdown(about), *tables, INTERVALS, *links], facts)
        print("\n\n".join([about, *tables, f"Report: {file}"]))


def write_report(folder: Path, title: str, parts: Sequence[str], facts: Mapping[str, Any]) -> Path:
    """Write report.md: a title, its parts, and how they were made; return the file."""
    facts_table = markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()])
    file = folder / "report.md"
    whole = [f"# {escape_markdown(title)}", *parts, "## How it was measured", facts_table]
    file.write_text("\n\n".join(whole) + "\n", encoding="utf-8")
    return file


def command() -> str:
    """Return the command that this program was started with."""
    return " ".join(["python", *sys.argv])


def mean_over_seeds(score: Score, predictions: np.ndarray, references: np.ndarray) -> float:
    """Score the predictions of each seed, `(examples, seeds)`, and return the mean."""
    return float(np.mean([score(column, references) for column in predictions.T]))


def with_interval(interval: Interval, number: str) -> str:
    """Write a value with its interval."""
    return f"{interval.value:{number}} [{interval.low:{number}}, {interval.high:{number}}]"


def make_optimizer(model: nn.Module, args: TrainingArguments, *, part: str, rate: float) -> torch.optim.AdamW:
    """Make the Trainer's default optimizer, with a learning rate of their own for parameters whose name has a part."""
    own = [parameter for name, parameter in model.named_parameters() if part in name]
    return make_adamw(model, args, [{"params": own, "lr": rate}])
