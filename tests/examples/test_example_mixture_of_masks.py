"""The example of learned masks, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


SCRIPT = Path(__file__).parents[2] / "examples" / "mixture_of_masks.py"


@pytest.mark.process
@pytest.mark.parametrize("num_experts", [1, 2])
def test_the_example_runs(tmp_path, monkeypatch, capsys, tiny_teacher, num_experts):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("good film\nbad book\n" * 40)
    folder = tmp_path / "out"
    options = ["--model_name_or_path", tmp_path / "dense", "--train_file", tmp_path / "text.txt"]
    options += ["--num_experts", num_experts, "--block_size", 8, "--max_steps", 6, "--output_dir", folder]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    scope = runpy.run_path(str(SCRIPT), run_name="__main__")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.mask_stage == "compact"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{scope['model'].num_parameters():,} -> {model.num_parameters():,} parameters, loss of")
    if num_experts == 1:
        assert {layer.mlp.down_proj.in_features for layer in model.model.layers} < set(range(24))
