"""Where a model keeps its feed-forward networks: found by their structure, whatever the architecture."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Layout:
    """Names of the parts of a feed-forward network, as paths from the module that holds them.

    Attributes:
        up: The matrix that leads in; of a gated network the one without activation.
        down: The matrix that leads back.
        act: The activation function.
        gate: The matrix that leads in and is activated, if the network is gated.
        inner_dropout: Behind the activation.
        outer_dropout: At the end.
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    inner_dropout: str | None = None
    outer_dropout: str | None = None

    @property
    def matrices(self) -> dict[str, str]:
        """The matrices' paths by their part."""
        gate = {} if self.gate is None else {"gate": self.gate}
        return gate | {"up": self.up, "down": self.down}


LAYOUTS = (
    Layout(gate="gate_proj", up="up_proj", down="down_proj", act="act_fn"),  # Llama, Mistral, Qwen
    Layout(up="c_fc", down="c_proj", act="act", outer_dropout="dropout"),  # GPT-2
    Layout(gate="wi_0", up="wi_1", down="wo", act="act", inner_dropout="dropout"),  # T5 1.1, FLAN-T5
    Layout(up="wi", down="wo", act="act", inner_dropout="dropout"),  # T5
    # BERT, spread over two modules: the residual and the normalisation are behind `output.dense`
    Layout(up="intermediate.dense", down="output.dense", act="intermediate.intermediate_act_fn"),
)


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network as the host built it.

    Attributes:
        path: Of the module that holds it.
        layout: Where its parts are in there.
        holder: That module.
    """

    path: str
    layout: Layout
    holder: nn.Module

    def part(self, name: str) -> Any:
        """Return a part by its name in the layout, `None` if there is none."""
        path = getattr(self.layout, name)
        return None if path is None else _find(self.holder, path)

    @property
    def place(self) -> str:
        """Path at which a module can stand for the whole network."""
        return self.path if "." not in self.layout.down else f"{self.path}.{self.layout.down}"

    @property
    def matrix_paths(self) -> list[str]:
        """Paths of the matrices in the model."""
        return [f"{self.path}.{path}" for path in self.layout.matrices.values()]

    @property
    def num_units(self) -> int:
        """Units between the matrices."""
        return matrix_of(self.part("down")).shape[1]

    def replace_in(self, model: PreTrainedModel, network: nn.Module) -> None:
        """Put another module in its place."""
        if "." in self.layout.up:  # it begins in a module of its own, which now passes its input on
            model.set_submodule(f"{self.path}.{self.layout.up.split('.')[0]}", nn.Identity())
        model.set_submodule(self.place, network)

    def narrow(self, width: int) -> None:
        """Leave the first units, in place; what they hold does not matter here."""
        for name, path in self.layout.matrices.items():
            linear = _find(self.holder, path)
            resize(linear, rows=None if name == "down" else width, columns=width if name == "down" else None)
        if hasattr(self.holder, "intermediate_size"):
            self.holder.__dict__["intermediate_size"] = (
                width  # the host does not compute with it: it only tells the truth
            )


def find_feed_forwards(model: PreTrainedModel, *, may_lack: bool = False) -> list[FeedForward]:
    """Find the feed-forward networks of a model, in the order of its blocks.

    Args:
        model: Built of the host's modules; it may be on the meta device.
        may_lack: Whether it may have none.

    Raises:
        ValueError: If there is none although there must be, or if a matrix is not a plain linear module.
    """
    found = []
    for path, module in model.named_modules():
        for layout in LAYOUTS:
            if all(_find(module, part) is not None for part in (layout.up, layout.down, layout.gate) if part):
                found.append(FeedForward(path, layout, module))
                break
    if not found and not may_lack:
        raise ValueError(
            f"`model` must have feed-forward networks of a known structure, {type(model).__name__} has none: matrices "
            "named gate_proj/up_proj/down_proj, c_fc/c_proj, wi/wo or intermediate.dense/output.dense."
        )
    for network in found:
        for name, part in network.layout.matrices.items():
            if type(linear := network.part(name)) not in (nn.Linear, Conv1D):  # another one may compute otherwise
                raise ValueError(
                    f"`{network.path}.{part}` must be a plain linear module, got {type(linear).__name__}. Merge "
                    "adapters, dequantize, and undo other compressions of the feed-forward networks first."
                )
    return found


def matrix_of(linear: nn.Module) -> Tensor:
    """Return the weight of a linear module of either kind, `(out, in)`."""
    weight: Any = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def resize(linear: nn.Module, *, rows: int | None = None, columns: int | None = None) -> None:
    """Leave the first rows and columns of a linear module, in place."""
    weight = matrix_of(linear).detach()[:rows, :columns]
    bias: Any = linear.bias
    linear.weight = nn.Parameter(
        (weight.T if isinstance(linear, Conv1D) else weight).clone(memory_format=torch.contiguous_format)
    )
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[:rows].clone())
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape  # type: ignore[assignment]


def _find(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


__all__ = ["FeedForward", "find_feed_forwards"]
