"""Find the checkpoint to resume from after a crash."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)


def last_complete_checkpoint(folder: str, *, files: Sequence[str] = ()) -> str:
    """Return the newest checkpoint that was saved completely, with a warning for each newer one.

    The Trainer writes `trainer_state.json` after the weights and the optimizer, and callbacks write after that. So a
    checkpoint is complete if that file and the callbacks' files can be read.

    Args:
        folder: `output_dir` of the run.
        files: Further safetensors files that every checkpoint must hold, such as the `checkpoint_files` of
            `PlatonPruningCallback`.

    Raises:
        ValueError: If there is none.
    """
    for checkpoint in reversed(sort_checkpoints(folder)):
        try:
            TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            for file in [*Path(checkpoint).glob("model*.safetensors"), *(Path(checkpoint) / name for name in files)]:
                with safe_open(file, framework="pt"):  # reads the header, and checks the length of the file
                    pass
        except (OSError, ValueError, SafetensorError):
            logger.warning(f"{checkpoint} is incomplete and is skipped: its saving was cut short.")
        else:
            return checkpoint
    raise ValueError(
        f"`resume_from_checkpoint` must find a complete checkpoint in {folder!r}, which has none. Train without it."
    )
