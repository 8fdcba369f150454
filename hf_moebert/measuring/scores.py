"""Score predictions, with bootstrap intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import f1_score

from .metrics.accuracy.accuracy import accuracy
from .metrics.f1.f1 import f1
from .metrics.matthews_correlation.matthews_correlation import matthews_correlation
from .metrics.pearson_spearman.pearson_spearman import pearson, spearman
from .metrics.seqeval.seqeval import micro_f1, micro_precision, micro_recall


Score = Callable[[np.ndarray, np.ndarray], float]

# Metrics of one prediction per example, by the names of `hf_moebert.measuring.metrics`
CLASSIFICATION_SCORES: dict[str, dict[str, Score]] = {
    "accuracy": {"accuracy": accuracy},
    "f1": {"f1": f1},
    "matthews_correlation": {"matthews_correlation": matthews_correlation},
}
REGRESSION_SCORES: dict[str, dict[str, Score]] = {"pearson_spearman": {"pearson": pearson, "spearman": spearman}}
# Of the labels of each text, 0 or 1, `(examples, labels)`
LABEL_SET_SCORES: dict[str, dict[str, Score]] = {
    "f1": {"f1": lambda predictions, references: float(f1_score(references, predictions, average="micro"))},
    "accuracy": {"all labels right": lambda predictions, references: float((predictions == references).all(1).mean())},
}
# Metrics of the counts of `hf_moebert.measuring.metrics.seqeval.seqeval.count_spans`, one pair for each sentence
SPAN_SCORES: dict[str, Score] = {"precision": micro_precision, "recall": micro_recall, "f1": micro_f1}

__all__ = [
    "Interval",
    "bootstrap_interval",
    "paired_bootstrap",
    "score",
    "tags_of",
]


@dataclass(frozen=True)
class Interval:
    """A measured value and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    metric: Score,
    predictions: np.ndarray,
    references: np.ndarray,
    *,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Measure a metric, and its variation over test sets drawn with replacement from this one.

    Args:
        metric: Maps predictions and references of equal length to a number.
        predictions: Shape `(examples, ...)`.
        references: Shape `(examples, ...)`.
        rounds: Number of resampled test sets.
        confidence: Share of the rounds inside the interval, in (0, 1).
        seed: Seed of the resampling.

    Raises:
        ValueError: If the lengths differ or are 0, or `rounds` or `confidence` is out of range.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile interval).
    """
    _check_lengths(predictions=predictions, references=references)

    def measure(rows: np.ndarray) -> float:
        return metric(predictions[rows], references[rows])

    return _percentile_interval(measure, len(references), rounds, confidence, seed)


def paired_bootstrap(
    metric: Score,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    references: np.ndarray,
    *,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Measure the difference between the scores of `a` and `b` on the same resampled test sets.

    An interval without 0 shows a difference that the choice of test examples does not explain.

    Args:
        metric: Maps predictions and references of equal length to a number.
        predictions_a: Predictions of the first model. Shape `(examples, ...)`.
        predictions_b: Predictions of the second model on the same examples. Shape `(examples, ...)`.
        references: Shape `(examples, ...)`.
        rounds: Number of resampled test sets.
        confidence: Share of the rounds inside the interval, in (0, 1).
        seed: Seed of the resampling.

    Raises:
        ValueError: If the lengths differ or are 0, or `rounds` or `confidence` is out of range.

    Source: Koehn 2004, https://aclanthology.org/W04-3250 (paired bootstrap resampling).
    """
    _check_lengths(predictions_a=predictions_a, predictions_b=predictions_b, references=references)

    def measure(rows: np.ndarray) -> float:
        gold = references[rows]
        return metric(predictions_a[rows], gold) - metric(predictions_b[rows], gold)

    return _percentile_interval(measure, len(references), rounds, confidence, seed)


def _check_lengths(**arrays: np.ndarray) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or not lengths["references"]:
        raise ValueError(f"Predictions and references must be of one length above 0, got {lengths}. Pair them up.")


def _percentile_interval(
    measure: Callable[[np.ndarray], float], size: int, rounds: int, confidence: float, seed: int
) -> Interval:
    """Evaluate `measure` on all rows and on `rounds` draws of as many rows."""
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}. Use 1000.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}. Use 0.95.")
    generator = np.random.default_rng(seed)
    draws = [measure(generator.integers(size, size=size)) for _ in range(rounds)]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(measure(np.arange(size))), float(low), float(high))


def score(
    metric_names: str | Sequence[str],
    logits: np.ndarray,
    references: np.ndarray,
    *,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score logits against the references, as classes by their argmax or as the number of a regression.

    Args:
        metric_names: One or more of "accuracy", "f1", "matthews_correlation" and "pearson_spearman"; see
            `hf_moebert.measuring.metrics.metrics_for_task`.
        logits: Shape `(examples, labels)`; one label for a regression.
        references: Class indices, or numbers. Shape `(examples,)`.
        rounds: Number of resampled test sets.
        confidence: Share of the rounds inside each interval, in (0, 1).
        seed: Seed of the resampling, which is the same for every metric.

    Returns:
        An interval for each number of each metric, such as "pearson" and "spearman".

    Raises:
        ValueError: If a metric does not exist or does not fit the logits.
    """
    if logits.ndim != 2:
        raise ValueError(f"`logits` must be of shape (examples, labels), got {logits.shape}. Use `predict_logits`.")
    regression = logits.shape[1] == 1
    predictions = logits[:, 0] if regression else logits.argmax(axis=1)  # (examples,)
    fitting = REGRESSION_SCORES if regression else CLASSIFICATION_SCORES
    intervals = {}
    for name in [metric_names] if isinstance(metric_names, str) else metric_names:
        if name not in fitting:
            raise ValueError(
                f"`metric_names` must be among {', '.join(fitting)} for logits of {logits.shape[1]} labels, "
                f"got '{name}'. Use `metrics_for_task`."
            )
        for key, metric in fitting[name].items():
            intervals[key] = bootstrap_interval(
                metric, predictions, np.asarray(references), rounds=rounds, confidence=confidence, seed=seed
            )
    return intervals


def tags_of(predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """Convert predicted indices to the tags of each sentence's words, as `hf_moebert.measuring.metrics` takes them.

    Args:
        predictions: Indices of tags; the labels themselves give the true tags. Shape `(examples, seq)`.
        labels: Anything but -100 at the first sub-word of a word, -100 elsewhere. Shape `(examples, seq)`.
        names: Tags in the order of their indices.

    Returns:
        For each sentence one tag per word; none for a sentence without words.

    Raises:
        ValueError: If the shapes differ, or a prediction at a word is no index into `names`.
    """
    if predictions.ndim != 2 or predictions.shape != labels.shape:
        raise ValueError(
            "`predictions` and `labels` must be of one shape (examples, seq), got "
            f"{predictions.shape} and {labels.shape}. Take the argmax of logits first."
        )
    words = labels != -100  # (examples, seq)
    if (strange := predictions[words & ((predictions < 0) | (predictions >= len(names)))]).size:
        raise ValueError(
            f"`predictions` must be in [0, {len(names)}) at every word, got {strange[0]}. "
            "Predict the words of these labels, and name every tag."
        )
    return [[names[tag] for tag in row[mask]] for row, mask in zip(predictions, words, strict=True)]
