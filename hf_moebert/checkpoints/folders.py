"""The files of a checkpoint folder: which hold its weights, which belong to a training run, which run code."""

import fnmatch
import zipfile
from os import PathLike
from pathlib import Path


# What belongs to the run that trained a model: of no use to others, and mostly pickle. Files and folders.
TRAINING_STATE = (
    "training_args.*",
    "optimizer*",
    "scheduler.*",
    "scaler.*",
    "*_state.*",
    "rng_state*",
    "global_step*",
    "checkpoint-*",
    "checkpoint_manifest.json",
    "*.lock",
    "runs",
)
PICKLES = ("*.bin", "*.ckpt", "*.joblib", "*.npy", "*.npz", "*.pickle", "*.pkl", "*.pt", "*.pth")
# The weights of a model; those of further modules lie in folders of their own, such as `2_Dense`.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# The same weights for other programs, wherever they lie. Pickles are weights, too.
EXPORTED_WEIGHTS = ("*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx?data", "*.ot", "*.tflite")


def list_files(folder: str | PathLike[str]) -> list[Path]:
    """List the files of a folder and of those below that may go elsewhere, in order.

    Hidden files and those of a training run stay behind.

    Returns:
        Paths relative to the folder.

    Raises:
        ValueError: If one links out of the folder.
    """
    folder, files = Path(folder), []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") or _matches(part, TRAINING_STATE) for part in relative.parts):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`folder` must not link out of itself, got {str(relative)!r}. Copy the file instead.")
        if path.is_file():
            files.append(relative)
    return files


def is_weights(file: Path) -> bool:
    """Return whether a file holds the weights of the model in its folder, in any format; by its name.

    Args:
        file: Path relative to the folder.
    """
    return len(file.parts) == 1 and _matches(file.name, WEIGHTS) or _matches(file.name, EXPORTED_WEIGHTS + PICKLES)


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle, which runs code when it is read; by its name and its first bytes."""
    if _matches(path.name, PICKLES):
        return True
    with path.open("rb") as stream:
        start = stream.read(9)
    if path.suffix == ".safetensors" and start[8:] == b"{":
        return False  # the length of its header may by chance look like a pickle's first bytes
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # protocol opcode, number
        return True
    if not zipfile.is_zipfile(path):
        return False
    try:  # what `torch.save` writes is a zip file around a pickle
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return True  # nobody can tell


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
