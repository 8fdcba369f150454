"""Prune a vision transformer that reads handwritten digits, in single weights and in whole neurons and heads.

    python benchmarks/studies/platon_image_classification.py --smoke --output_dir build/digits-smoke
    python benchmarks/studies/platon_image_classification.py --seeds 0 1 2 --output_dir build/digits
    python benchmarks/studies/platon_image_classification.py --unstructured_ratios 0.2 0.1 \
        --output_dir build/digits-ratios

The images are the 1,797 real ones of 8x8 pixels that come with scikit-learn. The model is tiny and trained from
scratch on them: no pre-trained weights take part, and nothing is downloaded. Each seed trains it densely and goes on
from there, once densely and once for every way to prune, all equally long. Finished runs are not repeated when the
command is run again. Every argument of `TrainingArguments` and `PlatonConfig` may be given; the others are below.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from pruning import PrunedRun, PruningStudy, plan_runs
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from study import StudyOptions
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from hf_moebert import PlatonConfig
from hf_moebert.measuring.metrics.accuracy.accuracy import accuracy


ABOUT = "Handwritten digits of 8x8 pixels (scikit-learn), read by a tiny vision transformer trained from scratch."


@dataclass
class DigitsOptions(StudyOptions):
    """Runs of the study; `--seed` splits the images."""

    criteria: list[str] = field(
        default_factory=lambda: ["magnitude", "platon"], metadata={"help": "See PlatonConfig."}
    )
    unstructured_ratios: list[float] = field(
        default_factory=lambda: [0.05], metadata={"help": "Shares of the weights kept where single ones are pruned."}
    )
    structured_ratios: list[float] = field(
        default_factory=lambda: [0.15], metadata={"help": "Shares kept where whole neurons and heads are."}
    )
    smoke: bool = field(default=False, metadata={"help": "Train for one epoch only."})


class DigitsTask:
    """Images of digits and the models that tell them apart."""

    auto_class = AutoModelForImageClassification
    collator = staticmethod(default_data_collator)
    tokenizer = None
    metrics = {"accuracy": accuracy}
    number = ".4f"

    def __init__(self, *, seed: int) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (examples, 1, 8, 8), in [-1, 1]
        train, validation = train_test_split(
            np.arange(len(images)), test_size=0.3, random_state=seed, stratify=digits.target
        )
        self.train_dataset = [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in train]
        self.images, self.references = images[validation], digits.target[validation]

    def new_model(self) -> PreTrainedModel:
        """Draw a small transformer over 16 patches of 2x2 pixels."""
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            id2label={digit: str(digit) for digit in range(10)},
            label2id={str(digit): digit for digit in range(10)},
        )
        return ViTForImageClassification(config)

    @torch.no_grad()
    def predict(self, model: PreTrainedModel) -> list[int]:
        """Tell the digit on each validation image."""
        batches = self.images.to(model.device).split(128)
        return torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in batches]).tolist()


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((DigitsOptions, TrainingArguments, PlatonConfig))
    parser.set_defaults(
        num_train_epochs=40,
        learning_rate=1e-3,
        warmup_steps=0.1,
        per_device_train_batch_size=64,
        save_strategy="no",
        logging_steps=10,
    )
    options, args, recipe = parser.parse_args_into_dataclasses()
    if options.smoke:
        args.num_train_epochs, args.logging_steps, options.samples = 1, 5, 50
    study = PruningStudy(DigitsTask(seed=args.seed), args, options)

    dense = PrunedRun("dense")
    longer = PrunedRun("dense-longer", start="dense", peer="dense")
    single = plan_runs(
        replace(recipe, granularity="unstructured"), options.criteria, options.unstructured_ratios, baseline=longer
    )
    whole = plan_runs(
        replace(recipe, granularity="structured"),
        options.criteria,
        options.structured_ratios,
        baseline=longer,
        prefix="structured-",
    )
    runs = [dense, longer, *single, *whole]
    study.make_all(runs, options.seeds)
    inputs = {"pixel_values": study.task.images[:64]}
    speed = study.speed_rows([dense, *whole], options.seeds[0], inputs) if whole else ()
    study.report("A pruned reader of digits", ABOUT, runs, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
