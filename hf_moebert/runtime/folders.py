"""The folder of an export: its manifest, and the sessions that run its graphs."""

from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from hf_moebert.checkpoints.json_files import read_json
from hf_moebert.checkpoints.manifests import find_changed_file


MANIFEST = "onnx_manifest.json"
ENGINE_FILE, GRAPHS = "engine.json", "onnx"  # beside the weights of a checkpoint
FORMAT_VERSION = "2"
PRECISIONS = ("float32", "int8")
AGAIN = "Export the model again."


def check_packages() -> None:
    """Refuse to go on without ONNX Runtime.

    Raises:
        ValueError: If it is not installed.
    """
    if find_spec("onnxruntime") is None:
        raise ValueError('ONNX Runtime must be installed, but is not. Run `pip install "hf_moebert[runtime]"`.')


def read_manifest(folder: str | PathLike[str], precision: str | None) -> tuple[dict[str, Any], str]:
    """Read what an export says of itself, and see that its files are as they were.

    Args:
        folder: Folder that `export_onnx` wrote.
        precision: The one that is to run, by default the first that was exported: float32, if it was.

    Returns:
        The manifest, and the precision.

    Raises:
        ValueError: If a file is not as it was exported, the precision was not exported, or ONNX Runtime is missing.
        FileNotFoundError: If the folder holds no export.
    """
    check_packages()
    manifest = read_json(Path(folder) / MANIFEST, remedy="Export a model by `export_onnx`.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"`folder` must be of format {FORMAT_VERSION!r}, got {manifest.get('format_version')!r}. {AGAIN}"
        )
    exported = list(manifest["precisions"])
    precision = exported[0] if precision is None else precision
    if precision not in exported:
        raise ValueError(f"`precision` must be one that was exported, {exported}, got {precision!r}. {AGAIN}")
    if fault := find_changed_file(folder, manifest["files"]):
        raise ValueError(f"`folder` must be as it was exported, but in {str(folder)!r} {fault}. {AGAIN}")
    return manifest, precision


def make_options(threads: int) -> Any:
    """Return the options of a session that computes with some threads; one computes in the thread that calls.

    Norms are not fused with residuals, nor GELU with biases: the fused operators take more time than their parts, GELU
    2.6 times as much. Layers of BERT-base's shape take 12 to 15% less time in int8 without the first, and 3 to 7% less
    without the second (one thread, 1x32 to 8x128).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion;BiasGeluFusion")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes a core from whoever runs next
    options.log_severity_level = 3
    return options


def open_session(folder: str | PathLike[str], precision: str, *, threads: int) -> Any:
    """Open the graph of a precision."""
    import onnxruntime

    graph = Path(folder) / precision / "model.onnx"
    return onnxruntime.InferenceSession(graph, make_options(threads), providers=["CPUExecutionProvider"])
