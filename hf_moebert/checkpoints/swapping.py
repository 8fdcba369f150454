"""Put a new checkpoint in the place of an old one, so that one of the two can be loaded and never a mixture."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .drafts import sync
from .forms import FORM_MARK
from .manifests import hash_file


SHARDS = "model-*.safetensors"


def hash_weights(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of the files that hold the weights of a checkpoint, by name; of none if there are none."""
    single, shards = Path(folder) / SAFE_WEIGHTS_NAME, sorted(Path(folder).glob(SHARDS))
    files = [single] if single.exists() else shards  # as transformers chooses
    return {file.name: hash_file(file) for file in files}


def find_mixture(found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Compare the SHA-256 of weights files, by name, with those of one save, and return what differs."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            return f"{name} is {'missing' if name in wanted else 'of another save'}"
        if found[name] != wanted[name]:
            return f"{name} has the SHA-256 {found[name]} instead of {wanted[name]}"
    return None


def swap(
    draft: Path, folder: Path, write_config: Callable[[Path, dict[str, str], dict[str, str] | None], None]
) -> None:
    """Move a checkpoint into a folder that may hold an old one.

    First, config.json takes its place, which accepts both weights if it describes both; then the weights; then a
    config.json that accepts the new ones alone. If this is interrupted between a file of weights and another that
    replaces it under one configuration, the folder holds the old or the new checkpoint. If the configuration changes,
    or shards that are replaced by shards of the same names, it may hold files of both, which their SHA-256 tell.

    Args:
        draft: The new checkpoint, in the same file system.
        folder: The folder.
        write_config: Writes the new config.json into a folder, with the SHA-256 of the weights that it accepts.
    """
    new, old = hash_weights(draft), hash_weights(folder)
    write_config(draft, new, None)
    if old and _describe(draft) == _describe(folder):
        write_config(draft, new, old)
    _move(draft / CONFIG_NAME, folder)
    decisive = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)  # transformers loads what they name, the second one first
    for path in sorted(draft.iterdir(), key=lambda path: (path.name in decisive, path.name)):
        _move(path, folder)
    stale = old.keys() | set(decisive)
    stale -= new.keys() if SAFE_WEIGHTS_NAME in new else new.keys() | {SAFE_WEIGHTS_INDEX_NAME}
    for name in sorted(stale, key=lambda name: name != SAFE_WEIGHTS_NAME):
        (folder / name).unlink(missing_ok=True)
    write_config(draft, new, None)
    _move(draft / CONFIG_NAME, folder)


def _move(path: Path, folder: Path) -> None:
    sync(path)
    os.replace(path, folder / path.name)


def _describe(folder: Path) -> dict[str, Any] | None:
    """Return what config.json says of the model, without the form of its weights."""
    try:
        config = dict(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
        config["fusion_config"] = [mark for mark in config.get("fusion_config") or () if mark != FORM_MARK]
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    config.pop("quantization_config", None)
    return config
