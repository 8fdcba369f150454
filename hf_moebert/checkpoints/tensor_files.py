"""Write files of tensors entirely or not at all, and read them only if every byte is as it was written."""

import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


CHECKSUM = "sha256"  # entry of the metadata
# What safetensors and torch raise for a header that lies about the rest of its file
DAMAGE = (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AttributeError)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Fingerprint tensors by names, dtypes, shapes and bytes, in any order, and by the texts beside them.

    Args:
        tensors: Tensors by name, of any shapes and dtypes, on any device.
        metadata: Texts by name; an entry `sha256` is left out.

    Returns:
        A SHA-256 in hexadecimal.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if texts := {name: text for name, text in (metadata or {}).items() if name != CHECKSUM}:
        found.update(json.dumps(texts, sort_keys=True).encode())
    return found.hexdigest()


def save_tensors(
    file: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum: entirely, or not at all.

    Args:
        file: File to write, in a folder that exists.
        tensors: Tensors by name.
        metadata: Texts to store beside them.

    Raises:
        OSError: If it cannot be written; an earlier file stays as it was.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(metadata or {})
    with replacing(file) as draft:
        save_file(stored, draft, metadata=texts | {CHECKSUM: digest(stored, texts)})


def read_tensors(file: str | os.PathLike[str], *, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that `save_tensors` wrote, or one without a checksum, as version 0.1.0 did.

    Args:
        file: File to read.
        remedy: What to do if it cannot be read: a sentence for the error message.

    Returns:
        The tensors by name, and the texts beside them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    if not Path(file).exists():
        raise FileNotFoundError(f"{str(file)!r} must be a safetensors file, but does not exist. {remedy}")
    try:
        with safe_open(file, framework="pt") as opened:
            texts = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except DAMAGE as error:
        raise ValueError(
            f"{str(file)!r} must be a complete safetensors file, but it is not: {error}. {remedy}"
        ) from error
    check_digest(file, texts, digest(tensors, texts), remedy=remedy)
    return tensors, texts


def check_digest(file: str | os.PathLike[str], texts: Mapping[str, str], found: str, *, remedy: str) -> None:
    """Compare the checksum in a file's metadata, if there is one, with that of its content.

    Raises:
        ValueError: If they differ.
    """
    if texts.get(CHECKSUM, found) != found:
        raise ValueError(
            f"{str(file)!r} must be as it was written, with the SHA-256 {texts[CHECKSUM]}, but has {found}: it is "
            f"damaged. {remedy}"
        )


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a draft beside a file, which takes its place when the block ends, and is removed if the block fails.

    Raises:
        OSError: If it cannot be written; an earlier file stays as it was.
    """
    with drafting(file) as draft:
        yield draft
        sync(draft)
        draft.replace(file)
        if os.name == "posix":  # elsewhere folders cannot be opened
            sync(Path(file).parent)


@contextmanager
def drafting(place: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden name beside a file for a draft of it, a file or a folder, which is removed when the block ends.

    Drafts of processes of this machine that were killed are removed, too.

    Raises:
        OSError: If the block fails to write.
    """
    place = Path(place)
    draft = place.with_name(f".{place.name}.{platform.node()}-{os.getpid()}.draft")
    with naming(place):
        try:
            for path in place.parent.glob(f".{glob.escape(place.name)}.{platform.node()}-*.draft"):
                if not _is_running(int(path.name.removesuffix(".draft").rpartition("-")[2])):
                    _remove(path)
            yield draft
        finally:
            _remove(draft)


@contextmanager
def naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file or folder in the errors of a block that writes it.

    Raises:
        OSError: If the block fails to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{str(place)!r} cannot be written: {error}. Free some space, or choose another folder."
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(process: int) -> bool:
    """Return whether another process of this machine runs, as far as it can be told."""
    return process != os.getpid() and (not os.path.isdir("/proc/self") or os.path.isdir(f"/proc/{process}"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
