"""From texts to the arrays that a graph reads, by the tokenizer of the folder alone."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from hf_moebert.data.words import find_words


logger = logging.getLogger(__name__)
TOKENIZER_FILE = "tokenizer.json"
# Attributes of an `Encoding`
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}  # nosec B105
Text = str | tuple[str, str]


class Words(NamedTuple):
    """The words of a text: their spelling, and the characters of each in the text."""

    words: list[str]
    places: list[tuple[int, int]]


class TextReader:
    """Tokenizes texts, pairs of texts and words, and pads rows to a batch.

    Args:
        tokenizer: From texts to rows of tokens; rows are padded where they meet, in batches.
        inputs: Names of the inputs of the model.
        max_length: Tokens after which a text is cut, or None if there is no limit.
        pad_id: Id of padding.
        unknown: The token of what the tokenizer does not know.
        left: Whether padding comes first, as some models need it.

    Raises:
        ValueError: If the model reads something else than texts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        inputs: Sequence[str],
        max_length: int | None,
        *,
        pad_id: int,
        unknown: str | None,
        left: bool = False,
    ) -> None:
        if foreign := sorted(set(inputs) - FIELDS.keys()):
            raise ValueError(f"`folder` must hold a model of texts, got one that reads {foreign}. Use `load_onnx`.")
        self.tokenizer, self.inputs, self.max_length = tokenizer, list(inputs), max_length
        self.pad_id, self.unknown, self.left = pad_id, unknown, left
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if self.max_length is not None:
            self.tokenizer.enable_truncation(self.max_length)

    def encode(self, texts: Sequence[Text]) -> list[Encoding]:
        """Tokenize texts or pairs, and cut those that are too long, with a warning.

        Raises:
            ValueError: If one is neither, or has no tokens.
        """
        _check_list(texts)
        for place, text in enumerate(texts):
            is_pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
            if not (isinstance(text, str) or is_pair):
                raise ValueError(
                    f"`texts` must hold texts, or pairs of texts as tuples, got {text!r:.100} at place {place}."
                )
        return self._check(self.tokenizer.encode_batch(list(texts)))

    def encode_words(self, texts: Sequence[str | list[str]]) -> tuple[list[Encoding], list[Words]]:
        """Tokenize texts word by word; words are what blanks separate, and each Chinese character.

        Args:
            texts: Texts, or lists of words, whose characters are counted in the words joined by blanks.

        Returns:
            The tokens of each text, and its words.

        Raises:
            ValueError: If one is neither, or has no tokens.
        """
        _check_list(texts)
        found = [_words_of(text, place) for place, text in enumerate(texts)]
        whole = self.tokenizer.encode_batch([one.words for one in found], is_pretokenized=True)
        kept = [self.keep(one.words, row) for one, row in zip(found, whole, strict=True)]
        return self._check(self.tokenizer.encode_batch(kept, is_pretokenized=True)), found

    def keep(self, words: list[str], row: Encoding) -> list[str]:
        """Put the unknown token in place of words that the tokenizer dropped, such as a lone control character."""
        seen = set(row.word_ids).union(*(part.word_ids for part in row.overflowing))
        return [word if number in seen else self.unknown or word for number, word in enumerate(words)]

    def batch(self, rows: Sequence[Encoding]) -> dict[str, np.ndarray]:
        """Pad rows to the longest: each input of the graph, `(batch, seq)`, int64."""
        longest = max(len(row) for row in rows)
        made = {}
        for name in self.inputs:
            made[name] = np.full((len(rows), longest), self.pad_id if name == "input_ids" else 0, np.int64)
            for number, row in enumerate(rows):
                made[name][number, self.places(row, longest)] = getattr(row, FIELDS[name])
        return made

    def places(self, row: Encoding, longest: int) -> slice:
        """Return where the tokens of a row are in a batch of so many columns."""
        return slice(longest - len(row), None) if self.left else slice(len(row))

    def _check(self, rows: list[Encoding]) -> list[Encoding]:
        empty = next((place for place, row in enumerate(rows) if not len(row)), None)
        if empty is not None:
            raise ValueError(f"`texts` must have tokens, that at place {empty} has none. Leave it out.")
        if cut := sum(bool(row.overflowing) for row in rows):
            logger.warning("%d of %d texts had more than %d tokens, and were cut.", cut, len(rows), self.max_length)
        return rows


def read_texts(folder: Path, inputs: Sequence[str], max_length: int | None) -> TextReader:
    """Return the reader of a folder.

    Args:
        folder: Folder that `export_onnx` wrote.
        inputs: Names of the inputs of its graph.
        max_length: Tokens after which a text is cut, if the tokenizer does not cut it before.

    Raises:
        ValueError: If the folder holds no tokenizer of this kind, or a model of something else than texts.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(
            f"`folder` must hold {TOKENIZER_FILE} to read texts, got {str(folder)!r}. Export the model with its "
            "tokenizer."
        )
    said = _read(folder / "tokenizer_config.json")
    limits = [limit for limit in (max_length, said.get("model_max_length")) if limit and limit < 10**9]
    return TextReader(
        Tokenizer.from_file(str(folder / TOKENIZER_FILE)),
        inputs,
        int(min(limits)) if limits else None,
        pad_id=_read(folder / "config.json").get("pad_token_id") or 0,
        unknown=_content(said.get("unk_token")),
        left=said.get("padding_side") == "left",
    )


def _check_list(texts: Any) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"`texts` must be a list, got {texts!r:.100}. Put a single text into a list.")  # noqa: TRY004


def _words_of(text: Any, place: int) -> Words:
    if isinstance(text, str):
        places = find_words(text)
        return Words([text[start:end] for start, end in places], places)
    if not isinstance(text, list) or not all(isinstance(word, str) for word in text):
        raise ValueError(f"`texts` must hold texts or lists of words, got {text!r:.100} at place {place}.")
    starts = np.cumsum([0, *(len(word) + 1 for word in text)]).tolist()
    return Words(text, [(start, start + len(word)) for start, word in zip(starts, text, strict=False)])


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
