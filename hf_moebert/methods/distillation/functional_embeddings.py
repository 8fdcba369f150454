"""The distance of a student's embeddings and scores from its teacher's, on plain tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import at_least_float32


def embedding_loss(student: Tensor, teacher: Tensor, distance: str = "cosine") -> Tensor:
    """Compute the mean distance between the embeddings of the same texts.

    Args:
        student: Embeddings. Shape `(batch, hidden)`.
        teacher: Embeddings. Shape as `student`.
        distance: `cosine`, one minus the cosine; or `squared`, the mean square of the differences.

    Returns:
        The loss. Shape `()`.

    Source: squared, Reimers and Gurevych 2020, https://arxiv.org/abs/2004.09813, eq. 1; cosine is our own design.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if distance == "squared":
        return (student - teacher).square().mean()
    # With unit vectors, 1 - cosine is half the squared difference: exactly 0 for equal ones, unlike 1 - product.
    difference = F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)  # (batch, hidden)
    return difference.square().sum(-1).mean() / 2


def similarity_loss(student: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
    """Compare which texts of a batch are like which, by the cosines of their embeddings.

    Student and teacher may have embeddings of different sizes. The value depends on what else is in the batch.

    Args:
        student: Embeddings. Shape `(batch, hidden)`.
        teacher: Embeddings. Shape `(batch, another hidden)`.
        temperature: Each text's cosines with the others, divided by it, are the logits of its neighbours, and the loss
            is the divergence KL(teacher || student), mean over texts. Without it, the mean squared difference of the
            cosines of all pairs.

    Returns:
        The loss; 0 for a batch of one. Shape `()`.

    Source: with a temperature, Fang et al. 2021, https://arxiv.org/abs/2101.04731, with the batch in place of a queue;
    without it, Tung and Mori 2019, https://arxiv.org/abs/1907.09682, of cosines. The text itself is left out, and the
    divergence is without the constant entropy of the teacher: our own choice.
    """
    ours, theirs = (_cosines(at_least_float32(embeddings)) for embeddings in (student, teacher))
    if len(ours) < 2:
        return ours.sum() * 0
    if temperature is None:
        return (ours - theirs).square().mean()
    log_p, log_q = (F.log_softmax(cosines / temperature, dim=-1) for cosines in (ours, theirs))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def _cosines(embeddings: Tensor) -> Tensor:
    """Return the cosine of each vector with the others. Shape `(batch, batch - 1)`."""
    unit = F.normalize(embeddings, dim=-1)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return (unit @ unit.T)[others].view(len(unit), -1)


def margin_loss(student: Tensor, teacher: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Compare by how much one text of a query is above another, whatever the level of the scores.

    Args:
        student: Scores. Shape `(batch,)`.
        teacher: Scores. Shape `(batch,)`.
        groups: Query of each text. Shape `(batch,)`.

    Returns:
        The mean squared difference of the margins of all pairs of one query, 0 if there are none, shape `()`; and
        the number of pairs, shape `()`.

    Source: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666, section 4; of all pairs, as there are no labels
    that tell which is relevant: our own choice.
    """
    excess = at_least_float32(student) - at_least_float32(teacher)  # its differences are those of the margins
    pairs = (groups[:, None] == groups[None]).triu(diagonal=1)  # (batch, batch)
    count = pairs.sum()
    return ((excess[:, None] - excess[None]).square() * pairs).sum() / count.clamp(min=1), count
