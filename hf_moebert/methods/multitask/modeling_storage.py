"""The folder of a multi-task model: one file for the trunk and one for every task, so that an update touches one."""

import filecmp
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.bert.modeling_bert import BertPreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .configuration_multitask import TASK_NAME, MultiTaskBertConfig
from .functional import chain_hashes
from .modeling_trunk import has_adapters


TRUNK_FILE = "trunk.safetensors"
BRANCH_FILE = "branch-{}.safetensors"
# What `from_pretrained` and the host's `cached_file` both understand
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def file_of(name: str) -> str | None:
    """Say which file holds a tensor, or None if no file does."""
    part, _, rest = name.partition(".")
    if part == "trunk":
        return TRUNK_FILE
    task = rest.partition(".")[0]
    return BRANCH_FILE.format(task) if part == "branches" and TASK_NAME.fullmatch(task) else None


def hash_trunk(names: Iterable[str], read: Callable[[str], Tensor], num_layers: int) -> list[str]:
    """Fingerprint the embeddings and every layer of a trunk, see `chain_hashes`.

    Args:
        names: Of the trunk's tensors; those of deeper layers are passed over.
        read: Gives the tensor of a name.
        num_layers: How many layers.
    """
    places = ["embeddings.", *(f"layer.{i}." for i in range(num_layers))]
    parts = [[name for name in names if name.startswith(place)] for place in places]
    return chain_hashes({name: read(name) for name in part} for part in parts)


def write_folder(folder: Path, state: Mapping[str, Tensor], config: MultiTaskBertConfig) -> None:
    """Write weights, index and config; files that would not change are left as they are.

    Everything is written beside its place first, and then renamed: weights, index, config, in this order. Whoever
    reads in between, or after a save that was cut short, finds the old model where tasks were added or removed. Where
    a task was replaced, its file may be the new one already and its description the old: such a folder is refused. To
    be safe from that as well, save into a new folder and switch.

    Args:
        folder: Where to; it exists.
        state: Of the whole model.
        config: Of the model, with the fingerprints of this state's trunk.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        place = file_of(name)
        assert place is not None
        files.setdefault(place, {})[name] = tensor.detach().cpu().contiguous()
    sizes = {
        "total_parameters": sum(tensor.numel() for tensor in state.values()),
        "total_size": sum(tensor.nbytes for tensor in state.values()),
    }
    index = {name: file_of(name) for name in state}
    try:
        old = _read_index(folder, local_files_only=True)  # of tasks that go, until config.json is without them
    except (OSError, ValueError):
        old = {}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as draft:
        for place, tensors in files.items():
            save_file(tensors, Path(draft) / place, metadata={"format": "pt"})
        for name, weight_map in (("both", old | index), (SAFE_WEIGHTS_INDEX_NAME, index)):
            text = json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
            (Path(draft) / name).write_text(text, encoding="utf-8")
        config.save_pretrained(draft)
        for place in files:
            _settle(Path(draft) / place, folder / place)
        _settle(Path(draft) / "both", folder / SAFE_WEIGHTS_INDEX_NAME)
        for place in ("config.json", SAFE_WEIGHTS_INDEX_NAME):
            _settle(Path(draft) / place, folder / place)
    for path in folder.glob(BRANCH_FILE.format("*")):
        if path.name not in files:
            path.unlink()


def _settle(draft: Path, place: Path) -> None:
    if not place.is_file() or not filecmp.cmp(draft, place, shallow=False):
        os.replace(draft, place)


def check_folder(source: str | os.PathLike[str], config: MultiTaskBertConfig, **hub: Any) -> None:
    """Refuse a model whose files do not belong together, before anything of it is loaded.

    Args:
        source: Folder, or name on the Hub.
        config: What config.json says.
        **hub: Options of the host's `cached_file`, such as `revision`.

    Raises:
        ValueError: If the index leads elsewhere, a file is broken or lacks tensors, or the trunk or a branch is not
            the one of config.json.
        OSError: If a file is not there.
    """
    index = {name: place for name, place in _read_index(source, **hub).items() if not _is_left_over(name, config)}
    for place in (TRUNK_FILE, *sorted(set(index.values()) - {TRUNK_FILE})):
        what, expected = f"{place} in {source}", {name for name in index if index[name] == place}
        try:
            with safe_open(cached_file(source, place, **hub), framework="pt") as file:
                held = {name for name in set(file.keys()) if not _is_left_over(name, config)}
                if held != expected:
                    raise ValueError(
                        f"{what} must hold what the index says, it lacks {sorted(expected - held)} and has besides "
                        f"{sorted(held - expected)}. Get the file that was saved with this index."
                    )
                if place == TRUNK_FILE:
                    names = [name.removeprefix("trunk.") for name in held]
                    read = partial(_read_trunk, file)
                    hashes = hash_trunk(names, read, config.num_hidden_layers)
                    check_hashes(hashes, config.trunk_sha256, what)
                else:
                    _check_branch({name: file.get_tensor(name) for name in held}, config, what)
        except SafetensorError as error:
            raise ValueError(f"{what} must be a whole safetensors file: {error}. Get it again.") from error


def _is_left_over(name: str, config: MultiTaskBertConfig) -> bool:
    """Say whether a tensor is of a task or layer that config.json does not know, from a save that was cut short."""
    match name.split("."):
        case ["trunk", "layer", index, *_] if index.isdecimal():
            return int(index) >= config.num_hidden_layers
        case ["branches", task, *_]:
            return task not in config.tasks
    return False


def hash_branch(tensors: Mapping[str, Tensor], config: MultiTaskBertConfig) -> str:
    """Fingerprint a branch together with the trunk below it.

    Args:
        tensors: Of one branch, by their names in the whole model.
        config: Knows the fingerprints of the trunk.
    """
    task = config.tasks[next(iter(tensors)).split(".")[1]]
    return chain_hashes([tensors], start=config.trunk_sha256[task["frozen_layers"]])[0]


def _check_branch(tensors: Mapping[str, Tensor], config: MultiTaskBertConfig, what: str) -> None:
    """Refuse a branch that is not the one that config.json describes."""
    found = hash_branch(tensors, config)
    expected = config.tasks[next(iter(tensors)).split(".")[1]].get("sha256")
    if found != expected:
        raise ValueError(
            f"{what} must be the branch that config.json describes, of SHA-256 {expected}, got {found}. It was "
            "swapped, or a save was cut short: get file and config.json of one save, or save the model again."
        )


def _read_index(source: str | os.PathLike[str], **hub: Any) -> dict[str, str]:
    """Read which file holds which tensor; none may lead out of the folder."""
    what = f"{SAFE_WEIGHTS_INDEX_NAME} in {source}"
    text = Path(cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub)).read_text(encoding="utf-8")
    try:
        index = dict(json.loads(text)["weight_map"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{what} must map tensors to files: {error!r}. Save the model again.") from error
    if wrong := [f"{name} -> {place}" for name, place in index.items() if file_of(name) != place]:
        raise ValueError(
            f"{what} must map each tensor to the file of its trunk or task, got {wrong}. Save the model again with "
            "`save_pretrained`."
        )
    return index


def _read_trunk(file: Any, name: str) -> Tensor:
    return file.get_tensor(f"trunk.{name}")


def check_hashes(hashes: list[str], expected: list[str], what: str) -> None:
    """Refuse a trunk that is another one than expected, and name the first part that differs.

    Args:
        hashes: Of the trunk that is there.
        expected: Of the trunk that should be; both may be longer than the other.
        what: How to call it.
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


class StoredByTask(BertPreTrainedModel):
    """What saves and loads a model of a trunk and branches."""

    config: MultiTaskBertConfig
    config_class = MultiTaskBertConfig
    _sealed_dtype: torch.dtype | None = None  # of the trunk that `config.trunk_sha256` tells of; None: as it is

    def _seal_trunk(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Fingerprint the trunk, and refuse one that is no longer what it was; another precision may be.

        Args:
            state: Of the trunk, if not as it lies in memory.

        Raises:
            ValueError: If weights changed since the model was merged or loaded.
        """
        state = self.trunk.state_dict() if state is None else state
        dtype = next(iter(state.values())).dtype
        hashes = hash_trunk(state, state.__getitem__, len(self.trunk.layer))
        if self.config.trunk_sha256 and self._sealed_dtype in (None, dtype):
            check_hashes(hashes, self.config.trunk_sha256, "The trunk in memory")
        self.config.trunk_sha256, self._sealed_dtype = hashes, dtype

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write `trunk.safetensors`, one `branch-<task>.safetensors` for each task, their index and config.json.

        Files that would not change are not touched, and those of tasks that are no longer there are deleted.

        Args:
            save_directory: Where to.
            is_main_process: As for the host.
            state_dict: As for the host.
            push_to_hub: Whether to upload as well, see the method of this name; its arguments go to `kwargs`.
            **kwargs: As for the host. Sizes and formats of files are as said above, whatever is asked for.

        Raises:
            ValueError: If a variant is asked for, weights are quantized or not in memory, there are adapters, or the
                trunk is no longer what it was.
        """
        if kwargs.get("variant") or getattr(self, "hf_quantizer", None) or has_adapters(self):
            raise ValueError(
                "A multi-task model must be saved whole, dense and without `variant`. Merge adapters, and convert "
                "with `.to(dtype)`."
            )
        state = self.state_dict() if state_dict is None else state_dict
        if lost := [name for name, tensor in state.items() if tensor.is_meta]:
            raise ValueError(
                f"`model` must hold its weights in memory, these are not: {lost}. Load without offloading."
            )
        if not is_main_process:
            return
        self._describe()
        trunk = {name.removeprefix("trunk."): x for name, x in state.items() if name.startswith("trunk.")}
        self._seal_trunk(trunk)
        for name, task in self.config.tasks.items():
            task["sha256"] = hash_branch(
                {x: state[x] for x in state if x.startswith(f"branches.{name}.")}, self.config
            )
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, state, self.config)
        if push_to_hub:
            names = ("commit_message", "private", "token", "revision", "create_pr")
            self.push_to_hub(kwargs.get("repo_id", folder.name), **{x: kwargs[x] for x in names if x in kwargs})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        output_loading_info: bool = False,
        allow_nonfinite: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load like the host, but only what belongs together.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub.
            *args: As for the host.
            output_loading_info: As for the host.
            allow_nonfinite: Whether weights may be NaN or infinite.
            **kwargs: As for the host.

        Raises:
            ValueError: If the trunk is not the one that the tasks were trained on, files lack weights, or a weight is
                not finite.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, cls.config_class):
            config = cls.config_class.from_pretrained(
                pretrained_model_name_or_path if config is None else config, **hub
            )
        check_folder(pretrained_model_name_or_path, config, **hub)
        sealed = config.dtype  # asking for another one may change it
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        unexpected = [name for name in info["unexpected_keys"] if not _is_left_over(name, config)]
        if lost := sorted(info["missing_keys"]) + sorted(unexpected):
            raise ValueError(
                f"The files must hold the weights of the tasks in config.json and no others, but it is otherwise with "
                f"{lost}. Save the model again with `save_pretrained`."
            )
        broken = [name for name, p in model.named_parameters() if not (p.is_meta or p.isfinite().all())]
        if broken and not allow_nonfinite:
            raise ValueError(
                f"The files must hold finite weights, these are not: {broken}. Replace their tasks, or load with "
                "`allow_nonfinite=True` to look at them."
            )
        model.trunk.requires_grad_(False)  # the host makes new parameters
        model._sealed_dtype = getattr(torch, sealed) if isinstance(sealed, str) else sealed
        return (model, info) if output_loading_info else model
