"""Folders of this machine, or of repositories on the Hub."""

from os import PathLike
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError


FILES = ["*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.codes", "*.safetensors"]  # neither pickles nor code
EXPORTS = ["*.onnx", "*.onnx.data"]


def find_folder(source: str | PathLike[str], *, exports: bool = False) -> Path:
    """Return a folder as it is, or one with the files of a model on the Hub, but for pickles and code.

    Args:
        source: Folder or Hub id.
        exports: Whether graphs of ONNX are downloaded too.

    Raises:
        FileNotFoundError: If it is neither, or the Hub cannot be asked.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=FILES + (EXPORTS if exports else [])))
    except (HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        said = "." if isinstance(error, HFValidationError) else f"; the Hub says: {reason}"
        raise FileNotFoundError(
            f"`model` must be a folder that exists or a model on the Hub, got {str(source)!r}. Check the path{said}"
        ) from error
