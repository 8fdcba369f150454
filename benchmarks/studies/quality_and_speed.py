"""Train a teacher and its compressed students by one recipe, and draw what each is worth beside how fast it is.

    python benchmarks/studies/quality_and_speed.py --smoke --output_dir build/quality-smoke
    python benchmarks/studies/quality_and_speed.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --seeds 0 1 2 \
        --teacher_steps 400 --max_steps 300 --learning_rate 1e-4 --output_dir build/quality-sst2
    python benchmarks/studies/quality_and_speed.py … --stage measure  # the models that are there; `report` tables only

Every argument of `TrainingArguments`, `PlatonConfig` and `DistillationConfig` may be given; the others are below.
Each seed fine-tunes the encoder once and makes all students of that teacher: MoEBERTs of four routings, half of its
layers, and half of its neurons and heads. They learn from it with one trainer, for the same steps on the same data.
Then every model is optimised for inference at every precision, and all are timed in turns on validation sentences.
Finished runs are not repeated when the command is run again.
"""

import copy
import os
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from pruning import PrunedRun, PruningStudy
from quality_measurement import Measurement
from smoke import make_smoke_texts
from study import StudyOptions
from tasks import TextArguments, TextTask
from torch import nn
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, TrainingArguments

from hf_moebert import DistillationConfig, MoEBertForSequenceClassification, PlatonConfig, measure_importance
from hf_moebert.inference.linears import check_precision
from hf_moebert.methods.moebert.conversion import count_tokens, load_importance, save_importance


STAGES = ("all", "train", "measure", "report")
ROUTINGS = ("hash-random", "hash-balanced", "gate-token", "gate-sentence")
ABOUT = """\
All students learned from the teacher of their seed with one trainer, for the same steps on the same data. Each model \
was then optimised for inference at every precision; `stock` is the teacher as it is, float32 in stock torch. \
Scores are means over the seeds, with intervals (95 %) bootstrapped over the validation examples. A speed-up is the \
median over all seeds and rounds of the time of the stock teacher over that of the model: processor time of one \
thread, all models in turns, on validation sentences drawn for each seed and padded to the longest of their batch.\
"""


@dataclass
class QualityOptions(StudyOptions):
    """Runs of the study."""

    stage: str = field(default="all", metadata={"help": "What to do.", "choices": STAGES})
    teacher_steps: int | None = field(
        default=None, metadata={"help": "Steps of the teacher, if not as many as of a student."}
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per layer."})
    importance_examples: int = field(
        default=2048, metadata={"help": "Training examples that importance is measured on."}
    )
    precisions: list[str] = field(
        default_factory=lambda: ["float32", "int8"],
        metadata={"help": "What to optimise for; bfloat16 needs a processor that computes with it."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Of the sentences timed."})
    timed_sentences: int = field(default=32, metadata={"help": "Validation sentences timed, drawn for each seed."})
    rounds: int = field(default=20, metadata={"help": "How often each seed's models are timed."})


@dataclass(frozen=True)
class Compression(PrunedRun):
    """A student, and what of the teacher it begins with; a recipe prunes it instead.

    Attributes:
        routing: Its feed-forward networks are cut into experts, routed so.
        num_experts: Into how many.
        importance_examples: On how many training examples it is measured which neurons they share.
        half_depth: Every second layer is left out.
    """

    routing: str | None = None
    num_experts: int | None = None
    importance_examples: int | None = None
    half_depth: bool = False


def plan_students(options: QualityOptions, recipe: PlatonConfig) -> list[PrunedRun]:
    """Name every student of the teacher."""
    student = partial(Compression, start="teacher", teacher="teacher", peer="teacher")
    cut = {"num_experts": options.num_experts, "importance_examples": options.importance_examples}
    experts = [student(f"moebert-{routing}", routing=routing, **cut) for routing in ROUTINGS]
    return [*experts, student("half-depth", half_depth=True), student("pruned", recipe=recipe)]


class QualityStudy(PruningStudy):
    """The same for students that are compressed in other ways too."""

    def arguments(self, run: PrunedRun) -> TrainingArguments:
        """Train the teacher for steps of its own."""
        args = copy.deepcopy(self.args)
        if run.teacher is None and self.options.teacher_steps is not None:
            args.max_steps = self.options.teacher_steps
        return args

    def settings(self, run: PrunedRun) -> dict:
        """Add how a student is made and taught."""
        if run.teacher is None:
            return super().settings(run)
        return super().settings(run) | asdict(run) | {"distillation": asdict(self.distillation_of(run))}

    def distillation_of(self, run: PrunedRun) -> DistillationConfig:
        """Let the layers that are left follow those that they were."""
        if not run.half_depth:
            return self.distillation
        depth = AutoConfig.from_pretrained(self.task.model_name_or_path).num_hidden_layers
        return replace(self.distillation, layer_map=list(range(2, depth + 1, 2)))

    def start(self, run: PrunedRun, seed: int) -> PreTrainedModel:
        """Make the model that a run trains, of the teacher if it has one."""
        model = super().start(run, seed)
        if run.teacher is None:
            return model
        if run.routing is not None:
            return self.cut_into_experts(model, run, seed)
        return halve_depth(model) if run.half_depth else model

    def cut_into_experts(self, teacher: PreTrainedModel, run: Compression, seed: int) -> PreTrainedModel:
        """Make a MoEBERT of the teacher."""
        return MoEBertForSequenceClassification.from_dense(
            teacher,
            self.importance(teacher, run, seed),
            num_experts=run.num_experts,
            routing=run.routing,
            token_counts=count_tokens(self.task.train_dataset, teacher.config.vocab_size),
            seed=seed,
        )

    def importance(self, teacher: PreTrainedModel, run: Compression, seed: int) -> torch.Tensor:
        """Measure once which neurons of the teacher matter, `(layers, intermediate)`."""
        file = self.folder("teacher", seed) / "importance.safetensors"
        if not file.exists():
            examples, data = run.importance_examples, self.task.train_dataset
            scores = measure_importance(teacher, data, self.task.collator, max_examples=examples, seed=seed)
            save_importance(file, scores, teacher, seed=str(seed))
        return load_importance(file, teacher)


def halve_depth(teacher: PreTrainedModel) -> PreTrainedModel:
    """Copy a BERT without every second layer: the last layer stays, which the head is used to."""
    student = copy.deepcopy(teacher)
    encoder = student.base_model.encoder
    encoder.layer = nn.ModuleList(list(encoder.layer)[1::2])
    student.config.num_hidden_layers = len(encoder.layer)
    return student


def main() -> None:
    """Make the runs that are missing, then the measurement."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")  # what one model needs, for all that are timed
    parser = HfArgumentParser((TextArguments, QualityOptions, TrainingArguments, PlatonConfig, DistillationConfig))
    parser.set_defaults(keep_ratio=0.5, granularity="structured")
    arguments, options, args, recipe, distillation = parser.parse_args_into_dataclasses()
    for precision in options.precisions:
        check_precision(precision)
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy = 1, "no"
        options.timed_sentences, options.rounds, options.samples = 4, 3, 50
    study = QualityStudy(TextTask(arguments, seed=args.seed), args, options, distillation)
    runs = [PrunedRun("teacher"), *plan_students(options, recipe)]
    if options.stage in ("all", "train"):
        study.make_all(runs, options.seeds)
    else:
        study.refuse_missing(runs, options.seeds)

    measurement = Measurement(study, runs, options.seeds, options.precisions)
    for seed in options.seeds if options.stage in ("all", "measure") else []:
        measurement.measure(seed, options.batch_sizes, sentences=options.timed_sentences, rounds=options.rounds)
    if options.stage != "train":
        measurement.report("Quality beside speed", ABOUT)


if __name__ == "__main__":
    main()
