"""Tag names with and without a CRF, and with one that cannot give illegal tags.

    python benchmarks/studies/masked_crf_ner.py --smoke --output_dir build/tags-smoke
    python benchmarks/studies/masked_crf_ner.py --model_name_or_path google-bert/bert-base-cased \
        --train_file train.jsonl --validation_file test.jsonl --seeds 0 1 2 --learning_rates 2e-5 5e-5 \
        --max_steps 600 --output_dir build/tags
    python benchmarks/studies/masked_crf_ner.py … --stage report  # of the runs that are there

Every argument of `TrainingArguments` may be given; the others are below. All methods start from the same pre-trained
encoder, any for which transformers has a token classifier, and train for the same steps on the same batches:

- `softmax`: the stock token classifier, each word on its own;
- `crf`: a plain CRF on top of it;
- `masked-decoding`: the same weights, but illegal sequences are ruled out when tags are chosen;
- `masked-training`: they are ruled out in the loss as well.

The first seed tries every learning rate, and the best by lenient F1 on training sentences that were held out is used
for all seeds; the validation file chooses nothing. Finished runs are not repeated when the command is run again.
"""

import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smoke import make_smoke_tags
from study import Run, Study, StudyOptions, make_optimizer, mean_over_seeds, with_interval
from tasks import TaggingArguments, TaggingTask, tag
from timing import shape_of, timing_rows
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from hf_moebert import BertCrfForTokenClassification, CrfForTokenClassification
from hf_moebert.measuring.footprint import count_bytes
from hf_moebert.measuring.metrics.seqeval.seqeval import (
    SCHEMES,
    count_illegal,
    count_spans,
    micro_f1,
    micro_precision,
    micro_recall,
    span_f1,
)
from hf_moebert.methods.masked_crf.functional_schemes import infer_scheme
from hf_moebert.reporting.pictures import plot_transitions


METHODS = ("softmax", "crf", "masked-decoding", "masked-training")
ABOUT = """\
All methods start from one pre-trained encoder and train for the same steps on the same batches, each with the best \
of the learning rates that the first seed tried on held-out training sentences. Lenient F1 keeps illegal segments, as \
conlleval does, strict F1 drops them; precision and recall are the lenient ones. Confidence is the mean probability \
that a model gives to the tags it chose, to be compared with the share of right ones, `tags right`.\
"""


@dataclass
class TaggingOptions(StudyOptions):
    """Runs of the study."""

    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Rows of the table."})
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-5, 2e-4], metadata={"help": "Tried by each method."}
    )
    crf_learning_rate: float = field(default=1e-2, metadata={"help": "Of the scores of the CRF alone."})
    tag_scheme: str = field(default="auto", metadata={"help": "See `BertCrfConfig`."})
    illegal_labels: str = field(default="repair", metadata={"help": "See `BertCrfConfig`."})
    stage: str = field(default="all", metadata={"help": "What to do.", "choices": ("all", "train", "report")})
    rounds: int = field(default=20, metadata={"help": "Times that each method is timed, in turns."})

    def __post_init__(self) -> None:
        """Refuse methods that do not exist, or whose weights nothing makes."""
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"`methods` must be among {', '.join(METHODS)}, got {sorted(unknown)}.")
        if "masked-decoding" in self.methods and "crf" not in self.methods:
            raise ValueError(f"`methods` must hold 'crf', whose weights 'masked-decoding' uses, got {self.methods}.")
        self.methods.sort(key=METHODS.index)


@dataclass(frozen=True)
class Method(Run):
    """A way to tag, and its learning rate."""

    kind: str = "softmax"
    learning_rate: float = 0.0


class TaggingStudy(Study):
    """Runs that differ in what chooses the tags."""

    def __init__(self, task: TaggingTask, args: TrainingArguments, options: TaggingOptions) -> None:
        super().__init__(task, args, options)
        self.scheme = options.tag_scheme
        if self.scheme == "auto":
            self.scheme = infer_scheme(task.names, task.true_tags(task.train_dataset))
        if self.scheme not in SCHEMES:
            raise SystemExit(f"The tags must be of {', '.join(SCHEMES)}, to be scored strictly; got {self.scheme}.")

    def arguments(self, run: Method) -> TrainingArguments:
        """Train every method with its own learning rate; masked decoding takes what another run trained."""
        args = copy.deepcopy(self.args)
        args.learning_rate = run.learning_rate
        if run.kind == "masked-decoding":
            args.max_steps, args.num_train_epochs = -1, 0
        return args

    def settings(self, run: Method) -> dict:
        """Add the method, and how its CRF is trained."""
        settings = super().settings(run) | {"kind": run.kind, "start": run.start}
        if run.kind != "softmax":
            names = ("crf_learning_rate", "tag_scheme", "illegal_labels")
            settings |= {name: getattr(self.options, name) for name in names}
        return settings

    def start(self, run: Method, seed: int) -> PreTrainedModel:
        """Make the model that a run trains, or the one that another run trained, masked."""
        fields = {"tag_scheme": self.scheme, "illegal_labels": self.options.illegal_labels}
        if run.kind == "masked-decoding":
            return self.task.auto_class.from_pretrained(self.folder(run.start, seed), mask_transitions="decoding")
        model = self.task.new_model()
        if run.kind == "softmax":
            return model
        tagger = BertCrfForTokenClassification if model.config.model_type == "bert" else CrfForTokenClassification
        return tagger.from_dense(model, mask_transitions="off" if run.kind == "crf" else "training", **fields)

    def extras(self, run: Method, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Give the scores of the CRF a learning rate of their own."""
        optimizer = make_optimizer(model, args, part="crf.", rate=self.options.crf_learning_rate)
        return {"optimizers": (optimizer, None)}

    def save(self, trainer: Trainer, run: Method, folder: Path) -> None:
        """Save what was trained, and a picture of what the CRF learned."""
        super().save(trainer, run, folder)
        if run.kind != "softmax":
            draw_transitions(trainer.model, folder / "transitions.png")

    def sizes(self, model: PreTrainedModel, run: Method, seed: int) -> dict[str, int]:
        """Count the weights, and the bytes on disk."""
        return {"stored": model.num_parameters(), "bytes": count_bytes(self.folder(run.name, seed))}

    def findings(self, trainer: Trainer, run: Method) -> dict[str, Any]:
        """Keep the score that chooses, and how long the training took."""
        guesses = [sentence["tags"] for sentence in self.task.predict(trainer.model, self.task.held_out)]
        (seconds,) = (entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
        return {"held_out_f1": span_f1(guesses, self.task.true_tags(self.task.held_out)), "seconds": seconds}

    def choose_rate(self, kind: str) -> Method:
        """Return the run of a method with its best learning rate at the first seed."""
        seed = self.options.seeds[0]
        rates = self.options.learning_rates
        runs = [Method(f"{kind}-{rate:g}", kind=kind, learning_rate=rate) for rate in rates]
        if self.options.stage == "report":
            self.refuse_missing(runs, [seed])
        return self.choose(runs, seed, lambda run: self.result(run.name, seed)["held_out_f1"])

    def rows(self, runs: list[Method], seeds: list[int]) -> list[dict[str, str]]:
        """One row for each run: means over the seeds, with intervals over the sentences."""
        results = {run.name: [self.result(run.name, seed)["predictions"] for seed in seeds] for run in runs}
        tags = {name: [[row["tags"] for row in result] for result in of_run] for name, of_run in results.items()}
        rows = [{"run": run.name} for run in runs]
        for mode in ("lenient", "strict"):
            self.add_spans(rows, runs, tags, mode=mode)
        gold = np.concatenate(self.task.true_tags(self.task.validation))  # (words,)
        for row, run in zip(rows, runs, strict=True):
            illegal = [count_illegal(guess, self.scheme) for guess in tags[run.name]]
            right = [np.concatenate(guess) == gold for guess in tags[run.name]]  # (words,) each
            shares = [np.concatenate([row["shares"] for row in result]) for result in results[run.name]]
            row["illegal segments"] = f"{np.mean(illegal):.1f}"
            row["tags right"] = f"{np.mean(right):.4f}"
            row["confidence"] = f"{np.mean(shares):.4f}"
        return rows

    def add_spans(self, rows: list[dict[str, str]], runs: list[Method], tags: dict[str, list], *, mode: str) -> None:
        """Add the columns of lenient or of strict scores of spans; `tags` are those of each seed by run."""
        true_tags = self.task.true_tags(self.task.validation)
        count = partial(count_spans, references=true_tags, strict=mode == "strict", scheme=self.scheme)
        counts = {name: [count(guess) for guess in of_run] for name, of_run in tags.items()}
        found = {
            name: np.stack([f for f, _ in of_run], axis=1) for name, of_run in counts.items()
        }  # (examples, seeds)
        true = counts[runs[0].name][0][1]  # (examples,)
        name = f"F1 {mode}"
        for row, run in zip(rows, runs, strict=True):
            mine = found[run.name]
            row[name] = with_interval(self.interval(micro_f1, mine, true), ".4f")
            if mine.shape[1] > 1:
                row[f"{name} of each seed"] = " ".join(f"{micro_f1(column, true):.4f}" for column in mine.T)
            peer = found.get(run.peer)
            row[f"{name} difference"] = "–"
            if peer is not None:
                row[f"{name} difference"] = with_interval(self.difference(micro_f1, mine, peer, true), "+.4f")
            if mode == "lenient":
                row["precision"] = f"{mean_over_seeds(micro_precision, mine, true):.4f}"
                row["recall"] = f"{mean_over_seeds(micro_recall, mine, true):.4f}"

    def latency_rows(self, runs: list[Method], seed: int) -> list[dict[str, str]]:
        """Time the tagging of one batch, the choice of tags included."""
        batch = next(self.task.batches(self.task.validation))
        calls = {run.name: partial(tag, self.load(run.name, seed).eval(), batch) for run in runs}
        column = f"time over {runs[0].name} at {shape_of(batch)}"
        return timing_rows(calls, column, as_cost=True, rounds=self.options.rounds)

    def pictures(self, runs: list[Method], seeds: list[int]) -> list[tuple[str, Path]]:
        """Return the transition scores of the first seed's CRFs."""
        drawn = [run for run in runs if run.kind != "softmax"]
        return [(f"{run.name}: transitions", self.folder(run.name, seeds[0]) / "transitions.png") for run in drawn]


def draw_transitions(model: PreTrainedModel, path: Path) -> None:
    """Draw the scores of a CRF, its start above and its end to the right."""

    def frame(steps: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        first = torch.cat([start, start.new_zeros(1)])  # (tags + 1,): from START to END is no step
        return torch.cat([first[None], torch.cat([steps, end[:, None]], 1)])  # (tags + 1, tags + 1)

    crf = model.crf
    legal = frame(crf.legal, crf.legal_start, crf.legal_end)
    plot_transitions(frame(crf.transitions, crf.start, crf.end), legal, crf.labels, path)


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TaggingArguments, TaggingOptions, TrainingArguments))
    arguments, options, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_tags(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy, args.max_steps = 1, "no", 8
        options.rounds, options.samples = 3, 50
    study = TaggingStudy(TaggingTask(arguments, seed=args.seed), args, options)

    runs: dict[str, Method] = {}
    for kind in options.methods:
        if kind == "masked-decoding":
            name = runs["crf"].name.replace("crf", kind)
            runs[kind] = replace(runs["crf"], name=name, kind=kind, start=runs["crf"].name)
        else:
            runs[kind] = study.choose_rate(kind)
        if options.stage == "report":
            study.refuse_missing([runs[kind]], options.seeds)
        study.make_all([runs[kind]], options.seeds)
    if options.stage == "train":
        return

    first = next(iter(runs.values())).name
    table = [replace(run, peer=None if run.name == first else first) for run in runs.values()]
    speed = study.latency_rows(table, options.seeds[0])
    study.report("Tags chosen one by one, together, and legally", ABOUT, table, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
