"""The engine is the fastest of those that answer the same, and the choice is kept for as long as it holds."""

import shutil

import pytest
from tiny_exports import PRECISIONS, TEXTS, make, make_tokenizer
from transformers import BertForSequenceClassification

from hf_moebert import choose_engine, export_onnx, load_fastest
from hf_moebert.inference import optimize
from hf_moebert.measuring import engines


pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]  # of the exporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with its tokenizer and its graphs."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = make(BertForSequenceClassification).eval(), make_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export_onnx(model, folder / "onnx", precisions=PRECISIONS, tokenizer=tokenizer)
    return folder


def timed(fastest):
    """Make times in which one engine takes half of the time of all others."""
    return lambda calls, **options: {name: engines.np.array([0.5 if name == fastest else 1.0] * 2) for name in calls}


def test_the_fastest_engine_within_the_difference_is_chosen_and_kept(folder, monkeypatch):
    monkeypatch.setattr(engines, "time_rounds", timed("onnx float32"))
    choice = choose_engine(folder, TEXTS, threads=1)
    assert (choice.engine, choice.precision) == ("onnx", "float32")
    assert choice.speed_ups["onnx float32"] == 2
    assert choice.differences["onnx float32"] < 1e-6
    assert choice.reason.startswith("onnx float32 is the fastest on 3 texts of 3 to 8 tokens, 8 at once, 1 thread")
    monkeypatch.setattr(engines, "time_rounds", timed("torch float32"))
    assert choose_engine(folder, TEXTS, threads=1) == choice  # kept
    assert choose_engine(folder, TEXTS, threads=1, batch_size=2).engine == "torch"  # measured again
    assert type(load_fastest(folder, TEXTS, threads=1, batch_size=2)).__name__ == "BertForSequenceClassification"


@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor lacks int8 products")
def test_int8_is_not_chosen_where_it_is_far_or_slow_or_noise(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "time_rounds", timed("onnx int8"))
    assert choose_engine(folder, TEXTS, allowed_difference=0.5).precision == "int8"
    assert choose_engine(folder, TEXTS, allowed_difference=0).precision == "float32"  # it is not the same
    monkeypatch.setattr(engines, "time_rounds", timed("torch float32"))
    assert choose_engine(folder, TEXTS, allowed_difference=0.4).precision == "float32"  # it takes longer
    monkeypatch.setattr(engines, "time_rounds", timed("onnx int8"))
    for module in (engines, optimize):
        monkeypatch.setattr(module, "unsupported_reason", lambda precision, packed: "no VNNI")
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "onnx")
    monkeypatch.setattr(engines, "export_onnx", refuse)
    choice = choose_engine(tmp_path / "model", TEXTS)
    assert (choice.engine, choice.precision) == ("torch", "float32")
    assert choice.left_out == {
        "torch bfloat16": "no VNNI",
        "torch int8": "no VNNI",
        "onnx": "not here",
    }


def refuse(*args, precisions, **options):
    assert precisions == ["float32"]
    raise ValueError("not here")


def test_bad_arguments_are_refused(folder):
    for options in ({"texts": []}, {"texts": "a"}, {"batch_size": 0}, {"allowed_difference": 1}):
        with pytest.raises(ValueError, match=r"`texts` must be a list of texts, `batch_size` at least 1 and"):
            choose_engine(folder, **{"texts": TEXTS} | options)
