"""Losses of single examples and tokens against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from hf_moebert.architectures import functional_losses as functional


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_per_example_losses_average_to_the_hosts_loss(problem_type):
    logits = torch.randn(5, 3, generator=seeded())
    if problem_type == "single_label_classification":
        labels, wanted = torch.tensor([0, 2, 1, 1, 0]), F.cross_entropy
    elif problem_type == "multi_label_classification":
        labels, wanted = torch.randint(2, (5, 3), generator=seeded()).float(), F.binary_cross_entropy_with_logits
    else:
        labels, wanted = torch.randn(5, 3, generator=seeded(1)), F.mse_loss
    losses = functional.per_example_loss(logits, labels, problem_type)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses.mean(), wanted(logits, labels))


def test_token_and_span_losses():
    logits = torch.randn(2, 4, 3, generator=seeded())
    labels = torch.tensor([[0, 1, -100, 2], [-100, -100, 1, -100]])
    losses = functional.token_loss(logits, labels)
    assert losses[labels == -100].eq(0).all()
    torch.testing.assert_close(losses.sum() / 4, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    start, end = torch.randn(2, 4, generator=seeded()), torch.randn(2, 4, generator=seeded(1))
    spans = functional.span_loss(start, end, torch.tensor([1, 9]), torch.tensor([[2], [9]]))
    wanted = (F.cross_entropy(start[:1], torch.tensor([1])) + F.cross_entropy(end[:1], torch.tensor([2]))) / 2
    torch.testing.assert_close(spans[0], wanted)
    assert spans[1] == 0  # the answer is elsewhere
