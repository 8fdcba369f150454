"""The file that holds the state of a pruning run in a checkpoint."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_moebert.checkpoints.tensor_files import read_tensors, save_tensors


STATE_FILE = "platon_state.safetensors"
FIELDS = ("config", "total_steps", "step", "weights", "numbers")
NUMBERS = ("clock", "dropped", "ratio", "threshold", "revived")  # attributes of `Pruner`


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the state of a run into a checkpoint: the whole file or nothing.

    Args:
        folder: The checkpoint.
        state: The fields named in `FIELDS`, which JSON can hold.
        tensors: Statistics and masks by name.

    Raises:
        OSError: If the file cannot be written; an earlier file stays unchanged.
    """
    save_tensors(folder / STATE_FILE, tensors, {"platon": json.dumps(state)})


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_state` wrote.

    Args:
        folder: The checkpoint.

    Returns:
        The fields named in `FIELDS`, and the tensors by name.

    Raises:
        ValueError: If the file is missing or broken.
    """
    file, remedy = folder / STATE_FILE, "Resume from an earlier checkpoint."
    if not file.exists():
        raise ValueError(
            f"The checkpoint must hold {file.name}, but {file} does not exist: its saving was interrupted, it was"
            " saved elsewhere, or nothing was pruned in that run. Resume from an earlier checkpoint (see"
            " `last_complete_checkpoint`), or pass its folder as `resume_from` to the callback."
        )
    tensors, texts = read_tensors(file, remedy=remedy)
    try:
        stored = json.loads(texts["platon"])
        state = {key: stored[key] for key in FIELDS}
        state["numbers"] = {key: stored["numbers"][key] for key in NUMBERS}  # no other attribute is ever set
        if "final_ratio" in state["config"]:  # its name in 0.1.0
            state["config"]["keep_ratio"] = state["config"].pop("final_ratio")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} must hold the state of a pruning run, but it does not: {error!r}. {remedy}"
        ) from error
    return state, tensors
