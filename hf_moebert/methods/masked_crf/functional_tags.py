"""Tag schemes: which tag may follow which, and how segments are written in tags.

A tag is "O", or a prefix and a type, "B-PER"; the type may hold dashes, and may be missing ("B"). Special labels
among them, such as "[PAD]", are outside of segments.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .functional_segments import Segment, find_segments, plain_tags, split_tag


# Prefixes of a segment's first, inner and last tag, and of the tag of a segment of one word
SCHEMES = {
    "IOB2": ("B", "I", "I", "B"),
    "IOBES": ("B", "I", "E", "S"),
    "BILOU": ("B", "I", "L", "U"),
    "BMES": ("B", "M", "E", "S"),
    "IOB1": ("I",) * 4,  # and "B" where a segment follows one of its type
    "IOE1": ("I",) * 4,  # and "E" where one of its type follows a segment
    "IOE2": ("I", "I", "E", "E"),
}
PREFIXES = {
    "IOB2": "BIO",
    "IOB1": "BIO",
    "IOE1": "IEO",
    "IOE2": "IEO",
    "IOBES": "BIESO",
    "BILOU": "BILUO",
    "BMES": "BMESO",
}
ALIASES = {"BIO": "IOB2", "BIO2": "IOB2", "BIOES": "IOBES", "BILUO": "BILOU", "BMESO": "BMES", "BMEOS": "BMES"}
CHOICES = ("auto", *SCHEMES, *ALIASES, "none")
MASKS = ("training", "decoding", "off")
POLICIES = ("error", "ignore", "repair", "soft")
MAX_TAGS = 4096  # 64 MiB of transitions in float32, and as many again for their gradient and each moment


class Legality(NamedTuple):
    """Boolean masks of legal tags: `moves (tags, tags)`, row = previous tag; `start (tags,)` and `end (tags,)`."""

    moves: Tensor
    start: Tensor
    end: Tensor


def check_options(tag_scheme: str, mask_transitions: str, illegal_labels: str, illegal_score: float) -> None:
    """Refuse options of a masked CRF that do not exist.

    Raises:
        ValueError: If one breaks the rule that the message names.
    """
    for name, value, allowed in (
        ("tag_scheme", tag_scheme, CHOICES),
        ("mask_transitions", mask_transitions, MASKS),
        ("illegal_labels", illegal_labels, POLICIES),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    if not -1e6 <= illegal_score < 0:
        raise ValueError(f"`illegal_score` must be in [-1e6, 0), got {illegal_score}. Use -100.")


def name_scheme(scheme: str) -> str:
    """Return the name of a scheme by which it is known here: "BIO" is "IOB2".

    Raises:
        ValueError: If there is no such scheme.
    """
    if scheme not in CHOICES or scheme == "auto":
        raise ValueError(f"`tag_scheme` must be one of {', '.join(CHOICES)}, got {scheme!r}.")
    return ALIASES.get(scheme, scheme)


def check_scheme(labels: Sequence[str], scheme: str) -> None:
    """Check that all labels are tags of a scheme, or special ones.

    Raises:
        ValueError: If there is no such scheme, or a label has no prefix or a foreign one.
    """
    scheme = name_scheme(scheme)
    if scheme == "none":
        return
    plain = plain_tags(labels, scheme)
    if wrong := [label for label in plain if split_tag(label)[0] not in set(PREFIXES[scheme])]:
        raise ValueError(
            f"`id2label` must hold tags of the scheme {scheme}, {', '.join(PREFIXES[scheme])}, got {wrong[:5]}. "
            "Rename them, or set `tag_scheme` to another scheme, or to 'none' if every tag may follow every other."
        )


def legal_moves(labels: Sequence[str], scheme: str) -> Legality:
    """Compute which tags may follow each other, come first and come last.

    Args:
        labels: Tags in the order of their indices; some tags of the scheme may be missing. Special ones, such as
            "[PAD]" and "X", are outside of segments, as "O" is.
        scheme: A key of `SCHEMES` or of `ALIASES`, or "none", where everything is legal.

    Raises:
        ValueError: If there are more than `MAX_TAGS` labels, they do not fit the scheme, or a tag cannot be reached
            or left.

    Source: Wei et al. 2021, https://arxiv.org/abs/2103.10682, section 2; all but IOB2 and IOBES are the schemes' own
    rules, as in Sang and Veenstra 1999, https://aclanthology.org/E99-1023.
    """
    check_number(labels)
    check_scheme(labels, scheme)
    scheme = name_scheme(scheme)
    tags = [split_tag(tag) for tag in plain_tags(labels, scheme)]
    prefixes, types = ["O", *sorted({prefix for prefix, _ in tags} - {"O"})], sorted({kind for _, kind in tags})
    places = {prefix: place for place, prefix in enumerate(prefixes)}
    numbers = {kind: number for number, kind in enumerate(types)}
    with torch.device("cpu"):  # transformers builds models on the meta device
        prefix = torch.tensor([places[tag[0]] for tag in tags], dtype=torch.long)  # (tags,)
        kind = torch.tensor([numbers[tag[1]] for tag in tags], dtype=torch.long)  # (tags,)
        within, across = (  # each (prefixes, prefixes): of two tags of one type, and of two types
            torch.tensor([[may_follow((a, ""), (b, other), scheme) for b in prefixes] for a in prefixes])
            for other in ("", "other")
        )
    pairs = prefix[:, None], prefix[None]
    moves = torch.where(kind[:, None] == kind, within[pairs], across[pairs])  # (tags, tags)
    legality = Legality(moves, across[0, prefix], across[prefix, 0])
    _check_use(labels, scheme, legality)
    return legality


def check_number(labels: Sequence[str]) -> None:
    """Refuse more tags than a table of all pairs has room for.

    Raises:
        ValueError: If there are.
    """
    if len(labels) > MAX_TAGS:
        raise ValueError(
            f"`id2label` must name at most {MAX_TAGS} tags, got {len(labels)}: a CRF scores each pair of them. Use "
            "the token classifier without a CRF, or fewer types."
        )


def may_follow(before: tuple[str, str], after: tuple[str, str], scheme: str) -> bool:
    """Check whether a tag may follow another, both as prefix and type; "O" also stands for either end of the row."""
    if scheme == "none":
        return True
    same_type = before[1] == after[1]
    if scheme == "IOB1":  # "B" only separates two neighbours of one type
        return after[0] != "B" or (before[0] in "BI" and same_type)
    if scheme == "IOE1":  # "E" does
        return before[0] != "E" or (after[0] in "IE" and same_type)
    inner = after[0] in ("I", "E", "L", "M")
    if scheme == "IOB2":
        return not inner or (before[0] in "BI" and same_type)
    is_open = before[0] in ("B", "I", "M")
    if scheme == "IOE2":
        return not is_open or (inner and same_type)
    return (inner and same_type) if is_open else not inner


def _check_use(labels: Sequence[str], scheme: str, legality: Legality) -> None:
    """Refuse labels that lack tags of the scheme without which another is of no use, or some row cannot be tagged."""
    for there, end in (
        ("be reached from the start", _spread(legality.start, legality.moves.T)),
        ("lead to the end", _spread(legality.end, legality.moves)),
    ):
        if stuck := [label for label, found in zip(labels, end.tolist(), strict=True) if not found]:
            raise ValueError(
                f"`id2label` must let every tag {there} of a sequence, {stuck[:5]} do not under {scheme}. Add the "
                "tags of the scheme that are missing, or set `tag_scheme` to another scheme, or to 'none'."
            )
    if not (legality.start & legality.end).any():  # such a tag may also follow itself, however many words there are
        raise ValueError(
            f"`id2label` must hold a tag that one word may have alone, as 'O', got {list(labels)[:5]} under {scheme}. "
            "Add it, or set `tag_scheme` to 'none'."
        )


def _spread(found: Tensor, moves: Tensor) -> Tensor:
    """Return the tags `(tags,)` from which legal moves lead to those that were found."""
    while not torch.equal(wider := found | (moves & found).any(1), found):
        found = wider
    return found


def are_legal(tags: Tensor, lengths: Tensor, legality: Legality) -> Tensor:
    """Check which rows of tags are legal.

    Args:
        tags: Indices, the words of a row first. Shape `(words, batch)`.
        lengths: Words of each row. Shape `(batch,)`.
        legality: Masks of legal tags.

    Returns:
        True for legal rows, and those without words. Shape `(batch,)`.
    """
    if not len(tags):
        return torch.ones_like(lengths, dtype=torch.bool)
    absent = torch.arange(1, len(tags), device=tags.device)[:, None] >= lengths  # (words - 1, batch)
    moves = (legality.moves[tags[:-1], tags[1:]] | absent).all(0)  # (batch,)
    last = tags.gather(0, (lengths - 1).clamp(min=0)[None])[0]  # (batch,)
    return (legality.start[tags[0]] & moves & legality.end[last]) | (lengths == 0)


def write_segments(segments: Sequence[Segment], words: int, scheme: str) -> list[str]:
    """Write segments that do not overlap as one tag per word.

    Raises:
        ValueError: If there is no such scheme.
    """
    scheme = name_scheme(scheme)
    if scheme == "none":
        raise ValueError(f"`scheme` must write segments, got 'none'. Use one of {', '.join(SCHEMES)}.")
    first, inner, last, only = SCHEMES[scheme]
    tags, previous = ["O"] * words, Segment("", -1, -1)
    for segment in segments:
        length = segment.stop - segment.start
        prefixes = (only,) if length == 1 else (first, *(inner,) * (length - 2), last)
        dash = "-" if segment.type else ""
        if previous.stop == segment.start and previous.type == segment.type:
            if scheme == "IOB1":
                prefixes = ("B", *prefixes[1:])
            if scheme == "IOE1":
                tags[segment.start - 1] = f"E{dash}{segment.type}"
        tags[segment.start : segment.stop] = [f"{prefix}{dash}{segment.type}" for prefix in prefixes]
        previous = segment
    return tags


def convert_tags(tags: Sequence[str], scheme: str) -> list[str]:
    """Rewrite a tag sequence in another scheme; in its own scheme, this repairs a sequence that breaks its rules.

    Args:
        tags: Tags of one row, in any scheme.
        scheme: Scheme of the result.
    """
    return write_segments(find_segments(tags), len(tags), scheme)


def repair_tags(tags: Sequence[str], labels: Sequence[str], scheme: str) -> list[str]:
    """Make a tag sequence legal, keeping its segments as far as there are labels to write them.

    Args:
        tags: Tags of one row.
        labels: All tags that may be used.
        scheme: Scheme of the labels.

    Returns:
        As many tags; a segment that needs a missing label becomes "O".

    Raises:
        ValueError: If "O" is needed and is not among the labels.

    Source: our own design; segments are read as in the CoNLL evaluation.
    """
    segments = find_segments(plain_tags(tags, scheme))
    while not set(written := write_segments(segments, len(tags), scheme)) <= set(labels):
        missing = next(word for word, tag in enumerate(written) if tag not in labels)
        kept = [segment for segment in segments if not segment.start <= missing < segment.stop]
        if len(kept) == len(segments):
            raise ValueError(f"`id2label` must hold 'O' to repair sequences, got {list(labels)}. Add it.")
        segments = kept
    return written


def count_breaks(tags: Sequence[str], scheme: str) -> int:
    """Count the illegal moves of a tag sequence, those at its start and end included.

    Raises:
        ValueError: If a tag does not belong to the scheme.
    """
    check_scheme(tags, scheme)
    scheme = name_scheme(scheme)
    around = [("O", ""), *map(split_tag, plain_tags(tags, scheme)), ("O", "")]
    return sum(not may_follow(before, after, scheme) for before, after in itertools.pairwise(around))
