"""Which pieces of a vocabulary must stay, so that the others can go without a text becoming unencodable.

A smaller vocabulary splits a text more finely, down to single characters or bytes. That goes wrong where a character
is no piece of its own, or the parts of a merge are gone. The rules against it are our own design, checked
against the tokenizers library on random vocabularies and texts.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise


def merge_path(symbols: list[str], ranks: Mapping[tuple[str, str], int], prefix: str = "") -> set[str]:
    """Return every piece that byte-pair encoding makes on the way from single symbols to the end.

    Args:
        symbols: The pieces of single characters.
        ranks: The place of each merge.
        prefix: What the second part of a merge begins with, which is left out of its result.

    Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
    """
    found, symbols = set(symbols), list(symbols)
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        place = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))  # the first of the best
        if pairs[place] not in ranks:
            break
        first, second = pairs[place]
        symbols[place : place + 2] = [first + second[len(prefix) :]]
        found.add(symbols[place])
    return found


def find_stranded(pieces: Iterable[str], single: Collection[str], prefix: str = "") -> set[str]:
    """Find the pieces with a character that is no piece of its own, which nothing could replace.

    Args:
        pieces: The vocabulary.
        single: Pieces of one character.
        prefix: What a piece within a word begins with.
    """
    return {piece for piece in pieces if not single_pieces(piece, prefix) <= set(single)}


def single_pieces(piece: str, prefix: str = "") -> set[str]:
    """Return the pieces of one character that a piece can be replaced by."""
    if prefix and len(piece) > len(prefix) and piece.startswith(prefix):
        return {prefix + character for character in piece[len(prefix) :]}
    return {piece[:1]} | {prefix + character for character in piece[1:]}


def close_greedy(pieces: Collection[str], kept: Collection[str], prefix: str) -> set[str]:
    """Add to the pieces that stay those without which the longest match could run into a dead end.

    WordPiece takes the longest piece at each place. Without a piece it may take a shorter one there, then one that
    reaches over the end of the missing piece, and so come to stand in the middle of a stranded one. Every piece from
    within which that could happen stays; where all characters are pieces, as in BERT's vocabularies, there is none.

    Args:
        pieces: The vocabulary.
        kept: The pieces that stay in any case: all stranded ones, and single characters.
        prefix: What a piece within a word begins with.

    Returns:
        All pieces that stay.
    """
    kept, texts = set(kept), {piece: piece for piece in pieces}
    texts |= {x: x[len(prefix) :] for x in pieces if x.startswith(prefix) and len(x) > len(prefix)}
    last = {text: _last_missing(text, pieces, prefix) for text in texts.values()}  # up to there, a place is a dead end
    grows = True
    while grows:
        inner = [(text, piece in kept) for piece, text in texts.items() if text != piece]
        heads = {text[:place] for text, _ in inner for place in range(1, last[text] + 1)}
        bridges: set[str] = set()  # what a piece that reaches into a stranded one takes of those before it
        for text, stays in inner:
            if stays and (over := _shortest_end(text, heads)):
                bridges |= {text[:size] for size in range(1, len(text) - over + 1)}
        found = {text: len(text) - over for text in last if (over := _shortest_end(text, bridges))}
        grows = any(place > last[text] for text, place in found.items())
        last |= {text: max(place, last[text]) for text, place in found.items()}
        kept |= {piece for piece, text in texts.items() if last[text]}
    return kept


def _shortest_end(text: str, ends: Collection[str]) -> int:
    """Return the length of the shortest end of a text that is one of these and not all of it, or 0."""
    return next((size for size in range(1, len(text)) if text[-size:] in ends), 0) if ends else 0


def _last_missing(text: str, pieces: Collection[str], prefix: str) -> int:
    return max((place for place in range(1, len(text)) if prefix + text[place] not in pieces), default=0)


def match_greedily(word: str, pieces: Collection[str], prefix: str) -> tuple[list[str], bool]:
    """Split a word by the longest match, as WordPiece does.

    Returns:
        The pieces up to the end, or up to where no piece fits; and whether the end was reached.
    """
    found: list[str] = []
    start = 0
    while start < len(word):
        head = prefix if start else ""
        end = next((end for end in range(len(word), start, -1) if head + word[start:end] in pieces), start)
        if end == start:
            return found, False
        found.append(head + word[start:end])
        start = end
    return found, True


def close_characters(pieces: Collection[str], stranded: Iterable[str]) -> set[str]:
    """Return the pieces that are made of the characters of stranded ones, and of those that these stand beside.

    No piece of the others shares a character with them, so that a text falls apart between the two: on one side all
    pieces are there, on the other every character is.
    """
    characters = set[str]().union(*stranded)
    while True:
        kept = {piece for piece in pieces if not characters.isdisjoint(piece)}
        grown = characters.union(*kept)
        if grown == characters:
            return kept
        characters = grown
