"""The task of a model that is to be compressed: its data, encoded for training and labelled for the verdict."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.heads import has_head
from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.architectures.positions import count_positions
from hf_moebert.data.questions import COLUMNS as QUESTIONS
from hf_moebert.measuring.answers import TextColumns
from hf_moebert.measuring.quality import SCORES, find_kind
from hf_moebert.measuring.ranking import find_groups

from .task_kinds import CAUSAL, task_of


HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", *CAUSAL)
WORSE_IF_LARGER = ("illegal segments", "perplexity", "perplexity by byte")
HELD_OUT = 0.2  # share of the given examples that no stage sees, where there are none for the verdict
LABELS = ("labels", "start_positions", "end_positions")  # columns of encoded examples
FEWEST = 20  # examples to train on or to judge by
LARGEST_SELECTION = 1000  # examples that choose between recipes


class UnsupportedModelError(ValueError):
    """The model's family or task is not one that can be compressed; the message says what works."""


@dataclass(frozen=True)
class TextData:
    """Texts of one task.

    Attributes:
        train: Encoded examples that stages learn from; without labels where none were given.
        collator: Pads them.
        selection: Texts and labels that choose between recipes, which no stage sees; `None` if nothing is chosen.
        evaluation: Texts and labels of the verdict, which neither stages nor choices see.
        columns: Their columns.
        labelled: Whether labels were given for the verdict; otherwise they are what the given model predicts.
        texts_read: The texts to learn from, as the model is given them.
        form: How a model without head makes embeddings; `None` with a head.
        group_column: Column of `train` that numbers the queries of a reranker.
    """

    train: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    selection: Dataset | None
    evaluation: Dataset
    columns: TextColumns
    labelled: bool
    texts_read: list[str]
    form: EmbeddingForm | None = None
    group_column: str | None = None

    @property
    def learns_labels(self) -> bool:
        """Return whether examples to learn from have labels, or the collator makes them of the texts."""
        made = isinstance(self.collator, DataCollatorForLanguageModeling)
        return made or not {"labels", "start_positions"}.isdisjoint(self.train.column_names)

    @property
    def texts(self) -> Dataset:
        """Return the examples that stages learn from, without labels."""
        return self.train.select_columns([name for name in self.train.column_names if name not in LABELS])


def check_task(model: PreTrainedModel) -> None:
    """Refuse a model whose task is not known here.

    Raises:
        UnsupportedModelError: If it does not classify texts or their words, score or rank texts, answer questions or
            predict the next token, and is no embedder from a folder of sentence-transformers.
    """
    name = type(model).__name__
    if not has_head(model):
        if not model.name_or_path or read_embedding_form(model.name_or_path) is None:
            raise UnsupportedModelError(
                f"`model` must say by modules.json how it makes embeddings, got a {name} without. Save it with "
                "`save_embedder(model, tokenizer, folder, EmbeddingForm())`, or fine-tune a classifier."
            )
    elif not name.endswith(HEADS):
        raise UnsupportedModelError(
            f"`model` must be fine-tuned to classify texts or their words or to answer questions, or be an "
            f"embedder or a causal language model, got a {name}. Use the methods one by one for other tasks."
        )


def find_metrics(model: PreTrainedModel, wanted: str | None, columns: TextColumns) -> list[str] | None:
    """Return the metrics that give a score of the model's task; `None` for the usual ones.

    Raises:
        ValueError: If none gives it, or the columns are not those of the task.
    """
    paired = columns if has_head(model) or columns.text_pair_column else replace(columns, text_pair_column="")
    table = SCORES[find_kind(model, paired)]
    if wanted is None:
        return None
    found = [name for name, scores in table.items() if wanted in scores and wanted not in WORSE_IF_LARGER]
    if not found:
        known = ", ".join(score for scores in table.values() for score in scores if score not in WORSE_IF_LARGER)
        raise ValueError(f"`metric` must be one of {known} for a {type(model).__name__}, got {wanted!r}.")
    return found


def check_lengths(model: PreTrainedModel, **lengths: int) -> None:
    """Refuse texts that are longer than a model can read, before any work.

    Raises:
        ValueError: If there are more tokens than positions.
    """
    positions = count_positions(model)
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise ValueError(f"`{name}` must be at most the model's {positions} positions, got {length}. Lower it.")


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    evaluation: Dataset | None,
    *,
    columns: TextColumns,
    selects: bool = False,
    seed: int,
) -> TextData:
    """Encode the texts to train on, and label those of the verdict if they have no labels.

    Args:
        model: The given model.
        tokenizer: Its tokenizer.
        data: Texts, with labels or without.
        evaluation: Texts for the verdict; by default a fifth of the data is held out.
        columns: Names of the columns.
        selects: Whether another fifth of the data is held out to choose between recipes, at most 1,000 texts.
        seed: Of what is held out.

    Raises:
        ValueError: If there are too few texts, the same text is in both, or labels are not those of the model.
    """
    group = columns.group_column
    if evaluation is None:
        data, evaluation = hold_out(data, seed=seed, group=group)
    refuse_overlap(data, evaluation, columns)
    selection = None
    if selects:
        data, selection = hold_out(data, seed=seed, most=LARGEST_SELECTION, group=group)
    for name, texts in (("data", data), ("eval_data", evaluation)):
        if len(texts) < FEWEST:
            raise ValueError(f"`{name}` must hold at least {FEWEST} texts, got {len(texts)}. Collect more.")
    task = task_of(model, tokenizer, columns)
    return TextData(
        train=task.encode(data),
        collator=task.collator,
        selection=None if selection is None else task.label(selection),
        evaluation=task.label(evaluation),
        columns=task.scored,
        labelled=task.is_labelled(evaluation),
        texts_read=task.read(data),
        form=task.form,
        group_column=task.group_column,
    )


def hold_out(
    data: Dataset, *, seed: int, most: int | None = None, group: str | None = None
) -> tuple[Dataset, Dataset]:
    """Split a fifth from the data, or the most that is needed of it; all rows of a group go together."""
    if len(data) < 5 * FEWEST:
        raise ValueError(
            f"`data` must hold at least {5 * FEWEST} texts to hold some out, got {len(data)}. Collect more."
        )
    count = round(HELD_OUT * len(data)) if most is None else min(round(HELD_OUT * len(data)), most)
    if group is None:
        parts = data.train_test_split(count, seed=seed)
        return parts["train"], parts["test"]
    groups = find_groups(data, group)
    order = [groups[number] for number in np.random.default_rng(seed).permutation(len(groups))]
    ends = np.cumsum([len(rows) for rows in order])
    split = int(np.searchsorted(ends, count)) + 1
    if split >= len(order):
        raise ValueError(f"The column {group!r} must hold more groups to hold some out, got {len(order)}. Add some.")
    held, kept = (np.sort(np.concatenate(rows)) for rows in (order[:split], order[split:]))
    return data.select(kept), data.select(held)


def refuse_overlap(data: Dataset, evaluation: Dataset, columns: TextColumns) -> None:
    """Refuse to judge a model by texts that it learned from.

    Raises:
        ValueError: If more than one in a hundred texts of the verdict is among those to train on.
    """
    names = (columns.text_column, columns.text_pair_column, "tokens", *QUESTIONS)
    rows = [
        set(map(str, zip(*(part[name][:] for name in names if name in part.column_names), strict=True)))
        for part in (data, evaluation)
    ]
    shared = len(rows[0] & rows[1])
    if shared > len(rows[1]) / 100:
        raise ValueError(
            f"`eval_data` must hold texts that are not in `data`, but {shared:,} of {len(rows[1]):,} are. The verdict "
            "would praise what was learned by heart: hold texts out."
        )
