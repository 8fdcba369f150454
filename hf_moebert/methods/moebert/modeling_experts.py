"""The stacked experts of one layer, and the ways to multiply them with their tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from .configuration_moebert import MoEBertConfig
from .functional import sort_by_expert, weigh_experts
from .modeling_export import export_experts_forward, is_exporting


# Slots in order of their expert, the inverse permutation, and the number of slots of each expert
Dispatch = tuple[Tensor, Tensor, list[int]]


@use_experts_implementation(has_gate=False, has_bias=True)
class MoEBertExperts(nn.Module):
    """The experts of one layer: up-projection, activation, down-projection, stacked along the first dimension."""

    prefers_slices = False  # whether `sorted_mm` multiplies slices on every device

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.active_fraction = config.top_k / config.num_experts  # read by `measure_footprint`
        experts, size, hidden = config.num_experts, config.expert_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(experts, size, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor | None,
        dispatch: Dispatch | None = None,
    ) -> Tensor:
        """Multiply each expert with its slice of the sorted tokens: the "eager" implementation.

        Args:
            hidden_states: Shape `(tokens, hidden)`.
            top_k_index: Shape `(tokens, top_k)`.
            top_k_weights: Shape `(tokens, top_k)`; `None` where one expert of weight 1 serves each token.
            dispatch: The sorted slots, where they are known beforehand.

        Returns:
            Weighted sum of the chosen experts' outputs. Shape `(tokens, hidden)`.
        """
        return self.run_slices(hidden_states, top_k_index, top_k_weights, dispatch)

    def run_slices(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None, dispatch: Dispatch | None
    ) -> Tensor:
        """Do what `forward` says; transformers replaces `forward` itself with the chosen implementation."""
        tokens, top_k = top_k_index.shape
        if self.num_experts == 1:
            return self.run_sorted(hidden_states, [tokens])

        counts = dispatch[2] if dispatch else top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
        if tokens * top_k in counts:  # one expert for all tokens: nothing to sort
            output = self.run_sorted(hidden_states, counts)
        else:
            order, inverse, _ = dispatch or plan_dispatch(top_k_index.reshape(1, -1), self.num_experts)[0]
            slots = hidden_states.index_select(0, order if top_k == 1 else order // top_k)
            output = self.run_sorted(slots, counts).index_select(0, inverse)  # (tokens * top_k, hidden)

        if top_k_weights is None:
            return output
        return weigh_experts(output, top_k_weights).to(hidden_states.dtype)

    def run_sorted(self, slots: Tensor, counts: list[int]) -> Tensor:
        """Apply each expert to its slice of the sorted slots, of `counts` rows, `(slots, hidden)`."""
        slots = self.act_fn(multiply_slices(slots, counts, self.up_proj, self.up_proj_bias))
        return multiply_slices(slots, counts, self.down_proj, self.down_proj_bias)


def multiply_slices(slots: Tensor, counts: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    """Apply each expert's linear map to its slice of the sorted slots, `(slots, in)` to `(slots, out)`."""
    if len(slots) in counts:  # one expert has all slots
        expert = counts.index(len(slots))
        return F.linear(slots, weight[expert], bias[expert])
    # `unbind` once: the backward of an index into a stack zero-fills the whole stack for every expert
    experts = zip(slots.split(counts), weight.unbind(0), bias.unbind(0), strict=True)
    return torch.cat([F.linear(*expert) for expert in experts])


def plan_dispatch(expert_index: Tensor, num_experts: int) -> list[Dispatch]:
    """Sort the slots of all layers at once, `(layers, slots)`."""
    order, inverse, counts = sort_by_expert(expert_index, num_experts)
    return list(zip(order, inverse, counts.tolist(), strict=True))


def should_slice(hidden_states: Tensor, on_any_device: bool = False) -> bool:
    """Check whether slices are the fastest way: in inference, on a CPU or where the caller says on any device."""
    inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_exporting())
    return inference and (on_any_device or hidden_states.device.type == "cpu")


def can_group(experts: MoEBertExperts, device: str) -> bool:
    """Check whether transformers' `grouped_mm` can multiply these experts.

    It cannot with a single expert, in float64, with rows that are no multiple of 16 bytes, and under autocast, which
    it ignores.
    """
    dtype = experts.up_proj.dtype
    aligned = all(size * dtype.itemsize % 16 == 0 for size in experts.up_proj.shape[1:])
    if experts.num_experts == 1 or dtype == torch.float64 or not aligned:
        return False
    return torch.compiler.is_compiling() or not torch.is_autocast_enabled(device)


def sorted_mm_experts_forward(
    self: MoEBertExperts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    dispatch: Dispatch | None = None,
) -> Tensor:
    """Run the experts the fastest way that is known for the device: the default implementation.

    CPU inference multiplies sorted slices, and what is exported there collects each expert's tokens. Elsewhere
    transformers' `grouped_mm` does the work, and slices again where it cannot.
    """
    device = hidden_states.device.type
    if is_exporting() and device == "cpu":
        return export_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if not should_slice(hidden_states, self.prefers_slices) and can_group(self, device):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return self.run_slices(hidden_states, top_k_index, top_k_weights, dispatch)


ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)
