"""The task of a model that is to be compressed: its data, encoded for training and labelled for the verdict."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.data import encode_text
from hf_moebert.measuring.comparison import TextColumns
from hf_moebert.measuring.scores import predict_logits


SUPPORTED = "sequence classification and regression"
HELD_OUT = 0.2  # share of the given examples that no stage sees, where there are none for the verdict
FEWEST = 20  # examples to train on or to judge by
LARGEST_SELECTION = 2000  # examples that choose between recipes


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
    """

    train: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    selection: Dataset | None
    evaluation: Dataset
    columns: TextColumns
    labelled: bool

    @property
    def texts(self) -> Dataset:
        """Return the examples that stages learn from, without labels."""
        return self.train.select_columns([name for name in self.train.column_names if name != "labels"])


def check_task(model: PreTrainedModel) -> None:
    """Refuse a model whose task is not known here.

    Raises:
        UnsupportedModelError: If it is not a sequence classifier or regression of one label per text.
    """
    name = type(model).__name__
    if not name.endswith("ForSequenceClassification"):
        raise UnsupportedModelError(
            f"`model` must be fine-tuned for {SUPPORTED}, got a {name}. Use the methods one by one for other tasks."
        )
    if model.config.problem_type == "multi_label_classification":
        raise UnsupportedModelError("`model` must give one label per text, got a multi-label model.")


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
        selects: Whether another fifth of the data is held out to choose between recipes, at most 2,000 texts.
        seed: Of what is held out.

    Raises:
        ValueError: If there are too few texts, the same text is in both, or labels are not those of the model.
    """
    if evaluation is None:
        data, evaluation = hold_out(data, seed=seed)
    refuse_overlap(data, evaluation, columns)
    selection = None
    if selects:
        data, selection = hold_out(data, seed=seed, most=LARGEST_SELECTION)
    for name, texts in (("data", data), ("eval_data", evaluation)):
        if len(texts) < FEWEST:
            raise ValueError(f"`{name}` must hold at least {FEWEST} texts, got {len(texts)}. Collect more.")
    names = None if model.config.num_labels == 1 else [name for _, name in sorted(model.config.id2label.items())]
    collator = DataCollatorWithPadding(tokenizer)

    def labelled(texts: Dataset) -> Dataset:
        if columns.label_column in texts.column_names:
            return texts
        return label_by(model, texts, _encode(texts, tokenizer, columns, names), collator, columns.label_column)

    return TextData(
        _encode(data, tokenizer, columns, names),
        collator,
        None if selection is None else labelled(selection),
        labelled(evaluation),
        columns,
        columns.label_column in evaluation.column_names,
    )


def hold_out(data: Dataset, *, seed: int, most: int | None = None) -> tuple[Dataset, Dataset]:
    """Split a fifth from the data, or the most that is needed of it."""
    if len(data) < 5 * FEWEST:
        raise ValueError(
            f"`data` must hold at least {5 * FEWEST} texts to hold some out, got {len(data)}. Collect more."
        )
    count = round(HELD_OUT * len(data))
    parts = data.train_test_split(count if most is None else min(count, most), seed=seed)
    return parts["train"], parts["test"]


def label_by(model: PreTrainedModel, texts: Dataset, encoded: Dataset, collator: Callable, column: str) -> Dataset:
    """Add what a model predicts as the labels of texts."""
    logits = predict_logits(model, encoded, data_collator=collator)  # (examples, labels)
    if model.config.num_labels == 1:
        return texts.add_column(column, logits[:, 0].astype(np.float64).tolist())
    return texts.add_column(column, [model.config.id2label[int(label)] for label in logits.argmax(-1)])


def refuse_overlap(data: Dataset, evaluation: Dataset, columns: TextColumns) -> None:
    """Refuse to judge a model by texts that it learned from.

    Raises:
        ValueError: If more than one in a hundred texts of the verdict is among those to train on.
    """
    names = [name for name in (columns.text_column, columns.text_pair_column) if name is not None]
    rows = [
        set(zip(*(part[name][:] for name in names if name in part.column_names), strict=True))
        for part in (data, evaluation)
    ]
    shared = len(rows[0] & rows[1])
    if shared > len(rows[1]) / 100:
        raise ValueError(
            f"`eval_data` must hold texts that are not in `data`, but {shared:,} of {len(rows[1]):,} are. The verdict "
            "would praise what was learned by heart: hold texts out."
        )


def _encode(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, columns: TextColumns, names: list[str] | None
) -> Dataset:
    """Encode texts, with their labels if they have any."""
    if columns.label_column in texts.column_names:
        return encode_text(texts, tokenizer, label_names=names, **asdict(columns))
    texts = texts.add_column(columns.label_column, [0.0] * len(texts))
    return encode_text(texts, tokenizer, **asdict(columns)).remove_columns("labels")
