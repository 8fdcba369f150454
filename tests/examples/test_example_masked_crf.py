"""The example of the masked CRF, on a tiny model and tiny data."""

import runpy
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForTokenClassification, BertConfig, BertModel, BertTokenizer

from hf_moebert import BertCrfForTokenClassification


SCRIPT = Path(__file__).parents[2] / "examples" / "masked_crf.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "in", "new", "york", "rome", "we", "are"]


@pytest.mark.process
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(tmp_path / "bert")
    vocab = {word: index for index, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocab, model_max_length=16).save_pretrained(tmp_path / "bert")
    rows = {
        "tokens": [["we", "are", "in", "new", "york"], ["rome", "in", "rome"]] * 4,
        "ner_tags": [["O", "O", "O", "B-LOC", "I-LOC"], ["B-LOC", "O", "B-LOC"]] * 4,
    }
    data = DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows))
    monkeypatch.setattr("datasets.load_dataset", lambda name: data)
    options = ["--model_name_or_path", tmp_path / "bert", "--output_dir", tmp_path / "out"]
    options += ["--learning_rate", 1e-2, "--max_steps", 20]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert isinstance(model, BertCrfForTokenClassification)
    assert model.crf.tag_scheme == "IOB2"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("accuracy 1.000 over 32 words; 'we are in new york': [{'entity_group': 'LOC'")
