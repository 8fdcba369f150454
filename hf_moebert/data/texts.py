"""Labelled texts, as the columns that a sequence classifier takes."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .splits import check_column, dtype_of


def label_names_of(dataset: Dataset, label_column: str = "label") -> list[str] | None:
    """Return the names of the classes in the order of their indices, or None for a regression.

    Args:
        dataset: Examples in which every class occurs, or whose column is a `datasets.ClassLabel`.
        label_column: Strings (sorted), whole numbers (sorted, as text) or floats (a regression).

    Raises:
        ValueError: If there is no such column, or it holds something else.
    """
    kind = _label_kind(dataset, label_column)
    if kind == "float":
        return None
    if kind == "class":
        return list(dataset.features[label_column].names)
    return [str(value) for value in sorted(set(dataset[label_column][:]) - {None})]


def encode_text(
    dataset: Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    max_length: int = 128,
) -> Dataset | DatasetDict:
    """Tokenize texts, or pairs of them, and number their labels; nothing is padded.

    Args:
        dataset: One split or all of them.
        tokenizer: Tokenizer of the model; it decides whether there are `token_type_ids`.
        text_column: Column of the texts.
        text_pair_column: Column of the second texts of pairs.
        label_column: Column of class names, whole numbers, or floats for a regression.
        label_names: Class names in the order of their indices, as from `label_names_of` the training split. Whole
            numbers are looked up by name if every name is a whole number, otherwise they are the indices. Needed
            for class names, not allowed for a regression.
        max_length: Longer texts are cut to this many tokens.

    Returns:
        The columns `input_ids`, `attention_mask`, perhaps `token_type_ids`, and `labels` (int or float), no others.

    Raises:
        ValueError: If a column is missing or of another kind, a text or label is missing, a label is not in
            `label_names`, or there are no examples.
    """
    if isinstance(dataset, DatasetDict):
        options: dict[str, Any] = {
            "text_column": text_column,
            "text_pair_column": text_pair_column,
            "label_column": label_column,
            "label_names": label_names,
            "max_length": max_length,
        }
        return DatasetDict({split: encode_text(part, tokenizer, **options) for split, part in dataset.items()})
    columns = [text_column] if text_pair_column is None else [text_column, text_pair_column]
    for column in columns:
        _check_texts(dataset, column)
    labels = _encode_labels(dataset, label_column, label_names)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)

    encoded = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
    return encoded.add_column("labels", labels)


def _check_texts(dataset: Dataset, column: str) -> None:
    check_column(dataset, column)
    if not len(dataset):
        raise ValueError("The dataset must have at least one example, got none. Check the file or the filter.")
    kind = dtype_of(dataset, column)
    if kind not in ("string", "large_string"):
        raise ValueError(f"The column '{column}' must hold texts, got {kind}. Name another, or cast it to string.")
    if None in (texts := dataset[column][:]):
        raise ValueError(f"The column '{column}' must hold texts, row {texts.index(None)} has none. Drop such rows.")


def _label_kind(dataset: Dataset, column: str) -> str:
    """Return the kind of labels in a column: "class", "string", "int" or "float"."""
    check_column(dataset, column)
    if isinstance(dataset.features[column], ClassLabel):
        return "class"
    dtype = dtype_of(dataset, column)
    for kind, prefixes in (
        ("string", ("string", "large_string")),
        ("int", ("int", "uint", "bool")),
        ("float", ("float",)),
    ):
        if dtype.startswith(prefixes):
            return kind
    raise ValueError(f"The column '{column}' must hold one label per example, got {dtype}. Name another column.")


def _encode_labels(dataset: Dataset, column: str, names: Sequence[str] | None) -> list[int] | list[float]:
    """Turn labels into the indices of their names, or check the numbers of a regression."""
    kind = _label_kind(dataset, column)
    values = dataset[column][:]
    if kind == "float":
        if names is not None:
            raise ValueError(f"`label_names` must be None for a regression, got {list(names)}. '{column}' has floats.")
        if not all(value is not None and math.isfinite(value) for value in values):
            raise ValueError(f"The column '{column}' must hold finite numbers, some are missing. Drop such rows.")
        return values
    if kind == "string" and names is None:
        raise ValueError(
            f"`label_names` must be given for labels that are texts, such as {values[0]!r:.40}, got None. Use "
            "`label_names_of`; for a model of one score, give numbers."
        )

    table = _label_table(kind, dataset.features[column], names, values)
    if unknown := set(values) - table.keys():
        known = "whole numbers from 0" if names is None else f"in {list(names)}"
        raise ValueError(
            f"The labels in '{column}' must be {known}, got {sorted(map(str, unknown))[:5]}. "
            "Drop such rows, or name every class in `label_names`."
        )
    return [table[value] for value in values]


def _label_table(kind: str, feature: Any, names: Sequence[str] | None, values: list) -> dict[Any, int]:
    """Map every known label to the index of its class."""
    if kind == "class":
        names = feature.names if names is None else names
        index = {name: i for i, name in enumerate(names)}
        return {i: index[name] for i, name in enumerate(feature.names) if name in index}
    if names is None:
        return {value: int(value) for value in values if value is not None and value >= 0}
    if kind == "string":
        return {name: i for i, name in enumerate(names)}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return {int(name): i for i, name in enumerate(names)}
    return {i: i for i in range(len(names))}
