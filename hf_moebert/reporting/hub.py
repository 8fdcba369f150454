"""Publish a finished checkpoint folder on the Hub."""

import glob
from os import PathLike
from pathlib import Path

import huggingface_hub

from hf_moebert.checkpoints.folders import is_pickle, list_files


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


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
    files = list_files(folder)
    for file in files:
        if is_pickle(folder / file):
            raise ValueError(
                f"`folder` must not hold pickle files, which run code when read, got {str(file)!r}. Save as "
                "safetensors, or remove it."
            )
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
