"""Labelled texts and tagged words: from the Hub or from files to the columns that a model reads."""

import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from .tags import check_column, encode_tokens, tag_names_of


# builder of `datasets` and its options, by file name ending; none of them runs code found in the file
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # the word "null" is a text like any other
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".parquet": ("parquet", {}),
}

__all__ = ["encode_text", "encode_tokens", "label_names_of", "load_splits", "tag_names_of"]


def load_splits(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    validation_share: float = 0.1,
    label_column: str = "label",
    seed: int = 0,
) -> DatasetDict:
    """Load the splits "train" and "validation" of a dataset on the Hub or in files.

    Args:
        dataset_name: Name on the Hub, or a folder that `datasets.load_dataset` understands.
        dataset_config_name: Its configuration, such as `"sst2"` of `"glue"`.
        train_file: A .json, .jsonl, .csv, .tsv or .parquet file, instead of `dataset_name`.
        validation_file: The same for validation. Without it, and without a validation split on the Hub (MNLI's is
            `validation_matched`), a share of the training examples is held out.
        validation_share: The share held out, in (0, 1): of every class alike where there is a `label_column`.
        label_column: The column to stratify by, unless it holds floats.
        seed: Of the choice of the held-out examples.

    Raises:
        ValueError: If not exactly one source is named, a file is missing, unreadable or of another kind, the two
            files disagree on their columns, or there is nothing to train on.
    """
    if (dataset_name is None) == (train_file is None):
        raise ValueError(
            f"Exactly one of `dataset_name` and `train_file` must be given, got {dataset_name} and {train_file}. "
            "Drop one, or name one."
        )
    if dataset_name is not None and validation_file is not None:
        raise ValueError(f"`validation_file` must come with `train_file`, got {validation_file} alone. Give both.")
    if not 0 < validation_share < 1:
        raise ValueError(f"`validation_share` must be in (0, 1), got {validation_share}. Use 0.1 for a tenth.")

    if train_file is not None:
        train = _read("train_file", Path(train_file))
        validation = None if validation_file is None else _read("validation_file", Path(validation_file))
    else:
        splits = load_dataset(dataset_name, dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"`dataset_name` must have a split 'train', '{dataset_name}' has {', '.join(splits)}.")
        train = splits["train"]
        validation = splits.get("validation", splits.get("validation_matched"))

    if validation is None:
        return _hold_out(train, validation_share, label_column, seed)
    if set(train.column_names) != set(validation.column_names):
        raise ValueError(
            f"Training and validation data must have the same columns, got {train.column_names} and "
            f"{validation.column_names}. Rename or drop columns in one of them."
        )
    same_order = validation.select_columns(train.column_names)
    return DatasetDict(train=train, validation=same_order.cast(train.features))  # whole numbers may be read as int64


def _read(argument: str, path: Path) -> Dataset:
    """Read one file into memory-mapped Arrow."""
    if path.suffix.lower() not in READERS:
        raise ValueError(f"`{argument}` must end in {', '.join(READERS)}, got '{path}'. Convert it to one of these.")
    if not path.is_file():
        raise ValueError(f"`{argument}` must be an existing file, got '{path}'. Check the path.")
    builder, options = READERS[path.suffix.lower()]
    try:
        return load_dataset(builder, data_files=glob.escape(str(path)), split="train", **options)
    except DatasetGenerationError as error:
        raise ValueError(
            f"`{argument}` must hold rows of one shape as {builder}, '{path}' cannot be read: {error.__cause__}"
        ) from error


def _hold_out(dataset: Dataset, share: float, label_column: str, seed: int) -> DatasetDict:
    """Split off a share of every label, each within one example of it."""
    size = len(dataset)
    if size < 2:
        raise ValueError(f"Training data must have at least 2 examples to hold some out, got {size}. Add examples.")
    count = min(max(1, round(share * size)), size - 1)
    generator = np.random.default_rng(seed)
    order = generator.permutation(size)
    if label_column in dataset.column_names and not _dtype(dataset, label_column).startswith("float"):
        labels = np.asarray([str(label) for label in dataset[label_column]])  # a missing label is a label here
        order = order[np.argsort(labels[order], kind="stable")]
    held_out = order[((np.arange(count) + generator.random()) * size / count).astype(int)]  # every (size / count)-th
    kept = np.setdiff1d(np.arange(size), held_out)
    return DatasetDict(train=dataset.select(kept), validation=dataset.select(np.sort(held_out)))


def label_names_of(dataset: Dataset, label_column: str = "label") -> list[str] | None:
    """Name the classes of a dataset in the order of their indices, or return None for the numbers of a regression.

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
        tokenizer: Of the model; it decides whether there are `token_type_ids`.
        text_column: The text.
        text_pair_column: The second text of a pair.
        label_column: Class names, whole numbers, or floats for a regression.
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


def _dtype(dataset: Dataset, column: str) -> str:
    return getattr(dataset.features[column], "dtype", "list")


def _check_texts(dataset: Dataset, column: str) -> None:
    check_column(dataset, column)
    if not len(dataset):
        raise ValueError("The dataset must have at least one example, got none. Check the file or the filter.")
    kind = _dtype(dataset, column)
    if kind not in ("string", "large_string"):
        raise ValueError(f"The column '{column}' must hold texts, got {kind}. Name another, or cast it to string.")
    if None in (texts := dataset[column][:]):
        raise ValueError(f"The column '{column}' must hold texts, row {texts.index(None)} has none. Drop such rows.")


def _label_kind(dataset: Dataset, column: str) -> str:
    """Tell "class", "string", "int" and "float" labels apart."""
    check_column(dataset, column)
    if isinstance(dataset.features[column], ClassLabel):
        return "class"
    dtype = _dtype(dataset, column)
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
        raise ValueError("`label_names` must be given for labels that are texts, got None. Use `label_names_of`.")

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
