"""The file that holds the state of a pruning run in a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
    target, draft = folder / STATE_FILE, folder / f".{STATE_FILE}.draft"
    try:
        save_file(tensors, draft, metadata={"platon": json.dumps(state)})
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise OSError(f"The state of the pruning cannot be written to {target}: {error}. Free some space.") from error


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_state` wrote.

    Args:
        folder: The checkpoint.

    Returns:
        The fields named in `FIELDS`, and the tensors by name.

    Raises:
        ValueError: If the file is missing or broken.
    """
    file = folder / STATE_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            stored = json.loads(opened.metadata()["platon"])
            state = {key: stored[key] for key in FIELDS}
            state["numbers"] = {key: stored["numbers"][key] for key in NUMBERS}  # no other attribute is ever set
            if "final_ratio" in state["config"]:  # its name in 0.1.0
                state["config"]["keep_ratio"] = state["config"].pop("final_ratio")
            return state, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise ValueError(
            f"The checkpoint must hold {file.name}, but {file} does not exist: its saving was interrupted, it was"
            " saved elsewhere, or nothing was pruned in that run. Resume from an earlier checkpoint (see"
            " `last_complete_checkpoint`), or pass its folder as `resume_from` to the callback."
        ) from error
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} must be a complete safetensors file with the state of a pruning run, but it is not: {error}."
            " Resume from an earlier checkpoint."
        ) from error
