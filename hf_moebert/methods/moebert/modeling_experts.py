"""The stacked experts of one layer, and the ways to multiply them with their tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .configuration_moebert import MoEFields
from .functional import sort_by_expert, weigh_experts
from .modeling_export import export_experts_forward, is_exporting
from .modeling_surgery import FeedForward, matrix_of


# Slots in order of their expert, the inverse permutation, and the number of slots of each expert
Dispatch = tuple[Tensor, Tensor, list[int]]


class MoEBertExperts(nn.Module):
    """The experts of one layer: up-projection, activation, down-projection, stacked along the first dimension.

    Names and attributes are those by which transformers' implementations of experts know them.

    Args:
        dense: The network that they are cut from; its weights are not copied.
        config: Configuration of the model.

    Raises:
        ValueError: If the network's matrices do not agree on biases.
    """

    prefers_slices = False  # whether `sorted_mm` multiplies slices on every device
    has_post_expert_norm = is_transposed = _is_expert_parallel = False
    is_concatenated = True

    def __init__(self, dense: FeedForward, config: MoEFields) -> None:
        super().__init__()
        up, down = dense.part("up"), dense.part("down")
        hidden, units = matrix_of(down).shape
        gates = matrix_of(up).shape[0] // units + (dense.paths.gate is not None)  # matrices before the activation
        if (up.bias is None) != (down.bias is None):
            raise ValueError(
                f"Up- and down-projection of {dense.path} must both have a bias or none. Use another model."
            )
        self.config, self.num_experts = config, config.num_experts
        self.has_gate, self.has_bias = gates == 2, up.bias is not None
        self.active_fraction = config.top_k / config.num_experts  # read by `measure_footprint`
        experts, (size, _) = config.num_experts, config.sizes_for(units)
        if size < 1:
            raise ValueError(
                f"{dense.path} must have at least {experts} neurons for {experts} experts, got {units}. Leave the "
                "layer out of `layers`, or use fewer experts."
            )
        self.entry = "gate_up_proj" if self.has_gate else "up_proj"
        self.register_parameter(self.entry, nn.Parameter(torch.empty(experts, gates * size, hidden)))
        if self.has_bias:
            self.register_parameter(f"{self.entry}_bias", nn.Parameter(torch.empty(experts, gates * size)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        if self.has_bias:
            self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = dense.part("activation")
        self.inner_dropout = dense.part("inner_dropout") or nn.Identity()

    @property
    def stacks(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weights and biases before and behind the activation, `(experts, out, in)` and `(experts, out)`."""
        entry: Any = getattr(self, self.entry)
        biases: Any = (getattr(self, f"{self.entry}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
        return (entry, biases[0]), (self.down_proj, biases[1])

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor | None,
        dispatch: Dispatch | None = None,
    ) -> Tensor:
        """Multiply each expert with its tokens, by the implementation that the configuration names.

        Args:
            hidden_states: Shape `(tokens, hidden)`.
            top_k_index: Shape `(tokens, top_k)`.
            top_k_weights: Shape `(tokens, top_k)`; `None` where one expert of weight 1 serves each token.
            dispatch: The sorted slots, where they are known beforehand.

        Returns:
            Weighted sum of the chosen experts' outputs. Shape `(tokens, hidden)`.
        """
        name = self.config._experts_implementation  # type: ignore[attr-defined]  # of the family's base class
        run = ALL_EXPERTS_FUNCTIONS.get_interface(name, MoEBertExperts.run_slices)
        extra = {} if dispatch is None else {"dispatch": dispatch}  # implementations of transformers do not know it
        return run(self, hidden_states, top_k_index, top_k_weights, **extra)

    def run_slices(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor | None,
        dispatch: Dispatch | None = None,
    ) -> Tensor:
        """Multiply each expert with its slice of the sorted tokens: the "eager" implementation, as `forward`."""
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
        before, behind = self.stacks
        return multiply_slices(self.activate(multiply_slices(slots, counts, *before)), counts, *behind)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation and, in a gated network, the gate: `(slots, expert_size or twice that)`."""
        return self.inner_dropout(self._apply_gate(x) if self.has_gate else self.act_fn(x))

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)  # (slots, expert_size) each
        return self.act_fn(gate) * up


def multiply_slices(slots: Tensor, counts: list[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply each expert's linear map to its slice of the sorted slots, `(slots, in)` to `(slots, out)`."""
    if len(slots) in counts:  # one expert has all slots
        expert = counts.index(len(slots))
        return F.linear(slots, weight[expert], None if bias is None else bias[expert])
    # `unbind` once: the backward of an index into a stack zero-fills the whole stack for every expert
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    experts = zip(slots.split(counts), weight.unbind(0), biases, strict=True)
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
    it ignores; nor does it know dropout between the matrices.
    """
    (weight, _), _ = experts.stacks
    aligned = all(size * weight.dtype.itemsize % 16 == 0 for size in (*weight.shape[1:], experts.down_proj.shape[2]))
    dropped = experts.training and getattr(experts.inner_dropout, "p", 0) > 0
    if experts.num_experts == 1 or weight.dtype == torch.float64 or not aligned or dropped:
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
