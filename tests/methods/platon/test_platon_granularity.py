"""Whole units and two of every four: what is pruned, and what is refused."""

import copy

import pytest
import torch
from platon_families import build, make_data
from platon_runs import assert_same_weights, pruner_of
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hf_moebert import (
    PlatonConfig,
    shrink,
)
from hf_moebert.methods.platon.modeling_units import find_unit_groups
from hf_moebert.methods.platon.training_parameters import find_prunable


STRUCTURED = ["bert", "roberta", "distilbert", "vit"]


@pytest.mark.parametrize(
    ("family", "criterion"),
    [*((family, "platon") for family in STRUCTURED), ("bert", "movement"), ("vit", "movement"), ("bert", "magnitude")],
)
def test_what_is_pruned_whole_shrinks(prune, tmp_path, family, criterion):
    model = build(family)
    trainer = prune(model, {"granularity": "structured", "keep_ratio": 0.5, "criterion": criterion}, data=family)
    members = pruner_of(trainer).parameters
    before = sum(parameter.numel() for parameter in members.values())
    smaller = shrink(model.eval())
    groups = find_unit_groups(smaller)
    assert min(group.num_units for group in groups) >= 1
    left = sum(p.numel() for group in groups for reader in group.readers for p in reader.parameters())
    left += sum(group.writer.weight.numel() for group in groups)
    largest = 4 * (3 * 17 + 16)  # a head: rows and biases of query, key and value, and columns of the output
    assert abs(left - 0.5 * before) <= largest / 2
    assert smaller.num_parameters() == model.num_parameters() - (before - left)
    inputs = {key: torch.as_tensor(value)[None] for key, value in make_data(family)[0].items() if key != "labels"}
    expected = in_float64(model, inputs)
    torch.testing.assert_close(in_float64(smaller, inputs), expected, atol=1e-6, rtol=1e-6)
    rounded = shrink(model, multiple_of=8)
    assert all(group.num_units % 8 == 0 for group in find_unit_groups(rounded) if group.kind == "neurons")
    torch.testing.assert_close(in_float64(rounded, inputs), expected, atol=1e-6, rtol=1e-6)
    rounded.save_pretrained(tmp_path / "smaller")
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "smaller")
    assert_same_weights(loaded, rounded)
    torch.testing.assert_close(in_float64(loaded, inputs), in_float64(rounded, inputs), atol=1e-12, rtol=1e-12)


def in_float64(model, inputs):
    """The logits, without the rounding that depends on the shapes of products and on where weights lie."""
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return copy.deepcopy(model).double()(**inputs).logits


@pytest.mark.parametrize("family", STRUCTURED)
def test_every_layer_keeps_a_neuron_and_a_head(prune, family):
    model = build(family)
    prune(model, {"granularity": "structured", "keep_ratio": 0.001}, data=family)
    groups = find_unit_groups(shrink(model))
    assert [group.num_units for group in groups] == [1] * 4


@pytest.mark.parametrize("family", ["gpt2", "t5", "albert"])
def test_families_without_known_units_are_refused(make_trainer, family):
    with pytest.raises(ValueError, match="`model` must be of a family whose neurons or heads can be removed, one of"):
        make_trainer(build(family), {"granularity": "structured"}).train()


@pytest.mark.parametrize("family", ["hash", "gate"])
def test_whole_units_of_experts_are_refused(make_trainer, family):
    with pytest.raises(ValueError, match=r"`intermediate.dense` of MoEBertLayer must be a plain .* the dense model"):
        make_trainer(build(family), {"granularity": "structured"}).train()


# Two of every four


@pytest.mark.parametrize("family", ["bert", "mixtral", "hash"])
def test_two_of_every_four_inputs(prune, family):
    model = build(family)
    prune(model, {"granularity": "2:4", "keep_ratio": 0.5})
    for name, parameter in find_prunable(model, PlatonConfig()).items():
        assert ((parameter != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name


def test_two_of_every_four_outputs_are_refused(make_trainer):
    with pytest.raises(
        ValueError, match=r"inputs must be the last .* but `transformer.h.0.attn.c_attn.weight` of a Conv"
    ):
        make_trainer(build("gpt2"), {"granularity": "2:4", "keep_ratio": 0.5}).train()


def test_widths_that_are_no_multiple_of_four_are_refused(tiny_bert, make_trainer):
    model = tiny_bert(intermediate_size=30)
    with pytest.raises(ValueError, match=r"must be a multiple of 4, `bert.encoder.layer.0.output.dense.weight` is"):
        make_trainer(model, {"granularity": "2:4", "keep_ratio": 0.5}).train()
