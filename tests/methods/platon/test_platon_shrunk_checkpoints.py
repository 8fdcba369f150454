"""Shrunk models are saved, loaded, exported and run like any other."""

import copy
import json

import new_process
import numpy as np
import onnxruntime
import pytest
import torch
from platon_shrunk_models import (
    CLASSES,
    EVERY,
    TEXT,
    assert_same,
    build,
    make_inputs,
    outputs,
)
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertForTokenClassification,
    RobertaForQuestionAnswering,
    ViTForImageClassification,
    pipeline,
)
from transformers.exporters import OnnxConfig, OnnxExporter

from hf_moebert.methods.platon.configuration_shrunk import ShrunkDistilBertConfig
from hf_moebert.methods.platon.conversion import shrink
from hf_moebert.methods.platon.modeling_units import find_unit_groups


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


@pytest.mark.parametrize(("family", "cls"), EVERY)
def test_the_code_of_all_classes_travels(tmp_path, family, cls):
    shrunk = shrink(build(family, cls, num_hidden_layers=1))
    shrunk.save_pretrained(tmp_path)
    files = {f"configuration_{name}.py" for name in ("families", "paths", "shrunk", "strict", "widths")}
    files |= {f"modeling_{name}.py" for name in ("empty_losses", "shrunk", "stock", "strict", "surgery", "units")}
    assert {file.name for file in tmp_path.glob("*.py")} == files
    classes = {f"modeling_shrunk.Shrunk{sibling.__name__}" for sibling in CLASSES[family]}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.pop("AutoConfig") == f"configuration_shrunk.{type(shrunk.config).__name__}"
    assert set(auto_map.values()) == classes


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
import importlib, json, pathlib, sys
import torch, transformers

torch.set_grad_enabled(False)
folders = list(pathlib.Path(sys.argv[1]).iterdir())
sys.modules["hf_moebert"] = None  # importing it fails
found = {}
for folder in folders:
    auto = getattr(transformers, folder.name.split("-")[1])
    inputs = {name: torch.tensor(value) for name, value in json.loads((folder / "inputs.json").read_text()).items()}
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert model.__module__.startswith("transformers_modules."), model.__module__
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    found[folder.name] = outputs[0].tolist()
    body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(body(**inputs)[0], model.base_model(**inputs)[0])
    model.save_pretrained(folder / "again")
    loaded = auto.from_pretrained(folder / "again", trust_remote_code=True)
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])

del sys.modules["hf_moebert"]
importlib.import_module("hf_moebert")
for folder in folders:
    auto = getattr(transformers, folder.name.split("-")[1])
    inputs = {name: torch.tensor(value) for name, value in json.loads((folder / "inputs.json").read_text()).items()}
    model = auto.from_pretrained(folder)
    assert model.__module__.startswith("hf_moebert."), model.__module__
    assert model(**inputs)[0].tolist() == found[folder.name]
print()  # the question of transformers whether to trust is on this line
print(json.dumps(found))
"""
REPRESENTATIVES = {  # every family, and every head
    "bert-AutoModelForMaskedLM": BertForMaskedLM,
    "roberta-AutoModelForQuestionAnswering": RobertaForQuestionAnswering,
    "distilbert-AutoModelForTokenClassification": DistilBertForTokenClassification,
    "vit-AutoModelForImageClassification": ViTForImageClassification,
}


@pytest.mark.process
@torch.no_grad()
def test_another_process_loads_them_with_and_without_the_package(tmp_path):
    wanted = {}
    for name, cls in REPRESENTATIVES.items():
        family, folder = name.split("-")[0], tmp_path / "models" / name
        shrunk, inputs = shrink(build(family, cls)), make_inputs(family)
        shrunk.save_pretrained(folder)
        (folder / "inputs.json").write_text(json.dumps({key: value.tolist() for key, value in inputs.items()}))
        wanted[name] = shrunk(**inputs)[0]
    done = new_process.run(STRANGER, tmp_path / "models")
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


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx_runtime_gives_the_same_logits(tmp_path):
    """Those of texts are exported with experts or a CRF: see `test_stack_by_hand.py` and `test_onnx.py`."""
    model = shrink(build("vit", ViTForImageClassification, num_hidden_layers=1))
    OnnxExporter().export(model, make_inputs("vit"), OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = make_inputs("vit", rows=5)
    logits, *_ = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(logits, model(**inputs).logits.detach(), atol=1e-4)
