"""Answers of models to texts, and the usual scores of these: classes, numbers, embeddings, rankings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from sklearn.preprocessing import MultiLabelBinarizer
from transformers import (
    BatchEncoding,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moebert.architectures.pooling import EmbeddingForm
from hf_moebert.data import encode_text
from hf_moebert.data.splits import check_column

from .metrics import metrics_for_task
from .predictions import predict_embeddings, predict_logits
from .ranking import EMBEDDING_SCORES, RANKING_SCORES, RETRIEVAL_SCORES, find_groups, score_groups, score_retrieval
from .scores import CLASSIFICATION_SCORES, LABEL_SET_SCORES, REGRESSION_SCORES, Score


@dataclass(frozen=True)
class TextColumns:
    """The columns of a data set that hold texts and labels, and the length texts are truncated to.

    Where taggers are measured, "text" and "label" stand for "tokens" and "tags". A group column says which rows belong
    to one query: models of one score are then rerankers of documents, the texts of the pair column.
    """

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    max_length: int = 128
    group_column: str | None = None

    @property
    def of_text(self) -> dict[str, Any]:
        """Return the arguments of `encode_text`."""
        return {name: value for name, value in asdict(self).items() if name != "group_column"}


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, list], columns: TextColumns) -> BatchEncoding:
    """Encode texts, pairs, lists of words, or questions with their contexts, padded to one batch, `(batch, seq)`."""
    names = [columns.text_column, columns.text_pair_column]
    if columns.text_column not in rows:  # those of other tasks
        names = ["question", "context"] if "question" in rows else ["tokens", None]
    texts = [rows[name] for name in names if name is not None and name in rows]
    options: dict[str, Any] = {"truncation": True, "max_length": columns.max_length, "padding": True}
    words = isinstance(texts[0][0], list)
    return tokenizer(*texts, is_split_into_words=words, return_tensors="pt", **options)


@dataclass(frozen=True)
class LoadedModel:
    """A model to measure, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: str
    form: EmbeddingForm | None = None  # of a model without head


@dataclass(frozen=True)
class Asked:
    """Models of one task by name, and the examples that all of them are asked about."""

    loaded: Mapping[str, LoadedModel]
    dataset: Dataset
    baseline: str
    metrics: Sequence[str] | None
    columns: TextColumns
    batch_size: int

    @property
    def config(self) -> PretrainedConfig:
        """Return the configuration of the baseline."""
        return self.loaded[self.baseline].model.config

    def answer(
        self,
        predictions: Mapping[str, np.ndarray],
        references: np.ndarray,
        table: Mapping[str, Mapping[str, Score]],
        usual: Sequence[str] | None = None,
    ) -> "Answers":
        """Choose the scores: the metrics that were asked for, or those that are usual, by default all of a table.

        Raises:
            ValueError: If a metric is not in the table.
        """
        metrics = self.metrics or usual or list(table)
        if unknown := [name for name in metrics if name not in table]:
            raise ValueError(f"`metrics` must be among {', '.join(table)} for these models, got {unknown[0]!r}.")
        scores = {key: function for name in metrics for key, function in table[name].items()}
        return Answers(predictions, references, scores)

    def predict(self, entry: LoadedModel, encoded: Dataset) -> np.ndarray:
        """Return the logits of a model, `(examples, labels)`."""
        collate = DataCollatorWithPadding(entry.tokenizer)
        return predict_logits(entry.model, encoded, data_collator=collate, batch_size=self.batch_size)

    def label_order(self, name: str) -> list[int]:
        """Return for each label of the baseline the column of the same label in the logits of another model.

        Raises:
            ValueError: If it has other labels.
        """
        config, baseline = self.loaded[name].model.config, self.config
        if _has_names(config) and _has_names(baseline):
            if config.label2id.keys() == baseline.label2id.keys():
                return [config.label2id[baseline.id2label[index]] for index in range(baseline.num_labels)]
        elif config.num_labels == baseline.num_labels:
            return list(range(baseline.num_labels))
        raise ValueError(
            f"`models` must all have the baseline's labels {list(baseline.label2id)}, {name!r} has "
            f"{list(config.label2id)}. Compare models of one task."
        )


@dataclass(frozen=True)
class Answers:
    """Predictions of every model by name, `(examples, ...)`, the truth, `(examples, ...)`, and the scores of both."""

    predictions: Mapping[str, np.ndarray]
    references: np.ndarray
    scores: Mapping[str, Score]


def answer_by_logits(asked: Asked) -> Answers:
    """Compare classes, or numbers, `(examples,)`."""
    config, columns = asked.config, asked.columns
    regression = config.num_labels == 1
    label_names = _label_names(config, asked.dataset, columns.label_column)
    orders = {name: asked.label_order(name) for name in asked.loaded}
    predictions, references = {}, np.empty(0)
    for name, entry in asked.loaded.items():
        encoded = encode_text(asked.dataset, entry.tokenizer, label_names=label_names, **columns.of_text)
        logits = asked.predict(entry, encoded)[:, orders[name]]  # (examples, labels)
        predictions[name] = logits[:, 0] if regression else logits.argmax(-1)  # (examples,)
        references = np.asarray(encoded["labels"])
    table = REGRESSION_SCORES if regression else CLASSIFICATION_SCORES
    usual = metrics_for_task("regression" if regression else config.problem_type or "")
    return asked.answer(predictions, references, table, usual)


def answer_by_label_sets(asked: Asked) -> Answers:
    """Compare the labels that apply, each on its own, `(examples, labels)`."""
    config, columns, dataset = asked.config, asked.columns, asked.dataset
    names = [config.id2label[index] for index in range(config.num_labels)]
    references = read_label_sets(dataset, columns.label_column, names)  # (examples, labels)
    orders = {name: asked.label_order(name) for name in asked.loaded}
    alone = dataset.remove_columns(columns.label_column).add_column(columns.label_column, [0.0] * len(dataset))
    predictions = {}
    for name, entry in asked.loaded.items():
        logits = asked.predict(entry, encode_text(alone, entry.tokenizer, **columns.of_text))
        predictions[name] = (logits[:, orders[name]] > 0).astype(np.int64)  # probabilities above a half
    return asked.answer(predictions, references, LABEL_SET_SCORES)


def read_label_sets(dataset: Dataset, column: str, names: Sequence[str]) -> np.ndarray:
    """Return 1 for each label that a text has, 0 for the others, `(examples, labels)`.

    Raises:
        ValueError: If the column does not hold lists of these labels.
    """
    check_column(dataset, column)
    wanted = dataset[column][:]
    lists = all(isinstance(labels, list) for labels in wanted)
    if strange := sorted({label for labels in wanted for label in labels} - set(names)) if lists else wanted[:1]:
        raise ValueError(
            f"The column {column!r} must hold lists of the labels {list(names)}, got {strange[0]!r}. Name those that "
            "apply to each text."
        )
    return MultiLabelBinarizer(classes=list(names)).fit_transform(wanted)


def answer_by_ranks(asked: Asked) -> Answers:
    """Compare the scores of each group of documents, `(groups, scores)`."""
    groups, predictions = find_groups(asked.dataset, str(asked.columns.group_column)), {}
    for name, entry in asked.loaded.items():
        encoded = encode_text(asked.dataset, entry.tokenizer, **asked.columns.of_text)
        logits = asked.predict(entry, encoded)[:, 0]
        predictions[name] = score_groups(logits, np.asarray(encoded["labels"]), groups)
    return asked.answer(predictions, np.zeros(len(groups)), RANKING_SCORES)


def answer_by_embeddings(asked: Asked) -> Answers:
    """Compare the cosines of pairs with numbers, `(pairs, 2)`; or, without numbers, what each query finds.

    The last column is the mean cosine of the texts of a pair to those of the baseline.
    """
    columns, dataset = asked.columns, asked.dataset
    names = (columns.text_column, str(columns.text_pair_column))
    for column in names:
        _refuse_empty(dataset, column)
    labelled = columns.label_column in dataset.column_names
    if not labelled:
        dataset = dataset.add_column(columns.label_column, [0.0] * len(dataset))
    embeddings: dict[str, np.ndarray] = {}
    references = np.empty(0)
    for name, entry in asked.loaded.items():
        form, sides = entry.form or EmbeddingForm(), []
        for column in names:
            prompted = dataset.map(_add_before(form.prefix, column)) if form.prefix else dataset
            single = replace(columns, text_column=column, text_pair_column=None)
            encoded = encode_text(prompted, entry.tokenizer, **single.of_text)
            collate = DataCollatorWithPadding(entry.tokenizer)
            options: dict[str, Any] = {"pooling": form.pooling, "batch_size": asked.batch_size}
            sides.append(predict_embeddings(entry.model, encoded, data_collator=collate, **options))
            references = np.asarray(encoded["labels"], dtype=float)
        embeddings[name] = np.stack(sides)  # (2, pairs, hidden)
    first = embeddings[asked.baseline]
    alike = {sides.shape for sides in embeddings.values()} == {first.shape}
    predictions = {}
    for name, both in embeddings.items():
        queries, documents = both
        found = (
            [(queries * documents).sum(-1)] if labelled else score_retrieval(queries, documents, dataset[names[1]][:])
        )
        to_baseline = [(both * first).sum(-1).mean(0)] if alike else []
        predictions[name] = np.stack([*found, *to_baseline], axis=1)  # (pairs, scores)
    table = EMBEDDING_SCORES if labelled else RETRIEVAL_SCORES
    return asked.answer(predictions, references, table if alike else dict(list(table.items())[:-1]))


def _add_before(prefix: str, column: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda row: {column: prefix + row[column]}


def _refuse_empty(dataset: Dataset, column: str) -> None:
    check_column(dataset, column)
    if empty := [row for row, text in enumerate(dataset[column][:]) if isinstance(text, str) and not text.strip()]:
        raise ValueError(
            f"The column {column!r} must hold texts that are not empty, row {empty[0]} is. Drop such rows."
        )


def _label_names(config: PretrainedConfig, dataset: Dataset, label_column: str) -> list[str] | None:
    if config.num_labels == 1:
        return None
    names = [config.id2label[index] for index in range(config.num_labels)]
    named_by_data = isinstance(dataset.features.get(label_column), ClassLabel)
    # A model that was never told the names of its labels still has their order.
    return None if named_by_data and not _has_names(config) else names


def _has_names(config: PretrainedConfig) -> bool:
    return any(name != f"LABEL_{index}" for index, name in config.id2label.items())
