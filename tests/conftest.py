"""Shared by all tests: this folder on the path, the marks of transformers' own tests, and a tiny world.

What takes seconds to import is imported in the fixtures: the process that hands the tests out reads this file, too.
"""

import gc
import logging
import re
from functools import partial

import pytest
from transformers_suite import MARKERS


def pytest_configure(config):
    gc.set_threshold(10_000, 10, 10)  # a tenth of the time of an export went into collecting what it still needs
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: used by transformers' own suite")


def pytest_ignore_collect(collection_path, config):
    """Import no file whose tests all start a process where such tests are left out."""
    if config.option.markexpr == "not process" and collection_path.suffix == ".py":
        return re.search(r"^pytestmark = .*mark\.process", collection_path.read_text(), re.MULTILINE) and True
    return None


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Exempt everything imported so far from garbage collections: each run of a Trainer forces one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_levels():
    """Give the loggers back the levels that a command or a program sets for its process."""
    loggers = [logging.getLogger(name) for name in ("hf_moebert", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def few_resamples(monkeypatch):
    """Bootstrap quickly where nobody looks at an interval."""
    from hf_moebert.measuring import quality

    for name in ("bootstrap_interval", "paired_bootstrap"):
        monkeypatch.setattr(quality, name, partial(getattr(quality, name), rounds=10))


@pytest.fixture
def tiny_teacher(tmp_path_factory):
    """A folder with a tiny random classifier and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("teacher")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "book"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocab)}, model_max_length=16)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_sst2():
    """A data set with SST-2's columns."""
    from datasets import Dataset, DatasetDict

    rows = {"sentence": ["good film", "bad book", "good good book", "film bad"] * 2, "label": [1, 0, 1, 0] * 2}
    return DatasetDict(train=Dataset.from_dict(rows))
