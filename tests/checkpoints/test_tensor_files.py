"""Files of tensors are written entirely or not at all, and read only as they were written."""

import errno
import random
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_moebert.checkpoints.drafts import CHECKSUM, replacing
from hf_moebert.checkpoints.tensor_files import digest, read_tensors, save_tensors
from hf_moebert.methods.multitask.functional import chain_hashes


REMEDY = "Copy it again."


def tensors():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 4, generator=generator)
    return {
        "matrix": drawn,
        "half": drawn.to(torch.bfloat16),
        "keep": drawn > 0,
        "count": torch.tensor(3),
        "none": torch.zeros(0, 2),
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some_state.safetensors"
    save_tensors(path, tensors(), {"step": "3"})
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_read_is_what_was_written(file):
    found, texts = read_tensors(file, remedy=REMEDY)
    assert texts == {"step": "3", CHECKSUM: digest(tensors(), {"step": "3"})}
    assert found.keys() == tensors().keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors().items()
    )


def test_any_reader_of_safetensors_reads_it(file):
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(tensors())


def test_tensors_need_not_be_contiguous_or_alone(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "x", {"a": shared.T, "b": shared.T[1]})
    found, _ = read_tensors(tmp_path / "x", remedy=REMEDY)
    assert torch.equal(found["a"], shared.T)
    assert torch.equal(found["b"], shared.T[1])


def test_the_digest_is_that_of_multi_task_models():
    assert digest(tensors()) == chain_hashes([tensors()])[0]


def test_the_digest_does_not_depend_on_the_order():
    assert digest(dict(reversed(tensors().items())), {"a": "1", "b": "2"}) == digest(tensors(), {"b": "2", "a": "1"})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"matrix": t["matrix"] + 1},
        lambda t: t | {"matrix": t["matrix"].view(4, 3)},
        lambda t: t | {"matrix": t["matrix"].view(torch.int32)},
        lambda t: {name: tensor for name, tensor in t.items() if name != "none"},
        lambda t: {("other" if name == "keep" else name): tensor for name, tensor in t.items()},
    ],
    ids=["value", "shape", "dtype", "fewer", "name"],
)
def test_the_digest_depends_on(change):
    assert digest(change(tensors())) != digest(tensors())


def test_a_file_without_a_checksum_is_read(tmp_path):
    save_file(tensors(), tmp_path / "old", metadata={"step": "3"})
    _, texts = read_tensors(tmp_path / "old", remedy=REMEDY)
    assert texts == {"step": "3"}


def test_every_flipped_bit_is_found_or_does_not_matter(file):
    """Only the name of the entry may suffer: the file is then one of 0.1.0, and its content is what it was."""
    whole, chance, harmless, unnamed = file.read_bytes(), random.Random(0), 0, 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            found, texts = read_tensors(file, remedy=REMEDY)
        except ValueError as error:
            unnamed += str(file) not in str(error) or REMEDY not in str(error)
        else:
            harmless += 1
            assert digest(found) == digest(tensors())
            assert texts["step"] == "3"
    assert unnamed == 0
    assert harmless <= len(CHECKSUM) + 8


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_file_that_was_cut_is_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(
        ValueError, match=r"some_state.safetensors' must be a complete safetensors file.* Copy it again"
    ):
        read_tensors(file, remedy=REMEDY)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"gone' must be a safetensors file, but does not exist. Copy it again"
    ):
        read_tensors(tmp_path / "gone", remedy=REMEDY)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Copy it again"):
        read_tensors(tmp_path, remedy=REMEDY)


def test_nothing_is_left_of_a_file_that_cannot_be_written(file, monkeypatch):
    whole = file.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match=r"some_state.safetensors' cannot be written.* Free some space"):
            save_tensors(file, tensors(), {"step": "4"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(file.parent) == [file.name]
    assert file.read_bytes() == whole


def fail(file, error):
    with replacing(file) as draft:
        draft.write_bytes(b"x")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_nothing_is_left_of_a_block_that_fails(file, error):
    whole = file.read_bytes()
    with pytest.raises(type(error)):
        fail(file, error)
    assert names(file.parent) == [file.name]
    assert file.read_bytes() == whole


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OSError, match=r"gone/x' cannot be written"):
        save_tensors(tmp_path / "gone" / "x", tensors())
