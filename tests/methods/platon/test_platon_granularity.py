"""Whole units and two of every four: what is pruned, and what is refused."""

import copy
import math

import pytest
import torch
from platon_families import build, make_data
from platon_runs import RECIPE, assert_same_weights, pruner_of
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hf_moebert import (
    PlatonConfig,
    PlatonPruningCallback,
    shrink,
)
from hf_moebert.measuring.unit_latency import LatencyTable
from hf_moebert.methods.platon.modeling_surgery import matrix_of, output_dim
from hf_moebert.methods.platon.modeling_units import find_unit_groups
from hf_moebert.methods.platon.training_parameters import find_prunable
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.methods.platon.training_state import write_state


STRUCTURED = ["bert", "roberta", "distilbert", "vit"]


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        *((family, "platon") for family in STRUCTURED),
        ("bert", "magnitude"),
        ("vit", "importance"),
    ],
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


UNITS = {"granularity": "structured", "keep_ratio": 0.5}
TABLE = LatencyTable(  # a third of the time is left without units
    1.0,
    0.65,
    {"neurons": [1, 32], "heads": [1, 4]},
    {"neurons": [0.5, 0.85], "heads": [0.5, 0.85]},
    {"neurons": 2, "heads": 2},
    {},
)


@pytest.mark.parametrize("criterion", ["platon", "importance", "magnitude"])
@pytest.mark.parametrize("family", STRUCTURED)
def test_removed_units_have_gradients(prune, family, criterion):
    model = build(family)
    data = make_data(family)
    trainer = prune(model, UNITS | {"criterion": criterion}, data=data)
    model.zero_grad()
    rows = [data[index] for index in range(8)]
    model(**{key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}).loss.backward()
    pruner, removed, reached = pruner_of(trainer), 0, 0
    assert set(pruner.keep) == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(module is group.writer for group in find_unit_groups(model))
    }
    for name, keep in pruner.keep.items():
        weight = pruner.parameters[name]
        assert torch.equal(weight.detach().flatten() != 0, keep)
        removed += int((~keep).sum())
        reached += int((weight.grad.flatten()[~keep] != 0).sum())
    assert removed
    assert reached > 0.95 * removed


@pytest.mark.parametrize("family", [*STRUCTURED, "gpt2", "llama"])
def test_a_unit_counts_by_the_mean_of_its_weights(family):
    """Of readers and their biases, and of the writer; averages of means are means of averages."""
    model = build(family)
    config = PlatonConfig(granularity="structured", criterion="importance", keep_ratio=0.5, window=2)
    statistics = Pruner(model, config, 20).statistics
    averages = {name: torch.zeros_like(parameter) for name, parameter in statistics.parameters.items()}
    windows = {name: torch.zeros_like(parameter) for name, parameter in statistics.parameters.items()}
    for step in range(1, 7):
        for parameter in statistics.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        assert statistics.observe(step % 2)
        for name, parameter in statistics.parameters.items():
            s = (parameter * parameter.grad).abs().detach()
            if step % 2:
                windows[name] = (windows[name] + s) / 2
            else:
                averages[name] = 0.85 * averages[name] + 0.15 * windows[name]
                windows[name] = s
    smaller = copy.deepcopy(model)
    smaller.load_state_dict(smaller.state_dict() | averages)  # the averages in the places of the weights
    for group, found in zip(find_unit_groups(smaller), statistics.score_units(), strict=True):
        for unit in range(group.num_units):
            values = [p.movedim(output_dim(r, p), 0) for r in group.readers for p in r.parameters(recurse=False)]
            values = [v.reshape(group.blocks, group.num_units, -1)[:, unit].flatten() for v in values]
            values.append(matrix_of(group.writer).unflatten(1, (group.num_units, -1))[:, unit].flatten())
            torch.testing.assert_close(found[unit], torch.cat(values).mean().detach())


def test_the_state_of_units_is_three_numbers_for_each(tiny_bert, prune):
    statistics = pruner_of(prune(tiny_bert(), UNITS)).statistics
    stored = sum(t.numel() for tensors in statistics.tensors.values() for t in tensors.values())
    assert stored == 3 * sum(group.num_units for group in statistics.groups)


def test_removed_units_come_back(tiny_bert, prune):
    trainer = prune(tiny_bert(), UNITS | {"window": 1}, data="text")
    assert sum(log.get("platon_revived", 0) for log in trainer.state.log_history) > 0


def test_the_sparsity_of_units_is_that_of_all_their_weights(tiny_bert, prune):
    model = tiny_bert()
    trainer = prune(model, UNITS, data="text")
    left = shrink(model).num_parameters() - model.num_parameters() + pruner_of(trainer).numel
    logged = next(log for log in reversed(trainer.state.log_history) if "platon_sparsity" in log)
    assert logged["platon_sparsity"] == pytest.approx(1 - left / pruner_of(trainer).numel)


@pytest.mark.parametrize("family", STRUCTURED)
def test_every_layer_keeps_a_neuron_and_a_head(prune, family):
    model = build(family)
    groups = find_unit_groups(model)
    sizes = [sum(p.numel() for r in g.readers for p in r.parameters()) + g.writer.weight.numel() for g in groups]
    floor = sum(size / group.num_units for size, group in zip(sizes, groups, strict=True)) / sum(sizes)
    lowest = math.ceil(floor * 1e4) / 1e4
    with pytest.raises(ValueError, match=f"`keep_ratio` must be at least {lowest} with granularity 'structured', got"):
        prune(model, {"granularity": "structured", "keep_ratio": 0.99 * floor}, data=family)
    trainer = prune(model, {"granularity": "structured", "keep_ratio": lowest}, data=family)
    assert [group.num_units for group in find_unit_groups(shrink(model))] == [1] * 4
    assert pruner_of(trainer).average_sparsity(pruner_of(trainer).measure_sparsity()) == pytest.approx(1 - floor)


@pytest.mark.parametrize("timed", [False, True])
def test_a_floor_under_the_units_of_every_layer(tiny_bert, prune, timed):
    model = tiny_bert()
    for group in find_unit_groups(model)[2:]:  # the second layer does nothing
        group.writer.weight.register_hook(torch.zeros_like)
        for parameter in group.reader_parameters:
            parameter.register_hook(torch.zeros_like)
    budget, table = ({"speed_up": 1.4}, TABLE) if timed else ({"keep_ratio": 0.6}, None)
    recipe = PlatonConfig(**RECIPE | {"granularity": "structured", "min_keep": 0.5} | budget)
    prune(model, False, callbacks=[PlatonPruningCallback(recipe, latency=table)])
    widths = [group.num_units for group in find_unit_groups(shrink(model))]
    assert widths[2:] == [16, 2]
    assert widths[:2] > [16, 2]


def test_floors_that_the_budget_cannot_hold_are_refused(tiny_bert, make_trainer):
    match = r"at least 0.4\d+ with .*, got 0.45: every layer keeps `min_keep`, 0.45, of its neurons and heads, which"
    with pytest.raises(ValueError, match=match):
        make_trainer(tiny_bert(), UNITS | {"keep_ratio": 0.45, "min_keep": 0.45}).train()  # two of four heads


def test_states_with_masks_of_the_rows_are_refused(tiny_bert, prune, tmp_path):
    pruner = pruner_of(prune(tiny_bert(), UNITS))
    pruner.keep["bert.encoder.layer.0.intermediate.dense.bias"] = torch.ones(32, dtype=torch.bool)  # as 0.1.0 did
    write_state(tmp_path, *pruner.collect(20))
    fresh = Pruner(tiny_bert(), pruner.config, 20)
    with pytest.raises(
        ValueError, match=r"extra .* keep.bert.encoder.layer.0.intermediate.dense.bias. Resume the run"
    ):
        fresh.load(tmp_path, 20)


@pytest.mark.parametrize("family", ["t5", "albert"])
def test_families_without_known_units_are_refused(make_trainer, family):
    with pytest.raises(ValueError, match="`model` must be of a family whose neurons or heads can be removed, one of"):
        make_trainer(build(family), {"granularity": "structured"}).train()


@pytest.mark.parametrize("family", ["hash", "gate"])
def test_whole_units_of_experts_are_refused(make_trainer, family):
    with pytest.raises(ValueError, match="is a mixture of experts. Experts come after it"):
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
