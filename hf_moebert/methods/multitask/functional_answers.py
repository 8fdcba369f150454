"""From the logits of a task to a readable answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .functional_spans import Span, find_answer


PREFIXES = ("B-", "I-", "M-", "E-", "L-", "S-", "U-")


@dataclass(frozen=True)
class Example:
    """An input beside its ids.

    Attributes:
        text: Text in which `start` and `end` of an answer count characters.
        form: Form of the input, a key of `READERS`.
        tasks: Tasks to run; `None` for all that can read this form.
        spans: Spans of the words; for a question, of all tokens of the context.
        truncated: Whether the input was cut to the length of the model.
    """

    text: str
    form: tuple[str, ...]
    tasks: Sequence[str] | None
    spans: list[Span]
    truncated: bool


def read_classes(kind: str, logits: Tensor, labels: Mapping[int, str]) -> Any:
    """Turn the logits of a sequence classifier into an answer.

    Args:
        kind: One of `CLASSIFIERS`.
        logits: Shape `(labels,)`.
        labels: Name of each label.
    """
    logits = logits.float()
    if kind == "regression":
        return {"score": logits.item() if logits.numel() == 1 else logits.tolist()}
    if kind == "multi-label":
        scores = enumerate(logits.sigmoid().tolist())
        return [{"label": labels[number], "score": score} for number, score in scores if score > 0.5]
    score, best = logits.softmax(-1).max(-1)
    return {"label": labels[int(best)], "score": score.item()}


def read_entities(found: Mapping[str, Tensor], labels: Mapping[int, str], example: Example) -> list[dict[str, Any]]:
    """Read the tag of every word, and join words to entities as the prefixes of their tags demand.

    Args:
        found: `logits` `(seq, labels)`; of a CRF also `predictions` `(seq,)` and `marginals` `(seq, labels)`.
        labels: Name of each label.
        example: Example with the spans of the words.
    """
    positions = [position for position, *_ in example.spans]
    if "predictions" in found:
        tags = found["predictions"][positions]  # (words,)
        scores = found["marginals"][positions].float().gather(-1, tags[:, None]).squeeze(-1)  # (words,)
    else:
        scores, tags = found["logits"][positions].float().softmax(-1).max(-1)
    entities: list[dict[str, Any]] = []
    open_type = None  # type of the entity that the next word may continue
    for (_, start, end), tag, score in zip(example.spans, tags.tolist(), scores.tolist(), strict=True):
        label = labels[tag]
        prefix, kind = (label[0], label[2:]) if label.startswith(PREFIXES) else ("-", label)
        if prefix in "IMEL" and kind == open_type:
            entities[-1]["end"] = end
            entities[-1]["scores"].append(score)
        elif label != "O":
            entities.append({"label": kind, "start": start, "end": end, "scores": [score]})
        open_type = kind if prefix in "BIM" else None
    for entity in entities:
        scores_of_words = entity.pop("scores")
        entity["word"] = example.text[entity["start"] : entity["end"]]
        entity["score"] = sum(scores_of_words) / len(scores_of_words)
    return entities


def read_answer(start_logits: Tensor, end_logits: Tensor, example: Example) -> dict[str, Any]:
    """Return the likeliest span of the context.

    Args:
        start_logits: Shape `(seq,)`.
        end_logits: Shape `(seq,)`.
        example: Example with the spans of the tokens of the context.
    """
    first, last = (one.float().cpu().numpy() for one in (start_logits, end_logits))
    score, start, end = find_answer(first, last, example.spans)
    return {"answer": example.text[start:end], "score": score, "start": start, "end": end}
