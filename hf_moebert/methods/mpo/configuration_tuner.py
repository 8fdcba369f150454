"""The configuration of adapters of auxiliary tensors, which PEFT saves beside their weights."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig

from .functional_decomposition import GAUGES, check_option
from .functional_shapes import check_cap, check_num_cores


SUPPORTED_PEFT = "peft>=0.21"


class ExtraPeftType(str, Enum):  # noqa: UP042 - as PEFT's own, whose tables are indexed by the plain string, too
    """The name of the method in `adapter_config.json`; PEFT's own enumeration cannot be extended."""

    MPO = "MPO"


@dataclass
class MPOConfig(PeftConfig):
    """The matrices that get trainable auxiliary tensors, and how these are decomposed.

    Raises:
        ValueError: If a value breaks the rule in its help text; the message names rule and remedy.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205, for `num_cores`; their code for `gauge`. `bond` is our
    own design for fine-tuning.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of linear layers and embeddings, or ends of names; a regular expression if it is a string;"
            " 'all-linear' for all linear layers but the output. None for attention and feed-forward matrices."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, named as in `target_modules`."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get an adapter; None for all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts, such as 'h'."}
    )
    num_cores: int = field(
        default=5,
        metadata={"help": "Tensors in the chain of each matrix, odd and at least 3; all but the middle one train."},
    )
    bond: int | None = field(
        default=None,
        metadata={
            "help": "Largest bond between two tensors, at least 1; None for no limit. Smaller bonds make a smaller"
            " adapter; the part of a matrix that they cannot represent stays frozen."
        },
    )
    gauge: str = field(
        default="symmetric",
        metadata={
            "help": "Which tensors carry the norm of a matrix, and so how learning rates act: 'symmetric' (all alike,"
            " as the authors' code does), 'left' (the last tensor), 'centre' (the frozen one) or 'even' (all alike, by"
            " the size of their entries)."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that train as a whole and are saved with the adapter, such as a head."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Whether to decompose the matrices now. False leaves the adapter empty until a file is loaded into"
            " it, and is the value that is saved."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ExtraPeftType.MPO
        check_num_cores(self.num_cores)
        check_cap(self.bond)
        check_option("gauge", self.gauge, GAUGES)
        if self.init_weights not in (True, False):
            raise ValueError(f"`init_weights` must be True or False, got {self.init_weights!r}. Write it unquoted.")
        self._check_modules()

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            names = isinstance(value, list | tuple | set) and all(isinstance(n, str) and n for n in value)
            if not names and not isinstance(value, str | None):
                raise ValueError(f"`{name}` must list names of modules, got {value!r}. Use ['query', 'value'].")
            if names:
                setattr(self, name, set(value))  # the type that PEFT's matching expects
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_to_transform` must be given with `layers_pattern`, got None and {self.layers_pattern!r}."
                " Name the layers to adapt, or leave the pattern out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields to save, with `init_weights` off: loading fills the adapter from its file."""
        saved = {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}
        return {**saved, "init_weights": False}
