"""Pruned models without their zero units: outputs, gradients and training."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from platon_shrunk_models import (
    CLASSIFIERS,
    EVERY,
    SIZES,
    TEXT,
    WIDTHS,
    assert_same,
    build,
    make_inputs,
    outputs,
)
from torch import nn
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    logging as transformers_logging,
)

from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods.platon.configuration_shrunk import ShrunkBertConfig
from hf_moebert.methods.platon.conversion import shrink
from hf_moebert.methods.platon.modeling_shrunk import ShrunkBertForSequenceClassification, ShrunkBertModel
from hf_moebert.methods.platon.modeling_units import find_unit_groups


# ------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(("family", "cls"), EVERY)
def test_a_model_without_zeros_stays_what_it_is(family, cls):
    dense = build(family, cls, pruned={"neurons": [[]] * 3, "heads": [[]] * 3})
    shrunk = shrink(dense)
    assert type(shrunk).__name__ == f"Shrunk{cls.__name__}"
    state = shrunk.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    inputs = make_inputs(family)
    assert all(torch.equal(a, b) for a, b in zip(outputs(dense, inputs), outputs(shrunk, inputs), strict=True))


def test_nothing_to_remove_is_warned_of(caplog):
    logging.Logger.warning_once.cache_clear()  # said once per process, perhaps in a test before this one
    transformers_logging.enable_propagation()
    try:
        shrink(build("bert", BertForMaskedLM), multiple_of=48)
        assert not caplog.records  # heads went
        shrink(build("bert", BertForMaskedLM, pruned={"neurons": [range(9)] * 3, "heads": [[]] * 3}), multiple_of=48)
    finally:
        transformers_logging.disable_propagation()
    assert "No neuron and no head of the BertForMaskedLM can be removed" in caplog.text


# --------------------------------------------------------------------------------------------------------- oracle


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize(("family", "cls"), EVERY)
def test_the_shrunk_model_is_the_masked_model(family, cls, multiple_of):
    masked = build(family, cls)
    before = copy.deepcopy(masked.state_dict())
    random = torch.get_rng_state()
    shrunk = shrink(masked, multiple_of=multiple_of)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in masked.state_dict().items())
    neurons = [width["neurons"] for width in WIDTHS] if multiple_of == 1 else [32, 48, 8]
    assert [g.num_units for g in find_unit_groups(shrunk) if g.kind == "neurons"] == neurons
    assert [g.num_units for g in find_unit_groups(shrunk) if g.kind == "heads"] == [2, 3, 4]
    for group in find_unit_groups(shrunk):
        size = group.num_units * group.unit_size
        assert (group.writer.in_features, group.writer.out_features) == (size, 32) == group.writer.weight.shape[::-1]
        assert all((r.out_features, r.in_features) == (size, 32) == r.weight.shape for r in group.readers)
    for implementation in ("sdpa", "eager"):
        masked.set_attn_implementation(implementation)
        shrunk.set_attn_implementation(implementation)
        assert_same(outputs(masked, make_inputs(family)), outputs(shrunk, make_inputs(family)))


@pytest.mark.parametrize(("family", "cls"), CLASSIFIERS)
def test_attentions_are_those_of_the_heads_left(family, cls):
    masked = build(family, cls, attn_implementation="eager")
    shrunk = shrink(masked)
    assert shrunk.config._attn_implementation == "eager"
    dense, left = (model(**make_inputs(family), output_attentions=True).attentions for model in (masked, shrunk))
    torch.testing.assert_close(left[0], dense[0][:, [1, 3]])
    torch.testing.assert_close(left[1], dense[1][:, [0, 1, 2]], atol=1e-6, rtol=1e-5)
    heads = [getattr(module, "num_attention_heads", None) or getattr(module, "n_heads", None)
             for module in shrunk.modules() if type(module).__name__.endswith("Attention")]  # fmt: skip
    assert [number for number in heads if number] == [2, 3, 4]


def test_what_the_model_was_it_stays():
    labels = {"id2label": {0: "no", 1: "so so", 2: "yes"}, "label2id": {"no": 0, "so so": 1, "yes": 2}}
    model = build("bert", BertForSequenceClassification, problem_type="multi_label_classification", **labels)
    shrunk = shrink(model.to(torch.bfloat16).train())
    assert shrunk.training
    assert {p.dtype for p in shrunk.parameters()} == {torch.bfloat16}
    assert not shrink(model.eval()).training
    config = shrunk.config
    assert (config.id2label, config.label2id, config.num_labels) == (*labels.values(), 3)
    assert config.problem_type == "multi_label_classification"
    assert config.widths == WIDTHS
    assert_same(outputs(model, make_inputs("bert")), outputs(shrunk.eval(), make_inputs("bert")), 0.05, 0.05)


def test_a_shrunk_model_can_be_shrunk_again():
    shrunk = shrink(build("vit", ViTForImageClassification, qkv_bias=False))
    with torch.no_grad():
        for group in find_unit_groups(shrunk):
            group.writer.weight[:, : group.unit_size] = 0
    again = shrink(shrunk)
    assert type(again) is type(shrunk)
    assert again.config.widths == [
        {"neurons": 28, "heads": 1},
        {"neurons": 47, "heads": 2},
        {"neurons": 1, "heads": 3},
    ]
    assert_same(outputs(shrunk, make_inputs("vit")), outputs(again, make_inputs("vit")))


def test_tied_embeddings_stay_tied():
    shrunk = shrink(build("bert", BertForMaskedLM))
    assert shrunk.cls.predictions.decoder.weight is shrunk.bert.embeddings.word_embeddings.weight


def test_the_footprint_says_what_was_saved(tmp_path):
    masked = build("bert", BertForSequenceClassification)
    shrunk = shrink(masked)
    masked.save_pretrained(tmp_path / "masked")
    shrunk.save_pretrained(tmp_path / "shrunk")
    before, after = (
        measure_footprint(m, seq_len=16, folder=tmp_path / n) for m, n in ((masked, "masked"), (shrunk, "shrunk"))
    )
    gone = (19 + 47) * (2 * 32 + 1) + 3 * 8 * (4 * 32 + 3)  # rows, biases and columns of neurons and of heads
    assert before.total - after.total == gone
    assert before.bytes_on_disk - after.bytes_on_disk > 4 * gone * 0.9
    assert after.flops_per_token < before.flops_per_token


# ------------------------------------------------------------------------------------------------------- refusals


def test_unfit_models_and_numbers_are_refused():
    with pytest.raises(ValueError, match="`model` must be one of .*'BertModel'.*, got BertForNextSentencePrediction"):
        shrink(build("bert", BertForNextSentencePrediction))
    with pytest.raises(ValueError, match="`model` must be of a known family, .* got 'Linear'"):
        shrink(nn.Linear(2, 2))
    for number in (0, -8, 1.5):
        with pytest.raises(ValueError, match=f"`multiple_of` must be an integer of at least 1, got {number}. Use 8"):
            shrink(build("bert", BertModel), multiple_of=number)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            {"hidden_size": 16},
            "must name only .'intermediate_size', 'num_attention_heads'., got 'hidden_size' in layer 1",
        ),
        ({"intermediate_size": 49}, r"`intermediate_size` of a layer must be in \[1, 48\].*got 49 in layer 1"),
        ({"num_attention_heads": 0}, r"`num_attention_heads` of a layer must be in \[1, 4\].*got 0 in layer 1"),
    ],
)
def test_impossible_widths_are_refused(layer, message):
    with pytest.raises(Exception, match=message):
        ShrunkBertConfig(**SIZES, **TEXT, per_layer_config={1: layer})


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("family", "cls"), CLASSIFIERS)
def test_gradients_are_those_of_the_masked_model(family, cls):
    masked = build(family, cls, num_labels=3).double()
    shrunk = shrink(masked)
    losses = []
    for model, checkpointing in ((masked, False), (shrunk, False), (shrunk, True)):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()  # there is no checkpointing in eval mode
            for module in model.modules():
                module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
        inputs = make_inputs(family)
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        loss = model(**inputs, labels=torch.tensor([0, 2, 1])).loss
        loss.backward()
        losses.append(loss.detach())
        groups = find_unit_groups(model)
        rows = slice(8, 16) if model is masked else slice(0, 8)  # head 1 is the first that is left in layer 0
        losses.append(groups[1].readers[0].weight.grad[rows].clone())
        losses.append(groups[1].writer.weight.grad[:, rows].clone())
    assert_same(losses[:3], losses[3:6], 1e-9, 1e-9)
    assert_same(losses[:3], losses[6:], 1e-9, 1e-9)


def test_the_stock_trainer_trains_and_resumes(tmp_path):
    rows = [{"input_ids": [2, *range(i % 7 + 10, i % 7 + 15), 3], "labels": i % 2} for i in range(16)]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_steps": 3}
    options |= {"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4}
    states = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-3")):
        model = shrink(build("bert", BertForSequenceClassification), multiple_of=8)
        args = TrainingArguments(str(tmp_path / "run"), **options)
        trainer = Trainer(model, args, train_dataset=Dataset.from_list(rows))
        trainer.train(resume_from_checkpoint=resume)
        states.append(trainer.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    start = shrink(build("bert", BertForSequenceClassification), multiple_of=8).state_dict()
    assert all(not torch.equal(v, start[n]) for n, v in states[0].items() if "dense.weight" in n and "pooler" not in n)
    loaded = ShrunkBertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(value, states[0][name]) for name, value in loaded.state_dict().items())
    assert loaded.config.widths[2] == {"neurons": 8, "heads": 4}
    assert isinstance(AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-6"), ShrunkBertModel)
