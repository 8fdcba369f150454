"""Which of the checkpoints that a run left behind can be trusted after a crash."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)


def last_complete_checkpoint(folder: str, *, files: Sequence[str] = ()) -> str:
    """Find the newest checkpoint whose saving was not cut short; newer ones are named in a warning.

    The host writes `trainer_state.json` after its weights and its optimizer, and callbacks write after that. So a
    checkpoint is complete if that file can be read, and the callbacks' files can.

    Args:
        folder: `output_dir` of the run.
        files: Safetensors files that every checkpoint must hold besides, such as the `checkpoint_files` of
            `PlatonPruningCallback`.

    Raises:
        ValueError: If there is none.
    """
    for checkpoint in reversed(sort_checkpoints(folder)):
        try:
            TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            for file in [*Path(checkpoint).glob("model*.safetensors"), *(Path(checkpoint) / name for name in files)]:
                with safe_open(file, framework="pt"):  # reads the header, and that the file is as long as it says
                    pass
        except (OSError, ValueError, SafetensorError):
            logger.warning(f"{checkpoint} is incomplete and is skipped: its saving was cut short.")
        else:
            return checkpoint
    raise ValueError(
        f"`resume_from_checkpoint` must find a complete checkpoint in {folder!r}, which has none. Train without it."
    )
