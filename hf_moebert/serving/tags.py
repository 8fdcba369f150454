"""From the logits of windows to entities, as the pipelines of transformers and of this package with `"simple"`."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from hf_moebert.data.words import find_words
from hf_moebert.methods.masked_crf.functional_segments import (
    choose_windows,
    find_runs,
    plain_tags,
    read_window,
    type_of,
)
from hf_moebert.runtime.answers import softmax
from hf_moebert.runtime.chains import Chain

from .engines import Engine


Entity = dict[str, Any]


class TextWindows(NamedTuple):
    """A text: its characters, those of each word if words were tokenized one by one, and its windows."""

    text: str
    inside: list[tuple[int, int]]
    windows: list[Encoding]


class Tags:
    """Reads the tags of tokens, each by itself, as `pipeline("token-classification")` does.

    Args:
        engine: The model.
    """

    def __init__(self, engine: Engine) -> None:
        self.labels, self.reader = engine.labels, engine.reader

    def divide(self, given: str | list[str], *, words: bool) -> tuple[str, Any, list[tuple[int, int]]]:
        """Return the text of an input, what is tokenized, and the characters of each word of a list."""
        return join(given) if words else (given, given, [])  # type: ignore[return-value]

    def read(self, texts: list[TextWindows], logits: list[list[np.ndarray]]) -> list[list[Entity]]:
        """Return the entities of texts, for logits `(seq, tags)` of each window."""
        return [self._read_text(text, found) for text, found in zip(texts, logits, strict=True)]

    def _read_text(self, text: TextWindows, logits: list[np.ndarray]) -> list[Entity]:
        entities: list[Entity] = []
        for window, found in zip(text.windows, logits, strict=True):
            entities += self._read_window(text, window, softmax(found))
        return longest_of_overlapping(entities) if len(text.windows) > 1 else entities

    def _read_window(self, text: TextWindows, window: Encoding, scores: np.ndarray) -> list[Entity]:
        """Join adjacent tokens of one type, up to the next that begins an entity; `scores` is `(seq, tags)`."""
        groups: list[list[tuple[int, str]]] = []  # position and type of each token of a group
        for position in np.flatnonzero(np.array(window.special_tokens_mask) == 0).tolist():
            tag = self.labels[scores[position].argmax()]
            begins, kind = tag.startswith("B-"), tag[2:] if tag.startswith(("B-", "I-")) else tag
            if groups and groups[-1][-1][1] == kind and not begins:
                groups[-1].append((position, kind))
            else:
                groups.append([(position, kind)])
        return [
            self._describe(text, window, [position for position, _ in group], scores)
            for group in groups
            if self.labels[scores[group[0][0]].argmax()] != "O"
        ]

    def _describe(self, text: TextWindows, window: Encoding, positions: list[int], scores: np.ndarray) -> Entity:
        spans = [self._find(text, window, position) for position in positions]
        unknown = self.reader.unknown and self.reader.tokenizer.token_to_id(self.reader.unknown)
        pieces = [
            text.text[start:end] if window.ids[position] == unknown else window.tokens[position]
            for position, (start, end) in zip(positions, spans, strict=True)
        ]
        return {
            "entity_group": self.labels[scores[positions[0]].argmax()].split("-", 1)[-1],
            "score": float(np.mean(scores[positions].max(-1))),
            "word": write_pieces(self.reader.tokenizer, pieces),
            "start": spans[0][0],
            "end": spans[-1][1],
        }

    @staticmethod
    def _find(text: TextWindows, window: Encoding, position: int) -> tuple[int, int]:
        """Return the characters of a token in the text."""
        (start, end), word = window.offsets[position], window.word_ids[position]
        shift = text.inside[word][0] if text.inside and word is not None else 0
        return start + shift, end + shift


class CrfTags(Tags):
    """Decodes the tags of all words of a text together, as `pipeline("masked-crf")` does.

    Args:
        engine: The model.
        chain: Its CRF.
    """

    def __init__(self, engine: Engine, chain: Chain) -> None:
        super().__init__(engine)
        self.chain = chain

    def divide(self, given: str | list[str], *, words: bool) -> tuple[str, Any, list[tuple[int, int]]]:
        """Return the text of an input, the words that the CRF reads, and the characters of each."""
        if words:
            text, found, inside = join(given)
        else:
            text, inside = str(given), find_words(str(given))
            found = [text[start:end] for start, end in inside]
        if not found:
            return text, text, []
        whole = self.reader.tokenizer.encode(found, is_pretokenized=True)
        return text, self.reader.keep(found, whole), inside

    def read(self, texts: list[TextWindows], logits: list[list[np.ndarray]]) -> list[list[Entity]]:
        """Return the entities of texts, for emissions `(seq, tags)` of each window."""
        found = [self._read_words(text) for text in texts]  # of each word its window and tokens
        mask = np.zeros((len(texts), max((len(words) for words in found), default=0)), bool)  # (texts, words)
        emissions = np.zeros((*mask.shape, len(self.labels)), np.float32)  # (texts, words, tags)
        for row, words in enumerate(found):
            mask[row, : len(words)] = True
            for place, (number, tokens) in enumerate(words):
                emissions[row, place] = logits[row][number][tokens[0][0]]
        tags, shares = self.chain.decode(emissions, mask), self.chain.marginals(emissions, mask)
        return [
            self._join(text, words, tags[row], shares[row])
            for row, (text, words) in enumerate(zip(texts, found, strict=True))
        ]

    def _read_words(self, text: TextWindows) -> list[tuple[int, list[tuple[int, tuple[int, int]]]]]:
        """Return the window of each word, and the positions and characters of its tokens there."""
        begins: dict[int, int] = {}
        read = [read_window(one.word_ids, one.offsets, text.text, text.inside, begins) for one in text.windows]
        chosen = choose_windows([words for words, _, _ in read], [firsts for _, _, firsts in read])
        return [(number, [(place, read[number][1][place]) for place in places]) for number, places in chosen]

    def _join(self, text: TextWindows, words: Sequence[Any], tags: np.ndarray, shares: np.ndarray) -> list[Entity]:
        """Join words to entities by their tags `(words,)`, scored by the lowest of the `shares` `(words, tags)`."""
        chosen = tags[: len(words)]
        names = plain_tags([self.labels[tag] for tag in chosen], self.chain.scheme)
        scores = np.take_along_axis(shares[: len(words)], chosen[:, None], axis=1)[:, 0]  # (words,)
        entities = []
        for run in find_runs(names):
            if (kind := type_of(names[run.start])) == "O":
                continue
            tokens = [(number, *token) for number, found in words[run.start : run.stop] for token in found]
            pieces = [text.windows[number].tokens[position] for number, position, _ in tokens]
            entities.append(
                {
                    "entity_group": kind,
                    "score": float(scores[run.start : run.stop].min()),
                    "word": write_pieces(self.reader.tokenizer, pieces),
                    "start": tokens[0][2][0],
                    "end": tokens[-1][2][1],
                }
            )
        return entities


def join(words: Any) -> tuple[str, list[str], list[tuple[int, int]]]:
    """Return the text of words joined by blanks, the words, and the characters of each."""
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    return " ".join(words), words, [(start, start + len(word)) for start, word in zip(starts, words, strict=False)]


def write_pieces(tokenizer: Any, pieces: list[str]) -> str:
    """Write tokens as a text."""
    return " ".join(pieces) if tokenizer.decoder is None else tokenizer.decoder.decode(pieces)


def longest_of_overlapping(entities: list[Entity]) -> list[Entity]:
    """Return the longest of the entities that several windows saw, or the one of the highest score."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if kept and entity["start"] < kept[-1]["end"]:
            kept[-1] = max(kept[-1], entity, key=lambda one: (one["end"] - one["start"], one["score"]))
        else:
            kept.append(entity)
    return kept
