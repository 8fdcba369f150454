"""The public face: names, registration, and what an import does not do."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, Trainer

import hf_moebert


ROOT = Path(__file__).parents[1]


def test_every_public_name_exists_and_says_what_it_is():
    for name in hf_moebert.__all__:
        assert getattr(hf_moebert, name).__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", hf_moebert.__version__)


def test_types_are_registered_with_the_auto_classes():
    config = AutoConfig.for_model("moebert", num_hidden_layers=1, hidden_size=24, intermediate_size=3072)
    assert type(config) is hf_moebert.MoEBertConfig
    assert type(AutoModel.from_config(config)) is hf_moebert.MoEBertModel
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model) is hf_moebert.MoEBertForSequenceClassification
    assert issubclass(hf_moebert.DistillationTrainer, Trainer)


def test_a_second_import_registers_again_without_harm():
    importlib.reload(hf_moebert)


IMPORT = """
import random, sys
CONNECTIONS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}
def refuse(event, arguments):
    if event in CONNECTIONS: raise AssertionError(f"an import opened a connection: {event} {arguments}")
sys.addaudithook(refuse)
import numpy, torch
before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
import hf_moebert, hf_moebert.cli
assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
print(*{"datasets", "evaluate", "fastapi", "matplotlib", "sklearn"} & sys.modules.keys())
"""


@pytest.mark.process
def test_an_import_opens_no_connection_draws_no_random_number_and_needs_little():
    answer = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == []


def test_pictures_without_matplotlib_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hf_moebert.reporting.pictures", raising=False)
    with pytest.raises(ImportError, match=r"Pictures need matplotlib. Use `pip install hf_moebert\[plots\]`"):
        importlib.import_module("hf_moebert.reporting.pictures")


def test_the_page_on_pypi_has_no_links_that_lead_nowhere(monkeypatch):
    metadata = {}
    monkeypatch.setattr("setuptools.setup", metadata.update)
    runpy.run_path(str(ROOT / "setup.py"))
    page, links = metadata["long_description"], r"\]\((?!https?://|#)"
    assert re.findall(links, (ROOT / "README.md").read_text())
    assert not re.findall(links, page)
    for words in (
        "PLATON, single weights",
        "`moebert`: feed-forward networks",
        "[Zuo et al. 2022](https://arxiv.org/",
    ):
        assert words in page
