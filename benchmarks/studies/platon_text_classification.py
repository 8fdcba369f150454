"""Prune an encoder while it is fine-tuned, by several criteria under one schedule, and compare what is left of it.

    python benchmarks/studies/platon_text_classification.py --smoke --output_dir build/platon-smoke
    python benchmarks/studies/platon_text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence \
        --seeds 0 1 2 --final_ratios 0.5 0.2 0.1 --learning_rate 1e-4 --output_dir build/platon-sst2
    python benchmarks/studies/platon_text_classification.py --granularity structured --final_ratios 0.5 \
        --distil false …

Every argument of `TrainingArguments`, `PlatonConfig` and `DistillationConfig` may be given; the others are below.
Each seed fine-tunes the encoder densely, prunes it by every criterion at every ratio from the same start, and once
more by PLATON while the dense model teaches it. Whole units are really removed, and the models that are left are
timed. Finished runs are not repeated when the command is run again.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pruning_study import PruningStudy, Run, plan_runs
from text_task import TaskArguments, TextTask, make_smoke_inputs
from transformers import AutoModelForSequenceClassification, HfArgumentParser, PreTrainedModel, TrainingArguments

from hf_moebert import DistillationConfig, PlatonConfig
from hf_moebert.measuring.scores import CLASSIFICATION_SCORES, REGRESSION_SCORES, predict_logits


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
    distil: bool = field(default=True, metadata={"help": "Whether PLATON is also run with the dense model teaching."})


class ClassificationTask(TextTask):
    """Texts and their labels, as a study wants them."""

    auto_class = AutoModelForSequenceClassification
    number = ".4f"

    def __init__(self, arguments: TaskArguments, *, seed: int) -> None:
        super().__init__(arguments, tokenizer_from=arguments.model_name_or_path, seed=seed)
        self.train_dataset, self.references = self.data["train"], np.asarray(self.data["validation"]["labels"])
        regression = self.labels is None
        self.metrics = REGRESSION_SCORES["pearson_spearman"] if regression else CLASSIFICATION_SCORES["accuracy"]

    def predict(self, model: PreTrainedModel) -> list:
        """Predict the validation examples: classes, or the numbers of a regression."""
        logits = predict_logits(model, self.data["validation"], data_collator=self.collator)  # (examples, labels)
        return (logits[:, 0] if self.labels is None else logits.argmax(-1)).tolist()


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TaskArguments, ExampleArguments, TrainingArguments, PlatonConfig, DistillationConfig))
    arguments, example, args, recipe, distillation = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_inputs(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy = 1, "no"
    study = PruningStudy(ClassificationTask(arguments, seed=args.seed), args, distillation)

    dense, distil = Run("dense"), example.distil
    runs = [dense, *plan_runs(recipe, example.criteria, example.final_ratios, baseline=dense, distil=distil)]
    for seed in example.seeds:
        for run in runs:
            study.make(run, seed)

    speed = []
    if recipe.granularity == "structured":
        config = study.load("dense", example.seeds[0]).config
        ids = torch.randint(config.vocab_size, (1, min(128, config.max_position_embeddings)))  # (batch, seq)
        speed = study.speed_rows([run.name for run in runs], example.seeds[0], {"input_ids": ids})
    about = "One schedule for all: only what is kept differs."
    study.report("Pruning while fine-tuning", about, runs, example.seeds, speed=speed)


if __name__ == "__main__":
    main()
