"""The share of examples whose predicted class is the true one."""

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of equal entries, in [0, 1]; both of shape `(examples,)`."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))  # sklearn checks for 50 times as long


class Accuracy(evaluate.Metric):
    """Compute `{"accuracy": share}` from predicted and true class indices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description="`predictions` and `references`: one class index per example.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html"],
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}
