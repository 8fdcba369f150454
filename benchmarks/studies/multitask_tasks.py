"""The tasks of a multi-task study: the fields of tasks.json, the data read, and the scores of predictions."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from datasets import Dataset
from tasks import draw, load_with_new_head
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_moebert import BertCrfForTokenClassification
from hf_moebert.data import encode_text, encode_tokens, label_names_of, load_splits, tag_names_of
from hf_moebert.measuring.metrics.seqeval.seqeval import count_spans
from hf_moebert.measuring.scores import CLASSIFICATION_SCORES, REGRESSION_SCORES, SPAN_SCORES, Score, tags_of
from hf_moebert.methods.multitask.training import MultiTaskSweepTask
from hf_moebert.methods.multitask.training_states import pad_examples


SCORES: dict[str, dict[str, Score]] = {
    "classification": {name: CLASSIFICATION_SCORES[name][name] for name in ("accuracy", "f1", "matthews_correlation")},
    "regression": REGRESSION_SCORES["pearson_spearman"],
    "tagging": {"span_f1": SPAN_SCORES["f1"]},
    "crf_tagging": {"span_f1": SPAN_SCORES["f1"]},
}


@dataclass(frozen=True)
class TaskEntry:
    """One entry of tasks.json."""

    kind: str
    train_file: str
    validation_file: str
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    metric: str | None = None
    max_train_examples: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCORES:
            raise ValueError(f"`kind` must be one of {', '.join(SCORES)}, got {self.kind!r}.")
        if self.metric is not None and self.metric not in SCORES[self.kind]:
            raise ValueError(f"`metric` of {self.kind} must be one of {list(SCORES[self.kind])}, got {self.metric!r}.")


class LearnedTask:
    """A task read and tokenized for one encoder: examples to train on, to choose by, and to report on.

    The examples that choose are held out from the training file, of every class alike; the validation file is for the
    report only. Classes and tags are those of the training file.

    Args:
        entry: Where the data is.
        encoder: Hub id or folder.
        max_length: Longer texts are cut.
        dev_share: Share of the training file that chooses.
        max_dev_examples: At most this many of them are used.
        seed: Of what is held out and drawn.
    """

    def __init__(
        self, entry: TaskEntry, encoder: str, *, max_length: int, dev_share: float, max_dev_examples: int, seed: int
    ) -> None:
        self.entry, self.encoder = entry, encoder
        files = {"train_file": entry.train_file, "label_column": entry.label_column, "seed": seed}
        parts = load_splits(**files, validation_share=dev_share)
        both = load_splits(**files, validation_file=entry.validation_file)
        self.tags = entry.kind.endswith("tagging")
        self.names = (
            tag_names_of(both["train"], entry.tags_column)
            if self.tags
            else label_names_of(both["train"], entry.label_column)
        )
        self.tokenizer, self.max_length = AutoTokenizer.from_pretrained(encoder), max_length
        self.train = self.encode(draw(parts["train"], entry.max_train_examples, seed=seed))
        self.dev = self.encode(draw(parts["validation"], max_dev_examples, seed=seed))
        self.validation = self.encode(both["validation"])
        self.metric = entry.metric or next(iter(SCORES[entry.kind]))
        self.score = SCORES[entry.kind][self.metric]

    def encode(self, examples: Dataset) -> Dataset:
        """Tokenize texts or words."""
        entry, length = self.entry, {"max_length": self.max_length}
        if self.tags:
            columns = {"tokens_column": entry.tokens_column, "tags_column": entry.tags_column}
            return encode_tokens(examples, self.tokenizer, tag_names=self.names, **columns, **length)
        columns = {"text_column": entry.text_column, "text_pair_column": entry.text_pair_column}
        columns |= {"label_column": entry.label_column}
        return encode_text(examples, self.tokenizer, label_names=self.names, **columns, **length)

    def new_model(self) -> PreTrainedModel:
        """Put a new head on the encoder; its values come from the seed that was set last."""
        names = self.names or ["score"]  # one output without a name is a regression
        auto_class = AutoModelForTokenClassification if self.tags else AutoModelForSequenceClassification
        model = load_with_new_head(auto_class, self.encoder, names)
        return BertCrfForTokenClassification.from_dense(model) if self.entry.kind == "crf_tagging" else model

    def for_sweep(self) -> MultiTaskSweepTask:
        """Return the part of the task that a sweep may see."""
        return MultiTaskSweepTask(self.new_model, self.train, self.dev, self.score_predictions, self.metric)

    def read(self, predictions: np.ndarray, labels: np.ndarray) -> list:
        """Return the prediction for each example, in a form that JSON knows: a class, a number, or tags."""
        if self.tags:
            tags = predictions if predictions.ndim == 2 else predictions.argmax(-1)  # a CRF gives tags
            return tags_of(tags, labels, self.names)
        return (predictions[:, 0] if self.names is None else predictions.argmax(-1)).tolist()

    def pair(self, predictions: list, truths: list) -> tuple[np.ndarray, np.ndarray]:
        """Return predictions and truth as the metric takes them, `(examples,)` each."""
        return count_spans(predictions, truths) if self.tags else (np.asarray(predictions), np.asarray(truths))

    def score_predictions(self, output: EvalPrediction) -> float:
        """Score what a Trainer predicted."""
        labels = output.label_ids
        truths = tags_of(labels, labels, self.names) if self.tags else labels
        return self.score(*self.pair(self.read(output.predictions, labels), truths))

    def predict(self, model: PreTrainedModel, args: TrainingArguments) -> dict[str, list]:
        """Predict the examples of the report; returns predictions and truth, in a form that JSON knows."""
        output = Trainer(model=model, args=args, data_collator=pad_examples).predict(self.validation)
        labels = output.label_ids
        truths = tags_of(labels, labels, self.names) if self.tags else labels.tolist()
        return {"predictions": self.read(output.predictions, labels), "truths": truths}


def read_tasks(file: str | Path) -> dict[str, TaskEntry]:
    """Read tasks.json: an object that gives each task's name the fields of `TaskEntry`.

    Raises:
        ValueError: If a task has an unknown field, lacks one, or has a wrong kind or metric.
    """
    known, entries = {field.name for field in fields(TaskEntry)}, {}
    for name, values in json.loads(Path(file).read_text(encoding="utf-8")).items():
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Fields of task {name!r} must be among {sorted(known)}, got {unknown}.")
        if lacking := sorted({"kind", "train_file", "validation_file"} - set(values)):
            raise ValueError(f"Task {name!r} must have {lacking}.")
        entries[name] = TaskEntry(**values)
    return entries
