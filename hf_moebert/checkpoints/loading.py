"""Load a checkpoint completely, or refuse it."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .remote_code import explain_refused_code


def load_model(folder: str | PathLike[str]) -> PreTrainedModel:
    """Load a checkpoint, dense or packed, as the class named in its config.json.

    Args:
        folder: A checkpoint of a class that is registered with an Auto class.

    Raises:
        ValueError: If the class is not registered, needs code of the folder, or if weights are missing or damaged.
        OSError: If the folder is no checkpoint.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"`folder` must hold config.json and model.safetensors, got {str(folder)!r}.")
    with explain_refused_code(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    classes = _find_classes(config)
    name = (config.architectures or [None])[0]
    if name not in classes:
        raise ValueError(f"`architectures` of {str(folder)!r} must be one of {sorted(classes)}, got {name!r}.")
    try:
        model, report = classes[name].from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{str(folder)!r} must hold the weights of a {name}, but: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{str(folder)!r} must hold all weights, but lacks {sorted(report['missing_keys'])}.")
    return model


def open_tensors(files: Iterable[str | PathLike[str]]) -> dict[str, Any]:
    """Open weights files without reading their tensors.

    Args:
        files: All weights files of a checkpoint.

    Returns:
        Slices as safetensors returns them, by the tensors' names: `get_shape`, `get_dtype`, `[...]`.

    Raises:
        ValueError: If one is no complete safetensors file.
    """
    tensors: dict[str, Any] = {}
    for file in map(Path, files):
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"A checkpoint must be of complete safetensors files, got {str(file)!r}: {error}. Copy or save it "
                "again."
            ) from error
        for name in list(opened.keys()):
            tensors[name] = opened.get_slice(name)
    return tensors


def _find_classes(config: PretrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """Return the classes that the Auto classes know for a configuration, by name."""
    classes = {}
    for mapping in (getattr(modeling_auto, name) for name in modeling_auto.__all__ if name.endswith("_MAPPING")):
        if type(config) in mapping:
            entry = mapping[type(config)]
            for found in entry if isinstance(entry, tuple) else (entry,):
                classes[found.__name__] = found
    return classes
