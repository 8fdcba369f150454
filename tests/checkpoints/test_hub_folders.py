"""Folders and Hub ids: what is downloaded, and what is neither."""

import json

import new_process
import pytest
from loopback_hub import loopback_hub  # noqa: F401

from hf_moebert.checkpoints.hub import find_folder
from hf_moebert.compress.door import compress
from hf_moebert.serving.loading import load_predictor


DOWNLOAD = """
import json, sys
from hf_moebert.checkpoints.hub import find_folder
def names(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
found = [names(find_folder("tester/small", exports=exports)) for exports in (False, True)]
try:
    find_folder("tester/none")
except FileNotFoundError as error:
    print(json.dumps([found, str(error)]))
"""


def test_folders_are_taken_as_they_are(tmp_path):
    assert find_folder(tmp_path) == find_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "a/b/c", "config.json"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    texts = [{"text": "a", "label": 0}]
    options = {"recipe": "int8", "data": texts, "output_dir": tmp_path / "out"}
    for open_door in (find_folder, load_predictor, lambda source: compress(source, **options)):
        with pytest.raises(FileNotFoundError, match=f"`model` must be a folder that exists .*, got '{source}'. Check"):
            open_door(source)
    assert not (tmp_path / "out").exists()


def test_a_failure_without_a_text_has_its_name(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("hf_moebert.checkpoints.hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="Check the path; the Hub says: ConnectionError"):
        find_folder("tester/small")


@pytest.mark.process
def test_neither_pickles_nor_code_are_downloaded(loopback_hub):  # noqa: F811
    plain = ["1_Pooling/config.json", "config.json", "model.safetensors", "vocab.txt"]
    files = [*plain, "modeling.py", "onnx/model.onnx", "pytorch_model.bin"]
    loopback_hub.create("tester/small", private=False)
    loopback_hub.commit("tester/small", "main", dict.fromkeys(files, b"{}"))
    (first, second), refusal = json.loads(new_process.run(DOWNLOAD).stdout)
    assert first == plain
    assert second == sorted([*plain, "onnx/model.onnx"])
    assert "got 'tester/none'. Check the path; the Hub says: " in refusal
