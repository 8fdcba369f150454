"""Save pruned models in less space: of a tensor with many zeros, the nonzero values and one bit per weight.

In a packed checkpoint `<name>` holds the nonzero values one after the other, and `<name>.bitmask` their places.
`from_pretrained` of any Auto class reads it, because importing this module registers the quantizer `bitmask` with
transformers; it returns an ordinary dense model. Without this package transformers refuses the checkpoint, because its
shapes differ from those of the model.
"""

import copy
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_moebert.architectures.stacks import refuse_forms

from .drafts import drafting
from .folders import is_pickle, is_weights, list_files
from .forms import StrictQuantizer, check_options, mark
from .loading import load_model
from .manifests import hash_file
from .swapping import find_mixture, swap


FORMAT_VERSION = "1"
SUFFIX = ".bitmask"
ENTRY_BYTES = 128  # of the header of a safetensors file, for one more tensor
INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into its nonzero values and a bitmask of their places.

    A value is zero if none of its bits is set: -0.0 is kept, so that unpacking restores every bit.

    Args:
        tensor: A tensor of float16, bfloat16, float32 or float64. Shape `(..., columns)`.

    Returns:
        The values in row-major order, `(kept,)`, and their places, uint8, `(..., ceil(columns / 8))`: the first
        column is the lowest bit.
    """
    kept = _is_kept(tensor)  # (..., columns)
    bits = pad(kept.to(torch.uint8), (0, -tensor.shape[-1] % 8)).unflatten(-1, (-1, 8))  # (..., bytes, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=tensor.device)
    return tensor[kept], (bits << shifts).sum(dim=-1, dtype=torch.uint8)


def unpack(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Undo `pack`, on the device the values are on.

    Args:
        values: Shape `(kept,)`.
        bitmask: Shape `(..., ceil(columns / 8))`.
        columns: Size of the last dimension of the tensor.

    Returns:
        Shape `(..., columns)`.

    Raises:
        ValueError: If the bitmask has another number of ones than there are values.
    """
    kept = _unpack_bits(bitmask, columns)  # (..., columns)
    if (ones := int(kept.count_nonzero())) != values.numel():
        raise ValueError(f"`bitmask` must have one bit for each of the {values.numel()} values, got {ones}.")
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


def packed_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in a packed checkpoint, packed if that is smaller, else dense."""
    if tensor.dtype not in INTEGERS or not tensor.dim():
        return tensor.nbytes
    kept = int(_is_kept(tensor).count_nonzero())
    return min(tensor.nbytes, kept * tensor.element_size() + math.prod(_bitmask_shape(tensor.shape)) + ENTRY_BYTES)


def _is_kept(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGERS[tensor.dtype]) != 0


def _unpack_bits(bitmask: Tensor, columns: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(-1) >> shifts & 1).bool().flatten(-2)[..., :columns]


def _bitmask_shape(shape: torch.Size) -> tuple[int, ...]:
    return *shape[:-1], -(-shape[-1] // 8)


def save_packed(model: PreTrainedModel, folder: str | PathLike[str], *, max_shard_size: int | str = "50GB") -> None:
    """Save a model as `save_pretrained` does, with every tensor packed that gets smaller by it.

    Its config.json has the SHA-256 of the weights, so that files of two saves are refused. While the model in a
    folder is replaced, and after a crash, the folder holds one of the two: see `swap`.

    Args:
        model: Any transformers model, pruned by any means; it is left as it is.
        folder: Folder to write to.
        max_shard_size: Size above which the weights are split into several files.

    Raises:
        ValueError: If the weights are quantized, not in memory, or those of an adapter only.
        OSError: If the folder cannot be written to; what it holds stays as it was.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    refuse_forms(
        model,
        "dense, or pruned, to be packed",
        "adapters",
        chains="Chains hold no zeros to leave out: use `save_pretrained`, or call `to_dense(model)` first",
        tasks="It is stored task by task: use `save_pretrained`, or pack what `extract_task` returns",
    )
    for wrong, what, remedy in (
        (
            not isinstance(model, PreTrainedModel),
            "is no model of transformers",
            "Give the model inside",
        ),
        (getattr(model, "hf_quantizer", None) is not None, "is quantized", "Pack the model in its own dtype"),
        (any(p.is_meta for p in model.parameters()), "has weights on the meta device", "Load it without offloading"),
    ):
        if wrong:
            raise ValueError(f"`model` must hold all its weights, dense, but {type(model).__name__} {what}. {remedy}.")
    weights = remove_tied_weights_from_state_dict(model.state_dict(), model)
    ignored = set(model._keys_to_ignore_on_save or ())
    packed = _pack_all((name, weight) for name, weight in weights.items() if name not in ignored)
    # The names of the modules, not those of the architecture's original checkpoints: loading has nothing to convert.
    Path(folder).mkdir(parents=True, exist_ok=True)
    with drafting(Path(folder) / SAFE_WEIGHTS_NAME) as draft:
        model.save_pretrained(draft, state_dict=packed, max_shard_size=max_shard_size, save_original_format=False)
        swap(draft, Path(folder), partial(_write_config, model.config))


def _write_config(
    config: PretrainedConfig, folder: Path, files: dict[str, str], replaced_files: dict[str, str] | None
) -> None:
    config = copy.deepcopy(config)
    config.quantization_config = BitmaskConfig(files=files, replaced_files=replaced_files)
    mark(config)
    config.save_pretrained(folder)


def _pack_all(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    packed = {}
    for name, weight in weights:
        if packed_bytes(weight) < weight.nbytes:
            packed[name], packed[name + SUFFIX] = pack(weight.detach())
        else:
            packed[name] = weight
    return packed


@register_quantization_config("bitmask")
class BitmaskConfig(QuantizationConfigMixin):
    """The entry of a packed checkpoint in config.json.

    Args:
        format_version: Of the packed tensors.
        files: SHA-256 of the files of weights, by name; None in checkpoints of 0.1.0.
        replaced_files: As `files`, of weights in whose place these were being put when a process was killed.

    Raises:
        ValueError: If a newer release wrote it, or a field does not exist.
    """

    dequantize = True  # transformers then treats the loaded model as one that was never quantized

    def __init__(
        self,
        format_version: str = FORMAT_VERSION,
        files: dict[str, str] | None = None,
        replaced_files: dict[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"`format_version` of a packed checkpoint must be {FORMAT_VERSION!r} for this release, got "
                f"{format_version!r}. Update hf_moebert."
            )
        check_options("bitmask", unknown)
        self.quant_method = "bitmask"
        self.format_version, self.files, self.replaced_files = format_version, files, replaced_files

    def check_hashes(self, files: Iterable[str | PathLike[str]]) -> None:
        """Refuse files of weights that were not saved with this entry.

        Args:
            files: All of them.

        Raises:
            ValueError: If one is damaged, or of another save.
        """
        paths = [Path(file) for file in files]
        if self.files is None or not paths:
            return
        found = {path.name: hash_file(path) for path in paths}
        mixture = find_mixture(found, self.files)
        if mixture and found != self.replaced_files:
            raise ValueError(
                f"{str(paths[0].parent)!r} must hold the weights that its config.json names, but {mixture}. Get all "
                "files of one save, or save it again with `save_packed`."
            )


@register_quantizer("bitmask")
class BitmaskQuantizer(StrictQuantizer):
    """A quantizer that unpacks a checkpoint while transformers loads it, tensor by tensor."""

    suffix = SUFFIX

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Replace the conversions of the architecture, because a packed checkpoint has the names of the modules."""
        wanted = get_model_conversion_mapping(model, add_legacy=False)  # as for a model that was never loaded
        return [_Unpacking(), *(_AtSaving(entry) for entry in wanted if not isinstance(entry, PrefixChange))]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "A packed checkpoint must be loaded whole, got a distributed configuration. Load it in one process "
                "and call `save_pretrained`; that folder can be distributed."
            )
        with torch.device("cpu"):  # transformers builds the model on the meta device
            files = list(kwargs.get("checkpoint_files") or [])
            self.quantization_config.check_hashes(files)
            check_tensors(self.check_stored(model, files), model)


class _Unpacking(WeightConverter):
    """The conversion of all tensors, which `save_pretrained` does not undo: the loaded model is dense."""

    def __init__(self) -> None:
        # "(.+)" becomes the first group of the sources: every tensor passes, and a pair meets under one name
        super().__init__([rf"^\1\{SUFFIX}$", r"^\1$"], ["(.+)"], [_Unpack()])

    def was_used(self) -> bool:
        """Return False, so that transformers does not keep it for saving."""
        return False


class _AtSaving(WeightRenaming):
    """A conversion of the architecture that loading skips and `save_pretrained` undoes."""

    def __init__(self, conversion: WeightTransform) -> None:
        super().__init__("^$", "")  # no tensor has an empty name
        self.conversion = conversion

    def was_used(self) -> bool:
        """Return True, so that transformers keeps it for saving."""
        return True

    def reverse_transform(self) -> WeightTransform:
        """Return the reverse of the architecture's conversion."""
        return self.conversion.reverse_transform()


class _Unpack(ConversionOps):
    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        name, (bitmask, values) = kwargs["full_layer_name"], source_patterns
        (tensor,) = input_dict[values]
        if bitmask in input_dict:
            columns = kwargs["model"].get_parameter_or_buffer(name).shape[-1]
            tensor = unpack(tensor, input_dict[bitmask][0], columns)
        return {name: tensor}


def check_tensors(stored: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse weights that would not restore the whole model.

    Args:
        stored: Slices of a packed checkpoint, by the names that they have in the model.
        model: The model they are for; it may be on the meta device.

    Raises:
        ValueError: If a tensor that the model wants lacks its half, or has another shape, dtype or number of values
            than the other half calls for.
    """
    wanted = model.state_dict()
    for name in {name.removesuffix(SUFFIX): None for name in stored}:
        if name in wanted and (fault := _find_fault(name, stored, wanted[name].shape)):
            raise ValueError(
                f"{name!r} of the packed checkpoint {model.config.name_or_path!r} {fault}. Copy it again or save it "
                "again with `save_packed`; to load it into a model of other sizes, save it dense first."
            )


def _find_fault(name: str, slices: Mapping[str, Any], shape: torch.Size) -> str | None:
    values, bitmask = slices.get(name), slices.get(name + SUFFIX)
    if values is None:
        return f"must hold the values of {name + SUFFIX!r}, but is missing"
    if bitmask is None:
        lost = len(values.get_shape()) == 1 and len(shape) != 1
        return f"must have a bitmask {name + SUFFIX!r}, which is missing" if lost else None
    if values.get_dtype() not in {"F16", "BF16", "F32", "F64"} or len(values.get_shape()) != 1:
        return f"must be a list of floating point values, got {values.get_dtype()} of shape {values.get_shape()}"
    if bitmask.get_dtype() != "U8" or tuple(bitmask.get_shape()) != _bitmask_shape(shape):
        return (
            f"must have a bitmask of U8 and shape {list(_bitmask_shape(shape))} to become {list(shape)}, got "
            f"{bitmask.get_dtype()} of shape {bitmask.get_shape()}"
        )
    (count,), ones = values.get_shape(), int(_unpack_bits(bitmask[...], shape[-1]).count_nonzero())
    return None if ones == count else f"must have as many values as its bitmask has ones, got {count} for {ones}"


def pack_folder(folder: str | PathLike[str], output: str | PathLike[str]) -> None:
    """Write a packed copy of a checkpoint: its weights, and all files that are neither weights nor training state.

    The copy appears whole or not at all.

    Args:
        folder: Checkpoint that `load_model` can load.
        output: A folder that does not exist yet, or is empty.

    Raises:
        ValueError: If the output is not empty, if the checkpoint links out of its folder, or if `load_model` refuses
            it.
        OSError: If the folder is no checkpoint.
    """
    folder, target = Path(folder), Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`output` must be a new or empty folder, got {str(output)!r}.")
    beside = [file for file in list_files(folder) if not is_weights(file) and not is_pickle(folder / file)]
    model = load_model(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=target.parent) as parent:
        draft = Path(parent) / "packed"
        save_packed(model, draft)
        for file in beside:
            if not (draft / file).exists():
                (draft / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, draft / file)
        if target.exists():
            target.rmdir()  # not every system renames over an empty folder
        draft.rename(target)
