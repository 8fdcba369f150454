"""Write files of tensors entirely or not at all, and read them only if every byte is as it was written."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .drafts import CHECKSUM, replacing


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
