# Copied from hf_moebert/architectures/surgery.py by `make copies`; edit there.
"""Find the layers of a model and their feed-forward networks, and narrow or replace them in place."""

import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_families import find_architecture
from .configuration_paths import FeedForwardPaths, Stack


LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        path: Path in the model.
        module: The layer itself.
        stack: Where its parts are.
    """

    path: str
    module: nn.Module
    stack: Stack


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward network of a layer, as transformers built it.

    Attributes:
        layer_path: Path of the layer in the model.
        layer: The layer.
        paths: Where its parts are in the layer.
    """

    layer_path: str
    layer: nn.Module
    paths: FeedForwardPaths

    def part(self, name: str) -> Any:
        """Return a part by its name in `FeedForwardPaths`, `None` if there is none."""
        path = getattr(self.paths, name)
        return None if path is None else get_part(self.layer, path)

    @property
    def path(self) -> str:
        """Path of the module that holds it: its own one, or the layer."""
        return f"{self.layer_path}.{self.paths.holder}".removesuffix(".")

    @property
    def place(self) -> str:
        """Path at which a module can stand for the whole network."""
        return self.path if self.paths.holder else f"{self.layer_path}.{self.paths.down}"

    @property
    def matrix_paths(self) -> list[str]:
        """Paths of the matrices in the model."""
        return [f"{self.layer_path}.{path}" for path in self.paths.matrices.values()]

    @property
    def num_units(self) -> int:
        """Units between the matrices."""
        return matrix_of(self.part("down")).shape[1]

    def separated(self) -> dict[str, Any]:
        """Return the matrices by the name of the part; those of a fused one are copies of its halves."""
        if not self.paths.fused:
            return {name: self.part(name) for name in self.paths.matrices}
        gate, up = split_rows(self.part("up"))
        return {"gate": gate, "up": up, "down": self.part("down")}

    def replace_in(self, model: PreTrainedModel, network: nn.Module) -> None:
        """Put another module in its place; what follows the down-projection in the layer stays.

        Raises:
            ValueError: If the module adds the residual, which another would not.
        """
        if self.paths.adds_residual:
            raise ValueError(f"`{self.place}` must not be replaced, because it adds the residual. Use another family.")
        if not self.paths.holder:  # residual and normalisation are behind the down-projection, in the same module
            for path in self.paths.entries:
                model.set_submodule(f"{self.layer_path}.{path}", nn.Identity())
        model.set_submodule(self.place, network)

    def narrow(self, width: int) -> None:
        """Keep the first units, in place; what they hold does not matter here."""
        units = self.num_units
        for name in self.paths.matrices:
            linear = self.part(name)
            if name == "down":
                narrow(linear, columns=width)
            else:
                narrow(linear, rows=width, blocks=len(matrix_of(linear)) // units)
        holder = get_part(self.layer, self.paths.holder) if self.paths.holder else self.layer
        if hasattr(holder, "intermediate_size"):  # transformers does not compute with it: it only tells the truth
            holder.__dict__["intermediate_size"] = width


def find_layers(model: PreTrainedModel) -> list[Layer]:
    """Find the layers of a model of a known family, stack by stack.

    Raises:
        ValueError: If the family is not known, or the model has no layers where the family keeps them.
    """
    architecture = find_architecture(model)
    names = {module: name for name, module in model.named_modules()}
    found = []
    for stack in architecture.stacks:
        for layers in _expand(model.base_model, stack.path):
            if type(layers) is nn.ModuleList:
                found += [Layer(names[layer], layer, stack) for layer in layers]
    if not found:
        raise ValueError(
            f"`model` must keep its layers in {[stack.path for stack in architecture.stacks]}, but "
            f"{type(model.base_model).__name__} does not. Merge adapters first."
        )
    return found


def _expand(body: nn.Module, path: str) -> list[Any]:
    """Return what is at a path in which `*` stands for each module of a list."""
    before, _, behind = path.partition(".*.")
    return [get_part(group, behind) for group in get_part(body, before) or []] if behind else [get_part(body, path)]


def find_feed_forwards(model: PreTrainedModel, *, missing_ok: bool = False) -> list[FeedForward]:
    """Find the feed-forward networks of a model, layer by layer.

    Args:
        model: Built of transformers' modules; it may be on the meta device.
        missing_ok: Whether to leave out layers in which another module has taken the place of the network.

    Raises:
        ValueError: If the family is not known, or a matrix is not a plain linear module.
    """
    found = []
    for layer in find_layers(model):
        paths = _choose(layer)
        if paths is None and missing_ok:
            continue
        paths = layer.stack.feed_forwards[0] if paths is None else paths
        for path in paths.matrices.values():
            find_linear(layer.module, path)
        found.append(FeedForward(layer.path, layer.module, paths))
    return found


def _choose(layer: Layer) -> FeedForwardPaths | None:
    """Return the paths whose matrices are all in a layer."""
    for paths in layer.stack.feed_forwards:
        parts = [get_part(layer.module, path) for path in paths.matrices.values()]
        if not any(part is None or type(part) is nn.Identity for part in parts):
            return paths
    return None


def find_linear(layer: nn.Module, path: str, kinds: tuple[type[nn.Module], ...] = LINEAR) -> Any:
    """Find a plain linear module in a layer.

    Raises:
        ValueError: If there is none, or another one that may compute with its weights in another way.
    """
    module = get_part(layer, path)
    if type(module) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        found = "nothing" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
        raise ValueError(
            f"`{path}` of {type(layer).__name__} must be a plain {names}, got {found}. Merge adapters, and undo "
            "quantization, parametrizations and other compressions, or use the dense model."
        )
    return module


def get_part(parent: nn.Module, path: str) -> Any:
    """Return what is at a path of attributes, `None` if nothing is."""
    try:
        return attrgetter(path)(parent)
    except AttributeError:
        return None


def matrix_of(linear: nn.Module) -> Tensor:
    """Return the weight of a linear module of either kind, `(out, in)`."""
    weight: Any = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def split_rows(linear: nn.Linear) -> list[nn.Linear]:
    """Return two linear modules of the first and the second half of the outputs of one."""
    halves = []
    for number in range(2):
        half = copy.deepcopy(linear)
        half.weight = nn.Parameter(linear.weight.detach().chunk(2)[number].clone(), linear.weight.requires_grad)
        if linear.bias is not None:
            half.bias = nn.Parameter(linear.bias.detach().chunk(2)[number].clone(), linear.bias.requires_grad)
        half.out_features = len(half.weight)
        halves.append(half)
    return halves


def join_rows(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return a linear module whose outputs are those of two, one behind the other."""
    joined = copy.deepcopy(first)
    joined.weight = nn.Parameter(torch.cat([first.weight, second.weight]).detach(), first.weight.requires_grad)
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([first.bias, second.bias]).detach(), first.bias.requires_grad)
    joined.out_features = len(joined.weight)
    return joined


def output_dim(linear: nn.Module, parameter: Tensor) -> int:
    """Return the dimension of a weight or bias of a linear module of either kind that counts its outputs."""
    return 1 if isinstance(linear, Conv1D) and parameter.dim() == 2 else 0


def narrow(linear: nn.Module, *, rows: int | None = None, columns: int | None = None, blocks: int = 1) -> None:
    """Keep the first rows and columns of a linear module, in place.

    Args:
        linear: A `nn.Linear` or `Conv1D`.
        rows: Outputs to keep, of each block; all by default.
        columns: Inputs to keep; all by default.
        blocks: Matrices of one size that the module holds one above the other, such as a gate and an up-projection.
    """
    weight = matrix_of(linear).detach().unflatten(0, (blocks, -1))[:, :rows, :columns].flatten(0, 1)  # (out, in)
    bias: Any = linear.bias
    stored = weight.T if isinstance(linear, Conv1D) else weight
    linear.weight = nn.Parameter(stored.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().unflatten(0, (blocks, -1))[:, :rows].flatten().clone())
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape


__all__ = ["FeedForward", "find_feed_forwards", "find_layers"]
