# Copied from hf_moebert/checkpoints/strict_model.py by `make copies`; edit there.
"""Models that load completely or not at all."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


# Options that `from_pretrained` and `cached_file` of transformers share
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
OWN_PACKAGE = f"{__name__.rpartition('.')[0]}."
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


RULES = {  # what the weights must be, and what to do if they are not, by the argument that lets them pass
    "missing": (
        "hold all weights",
        "They would be random: convert a dense model with `from_dense`, get the whole checkpoint",
    ),
    "unexpected": (
        "hold no weights but those",
        "They would be left out: load it with the class that it was saved with",
    ),
    "cast": ("hold the dtypes", "They would be cast: name the `dtype` to load in"),
    "nonfinite": ("hold finite weights", "Train again with a smaller learning rate"),
}


class StrictModel(PreTrainedModel):
    """Base class of our models, which load completely or not at all."""

    loads_strictly = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load as transformers does, but refuse weights that are not exactly those of the model.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub.
            *args: As in transformers.
            output_loading_info: As in transformers.
            **kwargs: As in transformers, and the `allow_` arguments of `load_strictly`.

        Raises:
            ValueError: As `load_strictly`.
            RuntimeError: As `load_strictly`.
            OSError: As `load_strictly`.
        """
        kwargs["indexed"] = bool(getattr(cls.config_class, "transformers_weights", None))
        model, info = load_strictly(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        return (model, info) if output_loading_info else model

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of custom code, transformers leaves out modules without weights of their own, lest it overwrites what was
        # loaded; but its own classes, which take care of that, may draw the weights of the modules within
        models = [cls for cls in type(self).__mro__ if issubclass(cls, PreTrainedModel)]
        custom = not all(cls.__module__.startswith(("transformers.", OWN_PACKAGE)) for cls in models)
        super()._initialize_weights(module, custom)


def load_strictly(
    load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
    source: str | os.PathLike[str] | None,
    *args: Any,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    allow_cast: bool = False,
    allow_nonfinite: bool = False,
    indexed: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model, and refuse weights that are not exactly its own.

    Args:
        load: The `from_pretrained` of transformers.
        source: Folder, or name on the Hub.
        *args: For `load`.
        allow_missing: Whether weights that the files lack are drawn at random, such as a new head.
        allow_unexpected: Whether weights that the model lacks are left out. The bare model may always leave out the
            head.
        allow_cast: Whether weights may lose precision though no `dtype` is given, or change their kind.
        allow_nonfinite: Whether weights may be NaN or infinite.
        indexed: Whether only the files of an index count.
        **kwargs: For `load`. Pickles are read with `use_safetensors=False` alone, and weights of another size are
            drawn at random with `ignore_mismatched_sizes=True` alone, and in a head alone.

    Returns:
        The model, and the loading report of transformers.

    Raises:
        ValueError: If weights are missing, unknown, damaged, not finite or of another kind, or a file lies outside of
            the folder.
        RuntimeError: If weights have another size.
        OSError: If there are no weights.
    """
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    stored: dict[str, Any] = {}
    if source is not None and kwargs["use_safetensors"] and not kwargs.get("gguf_file"):
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        stored = open_tensors(find_weights(source, variant=kwargs.get("variant"), indexed=indexed, **hub))
    try:
        model, info = load(source, *args, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{str(source)!r} must hold whole safetensors files: {error}. Get it again.") from error
    except RuntimeError as error:
        raise RuntimeError(f"{str(source)!r} must hold weights of the model's sizes: {error}") from error
    asked = (kwargs.get("dtype") or kwargs.get("torch_dtype")) not in (None, "auto")
    missing = drop_pooler(model, info["missing_keys"]) + find_misfits(model, info["mismatched_keys"])
    faults = {
        "missing": [] if allow_missing else sorted(missing),
        "unexpected": [] if allow_unexpected else find_unexpected(model, info["unexpected_keys"], stored),
        "cast": [] if allow_cast else find_cast(model, stored, asked=asked),
        "nonfinite": [] if allow_nonfinite else find_nonfinite(model),
    }
    refuse(source, type(model).__name__, faults)
    return model, info


def find_weights(
    source: str | os.PathLike[str], *, variant: str | None = None, indexed: bool = False, **hub: Any
) -> list[Path]:
    """Find, or download, all weights files of a checkpoint.

    Args:
        source: Folder, or name on the Hub.
        variant: As in transformers: "fp16" for `model.fp16.safetensors`.
        indexed: Whether only the files of an index count.
        **hub: Options of `cached_file` of transformers, such as `revision`.

    Returns:
        Safetensors files; none for the folder of an adapter.

    Raises:
        ValueError: If an index, or a link, leads out of the folder.
        OSError: If there are no such files.
    """
    hub["_raise_exceptions_for_missing_entries"] = False
    end = f".{variant}" if variant else ""
    whole = SAFE_WEIGHTS_NAME.replace(".safetensors", f"{end}.safetensors")
    index = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{end}.json")
    if not indexed and (found := cached_file(source, whole, **hub)):
        places = [found]
    elif found := cached_file(source, index, **hub):
        places = [cached_file(source, name, **hub) or name for name in read_index(found)]
    elif cached_file(source, "adapter_config.json", **hub):
        return []  # transformers goes on to the model that it adapts
    else:
        raise OSError(
            f"{str(source)!r} must hold {whole} or {index}, and holds neither. Pickles (pytorch_model.bin) can run "
            "code: save the model as safetensors, or trust them and load with `use_safetensors=False`."
        )
    check_places([found, *places], source)
    return [Path(place) for place in places]


def read_index(file: str | os.PathLike[str]) -> list[str]:
    """Return the names of the weights files in an index.

    Raises:
        ValueError: If it is damaged, or a name is not that of a safetensors file in the same folder.
    """
    try:
        names = sorted(set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} must map tensors to files: {error!r}. Get it again.") from error
    if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(f"{str(file)!r} must name safetensors files beside it, got {wrong}. Save the model again.")
    return names


def check_places(files: Iterable[str | os.PathLike[str]], source: str | os.PathLike[str]) -> None:
    """Refuse files of a local folder that lie elsewhere; in the Hub's cache all are links to `blobs`.

    Raises:
        ValueError: If there is one.
    """
    if not Path(source).is_dir():
        return
    folder = Path(source).absolute()
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1].resolve() / "blobs")
    for file in files:
        place = Path(file).resolve()
        if not any(place.is_relative_to(home) for home in homes):
            raise ValueError(f"{str(file)!r} must lie in its folder, but leads to {str(place)!r}. Copy it there.")


def open_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """Open weights files without reading their tensors.

    Args:
        files: All weights files of a checkpoint.

    Returns:
        Slices as safetensors returns them, by the tensors' names: `get_shape`, `get_dtype`, `[...]`.

    Raises:
        ValueError: If one is no complete safetensors file, or a tensor is in two of them.
        OSError: If one is missing.
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
            if name in tensors:
                raise ValueError(f"{str(file)!r} must not hold {name!r}, which another file holds. Save it again.")
            tensors[name] = opened.get_slice(name)
    return tensors


def find_unexpected(model: PreTrainedModel, names: Iterable[str], stored: Iterable[str]) -> list[str]:
    """Return the tensors that a model should not leave out; the bare model leaves out the head.

    Args:
        model: Loaded model.
        names: Tensors that it left out.
        stored: All tensors of the files.
    """
    body = f"{model.base_model_prefix}."
    if model.base_model is model and any(name.startswith(body) for name in stored):
        names = [name for name in names if name.startswith(body)]
    return sorted(names)


def find_misfits(model: PreTrainedModel, mismatched: Iterable[Any]) -> list[str]:
    """Return the tensors of other sizes, drawn at random on request, that are not of a head.

    Args:
        model: Loaded model.
        mismatched: Names, or tuples that begin with a name, as transformers reports them.
    """
    names = [entry if isinstance(entry, str) else entry[0] for entry in mismatched]
    return [name for name in names if model.base_model is model or name.startswith(f"{model.base_model_prefix}.")]


def drop_pooler(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Take the pooler from a body whose files have none, since their head did without, rather than draw it at random.

    Args:
        model: Its `pooler_output` is then None.
        missing: Names of all tensors that the files lack.

    Returns:
        The names, or none if they were those of the pooler.
    """
    pooler = getattr(model, "pooler", None)
    names = {f"pooler.{name}" for name in pooler.state_dict()} if isinstance(pooler, nn.Module) else set()
    if model.base_model is not model or names != set(missing):
        return list(missing)
    if names:
        model.pooler = None
    return []


def find_cast(model: PreTrainedModel, stored: Mapping[str, Any], *, asked: bool) -> list[str]:
    """Return the tensors that changed their kind on loading or, unless it was asked for, lost precision.

    Args:
        model: Loaded model.
        stored: Slices of the files, by name.
        asked: Whether the caller named a dtype.
    """
    body, casts = f"{model.base_model_prefix}.", []
    for name, tensor in model.state_dict().items():
        places = (name, body + name, name.removeprefix(body))
        entry = next((stored[place] for place in places if place in stored), None)
        before = None if entry is None else DTYPES.get(entry.get_dtype())
        if before is None or before == tensor.dtype:
            continue
        floats = before.is_floating_point and tensor.is_floating_point()
        if not floats or not (asked or torch.promote_types(before, tensor.dtype) == tensor.dtype):
            casts.append(f"{name} ({before} to {tensor.dtype})")
    return casts


def find_nonfinite(model: PreTrainedModel) -> list[str]:
    """Return the names of weights and buffers that are NaN or infinite somewhere."""
    state: dict[str, Tensor] = model.state_dict()
    floats = {name: x for name, x in state.items() if x.is_floating_point() and not x.is_meta}
    return [name for name, x in floats.items() if not x.isfinite().all()]


def refuse(source: Any, owner: str, faults: Mapping[str, list[str]], *, option: str = "`allow_{}=True`") -> None:
    """Raise an error if there is a fault.

    Args:
        source: Folder, or name on the Hub.
        owner: Name of the class.
        faults: Names of tensors by the argument that would let them pass.
        option: How that argument is written.

    Raises:
        ValueError: With the first fault; it names the tensors and the remedy.
    """
    for argument, names in faults.items():
        if names:
            some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            rule, remedy = RULES[argument]
            raise ValueError(
                f"{str(source)!r} must {rule} of {owner}, which is not so for {some}. {remedy}, or load with "
                f"{option.format(argument)} if you know better."
            )
