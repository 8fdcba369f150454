"""Remove whole units of fine-tuned encoders in one shot, without training, by several rules, and compare.

    python benchmarks/studies/platon_one_shot.py --smoke --output_dir build/one-shot-smoke
    python benchmarks/studies/platon_one_shot.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --seeds 0 1 2 \
        --learning_rate 1e-4 --max_steps 600 --output_dir build/one-shot-sst2

Every argument of `TrainingArguments` may be given; the others are below. Each seed fine-tunes the encoder densely;
all else starts from that model and trains nothing. "one-shot" is `prune_structured`; "importance" keeps the units with
the largest mean of |weight x gradient| of the task loss, and is alone in using labels; "magnitude" keeps those of the
largest mean size, "random" any. All of these but "one-shot" leave the weights that stay as they are. Models that are
pruned to a speed-up are timed with the batch for which they were.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pruning import PruningStudy
from smoke import make_smoke_texts
from study import Run, StudyOptions
from tasks import TextArguments, TextTask
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_moebert import PlatonConfig, measure_unit_latency, prune_structured, shrink
from hf_moebert.architectures.surgery import matrix_of
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.methods.platon.training_pruner import Pruner


RULES = ("random", "magnitude", "importance", "one-shot", "one-shot-uniform")


@dataclass
class OneShotOptions(StudyOptions):
    """Runs of the study."""

    keep_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.3], metadata={"help": "Shares of the weights of units that are kept."}
    )
    rules: list[str] = field(default_factory=lambda: list(RULES), metadata={"help": f"Some of {', '.join(RULES)}."})
    speed_ups: list[float] = field(
        default_factory=lambda: [2.0, 3.0], metadata={"help": "Speed-ups over the dense model that are asked for."}
    )
    shapes: list[str] = field(
        default_factory=lambda: ["1x128", "8x32"], metadata={"help": "Batches, texts x tokens, for which they are."}
    )
    precision: str | None = field(
        default=None, metadata={"help": "That of `optimize_for_inference` in which they run; by default stock torch."}
    )
    max_examples: int = field(default=512, metadata={"help": "Training texts that the rules may read."})


@dataclass(frozen=True)
class OneShotRun(Run):
    """A run that may prune by a rule."""

    rule: str | None = None
    keep_ratio: float | None = None
    speed_up: float | None = None
    shape: str | None = None


class OneShotStudy(PruningStudy):
    """Dense runs that are trained, and others that prune them and train nothing."""

    def settings(self, run: OneShotRun) -> dict[str, Any]:
        """Return the training of a dense run, and the rule of the others."""
        if run.rule is None:
            return super(PruningStudy, self).settings(run)
        asked = {name: getattr(run, name) for name in ("rule", "keep_ratio", "speed_up", "shape")}
        asked |= {"precision": self.options.precision if run.speed_up else None}
        asked = {name: value for name, value in asked.items() if value is not None}
        return asked | {"max_examples": self.options.max_examples}

    def extras(self, run: OneShotRun, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Train the dense model as it is."""
        return {}

    def train(self, run: OneShotRun, seed: int) -> Trainer:
        """Train the dense model, or prune it."""
        if run.rule is None:
            return super().train(run, seed)
        set_seed(seed)
        model = self.load("dense", seed)
        started = time.process_time()
        pruned = self.prune(model, run)
        self.seconds = round(time.process_time() - started)
        return Trainer(model=pruned, args=self.args, processing_class=self.task.tokenizer)

    def prune(self, model: PreTrainedModel, run: OneShotRun) -> PreTrainedModel:
        """Remove units by the rule of a run."""
        texts = self.task.train_dataset.select(range(min(self.options.max_examples, len(self.task.train_dataset))))
        if run.rule.startswith("one-shot"):
            asked = {"keep_ratio": run.keep_ratio, "uniform": run.rule == "one-shot-uniform"}
            if run.speed_up is not None:
                batch, seq = map(int, run.shape.split("x"))
                how = {"precision": self.options.precision, "file": self.output / f"latency-{run.shape}.json"}
                table = measure_unit_latency(model, batch_size=batch, seq_len=seq, **how)
                asked = {"speed_up": run.speed_up, "latency": table}
            return prune_structured(model, texts, self.task.collator, **asked)
        if run.rule == "random":
            zero_random_units(model, run.keep_ratio)
        else:
            recipe = PlatonConfig(granularity="structured", criterion=run.rule, keep_ratio=run.keep_ratio)
            pruner = Pruner(model, recipe, total_steps=100)
            if run.rule == "importance":
                measure_importance(model, pruner, DataLoader(texts, 32, collate_fn=self.task.collator))
            pruner.selector.update_masks_(pruner.keep, run.keep_ratio)
            pruner.apply_masks()
        return shrink(model, multiple_of=8)

    def reached_rows(self, runs: Sequence[OneShotRun], seed: int) -> list[dict[str, str]]:
        """Time models with the batch for which they were pruned, and dense ones, in turns."""
        rows = []
        for shape in dict.fromkeys(run.shape for run in runs if run.shape):
            ids = torch.arange(math.prod(map(int, shape.split("x")))).view(-1, int(shape.split("x")[1]))
            ids %= self.task.tokenizer.vocab_size
            of_shape = [run for run in runs if run.rule is None or run.shape == shape]
            rows += self.speed_rows(of_shape, seed, {"input_ids": ids}, precision=self.options.precision)
        return rows

    def save(self, trainer: Trainer, run: OneShotRun, folder: Path) -> None:
        """Save the model."""
        super(PruningStudy, self).save(trainer, run, folder)

    def findings(self, trainer: Trainer, run: OneShotRun) -> dict[str, Any]:
        """Return the processor time of the rule."""
        return {} if run.rule is None else {"processor seconds": self.seconds}

    def pictures(self, runs: Any, seeds: Any) -> list[tuple[str, Path]]:
        """Return none: there is no course to draw."""
        return []


def measure_importance(model: PreTrainedModel, pruner: Pruner, batches: Any) -> None:
    """Average |weight x gradient| of the task loss over batches."""
    for position, batch in enumerate(batches):
        model.zero_grad()
        model(**batch).loss.backward()
        pruner.statistics.observe(position)
    pruner.statistics.tensors["importance"] = pruner.statistics.tensors["window"]


@torch.no_grad()
def zero_random_units(model: PreTrainedModel, ratio: float) -> None:
    """Set the columns of random units to zero, as many in every layer."""
    for group in find_unit_groups(model):
        columns = matrix_of(group.writer).unflatten(1, (group.num_units, group.unit_size))
        columns[:, torch.randperm(group.num_units)[round(ratio * group.num_units) :]] = 0


def plan_runs(options: OneShotOptions) -> list[OneShotRun]:
    """Return the dense run, and one for each ratio and rule."""
    runs = [OneShotRun("dense")]
    for ratio in options.keep_ratios:
        for rule in options.rules:
            if rule != "one-shot-uniform" or ratio >= 0.5:  # all heads stay, which are a third
                runs.append(OneShotRun(f"{rule}-{ratio:g}", peer="dense", rule=rule, keep_ratio=ratio))
    for shape in options.shapes:
        for speed_up in options.speed_ups:
            name = f"one-shot-{speed_up:g}x-{shape}"
            runs.append(OneShotRun(name, peer="dense", rule="one-shot", speed_up=speed_up, shape=shape))
    return runs


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TextArguments, OneShotOptions, TrainingArguments))
    arguments, options, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
        args.save_strategy, options.samples = "no", 50
    study = OneShotStudy(TextTask(arguments, seed=args.seed), args, options)
    runs = plan_runs(options)
    study.make_all(runs, options.seeds)
    speed = study.reached_rows(runs, options.seeds[0])
    about = "Nothing but the dense model is trained: units are removed at once, by different rules."
    study.report("Pruning in one shot", about, runs, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
