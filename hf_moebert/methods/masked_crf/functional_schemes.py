"""Which scheme tags follow, told from their names, and where names do not tell, from rows of tags."""

import functools
import itertools
import re
from collections.abc import Sequence

from .functional_segments import plain_tags, split_tag
from .functional_tags import PREFIXES, SCHEMES, Legality, legal_moves, may_follow


LETTERS = set("BIESLUM")
MISSPELT_PREFIX = re.compile(r"^[BIESLUM][_:/|.\s\u2010-\u2015]|^[bieslum][-_:/|.\s\u2010-\u2015]|[-_][BIESLUM]$")


def infer_scheme(labels: Sequence[str], rows: Sequence[Sequence[str]] = ()) -> str:
    """Infer the scheme of the tags of a model or a data set.

    It is the one that has all the prefixes, and in which every tag can be reached and left: "I-PER" without "B-PER"
    means IOB1, as in CoNLL-2003. Where several fit, it is the one that the fewest rows break. Where rows do not tell
    either, IOB2 is assumed before IOB1, as everybody who says BIO means it. Labels without any prefix, as for parts
    of speech, follow no scheme: "none".

    Args:
        labels: All tags. Special ones, such as "[PAD]", "</s>" and "X", do not count where others have prefixes.
        rows: Tags of some rows of a data set, which tell IOB1 from IOB2 and IOE1 from IOE2.

    Raises:
        ValueError: If the labels are the default names of a model, mix schemes, only some have a prefix, prefixes
            are spelled in another way ("b-per", "B_PER", "PER-B"), or IOE1 and IOE2 fit.
    """
    fitting = fitting_schemes(labels)
    if len(fitting) > 1 and len(rows):
        broken = {scheme: _count_broken(rows, scheme) for scheme in fitting}
        fitting = [scheme for scheme in fitting if broken[scheme] == min(broken.values())]
    if {"IOE1", "IOE2"} <= set(fitting):
        raise ValueError(
            f"`tag_scheme` must be named for tags that may be of IOE1 or IOE2, got {list(labels)[:5]}. Set it to "
            "'IOE2' if every segment ends in 'E', to 'IOE1' if only those do that another of their type follows; or "
            "give `labels` of the data to `from_dense`."
        )
    return fitting[0]


def fitting_schemes(labels: Sequence[str]) -> list[str]:
    """Return the schemes that a set of tags may follow and that differ in what is legal, the likeliest first.

    Raises:
        ValueError: If there is none, or as in `infer_scheme`.
    """
    if any(label == f"LABEL_{index}" for index, label in enumerate(labels)):
        raise ValueError(
            f"`id2label` must name the tags, got {list(labels)[:3]}. Set `id2label` when the model is made, or "
            "`tag_scheme` to 'none' if every tag may follow every other."
        )
    prefixes = {split_tag(label)[0] for label in plain_tags(labels, "auto")} - {"O"}
    prefixed = any("-" in label and split_tag(label)[0] in LETTERS for label in labels)
    if not prefixed and not (prefixes and prefixes <= LETTERS):
        if misspelt := [label for label in labels if MISSPELT_PREFIX.search(label)]:
            raise ValueError(
                f"`id2label` must spell prefixes as in 'B-PER', got {misspelt[:3]}. Rename the tags, or set "
                "`tag_scheme` to 'none' if every tag may follow every other."
            )
        return ["none"]
    fitting: dict[str, Legality] = {}
    for scheme in SCHEMES:
        found = _try_moves(labels, scheme) if prefixes <= set(PREFIXES[scheme]) else None
        if found and not any(_are_same(found, other) for other in fitting.values()):
            fitting[scheme] = found
    if not fitting:
        legal_moves(labels, _nearest_scheme(prefixes))  # raises, and names what does not fit
    return list(fitting)


def _try_moves(labels: Sequence[str], scheme: str) -> Legality | None:
    try:
        return legal_moves(labels, scheme)
    except ValueError:
        return None


def _are_same(one: Legality, other: Legality) -> bool:
    return all(mask.equal(same) for mask, same in zip(one, other, strict=True))


def _count_broken(rows: Sequence[Sequence[str]], scheme: str) -> int:
    """Count the rows of tags that are illegal in a scheme."""

    @functools.cache
    def follows(before: str, after: str) -> bool:
        return may_follow(split_tag(before), split_tag(after), scheme)

    around = (["O", *plain_tags(row, scheme), "O"] for row in rows)
    return sum(not all(itertools.starmap(follows, itertools.pairwise(tags))) for tags in around)


def _nearest_scheme(prefixes: set[str]) -> str:
    """Return the scheme that prefixes point to, even if it lacks some of them."""
    if "B" not in prefixes and prefixes <= set("IE"):
        return "IOE2"
    signs = {"BILOU": "LU", "BMES": "M", "IOBES": "ES", "IOB2": "BI"}
    return next(scheme for scheme, letters in signs.items() if prefixes & set(letters))
