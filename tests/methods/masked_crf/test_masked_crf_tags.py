"""Tag schemes: what may follow what, and segments written and read in each of them."""

import itertools

import pytest
import seqeval.scheme
from hypothesis import given, settings, strategies as st
from seqeval.scheme import Entities

from hf_moebert.methods.masked_crf import MaskedCRF
from hf_moebert.methods.masked_crf.functional_tags import (
    ALIASES,
    MAX_TAGS,
    PREFIXES,
    SCHEMES,
    Segment,
    convert_tags,
    count_breaks,
    find_segments,
    infer_scheme,
    legal_moves,
    plain_tags,
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
        (["O", "I-PER", "I-LOC", "B-LOC"], "IOB1"),  # CoNLL-2003: no two persons are neighbours
        (["O", "B-X", "I-Y", "B-Y"], "IOB2"),
        (["O", "E-X"], "IOE2"),
        (["O", "I-X", "I-Y", "E-Y"], "IOE1"),
        (["O", "I-X", "E-X", "E-Y"], "IOE2"),
        (["O", "B-X", "I-X", "E-X", "S-X"], "IOBES"),
        (["O", "B-X", "M-X", "E-X", "S-X"], "BMES"),
        (["B", "M", "E", "S"], "BMES"),
        (["B", "E", "S"], "IOBES"),
        (["O", "B", "I", "E", "S"], "IOBES"),
        (["[PAD]", "O", "B-X", "I-X", "X", "[CLS]", "[SEP]"], "IOB2"),
        (["O", "B", "I", "</s>"], "IOB2"),
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
        (["O", "B-X", "I-X", "PER"], r"got \['PER'\]"),
        (["O", "I-X", "E-X"], "may be of IOE1 or IOE2"),
        (["O", "B-X", "I-X", "S-X"], r"lead to the end of a sequence, \['B-X', 'I-X'\] do not under IOBES"),
        (["O", "B-X", "I-Y"], "be reached"),
        (["O", "E-X", "S-X"], "be reached"),
        (["O", "M", "S"], r"be reached from the start of a sequence, \['M'\] do not under BMES"),
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
    with pytest.raises(ValueError, match=r"be reached from the start of a sequence, \['I-X'\] do not under IOB2"):
        legal_moves(["I-X"], "IOB2")
    with pytest.raises(ValueError, match="must hold a tag that one word may have alone"):
        legal_moves(["B-X", "E-X"], "IOBES")  # rows of an odd number of words
    with pytest.raises(ValueError, match=r"be reached from the start of a sequence, \['I-Y'\] do not under IOB2"):
        legal_moves(["O", "B-X", "I-X", "I-Y"], "IOB2")
    with pytest.raises(ValueError, match="`tag_scheme` must be one of"):
        legal_moves(["O"], "BIOUS")


@pytest.mark.parametrize(("alias", "scheme"), ALIASES.items())
def test_usual_names_mean_the_scheme(alias, scheme):
    labels = labels_of(scheme, "XY")
    for ours, other in zip(legal_moves(labels, alias), legal_moves(labels, scheme), strict=True):
        assert ours.equal(other)
    assert convert_tags(["B-X", "I-X"], alias) == convert_tags(["B-X", "I-X"], scheme)
    assert MaskedCRF(labels, tag_scheme=alias).tag_scheme == scheme


def test_special_labels_are_outside_of_segments():
    labels = ["[PAD]", "O", "B-X", "I-X", "X"]
    legality = legal_moves(labels, "IOB2")
    assert legality.moves[0].equal(legality.moves[1])
    assert legality.moves[:, 4].equal(legality.moves[:, 1])
    assert not legality.moves[[0, 1, 4], 3].any()
    assert repair_tags(["X", "I-X", "[PAD]"], labels, "IOB2") == ["O", "B-X", "O"]
    assert plain_tags(["X", "NOUN"], "none") == ["X", "NOUN"]


def test_the_number_of_tags_has_a_limit():
    labels = labels_of("IOBES", [str(kind) for kind in range(MAX_TAGS // 4 - 1)])
    assert legal_moves(labels, "IOBES").moves.shape == (MAX_TAGS - 3,) * 2
    many = [f"U-{number}" for number in range(MAX_TAGS + 1)]
    for scheme in ("auto", "none"):
        with pytest.raises(ValueError, match="must name at most 4096 tags, got 4097"):
            MaskedCRF(many, tag_scheme=scheme)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([*SCHEMES]), st.sets(st.sampled_from(["a", "b-c", "I", "7"]), min_size=1), st.booleans(), st.data()
)
def test_sets_of_labels_are_told_or_asked_for(scheme, types, typeless, data):
    """A data set's own sequences are legal in the scheme that its labels are taken for, if they have all tags."""
    labels = ["O", *PREFIXES[scheme].replace("O", "")] if typeless else labels_of(scheme, sorted(types))
    labels = data.draw(st.permutations(labels))
    if scheme.startswith("IOE"):
        with pytest.raises(ValueError, match="IOE1 or IOE2"):
            infer_scheme(labels)
    else:
        assert infer_scheme(labels) == {"IOB1": "IOB2"}.get(scheme, scheme)


@settings(max_examples=50, deadline=None)
@given(segmentations(), st.sampled_from(["IOB1", "IOB2", "IOE2", "IOBES", "BILOU"]))  # it drops "E-X" alone in IOE1
def test_seqeval_reads_the_same_segments(drawn, scheme):
    segments, words = drawn
    names = {kind: f"t{index}" for index, kind in enumerate(sorted({segment.type for segment in segments}))}
    renamed = [segment._replace(type=names[segment.type]) for segment in segments]  # seqeval splits at every dash
    tags = write_segments(renamed, words, scheme)
    (found,) = Entities([tags], getattr(seqeval.scheme, scheme)).entities
    assert [(entity.tag, entity.start, entity.end) for entity in found] == renamed


def test_incomplete_sets_of_labels_are_used_as_they_are():
    legality = legal_moves(["O", "B-X", "E-X"], "IOBES")
    assert legality.moves.tolist() == [[True, True, False], [False, False, True], [True, True, False]]
    assert legality.start.tolist() == [True, True, False]
    assert legality.end.tolist() == [True, False, True]
