"""The example of MoEBERT, on a tiny model and a file."""

import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification


EXAMPLE = Path(__file__).parents[2] / "examples" / "moebert.py"


@pytest.mark.process
def test_the_example_compresses_saves_and_reloads(tmp_path, tiny_teacher, tiny_sst2, monkeypatch, capsys):
    file = tmp_path / "texts.jsonl"
    tiny_sst2["train"].to_json(file)
    options = {"model": tiny_teacher, "dataset": file, "text_column": "sentence", "output_dir": tmp_path / "student"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *words, "--max_steps", "2", "--num_experts", "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "Accuracy of 2 experts in int8: " in capsys.readouterr().out
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert (student.config.model_type, student.config.num_experts) == ("moebert", 2)
