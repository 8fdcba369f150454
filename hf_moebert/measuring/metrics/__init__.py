"""Metrics that need no network: each folder here also loads by its path, `evaluate.load("<folder>")`."""

import difflib

import evaluate

from .accuracy.accuracy import Accuracy
from .f1.f1 import F1
from .matthews_correlation.matthews_correlation import MatthewsCorrelation
from .pearson_spearman.pearson_spearman import PearsonSpearman
from .seqeval.seqeval import Seqeval
from .squad.squad import Squad


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson_spearman": PearsonSpearman,
    "seqeval": Seqeval,
    "squad": Squad,
}

# what is not accuracy, by task or problem type
USUAL_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson_spearman",),
    "regression": ("pearson_spearman",),
    "conll2003": ("seqeval",),
    "wnut17": ("seqeval",),
    "squad": ("squad",),
    "squad_v2": ("squad",),
}

__all__ = ["METRICS", "load_metric", "metrics_for_task"]


def load_metric(name: str) -> evaluate.Metric:
    """Build one of the package's metrics by its name.

    Args:
        name: A key of `METRICS`.

    Raises:
        ValueError: If there is no such metric.
    """
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        remedy = f"Did you mean '{close[0]}'?" if close else "Load others with `evaluate.load`."
        raise ValueError(f"`name` must be one of {', '.join(METRICS)}, got '{name}'. {remedy}")
    return METRICS[name]()


def metrics_for_task(task: str) -> tuple[str, ...]:
    """Name the metrics usually reported for a GLUE task, SQuAD, named entities or a `problem_type` of transformers.

    Args:
        task: Such as `"cola"`, `"STS-B"`, `"regression"` or `"single_label_classification"`; whatever is not known
            to need something else is scored by accuracy.

    Raises:
        ValueError: If the problem has many labels per example, which none of the metrics here scores.

    Source: Wang et al. 2018, https://arxiv.org/abs/1804.07461, table 1.
    """
    if task == "multi_label_classification":
        raise ValueError(
            f"`task` must have one label or number per example, got '{task}'. Choose a multi-label metric yourself."
        )
    return USUAL_METRICS.get(task.lower().replace("-", ""), ("accuracy",))
