"""Make encoders two and three times as fast by several rules, with one teacher and the same steps, and compare.

    python benchmarks/studies/structured_pruning.py --smoke --output_dir build/structured-smoke
    python benchmarks/studies/structured_pruning.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --seeds 0 1 2 \
        --teacher_steps 400 --max_steps 200 --learning_rate 2e-4 --output_dir build/structured-sst2

Every argument of `TrainingArguments`, `PlatonConfig` and `DistillationConfig` may be given; the others are below.
Each seed fine-tunes the encoder densely, and every student begins as that model and learns from it. "magnitude",
"importance" and "platon" prune while they train, within a budget of measured time; "one-shot" is `prune_structured`
before the training, "torch-pruning" the group Taylor importance of that package, "depth" the model with fewer layers.
What is left is timed in turns with the dense model. "torch-pruning" is left out where the package is not installed.
"""

import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from group_taylor import is_installed, prune_by_group_taylor
from pruning import PrunedRun, PruningStudy
from smoke import make_smoke_texts
from study import StudyOptions
from tasks import TextArguments, TextTask
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from hf_moebert import (
    DistillationConfig,
    PlatonConfig,
    PlatonPruningCallback,
    drop_layers,
    measure_unit_latency,
    prune_structured,
    shrink,
)
from hf_moebert.architectures.protocols import UnitCosts


CRITERIA = ("magnitude", "importance", "platon")  # that prune while they train
RULES = ("depth", "magnitude", "importance", "platon", "one-shot", "torch-pruning")
ABOUT = """\
All students begin as the dense model of their seed and learn from it for the same steps. `2x` is what a latency \
table of the machine was asked for, and for `depth` the share of the layers. Scores are means over the seeds.\
"""


@dataclass
class StructuredOptions(StudyOptions):
    """Runs of the study."""

    teacher_steps: int | None = field(
        default=None, metadata={"help": "Steps of the dense model, if not as many as of a student."}
    )
    speed_ups: list[float] = field(
        default_factory=lambda: [2.0, 3.0], metadata={"help": "Speed-ups over the dense model that are asked for."}
    )
    rules: list[str] = field(default_factory=lambda: list(RULES), metadata={"help": f"Some of {', '.join(RULES)}."})
    batch_size: int = field(default=1, metadata={"help": "Texts of the batch that is timed."})
    seq_len: int = field(default=128, metadata={"help": "Tokens of each of them."})
    score_examples: int = field(default=512, metadata={"help": "Training texts that prune before the training."})


@dataclass(frozen=True)
class StructuredRun(PrunedRun):
    """A student that is made faster by a rule; a recipe prunes it while it trains."""

    rule: str | None = None
    speed_up: float | None = None


class StructuredStudy(PruningStudy):
    """Students that are pruned to a speed-up, before or while they learn from the dense model."""

    def arguments(self, run: StructuredRun) -> TrainingArguments:
        """Train the dense model for steps of its own."""
        args = copy.deepcopy(self.args)
        if run.rule is None and self.options.teacher_steps is not None:
            args.max_steps = self.options.teacher_steps
        return args

    def settings(self, run: StructuredRun) -> dict[str, Any]:
        """Add how a student is made and taught."""
        if run.rule is None:
            return super().settings(run)
        asked = {"rule": run.rule, "speed_up": run.speed_up, "examples": self.options.score_examples}
        return super().settings(run) | asked | {"distillation": asdict(self.distillation_of(run))}

    def distillation_of(self, run: StructuredRun) -> DistillationConfig:
        """Let the layers that are left follow those that they were."""
        if run.rule != "depth":
            return self.distillation
        return replace(self.distillation, layer_map=[layer + 1 for layer in self.layers_of(run)])

    def layers_of(self, run: StructuredRun) -> list[int]:
        """Choose layers that lie evenly, with the last one, which the head is used to."""
        depth = self.task.new_model().config.num_hidden_layers
        count = max(round(depth / run.speed_up), 1)
        return [depth * (index + 1) // count - 1 for index in range(count)]

    def start(self, run: StructuredRun, seed: int) -> PreTrainedModel:
        """Make the model that a run trains."""
        model = super().start(run, seed)
        if run.rule == "depth":
            return drop_layers(model, self.layers_of(run))
        if run.rule is None or run.recipe is not None:
            return model
        texts = self.task.train_dataset.select(range(min(self.options.score_examples, len(self.task.train_dataset))))
        prune = prune_structured if run.rule == "one-shot" else prune_by_group_taylor
        return prune(model, texts, self.task.collator, speed_up=run.speed_up, latency=self.latency(model))

    def extras(self, run: StructuredRun, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Prune while training."""
        if run.recipe is None:
            return {}
        return {"callbacks": [PlatonPruningCallback(run.recipe, latency=self.latency(model))]}

    def latency(self, model: PreTrainedModel) -> UnitCosts:
        """Measure once what units cost; all seeds have the same dense model but for its values."""
        torch.set_num_threads(1)
        shape = {"batch_size": self.options.batch_size, "seq_len": self.options.seq_len}
        return measure_unit_latency(model, **shape, file=self.output / "latency.json")

    def save(self, trainer: Trainer, run: StructuredRun, folder: Path) -> None:
        """Save a model without its zero units."""
        model = trainer.model if run.recipe is None else shrink(trainer.model, multiple_of=8)
        model.save_pretrained(folder)

    def pictures(self, runs: Any, seeds: Any) -> list[tuple[str, Path]]:
        """Return none: the courses are those of other studies."""
        return []


def plan_runs(options: StructuredOptions, recipe: PlatonConfig) -> list[StructuredRun]:
    """Return the dense run, and one for each speed-up and rule."""
    runs = [StructuredRun("dense")]
    for speed_up in options.speed_ups:
        default = f"{recipe.criterion}-{speed_up:g}x"
        for rule in options.rules:
            name = f"{rule}-{speed_up:g}x"
            student = partial(StructuredRun, name, start="dense", teacher="dense", rule=rule, speed_up=speed_up)
            plan = replace(recipe, criterion=rule, speed_up=speed_up) if rule in CRITERIA else None
            runs.append(student(peer="dense" if name == default else default, recipe=plan))
    return runs


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TextArguments, StructuredOptions, TrainingArguments, PlatonConfig, DistillationConfig))
    parser.set_defaults(granularity="structured")
    arguments, options, args, recipe, distillation = parser.parse_args_into_dataclasses()
    if "torch-pruning" in options.rules and not is_installed():
        print("torch-pruning is not installed: its rows are left out.")
        options.rules.remove("torch-pruning")
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
        args.save_strategy, options.samples = "no", 50
    study = StructuredStudy(TextTask(arguments, seed=args.seed), args, options, distillation)
    runs = plan_runs(options, recipe)
    study.make_all(runs, options.seeds)
    ids = torch.arange(options.batch_size * options.seq_len).view(options.batch_size, options.seq_len)
    inputs = {"input_ids": ids % study.task.tokenizer.vocab_size}
    speed = study.speed_rows(runs, options.seeds[0], inputs)
    study.report("Structured pruning beside its rivals", ABOUT, runs, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
