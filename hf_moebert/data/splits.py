"""Data sets from the Hub or from files: their splits and their columns."""

import glob
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError


# Builder of `datasets` and its options by suffix; none of them runs code in the file
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # the word "null" is a text
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".parquet": ("parquet", {}),
}


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
        validation_share: Share to hold out, in (0, 1), of every class alike if there is a `label_column`.
        label_column: Column to stratify by, unless it holds floats.
        seed: Seed of the choice of the held-out examples.

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

    if train_file is None:
        train, validation = _load_from_hub(dataset_name, dataset_config_name)
    else:
        train = read_file(train_file, argument="train_file")
        validation = None if validation_file is None else read_file(validation_file, argument="validation_file")
    if validation is None:
        return _hold_out(train, validation_share, label_column, seed)
    if set(train.column_names) != set(validation.column_names):
        raise ValueError(
            f"Training and validation data must have the same columns, got {train.column_names} and "
            f"{validation.column_names}. Rename or drop columns in one of them."
        )
    same_order = validation.select_columns(train.column_names)
    return DatasetDict(train=train, validation=same_order.cast(train.features))  # whole numbers may be read as int64


def _load_from_hub(name: str | None, config_name: str | None) -> tuple[Dataset, Dataset | None]:
    """Load the training split, and the validation split if there is one."""
    splits = load_dataset(name, config_name)
    if "train" not in splits:
        raise ValueError(f"`dataset_name` must have a split 'train', '{name}' has {', '.join(splits)}.")
    return splits["train"], splits.get("validation", splits.get("validation_matched"))


def check_column(dataset: Dataset, column: str) -> None:
    """Check that a data set has a column.

    Raises:
        ValueError: If it does not.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset must have the column '{column}', it has {', '.join(dataset.column_names)}. "
            "Name the right one, or rename it."
        )


def read_file(path: str | Path, *, argument: str = "path") -> Dataset:
    """Read the rows of one file into memory-mapped Arrow.

    Args:
        path: A .json, .jsonl, .csv, .tsv or .parquet file.
        argument: What the caller calls it, for the message of an error.

    Raises:
        ValueError: If it is missing, unreadable, empty or of another kind.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"`{argument}` must end in {', '.join(READERS)}, got '{path}'. Convert it to one of these.")
    if not path.is_file():
        raise ValueError(f"`{argument}` must be an existing file, got '{path}'. Check the path.")
    builder, options = READERS[path.suffix.lower()]
    try:
        return load_dataset(builder, data_files=glob.escape(str(path)), split="train", **options)
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        reason = error.__cause__ or str(error) or "it is empty"
        raise ValueError(
            f"`{argument}` must hold rows of one shape as {builder}, '{path}' cannot be read: {reason}"
        ) from error


def _hold_out(dataset: Dataset, share: float, label_column: str, seed: int) -> DatasetDict:
    """Hold out a share of the examples of every label, exact to one example of each."""
    size = len(dataset)
    if size < 2:
        raise ValueError(f"Training data must have at least 2 examples to hold some out, got {size}. Add examples.")
    count = min(max(1, round(share * size)), size - 1)
    generator = np.random.default_rng(seed)
    order = generator.permutation(size)
    if label_column in dataset.column_names and not dtype_of(dataset, label_column).startswith("float"):
        labels = np.asarray([str(label) for label in dataset[label_column]])  # missing labels form a class here
        order = order[np.argsort(labels[order], kind="stable")]
    held_out = order[((np.arange(count) + generator.random()) * size / count).astype(int)]  # every (size / count)-th
    kept = np.setdiff1d(np.arange(size), held_out)
    return DatasetDict(train=dataset.select(kept), validation=dataset.select(np.sort(held_out)))


def dtype_of(dataset: Dataset, column: str) -> str:
    """Return the dtype of a column, or "list"."""
    return getattr(dataset.features[column], "dtype", "list")
