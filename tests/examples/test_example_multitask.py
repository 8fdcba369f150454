"""The example of many tasks on one BERT, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
from transformers import AutoModel

from hf_moebert import MultiTaskBertModel


SCRIPT = Path(__file__).parents[2] / "examples" / "multitask.py"


@pytest.mark.process
def test_the_example_runs(tmp_path, monkeypatch, capsys, tiny_teacher, tiny_sst2):
    monkeypatch.setattr("datasets.load_dataset", lambda *names: tiny_sst2)
    options = ["--model_name_or_path", tiny_teacher, "--output_dir", tmp_path / "out"]
    options += ["--tasks", "good", "bad", "--frozen_layers", 1, "--max_steps", 2]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(model, MultiTaskBertModel)
    assert model.tasks == ["bad", "good"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("4 -> 3 layers run; 'good film': {'bad': {'label': ")
