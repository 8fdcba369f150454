"""The recursions against sums over every tag sequence, against pytorch-crf, and at extreme numbers."""

import itertools

import numpy as np
import pytest
import torch
import torchcrf
from hypothesis import given, settings, strategies as st

from hf_moebert.methods.masked_crf.functional import log_partition, marginals, sequence_score
from hf_moebert.methods.masked_crf.functional_decoding import best_sequences, make_finite, viterbi
from hf_moebert.methods.masked_crf.functional_numpy import viterbi as numpy_viterbi
from hf_moebert.methods.masked_crf.functional_passes import Scores, filter_words, filter_words_exactly
from hf_moebert.methods.masked_crf.functional_tags import legal_moves
from hf_moebert.methods.masked_crf.functional_words import pack_words, unpack_words


def draw(words, batch, tags, *, seed=0, scale=1.0, dtype=torch.float64, forbidden=0.0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    scores = Scores(numbers(tags, tags), numbers(tags), numbers(tags))
    if forbidden:  # what leads on stays: every tag may follow itself, start and end
        mask = (torch.rand(tags, tags, generator=generator) < forbidden) & ~torch.eye(tags, dtype=torch.bool)
        scores = scores._replace(transitions=scores.transitions.masked_fill(mask, -torch.inf))
    return numbers(words, batch, tags) * scale, scores


def every_sequence(emissions, scores):
    """Score all tag sequences of one row in float64; `emissions` is `(words, tags)`."""
    emissions, scores = emissions.double(), Scores(*(score.double() for score in scores))
    sequences = list(itertools.product(range(emissions.shape[1]), repeat=len(emissions)))
    values = []
    for tags in sequences:
        value = scores.start[tags[0]] + scores.end[tags[-1]] + sum(emissions[t, tag] for t, tag in enumerate(tags))
        values.append(value + sum(scores.transitions[a, b] for a, b in itertools.pairwise(tags)))
    return sequences, torch.stack(values)


def reference_log_partition(emissions, scores):
    """The recursion in float64 and logarithms, for one row that is too long for every sequence."""
    emissions, scores = emissions.double(), Scores(*(score.double() for score in scores))
    current = emissions[0] + scores.start
    for emission in emissions[1:]:
        current = torch.logsumexp(current[:, None] + scores.transitions, 0) + emission
    return torch.logsumexp(current + scores.end, 0)


@pytest.mark.parametrize("forbidden", [0.0, 0.5])
@pytest.mark.parametrize(("words", "tags"), [(1, 1), (1, 3), (2, 2), (5, 2), (4, 3)])
def test_log_partition_sums_over_every_sequence(words, tags, forbidden):
    emissions, scores = draw(words, 3, tags, seed=words * tags, forbidden=forbidden)
    lengths = torch.tensor([words, max(1, words - 1), 1])
    found = log_partition(emissions, lengths, scores)
    for row, length in enumerate(lengths.tolist()):
        _, values = every_sequence(emissions[:length, row], scores)
        torch.testing.assert_close(found[row], values.logsumexp(0))


def test_the_fixed_case():
    """Computed by hand from the definition, over all 81 paths: see the formula of the scores below."""
    emissions = torch.tensor([[0.1 * (t + 1) * ((7 * y + 3 * t) % 5) - 0.2 * y for y in range(3)] for t in range(4)])
    moves = torch.tensor([[0.05 * (i - 2 * j) for j in range(3)] for i in range(3)])
    scores = Scores(moves, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, -0.1, 0.05]))
    emissions, length = emissions[:, None].double(), torch.tensor([4])
    scores = Scores(*(score.double() for score in scores))
    legal = legal_moves(["O", "B", "I"], "IOB2")
    masked = Scores(*(score.masked_fill(~mask, -torch.inf) for score, mask in zip(scores, legal, strict=True)))

    assert log_partition(emissions, length, scores).item() == pytest.approx(6.0271346705, abs=1e-7)
    assert log_partition(emissions, length, masked).item() == pytest.approx(5.2196574607, abs=1e-7)
    _, values = every_sequence(emissions[:, 0], masked)
    assert (len(values), int((values > -torch.inf).sum())) == (81, 34)
    for chain, path, value in ((scores, [2, 0, 1, 0], 3.25), (masked, [1, 0, 1, 0], 3.10)):
        found = viterbi(emissions, length, chain)
        assert found[:, 0].tolist() == path
        assert sequence_score(emissions, found, length, chain).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES", "BILOU"])
@pytest.mark.parametrize(
    ("types", "counts"),
    [(1, [2, 5, 13, 34, 89, 233]), (2, [3, 11, 41, 153, 571, 2131]), (3, [4, 19, 91, 436, 2089, 10009])],
)
def test_schemes_spell_equally_many_segmentations(scheme, types, counts):
    """With scores of zero the sum counts legal paths: those that the schemes' segments can be laid out in."""
    prefixes = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}[scheme]
    labels = ["O", *(f"{prefix}-{kind}" for kind in range(types) for prefix in prefixes)]
    scores = Scores(*(torch.where(mask, 0.0, -torch.inf).double() for mask in legal_moves(labels, scheme)))
    for words, count in enumerate(counts, start=1):
        found = log_partition(torch.zeros(words, 1, len(labels)).double(), torch.tensor([words]), scores)
        assert found.exp().item() == pytest.approx(count)


def with_peer(words=12, batch=6, tags=5):
    emissions, scores = draw(words, batch, tags, seed=5, dtype=torch.float32)
    peer = torchcrf.CRF(tags)
    with torch.no_grad():
        for name, score in zip(("transitions", "start_transitions", "end_transitions"), scores, strict=True):
            getattr(peer, name).copy_(score)
    lengths = torch.tensor([words, 1, 7, 3, words, 5])
    mask = torch.arange(words)[:, None] < lengths
    gold = torch.randint(tags, (words, batch), generator=torch.Generator().manual_seed(6))
    return emissions, scores, lengths, mask, gold, peer


def test_unmasked_is_the_peer():
    emissions, scores, lengths, mask, gold, peer = with_peer()
    expected = peer(emissions, gold, mask, reduction="none")
    found = sequence_score(emissions, gold, lengths, scores) - log_partition(emissions, lengths, scores)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tags = viterbi(emissions, lengths, scores)
    assert [tags[:length, row].tolist() for row, length in enumerate(lengths)] == peer.decode(emissions, mask)


def test_gradients_are_those_of_the_peer():
    emissions, scores, lengths, mask, gold, peer = with_peer()
    leaves = [emissions.clone().requires_grad_(), *(score.clone().requires_grad_() for score in scores)]
    chain = Scores(*leaves[1:])
    weights = torch.arange(1.0, 7.0)
    (
        weights * (sequence_score(leaves[0], gold, lengths, chain) - log_partition(leaves[0], lengths, chain))
    ).sum().backward()
    theirs = emissions.clone().requires_grad_()
    (weights * peer(theirs, gold, mask, reduction="none")).sum().backward()
    expected = [theirs.grad, peer.transitions.grad, peer.start_transitions.grad, peer.end_transitions.grad]
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gap", [1.0, 3000.0])  # the second takes the way through logarithms
def test_gradients_match_finite_differences(gap):
    emissions, scores = draw(4, 3, 3, seed=2, forbidden=0.5)
    emissions[1, :, 0] += gap * (torch.arange(3) % 2)
    lengths = torch.tensor([4, 2, 0])
    legal = scores.transitions > -torch.inf
    free = torch.where(legal, scores.transitions, 0).requires_grad_()
    emissions.requires_grad_()

    def total(emissions, free, start, end):
        chain = Scores(torch.where(legal, free, -torch.inf), start, end)
        return log_partition(emissions, lengths, chain)

    assert torch.autograd.gradcheck(
        total, (emissions, free, scores.start.requires_grad_(), scores.end.requires_grad_()), atol=1e-4
    )


def test_what_is_forbidden_has_no_gradient():
    emissions, scores = draw(6, 2, 4, seed=3, forbidden=0.4)
    legal = scores.transitions > -torch.inf
    free = torch.where(legal, scores.transitions, 5.0).requires_grad_()
    chain = scores._replace(transitions=free.masked_fill(~legal, -torch.inf))
    log_partition(emissions, torch.tensor([6, 4]), chain).sum().backward()
    assert torch.equal(free.grad[~legal], torch.zeros(int((~legal).sum())).double())
    assert (free.grad[legal] > 0).all()


def test_marginals_are_shares_of_every_sequence():
    emissions, scores = draw(4, 2, 3, seed=4, forbidden=0.4)
    lengths = torch.tensor([4, 3])
    found = marginals(emissions, lengths, scores)
    for row, length in enumerate(lengths.tolist()):
        sequences, values = every_sequence(emissions[:length, row], scores)
        chances = (values - values.logsumexp(0)).exp()
        for word in range(length):
            expected = torch.zeros(3).double()
            for tags, chance in zip(sequences, chances, strict=True):
                expected[tags[word]] += chance
            torch.testing.assert_close(found[word, row], expected)
    assert not found[3, 1].any()


DEAD_END = torch.tensor([[-1e4, 0.3, -0.2], [0.1, 0.2, -0.1], [0.4, -0.3, 0.2]])


@pytest.mark.parametrize("gap", [0.0, 12.0, 30.0, 100.0, 200.0, 1000.0])
@pytest.mark.parametrize("forbidden", [-1e4, -torch.inf])
@pytest.mark.parametrize("where", ["everywhere", "first", "last", "middle"])
def test_a_forbidden_favourite_costs_no_accuracy(gap, forbidden, where):
    """The model is sure of a tag that must not follow itself, or must not be left: the rest must not drown in it."""
    emissions, scores = draw(24, 2, 3, seed=7, dtype=torch.float32)
    words = {"everywhere": slice(None), "first": 0, "last": -1, "middle": 11}[where]
    emissions[words, :, 0] += gap
    lengths = torch.tensor([24, 15])
    for moves in (DEAD_END, DEAD_END.T.clone(), torch.where(torch.eye(3) > 0, 0.1, DEAD_END[0, 0])):
        chain = scores._replace(transitions=moves.clamp(min=-1e4).masked_fill(moves == -1e4, forbidden))
        found = log_partition(emissions, lengths, chain)
        expected = torch.stack([reference_log_partition(emissions[:n, row], chain) for row, n in enumerate((24, 15))])
        error = ((found.double() - expected) / expected.abs().clamp(min=1)).abs().max()
        assert error <= 1e-6, error
        chances = marginals(emissions, lengths, chain)
        assert torch.isfinite(chances).all()
        torch.testing.assert_close(chances[:15].sum(2), torch.ones(15, 2), rtol=0, atol=2e-5)


def test_a_favourite_at_a_dead_end_is_seen_through():
    """The favourite's one way on costs far more than it gained: all that counts has underflowed beside it."""
    emissions = torch.zeros(2, 1, 3)
    emissions[0, 0, 1], emissions[1, 0, 2] = 1000.0, -5000.0
    moves = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0], [0.0, 0.0, -torch.inf]])
    chain = Scores(moves, torch.zeros(3), torch.tensor([0.0, -torch.inf, 0.0]))
    fast = filter_words(emissions, chain)
    assert fast.inflow[1, 0, 0] == 0  # the plain way has lost the path O O
    expected = reference_log_partition(emissions[:, 0], chain)
    assert log_partition(emissions, torch.tensor([2]), chain).item() == pytest.approx(expected.item(), rel=1e-6)
    assert marginals(emissions, torch.tensor([2]), chain)[0, 0].tolist() == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)


@pytest.mark.parametrize("gap", [86.0, 90.0, 96.0, 100.0, 103.0, 104.0, 1000.0])
@pytest.mark.parametrize("words", [1, 3])
def test_a_favourite_that_cannot_be_last(words, gap):
    """On the way to the end, what counts is as small as the smallest numbers there are."""
    legal = legal_moves(["O", "B-X", "I-X", "E-X", "S-X"], "IOBES")
    scores = Scores(*(torch.where(mask, 0.0, -torch.inf) for mask in legal))
    emissions = torch.zeros(words, 1, 5)
    emissions[-1, 0, 1] = gap
    expected = reference_log_partition(emissions[:, 0], scores).item()
    assert log_partition(emissions, torch.tensor([words]), scores).item() == pytest.approx(expected, rel=1e-6)
    assert marginals(emissions, torch.tensor([words]), scores)[-1, 0, 1] == 0


def test_rows_that_count_for_nothing_leave_gradients_alone():
    """One row has no words, and one no legal sequence: its loss is dropped, and NaN must not come back from there."""
    moves = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
    start, end = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    leaves = [leaf.clone().requires_grad_() for leaf in (moves, start, end)]
    emissions = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = log_partition(emissions, torch.tensor([2, 3, 0]), Scores(*leaves))
    assert found[0].isfinite()
    found[[0, 2]].sum().backward()
    for leaf in (emissions, *leaves):
        assert leaf.grad.isfinite().all()
    assert not emissions.grad[:, 1:].any()


def test_marginals_in_inference_mode():
    emissions, scores = draw(4, 2, 3, seed=4)
    with torch.inference_mode():
        found = marginals(emissions * 1, torch.tensor([4, 2]), scores)
    assert torch.equal(found, marginals(emissions, torch.tensor([4, 2]), scores))


def test_both_ways_agree():
    emissions, scores = draw(9, 4, 5, seed=8, forbidden=0.3)
    fast, slow = filter_words(emissions, scores), filter_words_exactly(emissions, scores)
    torch.testing.assert_close(fast.share.log(), slow.share)
    torch.testing.assert_close(fast.inflow[1:].log() + scores.transitions.max(), slow.inflow[1:])


def test_a_row_does_not_feel_its_neighbours():
    emissions, scores = draw(8, 3, 4, seed=9, dtype=torch.float32)
    lengths = torch.tensor([8, 5, 1])
    alone = [log_partition(emissions[:n, [row]], torch.tensor([n]), scores)[0] for row, n in enumerate((8, 5, 1))]
    torch.testing.assert_close(log_partition(emissions, lengths, scores), torch.stack(alone), rtol=1e-6, atol=1e-6)
    garbage = emissions.clone()
    garbage[5:, 1] = 77.0
    torch.testing.assert_close(log_partition(garbage, lengths, scores)[1], alone[1], rtol=1e-6, atol=1e-6)


def test_empty_rows_and_batches():
    emissions, scores = draw(3, 2, 4)
    emissions.requires_grad_()
    total = log_partition(emissions, torch.tensor([0, 3]), scores)
    total.sum().backward()
    assert total[0] == 0
    assert not emissions.grad[:, 0].any()
    for shape in ((0, 2, 4), (3, 0, 4), (0, 0, 4)):
        nothing, lengths = torch.zeros(shape).double(), torch.zeros(shape[1], dtype=torch.long)
        assert torch.equal(log_partition(nothing, lengths, scores), torch.zeros(shape[1]).double())
        assert viterbi(nothing, lengths, scores).shape == shape[:2]


def test_permuted_labels_give_permuted_results():
    emissions, scores = draw(6, 3, 5, seed=10)
    lengths, order = torch.tensor([6, 4, 2]), torch.tensor([3, 0, 4, 1, 2])
    other = Scores(scores.transitions[order][:, order], scores.start[order], scores.end[order])
    torch.testing.assert_close(
        log_partition(emissions[..., order], lengths, other), log_partition(emissions, lengths, scores)
    )
    assert torch.equal(
        order[viterbi(emissions[..., order], lengths, other)][:2], viterbi(emissions, lengths, scores)[:2]
    )


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(1, 5),
    tags=st.integers(1, 4),
    batch=st.sampled_from([1, 3, 200]),  # numpy, numpy, torch
    scale=st.sampled_from([0.0, 1.0, 60.0, 1e4, 1e6]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31 - 1),
)
def test_viterbi_finds_the_best_of_every_legal_sequence(words, tags, batch, scale, dtype, seed):
    emissions, scores = draw(words, batch, tags, seed=seed, forbidden=0.5)
    emissions = make_finite((emissions * scale).to(dtype))
    scores = Scores(*(score.to(emissions.dtype) for score in scores))
    lengths = torch.arange(batch) % words + 1
    found = viterbi(emissions, lengths, scores)
    own = sequence_score(emissions.double(), found, lengths, Scores(*(score.double() for score in scores)))
    assert (own > -torch.inf).all()  # legal
    for row in range(min(batch, 3)):
        _, values = every_sequence(emissions[: lengths[row], row], scores)
        rounding = 8 * words * torch.finfo(emissions.dtype).eps * max(1.0, float(emissions[:, row].abs().max()))
        assert own[row] >= values.max() - rounding


def test_numpy_and_torch_decode_alike():
    emissions, scores = draw(20, 64, 9, seed=11, dtype=torch.float32, forbidden=0.3)
    lengths = torch.randint(1, 21, (64,), generator=torch.Generator().manual_seed(1))
    mine = viterbi(emissions, lengths, scores)  # 64 x 9 x 9 is too much for numpy to be faster
    arrays = [score.numpy() for score in scores]
    theirs = numpy_viterbi(emissions.numpy(), lengths.numpy(), arrays[0], start=arrays[1], end=arrays[2])
    real = np.arange(20)[:, None] < lengths.numpy()
    assert (mine.numpy() == theirs)[real].all()


@pytest.mark.parametrize("forbidden", [0.0, 0.6])
def test_the_best_sequences_are_the_best_of_all(forbidden):
    emissions, scores = draw(4, 2, 3, seed=12, forbidden=forbidden)
    lengths = torch.tensor([4, 2])
    tags, found = best_sequences(emissions, lengths, scores, number=12)
    for row, length in enumerate(lengths.tolist()):
        sequences, values = every_sequence(emissions[:length, row], scores)
        expected = values.sort(descending=True).values[:12]
        expected = torch.cat([expected, torch.full((12 - len(expected),), -torch.inf).double()])
        torch.testing.assert_close(found[:, row], expected)
        for rank in range(int((expected > -torch.inf).sum())):
            path = tuple(tags[rank, :length, row].tolist())
            torch.testing.assert_close(values[sequences.index(path)], expected[rank])


def test_one_best_sequence_is_viterbi():
    emissions, scores = draw(7, 5, 4, seed=13, forbidden=0.3)
    lengths = torch.tensor([7, 1, 3, 5, 7])
    tags, _ = best_sequences(emissions, lengths, scores, number=1)
    real = torch.arange(7)[:, None] < lengths
    assert torch.equal(tags[0][real], viterbi(emissions, lengths, scores)[real])


def test_words_are_packed_and_put_back():
    values = torch.arange(24.0).view(2, 6, 2)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    packed, lengths, positions = pack_words(values, mask)
    assert lengths.tolist() == [3, 0]
    assert packed[:, 0].tolist() == values[0, [1, 3, 4]].tolist()
    assert not packed[:, 1].any()
    back = unpack_words(packed, mask, positions, fill=-1.0)
    assert torch.equal(back[mask], values[mask])
    assert (back[~mask] == -1).all()


def test_infinite_and_missing_numbers_are_made_finite():
    wild = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e36, 3.0])
    assert make_finite(wild).tolist() == pytest.approx([1e30, -1e30, -1e30, 1e30, 3.0])
    assert make_finite(wild.half()).dtype == torch.float32
