"""Serve several tasks from one encoder: fine-tune branches, make them shallow, merge them, and count what it costs.

    python benchmarks/studies/multitask_bert.py --smoke --output_dir build/multitask-smoke
    python benchmarks/studies/multitask_bert.py --model_name_or_path google-bert/bert-base-uncased --tasks tasks.json \
        --teacher_layers 4 6 8 10 --student_layers 1 2 3 --seeds 0 1 2 --num_train_epochs 3 --learning_rate 5e-5 \
        --per_device_train_batch_size 32 --save_strategy no --output_dir build/multitask
    python benchmarks/studies/multitask_bert.py … --stage report  # of the runs that are there

`tasks.json` gives each task's name its `kind` (classification, regression, tagging, crf_tagging), `train_file`,
`validation_file`, columns (`text_column`, `text_pair_column`, `label_column`, or `tokens_column`, `tags_column`),
`metric` and `max_train_examples`. Every argument of `TrainingArguments` and `MultiTaskSweepConfig` may be given; the
others are below. For each seed and task:

- `separate`: the whole encoder is fine-tuned, one model for each task;
- `teachers`: the top layers alone, as many as serve the task best; merged on the frozen layers below;
- `uniform-2`: branches of 2 layers for all tasks, distilled from the teachers;
- `mixed-1`: for each task more layers as long as one more brings 1 point.

A part of the training file chooses; the validation file is only reported on. Finished runs are not repeated when the
command is run again.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multitask_tasks import LearnedTask, read_tasks
from smoke import make_smoke_tasks
from study import StudyOptions, command, mean_over_seeds, with_interval, write_report
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.checkpoints.json_files import read_json, save_json
from hf_moebert.measuring.footprint import count_bytes
from hf_moebert.measuring.latency import compare_latency, environment
from hf_moebert.measuring.scores import Interval, Score
from hf_moebert.methods.multitask.functional import layers_run
from hf_moebert.methods.multitask.recipe import MultiTaskSweepConfig
from hf_moebert.methods.multitask.training import MultiTaskSweep, Run
from hf_moebert.methods.multitask.training_states import fingerprint_data
from hf_moebert.reporting.pictures import plot_curves
from hf_moebert.reporting.report import picture_link
from hf_moebert.reporting.tables import escape_markdown, markdown_table, short_number


ABOUT = """\
All ways start from one pre-trained encoder. `average` is that of the tasks' metrics, `share` its ratio to that of \
`separate`. Scores are means over the seeds; intervals (95 %) are bootstrapped over the validation examples. Costs \
are those of the first seed's models: a request to all tasks runs so many `layers`, and takes that much less time.\
"""


@dataclass
class MultiTaskOptions(StudyOptions):
    """The tasks to learn, and how models are compared."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pre-trained BERT: Hub id or folder."})
    tasks: str | None = field(default=None, metadata={"help": "JSON file with the tasks; see above."})
    gains: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0], metadata={"help": "Points one more layer has to bring in `mixed`."}
    )
    dev_share: float = field(default=0.1, metadata={"help": "Share of the training file that chooses."})
    max_dev_examples: int = field(default=1000, metadata={"help": "At most this many of them choose."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    samples: int = field(default=300, metadata={"help": "Resampled test sets of the intervals."})
    rounds: int = field(default=30, metadata={"help": "Requests of each way that are timed in turns."})
    stage: str = field(default="all", metadata={"help": "What to do.", "choices": ("all", "train", "report")})
    smoke: bool = field(default=False, metadata={"help": "Run on a tiny random encoder and made-up texts, offline."})


class MultiTaskStudy:
    """Sweeps over several seeds, and one table over all ways to serve the tasks."""

    def __init__(
        self,
        tasks: Mapping[str, LearnedTask],
        args: TrainingArguments,
        config: MultiTaskSweepConfig,
        options: MultiTaskOptions,
    ) -> None:
        self.tasks, self.args, self.config, self.options = tasks, args, config, options
        self.output = Path(args.output_dir)
        self.sweep, self.draws = cache(self._sweep), cache(self._draws)

    def _sweep(self, seed: int) -> MultiTaskSweep:
        args = copy.deepcopy(self.args)
        args.seed, args.output_dir = seed, str(self.output / f"seed-{seed}")
        tasks = {name: task.for_sweep() for name, task in self.tasks.items()}
        return MultiTaskSweep(tasks, args, self.config, states_dir=self.output / "states")

    def train(self) -> None:
        """Make the runs that are missing."""
        for seed in self.options.seeds:
            for task, run in self.sweep(seed).runs():
                print(f"Seed {seed}: {task}, {run.name}: {self.sweep(seed).make(task, run):.4f}", flush=True)

    def refuse_missing(self) -> None:
        """End the program if a run is missing; a report trains nothing."""
        for seed in self.options.seeds:
            for task, run in self.sweep(seed).runs():  # a task's teachers come before what is chosen among them
                if not (self.sweep(seed).folder(task, run) / "result.json").exists():
                    raise SystemExit(f"Seed {seed}: {task}, {run.name} is missing: run `--stage train` first.")

    def ways(self, seed: int) -> dict[str, dict[str, Run]]:
        """Return the run that stands for each task, in each way."""
        sweep = self.sweep(seed)
        depth = next(iter(sweep.tasks.values())).depth
        ways = {"separate": dict.fromkeys(self.tasks, Run("whole", depth))}
        ways["teachers"] = {task: Run("teacher", sweep.choose_teacher(task)) for task in self.tasks}
        for layers in sorted(self.config.student_layers):
            ways[f"uniform-{layers}"] = {task: sweep.branch(task)(layers) for task in self.tasks}
        for gain in self.options.gains:
            depths = sweep.choose_depths(gain)
            ways[f"mixed-{gain:g}"] = {task: sweep.branch(task)(layers) for task, layers in depths.items()}
        return ways

    def predictions(self, seed: int, task: str, run: Run) -> dict[str, Any]:
        """Predict the validation examples with what a run saved, once for these examples and this run."""
        sweep, file = self.sweep(seed), self.sweep(seed).folder(task, run) / "predictions.json"
        source = {"validation": fingerprint_data(self.tasks[task].validation), **sweep.settings(task, run)}
        found = read_json(file, remedy="Delete it, and they are made again.") if file.exists() else None
        if found is None or found["source"] != source:
            found = {"source": source, **self.tasks[task].predict(sweep.load(task, run), self.args)}
            save_json(file, found)
        return found

    def _draws(self, task: str, runs: tuple[Run, ...]) -> np.ndarray:
        """Score one run of each seed: on all validation examples, then on resampled ones. Shape `(1 + samples,)`."""
        learned = self.tasks[task]
        found = [self.predictions(seed, task, run) for seed, run in zip(self.options.seeds, runs, strict=True)]
        pairs = [learned.pair(of["predictions"], of["truths"]) for of in found]
        return resample(learned.score, np.stack([p for p, _ in pairs], 1), pairs[0][1], self.options.samples)

    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the draws of every task, and their mean, for each way; the same examples are drawn for all."""
        ways = {seed: self.ways(seed) for seed in self.options.seeds}
        scores: dict[str, dict[str, np.ndarray]] = {}
        for way in ways[self.options.seeds[0]]:
            of = {task: self.draws(task, tuple(ways[seed][way][task] for seed in ways)) for task in self.tasks}
            scores[way] = of | {"average": np.mean(list(of.values()), axis=0)}
        return scores

    def splits(self, seed: int, runs: Mapping[str, Run]) -> dict[str, tuple[int, int]]:
        """Return frozen and own layers of each task."""
        splits = {}
        for task, run in runs.items():
            teacher, depth = self.sweep(seed).choose_teacher(task), self.sweep(seed).tasks[task].depth
            splits[task] = (depth - teacher if run.kind != "whole" else 0, run.layers)
        return splits

    def costs(self, seed: int) -> dict[str, dict[str, Any]]:
        """Merge and save the models of each way, and measure them against separate ones."""
        sweep, ways = self.sweep(seed), self.ways(seed)
        separate = {task: sweep.load(task, run).eval() for task, run in ways["separate"].items()}
        batch = request(next(iter(separate.values())).config.vocab_size)
        each = [partial(model, **batch | complete_inputs(model, batch["input_ids"])) for model in separate.values()]
        calls: dict[str, Any] = {"separate": lambda: [call() for call in each]}
        costs: dict[str, dict[str, Any]] = {}
        for way, runs in ways.items():
            layers = layers_run(self.splits(seed, runs))
            if way == "separate":
                folders = [sweep.folder(task, run) for task, run in runs.items()]
                parameters = sum(p.numel() for model in separate.values() for p in model.parameters())
            else:
                folders = [sweep.output / "merged" / way]
                merged = sweep.merge({task: run.layers for task, run in runs.items()}).eval()
                merged.save_pretrained(folders[0])
                parameters = sum(p.numel() for p in merged.parameters())
                calls[way] = partial(merged, **batch | complete_inputs(merged, batch["input_ids"]))
            costs[way] = {"layers": layers, "parameters": parameters, "bytes": sum(map(count_bytes, folders))}
        torch.set_num_threads(1)
        timed = {way: torch.no_grad()(call) for way, call in calls.items()}
        for way, ratio in compare_latency(timed, baseline="separate", rounds=self.options.rounds, clock="cpu").items():
            costs[way]["speed-up"] = asdict(ratio)
        return costs

    def report(self) -> None:
        """Write results.json, report.md and a picture; print the tables."""
        scores, costs = self.scores(), self.costs(self.options.seeds[0])
        results = {
            "ways": {
                way: {"scores": {name: asdict(interval(draws)) for name, draws in of.items()}, **costs[way]}
                for way, of in scores.items()
            },
            "layers": {
                seed: {w: self.splits(seed, runs) for w, runs in self.ways(seed).items()}
                for seed in self.options.seeds
            },
            "dev": {seed: {t: self.sweep(seed).student_scores(t) for t in self.tasks} for seed in self.options.seeds},
            "metrics": {name: task.metric for name, task in self.tasks.items()},
            "facts": {"command": command(), **environment()},
        }
        (self.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        picture = self.output / "quality_and_layers.png"
        draw_ways(scores, costs, picture)
        tables = [markdown_table(rows) for rows in (self.score_rows(scores), cost_rows(costs), self.layer_rows())]
        link = picture_link(self.output, "quality against layers run", picture)
        parts = [escape_markdown(ABOUT), *tables, link]
        file = write_report(self.output, "Many tasks on one encoder", parts, results["facts"])
        print("\n\n".join([*tables, f"Report: {file}"]))

    def score_rows(self, scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, str]]:
        """Return one row for each way: every task's score, their average, and its share of separate models'."""
        rows = []
        for way, of in scores.items():
            row = {"way": way}
            for name, draws in of.items():
                title = f"{name}, {self.tasks[name].metric}" if name in self.tasks else name
                row[title] = with_interval(interval(draws), ".4f")
            rows.append(row | {"share": with_interval(interval(of["average"] / scores["separate"]["average"]), ".4f")})
        return rows

    def layer_rows(self) -> list[dict[str, str]]:
        """Return one row for each task: frozen + own layers in each way, seed by seed."""
        ways = {seed: self.ways(seed) for seed in self.options.seeds}
        rows = []
        for task in self.tasks:
            row = {"frozen+own layers": task}
            for way in ways[self.options.seeds[0]]:
                splits = [self.splits(seed, ways[seed][way])[task] for seed in ways]
                row[way] = " ".join(f"{frozen}+{own}" for frozen, own in splits)
            rows.append(row)
        return rows


def resample(score: Score, predictions: np.ndarray, truths: np.ndarray, samples: int) -> np.ndarray:
    """Score predictions `(examples, seeds)` on all examples, then on as many drawn with replacement, many times."""
    generator = np.random.default_rng(0)
    draws = [np.arange(len(truths)), *(generator.integers(len(truths), size=len(truths)) for _ in range(samples))]
    return np.array([mean_over_seeds(score, predictions[rows], truths[rows]) for rows in draws])


def interval(draws: np.ndarray) -> Interval:
    """Return the first value, with the interval of the others."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high))


def request(vocab_size: int, length: int = 32) -> dict[str, torch.Tensor]:
    """Make a request of one text; what the words are does not change the time."""
    ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row for each way: what a request to all tasks costs."""
    rows = []
    for way, cost in costs.items():
        ratio = cost.get("speed-up")
        row = {"way": way, "layers run": str(cost["layers"])}
        row["share of layers"] = f"{cost['layers'] / costs['separate']['layers']:.1%}"
        row |= {"parameters": short_number(cost["parameters"]), "on disk": short_number(cost["bytes"]) + "B"}
        row["speed-up"] = f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "–"
        rows.append(row)
    return rows


def draw_ways(
    scores: Mapping[str, Mapping[str, np.ndarray]], costs: Mapping[str, Mapping[str, Any]], file: Path
) -> None:
    """Draw the average score against the layers run, one line for each kind of way."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for way, of in scores.items():
        kinds.setdefault(way.split("-")[0], []).append((costs[way]["layers"], float(of["average"][0])))
    curves = {kind: tuple(zip(*sorted(points), strict=True)) for kind, points in kinds.items()}
    plot_curves(curves, file, x="layers run for all tasks", y="average score")


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((MultiTaskOptions, MultiTaskSweepConfig, TrainingArguments))
    options, config, args = parser.parse_args_into_dataclasses()
    logging.set_verbosity_error()  # each run puts a new head on the encoder, and transformers tells of every one
    logging.disable_progress_bar()
    if options.smoke:
        options.model_name_or_path, options.tasks = make_smoke_tasks(Path(args.output_dir) / "inputs")
        args.max_steps, args.save_strategy, args.disable_tqdm, args.learning_rate = 6, "no", True, 1e-2
        options.samples, options.rounds = 20, 3
        config = MultiTaskSweepConfig(teacher_layers=[1, 2], student_layers=[1])
    if options.model_name_or_path is None or options.tasks is None:
        raise SystemExit("Give --model_name_or_path and --tasks, or --smoke.")
    parts = {"max_length": options.max_length, "dev_share": options.dev_share, "seed": args.seed}
    parts["max_dev_examples"] = options.max_dev_examples
    entries = read_tasks(options.tasks)
    tasks = {name: LearnedTask(entry, options.model_name_or_path, **parts) for name, entry in entries.items()}
    study = MultiTaskStudy(tasks, args, config, options)
    if options.stage != "report":
        study.train()
    if options.stage != "train":
        study.refuse_missing()
        study.report()


if __name__ == "__main__":
    main()
