"""The callback that makes the checkpoints of any stock `Trainer` know whether they are whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from accelerate import PartialState
from filelock import AcquireReturnProxy
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hf_moebert.architectures.empty_losses import zero_empty_loss

from .locks import lock_folder
from .manifests import MANIFEST_FILE, find_fault, list_missing, write_manifest


logger = logging.get_logger(__name__)


class CheckpointManifestCallback(TrainerCallback):
    """Lock the folder of a run, and write a manifest into each of its checkpoints once all other files are there.

    `last_complete_checkpoint` believes in manifests. All other callbacks of this package are subclasses, and the last
    one in a run writes the manifest, after the files of all of them: no run needs this class beside them. When a run
    is resumed, its checkpoint must be as its manifest says.

    Args:
        resume_from: Folder of the checkpoint a run is resumed from, if it does not lie in its `output_dir`.
        allow_changes: Whether a resumed run may have another recipe or length than it began with, and its checkpoint
            may have been changed.

    Raises:
        ValueError: When training begins, if another run writes to its `output_dir`, if `save_total_limit` is 1, or if
            the checkpoint is not whole or the recipe has changed.
        OSError: If `output_dir` cannot be written to.
    """

    _last: ClassVar[WeakValueDictionary[int, "CheckpointManifestCallback"]] = WeakValueDictionary()  # of each run

    def __init__(self, *, resume_from: str | Path | None = None, allow_changes: bool = False) -> None:
        self.resume_from, self.allow_changes = resume_from, allow_changes
        self._lock: AcquireReturnProxy | None = None
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lock `output_dir`, and check the checkpoint that a run is resumed from.

        During the run, a batch without labels has a loss of zero instead of NaN, whatever the class of the model.
        """
        self._unlock()  # `train` may be called twice, or have stopped with an error
        self._remove_hook()
        CheckpointManifestCallback._last[id(state)] = self
        self._hook = kwargs["model"].register_forward_hook(zero_empty_loss, with_kwargs=True)
        if not args.should_save:
            return
        _check_limit(args)
        if not state.is_hyper_param_search:  # whose trials share a folder, and save in folders of their own
            self._lock = lock_folder(args.output_dir)
        if state.global_step:
            self.check_whole(self.find_checkpoint(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the callback's own files, and the manifest after those of the last callback."""
        if args.save_only_model:  # nobody can resume from it
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            self.save_state(folder, state)
        elif args.should_save:  # a hyper-parameter search saves in folders of its own
            logger.warning_once(f"{folder} does not exist, so that nothing was saved to resume from.")
        if CheckpointManifestCallback._last.get(id(state)) is self:
            PartialState().wait_for_everyone()  # each process writes the state of its random numbers
            if args.should_save and folder.is_dir():
                write_manifest(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unlock `output_dir`."""
        self._unlock()
        self._remove_hook()

    def save_state(self, folder: Path, state: TrainerState) -> None:
        """Write what a resumed run needs of this callback into a checkpoint."""

    def find_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return the folder of the checkpoint that a run is resumed from."""
        return Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def refuse_changes(self, state: TrainerState, recipe: Mapping[str, Any]) -> None:
        """Store a recipe in all checkpoints, and refuse another one than that of the checkpoint of a resumed run.

        Args:
            state: State of the run, which transformers saves in `trainer_state.json`.
            recipe: Fields by name, of values that JSON can hold.

        Raises:
            ValueError: If it has changed; the message names the difference.
        """
        place, stored = f"hf_moebert.{type(self).__name__}", json.loads(json.dumps(recipe))
        assert isinstance(state.stateful_callbacks, dict)
        before = state.stateful_callbacks.get(place, stored) if state.global_step else stored
        changes = [
            f"{name}: {before.get(name)!r} -> {stored.get(name)!r}"
            for name in before | stored
            if before.get(name) != stored.get(name)
        ]
        if changes and not self.allow_changes:
            raise ValueError(
                f"A resumed run must have the recipe it began with, but {'; '.join(changes)}. Undo the change, or "
                f"pass `allow_changes=True` to {self.owner}."
            )
        state.stateful_callbacks[place] = stored

    @property
    def owner(self) -> str:
        """Name of the class whose constructor a user gives `allow_changes`."""
        return type(self).__name__

    def check_whole(self, folder: Path) -> None:
        """Refuse a checkpoint that is not as its manifest says; one without manifest must have the Trainer's files.

        Raises:
            ValueError: If a file is missing or has changed, unless `allow_changes`.
        """
        if not folder.is_dir() or self.allow_changes:
            return
        fault = find_fault(folder)
        if fault and not (folder / MANIFEST_FILE).exists():  # of 0.1.0, or of a run without these callbacks
            missing = list_missing(folder)
            fault = f"{' and '.join(missing)} are missing" if missing else None
        if fault:
            raise ValueError(
                f"{str(folder)!r} must be as it was saved to resume from it, but {fault}. Resume from the folder that "
                f"`last_complete_checkpoint` returns, or pass `allow_changes=True` to {self.owner}."
            )

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.lock.release()
        self._lock = None


def _check_limit(args: TrainingArguments) -> None:
    resumable = args.save_strategy != SaveStrategy.NO and not args.save_only_model
    if resumable and args.save_total_limit == 1:
        raise ValueError(
            "`save_total_limit` must be at least 2, got 1: transformers deletes the last complete checkpoint before "
            "the next one is complete. Use 2, or `save_only_model`."
        )
