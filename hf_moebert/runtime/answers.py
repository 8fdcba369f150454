"""From what a graph returns to answers, in numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities that add up to 1: `(..., labels)`."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Turn logits into independent probabilities, without an overflow: any shape."""
    return np.exp(-np.logaddexp(0, -logits))


def score_labels(logits: np.ndarray, kind: str) -> np.ndarray:
    """Turn the logits of texts into scores, as the pipeline "text-classification" does.

    Args:
        logits: Shape `(batch, labels)`.
        kind: "classification", "multi-label", "reranking" (one score), or "regression", whose scores are the logits.
    """
    if kind == "regression":
        return logits
    return softmax(logits) if kind == "classification" else sigmoid(logits)


def rank_labels(scores: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return `{"label", "score"}` of each label, the highest score first; `scores` is `(labels,)`."""
    return [{"label": labels[number], "score": float(scores[number])} for number in np.argsort(-scores, kind="stable")]


def pool(states: np.ndarray, mask: np.ndarray, pooling: str) -> np.ndarray:
    """Turn the hidden states of each text into one vector, of its real tokens alone.

    Args:
        states: Shape `(batch, seq, hidden)`.
        mask: 1 at real tokens. Shape `(batch, seq)`.
        pooling: `mean` of the tokens, `cls` for the first one, `last` for the last one.

    Returns:
        Shape `(batch, hidden)`.

    Source: `hf_moebert.architectures.functional_pooling.pool` is the same on tensors.
    """
    mask = mask.astype(bool)
    if pooling == "mean":
        real = np.where(mask[..., None], states, 0)  # (batch, seq, hidden)
        return real.sum(1) / np.maximum(mask.sum(1, keepdims=True), 1).astype(states.dtype)
    place = mask.argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask[:, ::-1].argmax(1)  # (batch,)
    return states[np.arange(len(states)), place]


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to the length 1; zeros stay. Shape `(batch, hidden)`."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
