"""The example of PLATON, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification


SCRIPT = Path(__file__).parents[2] / "examples" / "platon.py"


@pytest.mark.process
def test_the_example_runs(tmp_path, monkeypatch, capsys, tiny_teacher, tiny_sst2):
    data = DatasetDict(train=tiny_sst2["train"], validation=tiny_sst2["train"])
    monkeypatch.setattr("datasets.load_dataset", lambda *names: data)
    folder = tmp_path / "out"
    options = ["--model_name_or_path", tiny_teacher, "--max_steps", 20, "--output_dir", folder]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    scope = runpy.run_path(str(SCRIPT), run_name="__main__")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.model_type == "shrunk_bert"
    assert model.num_parameters() < scope["model"].num_parameters()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{scope['model'].num_parameters():,} -> {model.num_parameters():,} parameters, accuracy ")
