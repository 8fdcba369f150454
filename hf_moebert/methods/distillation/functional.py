"""The distance of a student from its teacher, in hidden states and predictions, on plain tensors.

Every loss is a mean over the examples of the batch, of a value that depends on that example alone. So equal
micro-batches average to the loss of the whole batch, whatever their padding. Half precision is raised to float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the kept positions of each example, then the examples.

    Args:
        values: One value per position. Shape `(batch, seq)`, or any shape without a mask.
        mask: True where a position counts; without it all do. Shape `(batch, seq)`.

    Returns:
        The mean; an example without a kept position counts as zero. Shape `()`.
    """
    if mask is None:
        return values.mean()
    kept = values.masked_fill(~mask, 0)  # (batch, seq)
    return (kept.sum(1) / mask.sum(1).clamp(min=1)).mean()


def hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean squared error between the hidden states of one layer.

    Args:
        student: Hidden states of the student. Shape `(batch, seq, hidden)`.
        teacher: Hidden states of the teacher. Shape `(batch, seq, hidden)`.
        mask: True at real tokens; without it all positions count alike. Shape `(batch, seq)`.

    Returns:
        The loss. Shape `()`.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, layer-wise distillation; the mask is our own design.
    """
    difference = at_least_float32(student) - at_least_float32(teacher)  # (batch, seq, hidden)
    if mask is not None:
        # Before the square: whatever stands in the padding, even NaN, then has a gradient of zero.
        difference = difference.masked_fill(~mask.unsqueeze(-1), 0)
    return masked_mean(difference.square().mean(-1), mask)


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute half the sum of both Kullback-Leibler divergences between two categorical distributions.

    With `p` and `q` the softmax of the two logits, `1/2 (KL(p || q) + KL(q || p)) = 1/2 sum (p - q)(log p - log q)`.
    The logarithms come from `log_softmax`, so a probability that underflows gives a large finite value.

    Args:
        student: Logits. Shape `(..., labels)`.
        teacher: Logits. Shape `(..., labels)`.

    Returns:
        The divergence in nats. Shape `(...)`.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, layer-wise distillation.
    """
    log_p = log_softmax(at_least_float32(student), dim=-1)
    log_q = log_softmax(at_least_float32(teacher), dim=-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy between both softened distributions, times the squared temperature.

    With `p` the softmax of `student / T` and `q` that of `teacher / T`, it is `-T^2 sum q log p`. Without the square
    its gradient would be `(p - q) / T`, in which `p - q` shrinks with `1 / T` as well.

    Args:
        student: Logits. Shape `(..., labels)`.
        teacher: Logits. Shape `(..., labels)`.
        temperature: `T`, above 0; the larger, the more the unlikely labels count.

    Returns:
        The cross-entropy in nats; equal logits give the teacher's entropy, not zero. Shape `(...)`.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; in this form the code of Wei et al. 2022.
    """
    student, teacher = (_soften(logits, temperature) for logits in (student, teacher))
    return -(teacher.softmax(-1) * log_softmax(student, dim=-1)).sum(-1) * temperature**2


def classification_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float | None = None
) -> Tensor:
    """Compute the distance between predicted labels, of sentences or of tokens.

    Args:
        student: Logits. Shape `(batch, labels)`, or `(batch, seq, labels)` for tokens.
        teacher: Logits. Shape as `student`.
        mask: True at the tokens that count; only for tokens. Shape `(batch, seq)`.
        temperature: Of `soft_cross_entropy`; without it, `symmetric_kl`.

    Returns:
        The loss. Shape `()`.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, layer-wise distillation; tokens are our own design.
    """
    if mask is not None:
        student = student.masked_fill(~mask.unsqueeze(-1), 0)  # as in `hidden_state_loss`
        teacher = teacher.masked_fill(~mask.unsqueeze(-1), 0)
    return masked_mean(_distance(student, teacher, temperature), mask)


def multi_label_loss(student: Tensor, teacher: Tensor, *, temperature: float | None = None) -> Tensor:
    """Compute the distance between the two Bernoulli distributions of each label, averaged like the task's loss.

    With `p` and `q` the sigmoids of logits `s` and `t`, the symmetric KL is `1/2 (p - q)(s - t)`: the logarithms of
    both outcomes collapse to the logits.

    Args:
        student: Logits. Shape `(batch, labels)`.
        teacher: Logits. Shape `(batch, labels)`.
        temperature: Of `soft_cross_entropy`, each label against its absence; without it, the symmetric KL.

    Returns:
        The loss. Shape `()`.

    Source: our own design; the paper has no multi-label task.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if temperature is not None:  # a label's absence has the logit 0
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
        return soft_cross_entropy(student, teacher, temperature).mean()
    return ((student.sigmoid() - teacher.sigmoid()) * (student - teacher)).mean() / 2


def regression_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error between predicted values.

    Args:
        student: Predictions. Shape `(batch, labels)`.
        teacher: Predictions. Shape `(batch, labels)`.

    Returns:
        The loss. Shape `()`.

    Source: the code of Zuo et al. 2022; the paper does not say.
    """
    return (at_least_float32(student) - at_least_float32(teacher)).square().mean()


def span_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    temperature: float | None = None,
) -> Tensor:
    """Compute the distance over the positions of a sequence, half for the start of the answer and half for its end.

    Args:
        student: Logits of start and end. Shape `(batch, seq)` each.
        teacher: Logits of start and end. Shape `(batch, seq)` each.
        mask: True at real tokens; the others can be neither start nor end. Shape `(batch, seq)`.
        temperature: Of `soft_cross_entropy`; without it, `symmetric_kl`.

    Returns:
        The loss. Shape `()`.

    Source: the code of Zuo et al. 2022; the mask is our own design.
    """
    if mask is not None:
        student = (_mask_logits(student[0], mask), _mask_logits(student[1], mask))
        teacher = (_mask_logits(teacher[0], mask), _mask_logits(teacher[1], mask))
    start, end = (_distance(s, t, temperature) for s, t in zip(student, teacher, strict=True))  # (batch,)
    return (start + end).mean() / 2


def _distance(student: Tensor, teacher: Tensor, temperature: float | None) -> Tensor:
    return symmetric_kl(student, teacher) if temperature is None else soft_cross_entropy(student, teacher, temperature)


def _soften(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(logits)
    # A temperature below 1 takes masked logits to -inf, whose product with a probability of zero is NaN.
    return (logits / temperature).clamp(min=torch.finfo(logits.dtype).min)


def _mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    # The lowest finite number instead of -inf, whose difference to itself would be NaN.
    logits = at_least_float32(logits)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Raise half precision to float32, and leave float64 as it is. Any shape."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
