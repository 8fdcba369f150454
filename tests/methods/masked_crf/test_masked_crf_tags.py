"""Tag schemes: what may follow what, and segments written and read in each of them."""

import itertools

import pytest
from hypothesis import given, strategies as st

from hf_moebert.methods.masked_crf.functional_tags import (
    PREFIXES,
    SCHEMES,
    Segment,
    convert_tags,
    count_breaks,
    find_segments,
    infer_scheme,
    legal_moves,
    repair_tags,
    write_segments,
)


def labels_of(scheme, types):
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in PREFIXES[scheme] if prefix != "O")]


@st.composite
def segmentations(draw):
    """Segments of types that hold dashes and prefixes, and the number of words."""
    lengths = draw(st.lists(st.integers(1, 4), max_size=6))
    segments, at = [], 0
    for length in lengths:
        at += draw(st.integers(0, 2))
        segments.append(Segment(draw(st.sampled_from(["X", "ALI-X", "I-E", "B"])), at, at + length))
        at += length
    return segments, at + draw(st.integers(0, 2))


@given(segmentations(), st.sampled_from([*SCHEMES]), st.sampled_from([*SCHEMES]))
def test_segments_survive_every_scheme(drawn, first, second):
    segments, words = drawn
    tags = write_segments(segments, words, first)
    assert find_segments(tags) == segments
    assert count_breaks(tags, first) == 0
    other = convert_tags(tags, second)
    assert find_segments(other) == segments
    assert convert_tags(other, first) == tags


@given(st.sampled_from([*SCHEMES]), st.data())
def test_any_sequence_is_repaired_to_a_legal_one(scheme, data):
    labels = labels_of(scheme, ["X", "Y-Z"])
    tags = data.draw(st.lists(st.sampled_from(labels), max_size=8))
    mended = repair_tags(tags, labels, scheme)
    assert count_breaks(mended, scheme) == 0
    assert len(mended) == len(tags)
    if count_breaks(tags, scheme) == 0:
        assert mended == tags


def test_repair_keeps_segments():
    assert repair_tags(["O", "I-X", "I-X", "O"], labels_of("IOB2", "X"), "IOB2") == ["O", "B-X", "I-X", "O"]
    assert repair_tags(["B-X", "I-X", "B-Y"], labels_of("IOBES", "XY"), "IOBES") == ["B-X", "E-X", "S-Y"]
    assert repair_tags(["B-X", "O", "L-Y"], labels_of("BILOU", "XY"), "BILOU") == ["U-X", "O", "U-Y"]


def test_repair_gives_up_what_cannot_be_written():
    labels = ["O", "B-X", "E-X"]
    assert repair_tags(["E-X", "B-X", "E-X", "B-X"], labels, "IOBES") == ["O", "B-X", "E-X", "O"]
    with pytest.raises(ValueError, match="must hold 'O'"):
        repair_tags(["E-X"], ["B-X", "E-X"], "IOBES")


@pytest.mark.parametrize("types", [1, 2, 3, 5])
def test_numbers_of_illegal_moves(types):
    """`K(2K - 1)` of IOB2, and all but `(2K + 1)^2 + 4K` of the others, for K types."""
    kinds = [f"t{k}" for k in range(types)]
    size = {"IOB2": 2 * types + 1, "IOBES": 4 * types + 1, "BILOU": 4 * types + 1}
    illegal = {scheme: int((~legal_moves(labels_of(scheme, kinds), scheme).moves).sum()) for scheme in size}
    legal = (2 * types + 1) ** 2 + 4 * types
    assert illegal["IOB2"] == types * (2 * types - 1)
    assert illegal["IOBES"] == illegal["BILOU"] == size["IOBES"] ** 2 - legal


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_legal_is_what_segments_can_be_written_as(scheme):
    """Brute force: all sequences of three tags that some segmentation is written as."""
    labels = labels_of(scheme, "XY")
    legality = legal_moves(labels, scheme)
    for indices in itertools.product(range(len(labels)), repeat=3):
        tags = [labels[index] for index in indices]
        legal = bool(legality.start[indices[0]] and legality.end[indices[2]])
        legal = legal and all(legality.moves[a, b] for a, b in itertools.pairwise(indices))
        assert legal == (convert_tags(tags, scheme) == tags), tags
        assert legal == (count_breaks(tags, scheme) == 0), tags


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["O", "B-X", "I-X"], "IOB2"),
        (["O", "B", "I"], "IOB2"),
        (["O", "I-X"], "IOB1"),
        (["O", "B-X", "I-X", "E-X", "S-X"], "IOBES"),
        (["O", "B-X", "I-X", "S-X"], "IOBES"),
        (["O", "B-X", "U-X", "L-X"], "BILOU"),
        (["O", "U-X"], "BILOU"),
        (["NOUN", "VERB", "X"], "none"),
        (["-LRB-", "NN", "WP-X"], "none"),
        (["O", "PER", "LOC"], "none"),
        (["O"], "none"),
    ],
)
def test_schemes_are_read_off_the_labels(labels, scheme):
    assert infer_scheme(labels) == scheme


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["LABEL_0", "LABEL_1"], "`id2label` must name the tags"),
        (["O", "B-X", "L-X", "E-X"], "must hold tags of the scheme BILOU"),
        (["O", "B-X", "I-X", "[CLS]"], r"got \['\[CLS\]'\]"),
        (["O", "B-X", "I-X", "b-Y"], r"got \['b-Y'\]"),
        (["o", "b-x", "i-x"], "must spell prefixes as in 'B-PER', got"),
        (["O", "B_X", "I_X"], "must spell prefixes"),
        (["O", "X-B", "X-I"], "must spell prefixes"),
    ],
)
def test_labels_of_no_scheme_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        infer_scheme(labels)


def test_labels_that_lead_nowhere_are_refused():
    with pytest.raises(ValueError, match=r"\['B-X'\] do not under IOBES"):
        legal_moves(["O", "B-X", "S-Y"], "IOBES")
    with pytest.raises(ValueError, match="must hold a tag that one word may have alone"):
        legal_moves(["I-X"], "IOB2")
    with pytest.raises(ValueError, match="must hold a tag that one word may have alone"):
        legal_moves(["B-X", "E-X"], "IOBES")  # rows of an odd number of words
    with pytest.raises(ValueError, match="`tag_scheme` must be one of"):
        legal_moves(["O"], "BIO")


def test_incomplete_sets_of_labels_are_used_as_they_are():
    legality = legal_moves(["O", "B-X", "E-X"], "IOBES")
    assert legality.moves.tolist() == [[True, True, False], [False, False, True], [True, True, False]]
    assert legality.start.tolist() == [True, True, False]
    assert legality.end.tolist() == [True, False, True]
