"""The lines of the README run: a MoEBERT in int8, in torch and in ONNX Runtime."""

import re
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from hf_moebert import MoEBertConfig, MoEBertForSequenceClassification, inference


BLOCKS = re.findall(r"```python\n(.*?)```", (Path(inference.__path__[0]) / "README.md").read_text(), re.DOTALL)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_a_moebert_runs_as_int8_in_both_engines(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "bad"]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path / "student")
    torch.manual_seed(0)
    config = MoEBertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_experts=4,
        expert_size=16,
        num_shared_neurons=4,
        initializer_range=0.2,
    )
    MoEBertForSequenceClassification(config).save_pretrained(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    in_torch, in_onnx = {}, {}
    exec(BLOCKS[0], in_torch)
    exec(BLOCKS[1], in_onnx)
    logits = (
        in_onnx["classify"].model(**in_onnx["tokenizer"](in_onnx["texts"], padding=True, return_tensors="pt")).logits
    )
    assert len(in_onnx["answers"]) == 2
    assert in_onnx["manifest"]["precisions"]["int8"]["difference_to_float32"]["texts"] == 2
    torch.testing.assert_close(logits, in_torch["logits"], atol=0.1 * float(logits.abs().max()), rtol=0)
