"""The latency table of a machine: what it measures, keeps and refuses, and models planned by it."""

import json

import pytest
import torch
from tiny_families import make_inputs, make_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_moebert import (
    PlatonConfig,
    PlatonPruningCallback,
    measure_speed_up,
    measure_unit_latency,
    prune_structured,
    shrink,
)
from hf_moebert.architectures.protocols import UnitCosts
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.inference.optimized import OptimizedModule
from hf_moebert.measuring import unit_latency
from hf_moebert.measuring.unit_latency import LatencyTable


# 4 layers whose neurons take half of the time and whose heads take three tenths
EVEN = LatencyTable(
    milliseconds=10.0,
    halved=0.6,
    counts={"neurons": [1, 24], "heads": [1, 4]},
    shares={"neurons": [0.35, 0.85], "heads": [0.45, 0.75]},
    layers={"neurons": 2, "heads": 2},
    conditions={},
)


def examples_of(model, count=40):
    inputs = make_inputs(model, count)
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(inputs["input_ids"])]


def share_of(model):
    widths = [{}, {}]
    for group in find_unit_groups(model):
        widths[group.layer][group.kind] = group.num_units
    return EVEN.estimate(widths)


# ------------------------------------------------------------------------------------------------------- the table


def test_costs_are_smoothed_and_interpolated_and_never_fall():
    table = LatencyTable(10.0, 0.5, {"neurons": [1, 3, 5]}, {"neurons": [0.4, 0.7, 0.5]}, {"neurons": 2}, {})
    # (0.4 + 2 * 0.7 + 0.5) / 4 = 0.575 of three neurons, and no less of five
    wanted = torch.tensor([0, 0.04375, 0.0875, 0.0875, 0.0875]).double()
    torch.testing.assert_close(table.costs("neurons"), wanted)
    assert table.smallest == pytest.approx(0.4)
    assert table.estimate([{"neurons": 3}, {"neurons": 1}]) == pytest.approx(0.4875)
    assert isinstance(table, UnitCosts)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert", "vit"])
def test_every_form_is_measured(family):
    model = make_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = measure_unit_latency(model, make_inputs(model), rounds=2)
    assert table.milliseconds > 0
    for group in find_unit_groups(model):
        assert table.counts[group.kind][0] == 1
        assert table.counts[group.kind][-1] == group.num_units == len(table.costs(group.kind))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_forms_are_narrow_and_share_the_rest():
    model = make_model("bert")
    groups = find_unit_groups(model)
    narrow = unit_latency._narrowed(model, groups, {"neurons": 8, "heads": 3})
    assert {(group.kind, group.num_units) for group in find_unit_groups(narrow)} == {("neurons", 8), ("heads", 3)}
    assert narrow.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert narrow(**make_inputs(model))[0].shape == model(**make_inputs(model))[0].shape


def test_a_table_is_kept_for_the_same_conditions_alone(tmp_path, monkeypatch):
    model, file = make_model("bert"), tmp_path / "latency.json"
    options = {"batch_size": 2, "seq_len": 6, "rounds": 2, "file": file}
    table = measure_unit_latency(model, **options)
    assert LatencyTable.load(file) == table
    measured = []
    times = unit_latency.time_rounds
    monkeypatch.setattr(unit_latency, "time_rounds", lambda calls, **o: measured.append(1) or times(calls, **o))
    assert measure_unit_latency(model, **options) == table
    assert not measured
    measure_unit_latency(model, **options | {"seq_len": 7})
    measure_unit_latency(model.bfloat16(), **options)
    monkeypatch.setattr(unit_latency, "environment", lambda: dict.fromkeys(unit_latency.CONDITIONS, "another"))
    measure_unit_latency(model, **options)
    assert len(measured) == 3
    assert LatencyTable.load(file).conditions["cpu"] == "another"


def test_all_forms_run_at_the_precision_that_is_asked_for(monkeypatch):
    model, optimized = make_model("bert"), []
    optimize = unit_latency.optimize_for_inference
    monkeypatch.setattr(
        unit_latency, "optimize_for_inference", lambda m, **o: optimized.append((m, o)) or optimize(m, **o)
    )
    options = {"batch_size": 2, "seq_len": 6, "precision": "int8", "rounds": 2}
    table = measure_unit_latency(model, **options)
    assert len(optimized) == 2 + sum(map(len, table.counts.values()))
    measure_speed_up(model, model, **options)
    assert all(m is not model and o == {"precision": "int8"} for m, o in optimized)
    assert not any(isinstance(module, OptimizedModule) for module in model.modules())
    assert table.conditions["precision"] == "int8"
    with pytest.raises(ValueError, match="`precision` must be one of"):
        measure_unit_latency(model, **options | {"precision": "int4"})


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "latency.json"
    EVEN.save(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"halved": 0.1}))
    with pytest.raises(ValueError, match="it is damaged. Measure it again with `measure_unit_latency`"):
        LatencyTable.load(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="must hold a latency table, got the fields"):
        LatencyTable.load(file)


def test_the_speed_up_that_was_reached_is_measured():
    dense = make_model("bert").train()
    small = shrink(dense)
    reached = measure_speed_up(small, dense, batch_size=2, seq_len=6, rounds=3)
    assert 0 < reached.low <= reached.median <= reached.high
    assert reached.rounds == 3
    assert dense.training
    assert small.training


def test_inputs_that_cannot_be_made_up_are_refused():
    with pytest.raises(ValueError, match="`inputs` must hold the pixel_values of a batch for a ViTModel"):
        measure_unit_latency(make_model("vit"))
    for options in ({"seq_len": 33}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"`seq_len` in \[1, 32\], got"):
            measure_unit_latency(make_model("bert"), **options)
    with pytest.raises(ValueError, match="whose neurons or heads can be removed"):
        measure_unit_latency(make_model("albert"))
    masked = make_model("bert")
    with torch.no_grad():
        masked.encoder.layer[0].output.dense.weight[:, :5] = 0
    with pytest.raises(ValueError, match="`model` must be dense, with layers of one width, got a ShrunkBertModel"):
        measure_unit_latency(shrink(masked))


# --------------------------------------------------------------------------------------------------- models by it


@pytest.mark.parametrize("asked", [{"speed_up": 1.5}, {"speed_up": 3}, {"latency_ms": 4.0}], ids=str)
def test_one_shot_meets_the_time(asked):
    model = make_model("bert")
    small = prune_structured(model, examples_of(model), **asked, latency=EVEN, multiple_of=1)
    share = asked.get("latency_ms", 0) / 10 or 1 / asked["speed_up"]
    assert share - 0.08 < share_of(small) <= share + 0.001


def test_uniform_layers_meet_the_time():
    model = make_model("bert")
    small = prune_structured(model, examples_of(model), speed_up=1.4, latency=EVEN, uniform=True, multiple_of=1)
    assert type(small) is type(model)
    assert 1 / 1.4 - 0.08 < share_of(small) <= 1 / 1.4 + 0.001


@pytest.mark.parametrize("criterion", ["platon", "magnitude"])
def test_training_meets_the_time(tmp_path, criterion):
    model = make_model("bert", AutoModelForSequenceClassification).train()
    recipe = PlatonConfig(granularity="structured", speed_up=2.5, criterion=criterion, window=2)
    args = TrainingArguments(tmp_path, max_steps=12, logging_steps=4, report_to=[], use_cpu=True, save_strategy="no")
    callback = PlatonPruningCallback(recipe, latency=EVEN)
    trainer = Trainer(model, args, train_dataset=examples_of(model), callbacks=[callback])
    trainer.train()
    assert trainer.state.log_history[-2]["platon_ratio"] == pytest.approx(0.4)
    small = shrink(model)
    assert 0.2 < share_of(small) <= 0.401
    assert all(group.num_units % 8 in (0, 1) for group in find_unit_groups(small) if group.kind == "neurons")


def test_what_is_too_fast_is_refused_and_the_limit_named(tmp_path):
    model = make_model("bert")
    message = r"`speed_up` must be in \(1, 5\) for this model and table, got 6: one neuron and one head of every layer"
    with pytest.raises(ValueError, match=message):
        prune_structured(model, None, speed_up=6, latency=EVEN)
    with pytest.raises(ValueError, match=r"`latency_ms` must be in \(2, 10\) for this model and table, got 1.5"):
        prune_structured(model, None, latency_ms=1.5, latency=EVEN)
    with pytest.raises(ValueError, match=r"`speed_up` must be in \(1, 5\) for this model and table, got 1"):
        prune_structured(model, None, speed_up=1, latency=EVEN)
    with pytest.raises(ValueError, match="`speed_up` must be a number above 0, got 'fast'"):
        prune_structured(model, None, speed_up="fast", latency=EVEN)
    recipe = PlatonConfig(granularity="structured", speed_up=6.0, window=2)
    args = TrainingArguments(tmp_path, max_steps=12, report_to=[], use_cpu=True)
    trainer = Trainer(model, args, train_dataset=examples_of(model))
    trainer.add_callback(PlatonPruningCallback(recipe, latency=EVEN))
    with pytest.raises(ValueError, match=r"`speed_up` must be in \(1, 5\) for this model and table, got 6.0"):
        trainer.train()


def test_a_table_of_another_model_is_refused():
    model = make_model("bert", intermediate_size=40)
    with pytest.raises(
        ValueError, match="`latency` must be the table of this model, whose layer 0 has 40 neurons, got"
    ):
        prune_structured(model, None, speed_up=2, latency=EVEN)


def test_recipe_and_table_go_together():
    for recipe, table in ((PlatonConfig(), EVEN), (PlatonConfig(granularity="structured", speed_up=2.0), None)):
        with pytest.raises(ValueError, match="`latency` must be given with `speed_up` and only then"):
            PlatonPruningCallback(recipe, latency=table)
    with pytest.raises(ValueError, match="`granularity` must be 'structured' with `speed_up`, got 'unstructured'"):
        PlatonConfig(speed_up=2.0)
    for value in (1, 0.5, float("inf"), "2"):
        with pytest.raises(ValueError, match="`speed_up` must be above 1, got"):
            PlatonConfig(granularity="structured", speed_up=value)
