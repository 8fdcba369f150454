"""The compact form of a masked feed-forward network: units that all tokens use, and further units of each expert."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    grouped_mm_experts_forward,
    use_experts_implementation,
)
from transformers.pytorch_utils import Conv1D

from .configuration_mixture_of_masks import MoMFields
from .functional import classify_units
from .modeling_masks import MaskedFeedForward, RoutedFeedForward
from .modeling_surgery import FeedForward, matrix_of


PADDED_MULTIPLE = 8  # widths of expert stacks are multiples of this: kernels read rows of 16 bytes


@use_experts_implementation
class CompactExperts(nn.Module):
    """Experts that hold the units which not all experts share, stacked as the kernels of transformers expect.

    Narrower experts are padded with units that are zero. Gated networks have `gate_up_proj`, `(experts, 2 * width,
    hidden)`, others `up_proj`, `(experts, width, hidden)`; `down_proj` is `(experts, hidden, width)`.

    Args:
        config: Configuration of the model.
        dense: The network as transformers built it.
        sizes: Number of units of each expert.
    """

    def __init__(self, config: MoMFields, dense: FeedForward, sizes: list[int]) -> None:
        super().__init__()
        self.num_experts, self.sizes = config.num_experts, sizes
        self.width = -(-max(sizes) // PADDED_MULTIPLE) * PADDED_MULTIPLE
        self.act_fn = dense.part("activation")
        up, is_gated = matrix_of(dense.part("up")), dense.paths.gate is not None or dense.paths.fused
        rows, hidden = self.width * (2 if is_gated else 1), up.shape[1]
        self.up_name = "gate_up_proj" if is_gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(up.new_zeros(self.num_experts, rows, hidden)))
        if dense.part("up").bias is not None:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(up.new_zeros(self.num_experts, rows)))
        self.down_proj = nn.Parameter(up.new_zeros(self.num_experts, hidden, self.width))
        # read by `measure_footprint`, which assumes that experts are equally busy
        self.active_fraction = config.num_experts_per_tok * sum(sizes) / (self.num_experts**2 * self.width)

    @property
    def down_proj_bias(self) -> Tensor:
        """Zeros, as the kernels of transformers need a bias: the actual one is added once, beside the experts."""
        return self.down_proj.new_zeros(self.down_proj.shape[:2])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply each expert, at its own width, to its tokens: the "eager" implementation.

        Args:
            hidden_states: Shape `(tokens, hidden)`.
            top_k_index: Shape `(tokens, top_k)`.
            top_k_weights: Shape `(tokens, top_k)`.

        Returns:
            Weighted sum of the chosen experts' outputs. Shape `(tokens, hidden)`.
        """
        return self.run_slices(hidden_states, top_k_index, top_k_weights)

    def run_slices(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute `forward`, which transformers replaces by the chosen implementation."""
        tokens, top_k = top_k_index.shape
        index = top_k_index.flatten()  # (tokens * top_k,)
        if tokens == 1:  # nothing to sort
            output = torch.cat([self.run_expert(expert, hidden_states) for expert in index.tolist()])
        else:
            counts = index.bincount(minlength=self.num_experts).tolist()
            active = [expert for expert, count in enumerate(counts) if count] or [0]  # so that there are gradients
            order = index.argsort(stable=True)
            slots = hidden_states.index_select(0, order // top_k).split(counts)
            output = torch.cat([self.run_expert(expert, slots[expert]) for expert in active])
            output = output.index_select(0, order.argsort())  # (tokens * top_k, hidden)
        if top_k == 1 and not torch.is_grad_enabled():  # the weight is 1, and has no gradient to carry
            return output
        weighted = output.view(tokens, top_k, -1) * top_k_weights.to(output.dtype).unsqueeze(-1)
        return weighted.sum(dim=1)

    def run_expert(self, expert: int, slots: Tensor) -> Tensor:
        """Apply one expert, `(slots, hidden)` to the same shape."""
        size, ups, downs = self.sizes[expert], getattr(self, self.up_name), self.down_proj
        biases = getattr(self, f"{self.up_name}_bias", None)
        # `unbind`: the backward of an index into a stack zero-fills the whole stack
        up, down = ups.unbind(0)[expert], downs.unbind(0)[expert]
        bias = None if biases is None else biases.unbind(0)[expert]
        inner = [
            F.linear(slots, up[start : start + size], None if bias is None else bias[start : start + size])
            for start in range(0, len(up), self.width)
        ]
        gate, *values = inner
        activated = self.act_fn(gate) * values[0] if values else self.act_fn(gate)
        if not torch.is_autocast_enabled(activated.device.type):
            activated = activated.to(down.dtype)  # see `project_down`
        return F.linear(activated, down[:, :size])


def sliced_mm_experts_forward(
    self: CompactExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Apply the experts in the way that suits the device: the default implementation.

    A CPU applies each expert at its own width. Other devices and compiled graphs use `grouped_mm` of transformers,
    except where it does not apply: float64, two dtypes, autocast, or rows that are not a multiple of 16 bytes.
    """
    compiles = torch.compiler.is_compiling()
    rows_fit = hidden_states.shape[-1] * self.down_proj.element_size() % 16 == 0
    fits = rows_fit and self.down_proj.dtype != torch.float64 and self.down_proj.dtype == hidden_states.dtype
    if not compiles:
        fits = fits and not torch.is_autocast_enabled(hidden_states.device.type)
    if fits and (compiles or hidden_states.device.type != "cpu"):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return self.run_slices(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("sliced_mm", sliced_mm_experts_forward)


class CompactFeedForward(RoutedFeedForward):
    """A feed-forward network of units that all tokens use, and experts with further units.

    Args:
        dense: The network as transformers built it; its narrowed matrices become those of the shared units.
        config: Configuration of the model.
        num_shared: Number of units that all tokens use.
        sizes: Number of further units of each expert.
    """

    def __init__(self, dense: FeedForward, config: MoMFields, num_shared: int, sizes: list[int]) -> None:
        experts: Any = CompactExperts(config, dense, sizes)
        experts.has_gate = (
            dense.paths.gate is not None or dense.paths.fused
        )  # the decorator sets them for a whole class only
        experts.has_bias = dense.part("up").bias is not None
        dense.narrow(num_shared)
        super().__init__(dense, config)
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Add the outputs of shared and specific units, `(..., hidden)` to the same shape."""
        index, weights = self.route(hidden_states)
        output = self.experts(hidden_states.flatten(0, -2), index, weights.to(hidden_states.dtype))
        shared = self.project_down(self.activate(hidden_states))  # without shared units: the bias alone
        return self.outer_dropout(output.view_as(hidden_states) + shared)


def split_units(masked: MaskedFeedForward) -> tuple[Tensor, list[Tensor]]:
    """Return the indices of the units that all experts share, and of the further units of each."""
    masks = masked.masks().bool()  # (experts, units)
    shared, specific, _ = classify_units(masks)
    return shared.nonzero().squeeze(1), [(mask & specific).nonzero().squeeze(1) for mask in masks]


def fill_units(compact: CompactFeedForward, masked: MaskedFeedForward) -> None:
    """Copy the weights of a masked network, in place."""
    shared, specific = split_units(masked)
    names = ["gate", "up"] if masked.is_gated else ["up"]
    for name in names:
        copy_units(getattr(compact, name), getattr(masked, name), rows=shared)
    copy_units(compact.down, masked.down, columns=shared)
    experts = compact.experts
    rows = torch.zeros_like(getattr(experts, experts.up_name), dtype=masked.up.weight.dtype)
    stacks = {experts.up_name: rows.to(masked.up.weight.device)}
    stacks["down_proj"] = torch.zeros_like(experts.down_proj).to(masked.down.weight)
    if masked.up.bias is not None:
        stacks[f"{experts.up_name}_bias"] = stacks[experts.up_name][:, :, 0].clone()
    for expert, units in enumerate(specific):
        for start, name in zip(range(0, rows.shape[1], experts.width), names, strict=True):
            part = slice(start, start + len(units))
            linear = getattr(masked, name)
            stacks[experts.up_name][expert, part] = matrix_of(linear)[units]
            if linear.bias is not None:
                stacks[f"{experts.up_name}_bias"][expert, part] = linear.bias[units]
        stacks["down_proj"][expert, :, : len(units)] = matrix_of(masked.down)[:, units]
    for name, stack in stacks.items():
        setattr(experts, name, nn.Parameter(stack, requires_grad=masked.up.weight.requires_grad))
    assert compact.router is not None
    assert masked.router is not None
    copy_units(compact.router, masked.router)


def copy_units(
    target: nn.Module, source: nn.Module, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Copy rows and columns of a linear module to another of its kind, with dtype, device and `requires_grad`."""
    weight = matrix_of(source).detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    weight = weight.T if isinstance(source, Conv1D) else weight
    dense: Any = source
    trains, bias = dense.weight.requires_grad, dense.bias
    target.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=trains)
    if bias is not None:
        part = bias.detach() if rows is None else bias.detach()[rows]
        target.bias = nn.Parameter(part.clone(), requires_grad=bias.requires_grad)
