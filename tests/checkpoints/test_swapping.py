"""A packed model that is put in the place of another: interrupted anywhere, one of the two is loaded."""

import json
import re
import resource

import pytest
import torch
from pruned_models import make_bert
from transformers import AutoModelForSequenceClassification

from hf_moebert import save_packed
from hf_moebert.checkpoints import swapping


class Killed(BaseException):
    """What no code catches."""


def make(seed, **options):
    model = make_bert(**options)
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.bert.embeddings.LayerNorm.bias):  # first and last
            parameter.fill_(seed)
    return model


def load(folder):
    """Return the seed of the model in a folder, of which all must be of one save, or what refuses it."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    except ValueError as error:
        return re.sub(r".*(config.json names, but model).*", r"\1", str(error))
    (seed,) = {*model.classifier.weight.flatten().tolist(), *model.bert.embeddings.LayerNorm.bias.tolist()}
    return seed


def dense(model, folder):
    model.save_pretrained(folder)


def sharded(model, folder):
    save_packed(model, folder, max_shard_size="8KB")


def die_at(monkeypatch, number):
    """Let the process die before the file operation of this number; return how many there were."""
    calls = []

    def dying(function):
        def call(*arguments, **options):
            calls.append(arguments)
            if len(calls) == number:
                raise Killed
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(swapping.os, "replace", dying(swapping.os.replace))
    monkeypatch.setattr(swapping.Path, "unlink", dying(swapping.Path.unlink))
    return calls


def crash_everywhere(tmp_path, first, second):
    """Put the model of seed 2 in the place of that of seed 1, dying before each operation; return what is loaded."""
    found = []
    for number in range(1, 99):
        folder = tmp_path / str(number)
        first(folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = die_at(patch, number)
            try:
                second(folder)
            except Killed:
                pass
        found.append(load(folder))
        if len(calls) < number:
            return found
    raise AssertionError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (save_packed, save_packed),
        (dense, save_packed),
        (save_packed, sharded),
        (sharded, save_packed),
        (dense, sharded),
    ],
)
def test_an_interrupted_save_leaves_the_old_or_the_new_model(tmp_path, before, after):
    found = crash_everywhere(tmp_path, lambda folder: before(make(1), folder), lambda folder: after(make(2), folder))
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert found[-2:] == [2, 2]


@pytest.mark.parametrize("change", ["labels", "shards"])
def test_a_mixture_is_refused(tmp_path, change):
    save, options = (sharded, {}) if change == "shards" else (save_packed, {"id2label": {0: "a", 1: "b"}})

    def second(folder):
        model = make(2)
        model.config.update(options)
        save(model, folder)

    found = crash_everywhere(tmp_path, lambda folder: save(make(1), folder), second)
    assert set(found) == {1, 2, "config.json names, but model"}
    assert found[-1] == 2


def test_nothing_is_left_of_the_old_model(tmp_path):
    sharded(make(1), tmp_path)
    save_packed(make(2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    sharded(make(1), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert load(tmp_path) == 1


def test_config_json_has_the_hashes_of_the_weights_and_of_no_others(tmp_path):
    save_packed(make(1), tmp_path)
    save_packed(make(2), tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["files"] == swapping.hash_weights(tmp_path)
    assert entry["replaced_files"] is None


def test_a_checkpoint_of_0_1_0_has_no_hashes_and_is_loaded(tmp_path):
    save_packed(make(1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["files"], config["quantization_config"]["replaced_files"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path) == 1


def test_a_flipped_byte_of_the_weights_is_found(tmp_path):
    save_packed(make(1), tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"names, but model.safetensors has the SHA-256 .* of one save, or save it"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 400, 10_000])
def test_a_full_disk_leaves_the_old_model(tmp_path, size):
    save_packed(make(1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors' cannot be written"):
            save_packed(make(2), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
