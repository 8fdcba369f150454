"""Measure compressed models once they are optimised for inference: their scores, and how fast they are."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import Run, Study, command, write_report
from timing import with_ratio_interval
from transformers import PreTrainedModel

from hf_moebert import optimize_for_inference
from hf_moebert.measuring.latency import SpeedUp, compare_times, environment, time_rounds
from hf_moebert.methods.moebert.conversion import measure_expert_load
from hf_moebert.reporting.pictures import plot_quality_and_speed
from hf_moebert.reporting.report import picture_link
from hf_moebert.reporting.tables import escape_markdown, markdown_table


STOCK = "stock"  # the precision of a model that nothing was done to
LOAD_EXAMPLES = 512  # validation examples that the shares of experts are counted on


@dataclass(frozen=True)
class Deployed:
    """A model, and the precision it is optimised for; its name is that of what was measured of it."""

    model: str
    precision: str

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}"


class Measurement:
    """Every model at every precision, and the first one as it is, which they are compared with."""

    def __init__(self, study: Study, runs: Sequence[Run], seeds: Sequence[int], precisions: list[str]) -> None:
        self.study, self.runs, self.seeds = study, runs, seeds
        self.baseline = Deployed(runs[0].name, STOCK)
        self.deployed = [self.baseline, *(Deployed(run.name, precision) for run in runs for precision in precisions)]

    def file(self, seed: int) -> Path:
        """Return where the measurement of a seed is kept."""
        return self.study.output / f"seed-{seed}" / "measurement.json"

    def load(self, deployed: Deployed, seed: int) -> PreTrainedModel:
        """Load a model, ready to be asked."""
        model = self.study.load(deployed.model, seed)
        return model if deployed.precision == STOCK else optimize_for_inference(model, precision=deployed.precision)

    def measure(self, seed: int, batch_sizes: list[int], *, sentences: int, rounds: int) -> None:
        """Predict with all models of a seed and time them in turns, on one thread of the processor."""
        torch.set_num_threads(1)
        models = {str(deployed): self.load(deployed, seed) for deployed in self.deployed}
        times = {}
        for size in batch_sizes:
            batches = self.draw_batches(size, sentences, seed)
            calls = {name: partial(run_all, model, batches) for name, model in models.items()}
            times[size] = time_rounds(calls, rounds=rounds, clock="cpu")
        measured = {
            "predictions": {name: self.study.task.predict(model) for name, model in models.items()},
            "seconds": {size: {name: t.tolist() for name, t in of_size.items()} for size, of_size in times.items()},
            "sentences": sentences,
            "expert_load": self.expert_loads(seed),
            "command": command(),
            "environment": environment(),
        }
        self.file(seed).write_text(json.dumps(measured) + "\n", encoding="utf-8")

    def draw_batches(self, size: int, sentences: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """Draw validation sentences, the same for every batch size, each batch as long as its longest sentence."""
        data = self.study.task.validation.remove_columns("labels").shuffle(seed=seed)
        rows = data.select(range(min(sentences, len(data)))).to_list()
        return [self.study.task.collator(rows[start : start + size]) for start in range(0, len(rows), size)]

    def expert_loads(self, seed: int) -> dict[str, list]:
        """Count the tokens that each expert of each layer gets, `(layers, experts)`, of every model with experts."""
        models = {run.name: self.study.load(run.name, seed) for run in self.runs}
        data, collator = self.study.task.validation, self.study.task.collator
        data = data.select(range(min(LOAD_EXAMPLES, len(data))))
        return {
            name: measure_expert_load(model, data, collator).tolist()
            for name, model in models.items()
            if getattr(model.config, "num_experts", None)
        }

    def report(self, title: str, about: str) -> None:
        """Write report.md and its picture of what was measured; print the table."""
        measured = [json.loads(self.file(seed).read_text(encoding="utf-8")) for seed in self.seeds]
        output, metric = self.study.output, next(iter(self.study.task.metrics))
        picture = output / "quality_and_speed.png"
        plot_quality_and_speed(self.points(measured), picture, quality=metric)
        table = markdown_table(self.rows(measured))
        facts = {"command": "; ".join(dict.fromkeys(of_seed["command"] for of_seed in measured))}
        facts |= measured[0]["environment"]
        parts = [
            escape_markdown(about),
            picture_link(output, f"{metric} beside speed", picture),
            table,
            "## As trained",
            markdown_table(self.study.rows(list(self.runs), list(self.seeds))),
            "## Tokens of an expert",
            markdown_table(expert_rows([of_seed["expert_load"] for of_seed in measured])),
        ]
        print("\n\n".join([table, f"Report: {write_report(output, title, parts, facts)}"]))

    def rows(self, measured: Sequence[dict]) -> list[dict[str, str]]:
        """One row for each model at each precision."""
        predictions, ratios = self.predictions(measured), self.speed_ups(measured)
        peer, rows = str(self.baseline), []
        for deployed in self.deployed:
            name, row = str(deployed), asdict(deployed)
            other = None if name == peer else predictions[peer]
            for metric, score in self.study.task.metrics.items():
                row |= self.study.score_row(metric, score, predictions[name], other, peer)
            for way, of_way in ratios.items():
                row[f"speed-up, {way}"] = "1" if name == peer else with_ratio_interval(of_way[name])
            rows.append(row)
        return rows

    def points(self, measured: Sequence[dict]) -> list[dict[str, Any]]:
        """Return the rows as numbers, for the picture: the first metric of the task."""
        score, gold = next(iter(self.study.task.metrics.values())), self.study.task.references
        predictions, ratios = self.predictions(measured), self.speed_ups(measured)
        points = []
        for deployed in self.deployed:
            name, point = str(deployed), asdict(deployed)
            point["quality"] = asdict(self.study.interval(score, predictions[name], gold))
            point["speed_up"] = {way: asdict(of_way[name]) for way, of_way in ratios.items()}
            points.append(point)
        return points

    def predictions(self, measured: Sequence[dict]) -> dict[str, np.ndarray]:
        """Put the predictions of all seeds side by side, `(examples, seeds)`."""
        names = map(str, self.deployed)
        return {name: np.stack([of_seed["predictions"][name] for of_seed in measured], axis=1) for name in names}

    def speed_ups(self, measured: Sequence[dict]) -> dict[str, dict[str, SpeedUp]]:
        """Compare all rounds of all seeds with the baseline, for each batch size."""
        baseline, ratios = str(self.baseline), {}
        for size in measured[0]["seconds"]:
            times = {
                name: np.concatenate([of_seed["seconds"][size][name] for of_seed in measured])  # (seeds * rounds,)
                for name in map(str, self.deployed)
            }
            itself = SpeedUp(1.0, 1.0, 1.0, 0.0, len(times[baseline]), 1, "cpu")
            ratios[f"batches of {size}"] = {baseline: itself} | compare_times(times, baseline=baseline, clock="cpu")
        return ratios


def run_all(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]]) -> None:
    """Ask a model about some batches, one after the other."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def expert_rows(loads: Sequence[dict[str, list]]) -> list[dict[str, str]]:
    """Return the smallest and the largest share of the validation tokens over all layers and seeds."""
    rows = []
    for name in loads[0]:
        counts = np.array([of_seed[name] for of_seed in loads], dtype=float)  # (seeds, layers, experts)
        shares = counts / counts.sum(-1, keepdims=True)  # (seeds, layers, experts)
        rows.append({"run": name, "smallest share": f"{shares.min():.1%}", "largest share": f"{shares.max():.1%}"})
    return rows
