"""The example of distillation, on tiny models of two families and a file."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig


EXAMPLE = Path(__file__).parents[2] / "examples" / "distillation.py"


@pytest.fixture
def run(tmp_path, tiny_sst2, monkeypatch, capsys):
    """Run the example with a teacher, and return the student that it saved."""

    def run(teacher, epochs):
        file = tmp_path / "texts.jsonl"
        tiny_sst2["train"].to_json(file)
        words = ["--dataset", str(file), "--text_column", "sentence", "--output_dir", str(tmp_path / "student")]
        monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--model", str(teacher), *words, "--epochs", str(epochs)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        assert "Accuracy of 1 layers: " in capsys.readouterr().out
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")

    return run


@pytest.mark.process
def test_the_student_starts_as_every_second_layer(run, tiny_teacher):
    student = run(tiny_teacher, epochs=0)
    teacher = AutoModelForSequenceClassification.from_pretrained(tiny_teacher)
    (layer,) = student.bert.encoder.layer
    for name, tensor in teacher.bert.encoder.layer[1].state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


@pytest.mark.process
def test_another_family_is_halved_and_trained(run, tiny_teacher, tmp_path):
    sizes = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
    teacher = AutoModelForSequenceClassification.from_config(DistilBertConfig(vocab_size=9, **sizes))
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "teacher")
    student = run(tmp_path / "teacher", epochs=2)
    assert student.config.n_layers == 1
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)
