"""The equations: golden traces, an exact threshold whatever the scores, and masks of the exact size."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from hf_moebert.methods.platon import functional, functional_selection
from hf_moebert.methods.platon.functional import (
    apply_mask_,
    checksum,
    close_window_,
    sensitivity,
    sum_sensitivity,
    update_movement_,
    update_window_,
)
from hf_moebert.methods.platon.functional_selection import (
    Processes,
    balance_factors,
    best_two_of_four,
    count_zeros,
    keep_largest_,
    kth_smallest,
)


CPU = torch.device("cpu")

# Scores with ties, zeros, denormal numbers and infinities.
SCORES = arrays(
    "float32",
    st.integers(1, 300),
    elements=st.one_of(
        st.sampled_from([0.0, 1e-45, 1e-38, 1.0, 2.0, math.inf]), st.floats(0, 8, width=32), st.floats(-8, 0, width=32)
    ),
)


@pytest.fixture(autouse=True, params=["one chunk", "many chunks"])
def chunk_size(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(functional, "CPU_CHUNK", 8)
        monkeypatch.setattr(functional_selection, "SAMPLE_SIZE", 16)
    return request.param


def score_of(pieces):
    return lambda index, part: pieces[index][part].clone()


def cut(scores, parts=3):
    return list(torch.as_tensor(scores).tensor_split(parts))


def test_golden_trace():
    """dT=2, beta1=.85, beta2=.95, the sensitivities of six steps: hand-computed in the specification."""
    steps = [(1, 2, 3, 4), (4, 3, 2, 1), (2, 2, 2, 2), (0, 0, 8, 0), (1, 1, 1, 1), (0, 5, 0, 5)]
    window, importance, uncertainty = (torch.zeros(4) for _ in range(3))
    seen = {}
    for t, s in enumerate(steps, start=1):
        s = torch.tensor(s, dtype=torch.float32)
        if t % 2:
            update_window_(window, s, 1)
        else:
            close_window_(window, importance, uncertainty, s, beta1=0.85, beta2=0.95)
        seen[t] = [x.clone() for x in (window, importance, uncertainty, importance * uncertainty)]
    expected = {
        1: [(0.5, 1, 1.5, 2)],
        2: [
            (4, 3, 2, 1),
            (0.075, 0.15, 0.225, 0.3),
            (0.02125, 0.0425, 0.06375, 0.085),
            (0.00159375, 0.006375, 0.01434375, 0.0255),
        ],
        3: [(3, 2.5, 2, 1.5)],
        4: [
            (0, 0, 8, 0),
            (0.51375, 0.5025, 0.49125, 0.48),
            (0.1445, 0.14025, 0.136, 0.13175),
            (0.074236875, 0.070475625, 0.06681, 0.06324),
        ],
        5: [(0.5, 0.5, 4.5, 0.5)],
        6: [
            (0, 5, 0, 5),
            (0.5116875, 0.502125, 1.0925625, 0.483),
            (0.137859375, 0.13334375, 0.299571875, 0.1260125),
            (0.0705409, 0.0669552, 0.3273010, 0.0608640),
        ],
    }
    for t, values in expected.items():
        for found, value in zip(seen[t], values, strict=False):
            torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float32), rtol=1e-6, atol=1e-7)


def test_a_window_is_the_mean_of_its_steps():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(2, 7, 50, generator=generator).unbind()
    window = sensitivity(weights[0], gradients[0])
    for position in range(1, 7):
        update_window_(window, sensitivity(weights[position], gradients[position]), position)
    torch.testing.assert_close(window, (weights * gradients).abs().mean(0))


def test_scaled_gradients_scale_the_averages_alike():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(2, 8, 40, generator=generator).unbind()

    def run(scale):
        state = [torch.zeros(40) for _ in range(3)]
        for t in range(1, 8):
            s = sensitivity(weights[t], gradients[t] * scale)
            if t % 3:
                update_window_(state[0], s, t % 3)
            else:
                close_window_(*state, s, beta1=0.85, beta2=0.9)
        return state

    for one, two in zip(run(1.0), run(4.0), strict=True):
        assert torch.equal(one * 4, two)  # a power of two rounds nothing


def test_importance_alone_is_that_beside_an_uncertainty():
    window, importance, s = torch.rand(3, 40).unbind()
    alone, beside = ([window.clone(), importance.clone(), *others] for others in ([None], [torch.zeros(40)]))
    for state in (alone, beside):
        close_window_(*state, s, beta1=0.85, beta2=0.9)
    assert all(torch.equal(*pair) for pair in zip(alone[:2], beside[:2], strict=True))


def test_half_precision_is_multiplied_in_single_precision():
    weight, gradient = torch.full((5,), 1.0078125), torch.full((5,), 1.0078125)  # bf16 would drop their last bit
    exact = weight * gradient
    assert torch.equal(sensitivity(weight.bfloat16(), gradient.bfloat16()), exact)
    assert torch.equal(sum_sensitivity(weight.bfloat16()[:, None], gradient.bfloat16()[:, None], 0), exact)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 40), (0, 4)])
def test_sensitivities_are_summed_over_rows_and_columns(shape):
    weight, gradient = torch.randn(2, *shape).unbind()
    for dim in (0, 1):
        expected = (weight * gradient).abs().sum(1 - dim)
        torch.testing.assert_close(sum_sensitivity(weight, gradient, dim), expected)
        torch.testing.assert_close(sum_sensitivity(weight, None, dim), weight.abs().sum(1 - dim))


def test_movement_grows_where_descent_moves_away_from_zero():
    movement = torch.zeros(4)
    weight, gradient = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([-2.0, 3.0, 4.0, -5.0])
    update_movement_(movement, weight, gradient)
    update_movement_(movement, weight, gradient)
    assert movement.tolist() == [4, -6, 8, -10]


@settings(deadline=None)
@given(SCORES, st.data())
def test_the_threshold_is_that_of_kthvalue(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    pieces = cut(scores)
    score, below = kth_smallest(score_of(pieces), [len(p) for p in pieces], k, CPU)
    flat = torch.as_tensor(scores)
    assert score == float(flat.kthvalue(k).values)
    assert below == int((flat < score).sum())


@pytest.mark.parametrize("zero_share", [0.0, 0.5, 0.95])
def test_the_threshold_is_exact_at_size(zero_share, chunk_size):
    size = 200_000 if chunk_size == "one chunk" else 10_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(size, generator=generator) ** 8
    scores[torch.rand(size, generator=generator) < zero_share] = 0
    pieces = cut(scores, 7)
    for k in (1, 2, size // 2, size * 95 // 100 + 1, size):
        assert kth_smallest(score_of(pieces), [len(p) for p in pieces], k, CPU)[0] == float(scores.kthvalue(k).values)


def test_a_misleading_sample_does_not_change_the_result():
    """Every score that the sample meets is large, so that its bracket is wrong at first."""
    stride = 1000 // 16 // 6 * 6 + 1
    scores = torch.linspace(0, 1, 1000)
    scores[::stride] = 100.0
    for k in (1, 500, 983, 999):
        assert kth_smallest(score_of([scores]), [1000], k, CPU)[0] == float(scores.kthvalue(k).values)


@pytest.mark.parametrize("k", [0, 11])
def test_a_rank_must_exist(k):
    with pytest.raises(ValueError, match=rf"`k` must be from 1 to the number of scores, 10, got {k}"):
        kth_smallest(score_of([torch.rand(10)]), [10], k, CPU)


def test_nan_is_not_ranked():
    with pytest.raises(FloatingPointError, match="must give numbers, got NaN"):
        kth_smallest(score_of([torch.tensor([1.0, math.nan, math.nan])]), [3], 3, CPU)


@settings(deadline=None)
@given(SCORES, st.data())
def test_exactly_so_many_zeros_and_they_are_the_smallest(scores, data):
    zeros = data.draw(st.integers(0, len(scores)))
    pieces = cut(scores)
    keep = [torch.zeros(len(p), dtype=torch.bool) for p in pieces]
    threshold, revived, emptied = keep_largest_(keep, score_of(pieces), zeros)
    kept, flat = torch.cat(keep), torch.as_tensor(scores)
    assert int((~kept).sum()) == zeros
    expected = torch.ones_like(kept)
    expected[flat.argsort(stable=True)[:zeros]] = False  # ties fall by position
    assert torch.equal(kept, expected)
    assert revived == len(scores) - zeros
    assert emptied == sum(not mask.any() for mask in keep)
    assert keep_largest_(keep, score_of(pieces), zeros).revived == 0
    assert kept.all() or not kept.any() or threshold == float(flat[kept].min())


def together(ranks, act):
    """Run an act in as many threads, each as one of the processes that hold the scores, and return their results."""
    barrier, shared = Barrier(ranks, timeout=20), [torch.empty(0)] * ranks

    def act_as(rank):
        def join(values):
            shared[rank] = values
            barrier.wait()
            joined = torch.cat(shared)
            barrier.wait()
            return joined

        try:
            return act(rank, Processes(rank, join))
        except BaseException:
            barrier.abort()  # the others would wait
            raise

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(act_as, range(ranks)))


@settings(deadline=None, max_examples=30)
@given(SCORES, st.data(), st.sampled_from([2, 3]), st.booleans())
def test_processes_keep_together_what_one_would(scores, data, ranks, parity):
    zeros = data.draw(st.integers(0, len(scores)))
    pieces = cut(scores)
    keep = [torch.arange(len(piece)) % 2 == 0 for piece in pieces]
    parts = [list(zip(*(tensor.tensor_split(ranks) for tensor in tensors), strict=True)) for tensors in (pieces, keep)]
    parts = [[[tensor.clone() for tensor in tensors] for tensors in ranked] for ranked in parts]
    alone = keep_largest_(keep, score_of(pieces), zeros, reference_parity=parity)

    def select(rank, processes):
        here, masks = parts[0][rank], parts[1][rank]
        return keep_largest_(masks, score_of(here), zeros, reference_parity=parity, processes=processes)

    assert together(ranks, select) == [alone] * ranks
    for index, mask in enumerate(keep):
        assert torch.equal(torch.cat([masks[index] for masks in parts[1]]), mask)


def test_the_papers_code_keeps_one_more_and_all_of_a_tie():
    keep = [torch.zeros(1000, dtype=torch.bool)]
    scores = torch.randperm(1000).float()
    keep_largest_(keep, score_of([scores]), 800, reference_parity=True)
    assert int((~keep[0]).sum()) == 799
    scores[:] = 0
    scores[900:] = 1
    keep_largest_(keep, score_of([scores]), 800, reference_parity=True)
    assert keep[0].all()


@pytest.mark.parametrize(("numel", "ratio", "zeros"), [(85_017_600, 0.3, 59_512_320), (10, 0.75, 2), (10, 1.0, 0)])
def test_the_number_of_zeros_is_rounded(numel, ratio, zeros):
    assert count_zeros(numel, ratio) == zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_weights_are_positive_zeros(dtype):
    weight = torch.tensor([-1.0, math.nan, -math.inf, -3.0, -0.0], dtype=dtype)
    apply_mask_(weight, torch.tensor([False, False, False, True, True]))
    assert weight.tolist() == [0, 0, 0, -3, 0]
    assert weight.signbit().tolist() == [False, False, False, True, True]  # what is kept keeps every bit


def test_two_of_four():
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 9.0, 0.0])
    assert best_two_of_four(scores).view(-1, 4).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]]


def test_balanced_experts_have_equal_totals():
    totals = torch.tensor([1.0, 3.0, 0.0, 8.0])
    balanced = totals * balance_factors(totals)
    assert balanced.tolist() == [3, 3, 0, 3]


def test_a_checksum_tells_masks_apart():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(50, generator=generator) < 0.5 for _ in range(2)]
    same = checksum([mask.clone() for mask in masks])
    assert torch.equal(checksum(masks), same)
    first, second = (int(masks[0].int().argmax()), int((~masks[0]).int().argmax()))
    masks[0][[first, second]] = masks[0][[second, first]]
    assert not torch.equal(checksum(masks), same)
    assert not torch.equal(checksum(masks[::-1]), checksum(masks))
