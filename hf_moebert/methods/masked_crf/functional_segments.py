"""Segments: how tags spell them, and which tokens of a window are whose words."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple


SPECIAL = re.compile(r"\[.+\]|<.+>|X")  # "[PAD]", "</s>", and "X", as some data sets tag later pieces of words
# Prefixes of the first, the inner and the last piece of a word, by the prefix of the word; BMES writes "M" for "I"
PIECE_PREFIXES = {"B": "BII", "I": "III", "M": "III", "E": "IIE", "L": "IIL", "S": "BIE", "U": "BIL"}


class Segment(NamedTuple):
    """A segment: its type, the index of its first word, and the index after its last."""

    type: str
    start: int
    stop: int


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag at its first dash into prefix and type; the type of "O" and of a bare prefix is empty."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def plain_tags(tags: Sequence[str], scheme: str) -> list[str]:
    """Return tags with "O" in place of special labels, such as "[PAD]", "</s>" and "X"; under "none" as they are."""
    return [*tags] if scheme == "none" else ["O" if SPECIAL.fullmatch(tag) else tag for tag in tags]


def find_segments(tags: Sequence[str]) -> list[Segment]:
    """Read segments off tags of any scheme, even if they break its rules, as the CoNLL evaluation does.

    A segment continues while its type stays the same, up to the next "B", "S" or "U", or through an "E" or "L";
    "M" is read as "I".
    """
    segments: list[Segment] = []
    start, current, before = 0, "", "O"  # prefix and type of the word before
    for word, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        goes_on = before in ("B", "I", "M") and prefix in ("I", "E", "L", "M") and kind == current
        if not goes_on:
            if before != "O":
                segments.append(Segment(current, start, word))
            start, current = word, kind
        before = prefix
    return segments


def read_window(
    words: Sequence[int | None],
    places: Sequence[tuple[int, int]],
    text: str,
    inside: Sequence[tuple[int, int]],
    begins: dict[int, int],
) -> tuple[list[int], list[tuple[int, int]], list[bool]]:
    """Find the words of a window of tokens.

    Args:
        words: Word of each token, None for special ones.
        places: Its characters, in its word if `inside` is given, otherwise in the text.
        text: The text.
        inside: Characters of each word in the text; empty if offsets count in the text.
        begins: First character of each word that earlier windows saw, as a window may start inside a word; written to.

    Returns:
        Of each token the number of its word, from 1, or 0 for none; its characters in the text; and whether it is the
        first of its word.
    """
    spans = [
        (start, end) if word is None else _trim(text, start, end, inside[word] if inside else (0, len(text)))
        for (start, end), word in zip(places, words, strict=True)
    ]
    found = _drop_blanks(words, spans)
    firsts = _find_starts(found, [start for start, _ in spans], begins)
    return [0 if word is None else word + 1 for word in found], spans, firsts


def choose_windows(words: Sequence[list[int]], firsts: Sequence[list[bool]]) -> list[tuple[int, list[int]]]:
    """Return the window of each word in which it is farthest from an edge, and its positions there.

    Args:
        words: Of each window what `read_window` returned first.
        firsts: Of each window what it returned last.
    """
    found: dict[int, tuple[tuple[int, int], int, list[int]]] = {}  # word: margin, window and positions
    for number, window in enumerate(words):
        for word, (margin, positions) in _place_words(window).items():
            if firsts[number][positions[0]] and (word not in found or margin > found[word][0]):
                found[word] = (margin, number, positions)
    return [found[word][1:] for word in sorted(found)]


def _trim(text: str, start: int, end: int, word: tuple[int, int]) -> tuple[int, int]:
    """Return the characters of a token in the text, without the blanks that some tokenizers count with it.

    An unknown token in place of a word is longer than the word may be.
    """
    piece = text[word[0] + start : min(word[0] + end, word[1])]
    start += word[0] + len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def _drop_blanks(words: Sequence[int | None], spans: list[tuple[int, int]]) -> list[int | None]:
    """Return the word of each token, None for those of words that are nothing but blanks."""
    seen = {word for word, (start, end) in zip(words, spans, strict=True) if start < end}
    return [word if word in seen else None for word in words]


def _find_starts(words: list[int | None], characters: list[int], begins: dict[int, int]) -> list[bool]:
    """Return which tokens of a window begin a word; `begins` remembers words from window to window."""
    starts, before = [], None
    for word, character in zip(words, characters, strict=True):
        starts.append(word is not None and word != before and begins.setdefault(word, character) == character)
        before = word
    return starts


def _place_words(words: list[int]) -> dict[int, tuple[tuple[int, int], list[int]]]:
    """Find the positions of each word of a window, its distance to the window's nearer edge, and its length."""
    positions = [position for position, word in enumerate(words) if word]
    found = {}
    for word, group in groupby(positions, key=words.__getitem__):
        places = list(group)
        distance = min(places[0] - positions[0], positions[-1] - places[-1])
        found[word] = ((distance, len(places)), places)  # a window may hold the first pieces of a word alone
    return found


def find_runs(tags: list[str]) -> list[Segment]:
    """Find the segments, and runs of "O" between them."""
    runs, done = [], 0
    for segment in [*find_segments(tags), Segment("O", len(tags), len(tags) + 1)]:
        if done < segment.start:
            runs.append(Segment("O", done, segment.start))
        runs.append(segment)
        done = segment.stop
    return runs[:-1]


def type_of(tag: str) -> str:
    """Return the type of a tag; a tag without a type, such as a part of speech, is its own type."""
    prefix, kind = split_tag(tag)
    return kind if kind and prefix in PIECE_PREFIXES else tag
