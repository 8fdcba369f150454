"""Pruned models lose their zero units for good, and stay models like any other."""

import copy
import json
import logging
import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)
from transformers import logging as transformers_logging
from transformers.exporters import OnnxConfig, OnnxExporter

from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods.platon.configuration_shrunk import ShrunkBertConfig, ShrunkDistilBertConfig
from hf_moebert.methods.platon.conversion import shrink
from hf_moebert.methods.platon.modeling_shrunk import ShrunkBertForSequenceClassification, ShrunkBertModel
from hf_moebert.methods.platon.modeling_units import find_unit_groups


TEXT = {"vocab_size": 60, "max_position_embeddings": 40}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "bert": lambda **fields: BertConfig(**SIZES, **TEXT, **fields),
    "roberta": lambda **fields: RobertaConfig(**SIZES, **TEXT, **fields),
    "distilbert": lambda **fields: DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, **TEXT, **fields),
    "vit": lambda **fields: ViTConfig(**SIZES, image_size=8, patch_size=4, **fields),
}
CLASSES = {
    "bert": [
        BertModel,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
        BertForMaskedLM,
    ],
    "roberta": [
        RobertaModel,
        RobertaForSequenceClassification,
        RobertaForTokenClassification,
        RobertaForQuestionAnswering,
        RobertaForMaskedLM,
    ],
    "distilbert": [
        DistilBertModel,
        DistilBertForSequenceClassification,
        DistilBertForTokenClassification,
        DistilBertForQuestionAnswering,
        DistilBertForMaskedLM,
    ],
    "vit": [ViTModel, ViTForImageClassification],
}
EVERY = [(family, cls) for family, classes in CLASSES.items() for cls in classes]
CLASSIFIERS = [(family, classes[1]) for family, classes in CLASSES.items()]
PRUNED = {"neurons": [range(5, 24), [], range(48)], "heads": [[0, 2], [3], []]}  # units without columns, by layer
WIDTHS = [{"neurons": 29, "heads": 2}, {"neurons": 48, "heads": 3}, {"neurons": 1, "heads": 4}]


@torch.no_grad()
def build(family, cls, *, pruned=PRUNED, **fields):
    """A lively model of which some units' columns are zero; their rows and biases are not."""
    if cls in (BertForQuestionAnswering, RobertaForQuestionAnswering, DistilBertForQuestionAnswering):
        fields["num_labels"] = 2
    torch.manual_seed(0)
    model = cls(CONFIGS[family](**fields)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            parameter.copy_(torch.randn_like(parameter) / 4)
    for group in find_unit_groups(model):
        columns = group.writer.weight.unflatten(1, (group.num_units, group.unit_size))
        columns[:, list(pruned[group.kind][group.layer])] = 0
    return model


def make_inputs(family, rows=3):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 60, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model, inputs):
    """All layers' hidden states and the head's output, in float64: products of other shapes round differently."""
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    found = copy.deepcopy(model).double()(**inputs, output_hidden_states=True)
    return [*found.hidden_states, found[0]]


def assert_same(one, other, atol=1e-6, rtol=1e-6):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


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


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("family", "cls"), EVERY)
def test_saved_and_loaded(tmp_path, family, cls):
    shrunk = shrink(build(family, cls))
    shrunk.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    state = shrunk.state_dict()  # a stock `load_state_dict`, as the Trainer's, finds every name
    assert all(torch.equal(value, state[name]) for name, value in stored.items())
    loaded, info = type(shrunk).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.widths == shrunk.config.widths
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == shrunk.config.to_diff_dict()
    assert config == copy.deepcopy(config)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert_same(outputs(shrunk, make_inputs(family)), outputs(loaded, make_inputs(family)), 0, 0)
    half = type(shrunk).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    body = AutoModel.from_pretrained(tmp_path)
    wanted = shrunk.base_model(**make_inputs(family)).last_hidden_state
    assert torch.equal(body(**make_inputs(family)).last_hidden_state, wanted)


def test_a_fresh_model_has_the_widths_its_config_names():
    layers = {1: {"hidden_dim": 8, "n_heads": 1}, 2: {"n_heads": 3}}
    config = ShrunkDistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, **TEXT, per_layer_config=layers)
    model = AutoModel.from_config(config)
    widths = [{"neurons": 48, "heads": 4}, {"neurons": 8, "heads": 1}, {"neurons": 48, "heads": 3}]
    assert model.config.widths == widths
    found = [g.num_units for g in find_unit_groups(model)]
    assert found == [number for width in widths for number in width.values()]
    assert 0.015 < model.transformer.layer[1].ffn.lin1.weight.std() < 0.025  # as transformers initialises
    assert not model.transformer.layer[1].ffn.lin1.bias.any()


STRANGER = """
import json, pathlib, sys
import torch
from transformers import (
    AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoModelForTokenClassification,
)

torch.set_grad_enabled(False)
trust = sys.argv[2] == "trust"
if trust:
    sys.modules["hf_moebert"] = None  # importing it fails
else:
    import hf_moebert
found = {}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    family, auto = folder.name.split("-")
    inputs = {name: torch.tensor(value) for name, value in json.loads((folder / "inputs.json").read_text()).items()}
    model = globals()[auto].from_pretrained(folder, trust_remote_code=trust)
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    found[folder.name] = outputs[0].tolist()
    if trust:
        assert model.__module__.startswith("transformers_modules."), model.__module__
        body = AutoModel.from_pretrained(folder, trust_remote_code=True)
        torch.testing.assert_close(body(**inputs)[0], model.base_model(**inputs)[0])
        again = folder / "again"
        model.save_pretrained(again)
        loaded = globals()[auto].from_pretrained(again, trust_remote_code=True)
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
print()  # the question of transformers whether to trust is on this line
print(json.dumps(found))
"""


@pytest.mark.parametrize("how", ["package", "trust"])
@torch.no_grad()
def test_another_process_loads_them(tmp_path, how):
    wanted = {}
    autos = ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"]
    autos += ["AutoModelForQuestionAnswering", "AutoModelForMaskedLM"]
    for family, cls in EVERY:
        auto = "AutoModelForImageClassification" if family == "vit" else autos[CLASSES[family].index(cls)]
        folder = tmp_path / "models" / f"{family}-{auto if cls is not ViTModel else 'AutoModel'}"
        shrunk, inputs = shrink(build(family, cls)), make_inputs(family)
        shrunk.save_pretrained(folder)
        files = {"configuration_shrunk.py", "modeling_shrunk.py", "modeling_units.py"}
        assert {file.name for file in folder.glob("*.py")} == files
        (folder / "inputs.json").write_text(json.dumps({name: value.tolist() for name, value in inputs.items()}))
        wanted[folder.name] = shrunk(**inputs)[0]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "models"), how],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(torch.tensor(value), wanted[name], atol=1e-5, rtol=1e-5)


def test_a_pipeline_runs_them(tmp_path):
    model = build("bert", BertForSequenceClassification, id2label={0: "bad", 1: "good"})
    tokenizer = BertTokenizer(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film"])}
    )
    shrink(model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["film", "film film film"]
    want = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts)
    for one, other in zip(
        pipeline("text-classification", model=str(tmp_path))(texts, batch_size=2), want, strict=True
    ):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize(("family", "cls"), [pair for pair in CLASSIFIERS if pair[0] != "roberta"])  # a slow twin
def test_onnx_runtime_gives_the_same_logits(tmp_path, family, cls):
    model = shrink(build(family, cls))
    OnnxExporter().export(model, make_inputs(family), OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = make_inputs(family, rows=5)
    logits, *_ = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(logits, model(**inputs).logits.detach(), atol=1e-4)


# ------------------------------------------------------------------------------------------------------- refusals


def test_unfit_models_and_numbers_are_refused():
    with pytest.raises(ValueError, match="`model` must be one of .*'BertModel'.*, got BertForNextSentencePrediction"):
        shrink(build("bert", BertForNextSentencePrediction))
    with pytest.raises(ValueError, match="`model` must be of a type .* got 'Linear'"):
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
