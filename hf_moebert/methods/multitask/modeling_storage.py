"""Saving and loading of a model of a trunk and branches."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moebert.architectures.stacks import has_adapters
from hf_moebert.checkpoints.strict_model import HUB_OPTIONS, StrictModel

from .modeling_files import check_folder, check_hashes, finish_save, hash_branch, hash_trunk, write_folder


class StoredByTask(StrictModel):
    """Base class that saves and loads one file for the trunk and one for each branch."""

    config: Any  # of `MultiTaskFields`
    _sealed_dtype: torch.dtype | None = None  # dtype in which `config.trunk_sha256` was computed; None: unknown

    def _seal_trunk(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Fingerprint the trunk, and refuse one that was changed other than in its precision.

        Args:
            state: State of the trunk, if not that in memory.

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

        Files that would not change are not touched, and those of removed tasks are deleted.

        Args:
            save_directory: Folder to write to.
            is_main_process: As in transformers.
            state_dict: As in transformers.
            push_to_hub: Whether to upload as well; arguments of `push_to_hub` go to `kwargs`.
            **kwargs: As in transformers. Options for sizes and formats of files have no effect.

        Raises:
            ValueError: If `variant` is given, weights are quantized or not in memory, there are adapters, or the trunk
                was changed.
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
        self._update_config()
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
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as `StrictModel` does, but only files that belong together.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub; None with a `config` and a `state_dict`.
            *args: As in `StrictModel`.
            **kwargs: As in `StrictModel`.

        Raises:
            ValueError: If the trunk is not the one that the tasks were trained on, or as in `StrictModel`.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, cls.config_class):
            config = cls.config_class.from_pretrained(
                pretrained_model_name_or_path if config is None else config, **hub
            )
        if pretrained_model_name_or_path is not None:  # else there are a config and a `state_dict`
            if Path(pretrained_model_name_or_path).is_dir():
                finish_save(Path(pretrained_model_name_or_path), config)
            check_folder(pretrained_model_name_or_path, config, **hub)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.trunk.requires_grad_(False)  # transformers made new parameters
        sealed = config.dtype  # loading in another dtype may change it
        model._sealed_dtype = getattr(torch, sealed) if isinstance(sealed, str) else sealed
        return loaded
