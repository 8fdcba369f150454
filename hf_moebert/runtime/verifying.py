"""Check that an export computes here what it computed where it was made."""

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from .folders import open_session, read_manifest


GOLDEN_FILE = "golden.safetensors"
TOLERANCE = 1e-3  # of the spread of the outputs, between processors in float32


def check_golden(
    folder: str | PathLike[str], precision: str, run: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> float:
    """Compute the kept outputs of an export once more, as `compare_outputs` does.

    Args:
        folder: Folder that `export_onnx` wrote, whose files are as they were.
        precision: One that was exported.
        run: Returns the first output for the inputs of the graph.
    """
    kept = load_file(Path(folder) / GOLDEN_FILE)
    return compare_outputs(kept, run, precision, plain="float32", precision=precision, file=GOLDEN_FILE)


def compare_outputs(
    kept: Mapping[str, np.ndarray],
    run: Callable[[dict[str, np.ndarray]], np.ndarray],
    name: str,
    *,
    plain: str,
    precision: str,
    file: str,
) -> float:
    """Compute kept outputs once more, and refuse a processor on which they are others.

    Args:
        kept: Inputs by their names behind "input.", and outputs.
        run: Returns the outputs for the inputs.
        name: The outputs that are computed once more.
        plain: Those of float32.
        precision: What they are computed in, for the message.
        file: What held them, for the message.

    Returns:
        The largest difference, in units of the outputs' spread.

    Raises:
        ValueError: If an output differs by more than rounding explains, as int8 does on a processor whose products
            saturate.
    """
    inputs = {name.removeprefix("input."): array for name, array in kept.items() if name.startswith("input.")}
    spread = max(float(kept[plain].std()), 1e-6)
    rounding = float(np.abs(kept[name] - kept[plain]).max()) / spread
    allowed = max(rounding, TOLERANCE)  # as far from the kept ones as those are from float32
    difference = float(np.abs(run(inputs) - kept[name]).max()) / spread
    if not difference <= allowed:  # NaN, too
        raise ValueError(
            f"The outputs in {precision} must be within {allowed:.2g} of those of {file}, got "
            f"{difference:.2g} of their spread. Run the model in float32 on this processor, or make it here."
        )
    return difference


def run_first(session: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the first output of a session."""
    return session.run(None, inputs)[0]


def verify_export(folder: str | PathLike[str]) -> dict[str, float]:
    """Compute the kept outputs of every exported precision once more, here.

    Args:
        folder: Folder that `export_onnx` wrote, or a copy of it.

    Returns:
        The largest difference of each precision, in units of the outputs' spread.

    Raises:
        ValueError: As for `compare_outputs`, or if files are not as they were exported.
        FileNotFoundError: If the folder holds no export.
    """
    manifest, _ = read_manifest(folder, None)
    found = {}
    for precision in manifest["precisions"]:
        session = open_session(folder, precision, threads=1)
        found[precision] = check_golden(folder, precision, partial(run_first, session))
    return found
