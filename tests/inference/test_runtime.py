"""An exported model answers without torch as the model in torch does, for every kind."""

import importlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from tiny_exports import PRECISIONS, TEXTS, make
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    pipeline,
)

import hf_moebert
from hf_moebert import load_onnx, save_embedder
from hf_moebert.architectures.heads import kind_of
from hf_moebert.checkpoints.json_files import save_json
from hf_moebert.compress.verifying import verify
from hf_moebert.measuring.comparison import Latency, TextColumns, measure
from hf_moebert.runtime import TextModel, folders, load, verifying
from hf_moebert.runtime.verifying import GOLDEN_FILE


PAIRS = [("a good film", "bad"), ("bad", "a bad film a good film"), ("film", "film")]
KINDS = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]  # of the exporter


def with_problem(model, problem):
    model.config.problem_type = problem
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_scored_as_by_the_pipeline(exported, kind):
    model, tokenizer, folder, manifest = exported
    answers = TextModel(load(folder).session, folder, manifest | {"kind": kind}, "float32")
    before = model.config.problem_type
    try:
        scored = pipeline("text-classification", with_problem(model, KINDS[kind]), tokenizer=tokenizer, device="cpu")
        for texts in (TEXTS, PAIRS, []):
            asked = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
            wanted = [scored(one, top_k=None) for one in asked]
            found = answers.classify(texts, batch_size=2)
            assert [[one["label"] for one in row] for row in found] == [
                [one["label"] for one in row] for row in wanted
            ]
            for got, one in zip(found, wanted, strict=True):
                assert [x["score"] for x in got] == pytest.approx([x["score"] for x in one], abs=1e-5)
        assert [len(row) for row in answers.classify(TEXTS, top_k=1)] == [1, 1, 1]
    finally:
        model.config.problem_type = before


def test_pairs_are_scored_as_by_a_cross_encoder(reranker, tmp_path):
    model, tokenizer, folder = reranker
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rival, answers = CrossEncoder(str(tmp_path), device="cpu"), load(folder)
    np.testing.assert_allclose(answers.score(PAIRS), rival.predict(PAIRS), atol=1e-5)
    raw = rival.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(answers.score(PAIRS, raw=True), raw, atol=1e-5)
    assert answers.kind == "reranking"


def test_embeddings_are_those_of_sentence_transformers(embedder, tmp_path, caplog):
    model, tokenizer, form, folder = embedder
    save_embedder(model, tokenizer, tmp_path, form)
    rival, answers = SentenceTransformer(str(tmp_path), device="cpu"), load(folder)
    texts = [*TEXTS, "a good film " * 5]
    with caplog.at_level(logging.WARNING):
        found = answers.embed(texts, batch_size=2)
    assert "1 of 4 texts had more than 8 tokens, and were cut." in caplog.text
    np.testing.assert_allclose(found, rival.encode(texts), atol=1e-5)
    np.testing.assert_allclose(
        answers.embed(TEXTS, prompt="query"), rival.encode(TEXTS, prompt_name="query"), atol=1e-5
    )
    assert answers.embed([]).shape[0] == 0
    rival[0].model = load_onnx(folder)  # an export takes the place of the model in it
    np.testing.assert_allclose(rival.encode(texts), found, atol=1e-5)


@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor lacks int8 products")
def test_int8_is_near_and_independent_of_the_batch(embedder):
    exact, rough = load(embedder[3]), load(embedder[3], precision="int8")
    found = rough.embed(TEXTS)
    assert ((found * exact.embed(TEXTS)).sum(1) > 0.99).all()
    np.testing.assert_allclose(rough.embed(TEXTS, batch_size=1), found, atol=1e-6)


@pytest.mark.usefixtures("few_resamples")
def test_an_export_is_measured_beside_its_original(exported, embedder, tmp_path):
    model, tokenizer, graphs, _ = exported
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    rows = Dataset.from_dict({"text": [*TEXTS, "a film"] * 2, "label": ["LABEL_0", "LABEL_1"] * 4})
    quick = {"latency": Latency(seq=4, rounds=2), "columns": TextColumns(max_length=8)}
    sources = {"dense": str(tmp_path / "dense"), "onnx": str(graphs)}
    result = measure(sources, rows, baseline="dense", optimized=["float32"], **quick)["models"]
    assert list(result) == ["dense", "onnx", "dense, float32"]
    assert result["onnx"]["scores"]["accuracy"] == result["dense"]["scores"]["accuracy"]
    assert result["onnx"]["footprint"]["total"] == result["dense"]["footprint"]["total"]
    assert result["onnx"]["footprint"]["bytes_on_disk"] > 1000
    pairs = Dataset.from_dict({"text": TEXTS, "other": TEXTS[::-1], "label": [0.1, 0.9, 0.1]})
    columns = TextColumns(text_pair_column="other", max_length=8)
    alone = measure({"onnx": str(embedder[3])}, pairs, baseline="onnx", **quick | {"columns": columns})["models"]
    assert alone["onnx"]["scores"]
    assert all(np.isfinite(one["value"]) for one in alone["onnx"]["scores"].values())


def test_features_are_those_of_the_pipeline(embedder):
    model, tokenizer, _, folder = embedder
    options = {"tokenizer": tokenizer, "device": "cpu", "return_tensors": True}
    wanted = pipeline("feature-extraction", model=model, **options)(TEXTS)
    found = pipeline("feature-extraction", model=load_onnx(folder), **options)(TEXTS)
    for got, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, one, atol=1e-5, rtol=0)


def test_kinds_are_told_by_class_and_problem():
    heads = {
        "embedding": make(BertModel),
        "tagging": make(BertForTokenClassification),
        "question-answering": make(BertForQuestionAnswering),
        "other": make(BertForMaskedLM),
        "reranking": make(BertForSequenceClassification, num_labels=1),
    }
    assert {kind: kind_of(model) for kind, model in heads.items()} == {kind: kind for kind in heads}
    for kind, problem in KINDS.items():
        assert kind_of(with_problem(make(BertForSequenceClassification), problem)) == kind


def test_bad_input_gets_one_clear_error(exported, embedder, tmp_path):
    classifier, vectors = load(exported[2]), load(embedder[3])
    for call, message in (
        (lambda: classifier.classify("a text"), "`texts` must be a list, got 'a text'. Put a single text into a list"),
        (lambda: classifier.classify(["a", 3]), "must hold texts, or pairs of texts as tuples, got 3 at place 1"),
        (lambda: classifier.classify(["a"], batch_size=0), "`batch_size` must be at least 1, got 0"),
        (
            lambda: classifier.embed(["a"]),
            "`embed` needs a model of the kind embedding, got 'classification'. Call",
        ),
        (lambda: classifier.tag(["a"]), "`tag` needs a model of the kind tagging"),
        (lambda: classifier.score(["a"]), "`score` needs a model of the kind reranking or regression"),
        (lambda: vectors.classify(["a"]), "got 'embedding'. Call `embed`"),
        (lambda: vectors.embed(["a"], prompt="answer"), r"`prompt` must be one of \['query'\], got 'answer'"),
        (lambda: load(exported[2], precision="int4"), "`precision` must be one that was exported"),
        (lambda: load(tmp_path), "does not exist. Export a model by `export_onnx`"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()


def test_a_changed_or_bare_folder_is_refused(exported, tmp_path):
    folder = tmp_path / "graphs"
    shutil.copytree(exported[2], folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(ValueError, match=r"must be as it was exported, but .*tokenizer.json has .* bytes instead"):
        load(folder)
    tokenizer.unlink()
    manifest = json.loads((folder / folders.MANIFEST).read_text())
    del manifest["files"]["tokenizer.json"], manifest["sha256"]
    save_json(folder / folders.MANIFEST, manifest)
    with pytest.raises(ValueError, match=r"must hold tokenizer.json to read texts.* Export the model with its tok"):
        load(folder)


def test_golden_outputs_are_checked(exported, monkeypatch):
    folder = exported[2]
    found = verify(folder)
    assert list(found) == list(PRECISIONS)
    assert max(found.values()) < 1e-5
    other = {name: x if name.startswith("input.") else x + 9 for name, x in load_file(folder / GOLDEN_FILE).items()}
    monkeypatch.setattr(verifying, "load_file", lambda path: other)
    with pytest.raises(ValueError, match="The outputs in float32 must be within 0.001 of those of golden.saf"):
        verify(folder)


ALONE = """
import json, sys
for name in ("torch", "transformers", "safetensors.torch", "datasets", "huggingface_hub"):
    sys.modules[name] = None  # importing it fails
from hf_moebert.runtime import load
classifier, vectors = load(sys.argv[1]), load(sys.argv[2])
print(json.dumps([classifier.classify(json.loads(sys.argv[3])), vectors.embed(json.loads(sys.argv[3])).tolist()]))
import hf_moebert
try:
    hf_moebert.export_onnx
except ImportError as error:
    print(error)
"""


def test_it_runs_where_no_torch_is(exported, embedder):
    command = [sys.executable, "-c", ALONE, str(exported[2]), str(embedder[3]), json.dumps(TEXTS)]
    root = str(Path(hf_moebert.__file__).parents[1])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers, refusal = done.stdout.splitlines()
    labels, vectors = json.loads(answers)
    assert labels == load(exported[2]).classify(TEXTS)
    np.testing.assert_allclose(vectors, load(embedder[3]).embed(TEXTS), atol=1e-6)
    assert "torch" in refusal


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


def test_ways_of_batching_are_timed(benchmark, embedder, tmp_path, monkeypatch, capsys):
    lengths = benchmark("lengths")
    model, tokenizer, _, graphs = embedder
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.setattr(lengths, "PRECISIONS", PRECISIONS)
    lengths.main(lengths.LengthsArguments(str(tmp_path / "model"), graphs, texts, batch_size=2, rounds=2))
    table = capsys.readouterr().out
    for precision in PRECISIONS:
        assert all(f"| onnx {precision}: {way} " in table for way in (*lengths.WAYS, "alone"))


@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor lacks int8 products")
def test_forms_of_int8_are_timed(benchmark, embedder, monkeypatch, capsys):
    forms = benchmark("onnx_int8")
    program = onnx_ir.load(embedder[3] / "float32" / "model.onnx")
    traced = SimpleNamespace(components={"model": SimpleNamespace(program=program)})
    monkeypatch.setattr(forms, "trace", lambda model, example: traced)
    monkeypatch.setattr(forms, "make_models", lambda args: {"tiny": embedder[0]})
    forms.main(forms.Int8Arguments(cases=["1x4", "2x8"], rounds=2))
    assert "| tiny | 2x8 |" in capsys.readouterr().out
