"""What of a folder goes into a packed copy, and that the copy is whole or absent."""

import zipfile

import pytest
import torch
from pruned_models import make_bert

from hf_moebert.checkpoints.folders import is_pickle
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.packing import pack_folder


CARRIED = {
    "source.spm",
    "tokenizer.model",
    "bpe.codes",
    "LICENSE",
    "NOTICE",
    "modules.json",
    "merges.txt",
    "card é.md",
}
CARRIED |= {"1_Pooling/config.json", "2_Dense/model.safetensors", "chat/a/b.jinja", "code.py", "picture.png"}
LEFT = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "onnx/model.onnx"}
LEFT |= {"tf_model.h5", "trainer_state.json", "platon_state.safetensors", "optimizer.pt", "training_args.bin", ".env"}
LEFT |= {"rng_state_0.pth", "checkpoint-5/config.json", "runs/events", "weights.pt", "checkpoint_manifest.json"}
LEFT |= {"_training.lock"}


def test_what_is_neither_weights_nor_training_state_comes_along(tmp_path):
    source, output = tmp_path / "source", tmp_path / "new" / "packed"
    make_bert().save_pretrained(source)
    for name in CARRIED | LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "NOTICE 2").symlink_to(source / "NOTICE")
    pack_folder(source, output)
    names = {file.relative_to(output).as_posix() for file in output.rglob("*") if file.is_file()}
    assert names == {"config.json", "model.safetensors", "NOTICE 2"} | CARRIED
    assert all((output / name).read_text() == name for name in CARRIED)
    assert (output / "NOTICE 2").read_text() == "NOTICE"
    assert not (output / "NOTICE 2").is_symlink()
    packed, dense = load_model(output).state_dict(), load_model(source).state_dict()
    assert packed.keys() == dense.keys()
    assert all(torch.equal(packed[name], weight) for name, weight in dense.items())
    assert [path.name for path in output.parent.iterdir()] == ["packed"]


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a link to an empty folder"])
def test_a_copy_is_whole_or_absent(tmp_path, monkeypatch, before):
    source, output = tmp_path / "source", tmp_path / "packed"
    make_bert().save_pretrained(source)
    (source / "NOTICE").write_text("notice")
    if before != "nothing":
        (tmp_path / "empty").mkdir()
        if before == "an empty folder":
            (tmp_path / "empty").rename(output)
        else:
            output.symlink_to(tmp_path / "empty")
    found = sorted(tmp_path.rglob("*"))

    def fail(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", fail)
        with pytest.raises(OSError, match="No space left"):
            pack_folder(source, output)
    assert sorted(tmp_path.rglob("*")) == found
    pack_folder(source, output)
    assert {path.name for path in output.iterdir()} == {"config.json", "model.safetensors", "NOTICE"}


def test_a_damaged_archive_counts_as_a_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "notes")
    assert not is_pickle(tmp_path / "a.zip")
    damaged = (tmp_path / "a.zip").read_bytes().replace(b"PK\x01\x02", b"PK\x00\x00")
    (tmp_path / "b.zip").write_bytes(damaged)
    assert is_pickle(tmp_path / "b.zip")
