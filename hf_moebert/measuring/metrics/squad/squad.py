"""Exact match and token F1 of extracted answers, SQuAD v1.1 and v2.0, in percent.

A question takes its best score over the gold answers. One without gold answers is answered rightly by the empty
text only; where there are such questions, both groups are reported on their own as well.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from statistics import fmean

import datasets
import evaluate


DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Lower-case a text and drop its punctuation, English articles and surplus white space."""
    words = answer.lower().translate(DELETE_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", words).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if two texts are equal after `normalise`, else 0."""
    return float(normalise(prediction) == normalise(gold))


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of token precision and recall after `normalise`, in [0, 1]."""
    predicted, wanted = normalise(prediction).split(), normalise(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted))


def best_over(measure: Callable[[str, str], float], prediction: str, golds: list[str]) -> float:
    """Largest `measure` of a prediction over the gold texts, or against the empty text where there are none."""
    # a gold text of nothing but articles and punctuation cannot be told from no answer
    wanted = [gold for gold in golds if normalise(gold)] or [""]
    return max(measure(prediction, gold) for gold in wanted)


def squad_scores(predictions: dict[str, str], answers: dict[str, list[str]]) -> dict[str, float]:
    """Average the best scores of every question, in percent.

    Args:
        predictions: Answer text by question id; the empty text says "no answer".
        answers: Gold texts by question id; an empty list says that there is none.

    Returns:
        `exact_match` and `f1`; with unanswerable questions also `has_answer_*` and `no_answer_*`, each for a group
        that is not empty.

    Source: Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, section 6.1; Rajpurkar et al. 2018,
    https://arxiv.org/abs/1806.03822.
    """
    groups = {"": list(answers)}
    if not all(answers.values()):
        groups["has_answer_"] = [key for key in answers if answers[key]]
        groups["no_answer_"] = [key for key in answers if not answers[key]]
    scores: dict[str, float] = {}
    for prefix, keys in groups.items():
        for name, measure in (("exact_match", exact_match), ("f1", token_f1)):
            best = [best_over(measure, predictions[key], answers[key]) for key in keys]
            if best:
                scores[prefix + name] = 100 * fmean(best)
    return scores


class Squad(evaluate.Metric):
    """Compute exact match and F1 from predicted texts and gold answers that share the question `id`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="",
            inputs_description=(
                "`predictions`: `id`, `prediction_text`. `references`: `id`, `answers` with the lists `text` and "
                "`answer_start`, both empty where a question has no answer."
            ),
            features=datasets.Features(
                {
                    "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
                    "references": {
                        "id": datasets.Value("string"),
                        "answers": {
                            "text": datasets.List(datasets.Value("string")),
                            "answer_start": datasets.List(datasets.Value("int32")),
                        },
                    },
                }
            ),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
        )

    def _compute(self, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        texts = {row["id"]: row["prediction_text"] for row in predictions}
        answers = {row["id"]: list(row["answers"]["text"]) for row in references}
        if texts.keys() != answers.keys() or len(answers) != len(references):
            raise ValueError(
                "`predictions` and `references` must hold every question `id` exactly once, got "
                f"{len(predictions)} predictions, {len(references)} references and "
                f"{len(texts.keys() & answers.keys())} common ids. Give one prediction for each question."
            )
        return squad_scores(texts, answers)
