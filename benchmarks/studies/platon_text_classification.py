"""Prune an encoder while it is fine-tuned, by several criteria under one schedule, and compare what is left of it.

    python benchmarks/studies/platon_text_classification.py --smoke --output_dir build/platon-smoke
    python benchmarks/studies/platon_text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence \
        --seeds 0 1 2 --keep_ratios 0.5 0.2 0.1 --learning_rate 1e-4 --output_dir build/platon-sst2
    python benchmarks/studies/platon_text_classification.py --granularity structured --keep_ratios 0.5 \
        --distil false …

Every argument of `TrainingArguments`, `PlatonConfig` and `DistillationConfig` may be given; the others are below.
Each seed fine-tunes the encoder densely, prunes it by every criterion at every ratio from the same start, and once
more by PLATON while the dense model teaches it. Whole units are really removed, and the models that are left are
timed. Finished runs are not repeated when the command is run again.
"""

from pathlib import Path

import torch
from pruning import PrunedRun, PruningOptions, PruningStudy, plan_runs
from smoke import make_smoke_texts
from tasks import TextArguments, TextTask
from transformers import HfArgumentParser, TrainingArguments

from hf_moebert import DistillationConfig, PlatonConfig


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TextArguments, PruningOptions, TrainingArguments, PlatonConfig, DistillationConfig))
    arguments, options, args, recipe, distillation = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy, options.samples = 1, "no", 50
    study = PruningStudy(TextTask(arguments, seed=args.seed), args, options, distillation)

    dense, distil = PrunedRun("dense"), options.distil
    runs = [dense, *plan_runs(recipe, options.criteria, options.keep_ratios, baseline=dense, distil=distil)]
    study.make_all(runs, options.seeds)

    speed = []
    if recipe.granularity == "structured":
        config = study.load("dense", options.seeds[0]).config
        ids = torch.randint(config.vocab_size, (1, min(128, config.max_position_embeddings)))  # (batch, seq)
        speed = study.speed_rows(runs, options.seeds[0], {"input_ids": ids})
    about = "One schedule for all: only what is kept differs."
    study.report("Pruning while fine-tuning", about, runs, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
