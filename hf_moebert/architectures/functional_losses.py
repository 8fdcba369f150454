"""Task losses of single examples and tokens, on tensors."""

from torch import Tensor
from torch.nn import functional as F


def infer_problem_type(num_labels: int, labels: Tensor) -> str:
    """Infer the kind of sequence classification from the labels, by the rule of transformers."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def per_example_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Compute the task loss of each example of a sequence classifier.

    Args:
        logits: Shape `(batch, labels)`.
        labels: Class of each example, -100 where there is none (loss 0), shape `(batch,)`; for regression and
            multi-label classification targets of the shape of `logits`, or `(batch,)` for one output.
        problem_type: `single_label_classification` (cross entropy), `multi_label_classification` (binary cross
            entropy, mean over labels) or `regression` (squared error, mean over outputs).

    Returns:
        Shape `(batch,)`.
    """
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.reshape(-1), reduction="none")
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return F.mse_loss(logits, labels, reduction="none").mean(dim=-1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=-1)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of each token; 0 where the label is -100.

    Args:
        logits: Shape `(batch, seq, labels)`.
        labels: Shape `(batch, seq)`.

    Returns:
        Shape `(batch, seq)`.
    """
    return F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1), reduction="none").view(labels.shape)


def span_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Average the cross entropies of a span's two ends; an end outside the sequence adds 0.

    Args:
        start_logits: Shape `(batch, seq)`.
        end_logits: Shape `(batch, seq)`.
        start: First token of each answer. Shape `(batch,)`.
        end: Last token of each answer. Shape `(batch,)`.

    Returns:
        Shape `(batch,)`.
    """
    outside = start_logits.shape[1]

    def one_end(logits: Tensor, position: Tensor) -> Tensor:
        position = position.reshape(-1).clamp(0, outside)  # transformers' convention: `outside` means "not in here"
        return F.cross_entropy(logits, position, ignore_index=outside, reduction="none")

    return (one_end(start_logits, start) + one_end(end_logits, end)) / 2
