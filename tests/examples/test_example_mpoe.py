"""The example of experts that share central tensors, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel


SCRIPT = Path(__file__).parents[2] / "examples" / "mpoe.py"


@pytest.mark.process
def test_the_example_runs(tmp_path, monkeypatch, capsys, tiny_teacher):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(vocab_size=9, **sizes)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("good film\nbad book\n" * 40)
    options = ["--model_name_or_path", tmp_path / "dense", "--train_file", tmp_path / "text.txt"]
    options += ["--block_size", 8, "--max_steps", 4, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    scope = runpy.run_path(str(SCRIPT), run_name="__main__")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, model.config.num_experts) == ("mpoe_gpt2", 4)
    sizes = [each.num_parameters() for each in (scope["dense"], model)]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{sizes[0]:,} -> {sizes[1]:,} parameters, loss of the last block ")
