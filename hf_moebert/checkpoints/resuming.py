"""Find the checkpoint to resume from after a crash."""

import os

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from .manifests import MANIFEST_FILE, find_fault


logger = logging.get_logger(__name__)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str:
    """Return the newest checkpoint that is whole by its manifest, with a warning that says why for each newer one.

    Manifests are written by every callback of this package; a run without one takes a `CheckpointManifestCallback`.

    Args:
        folder: `output_dir` of the run.

    Raises:
        ValueError: If there is none; the message says why for each checkpoint.
    """
    faults = {}
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        if (fault := find_fault(checkpoint)) is None:
            return checkpoint
        faults[checkpoint] = fault
        logger.warning(f"{checkpoint} is not whole and is skipped: {fault}.")
    reasons = "; ".join(f"{checkpoint}: {fault}" for checkpoint, fault in faults.items())
    raise ValueError(
        f"`resume_from_checkpoint` must find a complete checkpoint in {str(folder)!r}, which has none"
        f"{': ' + reasons if reasons else ''}. Train without it, or name the folder of a checkpoint of which you know "
        f"that only its {MANIFEST_FILE} is missing."
    )
