"""The common part of forms in which weights are stored: packed, or as chains of cores.

transformers loads a form by a quantizer, into a class of its own or of ours. Of a form that it does not know it would
say so in a warning, and go on with random weights: the mark in config.json stops it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer

from .strict_model import DTYPES, check_places, drop_pooler, find_nonfinite, find_unexpected, open_tensors, refuse
from .tensor_files import digest


# An entry of `fusion_config` that does not exist: transformers stops with its name in the error.
FORM_MARK = "none, for these weights are stored in a form of hf_moebert: `pip install hf_moebert`, `import hf_moebert`"
FINGERPRINTS = "sha256_of_tensors"  # entry of the metadata of weights files
_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


@contextmanager
def allow(*options: str) -> Iterator[None]:
    """Load packed or decomposed checkpoints that would be refused, because you know better.

    Classes of this package take the same as arguments of `from_pretrained`.

    Args:
        *options: Of "missing", "unexpected", "cast" and "nonfinite"; see `load_strictly`.
    """
    token = _allowed.set(_allowed.get() | set(options))
    try:
        yield
    finally:
        _allowed.reset(token)


def mark(config: PreTrainedConfig) -> None:
    """Make config.json stop a transformers that does not know the form."""
    config.fusion_config = (getattr(config, "fusion_config", None) or {}) | {FORM_MARK: True}


def unmark(config: PreTrainedConfig) -> None:
    """Undo `mark`."""
    marks = getattr(config, "fusion_config", None) or {}
    if marks.keys() == {FORM_MARK}:
        del config.fusion_config
    elif marks:
        config.fusion_config = {name: on for name, on in marks.items() if name != FORM_MARK}


def check_options(form: str, unknown: Iterable[str]) -> None:
    """Refuse unknown fields in the description of a form in config.json.

    Raises:
        ValueError: If there is one.
    """
    if wrong := sorted(set(unknown) - {"quant_method"}):
        raise ValueError(f"`quantization_config` of the form {form!r} must not hold {wrong}. Save the model again.")


def read_fingerprints(files: Iterable[str]) -> dict[str, str]:
    """Return the fingerprints of tensors in the metadata of weights files; those of version 0.1 have none.

    Raises:
        ValueError: If they are damaged.
    """
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(FINGERPRINTS, "{}")
        try:
            found |= dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file!r} must hold fingerprints of its tensors: {error}. Get it again.") from error
    return found


class StrictQuantizer(HfQuantizer):
    """Base class of the quantizers of our forms, which load checkpoints completely or not at all."""

    requires_calibration = True  # transformers then refuses a form for a checkpoint that is not in it
    suffix = ""  # of names of tensors that only the form has
    stored: Mapping[str, Any] = {}  # the slices of the files that are being loaded

    def is_serializable(self) -> bool:
        """Allow `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow the Trainer to train a model."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Mark config.json, and fingerprint every tensor."""
        mark(model.config)
        prints = {name: digest({"": tensor}) for name, tensor in model.state_dict().items() if not tensor.is_meta}
        return None, {FINGERPRINTS: json.dumps(prints)}

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Remove the mark, before transformers would stop at it."""
        unmark(config)
        return config

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Forget the form: the model is dense."""
        super().remove_quantization_config(model)
        unmark(model.config)

    def check_stored(self, model: PreTrainedModel, files: Sequence[str]) -> Mapping[str, Any]:
        """Refuse files that do not hold exactly the weights of a model, before any is read.

        Args:
            model: With the layers of the form; it may be on the meta device.
            files: All weights files of the checkpoint.

        Returns:
            The slices of the files by the names that their tensors have in the model.

        Raises:
            ValueError: If a file is damaged, no safetensors file or outside of its folder, or if a tensor is missing
                or unknown.
        """
        self.stored = {}
        if not files:  # the caller gave a state dict
            return self.stored
        source = model.config.name_or_path
        if wrong := [file for file in files if not str(file).endswith(".safetensors")]:
            raise ValueError(f"A checkpoint must be of safetensors files, got {wrong}. Save the model again.")
        check_places(files, source)
        raw = open_tensors(files)
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        wanted = model.state_dict()

        def place(name: str) -> str:
            bare = name.removesuffix(self.suffix)
            return rename_source_key(bare, renamings, [], model.base_model_prefix, wanted)[0] + name[len(bare) :]

        self.stored = {place(name): tensor for name, tensor in raw.items()}
        with torch.device("cpu"):  # transformers builds the model on the meta device
            for name, expected in read_fingerprints(files).items():
                if (entry := self.stored.get(place(name))) and digest({"": entry[...]}) != expected:
                    raise ValueError(f"{source!r} must hold {name!r} as it was saved: it is damaged. Get it again.")
        pairs = {name.removesuffix(self.suffix) for name in self.stored if name.endswith(self.suffix) and self.suffix}
        changed = [x for x, tensor in self.stored.items() if x not in pairs and _changes_kind(tensor, wanted.get(x))]
        self._refuse(model, {"cast": changed})
        if len(renamings) == len(conversions) and not getattr(model, "loads_strictly", False):
            self._check_names(model, list(raw), wanted)
        return self.stored

    def _check_names(self, model: PreTrainedModel, raw: list[str], wanted: Mapping[str, Tensor]) -> None:
        held = {name.removesuffix(self.suffix) for name in self.stored}
        tied = {name for names in model.all_tied_weights_keys.items() for name in names if set(names) & held}

        def drop(names: Iterable[str], ignored: Iterable[str] | None) -> list[str]:
            return sorted(n for n in names if n not in tied and not any(re.search(x, n) for x in ignored or ()))

        unexpected = find_unexpected(model, held - wanted.keys(), raw)
        faults = {
            "missing": drop(drop_pooler(model, wanted.keys() - held), model._keys_to_ignore_on_load_missing),
            "unexpected": drop(unexpected, model._keys_to_ignore_on_load_unexpected),
        }
        self._refuse(model, faults)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not getattr(model, "loads_strictly", False):
            self._refuse(model, {"nonfinite": find_nonfinite(model)})
        self.stored = {}
        return model

    def _refuse(self, model: PreTrainedModel, faults: dict[str, list[str]]) -> None:
        faults = {option: names for option, names in faults.items() if option not in _allowed.get()}
        option = "`hf_moebert.checkpoints.forms.allow('{}')`"
        refuse(model.config.name_or_path, type(model).__name__, faults, option=option)


def _changes_kind(stored: Any, wanted: Tensor | None) -> bool:
    """Check whether a stored tensor is of integers where the model wants numbers, or the other way round."""
    dtype = DTYPES.get(stored.get_dtype())
    return wanted is not None and dtype is not None and dtype.is_floating_point != wanted.is_floating_point()
