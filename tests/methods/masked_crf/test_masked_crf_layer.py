"""The layer: masks of any pattern, policies for illegal labels, and only legal sequences."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

from hf_moebert.measuring.metrics.seqeval.seqeval import find_spans
from hf_moebert.methods.masked_crf import MaskedCRF
from hf_moebert.methods.masked_crf.functional_segments import find_segments, plain_tags
from hf_moebert.methods.masked_crf.functional_tags import PREFIXES, count_breaks


IOB2 = ["O", "B-X", "I-X", "B-Y", "I-Y"]
SCHEMES = ("IOB2", "IOBES", "BILOU", "BMES", "IOB1", "IOE1", "IOE2")


def labels_of(scheme, types="XY"):
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in PREFIXES[scheme] if prefix != "O")]


def random_crf(labels=IOB2, seed=0, scale=1.0, **options):
    crf = MaskedCRF(labels, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return crf


def random_rows(tags, *, rows=4, seq=9, seed=1, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    emissions = torch.randn(rows, seq, tags, generator=generator)
    return emissions, torch.rand(rows, seq, generator=generator) < share


def names_of(crf, tags):
    return [[crf.labels[tag] for tag in row.tolist() if tag != -100] for row in tags]


def test_every_move_legal_is_a_plain_crf():
    emissions, mask = random_rows(5)
    gold = torch.zeros_like(mask, dtype=torch.long)
    results = []
    for options in ({"mask_transitions": "off"}, {"tag_scheme": "none"}):
        crf = random_crf(**options)
        results.append((crf.log_likelihood(emissions, gold, mask), crf.decode(emissions, mask)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_new_layer_without_masks_picks_the_highest_emission():
    crf = MaskedCRF(IOB2, mask_transitions="off")
    emissions, mask = random_rows(5)
    assert torch.equal(crf.decode(emissions, mask), emissions.argmax(2).masked_fill(~mask, -100))
    torch.testing.assert_close(crf.marginals(emissions, mask)[mask], emissions.softmax(2)[mask])


@settings(max_examples=120, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    mask_transitions=st.sampled_from(["training", "decoding"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    scale=st.sampled_from([0.0, 1.0, 60.0, 1e6, 1e38]),
    rows=st.sampled_from([1, 3, 40]),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_emissions_give_an_illegal_sequence(scheme, mask_transitions, dtype, scale, rows, seed):
    crf = random_crf(labels_of(scheme), seed=seed, scale=10.0, tag_scheme=scheme, mask_transitions=mask_transitions)
    emissions, mask = random_rows(len(crf.labels), rows=rows, seed=seed)
    emissions = (emissions.double() * scale).to(dtype)  # beyond the range of some dtypes: infinite
    emissions[0, 0, 0] = torch.nan
    tags = crf.decode(emissions, mask)
    assert torch.equal(tags == -100, ~mask)
    assert not any(count_breaks(row, scheme) for row in names_of(crf, tags))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_favourite_that_is_illegal_is_never_taken(scheme):
    """The worst case: emissions that want an inner tag everywhere, by far more than any score could outweigh."""
    crf = random_crf(labels_of(scheme), tag_scheme=scheme, scale=100.0)
    inner = next(
        index for index, label in enumerate(crf.labels) if label[0] in "IEL" and scheme != "IOB1" or index == 1
    )
    emissions = torch.zeros(2, 5, len(crf.labels))
    emissions[..., inner] = 1e30
    for tags in (
        crf.decode(emissions, torch.ones(2, 5).bool()),
        crf.decode(emissions.half(), torch.ones(2, 5).bool()),
    ):
        assert not any(count_breaks(row, scheme) for row in names_of(crf, tags))


def test_what_is_no_word_does_not_count():
    crf = random_crf()
    emissions, mask = random_rows(5)
    mask[0, 0], mask[1, 3], mask[2], mask[3] = False, False, False, True  # first, middle, an empty row, a full one
    gold = torch.ones_like(mask, dtype=torch.long)  # "B-X" everywhere is legal
    found = crf.log_likelihood(emissions, gold, mask)
    tags, chances = crf.decode(emissions, mask), crf.marginals(emissions, mask)
    assert found[2] == 0
    assert (tags[2] == -100).all()
    for row in range(4):
        words = mask[row].nonzero()[:, 0]
        if len(words):
            alone, ones = emissions[row, words][None], torch.ones(1, len(words)).bool()
            torch.testing.assert_close(found[row], crf.log_likelihood(alone, gold[:1, : len(words)], ones)[0])
            assert torch.equal(tags[row, words], crf.decode(alone, ones)[0])
            torch.testing.assert_close(chances[row, words], crf.marginals(alone, ones)[0])
    noise = torch.where(mask[..., None], emissions, 1e4)
    torch.testing.assert_close(crf.log_likelihood(noise, gold, mask), found)
    assert torch.equal(crf.decode(noise, mask), tags)


def test_probabilities_of_legal_sequences_add_up_to_one():
    crf = random_crf()
    emissions = random_rows(5, rows=1, seq=4)[0].repeat(5**4, 1, 1)
    gold = torch.cartesian_prod(*[torch.arange(5)] * 4)
    mask = torch.ones(5**4, 4).bool()
    soft = copy.deepcopy(crf)
    soft.illegal_labels = "ignore"
    likelihood, counted = soft.likelihood_and_rows(emissions, gold, mask)
    torch.testing.assert_close(likelihood[counted].exp().sum(), torch.tensor(1.0))
    assert 0 < counted.sum() < 5**4


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from([*SCHEMES, "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    exponent=st.integers(-3, 38),
    discrete=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_marginals_of_any_finite_emissions_add_up_to_one(scheme, dtype, exponent, discrete, seed):
    crf = random_crf(labels_of("IOB2" if scheme == "none" else scheme), seed=seed, tag_scheme=scheme)
    emissions, mask = random_rows(len(crf.labels), seed=seed)
    emissions = emissions.sign() if discrete else emissions  # many ties
    found = crf.marginals((emissions.double() * 10.0**exponent).clamp(-3e38, 3e38).to(dtype), mask)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), mask.to(dtype), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    types=st.sets(st.sampled_from("abcde"), min_size=1),
    specials=st.sets(st.sampled_from(["[PAD]", "[CLS]", "X", "</s>"])),
    seed=st.integers(0, 2**31 - 1),
)
def test_seqeval_finds_no_illegal_segment_in_what_is_decoded(scheme, types, specials, seed):
    labels = [*specials, *labels_of(scheme, sorted(types))]
    crf = random_crf(labels, seed=seed, scale=3.0, tag_scheme=scheme)
    emissions, mask = random_rows(len(labels), rows=5, seq=12, seed=seed)
    tags = [plain_tags(row, scheme) for row in names_of(crf, crf.decode(emissions, mask))]
    wanted = [{(segment.type, segment.start, segment.stop - 1) for segment in find_segments(row)} for row in tags]
    assert find_spans(tags) == wanted
    if scheme != "IOE1":  # which seqeval does not read strictly
        assert find_spans(tags, True, scheme=scheme) == wanted


ILLEGAL = torch.tensor([[0, 2, 2, 0], [0, 1, 2, 0], [2, 0, 0, 0]])  # O I-X I-X O; O B-X I-X O; I-X O O O


def test_illegal_labels_are_refused_with_their_row():
    crf = random_crf()
    emissions, mask = random_rows(5, rows=3, seq=4)[0], torch.ones(3, 4).bool()
    with pytest.raises(ValueError, match="scheme IOB2, row 0 of the batch is O I-X I-X O"):
        crf.log_likelihood(emissions, ILLEGAL, mask)


def test_illegal_labels_are_left_out():
    crf = random_crf(illegal_labels="ignore")
    emissions = random_rows(5, rows=3, seq=4)[0].requires_grad_()
    found = crf.log_likelihood(emissions, ILLEGAL, torch.ones(3, 4).bool())
    found.sum().backward()
    assert found[[0, 2]].tolist() == [0, 0]
    assert not emissions.grad[[0, 2]].any()
    assert emissions.grad[1].any()
    assert torch.isfinite(crf.transitions.grad).all()


def test_illegal_labels_are_repaired():
    emissions, mask = random_rows(5, rows=3, seq=4)[0], torch.ones(3, 4).bool()
    mended = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 0], [1, 0, 0, 0]])
    found = random_crf(illegal_labels="repair").log_likelihood(emissions, ILLEGAL, mask)
    torch.testing.assert_close(found, random_crf().log_likelihood(emissions, mended, mask))


def test_soft_is_a_finite_score():
    """As in the paper: all paths count, illegal moves at the score `c`; far below zero that is forbidding them."""
    emissions, mask = random_rows(5, rows=3, seq=4)[0], torch.ones(3, 4).bool()
    crf = random_crf(illegal_labels="soft", illegal_score=-3.0)
    plain = random_crf(mask_transitions="off")
    with torch.no_grad():
        for score, legal in zip((plain.transitions, plain.start, plain.end), crf.legality(), strict=True):
            score.masked_fill_(~legal, -3.0)
    torch.testing.assert_close(
        crf.log_likelihood(emissions, ILLEGAL, mask), plain.log_likelihood(emissions, ILLEGAL, mask)
    )
    far = random_crf(illegal_labels="soft", illegal_score=-1e4)
    torch.testing.assert_close(far.log_partition(emissions, mask), random_crf().log_partition(emissions, mask))
    assert not any(count_breaks(row, "IOB2") for row in names_of(crf, crf.decode(emissions * 100, mask)))


def test_masked_decoding_trains_like_a_plain_crf():
    emissions, mask = random_rows(5, rows=3, seq=4)[0], torch.ones(3, 4).bool()
    plain, decoding = random_crf(mask_transitions="off"), random_crf(mask_transitions="decoding")
    assert torch.equal(
        plain.log_likelihood(emissions, ILLEGAL, mask), decoding.log_likelihood(emissions, ILLEGAL, mask)
    )
    assert not any(count_breaks(row, "IOB2") for row in names_of(decoding, decoding.decode(emissions * 9, mask)))


def test_gradient_descent_is_the_projection_of_the_paper():
    """The published algorithm steps on all scores and then overwrites the illegal ones; ours never reads them."""
    emissions, mask = random_rows(5, rows=3, seq=6)
    gold = torch.zeros(3, 6, dtype=torch.long)
    gold[:, 1:3] = torch.tensor([1, 2])
    mask = torch.ones_like(mask)
    ours, theirs = random_crf(), random_crf(mask_transitions="off")
    masks = ours.legality()
    for _ in range(20):
        for crf in (ours, theirs):
            if crf is theirs:
                with torch.no_grad():
                    for score, legal in zip((crf.transitions, crf.start, crf.end), masks, strict=True):
                        score.masked_fill_(~legal, -1e4)
            loss = -crf.log_likelihood(emissions, gold, mask).mean()
            for parameter, gradient in zip(
                crf.parameters(), torch.autograd.grad(loss, [*crf.parameters()]), strict=True
            ):
                parameter.data -= 0.5 * gradient
    for name, legal in zip(("transitions", "start", "end"), masks, strict=True):
        torch.testing.assert_close(getattr(ours, name)[legal], getattr(theirs, name)[legal], rtol=1e-6, atol=1e-6)


def test_illegal_scores_have_no_gradient():
    crf = random_crf()
    emissions, mask = random_rows(5)
    crf.log_likelihood(emissions, torch.ones_like(mask, dtype=torch.long), mask).sum().backward()
    for name, legal in zip(("transitions", "start", "end"), crf.legality(), strict=True):
        assert not getattr(crf, name).grad[~legal].any()
        assert getattr(crf, name).grad[legal].any()


def test_decoding_with_known_tags():
    crf = random_crf()
    emissions, mask = random_rows(5)
    mask[:, 2:4] = True
    allowed = torch.ones(*mask.shape, 5).bool()
    allowed[:, 3] = torch.tensor([False, False, True, False, False])  # only "I-X"
    tags = crf.decode(emissions * 20, mask, allowed=allowed)
    assert (tags[:, 3] == 2).all()
    assert set(tags[:, 2].tolist()) <= {1, 2}
    assert not any(count_breaks(row, "IOB2") for row in names_of(crf, tags))
    assert torch.equal(crf.decode(emissions, mask, allowed=torch.ones_like(allowed)), crf.decode(emissions, mask))


def test_known_tags_that_cannot_be_are_refused():
    crf = random_crf()
    allowed = torch.ones(2, 3, 5).bool()
    allowed[1, 0] = torch.tensor([False, False, True, False, False])  # a row cannot begin with "I-X"
    with pytest.raises(ValueError, match="row 1 has none under IOB2"):
        crf.decode(torch.zeros(2, 3, 5), torch.ones(2, 3).bool(), allowed=allowed)
    with pytest.raises(ValueError, match="`allowed` must be boolean"):
        crf.decode(torch.zeros(2, 3, 5), torch.ones(2, 3).bool(), allowed=allowed.float())


def test_best_sequences_are_legal_differ_and_descend():
    crf = random_crf()
    emissions, mask = random_rows(5, rows=3, seq=4)
    mask[0], mask[1], mask[2] = True, False, torch.tensor([True, False, False, False])
    tags, scores = crf.decode_nbest(emissions, mask, 6)
    assert torch.equal(tags[:, 0], crf.decode(emissions, mask))
    assert len({tuple(row) for row in tags[0].tolist()}) == 6
    assert (scores[0].diff() <= 0).all()
    assert not any(count_breaks(row, "IOB2") for row in names_of(crf, tags[0]))
    assert scores[1].tolist() == [0] + [-torch.inf] * 5  # a row without words has the empty sequence
    assert scores[2].isfinite().tolist() == [True, True, True, False, False, False]  # O, B-X and B-Y
    assert (tags[2, 3:] == -100).all()
    chances = crf.marginals(emissions, mask)
    torch.testing.assert_close(scores[2, :3].softmax(0), chances[2, 0][tags[2, :3, 0]])


def test_best_sequences_without_any_word():
    tags, scores = random_crf().decode_nbest(torch.zeros(2, 3, 5), torch.zeros(2, 3).bool(), 2)
    assert (tags == -100).all()
    assert scores.tolist() == [[0, -torch.inf]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_run_in_float32(dtype):
    crf = random_crf()
    emissions, mask = random_rows(5, seq=64)
    mask[:] = True
    gold = torch.ones_like(mask, dtype=torch.long)
    half = emissions.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = crf.log_likelihood(half, gold, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, crf.log_likelihood(half.float(), gold, mask))
    assert torch.equal(crf.decode(half, mask), crf.decode(half.float(), mask))


def test_the_gradient_under_autocast_is_that_without():
    emissions, mask = random_rows(5)
    gold = torch.ones_like(mask, dtype=torch.long)
    crf = random_crf()
    gradients = []
    for enabled in (False, True):
        leaf = emissions.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            crf.log_likelihood(leaf, gold, mask).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_long_rows_of_half_precision_are_exact():
    crf = random_crf()
    emissions = torch.randn(2, 512, 5, generator=torch.Generator().manual_seed(3)).half()
    mask = torch.ones(2, 512).bool()
    exact = copy.deepcopy(crf).double()
    expected = exact.log_partition(emissions.double(), mask)
    torch.testing.assert_close(crf.log_partition(emissions, mask).double(), expected, rtol=1e-6, atol=0)


def test_no_rows_and_no_positions():
    crf = random_crf()
    for shape in ((0, 4), (3, 0), (0, 0)):
        emissions, mask = torch.zeros(*shape, 5), torch.zeros(shape).bool()
        assert crf.log_likelihood(emissions, torch.zeros(shape, dtype=torch.long), mask).tolist() == [0] * shape[0]
        assert crf.decode(emissions, mask).shape == shape
        assert crf.marginals(emissions, mask).shape == (*shape, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "`labels` must be names that differ"),
        ({"labels": ["O", "O"]}, "`labels` must be names that differ"),
        ({"labels": ["LABEL_0", "LABEL_1"]}, "`id2label` must name the tags"),
        ({"labels": IOB2, "tag_scheme": "BIOUS"}, "`tag_scheme` must be one of"),
        ({"labels": IOB2, "mask_transitions": True}, "`mask_transitions` must be one of"),
        ({"labels": IOB2, "illegal_labels": "drop"}, "`illegal_labels` must be one of"),
        ({"labels": IOB2, "illegal_score": 1.0}, r"`illegal_score` must be in \[-1e6, 0\)"),
        ({"labels": IOB2, "illegal_score": float("nan")}, r"`illegal_score` must be in"),
        ({"labels": IOB2, "tag_scheme": "IOBES"}, "do not under IOBES"),
    ],
)
def test_bad_layers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedCRF(**arguments)


@pytest.mark.parametrize(
    ("emissions", "tags", "mask", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), torch.ones(2, 3).bool(), r"shape \(batch, seq, 5\)"),
        (torch.zeros(2, 3, 5).long(), torch.zeros(2, 3).long(), torch.ones(2, 3).bool(), "must be floats"),
        (
            torch.zeros(2, 3, 5),
            torch.zeros(2, 4).long(),
            torch.ones(2, 3).bool(),
            r"`tags` must have the shape \(2, 3\)",
        ),
        (
            torch.zeros(2, 3, 5),
            torch.zeros(2, 3).long(),
            torch.ones(3, 2).bool(),
            r"`mask` must have the shape \(2, 3\)",
        ),
        (torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), torch.ones(2, 3), "`mask` must be boolean"),
        (torch.zeros(2, 3, 5), torch.full((2, 3), 5), torch.ones(2, 3).bool(), r"in \[0, 5\) or -100, got 5"),
        (torch.zeros(2, 3, 5), torch.full((2, 3), -100), torch.ones(2, 3).bool(), "got -100"),
    ],
)
def test_bad_inputs_are_refused(emissions, tags, mask, message):
    with pytest.raises(ValueError, match=message):
        MaskedCRF(IOB2).log_likelihood(emissions, tags, mask)


def test_n_of_no_sequence_is_refused():
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        MaskedCRF(IOB2).decode_nbest(torch.zeros(1, 1, 5), torch.ones(1, 1).bool(), 0)
