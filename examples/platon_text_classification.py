"""Prune an encoder while it is fine-tuned, by several criteria under one schedule, and compare what is left of it.

    python examples/platon_text_classification.py --smoke --output_dir build/platon-smoke
    python examples/platon_text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence \
        --seeds 0 1 2 --final_ratios 0.5 0.2 0.1 --learning_rate 1e-4 --output_dir build/platon-sst2
    python examples/platon_text_classification.py --granularity structured --final_ratios 0.5 --criteria platon …

Every argument of `TrainingArguments`, `PlatonConfig` and `DistillationConfig` may be given; the others are below.
Each seed fine-tunes the encoder densely, prunes it by every criterion at every ratio from the same start, and once
more by PLATON while the dense model teaches it. Finished runs are not repeated when the command is run again.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from text_task import TaskArguments, TextTask, make_smoke_inputs
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_moebert import (
    DistillationConfig,
    DistillationTrainer,
    PlatonConfig,
    PlatonPruningCallback,
    save_packed,
    shrink,
)
from hf_moebert.benchmark import compare_latency, environment
from hf_moebert.evaluation import (
    CLASSIFICATION_SCORES,
    REGRESSION_SCORES,
    bootstrap_interval,
    paired_bootstrap,
    predict_logits,
)
from hf_moebert.footprint import measure_footprint
from hf_moebert.report import markdown_table, plot_pruning, plot_sparsity, short_number


@dataclass
class ExampleArguments:
    """Which runs to make."""

    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Runs of everything."})
    final_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.2, 0.1], metadata={"help": "Shares of the encoder's weights that are kept."}
    )
    criteria: list[str] = field(
        default_factory=lambda: ["magnitude", "movement", "platon"],
        metadata={"help": "See PlatonConfig; all follow one schedule."},
    )
    distil: bool = field(default=True, metadata={"help": "Whether PLATON is also run with a teacher."})


class Study:
    """All runs of the comparison; each leaves a JSON file with its predictions and figures."""

    def __init__(
        self, task: TextTask, args: TrainingArguments, recipe: PlatonConfig, distillation: DistillationConfig
    ) -> None:
        self.task, self.args, self.recipe, self.distillation = task, args, recipe, distillation
        self.folder = Path(args.output_dir)

    def run(self, name: str, seed: int, train: Callable[[], Trainer]) -> None:
        """Make one run, unless it is there already, and keep what it brought."""
        folder = self.folder / f"seed-{seed}" / name
        if (folder / "result.json").exists():
            return
        print(f"Seed {seed}: {name}", flush=True)
        trainer = train()
        model = trainer.model.eval()
        result = self.describe(model)
        if self.recipe.granularity == "structured" and name != "dense":
            result |= self.describe(model := shrink(model, multiple_of=8))
        save = model.save_pretrained if name == "dense" or self.recipe.granularity == "structured" else None
        (save or partial(save_packed, model))(folder)
        self.task.tokenizer.save_pretrained(folder)
        if any("platon_ratio" in entry for entry in trainer.state.log_history):
            plot_sparsity(trainer.state.log_history, folder / "sparsity.png")
            plot_pruning(trainer.state.log_history, folder / "pruning.png")
        (folder / "result.json").write_text(json.dumps(result) + "\n")

    def describe(self, model: PreTrainedModel) -> dict:
        """Predict the validation examples and count what the model holds."""
        logits = predict_logits(model, self.task.data["validation"], data_collator=self.task.collator)
        predictions = logits[:, 0] if self.task.labels is None else logits.argmax(-1)  # (examples,)
        footprint = measure_footprint(model, seq_len=16)
        return {"predictions": predictions.tolist(), "total": footprint.total, "nonzero": footprint.nonzero}

    def fine_tune(
        self, seed: int, recipe: PlatonConfig | None = None, teacher: PreTrainedModel | None = None
    ) -> Trainer:
        """Train a fresh model; densely without a recipe, alone without a teacher."""
        set_seed(seed)
        args = copy.deepcopy(self.args)
        args.seed, args.logging_first_step = seed, True
        args.output_dir = str(self.folder / f"seed-{seed}" / "checkpoints")
        teaching = {} if teacher is None else {"teacher": teacher, "distillation": self.distillation}
        trainer = (DistillationTrainer if teaching else Trainer)(
            model=self.task.new_model(),
            args=args,
            train_dataset=self.task.data["train"],
            data_collator=self.task.collator,
            processing_class=self.task.tokenizer,
            callbacks=[] if recipe is None else [PlatonPruningCallback(recipe)],
            **teaching,
        )
        trainer.train()
        return trainer

    def teacher(self, seed: int) -> PreTrainedModel:
        """Load the dense model of this seed."""
        return type(self.task.new_model()).from_pretrained(self.folder / f"seed-{seed}" / "dense")

    def result(self, name: str, seed: int) -> dict:
        """Read what one run brought."""
        return json.loads((self.folder / f"seed-{seed}" / name / "result.json").read_text())

    def rows(self, names: list[str], seeds: list[int]) -> list[dict[str, str]]:
        """One row per run: the mean over the seeds, with intervals over the validation examples."""
        references = np.asarray(self.task.data["validation"]["labels"])
        scores = (
            REGRESSION_SCORES["pearson_spearman"] if self.task.labels is None else CLASSIFICATION_SCORES["accuracy"]
        )
        (metric, of_one), *_ = scores.items()

        def mean(predictions: np.ndarray, gold: np.ndarray) -> float:
            return float(np.mean([of_one(column, gold) for column in predictions.T]))

        predictions = {
            name: np.stack([self.result(name, seed)["predictions"] for seed in seeds], axis=1) for name in names
        }  # (examples, seeds)
        rows = []
        for name in names:
            value = bootstrap_interval(mean, predictions[name], references)
            low = self.result(name, seeds[0])
            row = {"run": name, "weights that are not zero": short_number(low["nonzero"]), metric: interval(value)}
            row["seeds"] = " ".join(f"{of_one(column, references):.4f}" for column in predictions[name].T)
            peer = peer_of(name, names)
            difference = peer and paired_bootstrap(mean, predictions[name], predictions[peer], references)
            row["difference"] = f"{interval(difference, '+.4f')} to {peer}" if difference else "–"
            rows.append(row)
        return rows


def interval(value: object, number: str = ".4f") -> str:
    """Write a value with its interval."""
    return f"{value.value:{number}} [{value.low:{number}}, {value.high:{number}}]"


def peer_of(name: str, names: list[str]) -> str | None:
    """What a run is compared with: magnitude at its ratio, or PLATON alone for PLATON with a teacher."""
    ratio = name.rpartition("-")[2]
    peer = f"platon-{ratio}" if name.startswith("distilled") else f"magnitude-{ratio}"
    peer = peer if name not in ("dense", peer) else "dense"
    return peer if peer in names and peer != name else None


def time_shrunk(study: Study, names: list[str], seed: int) -> list[dict[str, str]]:
    """Time the narrower models against the dense one, one sequence of 128 tokens, on one thread."""
    torch.set_num_threads(1)
    family = {"dense": study.teacher(seed).eval()}
    for name in names[1:]:
        family[name] = AutoModelForSequenceClassification.from_pretrained(study.folder / f"seed-{seed}" / name).eval()
    length = min(128, family["dense"].config.max_position_embeddings)
    ids = torch.randint(family["dense"].config.vocab_size, (1, length))
    calls = {name: torch.no_grad()(partial(model, input_ids=ids)) for name, model in family.items()}
    ratios = compare_latency(calls, baseline="dense", clock="cpu")
    return [{"run": n, "speed-up": f"{r.median:.2f}x [{r.low:.2f}, {r.high:.2f}]"} for n, r in ratios.items()]


def main() -> None:
    """Make the runs that are missing, then the table."""
    parser = HfArgumentParser((TaskArguments, ExampleArguments, TrainingArguments, PlatonConfig, DistillationConfig))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        arguments, example, args, recipe, distillation = parser.parse_json_file(sys.argv[1])
    else:
        arguments, example, args, recipe, distillation = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_inputs(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy = 1, "no"
    task = TextTask(arguments, tokenizer_from=arguments.model_name_or_path, seed=args.seed)
    study = Study(task, args, recipe, distillation)

    plans = {
        f"{criterion}-{ratio:g}": replace(recipe, final_ratio=ratio, criterion=criterion)
        for ratio in example.final_ratios
        for criterion in example.criteria
    }
    distilled = [f"distilled-platon-{ratio:g}" for ratio in example.final_ratios] if example.distil else []
    names = ["dense", *plans, *distilled]
    for seed in example.seeds:
        study.run("dense", seed, partial(study.fine_tune, seed))
        for name, plan in plans.items():
            study.run(name, seed, partial(study.fine_tune, seed, plan))
        for name, ratio in zip(distilled, example.final_ratios, strict=False):
            plan = replace(recipe, final_ratio=ratio)
            study.run(name, seed, partial(study.fine_tune, seed, plan, study.teacher(seed)))

    tables = [markdown_table(study.rows(names, example.seeds))]
    if recipe.granularity == "structured":
        tables.append(markdown_table(time_shrunk(study, names, example.seeds[0])))
    facts = {"command": " ".join(["python", *sys.argv]), **environment()}
    tables.append(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    report = Path(args.output_dir) / "report.md"
    report.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print(f"{tables[0]}\n\nReport: {report}")


if __name__ == "__main__":
    main()
