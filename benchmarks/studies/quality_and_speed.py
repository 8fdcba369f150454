"""Train a teacher and its compressed students by one recipe, and draw what each is worth beside how fast it is.

    python benchmarks/studies/quality_and_speed.py --smoke --output_dir build/quality-smoke
    python benchmarks/studies/quality_and_speed.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --text_column sentence --seeds 0 1 2 \
        --teacher_steps 400 --max_steps 300 --learning_rate 1e-4 --output_dir build/quality-sst2
    python benchmarks/studies/quality_and_speed.py … --stage measure  # the models that are there; `report` tables only

Every argument of `TrainingArguments`, `PlatonConfig` and `DistillationConfig` may be given; the others are below.
Each seed fine-tunes the encoder once and makes all students of that teacher: mixtures of experts of four routings, one
of them untaught, half of its layers, half and a quarter of its neurons and heads, and stacks of both: what was pruned,
cut into experts. They learn from it with one trainer, for the same steps on the same data; a stack on a pruned student
for as many again. `--students` makes some of them.
Then every model is optimised for inference at every precision, and all are timed in turns on validation sentences.
Finished runs are not repeated when the command is run again.
"""

import copy
import os
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from pruning import PrunedRun, PruningStudy
from quality_measurement import Measurement
from smoke import make_smoke_texts
from study import StudyOptions
from tasks import TextArguments, TextTask
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, TrainingArguments

from hf_moebert import (
    DistillationConfig,
    PlatonConfig,
    count_tokens,
    drop_layers,
    measure_importance,
    prune_structured,
)
from hf_moebert.inference.linears import check_precision
from hf_moebert.methods import moebert


STAGES = ("all", "train", "measure", "report")
ROUTINGS = ("hash-random", "hash-balanced", "gate-token", "gate-sentence")
STUDENTS = (
    *(f"moebert-{routing}" for routing in ROUTINGS),
    "untaught",
    "half-depth",
    "pruned",
    "pruned-quarter",
    "pruned-moebert",
    "one-shot-moebert",
)
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
    students: list[str] = field(
        default_factory=lambda: list(STUDENTS), metadata={"help": "Which to make.", "choices": STUDENTS}
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per layer."})
    stack_routing: str = field(
        default="gate-sentence", metadata={"help": "Routing of the stacks and of the untaught student."}
    )
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
    """A student, and what of the model it starts from it begins with; a recipe prunes it while it learns.

    Attributes:
        routing: Its feed-forward networks are cut into experts, routed so.
        num_experts: Into how many.
        importance_examples: On how many training examples it is measured which neurons they share.
        keep_ratio: This share of its neurons and heads is kept at once, before anything else.
        half_depth: Every second layer is left out.
    """

    routing: str | None = None
    num_experts: int | None = None
    importance_examples: int | None = None
    keep_ratio: float | None = None
    half_depth: bool = False


def plan_students(options: QualityOptions, recipe: PlatonConfig) -> list[PrunedRun]:
    """Name the students of the teacher that are asked for."""
    student = partial(Compression, start="teacher", teacher="teacher", peer="teacher")
    cut = {"num_experts": options.num_experts, "importance_examples": options.importance_examples}
    stacked = cut | {"routing": options.stack_routing}
    quarter = replace(recipe, keep_ratio=recipe.keep_ratio / 2)
    students = [
        *(student(f"moebert-{routing}", routing=routing, **cut) for routing in ROUTINGS),
        student("untaught", **stacked | {"teacher": None}),
        student("half-depth", half_depth=True),
        student("pruned", recipe=recipe),
        student("pruned-quarter", recipe=quarter),
        student("pruned-moebert", **stacked | {"start": "pruned"}),
        student("one-shot-moebert", keep_ratio=recipe.keep_ratio, **stacked),
    ]
    return [run for run in students if run.name in options.students]


class QualityStudy(PruningStudy):
    """The same for students that are compressed in other ways too."""

    def arguments(self, run: PrunedRun) -> TrainingArguments:
        """Train the teacher for steps of its own."""
        args = copy.deepcopy(self.args)
        if run.start is None and self.options.teacher_steps is not None:
            args.max_steps = self.options.teacher_steps
        return args

    def settings(self, run: PrunedRun) -> dict:
        """Add how a student is made and taught."""
        if run.start is None:
            return super().settings(run)
        return super().settings(run) | asdict(run) | {"distillation": asdict(self.distillation_of(run))}

    def distillation_of(self, run: PrunedRun) -> DistillationConfig:
        """Let the layers that are left follow those that they were."""
        if not run.half_depth:
            return self.distillation
        depth = AutoConfig.from_pretrained(self.task.model_name_or_path).num_hidden_layers
        return replace(self.distillation, layer_map=list(range(2, depth + 1, 2)))

    def start(self, run: PrunedRun, seed: int) -> PreTrainedModel:
        """Make the model that a run trains, of the one it starts from if there is one."""
        model = super().start(run, seed)
        if run.start is None:
            return model
        if run.keep_ratio is not None:
            texts = self.task.train_dataset.remove_columns("labels")
            model = prune_structured(model, texts, self.task.collator, keep_ratio=run.keep_ratio, seed=seed)
        if run.routing is not None:
            return self.cut_into_experts(model, run, seed)
        return halve_depth(model) if run.half_depth else model

    def cut_into_experts(self, dense: PreTrainedModel, run: Compression, seed: int) -> PreTrainedModel:
        """Make a mixture of experts of a dense model."""
        examples = {"max_examples": run.importance_examples, "seed": seed}
        return moebert.from_dense(
            dense,
            measure_importance(dense, self.task.train_dataset, self.task.collator, **examples),
            num_experts=run.num_experts,
            routing=run.routing,
            token_counts=count_tokens(self.task.train_dataset, dense.config.vocab_size),
            seed=seed,
        )


def halve_depth(teacher: PreTrainedModel) -> PreTrainedModel:
    """Copy a model without every second layer: the last layer stays, which the head is used to."""
    return drop_layers(teacher, list(range(1, teacher.config.num_hidden_layers, 2)))


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
