"""Exported models: what torch gives, where a transformers model fits, and refusals; exported once for all tests."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from tiny_exports import PRECISIONS, TEXTS
from tiny_families import make_model
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForTokenClassification,
    pipeline,
)

from hf_moebert import export_onnx, load_onnx, optimize_for_inference, prune_structured
from hf_moebert.inference import linears, onnx_export
from hf_moebert.inference.onnx_int8 import quantize_program
from hf_moebert.inference.onnx_runtime import OnnxModel
from hf_moebert.methods import masked_crf
from hf_moebert.runtime import folders


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter


@pytest.mark.process
def test_a_crf_on_narrowed_layers_gives_its_emissions(tmp_path):
    names = dict(enumerate(["O", "B-a", "I-a"]))
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 30}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    torch.manual_seed(0)
    tagger = DistilBertForTokenClassification(DistilBertConfig(**sizes, **labels)).eval()
    examples = [{"input_ids": row, "attention_mask": [1] * 8} for row in torch.randint(30, (32, 8)).tolist()]
    model = masked_crf.from_dense(prune_structured(tagger, examples, keep_ratio=0.6, multiple_of=1))
    export_onnx(model, tmp_path / "graphs")
    ids = torch.randint(30, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = load_onnx(tmp_path / "graphs")(input_ids=ids, attention_mask=mask, word_mask=mask)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, word_mask=mask == 1)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-5)


def test_weights_of_any_size_that_are_picked_from_a_stack_become_constants():
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    stack = onnx.numpy_helper.from_array(np.ones((2, 1024, 768), np.float32), "stack")
    second = onnx.numpy_helper.from_array(np.array(1), "second")
    nodes = [helper.make_node("Gather", ["stack", "second"], ["picked"], axis=0)]
    nodes.append(helper.make_node("MatMul", ["x", "picked"], ["y"]))
    sides = [helper.make_tensor_value_info(*side) for side in (("x", kind, (3, 1024)), ("y", kind, (3, 768)))]
    graph = helper.make_graph(nodes, "graph", sides[:1], sides[1:], [stack, second])
    program = onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    onnx_export.fold_weights(program)
    assert [node.op_type for node in program.graph] == ["MatMul"]
    assert [tuple(value.shape) for value in program.graph.initializers.values()] == [(1024, 768)]


@pytest.mark.process
@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_batch_gives_what_torch_gives(exported, precision):
    model, tokenizer, folder, manifest = exported
    found = load_onnx(folder, precision=precision, threads=1)
    worst = manifest["precisions"]["int8"]["difference_to_float32"] if precision == "int8" else None
    for texts in (TEXTS[:1], TEXTS, TEXTS * 3):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        wanted, got = model(**batch), found(**batch)
        assert type(got) is type(wanted)
        assert got.keys() == wanted.keys()
        atol = 0.1 * wanted.logits.abs().max() if worst else 1e-5
        torch.testing.assert_close(got.logits, wanted.logits, atol=float(atol), rtol=1e-4)
        assert torch.equal(found(**batch, return_dict=False)[0], found(**batch)[0])
    ids = batch["input_ids"]
    assert torch.equal(found(ids).logits, found(ids, torch.ones_like(ids), torch.zeros_like(ids)).logits)
    assert worst is None or (worst["texts"] == 3 and 0.9 < worst["worst_cosine"] <= worst["mean_cosine"] <= 1.00001)


@pytest.mark.process
@torch.no_grad()
@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor has no int8 products")
def test_an_int8_answer_does_not_depend_on_neighbours_or_padding(exported):
    _, tokenizer, folder, _ = exported
    found = load_onnx(folder, precision="int8", threads=1)
    together = found(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    alone = torch.cat([found(**tokenizer([text], return_tensors="pt")).logits for text in TEXTS])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def product_graph(width, *, after):
    """A graph of two products with one weight, the second of which reads what `after` makes of the first."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    table = np.random.default_rng(1).normal(size=(50, width)).astype(np.float32)
    table[:, 3] *= 100  # the channel that is large in every row
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node(after, ["y"], ["z"]),
        helper.make_node("Gemm", ["z", "weight", "bias"], ["out"], transB=1),
    ]
    constants = {"table": table, "weight": weight, "bias": weight[0]}
    inputs = [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ("rows",))]
    outputs = [helper.make_tensor_value_info("out", kind, ("rows", width))]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run_graph(program, ids):
    written = onnx_ir.to_proto(program).SerializeToString()
    return onnxruntime.InferenceSession(written, folders.make_options(1)).run(None, {"ids": ids})[0]


@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor has no int8 products")
@pytest.mark.parametrize("after", ["Relu", "Gelu", "Tanh"])
def test_rows_in_int8_have_scales_of_their_own_and_even_channels(after):
    program, ids = product_graph(64, after=after), np.arange(50)
    wanted = run_graph(program, ids)
    plain = run_graph(quantize_program(program, None), ids)
    evened = quantize_program(program, {"ids": torch.arange(10)})
    found = run_graph(evened, ids)
    assert np.array_equal(np.concatenate([run_graph(evened, ids[row : row + 1]) for row in ids]), found)
    errors = [np.abs(one - wanted).max() / np.abs(wanted).max() for one in (found, plain)]
    assert errors[0] < (0.1 if after == "Tanh" else 0.03)  # whose slope is steep beside the size of its inputs
    assert errors[0] < errors[1] or after == "Tanh"
    kinds = [node.op_type for node in evened.graph]
    assert kinds.count("MatMulIntegerToFloat") == 2
    assert kinds.count("Abs") == (2 if after == "Tanh" else 1)  # what follows GELU or ReLU needs none
    assert run_graph(evened, ids[:0]).shape == (0, 64)  # an expert without a token


def test_narrow_products_stay_in_float32():
    program = product_graph(16, after="Relu")
    assert [node.op_type for node in quantize_program(program, None).graph] == ["Gather", "MatMul", "Relu", "Gemm"]


@pytest.mark.process
def test_a_pipeline_takes_it(exported):
    model, tokenizer, folder, _ = exported
    wanted = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(TEXTS, batch_size=2)
    found = pipeline("text-classification", model=load_onnx(folder), tokenizer=tokenizer, device="cpu")
    for got, one in zip(found(TEXTS, batch_size=2), wanted, strict=True):
        assert got["label"] == one["label"]
        assert got["score"] == pytest.approx(one["score"], abs=1e-5)


@pytest.mark.process
def test_the_manifest_tells_how_it_was_made(exported):
    _, tokenizer, folder, manifest = exported
    assert json.loads((folder / folders.MANIFEST).read_text()).items() >= manifest.items()
    assert manifest["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert manifest["max_length"] == 32
    assert list(manifest["precisions"]) == list(PRECISIONS)
    assert manifest["versions"].keys() >= {"hf_moebert", "onnxruntime", "transformers"}
    assert {"float32/model.onnx", "config.json", "tokenizer_config.json"} <= manifest["files"].keys()
    assert BertTokenizer.from_pretrained(folder)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert [path.name for path in folder.parent.iterdir()] == ["graphs"]  # no draft is left


@pytest.mark.process
def test_what_a_graph_cannot_do_is_refused(exported, monkeypatch):
    folder = exported[2]
    found = load_onnx(folder)
    ids = torch.ones(1, 33, dtype=torch.long)
    with pytest.raises(ValueError, match="Sequences must have 1 to 32 tokens, got 33. Truncate longer ones"):
        found(ids)
    with pytest.raises(ValueError, match=r"takes \['input_ids', .*, got also \['inputs_embeds', 'labels'\]"):
        found(ids[:, :3], inputs_embeds=ids, labels=ids, position_ids=None)
    with pytest.raises(ValueError, match="got no input_ids"):
        found(attention_mask=ids)
    with pytest.raises(ValueError, match="got an empty input_ids"):
        found(ids[:0])
    with pytest.raises(ValueError, match=r"`precision` must be one that was exported, \['float32'.*got 'bfloat16'"):
        load_onnx(folder, precision="bfloat16")
    if "int8" in PRECISIONS:
        noisy = lambda model, inputs: np.random.default_rng(0).normal(size=(len(TEXTS), 2))  # noqa: E731
        monkeypatch.setattr(OnnxModel, "run", noisy)
        with pytest.raises(ValueError, match="outputs in int8 must be within .* Run the model in float32 on this"):
            load_onnx(folder, precision="int8")


@pytest.mark.process
def test_a_changed_folder_is_refused(exported, tmp_path):
    folder = tmp_path / "graphs"
    shutil.copytree(exported[2], folder)
    config = folder / "float32" / "config.json"
    written = config.read_text()
    config.write_text(written + " ")
    with pytest.raises(
        ValueError, match=r"must be as it was exported, but .*float32/config.json has .* bytes instead"
    ):
        load_onnx(folder)
    config.write_text(written)
    (folder / "float32" / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"model.onnx is missing. Export the model again"):
        load_onnx(folder)
    manifest = folder / folders.MANIFEST
    manifest.write_text(manifest.read_text().replace('"max_length": 32', '"max_length": 99'))
    with pytest.raises(ValueError, match="must be as it was written, with the SHA-256"):
        load_onnx(folder)
    with pytest.raises(FileNotFoundError, match="does not exist. Export a model by `export_onnx`"):
        load_onnx(tmp_path)


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 20}
    return BartModel(BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "`model` must be a transformers model in float32 on the CPU, got Linear"),
        (lambda: make_model("bert").bfloat16(), "in torch.bfloat16 on cpu. Merge adapters first"),
        (lambda: optimize_for_inference(make_model("bert")), "got an optimised one. Call `revert_optimizations`"),
        (bart, "must read one text or image, got BartModel, which reads 'input_ids' and has a decoder"),
    ],
)
def test_models_that_cannot_be_exported_are_refused(tmp_path, build, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(build(), tmp_path / "graphs")
    assert not list(tmp_path.iterdir())


def test_arguments_are_refused_before_any_work(tmp_path, monkeypatch):
    model = make_model("bert")
    for precisions in ((), ("float32", "int4"), "int8"):
        with pytest.raises(ValueError, match=r"`precisions` must be some of \('float32', 'int8'\), got"):
            export_onnx(model, tmp_path / "graphs", precisions=precisions)
    with pytest.raises(ValueError, match="`tokenizer` must be given for 1 `texts`, got None"):
        export_onnx(model, tmp_path / "graphs", texts=["a"])
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="`folder` must be a new or empty folder"):
        export_onnx(model, tmp_path)
    monkeypatch.setattr(linears, "unsupported_reason", lambda precision, packed: "no VNNI")
    with pytest.raises(ValueError, match="'int8' does not: no VNNI"):
        export_onnx(model, tmp_path / "graphs", precisions=("float32", "int8"))
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    for call in (lambda: export_onnx(model, tmp_path / "graphs"), lambda: load_onnx(tmp_path)):
        with pytest.raises(ValueError, match=r'ONNX Runtime must be installed, but is not. Run `pip install "hf_moe'):
            call()


@pytest.mark.process
def test_what_the_exporter_or_the_check_refuses_leaves_nothing(tmp_path, monkeypatch, exported):
    model, _, folder, _ = exported

    def fail(*args, **kwargs):
        raise RuntimeError("no operator\nand a long story")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.exporters.OnnxExporter.export", fail)
        with pytest.raises(ValueError, match=r"BertForSequenceClassification is not: no operator. Use") as caught:
            export_onnx(model, tmp_path / "graphs")
        assert "story" not in str(caught.value)
    monkeypatch.setattr(onnx_export, "trace", lambda model, inputs: Saved(folder))
    other = BertForSequenceClassification(model.config).eval()
    with pytest.raises(ValueError, match=r"must give in ONNX Runtime what it gives in torch up to 0.0001"):
        export_onnx(other, tmp_path / "graphs")
    assert not list(tmp_path.iterdir())


class Saved:
    """A trace that writes the graph of another model."""

    def __init__(self, folder):
        self.folder = folder

    def save_pretrained(self, folder):
        shutil.copytree(self.folder / "float32", folder)
