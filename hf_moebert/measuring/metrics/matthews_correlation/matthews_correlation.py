"""The correlation between the predicted and the true classes, which chance and a constant answer leave at 0."""

import datasets
import evaluate
from numpy.typing import ArrayLike
from sklearn.metrics import matthews_corrcoef


def matthews_correlation(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews' correlation in [-1, 1]; both inputs of shape `(examples,)`."""
    return float(matthews_corrcoef(references, predictions))


class MatthewsCorrelation(evaluate.Metric):
    """Compute `{"matthews_correlation": value}` from predicted and true class indices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description="`predictions` and `references`: one class index per example.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            reference_urls=[
                "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.matthews_corrcoef.html"
            ],
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        return {"matthews_correlation": matthews_correlation(predictions, references)}
