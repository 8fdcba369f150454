"""Inputs: their forms, and the parts that a tokenizer reads."""

from collections.abc import Mapping
from typing import Any


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
