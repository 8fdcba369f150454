"""The examples of matrix product operators, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification


EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.process


def run(name, options, data, monkeypatch, capsys):
    data = DatasetDict(train=data["train"], validation=data["train"])
    monkeypatch.setattr("datasets.load_dataset", lambda *names: data)
    monkeypatch.setattr("sys.argv", [name, *map(str, options)])
    scope = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return scope, capsys.readouterr().out.splitlines()[-1]


def test_a_classifier_is_compressed(tmp_path, monkeypatch, capsys, tiny_teacher, tiny_sst2):
    options = ["--model_name_or_path", tiny_teacher, "--max_steps", 4, "--output_dir", tmp_path]
    scope, last = run("mpo.py", options, tiny_sst2, monkeypatch, capsys)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert model.config.quantization_config.matrices
    assert dense.num_parameters() == scope["dense"].num_parameters() > model.num_parameters()
    ids = torch.arange(2, 8)[None]
    torch.testing.assert_close(dense.eval()(ids).logits, model.eval()(ids).logits)
    assert last.startswith(f"{dense.num_parameters():,} -> {model.num_parameters():,} parameters, accuracy ")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_encoder_gets_an_adapter(tmp_path, monkeypatch, capsys, tiny_teacher, tiny_sst2):
    options = ["--model_name_or_path", tiny_teacher, "--bond", 8, "--max_steps", 4, "--output_dir", tmp_path]
    scope, last = run("mpo_adapter.py", options, tiny_sst2, monkeypatch, capsys)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".mpo_auxiliary." in name for name in names)
    assert "base_model.model.classifier.weight" in names  # the head is trained and saved
    trained, total = scope["model"].get_nb_trainable_parameters()
    assert last.startswith(f"{trained:,} of {total:,} parameters trained, accuracy ")
    ids = torch.arange(2, 8)[None]
    assert torch.equal(scope["reloaded"].eval()(ids).logits, scope["model"].eval()(ids).logits)
