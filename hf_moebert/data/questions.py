"""Questions whose answers are spans of a text, as the columns that a question answering head takes."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .splits import check_column


COLUMNS = ("question", "context")  # those of SQuAD
ANSWERS = "answers"


def encode_questions(
    dataset: Dataset | DatasetDict, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 384
) -> Dataset | DatasetDict:
    """Tokenize questions with their contexts, and find the tokens of the first answer to each; nothing is padded.

    Contexts that are too long are cut.

    Args:
        dataset: One split or all of them, with SQuAD's columns: `question`, `context` and perhaps `answers`, which
            holds the lists `text` and `answer_start`.
        tokenizer: Fast tokenizer of the model, which knows the characters of each token.
        max_length: Tokens of a question and its context together, special ones included.

    Returns:
        The columns of the data set and of the tokenizer, `offset_mapping`, `context_tokens` (the first and the last
        token of the context), and with answers `start_positions` and `end_positions`, both 0 where the answer was cut
        off.

    Raises:
        ValueError: If a column is missing, a question has no answer, or the tokenizer is not a fast one.
    """
    if isinstance(dataset, DatasetDict):
        encoded = {split: encode_questions(part, tokenizer, max_length=max_length) for split, part in dataset.items()}
        return DatasetDict(encoded)
    for column in COLUMNS:
        check_column(dataset, column)
    if not tokenizer.is_fast:
        raise ValueError(
            f"`tokenizer` must be a fast one, which knows the characters of each token, got "
            f"{type(tokenizer).__name__}. Load it with `AutoTokenizer`."
        )

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        return _encode_rows(tokenizer, rows, max_length)

    return dataset.map(encode, batched=True, desc="Tokenizing")


def _encode_rows(tokenizer: PreTrainedTokenizerBase, rows: dict[str, list], max_length: int) -> dict[str, Any]:
    encoded = tokenizer(
        rows["question"],
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        return_offsets_mapping=True,
    )
    contexts = [
        [i for i, part in enumerate(encoded.sequence_ids(row)) if part == 1] for row in range(len(encoded.encodings))
    ]
    columns: dict[str, list] = {"context_tokens": [[context[0], context[-1]] for context in contexts]}
    if ANSWERS in rows:
        spans = []
        for question, offsets, context, answers in zip(
            rows["question"], encoded["offset_mapping"], contexts, rows[ANSWERS], strict=True
        ):
            if not answers["text"]:
                raise ValueError(f"Every question must have an answer, got none to {question!r}. Drop it.")
            spans.append(find_answer(offsets, context, answers["answer_start"][0], answers["text"][0]))
        columns["start_positions"], columns["end_positions"] = (list(side) for side in zip(*spans, strict=True))
    return encoded.data | columns


def find_answer(offsets: Sequence[Sequence[int]], context: Sequence[int], start: int, text: str) -> tuple[int, int]:
    """Find the first and the last token of an answer; both are 0, a special token, where it was cut off."""
    stop = start + len(text.rstrip())
    inside = [token for token in context if offsets[token][0] < stop and offsets[token][1] > start]
    if not inside or offsets[inside[-1]][1] < stop:
        return 0, 0
    return inside[0], inside[-1]
