"""What is left of a masked feed-forward network: units that all tokens use, and those of each expert."""

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
from .modeling_feed_forward import FeedForward, matrix_of
from .modeling_masks import MaskedFeedForward, RoutedFeedForward


MULTIPLE = 8  # of units to which the stack of experts is padded: kernels read rows of 16 bytes


@use_experts_implementation
class CompactExperts(nn.Module):
    """The units of each expert that not all experts have, in one stack as the host's kernels want it.

    Narrower experts are padded with units that are zero. Gated networks have `gate_up_proj`, `(experts, 2 * width,
    hidden)`, others `up_proj`, `(experts, width, hidden)`; `down_proj` is `(experts, hidden, width)`.

    Args:
        config: Of the model.
        dense: The network as the host built it.
        sizes: Units of each expert.
    """

    def __init__(self, config: MoMFields, dense: FeedForward, sizes: list[int]) -> None:
        super().__init__()
        self.num_experts, self.sizes = config.num_experts, sizes
        self.width = -(-max(sizes) // MULTIPLE) * MULTIPLE
        self.act_fn = dense.part("act")
        up, is_gated = matrix_of(dense.part("up")), dense.layout.gate is not None
        rows, hidden = self.width * (2 if is_gated else 1), up.shape[1]
        self.up_name = "gate_up_proj" if is_gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(up.new_zeros(self.num_experts, rows, hidden)))
        if dense.part("up").bias is not None:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(up.new_zeros(self.num_experts, rows)))
        self.down_proj = nn.Parameter(up.new_zeros(self.num_experts, hidden, self.width))
        # read by `measure_footprint`, as if experts were equally busy
        self.active_fraction = config.num_experts_per_tok * sum(sizes) / (self.num_experts**2 * self.width)

    @property
    def down_proj_bias(self) -> Tensor:
        """Zeros, which the host's kernels ask for: the output's bias is added once, beside the experts."""
        return self.down_proj.new_zeros(self.down_proj.shape[:2])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Multiply each expert, at its own width, with its tokens: the "eager" implementation.

        Args:
            hidden_states: Shape `(tokens, hidden)`.
            top_k_index: Shape `(tokens, top_k)`.
            top_k_weights: Shape `(tokens, top_k)`.

        Returns:
            Weighted sum of the chosen experts' outputs. Shape `(tokens, hidden)`.
        """
        return self.run_slices(hidden_states, top_k_index, top_k_weights)

    def run_slices(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `forward`, which the host replaces with the chosen implementation."""
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
        """Apply one expert, `(slots, hidden)` to the same."""
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
            activated = activated.to(down.dtype)  # see `lead_back`
        return F.linear(activated, down[:, :size])


def sliced_mm_experts_forward(
    self: CompactExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts the way that suits the device: the default implementation.

    On a CPU each expert is multiplied at its own width. Elsewhere, and in compiled graphs, the host's `grouped_mm`
    does the work, and slices again where it cannot: float64, two dtypes, autocast, rows that are no multiple of 16
    bytes.
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
    """The units that all tokens use, run densely, plus those of each token's experts.

    Args:
        dense: The network as the host built it; its matrices, narrowed, become those of the shared units.
        config: Of the model.
        num_shared: Units that all tokens use.
        sizes: Units of each expert besides.
    """

    def __init__(self, dense: FeedForward, config: MoMFields, num_shared: int, sizes: list[int]) -> None:
        experts: Any = CompactExperts(config, dense, sizes)
        experts.has_gate = dense.layout.gate is not None  # the decorator knows them for whole classes only
        experts.has_bias = dense.part("up").bias is not None
        dense.narrow(num_shared)
        super().__init__(dense, config)
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Add up shared and specific units, `(..., hidden)` to the same."""
        assert self.router is not None  # with one expert there are no specific units
        index, weights = self.router.route(self, hidden_states)
        output = self.experts(hidden_states.flatten(0, -2), index, weights.to(hidden_states.dtype))
        shared = self.lead_back(self.activate(hidden_states))  # of no unit: zeros, and the output's bias
        return self.outer_dropout(output.view_as(hidden_states) + shared)


def split_units(masked: MaskedFeedForward) -> tuple[Tensor, list[Tensor]]:
    """Return the indices of the units that all experts use, and of those that each uses besides."""
    masks = masked.masks().bool()  # (experts, units)
    shared, specific, _ = classify_units(masks)
    return shared.nonzero().squeeze(1), [(mask & specific).nonzero().squeeze(1) for mask in masks]


def fill_units(compact: CompactFeedForward, masked: MaskedFeedForward) -> None:
    """Take over the weights of a masked network, in place."""
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
    """Give a linear module some rows and columns of another one of its kind, with all that its parameters have."""
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
