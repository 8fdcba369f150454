"""From inputs to the arguments of a tokenizer, and from the logits of a task to a readable answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


Span = tuple[int, int, int]  # position of a token, and start and end of its characters

# Forms of input, as the names of their parts in the order of the tokenizer's arguments, and the kinds of tasks that
# can answer each
TEXT, PAIR, TOKENS, QUESTION = ("text",), ("text", "text_pair"), ("tokens",), ("question", "context")
CLASSIFIERS = ("classification", "multi-label", "regression")
READERS = {
    TEXT: (*CLASSIFIERS, "tagging"),
    PAIR: CLASSIFIERS,
    TOKENS: (*CLASSIFIERS, "tagging"),
    QUESTION: ("question-answering",),
}
PREFIXES = ("B-", "I-", "M-", "E-", "L-", "S-", "U-")
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Example:
    """An input beside its ids.

    Attributes:
        text: Text in which `start` and `end` of an answer count characters.
        form: Form of the input, a key of `READERS`.
        tasks: Tasks to run; `None` for all that can read this form.
        spans: Spans of the words; for a question, of all tokens of the context.
        truncated: Whether the input was cut to the length of the model.
    """

    text: str
    form: tuple[str, ...]
    tasks: Sequence[str] | None
    spans: list[Span]
    truncated: bool


def read_input(inputs: Any) -> tuple[tuple[str, ...], list[Any]]:
    """Return the form of an input, and its parts.

    Returns:
        A key of `READERS`, and the value of each name in it.

    Raises:
        ValueError: If the input has none of these forms.
    """
    values = {"text": inputs} if isinstance(inputs, str) else inputs
    names = set(values) if isinstance(values, Mapping) else None
    form = next((form for form in READERS if set(form) == names), None)
    if form is None:
        got = type(inputs).__name__ if names is None else f"{sorted(map(str, names))}"
        known = " or ".join(map(str, map(list, READERS)))
        raise ValueError(f"An input must be a text, or a dict with {known}, got {got:.200}. Give {{'text': ...}}.")
    for name in form:
        check_part(name, values[name], may_be_empty=form != QUESTION)
    return form, [values[name] for name in form]


def check_part(name: str, value: Any, may_be_empty: bool) -> None:
    """Refuse a part of an input that a tokenizer cannot read.

    Raises:
        ValueError: If it is no text, an empty one where that is not allowed, or no list of words.
    """
    if name == "tokens":
        if not isinstance(value, list) or not value or not all(isinstance(token, str) for token in value):
            raise ValueError(f"`tokens` must be a list of words, got {value!r:.100}. Give a text as `text`.")
    elif not isinstance(value, str) or not (may_be_empty or value.strip()):
        rule = "a text" if may_be_empty else "a text that is not empty"
        raise ValueError(f"`{name}` must be {rule}, got {value!r:.100}. Give words as `tokens`.")


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


def read_classes(kind: str, logits: Tensor, labels: Mapping[int, str]) -> Any:
    """Turn the logits of a sequence classifier into an answer.

    Args:
        kind: One of `CLASSIFIERS`.
        logits: Shape `(labels,)`.
        labels: Name of each label.
    """
    logits = logits.float()
    if kind == "regression":
        return {"score": logits.item() if logits.numel() == 1 else logits.tolist()}
    if kind == "multi-label":
        scores = enumerate(logits.sigmoid().tolist())
        return [{"label": labels[number], "score": score} for number, score in scores if score > 0.5]
    score, best = logits.softmax(-1).max(-1)
    return {"label": labels[int(best)], "score": score.item()}


def read_entities(found: Mapping[str, Tensor], labels: Mapping[int, str], example: Example) -> list[dict[str, Any]]:
    """Read the tag of every word, and join words to entities as the prefixes of their tags demand.

    Args:
        found: `logits` `(seq, labels)`; of a CRF also `predictions` `(seq,)` and `marginals` `(seq, labels)`.
        labels: Name of each label.
        example: Example with the spans of the words.
    """
    positions = [position for position, *_ in example.spans]
    if "predictions" in found:
        tags = found["predictions"][positions]  # (words,)
        scores = found["marginals"][positions].float().gather(-1, tags[:, None]).squeeze(-1)  # (words,)
    else:
        scores, tags = found["logits"][positions].float().softmax(-1).max(-1)
    entities: list[dict[str, Any]] = []
    open_type = None  # type of the entity that the next word may continue
    for (_, start, end), tag, score in zip(example.spans, tags.tolist(), scores.tolist(), strict=True):
        label = labels[tag]
        prefix, kind = (label[0], label[2:]) if label.startswith(PREFIXES) else ("-", label)
        if prefix in "IMEL" and kind == open_type:
            entities[-1]["end"] = end
            entities[-1]["scores"].append(score)
        elif label != "O":
            entities.append({"label": kind, "start": start, "end": end, "scores": [score]})
        open_type = kind if prefix in "BIM" else None
    for entity in entities:
        scores_of_words = entity.pop("scores")
        entity["word"] = example.text[entity["start"] : entity["end"]]
        entity["score"] = sum(scores_of_words) / len(scores_of_words)
    return entities


def read_answer(start_logits: Tensor, end_logits: Tensor, example: Example) -> dict[str, Any]:
    """Return the likeliest span of the context of at most `MAX_ANSWER_TOKENS` tokens.

    Args:
        start_logits: Shape `(seq,)`.
        end_logits: Shape `(seq,)`.
        example: Example with the spans of the tokens of the context.
    """
    if not example.spans:  # the question left no room for the context
        return {"answer": "", "score": 0.0, "start": 0, "end": 0}
    positions = [position for position, *_ in example.spans]
    first, last = (logits[positions].float().softmax(-1) for logits in (start_logits, end_logits))  # (context,)
    scores = torch.outer(first, last).triu().tril(MAX_ANSWER_TOKENS - 1)  # (context, context)
    from_token, to_token = divmod(int(scores.argmax()), len(positions))
    start, end = example.spans[from_token][1], example.spans[to_token][2]
    return {"answer": example.text[start:end], "score": scores.max().item(), "start": start, "end": end}
