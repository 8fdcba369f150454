"""Files of a multi-task model: one for the trunk and one for every task, so that an update writes one of them."""

import filecmp
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from hf_moebert.checkpoints.drafts import drafting, naming, sync

from .configuration_multitask import TASK_NAME
from .functional import chain_hashes


TRUNK_FILE = "trunk.safetensors"


BRANCH_FILE = "branch-{}.safetensors"


def file_of_tensor(name: str) -> str | None:
    """Return the file that holds a tensor, or None if no file does."""
    part, _, rest = name.partition(".")
    if part == "trunk":
        return TRUNK_FILE
    task = rest.partition(".")[0]
    return BRANCH_FILE.format(task) if part == "branches" and TASK_NAME.fullmatch(task) else None


def hash_trunk(names: Iterable[str], read: Callable[[str], Tensor], num_layers: int) -> list[str]:
    """Fingerprint the embeddings and every layer of a trunk with `chain_hashes`.

    Args:
        names: Names of the tensors of the trunk; those of deeper layers are ignored.
        read: Returns the tensor of a name.
        num_layers: Number of layers.
    """
    places = ["embeddings.", *(f"layer.{i}." for i in range(num_layers))]
    parts = [[name for name in names if name.startswith(place)] for place in places]
    return chain_hashes({name: read(name) for name in part} for part in parts)


def hash_branch(tensors: Mapping[str, Tensor], config: Any) -> str:
    """Fingerprint a branch together with the trunk below it.

    Args:
        tensors: Tensors of one branch, by their names in the whole model.
        config: Configuration with the fingerprints of the trunk.
    """
    depth = _task_of(tensors, config).get("frozen_layers", 0)
    return chain_hashes([tensors], start=config.trunk_sha256[depth])[0]


def _task_of(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    """Return the task of a branch, nothing if none of its tensors has the name of one: a file may hold anything."""
    names = (name.split(".")[1] for name in tensors if name.startswith("branches."))
    return config.tasks.get(next(names, None), {})


def write_folder(folder: Path, state: Mapping[str, Tensor], config: Any) -> None:
    """Write weights, index and config.json, without touching files that would not change.

    Everything is written to a temporary folder first, and then renamed: config.json decides at once which model the
    folder holds. Before it come files of weights, those that replace one under another name, "branch-<task>.next", and
    an index of old and new; after it the replaced ones, which `finish_save` goes on with after an interrupted save.

    Args:
        folder: Folder to write to; it exists.
        state: State of the whole model.
        config: Configuration of the model, with the fingerprints of the trunk in `state`.

    Raises:
        OSError: If the folder cannot be written to.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        place = file_of_tensor(name)
        assert place is not None
        files.setdefault(place, {})[name] = tensor.detach().cpu().contiguous()
    sizes = {
        "total_parameters": sum(tensor.numel() for tensor in state.values()),
        "total_size": sum(tensor.nbytes for tensor in state.values()),
    }
    index = {name: file_of_tensor(name) for name in state}
    try:
        old = _read_index(folder, local_files_only=True)  # needed for removed tasks, until config.json is replaced
    except (OSError, ValueError):
        old = {}
    with drafting(folder / SAFE_WEIGHTS_INDEX_NAME) as draft:
        draft.mkdir()
        for place, tensors in files.items():
            save_file(tensors, draft / place, metadata={"format": "pt"})
        for name, weight_map in (("both", old | index), (SAFE_WEIGHTS_INDEX_NAME, index)):
            text = json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
            (draft / name).write_text(text, encoding="utf-8")
        config.save_pretrained(draft)
        for place in files:
            _settle(draft / place, folder / place, _next(folder / place) if (folder / place).is_file() else None)
        _settle(draft / "both", folder / SAFE_WEIGHTS_INDEX_NAME)
        _settle(draft / CONFIG_NAME, folder / CONFIG_NAME)
        for place in files:
            if (follower := _next(folder / place)).is_file():
                os.replace(follower, folder / place)
        _settle(draft / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_INDEX_NAME)
    for path in folder.glob(BRANCH_FILE.format("*")):
        if path.name not in files:
            path.unlink()


def _next(place: Path) -> Path:
    """Return the place of the file that is to replace another."""
    return place.with_suffix(f".next{place.suffix}")


def _settle(draft: Path, place: Path, follower: Path | None = None) -> None:
    """Move a draft to its place, or to that of a follower, unless the place holds the same."""
    if not place.is_file() or not filecmp.cmp(draft, place, shallow=False):
        sync(draft)
        os.replace(draft, follower or place)
    elif follower is not None:
        follower.unlink(missing_ok=True)  # of an interrupted save


def finish_save(folder: Path, config: Any) -> None:
    """Put files of weights that an interrupted save left into their places, if config.json describes them.

    Raises:
        OSError: If the folder cannot be written to.
    """
    for follower in sorted(folder.glob("*.next.safetensors")):
        place = follower.with_name(follower.name.replace(".next", ""))
        if not _is_described(place, config) and _is_described(follower, config):
            with naming(place), suppress(FileNotFoundError):  # another process was quicker
                os.replace(follower, place)


def _is_described(file: Path, config: Any) -> bool:
    """Check whether a file of weights is the one that config.json describes."""
    try:
        with safe_open(file, framework="pt") as opened:
            held = {name for name in opened.keys() if not is_left_over(name, config)}  # noqa: SIM118
            if held:
                _check_content(opened, held, config, str(file))
    except (ValueError, OSError, SafetensorError):
        return False
    return bool(held)


def check_folder(source: str | os.PathLike[str], config: Any, **hub: Any) -> None:
    """Refuse a model whose files do not belong together, before any weight is loaded.

    Args:
        source: Folder, or name on the Hub.
        config: Configuration from config.json.
        **hub: Options of `cached_file` of transformers, such as `revision`.

    Raises:
        ValueError: If the index names another file, a file is damaged or lacks tensors, or the trunk or a branch is
            not that of config.json.
        OSError: If a file is missing.
    """
    index = {name: place for name, place in _read_index(source, **hub).items() if not is_left_over(name, config)}
    for place in (TRUNK_FILE, *sorted(set(index.values()) - {TRUNK_FILE})):
        what, expected = f"{place} in {source}", {name for name in index if index[name] == place}
        try:
            path = cached_file(source, place, **hub)
            with safe_open(path, framework="pt") as file:
                held = {name for name in set(file.keys()) if not is_left_over(name, config)}
                if held != expected and not _is_described(Path(path), config):  # the index may be of two saves
                    raise ValueError(
                        f"{what} must hold the tensors of the index, it lacks {sorted(expected - held)} and also has "
                        f"{sorted(held - expected)}. Get the file that was saved with this index."
                    )
                _check_content(file, held, config, what)
        except SafetensorError as error:
            raise ValueError(f"{what} must be a whole safetensors file: {error}. Get it again.") from error


def _read_index(source: str | os.PathLike[str], **hub: Any) -> dict[str, str]:
    """Read which file holds which tensor; only files of the trunk and of tasks are allowed."""
    what = f"{SAFE_WEIGHTS_INDEX_NAME} in {source}"
    file = Path(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub))
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{what} must map tensors to files: {error!r}. Save the model again.") from error
    if wrong := [f"{name} -> {place}" for name, place in index.items() if file_of_tensor(name) != place]:
        raise ValueError(
            f"{what} must map each tensor to the file of its trunk or task, got {wrong}. Save the model again with "
            "`save_pretrained`."
        )
    return index


def is_left_over(name: str, config: Any) -> bool:
    """Check whether a tensor belongs to a task or layer that config.json lacks, after an interrupted save."""
    match name.split("."):
        case ["trunk", "layer", index, *_] if index.isdecimal():
            return int(index) >= config.num_hidden_layers
        case ["branches", task, *_]:
            return task not in config.tasks
    return False


def _check_content(file: Any, held: set[str], config: Any, what: str) -> None:
    """Refuse a file of weights other than the one that config.json describes."""
    if any(name.startswith("trunk.") for name in held):
        names = [name.removeprefix("trunk.") for name in held]
        found = hash_trunk(names, partial(_read_trunk, file), config.num_hidden_layers)
        check_hashes(found, config.trunk_sha256, what)
    else:
        _check_branch({name: file.get_tensor(name) for name in held}, config, what)


def _read_trunk(file: Any, name: str) -> Tensor:
    return file.get_tensor(f"trunk.{name}")


def _check_branch(tensors: Mapping[str, Tensor], config: Any, what: str) -> None:
    """Refuse a branch other than the one that config.json describes."""
    found = hash_branch(tensors, config)
    expected = _task_of(tensors, config).get("sha256")
    if found != expected:
        raise ValueError(
            f"{what} must be the branch that config.json describes, of SHA-256 {expected}, got {found}. It was "
            "swapped, or a save was interrupted: get file and config.json of one save, or save the model again."
        )


def check_hashes(hashes: list[str], expected: list[str], what: str) -> None:
    """Refuse a trunk other than the expected one, and name the first part that differs.

    Args:
        hashes: Fingerprints of the trunk.
        expected: Fingerprints of the expected trunk; either list may be longer than the other.
        what: Name of the trunk in the message.

    Raises:
        ValueError: If a fingerprint differs, or there are none to compare with.
    """
    if not expected:
        raise ValueError("config.json must say `trunk_sha256`. Save the model again with `save_pretrained`.")
    for index, pair in enumerate(zip(hashes, expected, strict=False)):
        if pair[0] != pair[1]:
            where = f"layer {index} differs" if index else "the embeddings differ"  # counted from 1
            raise ValueError(
                f"{what} must be the trunk that the tasks were trained on, but {where}: "
                f"SHA-256 {pair[0]} here, {pair[1]} expected. Use tasks and trunk of one pre-trained model, and "
                "freeze the same layers."
            )
