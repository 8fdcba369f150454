"""From inputs to rows of tokens, by the library of tokenizers alone."""

from typing import Any

from tokenizers import Encoding

from hf_moebert.runtime.texts import TextReader


NO_LIMIT = 10**9  # tokens


class TextTooLong(ValueError):
    """A text has more tokens than the model takes."""


class RowReader:
    """Tokenizes inputs: whole, cut, or in windows that overlap.

    Args:
        reader: Reader of the model, whose tokenizer is left without truncation.
    """

    def __init__(self, reader: TextReader) -> None:
        self.tokenizer, self.max_length = reader.tokenizer, reader.max_length or NO_LIMIT
        self.tokenizer.no_truncation()

    def encode(self, text: str, pair: str | None = None, *, truncate: bool) -> Encoding:
        """Tokenize a text or a pair.

        Raises:
            TextTooLong: If it is longer than the model takes, and shall not be cut.
            ValueError: If it has no tokens.
        """
        row = self.tokenizer.encode(text, pair)
        if len(row) > self.max_length:
            if not truncate:
                raise too_long(len(row), self.max_length)
            row = self.windows(text, pair)[0]
        if not len(row):
            raise ValueError("An input must have tokens, but this text has none. Leave it out.")
        return row

    def windows(
        self,
        text: Any,
        pair: str | None = None,
        *,
        stride: int = 0,
        strategy: str = "longest_first",
        words: bool = False,
    ) -> list[Encoding]:
        """Tokenize a text, a pair or a list of words into windows of the longest length.

        Args:
            text: A text, or a list of words.
            pair: The second text of a pair.
            stride: Tokens that a window shares with the next.
            strategy: What falls apart, as the library calls it: "longest_first" or "only_second".
            words: Whether `text` is a list of words.
        """
        self.tokenizer.enable_truncation(self.max_length, stride=stride, strategy=strategy)
        try:
            row = self.tokenizer.encode(text, pair, is_pretokenized=words)
        finally:
            self.tokenizer.no_truncation()
        return [row, *row.overflowing]


def too_long(tokens: int, max_length: int) -> TextTooLong:
    """Return the error of a text that is too long."""
    return TextTooLong(
        f"A text must have at most {max_length} tokens, got {tokens}. Send it in parts, or with `truncate`: true to "
        "cut it."
    )
