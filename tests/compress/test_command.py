"""The commands of the door as a user types them, and what they end with."""

import errno
import json
import os
import re
import signal

import pytest
import yaml
from datasets import Dataset
from door_runs import texts
from tiny_classifiers import save_classifier
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from hf_moebert import cli
from hf_moebert.compress import door
from hf_moebert.compress.recipe_file import parse_recipe, read_recipe, shipped_recipes
from hf_moebert.inference.onnx_runtime import load_onnx


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, texts, and a recipe that trains nothing."""
    folder = tmp_path_factory.mktemp("place")
    save_classifier(folder / "given")
    texts().to_json(folder / "texts.jsonl")
    Dataset.from_list([{"text": "good"}]).to_json(folder / "one.jsonl")
    recipe = {"stages": [{"optimize": {"precision": "float32"}}], "target": {"tokens": 8}}
    (folder / "plain.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def compress(place, output, *options, model="given", data="texts.jsonl"):
    fixed = ["--recipe", place / "plain.yaml", "--max-length", "8", "--threads", "1"]
    return invoke("compress", place / model, "--output", output, "--data", place / data, *fixed, *options)


def test_a_run_ends_with_what_became_of_its_targets(place, tmp_path):
    done = compress(place, tmp_path / "met")
    assert done.exit_code == 0, done.output
    assert "met: accuracy +0.0000" in done.stdout
    assert (tmp_path / "met/report.html").is_file()
    missed = compress(place, tmp_path / "missed", "--speedup", "1000", "--json")
    assert missed.exit_code == 4
    assert json.loads(missed.stdout)["outcome"] == "speed or size missed"
    assert compress(place, tmp_path / "small", "--max-size", "1kB").exit_code == 4

    verified = invoke("verify", tmp_path / "met")
    assert verified.exit_code == 0, verified.output
    assert [line.split()[0] for line in verified.stdout.splitlines()] == ["plain", "optimised"]


def test_a_task_that_is_not_known_ends_with_five(place, tmp_path):
    save_classifier(place / "tagger")
    BertForMaskedLM(BertConfig(vocab_size=11, hidden_size=8, num_attention_heads=2)).save_pretrained(place / "tagger")
    result = compress(place, tmp_path / "run", model="tagger")
    assert result.exit_code == 5
    assert "got a BertForMaskedLM" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-size", "60 pounds"], "--max-size must be a number above 0 with one of kB, MB, GB"),
        (["--budget", "soon"], "--budget must be a number above 0 with one of s, m, h"),
        (["--set", "experts.num_experts=2"], "`set` must change one of target, optimize"),
        (["--data", "one.jsonl"], "at least 100 texts"),
    ],
)
def test_bad_use_is_one_line(place, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(place)
    result = compress(place, tmp_path / "run", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())


def test_a_dry_run_prints_a_recipe_that_can_be_read(place, tmp_path):
    result = compress(place, tmp_path / "run", "--dry-run", "--max-drop", "0.5", "--seed", "7", "--max-size", "2.5MB")
    recipe = parse_recipe(yaml.safe_load(result.stdout))
    assert (recipe.target.max_drop, recipe.target.max_size, recipe.seed) == (0.5, 2_500_000, 7)
    assert not (tmp_path / "run").exists()
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert re.fullmatch(r"# optimize: 938 of 938 parameters, about [\d.]+ times as fast", line)
    listed = invoke("recipes").stdout
    assert all(name in listed for name in shipped_recipes())
    budget = invoke(
        *("compress", place / "given", "--output", "o", "--data", place / "texts.jsonl"),
        *("--tokens", "8", "--budget", "1.5h", "--dry-run"),
    )
    assert read_recipe("auto", changes=["search.budget=5400"], tokens=8) == parse_recipe(yaml.safe_load(budget.stdout))


def test_inspect_tells_what_can_be_done(place):
    lines = invoke("inspect", place / "given").stdout.splitlines()
    assert lines[0].startswith("BertForSequenceClassification (bert), ")
    assert any(line.split()[:2] == ["prune", "yes"] for line in lines)
    assert json.loads(invoke("inspect", place / "given", "--json").stdout)["family"] == "bert"


def test_an_export_that_fails_ends_with_six(place, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("the graph gives something else.")

    monkeypatch.setattr("hf_moebert.compress.door.export_onnx", fail)
    result = compress(place, tmp_path / "run", "--export", "onnx")
    assert result.exit_code == 6
    assert "but was not exported: the graph gives something else." in result.stderr
    assert (tmp_path / "run/model").is_dir()


@pytest.mark.process
def test_a_result_is_exported(place, tmp_path):
    pytest.importorskip("onnxruntime")
    assert compress(place, tmp_path / "run", "--export", "onnx").exit_code == 0
    assert load_onnx(tmp_path / "run/onnx").config.num_labels == 2


def stop_by(error):
    def stop(*args, **kwargs):
        raise error

    return stop


def test_an_interrupted_command_ends_with_130_and_goes_on(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(door, "measure", stop_by(KeyboardInterrupt()))
        assert compress(place, tmp_path / "run").exit_code == 128 + signal.SIGINT
    assert compress(place, tmp_path / "run").exit_code == 2  # not by chance over what is there
    assert compress(place, tmp_path / "run", "--resume").exit_code == 0


def test_a_full_disk_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.setattr(door, "write_golden", stop_by(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    result = compress(place, tmp_path / "run")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "hf-moebert: [Errno 28] No space left on device")
