import math

import pytest
import torch
from scipy.special import log_softmax as scipy_log_softmax, softmax as scipy_softmax
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from hf_moebert.methods.distillation.functional import (
    classification_loss,
    hidden_state_loss,
    masked_mean,
    multi_label_loss,
    regression_loss,
    soft_cross_entropy,
    span_loss,
    symmetric_kl,
)


MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()  # left, middle or right: any position


def pair(*shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(len(shape))
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)]


def test_equal_inputs_are_at_distance_zero():
    states, logits = torch.randn(3, 4, 5), 30 * torch.randn(3, 4)
    assert hidden_state_loss(states, states, MASK).item() == 0
    assert classification_loss(logits, logits).item() == 0
    assert multi_label_loss(logits, logits).item() == 0
    assert regression_loss(logits, logits).item() == 0
    assert span_loss((logits, logits), (logits, logits), MASK).item() == 0


def test_symmetric_kl_of_two_known_distributions():
    # By hand: p = (e, 1) / (e + 1), q = (1/2, 1/2); 1/2 sum (p - q)(log p - log q) = (p_0 - 1/2) / 2.
    expected = (math.e / (math.e + 1) - 0.5) / 2
    assert symmetric_kl(torch.tensor([1.0, 0.0]), torch.zeros(2)).item() == pytest.approx(expected, abs=1e-7)


def test_symmetric_kl_stays_finite_when_probabilities_underflow():
    # By hand: p = (1, 0, 0), so 1/2 ((2/3) log 3 + (1/3)(120 - log 3) + (1/3)(240 - log 3)) = 60.
    value = symmetric_kl(torch.tensor([120.0, 0.0, -120.0]), torch.zeros(3))
    assert value.item() == pytest.approx(60, abs=1e-4)


def test_symmetric_kl_agrees_with_torch_and_is_symmetric():
    student, teacher = pair(6, 5, scale=3.0)
    log_p, log_q = log_softmax(student, -1), log_softmax(teacher, -1)
    oracle = (kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)) / 2
    oracle += (kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)) / 2
    torch.testing.assert_close(symmetric_kl(student, teacher), oracle)
    assert torch.equal(symmetric_kl(student, teacher), symmetric_kl(teacher, student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_finite_float32_losses_and_gradients(dtype):
    student = torch.tensor([[6e4, 0.0, -6e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-6e4, 0.0, 6e4]], dtype=dtype)
    states = student.unsqueeze(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            classification_loss(student, teacher),
            multi_label_loss(student, teacher),
            regression_loss(student, teacher),
            hidden_state_loss(states, teacher.unsqueeze(0), torch.ones(1, 1).bool()),
            span_loss((student, student), (teacher, teacher), torch.tensor([[1, 1, 0]]).bool()),
        ]
    for loss in losses:
        assert loss.dtype == torch.float32
        assert 0 < loss.item() < math.inf
        (gradient,) = torch.autograd.grad(loss / 1e6, student, retain_graph=True)
        assert gradient.isfinite().all()


def test_hidden_state_loss_averages_each_example_over_its_real_tokens():
    student, teacher = pair(3, 4, 5)
    examples = [(student[i][MASK[i]] - teacher[i][MASK[i]]).square().mean() for i in range(3)]
    torch.testing.assert_close(hidden_state_loss(student, teacher, MASK), torch.stack(examples).mean())


def test_hidden_state_loss_without_a_mask_is_the_plain_mean():
    student, teacher = pair(3, 4, 5)
    torch.testing.assert_close(hidden_state_loss(student, teacher), mse_loss(student, teacher))


def test_token_loss_averages_each_example_over_its_labelled_tokens():
    student, teacher = pair(3, 4, 5)
    examples = [symmetric_kl(student[i][MASK[i]], teacher[i][MASK[i]]).mean() for i in range(3)]
    torch.testing.assert_close(classification_loss(student, teacher, MASK), torch.stack(examples).mean())
    torch.testing.assert_close(classification_loss(student, teacher), symmetric_kl(student, teacher).mean())


def test_span_loss_is_that_of_the_sequences_without_their_padding():
    students, teachers = zip(*(pair(3, 4, scale=s) for s in (1.0, 2.0)), strict=True)
    halves = [
        symmetric_kl(student[i][MASK[i]], teacher[i][MASK[i]]) / 2
        for student, teacher in zip(students, teachers, strict=True)
        for i in range(3)
    ]
    torch.testing.assert_close(span_loss(students, teachers, MASK), torch.stack(halves).sum() / 3)


def test_multi_label_loss_is_the_symmetric_kl_of_each_label_against_its_absence():
    student, teacher = pair(3, 4, scale=3.0)
    both = [torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher)]
    torch.testing.assert_close(multi_label_loss(student, teacher), symmetric_kl(*both).mean())


def test_an_example_without_real_tokens_counts_as_zero():
    student, teacher = pair(2, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    first = mask[:1]
    for loss in (hidden_state_loss, classification_loss):
        torch.testing.assert_close(loss(student, teacher, mask), loss(student[:1], teacher[:1], first) / 2)
    start, end = student[..., 0], student[..., 1]
    torch.testing.assert_close(
        span_loss((start, end), (end, start), mask),
        span_loss((start[:1], end[:1]), (end[:1], start[:1]), first) / 2,
    )


def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient():
    student, teacher = pair(3, 4, 5)
    student[~MASK] = math.nan
    teacher[~MASK] = math.inf
    student.requires_grad_()
    start, end = student[..., 0], student[..., 1]
    for loss in (
        hidden_state_loss(student, teacher, MASK),
        classification_loss(student, teacher, MASK),
        span_loss((start, end), (teacher[..., 0], teacher[..., 1]), MASK),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[~MASK].any()
        assert gradient[MASK].any()


def test_equal_micro_batches_average_to_the_whole_batch():
    student, teacher = pair(6, 4, 5)
    mask = MASK.repeat(2, 1)
    shares = [masked_mean((student - teacher)[i : i + 2].sum(-1), mask[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(masked_mean((student - teacher).sum(-1), mask), torch.stack(shares).mean())


def test_inputs_are_left_untouched():
    student, teacher = pair(3, 4, 5)
    before = student.clone(), teacher.clone(), MASK.clone()
    hidden_state_loss(student, teacher, MASK)
    classification_loss(student, teacher, MASK)
    span_loss((student[..., 0],) * 2, (teacher[..., 0],) * 2, MASK)
    assert all(torch.equal(a, b) for a, b in zip(before, (student, teacher, MASK), strict=True))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda s, t: hidden_state_loss(s, t, MASK), (3, 4, 5)),
        (hidden_state_loss, (3, 4, 5)),
        (lambda s, t: classification_loss(s, t, MASK), (3, 4, 5)),
        (classification_loss, (3, 5)),
        (multi_label_loss, (3, 5)),
        (regression_loss, (3, 1)),
        (lambda s, t: span_loss((s[..., 0], s[..., 1]), (t[..., 0], t[..., 1]), MASK), (3, 4, 2)),
    ],
)
def test_gradients_in_float64(loss, shape):
    student, teacher = pair(*shape)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


# Predictions at a temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_soft_cross_entropy_agrees_with_scipy(temperature):
    student, teacher = pair(6, 5, scale=3.0)
    log_p, q = scipy_log_softmax(student / temperature, -1), scipy_softmax(teacher / temperature, -1)
    oracle = -(temperature**2) * (q * log_p).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature), torch.as_tensor(oracle))


def test_soft_cross_entropy_of_a_certain_teacher_is_the_plain_one():
    student, _ = pair(6, 5)
    gold = torch.tensor([0, 1, 2, 3, 4, 0])
    certain = torch.nn.functional.one_hot(gold, 5) * 1e4
    torch.testing.assert_close(classification_loss(student, certain, temperature=1.0), cross_entropy(student, gold))


def test_a_student_equal_to_its_teacher_feels_no_gradient_at_any_temperature():
    logits, _ = pair(3, 4, scale=3.0)
    student = logits.clone().requires_grad_()
    losses = [
        classification_loss(student, logits, temperature=2.0),
        classification_loss(
            student.unsqueeze(-1) * torch.ones(5), logits.unsqueeze(-1) * torch.ones(5), MASK, temperature=2.0
        ),
        multi_label_loss(student, logits, temperature=2.0),
        span_loss((student, student), (logits, logits), MASK, temperature=0.5),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss > 0
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-15, rtol=0)


def test_softened_losses_of_tokens_and_spans_see_the_real_positions_only():
    student, teacher = pair(3, 4, 5)
    rows = [soft_cross_entropy(student[i][MASK[i]], teacher[i][MASK[i]], 2.0).mean() for i in range(3)]
    torch.testing.assert_close(classification_loss(student, teacher, MASK, temperature=2.0), torch.stack(rows).mean())
    starts, ends = pair(3, 4)
    halves = [soft_cross_entropy(starts[i][MASK[i]], ends[i][MASK[i]], 0.5) for i in range(3)]
    loss = span_loss((starts, starts), (ends, ends), MASK, temperature=0.5)
    torch.testing.assert_close(loss, torch.stack(halves).mean())


def test_softened_multi_label_loss_is_the_binary_cross_entropy_of_softened_labels():
    student, teacher = pair(3, 4, scale=3.0)
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(student / 2, (teacher / 2).sigmoid()) * 4
    torch.testing.assert_close(multi_label_loss(student, teacher, temperature=2.0), oracle)


def test_the_gradient_of_the_softened_loss_is_right():
    student, teacher = pair(3, 4)
    assert torch.autograd.gradcheck(lambda logits: soft_cross_entropy(logits, teacher, 2.0), student.requires_grad_())
