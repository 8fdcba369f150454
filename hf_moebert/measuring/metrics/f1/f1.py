"""The harmonic mean of precision and recall of class 1, or averaged over the classes."""

import datasets
import evaluate
from numpy.typing import ArrayLike
from sklearn.metrics import f1_score


def f1(predictions: ArrayLike, references: ArrayLike, average: str = "binary") -> float:
    """F1 in [0, 1], 0 where neither precision nor recall is defined; both inputs of shape `(examples,)`."""
    return float(f1_score(references, predictions, average=average, zero_division=0))


class F1(evaluate.Metric):
    """Compute `{"f1": value}`; `average="macro"`, `"micro"` or `"weighted"` for more than two classes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description="`predictions` and `references`: one class index per example; `average` as in sklearn.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.f1_score.html"],
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike, average: str = "binary") -> dict[str, float]:
        return {"f1": f1(predictions, references, average)}
