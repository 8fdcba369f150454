# Copied from hf_moebert/checkpoints/strict_config.py by `make copies`; edit there.
"""Configurations that refuse what they do not know."""

import dataclasses
import difflib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict as strict_dataclass
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin


logger = logging.get_logger(__name__)
# In a config.json, an entry of `fusion_config` that does not exist stops transformers with its name in the error, in
# whatever class a checkpoint is opened. Our classes and quantizers remove their entries.
CLASS_MARK = "none, for this model is of hf_moebert: `pip install hf_moebert`, `import hf_moebert`, use an Auto class"
INSTALL = "hf_moebert (`pip install hf_moebert`, then "
PACKAGE = f"{INSTALL}`import hf_moebert`)"
# What transformers raises for values that make no sense to it
NONSENSE = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ZeroDivisionError)
LARGEST = dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers"), 1024)
LARGEST |= {"layers": 1024, "per_layer_config": 1024, "num_labels": 100_000, "rows": 64, "columns": 64, "tasks": 1024}
MAX_ITEMS, MAX_NESTING = 100_000, 16  # of any list or dict
# What transformers takes, and writes, besides the fields of a configuration
EXTRAS = frozenset(
    {"model_type", "auto_map", "quantization_config", "fusion_config", "custom_pipelines", "torch_dtype"}
    | {"attn_implementation", "experts_implementation", "per_layer_config", "rope_theta"}
    | {"_name_or_path", "_commit_hash", "_attn_implementation_internal", "_experts_implementation_internal"}
)
OF_A_FOLDER = ("model_type", "architectures", "transformers_version", "dtype", "auto_map", "fusion_config")
Config = TypeVar("Config", bound=PreTrainedConfig)
# A base class with fields would overwrite the defaults of the configuration beside it, such as T5's
_Base: Any = PreTrainedConfig if TYPE_CHECKING else object


def strict(cls: type[Config]) -> type[Config]:
    """Decorate a configuration as transformers does, so that every broken rule is a `ValueError` of one sentence."""
    cls = strict_dataclass(cls)
    cls.__init__ = _in_one_sentence(cls.__init__, cls.__name__, NONSENSE)
    for name in ("__setattr__", "validate"):
        setattr(cls, name, _in_one_sentence(getattr(cls, name), cls.__name__))
    return cls


def _in_one_sentence(
    method: Callable[..., None], owner: str, nonsense: tuple[type[Exception], ...] = ()
) -> Callable[..., None]:
    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check_sizes(kwargs)
            method(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{error.__cause__ or error} ({owner})") from error
        except nonsense as error:
            raise ValueError(f"A {owner} cannot be made of these values: {error!r}. Check config.json.") from error

    return checked


def check_sizes(fields: Mapping[str, Any], depth: int = 0) -> None:
    """Refuse sizes for which transformers would take seconds and gigabytes, before anything is computed from them.

    Args:
        fields: Fields of a configuration, and of configurations in it.
        depth: Number of dicts around these.

    Raises:
        ValueError: If there is such a size.
    """
    for name, value in fields.items():
        largest = LARGEST.get(name, MAX_ITEMS)
        size = len(value) if isinstance(value, Sized) and not isinstance(value, str) else value
        countable = size is not value or name in LARGEST
        if countable and isinstance(size, int | float) and not 0 <= size <= largest:
            raise ValueError(f"The size of `{name}` must be in [0, {largest}], got {size}. Check config.json.")
        if isinstance(value, Mapping):
            if depth == MAX_NESTING:
                raise ValueError(f"`{name}` must not be nested deeper than {MAX_NESTING} times. Check config.json.")
            check_sizes(value, depth + 1)


class StrictConfig(_Base):
    """Base of our configurations, beside one of transformers: refuse misspelt fields, other models and absurd sizes.

    Raises:
        ValueError: If a field does not exist, the configuration is that of another model, or it has more layers or
            labels than any model.
    """

    package: ClassVar[str] = PACKAGE  # what a checkpoint names that cannot be loaded without this package
    undeclared: ClassVar[tuple[str, ...]] = ()  # names that the base class's models read, and it does not declare

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields, before transformers computes anything from them."""
        model_type = kwargs.pop("model_type", self.model_type)
        self._check_type(model_type)
        form = kwargs.get("quantization_config")
        if form is not None and not isinstance(form, Mapping | QuantizationConfigMixin):
            raise ValueError(f"`quantization_config` must describe a form, got {form!r}. Check config.json.")
        if INSTALL in str(kwargs.get("auto_map")):  # only transformers alone is to see it
            del kwargs["auto_map"]
        marks = dict(kwargs.pop("fusion_config", None) or {})
        marked = marks.pop(CLASS_MARK, False)
        # A file without the mark, of version 0.1 or of a dense model, may hold what dense models had in the past.
        lenient = not marked and self.transformers_version is not None
        for name in self.unknown_fields(kwargs):
            self._refuse_field(name, lenient=lenient)
            del kwargs[name]
        super().__post_init__(**kwargs, **({"fusion_config": marks} if marks else {}))

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        """Return those names that are no fields."""
        unknown = [name for name in names if name not in EXTRAS]  # most often none, and then nothing is computed
        return [name for name in unknown if name not in cls.known_fields()]

    @classmethod
    def _refuse_field(cls, name: str, *, lenient: bool) -> None:
        """Refuse an unknown field; if lenient, only one that is a misspelt field of ours, and warn of others."""
        dense = [base for base in cls.__mro__ if base.__module__.startswith("transformers.")]
        theirs = {field.name for base in dense if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)}
        ours = {field.name for field in dataclasses.fields(cls)} - theirs
        names = ours if lenient else cls.known_fields()
        close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.8 if lenient else 0.6)
        if lenient and not close:
            logger.warning(f"`{name}` is left out, because it is no field of {cls.__name__}.")
            return
        hint = f"Did you mean `{close[0]}`?" if close else "Leave it out."
        raise ValueError(f"`{name}` is no field of {cls.__name__}. {hint}")

    def _check_type(self, model_type: str) -> None:
        """Refuse the configuration of another model."""
        if model_type not in {self.model_type, *self._dense_types()}:
            raise ValueError(
                f"`model_type` of a {type(self).__name__} must be {self.model_type!r}, got {model_type!r}. Load the "
                "checkpoint with an Auto class."
            )

    @classmethod
    def _dense_types(cls) -> set[str]:
        """Return the model types of the configurations of transformers that this one extends."""
        return {getattr(base, "model_type", "") for base in cls.__mro__} - {"", cls.model_type}

    @classmethod
    @functools.cache
    def known_fields(cls) -> frozenset[str]:
        """Return the names of all fields, and of what transformers computes from them and writes to config.json."""
        names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
        names |= {name for name, _ in inspect.getmembers(cls, lambda member: isinstance(member, property))}
        names.update(cls.undeclared)
        names |= vars(cls()).keys()  # computed from the fields, but written to config.json
        return frozenset(names | GenerationConfig().to_dict().keys())  # which transformers reads over

    @classmethod
    def fields_of_dense(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Return what a configuration of this class takes over from that of a dense model: head, labels and sizes."""
        known = cls.known_fields() | EXTRAS
        dense = {name: value for name, value in config.to_dict().items() if name in known and name not in OF_A_FOLDER}
        return dense | {"attn_implementation": config._attn_implementation}

    def _travels(self) -> bool:
        """Check whether the code in a checkpoint is all that it takes to load it."""
        return self._auto_class is not None

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write a file that this class can read: without attributes that are no fields, with a warning for each.

        Args:
            json_file_path: As in transformers.
            use_diff: As in transformers.
        """
        fields = json.loads(self.to_json_string(use_diff=use_diff))
        for name in self.unknown_fields(fields):
            logger.warning(f"`{name}` is not saved, because it is no field of {type(self).__name__}.")
            del fields[name]
        fields["fusion_config"] = fields.get("fusion_config", {}) | {CLASS_MARK: True}
        if not self._travels():  # transformers answers with this name, and stops
            fields["auto_map"] = {"AutoConfig": f"{self.package}--configuration.Config"}
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")
