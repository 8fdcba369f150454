"""Precision, recall and F1 of tagged spans, found by the library seqeval, and accuracy of the single tags.

Two ways to read illegal tags: lenient, as conlleval does, keeps every stretch of one type as a span, however it
begins and ends; strict drops the spans that the scheme does not allow.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import datasets
import evaluate
import numpy as np
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, IOE2, Entities


Sequences = Sequence[Sequence[str]]  # the tags of each sentence
Span = tuple[str, int, int]  # type, first word, last word

# Those that prefixes are read as come first. IOE1 is read leniently only: seqeval drops its spans of an "E" alone
SCHEMES = {"IOB2": IOB2, "IOBES": IOBES, "BILOU": BILOU, "BMES": IOBES, "IOB1": IOB1, "IOE2": IOE2}
PREFIXES = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU", "BMES": "BMES", "IOB1": "BI", "IOE2": "IE"}
AS_IOBES = {"L": "E", "U": "S", "M": "I"}  # lenient counting knows no BILOU, and neither way of counting BMES

FOUND = np.dtype([("correct", np.int64), ("predicted", np.int64)])


def find_spans(tags: Sequences, strict: bool = False, *, scheme: str | None = None) -> list[set[Span]]:
    """Find the spans of each sentence.

    Args:
        tags: "O", or a prefix and a type, which may hold dashes itself: "B-x-y".
        strict: Whether spans that the scheme does not allow are dropped.
        scheme: A key of `SCHEMES`; without it, read off the prefixes. Only strict reading needs it.

    Raises:
        ValueError: If a tag or the scheme is unknown, or a tag is none of the scheme.

    Source: Tjong Kim Sang and Buchholz 2000, https://aclanthology.org/W00-0726 (lenient, the script conlleval).
    """
    scheme = _check_scheme(tags, strict, scheme)
    kinds: dict[str, int] = {}  # seqeval strips dashes off types, and sees none in numbers
    coded = [[_code(tag, kinds, strict) for tag in sentence] for sentence in tags]
    if strict:
        found = [{(e.tag, e.start, e.end - 1) for e in spans} for spans in Entities(coded, SCHEMES[scheme]).entities]
    else:
        found = [set(get_entities(sentence)) for sentence in coded]
    names = list(kinds)
    return [{(names[int(kind)], first, last) for kind, first, last in spans} for spans in found]


def count_spans(
    predictions: Sequences, references: Sequences, strict: bool = False, *, scheme: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Count the spans of each sentence, so that scores of many samples of sentences are quick sums.

    Args:
        predictions: Tags of each sentence.
        references: As many true ones.
        strict: As in `find_spans`.
        scheme: As in `find_spans`; without it, read off the prefixes of both.

    Returns:
        The numbers of `correct` and of `predicted` spans, as fields, and the numbers of true spans; both of shape
        `(examples,)`, and both as `micro_precision`, `micro_recall` and `micro_f1` take them.

    Raises:
        ValueError: If predictions and references are not of the same lengths, or as in `find_spans`.
    """
    guesses, truths = _pair_spans(predictions, references, strict, scheme=scheme)
    pairs = list(zip(guesses, truths, strict=True))
    found = np.array([(len(guess & truth), len(guess)) for guess, truth in pairs], dtype=FOUND)
    return found, np.array([len(truth) for truth in truths], dtype=np.int64)


def micro_precision(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the predicted spans that are right; takes what `count_spans` returns; 0 where there are none."""
    return _ratio(found["correct"].sum(), found["predicted"].sum())


def micro_recall(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true spans that were found; takes what `count_spans` returns; 0 where there are none."""
    return _ratio(found["correct"].sum(), true.sum())


def micro_f1(found: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall; takes what `count_spans` returns; 0 where there are no spans."""
    return _ratio(2 * found["correct"].sum(), found["predicted"].sum() + true.sum())


def span_f1(
    predictions: Sequences, references: Sequences, strict: bool = False, *, scheme: str | None = None
) -> float:
    """F1 over all spans of all sentences, in [0, 1]; arguments and refusals of `count_spans`."""
    return micro_f1(*count_spans(predictions, references, strict, scheme=scheme))


def count_illegal(tags: Sequences, scheme: str | None = None) -> int:
    """Count the illegal segments: spans that lenient reading keeps and strict reading drops.

    Args:
        tags: Tags of each sentence.
        scheme: As in `find_spans`.

    Raises:
        ValueError: As in `find_spans`.
    """
    kept, legal = find_spans(tags), find_spans(tags, True, scheme=scheme)
    return sum(len(spans - right) for spans, right in zip(kept, legal, strict=True))


def _pair_spans(
    predictions: Sequences, references: Sequences, strict: bool, *, scheme: str | None
) -> tuple[list[set[Span]], list[set[Span]]]:
    lengths = [[len(sentence) for sentence in tags] for tags in (predictions, references)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"`predictions` and `references` must hold as many tags for each sentence, got {len(lengths[0])} and "
            f"{len(lengths[1])} sentences of {sum(lengths[0])} and {sum(lengths[1])} tags. Pair them up."
        )
    scheme = _check_scheme([*predictions, *references], strict, scheme)
    return find_spans(predictions, strict, scheme=scheme), find_spans(references, strict, scheme=scheme)


def _check_scheme(tags: Sequences, strict: bool, scheme: str | None) -> str:
    """Check every tag, and return the scheme; that of the prefixes if none is given."""
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {', '.join(SCHEMES)}, got '{scheme}'. Read others leniently.")
    seen = {tag.partition("-")[0] for tag in set(chain.from_iterable(tags)) - {"O"}}
    if seen - set("BIESLUM"):
        raise ValueError(
            f"Tags must be 'O', or B, I, E, S, L, U or M, a dash and a type, got prefixes {sorted(seen)}."
        )
    if strict and scheme is None and seen and seen <= {"I", "E"}:
        raise ValueError(
            f"`scheme` must be named to read tags strictly whose prefixes are {sorted(seen)}: they may be IOB1, IOE1 "
            "or IOE2, or cut from others. Use 'IOB2' if each span begins with 'B'."
        )
    fitting = [name for name, prefixes in PREFIXES.items() if seen <= set(prefixes)]
    if scheme is None and fitting:
        return fitting[0]
    if strict and scheme not in fitting:
        raise ValueError(
            f"The tags must be of {scheme or 'one scheme'}, got the prefixes {sorted(seen)}. Name their `scheme`, one "
            f"of {', '.join(SCHEMES)}, or read them leniently."
        )
    return scheme or "IOB2"


def _code(tag: str, kinds: dict[str, int], strict: bool) -> str:
    """Write a tag with the number of its type instead of its name."""
    if tag == "O":
        return tag
    prefix, _, kind = tag.partition("-")
    prefix = AS_IOBES.get(prefix, prefix) if prefix == "M" or not strict else prefix
    return f"{prefix}-{kinds.setdefault(kind, len(kinds))}"


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


class Seqeval(evaluate.Metric):
    """Compute `overall_precision`, `_recall`, `_f1` and `_accuracy`, and for each type precision, recall, f1, number.

    `mode="strict"`, perhaps with a `scheme`, drops illegal spans.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description="`predictions` and `references`: for each sentence a list of tags such as 'O', 'B-x'.",
            features=datasets.Features({"predictions": tags, "references": tags}),
            reference_urls=["https://github.com/chakki-works/seqeval"],
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[list[str]],
        mode: Literal["strict"] | None = None,
        scheme: str | None = None,
    ) -> dict[str, float | dict[str, float]]:
        if mode not in (None, "strict"):
            raise ValueError(f"`mode` must be 'strict' or None, got {mode!r}. Use None for the scores of conlleval.")
        guesses, truths = _pair_spans(predictions, references, mode == "strict", scheme=scheme)
        spans = [{(row, *span) for row, found in enumerate(part) for span in found} for part in (guesses, truths)]
        kinds = sorted({kind for _, kind, _, _ in spans[0] | spans[1]})
        scores: dict[str, float | dict[str, float]] = {
            kind: _scores(*({span for span in part if span[1] == kind} for part in spans)) for kind in kinds
        }
        overall = _scores(*spans)
        scores |= {f"overall_{name}": overall[name] for name in ("precision", "recall", "f1")}
        words = list(zip(chain.from_iterable(predictions), chain.from_iterable(references), strict=True))
        return scores | {"overall_accuracy": _ratio(sum(guess == truth for guess, truth in words), len(words))}


def _scores(guess: set, truth: set) -> dict[str, float]:
    """Score one set of spans against another."""
    found, true = np.array([(len(guess & truth), len(guess))], dtype=FOUND), np.array([len(truth)])
    scores = {"precision": micro_precision(found, true), "recall": micro_recall(found, true)}
    return scores | {"f1": micro_f1(found, true), "number": len(truth)}
