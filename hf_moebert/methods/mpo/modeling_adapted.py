"""Layers that PEFT adapts by auxiliary tensors; `modeling_tuner` inserts them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from hf_moebert.inference.caching import Derived

from .configuration_tuner import MPOConfig
from .functional import contract, pad_core
from .functional_decomposition import decompose, project_centre
from .functional_shapes import cap_bonds, factor_matrix


class MPOLayer(nn.Module, BaseTunerLayer):
    """A frozen matrix with trainable auxiliary tensors of its decomposition, one set for each adapter.

    The matrix in use is `W + contract(A, C) - contract(A0, C)`, summed over the active adapters: `A` are the trainable
    auxiliary tensors, `A0` their initial values, and `C` the central tensor. The two are equal at first, so an
    untrained adapter changes nothing, bit for bit, at any bond. At full bonds this is the published fine-tuning with a
    frozen central tensor; at smaller ones the part of `W` that they cannot represent stays frozen.

    An adapter's file holds `A` and `A0`. `C`, which is large, is computed from `W` and `A0` by a projection instead of
    another decomposition, so that it does not depend on the signs that a linear algebra library chooses. Tensors and
    sums are of float32 at least; the sum is rounded to the dtype of `W` once.

    Args:
        base_layer: Keeps its weight and bias.
        transposed: Whether its weight is stored as `(columns, rows)`.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205. The rest is our own design, akin to DoTA,
    https://arxiv.org/abs/2412.20891.
    """

    adapter_layer_names = ("mpo_auxiliary",)
    other_param_names = ("mpo_initial", "mpo_digits", "mpo_constants")

    # For the type checker, which does not read PEFT; `modeling_tuner` decides which base layers there are.
    base_layer: Any
    mpo_auxiliary: Any
    mpo_initial: Any
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    set_adapter: Any
    is_used = False  # whether an output, or the matrix in use, was ever asked for

    def __init__(self, base_layer: nn.Module, transposed: bool = False) -> None:
        super().__init__()
        self.base_layer, self.transposed = base_layer, transposed
        self.mpo_auxiliary = nn.ModuleDict()
        self.mpo_initial = nn.ModuleDict()
        self.mpo_digits: dict[str, tuple[int, int]] = {}
        # Derived from saved tensors: the central tensor and the matrix of the untrained chain.
        self.mpo_constants: dict[str, Derived[tuple[Tensor, Tensor]]] = {}
        self._in_use: Derived[Tensor] = Derived()
        self._unmerged: list[nn.Parameter] = []  # in a list, which hides it from the module's own parameters
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: MPOConfig) -> None:
        """Add an adapter: decompose the matrix, or leave room for a file.

        Args:
            adapter_name: Not taken yet.
            config: Number and sizes of the tensors.

        Raises:
            ValueError: If the matrix is not loaded yet, or holds values that are not finite.
        """
        weight = self._matrix()
        rows, columns = factor_matrix(weight.shape[0], weight.shape[1], config.num_cores)
        ends = (1, *cap_bonds(rows, columns, config.bond), 1)
        shapes = list(zip(ends, rows, columns, ends[1:], strict=False))
        middle = config.num_cores // 2
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if config.init_weights:
            if weight.is_meta:
                raise ValueError("the matrix must be loaded before it is decomposed. Load the model's weights first.")
            found, _ = decompose(weight.to(dtype), rows, columns, bonds=ends[1:-1], gauge=config.gauge)
            cores = [pad_core(core, shape) for core, shape in zip(found, shapes, strict=True)]
        else:
            cores = [torch.zeros(shape, dtype=dtype, device=weight.device) for shape in shapes]
        del cores[middle]
        self.mpo_initial[adapter_name] = _Frozen(cores)
        self.mpo_auxiliary[adapter_name] = nn.ParameterList(nn.Parameter(core.clone()) for core in cores)
        self.mpo_digits[adapter_name] = rows[middle], columns[middle]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if self._is_filled(adapter_name):
            self._constants(adapter_name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the change that an adapter adds to the base layer's weight, of the same shape.

        Raises:
            RuntimeError: If the adapter is still empty.
        """
        with torch.autocast(self._frozen().device.type, enabled=False):
            centre, start = self._constants(adapter_name)
            chain = _chain([core.to(centre.dtype) for core in self.mpo_auxiliary[adapter_name]], centre)
            delta = contract(chain, *start.shape) - start  # (rows, columns)
        return delta.T if self.transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the matrix in use the weight of the base layer, and keep the old one for `unmerge`.

        The layer gets a new parameter, so that a layer tied to the old one, such as an output layer, does not change.

        Args:
            safe_merge: Whether to refuse values that are not finite.
            adapter_names: The active adapters by default.

        Raises:
            ValueError: If `safe_merge` finds such values.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.mpo_auxiliary]
        if not names:
            return
        with torch.no_grad():
            merged = self._sum([*self.merged_adapters, *names])
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(
                f"Adapters must be finite to be merged with `safe_merge`, got NaN or infinity from {', '.join(names)}."
                " Go back to a checkpoint without them."
            )
        self._unmerged = self._unmerged or [self.base_layer.weight]
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Give the base layer its own weight back, bit for bit."""
        if self._unmerged:
            self.base_layer.weight = self._unmerged.pop()
        self.merged_adapters = []

    def train(self, mode: bool = True) -> "MPOLayer":
        """Set the mode, and update the constants that a compiled forward cannot check while it runs."""
        self._in_use.clear()
        for name in self.active_adapters if mode else list(self.mpo_constants):
            if name in self.mpo_auxiliary and self._is_filled(name):
                self._constants(name)
        return super().train(mode)

    def _is_plain(self) -> bool:
        """Check whether the base layer alone gives the output, which is asked for."""
        if not torch.compiler.is_compiling():
            self.is_used = True
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.disable_adapters or self.merged or not any(n in self.mpo_auxiliary for n in self.active_adapters)

    def _weight_in_use(self) -> Tensor:
        """Return the matrix in use, kept from the last call if nothing has changed since and nothing is trained."""
        names = [name for name in self.active_adapters if name in self.mpo_auxiliary]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._sum(names)
        sources = [t for name in names for t in (*self._sources(name), *self.mpo_auxiliary[name])]
        return self._in_use.get(sources, lambda: self._sum(names))

    def _sum(self, names: Sequence[str]) -> Tensor:
        weight, deltas = self._frozen(), [self.get_delta_weight(name) for name in names]
        for delta in deltas[1:]:
            deltas[0] = deltas[0] + delta
        return (weight.to(deltas[0].dtype) + deltas[0]).to(weight.dtype).contiguous()

    def _constants(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the central tensor and the matrix of the untrained chain, up to date with their sources."""
        known = self.mpo_constants.setdefault(name, Derived())
        if torch.compiler.is_compiling():  # which cannot compare addresses; `train` does
            known.value = known.value or self._project(name)
            return known.value
        sources = self._sources(name)
        if not known.is_current(sources) and not self._is_filled(name):
            raise RuntimeError(
                f"Adapter `{name}` must be filled before it is used, but its tensors are empty. Load its file, or make"
                " a new one with `MPOConfig(init_weights=True)`."
            )
        return known.get(sources, lambda: self._project(name))

    def _project(self, name: str) -> tuple[Tensor, Tensor]:
        matrix, initial = self._matrix(), list(self.mpo_initial[name])
        dtype = torch.promote_types(torch.promote_types(matrix.dtype, initial[0].dtype), torch.float32)
        with torch.autocast(matrix.device.type, enabled=False):
            initial, half = [core.to(dtype) for core in initial], len(initial) // 2
            centre = project_centre(matrix.to(dtype), initial[:half], initial[half:], self.mpo_digits[name])
            return centre, contract(_chain(initial, centre), *matrix.shape)

    def _sources(self, name: str) -> list[Tensor]:
        return [self._frozen(), *self.mpo_initial[name]]

    def _is_filled(self, name: str) -> bool:
        # The first tensor of a decomposition is never zero, even for a zero matrix.
        sources = self._sources(name)
        return not any(t.is_meta for t in sources) and bool(sources[1].any())

    def _frozen(self) -> Tensor:
        return self._unmerged[0] if self._unmerged else self.base_layer.weight

    def _matrix(self) -> Tensor:
        weight = self._frozen().detach()
        return weight.T if self.transposed else weight

    def _apply(self, fn: Any, recurse: bool = True) -> "MPOLayer":
        self.mpo_constants, self._in_use = {}, Derived()  # on another device, or in another dtype
        for weight in self._unmerged:
            weight.data = fn(weight.data)
        return super()._apply(fn, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # To the device only: PEFT would round the tensors to the base layer's dtype as well.
        device = self._frozen().device if device is None else device
        for cores in (part[adapter_name] for part in (self.mpo_auxiliary, self.mpo_initial) if adapter_name in part):
            if device.type != "meta" and not any(core.is_meta for core in cores):
                cores.to(device)


class AdaptedLinear(MPOLayer):
    """`nn.Linear`, or transformers' `Conv1D`, with adapters of auxiliary tensors."""

    @property
    def weight(self) -> Tensor:
        """The matrix in use, for modules that multiply by it instead of calling the layer."""
        return self.base_layer.weight if self._is_plain() else self._weight_in_use()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., columns)` to `(..., rows)`."""
        if self._is_plain():
            return self.base_layer(x)
        weight, bias = self._weight_in_use(), self.base_layer.bias
        if not self.transposed:
            return F.linear(x, weight, bias)
        return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Allow PEFT to approximate the adapter by a low-rank one: it is added to the weight."""
        return not self.transposed


class AdaptedEmbedding(MPOLayer):
    """`nn.Embedding` with adapters of auxiliary tensors; the whole table is rebuilt."""

    def forward(self, x: Tensor) -> Tensor:
        """Map indices of any shape to `(..., columns)`."""
        if self._is_plain():
            return self.base_layer(x)
        base = self.base_layer
        return F.embedding(x, self._weight_in_use(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)


class _Frozen(nn.Module):
    """Tensors that are saved and move with the model but never train, even if a loader wants to train them.

    They are no buffers, because DistributedDataParallel broadcasts those at every step.
    """

    def __init__(self, cores: Sequence[Tensor]) -> None:
        super().__init__()
        for index, core in enumerate(cores):
            self.register_parameter(str(index), nn.Parameter(core))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def __iter__(self) -> Iterator[Tensor]:
        return self.parameters()


def _chain(auxiliary: Sequence[Tensor], centre: Tensor) -> list[Tensor]:
    half = len(auxiliary) // 2
    return [*auxiliary[:half], centre, *auxiliary[half:]]
