"""The linear (Pearson) and the rank (Spearman) correlation of predicted and true numbers.

A constant has no correlation with anything: it scores 0, not NaN, so that a collapsed model can still be ranked.
"""

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, spearmanr


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Linear correlation in [-1, 1], 0 for a constant; both inputs of shape `(examples,)`."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(pearsonr(predictions, references).statistic)


def spearman(predictions: ArrayLike, references: ArrayLike) -> float:
    """Rank correlation in [-1, 1], 0 for a constant; both inputs of shape `(examples,)`."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(spearmanr(predictions, references).statistic)


class PearsonSpearman(evaluate.Metric):
    """Compute `{"pearson": value, "spearman": value}` from predicted and true numbers."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description="`predictions` and `references`: one number per example.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=[
                "https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.pearsonr.html",
                "https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.spearmanr.html",
            ],
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"pearson": pearson(predictions, references), "spearman": spearman(predictions, references)}
