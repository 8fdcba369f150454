"""Publish a finished checkpoint folder on the Hub."""

import fnmatch
import glob
import zipfile
from os import PathLike
from pathlib import Path

import huggingface_hub


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Files that a Trainer keeps to resume: of no use to others, and mostly pickle.
TRAINER_FILES = (
    "training_args.bin",
    "optimizer*",
    "scheduler.*",
    "scaler.*",
    "*_state.*",
    "rng_state*",
    "checkpoint-*",
    "runs",
)
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}


def publish(folder: str | PathLike[str], repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a finished checkpoint folder, with its code, card and pictures, to the Hub.

    Hidden files and the files a Trainer resumes from are not uploaded. An interrupted upload can be repeated.

    Args:
        folder: Folder with `config.json` and `model.safetensors` (or its shards and their index).
        repo_id: "name" or "owner/name"; created if it does not exist.
        private: Whether only its owner may see the repository.
        revision: Branch to upload to, created if it does not exist; the main branch by default.

    Returns:
        Address of the commit; its last part is the revision to pin.

    Raises:
        ValueError: If the folder is not a checkpoint, holds a pickle or a link that leads out of it, or if
            `private` is set for a repository that exists and is public.
    """
    folder = Path(folder)
    files = _list_files(folder)
    names = {file.as_posix() for file in files}
    if "config.json" not in names or names.isdisjoint(WEIGHTS):
        raise ValueError(
            f"`folder` must hold config.json and model.safetensors, got {str(folder)!r}. Call `save_pretrained` first."
        )
    api = huggingface_hub.HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"`private` cannot be had: {repo_id!r} exists and is public. Use another `repo_id`.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        allow_patterns=[glob.escape(name) for name in sorted(names)],
        commit_message="Upload model",
    )
    return commit.commit_url


def _list_files(folder: Path) -> list[Path]:
    """List the files to publish, relative to the folder, and refuse those that must never be."""
    files = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(_stays_behind(part) for part in relative.parts):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`folder` must not link out of itself, got {str(relative)!r}. Copy the file instead.")
        if path.is_file():
            if _is_pickle(path):
                raise ValueError(
                    f"`folder` must not hold pickle files, which run code when read, got {str(relative)!r}. "
                    f"Save as safetensors, or remove it."
                )
            files.append(relative)
    return files


def _stays_behind(name: str) -> bool:
    return name.startswith(".") or any(fnmatch.fnmatch(name, pattern) for pattern in TRAINER_FILES)


def _is_pickle(path: Path) -> bool:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with path.open("rb") as stream:
        start = stream.read(9)
    if path.suffix == ".safetensors" and start[8:] == b"{":
        return False  # the length of its header may by chance look like a pickle's first bytes
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # protocol opcode, number
        return True
    if zipfile.is_zipfile(path):  # what `torch.save` writes is a zip file around a pickle
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False
