"""Tag schemes: which tag may follow which, and how segments are written in tags.

A tag is "O", or a prefix and a type, "B-PER"; the type may hold dashes, and may be missing ("B").
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


# Prefixes of a segment's first, inner and last tag, and of the tag of a segment of one word
SCHEMES = {
    "IOB2": ("B", "I", "I", "B"),
    "IOBES": ("B", "I", "E", "S"),
    "BILOU": ("B", "I", "L", "U"),
    "IOB1": ("I",) * 4,
}
PREFIXES = {"IOB2": "BIO", "IOB1": "BIO", "IOBES": "BIESO", "BILOU": "BILUO"}
MISSPELT_PREFIX = re.compile(r"^[BIESLUbieslu][_:/]|^[bieslu]-|[-_][BIESLU]$")
CHOICES = ("auto", *SCHEMES, "none")
MASKS = ("training", "decoding", "off")
POLICIES = ("error", "ignore", "repair", "soft")


class Legality(NamedTuple):
    """Boolean masks of legal tags: `moves (tags, tags)`, row = previous tag; `start (tags,)` and `end (tags,)`."""

    moves: Tensor
    start: Tensor
    end: Tensor


class Segment(NamedTuple):
    """A segment: its type, the index of its first word, and the index after its last."""

    type: str
    start: int
    stop: int


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


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag at its first dash into prefix and type; the type of "O" and of a bare prefix is empty."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def infer_scheme(labels: Sequence[str]) -> str:
    """Infer the scheme from the tags of a model or a data set.

    "L" and "U" mean BILOU, "E" and "S" IOBES, else "B" means IOB2, and "I" alone IOB1. Labels without any prefix, as
    for parts of speech, follow no scheme: "none".

    Args:
        labels: All tags.

    Raises:
        ValueError: If the labels are the default names of a model, mix schemes, only some have a prefix, or prefixes
            are spelled in another way ("b-per", "B_PER", "PER-B").
    """
    if any(label == f"LABEL_{index}" for index, label in enumerate(labels)):
        raise ValueError(
            f"`id2label` must name the tags, got {list(labels)[:3]}. Set `id2label` when the model is made, or "
            "`tag_scheme` to 'none' if every tag may follow every other."
        )
    prefixes = {split_tag(label)[0] for label in labels} - {"O"}
    prefixed = any("-" in label and split_tag(label)[0] in set("BIESLU") for label in labels)
    if not prefixed and not (prefixes and prefixes <= set("BIESLU")):
        if misspelt := [label for label in labels if MISSPELT_PREFIX.search(label)]:
            raise ValueError(
                f"`id2label` must spell prefixes as in 'B-PER', got {misspelt[:3]}. Rename the tags, or set "
                "`tag_scheme` to 'none' if every tag may follow every other."
            )
        return "none"
    signs = {"BILOU": "LU", "IOBES": "ES", "IOB2": "B", "IOB1": "I"}
    found = next(scheme for scheme, letters in signs.items() if prefixes & set(letters))
    check_scheme(labels, found)
    return found


def check_scheme(labels: Sequence[str], scheme: str) -> None:
    """Check that all labels are tags of a scheme.

    Raises:
        ValueError: If there is no such scheme, or a label has no prefix or a foreign one.
    """
    if scheme not in (*SCHEMES, "none"):
        raise ValueError(f"`tag_scheme` must be one of {', '.join(CHOICES)}, got {scheme!r}.")
    wrong = [label for label in labels if scheme != "none" and split_tag(label)[0] not in set(PREFIXES[scheme])]
    if wrong:
        raise ValueError(
            f"`id2label` must hold tags of the scheme {scheme}, {', '.join(PREFIXES[scheme])}, got {wrong[:5]}. "
            "Rename them, or set `tag_scheme` to another scheme, or to 'none' if every tag may follow every other."
        )


def legal_moves(labels: Sequence[str], scheme: str) -> Legality:
    """Compute which tags may follow each other, come first and come last.

    Args:
        labels: Tags in the order of their indices; some tags of the scheme may be missing.
        scheme: "IOB2", "IOBES", "BILOU", "IOB1", or "none", where everything is legal.

    Raises:
        ValueError: If labels do not fit the scheme, or no sequence could ever end after one of them.

    Source: Wei et al. 2021, https://arxiv.org/abs/2103.10682, section 2; IOB1 and BILOU are the schemes' own rules.
    """
    check_scheme(labels, scheme)
    tags = [split_tag(label) for label in labels]
    kind: dict[str, Any] = {"dtype": torch.bool, "device": "cpu"}  # transformers builds models on the meta device
    moves = torch.tensor([[_may_follow(a, b, scheme) for b in tags] for a in tags], **kind)
    start = torch.tensor([_may_follow(("O", ""), b, scheme) for b in tags], **kind)
    end = torch.tensor([_may_follow(a, ("O", ""), scheme) for a in tags], **kind)
    legality = Legality(moves.view(len(tags), len(tags)), start, end)
    _check_exits(labels, scheme, legality)
    return legality


def _may_follow(before: tuple[str, str], after: tuple[str, str], scheme: str) -> bool:
    """Check whether a tag may follow another, both as prefix and type; "O" also stands for either end of the row."""
    if scheme == "none":
        return True
    same_type = before[1] == after[1]
    if scheme == "IOB1":  # "B" only separates two neighbours of one type
        return after[0] != "B" or (before[0] in "BI" and same_type)
    inner = after[0] in ("I", "E", "L")
    if scheme == "IOB2":
        return not inner or (before[0] in "BI" and same_type)
    is_open = before[0] in ("B", "I")
    return (inner and same_type) if is_open else not inner


def _check_exits(labels: Sequence[str], scheme: str, legality: Legality) -> None:
    """Refuse labels that lack tags of the scheme without which some row could not be tagged."""
    leads_out = legality.end.clone()  # (tags,)
    for _ in labels:
        leads_out |= (legality.moves & leads_out).any(1)
    stuck = [label for label, out in zip(labels, leads_out.tolist(), strict=True) if not out]
    if stuck:
        raise ValueError(
            f"`id2label` must let every tag lead to the end of a sequence, {stuck} do not under {scheme}. Add the "
            "tags of the scheme that are missing, or set `tag_scheme` to 'none'."
        )
    if not (legality.start & legality.end).any():  # such a tag may also follow itself, however many words there are
        raise ValueError(
            f"`id2label` must hold a tag that one word may have alone, as 'O', got {list(labels)} under {scheme}. Add "
            "it, or set `tag_scheme` to 'none'."
        )


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


def find_segments(tags: Sequence[str]) -> list[Segment]:
    """Read segments off tags of any scheme, even if they break its rules, as the CoNLL evaluation does.

    A segment continues while its type stays the same, up to the next "B", "S" or "U", or through an "E" or "L".
    """
    segments: list[Segment] = []
    start, current, before = 0, "", "O"  # prefix and type of the word before
    for word, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        goes_on = before in ("B", "I") and prefix in ("I", "E", "L") and kind == current
        if not goes_on:
            if before != "O":
                segments.append(Segment(current, start, word))
            start, current = word, kind
        before = prefix
    return segments


def write_segments(segments: Sequence[Segment], words: int, scheme: str) -> list[str]:
    """Write segments that do not overlap as one tag per word.

    Raises:
        ValueError: If there is no such scheme.
    """
    check_scheme([], scheme)
    if scheme == "none":
        raise ValueError("`scheme` must write segments, got 'none'. Use IOB2, IOBES, BILOU or IOB1.")
    first, inner, last, only = SCHEMES[scheme]
    tags, previous = ["O"] * words, Segment("", -1, -1)
    for segment in segments:
        length = segment.stop - segment.start
        prefixes = only if length == 1 else first + inner * (length - 2) + last
        if scheme == "IOB1" and previous.stop == segment.start and previous.type == segment.type:
            prefixes = "B" + prefixes[1:]
        dash = "-" if segment.type else ""
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
    segments = find_segments(tags)
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
    around = [("O", ""), *map(split_tag, tags), ("O", "")]
    return sum(not _may_follow(before, after, scheme) for before, after in itertools.pairwise(around))
