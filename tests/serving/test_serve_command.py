"""The command `serve`: its refusals, and the names of models."""

import sys

import pytest
from typer.testing import CliRunner

from hf_moebert import cli
from hf_moebert.cli_serve import name_models


def test_the_command_fails_with_one_line(monkeypatch, tmp_path):
    def serve(*arguments):
        result = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        return result.stderr

    assert "must hold config.json" in serve(tmp_path)
    assert "Invalid value for '--port'" in serve(tmp_path, "--port", 99999)
    assert "must hold config.json" in serve(
        tmp_path, "--max-batch", 512
    )  # no complaint of the queue, which is larger then
    assert "Leave it out for 256, or lower `max_batch`" in serve(tmp_path, "--queue_size", 8)
    assert "'no such folder' does not exist" in serve(tmp_path, "--allow_updates", "no such folder")
    assert "Models must have different names" in serve(tmp_path, tmp_path)
    assert "`--workers` must be 1 with `--allow-updates`" in serve(
        tmp_path, "--workers", 2, "--allow-updates", tmp_path
    )
    assert "must hold keys of at least 16" in serve(tmp_path, "--api-key-file", __file__)
    monkeypatch.setitem(sys.modules, "hf_moebert.serving.app", None)
    assert "pip install hf_moebert[serve]" in serve(tmp_path)


def test_models_are_named_by_their_folders():
    assert name_models(["a/b", "c=d/b", "e"]) == {"b": "a/b", "c": "d/b", "e": "e"}
    assert name_models(["./x=1/b"]) == {"b": "./x=1/b"}
    with pytest.raises(ValueError, match=r"Models must have different names, got \['b'\] twice"):
        name_models(["a/b", "c/b"])
