"""The quality of models on the same examples: the scores of what they predict, beside a baseline's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from hf_moebert.architectures.heads import has_head

from .answers import (
    Answers,
    Asked,
    LoadedModel,
    TextColumns,
    answer_by_embeddings,
    answer_by_label_sets,
    answer_by_logits,
    answer_by_ranks,
)
from .answers_of_tokens import (
    ANSWER_SCORES,
    LANGUAGE_SCORES,
    TAG_SCORES,
    answer_by_next_tokens,
    answer_by_spans,
    answer_by_tags,
)
from .ranking import EMBEDDING_SCORES, RANKING_SCORES, find_groups
from .scores import (
    CLASSIFICATION_SCORES,
    LABEL_SET_SCORES,
    REGRESSION_SCORES,
    Score,
    bootstrap_interval,
    paired_bootstrap,
)


Kind = Literal["classes", "labels", "numbers", "embeddings", "ranking", "tags", "answers", "language"]
Quality = dict[str, dict]

ANSWERS: dict[Kind, Callable[[Asked], Answers]] = {
    "classes": answer_by_logits,
    "numbers": answer_by_logits,
    "labels": answer_by_label_sets,
    "ranking": answer_by_ranks,
    "embeddings": answer_by_embeddings,
    "tags": answer_by_tags,
    "answers": answer_by_spans,
    "language": answer_by_next_tokens,
}
SCORES: dict[Kind, Mapping[str, Mapping[str, Score]]] = {
    "classes": CLASSIFICATION_SCORES,
    "numbers": REGRESSION_SCORES,
    "labels": LABEL_SET_SCORES,
    "ranking": RANKING_SCORES,
    "embeddings": EMBEDDING_SCORES,
    "tags": TAG_SCORES,
    "answers": ANSWER_SCORES,
    "language": LANGUAGE_SCORES,
}


def find_kind(model: PreTrainedModel, columns: TextColumns) -> Kind:
    """Return what a model is measured by: its head, and the columns that there are.

    Raises:
        ValueError: If the columns are not those of the model's task, or nothing here scores it.
    """
    kind, group_column = _kind_of_head(model), columns.group_column
    if group_column is not None and (kind != "numbers" or columns.text_pair_column is None):
        raise ValueError(
            "`group_column` must be given for rerankers alone, models of one label that read a `text_pair_column`, "
            f"got {model.config.num_labels} labels of a {type(model).__name__} and {columns.text_pair_column!r}. "
            "Leave it out."
        )
    if kind == "embeddings" and columns.text_pair_column is None:
        raise ValueError(
            f"`models` without a head, as {type(model).__name__}, must be measured on pairs of texts, with numbers "
            "that say how alike they are, or queries with their documents. Name `text_pair_column`, or fine-tune a "
            "classifier."
        )
    return "ranking" if group_column is not None else kind


def _kind_of_head(model: PreTrainedModel) -> Kind:
    if not has_head(model):
        return "embeddings"
    name = type(model).__name__
    if name.endswith("ForTokenClassification"):
        return "tags"
    if name.endswith("ForQuestionAnswering"):
        return "answers"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "language"
    if not name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"`models` must classify texts or tokens, answer questions, predict the next token or embed texts, got a "
            f"{name}. Score it yourself."
        )
    if model.config.problem_type == "multi_label_classification":
        return "labels"
    return "numbers" if model.config.num_labels == 1 else "classes"


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
    batch_size: int,
    seed: int,
) -> Quality:
    """Return "scores" of every model, "differences" to the baseline, and how many examples or queries were "scored".

    Raises:
        ValueError: If models differ in their task or labels, or the data set does not fit it.
    """
    kinds = {name: find_kind(entry.model, columns) for name, entry in loaded.items()}
    if other := [name for name in loaded if kinds[name] != kinds[baseline]]:
        raise ValueError(
            f"`models` must all have the task of {baseline!r}, {kinds[baseline]}, {other[0]!r} has "
            f"{kinds[other[0]]}. Compare models of one task."
        )
    asked = Asked(loaded, dataset, baseline, metrics, columns, batch_size)
    answers = ANSWERS[kinds[baseline]](asked)
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
        quality[name] = {"scores": scored, "differences": differences or None, "scored": len(predictions)}
    return quality
