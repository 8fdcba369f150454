"""The task of a model that is to be compressed: its data, encoded for training and labelled for the verdict."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.heads import has_head
from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.architectures.positions import count_positions
from hf_moebert.data import encode_text
from hf_moebert.measuring.comparison import TextColumns
from hf_moebert.measuring.ranking import EMBEDDING_SCORES
from hf_moebert.measuring.scores import (
    CLASSIFICATION_SCORES,
    REGRESSION_SCORES,
    predict_embeddings,
    predict_logits,
)


SUPPORTED = "sequence classification or regression, or be an embedder"
HELD_OUT = 0.2  # share of the given examples that no stage sees, where there are none for the verdict
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
        form: How a model without head makes embeddings; `None` with a head.
    """

    train: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    selection: Dataset | None
    evaluation: Dataset
    columns: TextColumns
    labelled: bool
    form: EmbeddingForm | None = None

    @property
    def texts(self) -> Dataset:
        """Return the examples that stages learn from, without labels."""
        return self.train.select_columns([name for name in self.train.column_names if name != "labels"])


def check_task(model: PreTrainedModel) -> None:
    """Refuse a model whose task is not known here.

    Raises:
        UnsupportedModelError: If it is neither a sequence classifier or regression of one label per text, nor an
            embedder from a folder of sentence-transformers.
    """
    name = type(model).__name__
    if not has_head(model):
        if not model.name_or_path or read_embedding_form(model.name_or_path) is None:
            raise UnsupportedModelError(
                f"`model` must say by modules.json how it makes embeddings, got a {name} without. Save it with "
                "`save_embedder(model, tokenizer, folder, EmbeddingForm())`, or fine-tune a classifier."
            )
    elif not name.endswith("ForSequenceClassification"):
        raise UnsupportedModelError(
            f"`model` must be fine-tuned for {SUPPORTED}, got a {name}. Use the methods one by one for other tasks."
        )
    elif model.config.problem_type == "multi_label_classification":
        raise UnsupportedModelError("`model` must give one label per text, got a multi-label model.")


def find_metrics(model: PreTrainedModel, wanted: str | None) -> list[str] | None:
    """Return the metrics that give a score of the model's task; `None` for the usual ones.

    Raises:
        ValueError: If none gives it.
    """
    if wanted is None:
        return None
    table = EMBEDDING_SCORES
    if has_head(model):
        table = REGRESSION_SCORES if model.config.num_labels == 1 else CLASSIFICATION_SCORES
    found = [name for name, scores in table.items() if wanted in scores]
    if not found:
        known = ", ".join(score for scores in table.values() for score in scores)
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
    if evaluation is None:
        data, evaluation = hold_out(data, seed=seed)
    refuse_overlap(data, evaluation, columns)
    selection = None
    if selects:
        data, selection = hold_out(data, seed=seed, most=LARGEST_SELECTION)
    for name, texts in (("data", data), ("eval_data", evaluation)):
        if len(texts) < FEWEST:
            raise ValueError(f"`{name}` must hold at least {FEWEST} texts, got {len(texts)}. Collect more.")
    task = (Labelling if has_head(model) else Embedding)(model, tokenizer, columns)
    return TextData(
        task.encode(data),
        task.collator,
        None if selection is None else task.label(selection),
        task.label(evaluation),
        task.scored,
        task.is_labelled(evaluation),
        task.form,
    )


class Labelling:
    """Texts, or pairs of them, with a class or a number each."""

    form: EmbeddingForm | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> None:
        self.model, self.tokenizer, self.columns, self.scored = model, tokenizer, columns, columns
        self.collator = DataCollatorWithPadding(tokenizer)
        config = model.config
        self.names = None if config.num_labels == 1 else [name for _, name in sorted(config.id2label.items())]

    def is_labelled(self, texts: Dataset) -> bool:
        """Return whether texts have labels."""
        return self.columns.label_column in texts.column_names

    def encode(self, texts: Dataset) -> Dataset:
        """Encode texts, with their labels if they have any."""
        if self.is_labelled(texts):
            return encode_text(texts, self.tokenizer, label_names=self.names, **asdict(self.columns))
        return encode_unlabelled(texts, self.tokenizer, self.columns)

    def label(self, texts: Dataset) -> Dataset:
        """Add what the given model predicts where there are no labels."""
        if self.is_labelled(texts):
            return texts
        logits = predict_logits(self.model, self.encode(texts), data_collator=self.collator)  # (examples, labels)
        if self.names is None:
            labels: list[Any] = logits[:, 0].astype(np.float64).tolist()
        else:
            labels = [self.names[index] for index in logits.argmax(-1)]
        return texts.add_column(self.columns.label_column, labels)


class Embedding:
    """Texts alone, or pairs of them with a number that says how alike they are."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> None:
        self.model, self.tokenizer, self.columns = model, tokenizer, columns
        self.collator = DataCollatorWithPadding(tokenizer)
        self.form = read_embedding_form(model.name_or_path)
        self.pairs = columns.text_pair_column is not None
        self.scored = columns if self.pairs else replace(columns, text_pair_column=f"{columns.text_column} behind")

    def is_labelled(self, texts: Dataset) -> bool:
        """Return whether texts are pairs with numbers."""
        return self.pairs and self.columns.label_column in texts.column_names

    def encode(self, texts: Dataset) -> Dataset:
        """Encode each text of each column, as the model is asked about them."""
        assert self.form is not None  # `check_task` saw to it
        names = [self.columns.text_column, self.columns.text_pair_column]
        rows = [self.form.prefix + text for name in names if name in texts.column_names for text in texts[name][:]]
        alone = replace(self.columns, text_pair_column=None)
        return encode_unlabelled(Dataset.from_dict({alone.text_column: rows}), self.tokenizer, alone)

    def label(self, texts: Dataset) -> Dataset:
        """Add how alike the given model finds the texts of a pair: by default each text and the next one."""
        assert self.form is not None  # `check_task` saw to it
        if self.is_labelled(texts):
            return texts
        first, second = self.scored.text_column, str(self.scored.text_pair_column)
        texts = texts.select_columns([name for name in (first, second) if name in texts.column_names])
        if not self.pairs:
            texts = texts.add_column(second, [*texts[first][1:], texts[first][0]])
        sides = [
            predict_embeddings(
                self.model,
                self.encode(Dataset.from_dict({first: texts[name][:]})),
                data_collator=self.collator,
                pooling=self.form.pooling,
            )
            for name in (first, second)
        ]  # (pairs, hidden) each
        return texts.add_column(self.scored.label_column, (sides[0] * sides[1]).sum(-1).astype(np.float64).tolist())


def encode_unlabelled(texts: Dataset, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> Dataset:
    """Encode texts without labels."""
    texts = texts.add_column(columns.label_column, [0.0] * len(texts))
    return encode_text(texts, tokenizer, **asdict(columns)).remove_columns("labels")


def hold_out(data: Dataset, *, seed: int, most: int | None = None) -> tuple[Dataset, Dataset]:
    """Split a fifth from the data, or the most that is needed of it."""
    if len(data) < 5 * FEWEST:
        raise ValueError(
            f"`data` must hold at least {5 * FEWEST} texts to hold some out, got {len(data)}. Collect more."
        )
    count = round(HELD_OUT * len(data))
    parts = data.train_test_split(count if most is None else min(count, most), seed=seed)
    return parts["train"], parts["test"]


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
