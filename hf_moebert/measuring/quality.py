"""The quality of models on the same examples: what they predict of each task, and its scores beside a baseline's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.heads import has_head
from hf_moebert.architectures.pooling import EmbeddingForm
from hf_moebert.data import encode_text
from hf_moebert.data.splits import check_column

from .metrics import metrics_for_task
from .ranking import EMBEDDING_SCORES, RANKING_SCORES, find_groups, score_groups
from .scores import (
    CLASSIFICATION_SCORES,
    REGRESSION_SCORES,
    Score,
    bootstrap_interval,
    paired_bootstrap,
    predict_embeddings,
    predict_logits,
)


Kind = Literal["classes", "numbers", "embeddings", "ranking"]
Quality = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TextColumns:
    """The columns of a data set that hold texts and labels, and the length texts are truncated to."""

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    max_length: int = 128


@dataclass(frozen=True)
class LoadedModel:
    """A model to measure, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: str
    form: EmbeddingForm | None = None  # of a model without head


@dataclass(frozen=True)
class _Answers:
    """Predictions of every model by name, `(examples, ...)`, the truth, `(examples,)`, and the scores of both."""

    predictions: Mapping[str, np.ndarray]
    references: np.ndarray
    scores: Mapping[str, Score]


def find_kind(model: PreTrainedModel, columns: TextColumns, group_column: str | None) -> Kind:
    """Return what a model is measured by: its head, and the columns that there are.

    Raises:
        ValueError: If the columns are not those of the model's task.
    """
    if not has_head(model):
        if columns.text_pair_column is None or group_column is not None:
            raise ValueError(
                f"`models` without a head, as {type(model).__name__}, must be measured on pairs of texts and numbers "
                "that say how alike they are. Name `text_pair_column`, no `group_column`, or fine-tune a classifier."
            )
        return "embeddings"
    if group_column is None:
        return "numbers" if model.config.num_labels == 1 else "classes"
    if model.config.num_labels != 1 or columns.text_pair_column is None:
        raise ValueError(
            "`group_column` must be given for rerankers alone, models of one label that read a `text_pair_column`, "
            f"got {model.config.num_labels} labels and {columns.text_pair_column!r}. Leave it out."
        )
    return "ranking"


def draw_examples(dataset: Dataset, group_column: str | None, count: int | None, seed: int) -> Dataset:
    """Draw this many examples, or as many whole groups as fit; all of them if there are no more."""
    if count is None or count >= len(dataset):
        return dataset
    if group_column is None:
        return dataset.shuffle(seed=seed).select(range(count))
    groups = find_groups(dataset, group_column)
    rows: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if rows and len(rows) + len(groups[number]) > count:
            break
        rows += groups[number].tolist()
    return dataset.select(rows)


def measure_quality(
    loaded: Mapping[str, LoadedModel],
    dataset: Dataset,
    baseline: str,
    metrics: Sequence[str] | None,
    *,
    columns: TextColumns,
    group_column: str | None,
    batch_size: int,
    seed: int,
) -> Quality:
    """Return "scores" of every model, and "differences" to the baseline, by name.

    Raises:
        ValueError: If models differ in their task or labels, or the data set does not fit it.
    """
    kinds = {name: find_kind(entry.model, columns, group_column) for name, entry in loaded.items()}
    if other := [name for name in loaded if kinds[name] != kinds[baseline]]:
        raise ValueError(
            f"`models` must all have the task of {baseline!r}, {kinds[baseline]}, {other[0]!r} has "
            f"{kinds[other[0]]}. Compare models of one task."
        )
    options: dict[str, Any] = {"columns": columns, "batch_size": batch_size}
    if group_column is not None:
        answers = _answer_by_ranks(loaded, dataset, group_column, metrics, **options)
    else:
        answer = _answer_by_embeddings if kinds[baseline] == "embeddings" else _answer_by_logits
        answers = answer(loaded, dataset, baseline, metrics, **options)
    quality: Quality = {}
    for name, predictions in answers.predictions.items():
        scored = {
            key: asdict(bootstrap_interval(function, predictions, answers.references, seed=seed))
            for key, function in answers.scores.items()
        }
        differences = {
            key: asdict(
                paired_bootstrap(function, predictions, answers.predictions[baseline], answers.references, seed=seed)
            )
            for key, function in (answers.scores.items() if name != baseline else ())
        }
        quality[name] = {"scores": scored, "differences": differences or None}
    return quality


def _choose(table: Mapping[str, Mapping[str, Score]], metrics: Sequence[str]) -> dict[str, Score]:
    """Return the functions of the metrics, by the name of each number."""
    if unknown := [name for name in metrics if name not in table]:
        raise ValueError(f"`metrics` must be among {', '.join(table)} for these models, got {unknown[0]!r}.")
    return {key: function for name in metrics for key, function in table[name].items()}


def _answer_by_logits(
    loaded: Mapping[str, LoadedModel],
    dataset: Dataset,
    baseline: str,
    metrics: Sequence[str] | None,
    *,
    columns: TextColumns,
    batch_size: int,
) -> _Answers:
    config = loaded[baseline].model.config
    regression = config.num_labels == 1
    metrics = metrics or metrics_for_task("regression" if regression else config.problem_type or "")
    label_names = _label_names(config, dataset, columns.label_column)
    orders = {name: _label_order(name, entry.model.config, config) for name, entry in loaded.items()}
    predictions, references = {}, np.empty(0)
    for name, entry in loaded.items():
        encoded = encode_text(dataset, entry.tokenizer, label_names=label_names, **asdict(columns))
        logits = _predict(entry, encoded, batch_size)[:, orders[name]]  # (examples, labels)
        predictions[name] = logits[:, 0] if regression else logits.argmax(-1)  # (examples,)
        references = np.asarray(encoded["labels"])
    table = REGRESSION_SCORES if regression else CLASSIFICATION_SCORES
    return _Answers(predictions, references, _choose(table, metrics))


def _answer_by_ranks(
    loaded: Mapping[str, LoadedModel],
    dataset: Dataset,
    group_column: str,
    metrics: Sequence[str] | None,
    *,
    columns: TextColumns,
    batch_size: int,
) -> _Answers:
    """Score each group of documents: `(groups, scores)`."""
    groups, predictions = find_groups(dataset, group_column), {}
    for name, entry in loaded.items():
        encoded = encode_text(dataset, entry.tokenizer, **asdict(columns))
        logits = _predict(entry, encoded, batch_size)[:, 0]
        predictions[name] = score_groups(logits, np.asarray(encoded["labels"]), groups)
    return _Answers(predictions, np.zeros(len(groups)), _choose(RANKING_SCORES, metrics or list(RANKING_SCORES)))


def _answer_by_embeddings(
    loaded: Mapping[str, LoadedModel],
    dataset: Dataset,
    baseline: str,
    metrics: Sequence[str] | None,
    *,
    columns: TextColumns,
    batch_size: int,
) -> _Answers:
    """Return for each pair its cosine, and the mean cosine of its texts to those of the baseline: `(pairs, 2)`."""
    embeddings, references = {}, np.empty(0)
    for column in (columns.text_column, str(columns.text_pair_column)):
        _refuse_empty(dataset, column)
    for name, entry in loaded.items():
        form, sides = entry.form or EmbeddingForm(), []
        for column in (columns.text_column, str(columns.text_pair_column)):
            prompted = dataset.map(_add_before(form.prefix, column)) if form.prefix else dataset
            single = replace(columns, text_column=column, text_pair_column=None)
            encoded = encode_text(prompted, entry.tokenizer, **asdict(single))
            collate = DataCollatorWithPadding(entry.tokenizer)
            options: dict[str, Any] = {"pooling": form.pooling, "batch_size": batch_size}
            sides.append(predict_embeddings(entry.model, encoded, data_collator=collate, **options))
            references = np.asarray(encoded["labels"], dtype=float)
        embeddings[name] = np.stack(sides)  # (2, pairs, hidden)
    alike = {sides.shape for sides in embeddings.values()} == {embeddings[baseline].shape}
    predictions = {}
    for name, (first, second) in embeddings.items():
        cosines = [(first * second).sum(-1)]
        if alike:
            cosines.append((embeddings[name] * embeddings[baseline]).sum(-1).mean(0))
        predictions[name] = np.stack(cosines, axis=1)  # (pairs, 2)
    table = EMBEDDING_SCORES if alike else {"spearman_cosine": EMBEDDING_SCORES["spearman_cosine"]}
    return _Answers(predictions, references, _choose(table, metrics or list(table)))


def _predict(entry: LoadedModel, encoded: Dataset, batch_size: int) -> np.ndarray:
    collate = DataCollatorWithPadding(entry.tokenizer)
    return predict_logits(entry.model, encoded, data_collator=collate, batch_size=batch_size)  # (examples, labels)


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


def _label_order(name: str, config: PretrainedConfig, baseline: PretrainedConfig) -> list[int]:
    """Return for each label of the baseline the column of the same label in the logits of another model."""
    if _has_names(config) and _has_names(baseline):
        if config.label2id.keys() == baseline.label2id.keys():
            return [config.label2id[baseline.id2label[index]] for index in range(baseline.num_labels)]
    elif config.num_labels == baseline.num_labels:
        return list(range(baseline.num_labels))
    raise ValueError(
        f"`models` must all have the baseline's labels {list(baseline.label2id)}, {name!r} has "
        f"{list(config.label2id)}. Compare models of one task."
    )
