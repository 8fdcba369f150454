"""Turn a BERT into a MoEBERT: fine-tune, measure importance, convert, distil, save, reload, evaluate, report.

    python benchmarks/studies/moebert_text_classification.py --smoke --output_dir build/smoke
    python benchmarks/studies/moebert_text_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --output_dir build/sst2
    python benchmarks/studies/moebert_text_classification.py arguments.json

Every argument of `TrainingArguments` and `DistillationConfig` may be given; the others are below.
"""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from smoke import make_smoke_texts
from study import command
from tasks import TextArguments, TextTask
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_moebert import DistillationConfig, DistillationTrainer, MoEBertForSequenceClassification, measure_importance
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.methods.moebert.conversion import count_tokens, measure_expert_load, save_importance
from hf_moebert.reporting.model_card import write_model_card
from hf_moebert.reporting.pictures import plot_distillation_losses, plot_expert_load
from hf_moebert.reporting.report import write_report
from hf_moebert.reporting.tables import Rows, measurement_rows


MODELS = ("teacher", "converted", "student", "undistilled")


@dataclass
class DemoOptions:
    """How many experts to make, and what the card says."""

    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tuned classifier; without it the encoder is fine-tuned first."}
    )
    teacher_epochs: float = field(default=2, metadata={"help": "Epochs of fine-tuning the teacher."})
    num_experts: int = field(default=4, metadata={"help": "Experts per layer."})
    routing: str = field(default="hash-random", metadata={"help": "See MoEBertConfig."})
    importance_examples: int = field(
        default=2048, metadata={"help": "Training examples that importance is measured on."}
    )
    optimized: list[str] = field(
        default_factory=lambda: ["float32", "int8"],
        metadata={"help": "Precisions in which all models are measured once more, optimised for inference."},
    )
    card_base_model: str | None = field(default=None, metadata={"help": "What the card calls the encoder."})
    card_dataset: str | None = field(default=None, metadata={"help": "What the card calls the data set."})
    card_language: str = field(default="en", metadata={"help": "Language of the texts, for the card."})
    card_license: str = field(default="other", metadata={"help": "License of the encoder and so of the student."})


class Pipeline:
    """The stages of the demo, and what they share: task, arguments, folders of the checkpoints."""

    def __init__(self, arguments: TextArguments, options: DemoOptions, args: TrainingArguments) -> None:
        self.arguments, self.options, self.args = arguments, options, args
        set_seed(args.seed)  # a new head is drawn when the encoder is loaded
        self.output = Path(args.output_dir)
        self.folders = {name: self.output / name for name in MODELS}
        arguments.model_name_or_path = options.teacher_name_or_path or arguments.model_name_or_path
        self.task = TextTask(arguments, seed=args.seed)

    def train(self, model: PreTrainedModel, name: str, epochs: float, **teaching: object) -> Trainer:
        """Train with the stock Trainer, or with its one subclass if there is a teacher, and save."""
        args = copy.deepcopy(self.args)
        args.output_dir, args.num_train_epochs = str(self.folders[name]), epochs
        args.logging_first_step = True  # the picture of the losses needs a point, however short the run
        set_seed(args.seed)
        trainer = (DistillationTrainer if teaching else Trainer)(
            model=model,
            args=args,
            train_dataset=self.task.train_dataset,
            data_collator=self.task.collator,
            processing_class=self.task.tokenizer,
            **teaching,
        )
        print(f"Training {name}: {len(self.task.train_dataset)} examples, {epochs} epochs")
        trainer.train()
        trainer.save_model()
        return trainer

    def make_teacher(self) -> PreTrainedModel:
        """Load the fine-tuned teacher, or fine-tune the encoder."""
        if self.options.teacher_name_or_path is not None:
            teacher = AutoModelForSequenceClassification.from_pretrained(self.arguments.model_name_or_path)
            self.save(teacher, "teacher")
            return teacher
        return self.train(self.task.new_model(), "teacher", self.options.teacher_epochs).model

    def save(self, model: PreTrainedModel, name: str) -> None:
        """Save a model that was not trained, with its tokenizer."""
        model.save_pretrained(self.folders[name])
        self.task.tokenizer.save_pretrained(self.folders[name])

    def convert(self, teacher: PreTrainedModel, importance: torch.Tensor) -> MoEBertForSequenceClassification:
        """Cut the teacher's feed-forward networks into experts."""
        return MoEBertForSequenceClassification.from_dense(
            teacher,
            importance,
            num_experts=self.options.num_experts,
            routing=self.options.routing,
            token_counts=count_tokens(self.task.train_dataset, teacher.config.vocab_size),
            seed=self.args.seed,
        )

    def measure(self) -> dict:
        """Reload every checkpoint with AutoModel in a new process; measure quality, size and speed there."""
        arguments, file = self.arguments, self.output / "measurement.json"
        options = {
            "baseline": self.folders["teacher"],
            "text_column": arguments.text_column,
            "text_pair_column": arguments.text_pair_column,
            "label_column": arguments.label_column,
            "validation_file": arguments.validation_file,
            "dataset_name": None if arguments.validation_file else arguments.dataset_name,
            "dataset_config_name": arguments.dataset_config_name,
            "max_length": arguments.max_length,
            "seed": self.args.seed,
            "threads": 1,  # what others on the machine disturb least
            "output": file,
        }
        program = Path(sys.executable).with_name("hf-moebert")
        words = [str(program), "measure", *map(str, self.folders.values())]
        for name, value in options.items():
            words += [] if value is None else [f"--{name}", str(value)]
        for precision in self.options.optimized:
            if reason := unsupported_reason(precision, True):
                print(f"{precision} is not measured: {reason}.")
            else:
                words += ["--optimized", precision]
        # its table is in the report
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # no shell reads them  # nosec B603
        return json.loads(file.read_text())

    def report(self, student: PreTrainedModel, history: list[dict], measurement: dict) -> None:
        """Write report.md with two pictures, and a model card, beside the student."""
        folder = self.folders["student"]
        load = measure_expert_load(student, self.task.validation, self.task.collator)
        plot_expert_load(load, folder / "expert_load.png")
        plot_distillation_losses(history, folder / "distillation_loss.png")
        pictures = {
            "Share of the tokens that each expert of each layer processes": folder / "expert_load.png",
            "Distillation loss of each layer over time": folder / "distillation_loss.png",
        }
        write_report(folder, title="MoEBERT beside its teacher", measurement=measurement, pictures=pictures)
        scores = measurement["models"]["student"]["scores"]
        write_model_card(
            folder,
            repo_id=self.args.hub_model_id
            or "moebert-" + (self.arguments.dataset_config_name or "text-classification"),
            base_model=self.options.card_base_model or self.arguments.model_name_or_path,
            task="text-classification",
            dataset=self.options.card_dataset or self.arguments.dataset_name or Path(self.arguments.train_file).name,
            language=self.options.card_language,
            license=self.options.card_license,
            results={metric: interval["value"] for metric, interval in scores.items()},
            tables={"Beside its teacher": measurement_rows(measurement)},
            pictures=pictures,
            commands=[command()],
        )


def text_table(rows: Rows) -> str:
    """Write rows in columns of text, below their names."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    """Run the stages one after the other."""
    parser = HfArgumentParser((TextArguments, DemoOptions, TrainingArguments, DistillationConfig))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        arguments, options, args, distillation = parser.parse_json_file(sys.argv[1])
    else:
        arguments, options, args, distillation = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
    pipeline = Pipeline(arguments, options, args)

    teacher = pipeline.make_teacher()
    importance = measure_importance(
        teacher,
        pipeline.task.train_dataset,
        pipeline.task.collator,
        max_examples=options.importance_examples,
        seed=args.seed,
    )
    save_importance(pipeline.output / "importance.safetensors", importance, teacher, seed=str(args.seed))

    student = pipeline.convert(teacher, importance)
    pipeline.save(student, "converted")
    trainer = pipeline.train(student, "student", args.num_train_epochs, teacher=teacher, distillation=distillation)
    pipeline.train(pipeline.convert(teacher, importance), "undistilled", args.num_train_epochs)

    measurement = pipeline.measure()
    pipeline.report(student, trainer.state.log_history, measurement)
    if args.push_to_hub:
        trainer.push_to_hub()
    print(f"Report: {pipeline.folders['student'] / 'report.md'}")
    print(text_table([row for row in measurement_rows(measurement) if row["model"] in MODELS]))


if __name__ == "__main__":
    main()
