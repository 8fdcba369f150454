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
from text_task import TaskArguments, TextTask, make_smoke_inputs
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
from hf_moebert.reporting.tables import measurement_rows


@dataclass
class ExampleArguments:
    """Into how many experts, and what the card says."""

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
    """The stages of the example, and what they share: data, tokenizer, arguments, folders of the checkpoints."""

    def __init__(self, task: TaskArguments, example: ExampleArguments, args: TrainingArguments) -> None:
        self.task, self.example, self.args = task, example, args
        set_seed(args.seed)  # a new head is drawn when the encoder is loaded
        self.output = Path(args.output_dir)
        self.source = example.teacher_name_or_path or task.model_name_or_path
        self.folders = {name: self.output / name for name in ("teacher", "converted", "student", "undistilled")}
        self.text = TextTask(task, tokenizer_from=self.source, seed=args.seed)
        self.data, self.tokenizer, self.collator = self.text.data, self.text.tokenizer, self.text.collator

    def train(self, model: PreTrainedModel, name: str, epochs: float, **teaching: object) -> Trainer:
        """Train with the stock Trainer, or with its one subclass if there is a teacher, and save."""
        args = copy.deepcopy(self.args)
        args.output_dir, args.num_train_epochs = str(self.folders[name]), epochs
        args.logging_first_step = True  # the picture of the losses needs a point, however short the run
        set_seed(args.seed)
        trainer = (DistillationTrainer if teaching else Trainer)(
            model=model,
            args=args,
            train_dataset=self.data["train"],
            data_collator=self.collator,
            processing_class=self.tokenizer,
            **teaching,
        )
        print(f"Training {name}: {len(self.data['train'])} examples, {epochs} epochs")
        trainer.train()
        trainer.save_model()
        return trainer

    def make_teacher(self) -> PreTrainedModel:
        """Load the fine-tuned teacher, or fine-tune the encoder."""
        if self.example.teacher_name_or_path is not None:
            teacher = AutoModelForSequenceClassification.from_pretrained(self.source)
            self.save(teacher, "teacher")
            return teacher
        return self.train(self.text.new_model(), "teacher", self.example.teacher_epochs).model

    def save(self, model: PreTrainedModel, name: str) -> None:
        """Save a model that was not trained, with its tokenizer."""
        model.save_pretrained(self.folders[name])
        self.tokenizer.save_pretrained(self.folders[name])

    def convert(self, teacher: PreTrainedModel, importance: torch.Tensor) -> MoEBertForSequenceClassification:
        """Cut the teacher's feed-forward networks into experts."""
        return MoEBertForSequenceClassification.from_dense(
            teacher,
            importance,
            num_experts=self.example.num_experts,
            routing=self.example.routing,
            token_counts=count_tokens(self.data["train"], teacher.config.vocab_size),
            seed=self.args.seed,
        )

    def measure(self) -> dict:
        """Reload every checkpoint with AutoModel in a new process; measure quality, size and speed there."""
        task, file = self.task, self.output / "measurement.json"
        options = {
            "baseline": self.folders["teacher"],
            "text_column": task.text_column,
            "text_pair_column": task.text_pair_column,
            "label_column": task.label_column,
            "validation_file": task.validation_file,
            "dataset_name": None if task.validation_file else task.dataset_name,
            "dataset_config_name": task.dataset_config_name,
            "max_length": task.max_length,
            "seed": self.args.seed,
            "threads": 1,  # what others on the machine disturb least
            "output": file,
        }
        program = Path(sys.executable).with_name("hf-moebert")
        command = [str(program), "measure", *map(str, self.folders.values())]
        for name, value in options.items():
            command += [] if value is None else [f"--{name}", str(value)]
        for precision in self.example.optimized:
            if reason := unsupported_reason(precision, True):
                print(f"{precision} is not measured: {reason}.")
            else:
                command += ["--optimized", precision]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())

    def report(self, student: PreTrainedModel, history: list[dict], measurement: dict) -> None:
        """Write report.md with two pictures, and a model card, beside the student."""
        folder = self.folders["student"]
        load = measure_expert_load(student, self.data["validation"], self.collator)
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
            repo_id=self.args.hub_model_id or "moebert-" + (self.task.dataset_config_name or "text-classification"),
            base_model=self.example.card_base_model or self.source,
            task="text-classification",
            dataset=self.example.card_dataset or self.task.dataset_name or Path(self.task.train_file).name,
            language=self.example.card_language,
            license=self.example.card_license,
            results={metric: interval["value"] for metric, interval in scores.items()},
            tables={"Beside its teacher": measurement_rows(measurement)},
            pictures=pictures,
            commands=[" ".join(["python", *sys.argv])],
        )


def main() -> None:
    """Run the stages one after the other."""
    parser = HfArgumentParser((TaskArguments, ExampleArguments, TrainingArguments, DistillationConfig))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        task, example, args, distillation = parser.parse_json_file(sys.argv[1])
    else:
        task, example, args, distillation = parser.parse_args_into_dataclasses()
    if task.smoke:
        make_smoke_inputs(task, Path(args.output_dir) / "inputs")
    pipeline = Pipeline(task, example, args)

    teacher = pipeline.make_teacher()
    importance = measure_importance(
        teacher,
        pipeline.data["train"],
        pipeline.collator,
        max_examples=example.importance_examples,
        seed=args.seed,
    )
    save_importance(pipeline.output / "importance.safetensors", importance, teacher, seed=str(args.seed))

    student = pipeline.convert(teacher, importance)
    pipeline.save(student, "converted")
    trainer = pipeline.train(student, "student", args.num_train_epochs, teacher=teacher, distillation=distillation)
    pipeline.train(pipeline.convert(teacher, importance), "undistilled", args.num_train_epochs)

    measurement = pipeline.measure()
    pipeline.report(student, trainer.state.log_history, measurement)
    print(f"Report: {pipeline.folders['student'] / 'report.md'}")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
