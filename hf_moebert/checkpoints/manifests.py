"""Manifests: the names, sizes and SHA-256 of all files of a checkpoint, written when they are complete."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_files import read_json, save_json


MANIFEST_FILE = "checkpoint_manifest.json"
FORMAT_VERSION = "1"
# What the Trainer needs to go on as if it had never stopped, beside the weights
TRAINER_FILES = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*")


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """List all files of a checkpoint that are not hidden, when nothing will be written to it any more.

    Raises:
        OSError: If it cannot be written.
    """
    content = {"format_version": FORMAT_VERSION, "files": describe_files(folder)}
    save_json(Path(folder) / MANIFEST_FILE, content)


def find_fault(folder: str | os.PathLike[str]) -> str | None:
    """Compare a checkpoint with its manifest, and return what is wrong, or None if all files are as they were.

    Args:
        folder: A checkpoint; files that the manifest does not list are ignored.
    """
    remedy = "Resume from another checkpoint."
    try:
        manifest = read_json(Path(folder) / MANIFEST_FILE, remedy=remedy)
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing: its saving was cut short, or no callback of hf_moebert took part"
    except ValueError as error:
        return str(error).removesuffix(f". {remedy}")
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION or not isinstance(files, dict):
        return f"{MANIFEST_FILE} has format version {version!r}, and this release reads {FORMAT_VERSION!r}"
    return find_changed_file(folder, files)


def describe_files(folder: str | os.PathLike[str], *, pattern: str = "**/*") -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files in a folder, by their names in it; without hidden ones and manifests.

    Args:
        folder: The folder.
        pattern: Which of them; by default those of sub-folders, too.
    """
    files = _list_files(folder, pattern)
    return {name: {"size": path.stat().st_size, "sha256": hash_file(path)} for name, path in files.items()}


def find_changed_file(folder: str | os.PathLike[str], files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Compare a folder with what `describe_files` returned, and name the first file that is not as it was."""
    found = _list_files(folder)
    if not all(isinstance(expected, dict) and {"size", "sha256"} <= expected.keys() for expected in files.values()):
        return "the list of its files must give their sizes and SHA-256, but does not"
    for name, expected in files.items():  # sizes first: they cost nothing
        if name not in found:
            return f"{name} is missing"
        if (size := found[name].stat().st_size) != expected["size"]:
            return f"{name} has {size:,} bytes instead of {expected['size']:,}"
    for name, expected in files.items():
        if (sha256 := hash_file(found[name])) != expected["sha256"]:
            return f"{name} has the SHA-256 {sha256} instead of {expected['sha256']}"
    return None


def list_missing(folder: str | os.PathLike[str]) -> list[str]:
    """Return the patterns of the Trainer's files that a checkpoint without a manifest lacks."""
    if any(Path(folder).glob("global_step*")):  # of DeepSpeed, with files of its own
        return []
    return [pattern for pattern in TRAINER_FILES if not any(Path(folder).glob(pattern))]


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_files(folder: str | os.PathLike[str], pattern: str = "**/*") -> dict[str, Path]:
    paths = {p.relative_to(folder).as_posix(): p for p in sorted(Path(folder).glob(pattern)) if p.is_file()}
    hidden = {name for name in paths if any(part.startswith(".") for part in name.split("/"))}
    return {name: path for name, path in paths.items() if name not in hidden and path.name != MANIFEST_FILE}
