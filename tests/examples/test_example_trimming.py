"""The example of trimming, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
from datasets import DatasetDict
from transformers import AutoModel, AutoTokenizer


SCRIPT = Path(__file__).parents[2] / "examples" / "trimming.py"


@pytest.mark.process
def test_the_example_runs(tmp_path, monkeypatch, capsys, tiny_teacher, tiny_sst2):
    rows = tiny_sst2["train"].select([0, 1] * 20)  # "good film" and "bad book"
    monkeypatch.setattr("datasets.load_dataset", lambda *names: DatasetDict(train=rows, validation=rows))
    folder = tmp_path / "out"
    options = ["--model_name_or_path", tiny_teacher, "--keep_layers", 1, "--output_dir", folder]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    scope = runpy.run_path(str(SCRIPT), run_name="__main__")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is type(scope["model"])
    assert model.config.num_hidden_layers == 1
    assert len(tokenizer) == model.config.vocab_size <= len(scope["tokenizer"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        f"{scope['model'].num_parameters():,} -> {model.num_parameters():,} parameters, 9 -> 9 tokens"
    )
