"""Load a checkpoint completely, or refuse it."""

from os import PathLike
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .forms import allow
from .remote_code import refuse_code
from .strict_model import RULES, load_strictly


def load_model(folder: str | PathLike[str], **options: bool) -> PreTrainedModel:
    """Load a checkpoint, dense or in a form of ours, as the class named in its config.json.

    Args:
        folder: A checkpoint of a class that is registered with an Auto class.
        **options: The arguments of `StrictModel.from_pretrained` that let something pass: `allow_missing`,
            `allow_unexpected`, `allow_cast` and `allow_nonfinite`.

    Raises:
        ValueError: If the class is not registered or needs code of the folder, if weights are missing, unknown,
            damaged, not finite or of another kind, or if an option does not exist.
        RuntimeError: If weights have another size.
        OSError: If the folder is no checkpoint.
    """
    known = [f"allow_{rule}" for rule in RULES]
    if wrong := options.keys() - set(known):
        raise ValueError(f"`options` must be among {', '.join(known)}, got {sorted(wrong)}. Check the spelling.")
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"`folder` must hold config.json and model.safetensors, got {str(folder)!r}.")
    with refuse_code(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cls = find_class(config, folder)
    if getattr(cls, "loads_strictly", False):
        return cls.from_pretrained(folder, **options)
    if getattr(config, "quantization_config", None) is not None:
        with allow(*(option.removeprefix("allow_") for option, on in options.items() if on)):
            return cls.from_pretrained(folder, use_safetensors=True)
    return load_strictly(cls.from_pretrained, folder, **options)[0]


def find_class(config: PretrainedConfig, folder: str | PathLike[str]) -> type[PreTrainedModel]:
    """Return the class that a configuration names.

    Raises:
        ValueError: If no Auto class knows it.
    """
    classes = _find_classes(config)
    name = (config.architectures or [None])[0]
    if name not in classes:
        raise ValueError(
            f"`architectures` of {str(folder)!r} must be one of {sorted(classes)}, got {name!r}. Save the model by "
            "`save_pretrained`, which writes the name of its class."
        )
    return classes[name]


def _find_classes(config: PretrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """Return the classes that the Auto classes know for a configuration, by name."""
    classes = {}
    for mapping in (getattr(modeling_auto, name) for name in modeling_auto.__all__ if name.endswith("_MAPPING")):
        if type(config) in mapping:
            entry = mapping[type(config)]
            for found in entry if isinstance(entry, tuple) else (entry,):
                classes[found.__name__] = found
    return classes
