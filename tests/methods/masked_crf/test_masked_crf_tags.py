"""Tag schemes: what may follow what, and segments written and read in each of them."""

import itertools

import pytest
import seqeval.scheme
import torch
from hypothesis import given, settings, strategies as st
from seqeval.scheme import Entities
from tiny_crf import make_dense

from hf_moebert.methods.masked_crf import MaskedCRF, from_dense, modeling_crf
from hf_moebert.methods.masked_crf.functional_schemes import fitting_schemes, infer_scheme
from hf_moebert.methods.masked_crf.functional_segments import Segment, find_segments, plain_tags
from hf_moebert.methods.masked_crf.functional_tags import (
    ALIASES,
    MAX_TAGS,
    POLICIES,
    PREFIXES,
    SCHEMES,
    convert_tags,
    count_breaks,
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
        (["O", "B X", "I X"], "must spell prefixes"),
        (["O", "B\u2013X", "I\u2013X"], "must spell prefixes"),
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


def told_by(rows, labels, candidates):
    """The schemes that the fewest rows break, by the definition."""
    broken = {scheme: sum(count_breaks(row, scheme) > 0 for row in rows) for scheme in candidates}
    return [scheme for scheme in candidates if broken[scheme] == min(broken.values())]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*SCHEMES]), st.lists(segmentations(), min_size=1, max_size=6), st.data())
def test_rows_tell_what_a_set_of_labels_does_not(scheme, drawn, data):
    """The labels of a data set with all its tags, and some of its rows, a part of them noise."""
    kinds = ["X", "ALI-X", "I-E", "B"]
    labels = data.draw(st.permutations(labels_of(scheme, kinds)))
    rows = [write_segments(segments, words, scheme) for segments, words in drawn]
    clear = told_by(rows, labels, fitting_schemes(labels))
    assert scheme in clear
    if clear == [scheme]:
        assert infer_scheme(labels, rows) == scheme
        noise = [[data.draw(st.sampled_from(labels))] for _ in range(len(rows) // 3)]
        if told_by(rows + noise, labels, fitting_schemes(labels)) == [scheme]:
            assert infer_scheme(labels, rows + noise) == scheme
    elif scheme.startswith("IOE"):
        with pytest.raises(ValueError, match="IOE1 or IOE2, .* or give `labels` of the data"):
            infer_scheme(labels, rows)
    else:
        assert infer_scheme(labels, rows) == "IOB2"
        assert set(clear) == {"IOB1", "IOB2"}


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOE1", "IOE2"])
def test_rows_of_a_data_set_tell_the_scheme_of_a_model(scheme):
    labels = labels_of(scheme, ["X", "Y"])
    rows = [write_segments([Segment("X", 0, 2), Segment("Y", 3, 4), Segment("Y", 4, 6)], 7, scheme)]
    numbers = [[-100, *(labels.index(tag) for tag in row), -100] for row in rows]
    for family in ("bert", "any bert", "roberta"):
        model = from_dense(make_dense(family.removeprefix("any "), labels), labels=numbers)
        assert model.crf.tag_scheme == model.config.tag_scheme == scheme
        assert model.crf.rival is None
    assert from_dense(make_dense(labels=labels), labels=numbers, mask_transitions="off").config.tag_scheme == "auto"
    with pytest.raises(ValueError, match="must be rows of numbers in `id2label` or -100, got 9"):
        from_dense(make_dense(labels=labels), labels=[[9]])


@pytest.mark.parametrize("labels", [[*labels_of("IOB2", "XY")], ["O", "B", "I"], ["[PAD]", "O", "B-X", "I-X", "X"]])
def test_what_is_assumed_is_said(labels, monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_crf.logger, "warning_once", warned.append)
    layer = MaskedCRF(labels)
    assert (layer.tag_scheme, layer.rival) == ("IOB2", "IOB1")
    assert "takes the tags for IOB2, as most data sets mean them, though they may be of IOB1" in warned.pop()
    for scheme, mask in (("IOB2", "training"), ("IOB1", "training"), ("auto", "off")):
        assert MaskedCRF(labels, tag_scheme=scheme, mask_transitions=mask).rival is None
    for sure in (["O", "I-X"], labels_of("IOBES", "X"), labels_of("BMES", "X"), ["NOUN"], ["O", "I-X", "I-Y", "B-Y"]):
        assert MaskedCRF(sure).rival is None
    assert not warned


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", ["training", "decoding"])
@pytest.mark.parametrize("training", [True, False])
def test_labels_that_show_a_wrong_guess_are_refused(policy, mask, training):
    """Whatever is done with rows that break the scheme: here it is the scheme that is wrong."""
    labels = labels_of("IOB1", ["X", "Y"])

    def score(layer, *rows):
        numbers = torch.tensor([[labels.index(tag) for tag in row.split()] for row in rows])
        return layer.likelihood_and_rows(torch.zeros(*numbers.shape, len(labels)), numbers, numbers >= 0)[0]

    def make():
        return MaskedCRF(labels, illegal_labels=policy, mask_transitions=mask).train(training)

    layer = make()
    score(layer, "O O", "O O")  # shows nothing
    with pytest.raises(ValueError, match=r"row 1 of the batch is O I-X, which is of IOB1 and not of IOB2, .* 'IOB1'"):
        score(layer, "O O", "O I-X")
    with pytest.raises(ValueError, match="row 0 of the batch is I-X B-X"):
        score(make(), "I-X B-X")
    layer = make()
    score(layer, "O B-Y")
    assert layer.rival is None
    if policy != "error" or mask == "decoding":  # by now it is noise
        score(layer, "O I-X")
        score(MaskedCRF(labels, tag_scheme="IOB2", illegal_labels=policy, mask_transitions=mask), "O I-X")


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
