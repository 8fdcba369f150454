"""The READMEs say what is so: their Python runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
from datasets import DatasetDict, concatenate_datasets
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "hf_moebert").rglob("README.md"), *(ROOT / "model_cards").rglob("*.md")])
PAGES += sorted((ROOT / "benchmarks").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_are_python(page):
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        compile(block, f"{page.name}[{number}]", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imported_names_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        lines = re.sub(r"\(\s*([^()]*?)\s*\)", lambda m: "(" + " ".join(m[1].split()) + ")", block).splitlines()
        exec("\n".join(line for line in lines if re.match(r"(from|import) (hf_moebert|transformers)", line)), {})


def test_the_front_page_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for page in (ROOT / "hf_moebert" / "methods").glob("*/README.md"):
        assert len(page.read_text().splitlines()) <= 120, page
    for example in (ROOT / "examples").glob("*.py"):
        assert len(example.read_text().splitlines()) <= 60, example


@pytest.fixture
def tiny_distilbert(tiny_teacher, tmp_path):
    """A folder with a tiny random DistilBERT and its tokenizer, which gives no token types."""
    config = DistilBertConfig(vocab_size=9, dim=32, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=16)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "distilbert")
    names = ["input_ids", "attention_mask"]
    BertTokenizer.from_pretrained(tiny_teacher, model_input_names=names).save_pretrained(tmp_path / "distilbert")
    return tmp_path / "distilbert"


@pytest.mark.parametrize(("folder", "found"), [("tiny_teacher", "Bert"), ("tiny_distilbert", "DistilBert")])
def test_the_sixty_seconds_run(folder, found, tmp_path, monkeypatch, tiny_sst2, request):
    """The block of the front page, on tiny models and data in place of the Hub's."""
    dense = request.getfixturevalue(folder)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = block.replace("textattack/bert-base-uncased-SST-2", str(dense))
    code = code.replace("max_steps=600", "max_steps=4")
    assert str(dense) in code
    assert "max_steps=4" in code
    monkeypatch.chdir(tmp_path)
    enough = DatasetDict({"train": concatenate_datasets([tiny_sst2["train"]] * 4)})  # of texts to prune by
    monkeypatch.setattr("datasets.load_dataset", lambda *name: {("nyu-mll/glue", "sst2"): enough}[name])
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    small = AutoModelForSequenceClassification.from_pretrained("small")
    assert type(small).__name__ == f"Shrunk{found}ForSequenceClassification"
    assert small.num_parameters() < scope["model"].num_parameters()
