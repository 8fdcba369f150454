"""Tagged words, as the columns that a token classifier takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .splits import check_column
from .words import keep_words


IGNORED = -100  # label of special tokens, and of all sub-words of a word but the first


def tag_names_of(dataset: Dataset, tags_column: str = "tags") -> list[str]:
    """Return the names of the tags in the order of their indices.

    Args:
        dataset: Examples in which every tag occurs, or whose column holds lists of `datasets.ClassLabel`.
        tags_column: Lists of tags such as "O" and "B-place".

    Returns:
        "O" first, then the others by type and by prefix; the names of a `ClassLabel` keep their order.

    Raises:
        ValueError: If there is no such column, or it holds something else.
    """
    kind = _item_of(dataset, tags_column)
    if isinstance(kind, ClassLabel):
        return list(kind.names)
    if _dtype(kind) != "string":
        raise ValueError(
            f"The column '{tags_column}' must hold lists of tag names, got lists of {_dtype(kind)}. "
            "Name the tags yourself, in the order of their indices."
        )
    found = {tag for tags in dataset[tags_column] for tag in tags or [] if tag is not None}
    return sorted(found, key=lambda tag: (tag != "O", *_split(tag)[::-1]))


def encode_tokens(
    dataset: Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens_column: str = "tokens",
    tags_column: str = "tags",
    tag_names: Sequence[str],
    max_length: int = 128,
) -> Dataset | DatasetDict:
    """Tokenize lists of words, and number the tag of each word at its first sub-word; nothing is padded.

    Two choices are our own design. A word that the tokenizer drops, such as a lone control character, becomes the
    unknown token, so that every word keeps its tag. Sentences are cut between words, and never inside an entity: an
    entity that does not fit is dropped as a whole, since half of it would be an illegal path of tags in IOBES and
    BILOU.

    Args:
        dataset: One split or all of them.
        tokenizer: Fast tokenizer of the model, which knows the word of each sub-word.
        tokens_column: Column of lists of words, which may be empty.
        tags_column: Column of lists of as many tags: names, `datasets.ClassLabel`, or indices into `tag_names`.
        tag_names: Tags in the order of their indices, as from `tag_names_of` the training split.
        max_length: Longer sentences are cut to at most this many sub-words, special tokens included.

    Returns:
        The columns `input_ids`, `attention_mask`, perhaps `token_type_ids`, and `labels`, which is -100 at special
        tokens and at all but the first sub-word of a word.

    Raises:
        ValueError: If a column is missing or of another kind, words and tags differ in number, a word or a tag is
            missing, a tag is not in `tag_names`, there are no examples, the tokenizer is not a fast one, or
            `max_length` has no room for a word.
    """
    if isinstance(dataset, DatasetDict):
        options: dict[str, Any] = {
            "tokens_column": tokens_column,
            "tags_column": tags_column,
            "tag_names": tag_names,
            "max_length": max_length,
        }
        return DatasetDict({split: encode_tokens(part, tokenizer, **options) for split, part in dataset.items()})
    _check_tokenizer(tokenizer, max_length)
    if _dtype(kind := _item_of(dataset, tokens_column)) not in ("string", "null"):
        raise ValueError(f"The column '{tokens_column}' must hold lists of words, got lists of {_dtype(kind)}.")
    table = _tag_table(_item_of(dataset, tags_column), tag_names)
    _check_rows(dataset, table, tag_names, tokens_column=tokens_column, tags_column=tags_column)

    def encode(rows: dict[str, list]) -> dict[str, list[list[int]]]:
        numbers = [[table[tag] for tag in tags] for tags in rows[tags_column]]
        return _encode_rows(tokenizer, rows[tokens_column], numbers, names=tag_names, max_length=max_length)

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")


def _item_of(dataset: Dataset, column: str) -> Any:
    """Return the feature of the items of a column of lists."""
    check_column(dataset, column)
    feature = dataset.features[column]
    if not hasattr(feature, "feature"):
        raise ValueError(f"The column '{column}' must hold lists, got {_dtype(feature)}. Split the texts into words.")
    return feature.feature


def _dtype(feature: Any) -> str:
    return getattr(feature, "dtype", "list").removeprefix("large_")


def _split(tag: str) -> tuple[str, str]:
    """Split a tag into its prefix and its type, which may contain dashes."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def _tag_table(feature: Any, names: Sequence[str]) -> dict[Any, int]:
    """Map every known tag, as the column holds it, to its index."""
    index = {name: number for number, name in enumerate(names)}
    if isinstance(feature, ClassLabel):
        return {number: index[name] for number, name in enumerate(feature.names) if name in index}
    if _dtype(feature).startswith(("int", "uint")):
        return {number: number for number in range(len(names))}
    return index


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"`tokenizer` must be a fast one, which knows the word of each sub-word, got {type(tokenizer).__name__}. "
            "Load it with `AutoTokenizer`."
        )
    if max_length <= (special := tokenizer.num_special_tokens_to_add()):
        raise ValueError(f"`max_length` must be above the {special} special tokens, got {max_length}. Use 128.")


def _check_rows(
    dataset: Dataset, table: Mapping[Any, int], names: Sequence[str], *, tokens_column: str, tags_column: str
) -> None:
    """Refuse the first row whose words and tags do not pair up."""
    if not len(dataset):
        raise ValueError("The dataset must have at least one example, got none. Check the file or the filter.")
    for row, (words, tags) in enumerate(zip(dataset[tokens_column], dataset[tags_column], strict=True)):
        if words is None or tags is None or None in words:
            raise ValueError(
                f"The columns '{tokens_column}' and '{tags_column}' must hold lists of words and tags, row {row} has "
                f"{words} and {tags}. Drop such rows."
            )
        if len(words) != len(tags):
            raise ValueError(
                f"Every word must have one tag, row {row} has {len(words)} words in '{tokens_column}' and {len(tags)} "
                f"tags in '{tags_column}'. Mend or drop the row."
            )
        if unknown := [tag for tag in tags if tag not in table]:
            raise ValueError(
                f"The tags in '{tags_column}' must be in {list(names)}, got {unknown[0]!r} in row {row}. "
                "Drop such rows, or name every tag in `tag_names`."
            )


def _encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[list[str]],
    numbers: list[list[int]],
    *,
    names: Sequence[str],
    max_length: int,
) -> dict[str, list[list[int]]]:
    encoded = tokenizer(sentences, is_split_into_words=True, verbose=False)
    if (whole := keep_words(tokenizer, sentences, encoded)) != sentences:
        encoded = tokenizer(whole, is_split_into_words=True, verbose=False)
    columns: dict[str, list[list[int]]] = {name: [] for name in (*encoded, "labels")}
    for row, tags in enumerate(numbers):
        places = encoded.word_ids(row)  # (seq,): the word of each sub-word, None at special tokens
        words = _count_fitting(places, [names[tag] for tag in tags], max_length)
        kept = [place for place, word in enumerate(places) if word is None or word < words]
        for name in encoded:
            columns[name].append([encoded[name][row][place] for place in kept])
        columns["labels"].append([_label(places, place, tags) for place in kept])
    return columns


def _count_fitting(places: list[int | None], tags: list[str], max_length: int) -> int:
    """Count the words that fit with all their sub-words, in whole entities."""
    if len(places) <= max_length:
        return len(tags)
    of_words = [word for word in places if word is not None]
    words = of_words[max_length - places.count(None)]  # the first that does not fit
    while words and _continues(tags[words - 1], tags[words]):
        words -= 1
    return words


def _continues(previous: str, tag: str) -> bool:
    """Check whether two neighbouring tags are inside one entity, in any scheme."""
    before, kind = _split(previous)
    prefix, same = _split(tag)
    return prefix in {"I", "M", "E", "L"} and before in {"B", "I", "M"} and kind == same


def _label(places: list[int | None], place: int, tags: list[int]) -> int:
    word = places[place]
    if word is None or (place and places[place - 1] == word):
        return IGNORED
    return tags[word]
