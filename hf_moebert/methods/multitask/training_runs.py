"""Tasks, runs and results of a sweep."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments, set_seed

from hf_moebert.checkpoints.json_files import read_json, save_json
from hf_moebert.checkpoints.manifests import describe_files, find_changed_file

from .configuration_multitask import IGNORED_FIELDS
from .functional import chain_hashes
from .modeling_splitting import take_trunk
from .training_states import CachedStates, cache_states, fingerprint_data, fingerprint_trunk


# Prefixes of arguments that do not change the result of a run
IRRELEVANT_ARGUMENTS = (
    *("output_dir", "log", "report_to", "run_name", "project", "trackio", "push_to_hub", "hub_", "disable_tqdm"),
    *("save_total_limit", "save_on_each_node", "save_only_model", "enable_jit", "restore_callback", "resume_from"),
    *("do_", "debug", "include_", "skip_memory", "prediction_loss_only", "per_device_eval", "eval_accumulation"),
    *("eval_use_gather", "dataloader_num", "dataloader_pin", "dataloader_persistent", "dataloader_prefetch"),
    *("dataloader_multi", "torch_empty_cache", "use_cpu", "local_rank", "ddp_"),
)


RESULT_FILE = "result.json"


@dataclass(frozen=True)
class MultiTaskSweepTask:
    """One task of a sweep.

    Attributes:
        new_model: Returns the pre-trained encoder with a new head, a class of `modeling_splitting.HEADS`, drawn from
            torch's global generator. All tasks of a sweep share the encoder.
        train_dataset: Encoded examples to train on.
        dev_dataset: Encoded examples to choose by. Measure the result on other examples.
        score: Score of predictions; larger is better, and 1 is perfect.
        metric: Name of the score. Runs with another score are not taken for finished.
    """

    new_model: Callable[[], PreTrainedModel]
    train_dataset: Dataset
    dev_dataset: Dataset
    score: Callable[[EvalPrediction], float]
    metric: str


@dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        kind: "whole" trains all weights, embeddings included; "teacher" the layers above the frozen ones; "student"
            fewer layers, distilled from the teacher.
        layers: Number of trained layers.
    """

    kind: Literal["whole", "teacher", "student"]
    layers: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "whole" if self.kind == "whole" else f"{self.kind}-{self.layers}"


def describe_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that decide the result of a run."""
    return {name: value for name, value in args.to_dict().items() if not name.startswith(IRRELEVANT_ARGUMENTS)}


class PreparedTask:
    """A task with its depth, fingerprints and cached states."""

    def __init__(self, task: MultiTaskSweepTask, folder: Path, *, seed: int) -> None:
        self.task, self.folder, self.seed = task, folder, seed
        self._states: dict[str, dict[int, CachedStates]] = {}

    @cached_property
    def depth(self) -> int:
        """Layers of the encoder."""
        return self.task.new_model().config.num_hidden_layers

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of encoder, data and settings that decide the result of a run."""
        set_seed(self.seed)  # for a pooler that the checkpoint of the encoder lacks
        model = self.task.new_model()
        config = model.config.to_diff_dict()
        return {
            **{split: fingerprint_data(self.examples(split)) for split in ("train", "dev")},
            "encoder": fingerprint_trunk(take_trunk(model, self.depth), self.depth),
            "base": chain_hashes([model.base_model.state_dict()])[0],
            "model": type(model).__name__,
            "config": {name: value for name, value in config.items() if name not in IGNORED_FIELDS},
            "metric": self.task.metric,
        }

    def examples(self, split: str) -> Dataset:
        """Return the encoded examples of a split, "train" or "dev"."""
        return self.task.train_dataset if split == "train" else self.task.dev_dataset

    def states(self, split: str, depths: list[int], device: torch.device) -> dict[int, CachedStates]:
        """Return the cached states of a split after each of some numbers of frozen layers."""
        if split not in self._states:
            trunk = take_trunk(self.task.new_model(), max(depths)).to(device)
            self._states[split] = cache_states(trunk, self.examples(split), self.folder / split, depths=depths)
        return self._states[split]


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read the result of a run, or return None if there is none.

    Raises:
        ValueError: If it is damaged.
    """
    if not (folder / RESULT_FILE).exists():
        return None
    remedy = "Delete it, and the run is made again."
    result = read_json(folder / RESULT_FILE, remedy=remedy)
    if not {"score", "settings"} <= result.keys() or not isinstance(result["settings"], dict):
        raise ValueError(
            f"{str(folder / RESULT_FILE)!r} must have the score and the settings of a run, got {sorted(result)}. "
            f"{remedy}"
        )
    return result


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a run whose model is saved, with the SHA-256 of its files: entirely, or not at all."""
    save_json(folder / RESULT_FILE, result | {"files": describe_files(folder, pattern="*")})


def check_model(folder: Path) -> None:
    """Refuse a saved model whose files are not those that its result was written for.

    Raises:
        ValueError: If one is missing or has changed; results of 0.1.0 do not list them.
    """
    result = read_result(folder)
    if result is not None and (fault := find_changed_file(folder, result.get("files", {}))):
        raise ValueError(
            f"{str(folder)!r} must hold the model of its {RESULT_FILE}, but {fault}. Delete {RESULT_FILE}, and the "
            "run is made again."
        )
