"""Spans of a text: the words and tokens of an encoding, and the likeliest answer among them, in numpy."""

from itertools import accumulate
from typing import Any

import numpy as np


Span = tuple[int, int, int]  # position of a token, and start and end of its characters
MAX_ANSWER_TOKENS = 30


def word_spans(encoding: Any, text: str | list[str]) -> list[Span]:
    """Return the first token of every word with the characters of the whole word, without blanks around it.

    Blanks end a word of a text, also where the tokenizer keeps words together.

    Args:
        encoding: Encoding of one input by a fast tokenizer.
        text: The input. In a list of words, characters are counted in the words joined by blanks.
    """
    starts = [0, *accumulate(len(word) + 1 for word in text)] if isinstance(text, list) else None
    spans: list[Span] = []
    last = None
    for position, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if word is None or encoding.sequence_ids[position] != 0:
            continue
        shift = starts[word] if starts else 0
        piece = (text[word] if isinstance(text, list) else text)[start:end]
        first, end = end + shift - len(piece.lstrip()), start + shift + len(piece.rstrip())
        if not piece.strip():
            continue
        if word == last and (starts or first <= spans[-1][2]):
            spans[-1] = (*spans[-1][:2], max(end, spans[-1][2]))
        else:
            spans.append((position, first, end))
        last = word
    return spans


def context_spans(encoding: Any) -> list[Span]:
    """Return every token of a question's context with its characters."""
    pieces = enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True))
    return [(position, *offsets) for position, (sequence, offsets) in pieces if sequence == 1]


def find_answer(start_logits: np.ndarray, end_logits: np.ndarray, spans: list[Span]) -> tuple[float, int, int]:
    """Return the score of the likeliest span of at most `MAX_ANSWER_TOKENS` tokens, and where its characters are.

    Args:
        start_logits: Shape `(seq,)`.
        end_logits: Shape `(seq,)`.
        spans: Tokens of the context; without any, the question left no room for it, and the score is 0.
    """
    if not spans:
        return 0.0, 0, 0
    positions = [position for position, *_ in spans]
    first, last = (_softmax(logits[positions]) for logits in (start_logits, end_logits))  # (context,)
    scores = np.tril(np.triu(np.outer(first, last)), MAX_ANSWER_TOKENS - 1)  # (context, context)
    from_token, to_token = divmod(int(scores.argmax()), len(positions))
    return float(scores.max()), spans[from_token][1], spans[to_token][2]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()
