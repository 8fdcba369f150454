"""The experts as a graph, for exporters."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import weigh_experts


def is_exporting() -> bool:
    """Check whether a graph is being recorded, by `torch.export` and what builds on it, or by TorchScript."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def export_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None
) -> Tensor:
    """Collect each expert's tokens, apply it, and put the results back: no size in the graph is a number.

    In ONNX that is NonZero, Gather, Gemm, activation and Gemm for each expert, and one ScatterND: every weight is a
    constant, which runtimes pack and quantisers find, and an expert that gets no token takes no time.
    """
    top_k = top_k_index.shape[1]
    index = top_k_index.flatten()  # (tokens * top_k,)
    slots = [(index == expert).nonzero().squeeze(1) for expert in range(self.num_experts)]
    (entries, entry_biases), (exits, exit_biases) = self.stacks
    outputs = []
    for expert, chosen in enumerate(slots):
        x = hidden_states.index_select(0, chosen if top_k == 1 else chosen // top_k)  # (chosen, hidden)
        x = self.activate(F.linear(x, entries[expert], None if entry_biases is None else entry_biases[expert]))
        outputs.append(F.linear(x, exits[expert], None if exit_biases is None else exit_biases[expert]))
    output = hidden_states.new_empty(index.shape[0], hidden_states.shape[1])
    output = output.index_copy(0, torch.cat(slots), torch.cat(outputs))  # (tokens * top_k, hidden)
    return output if top_k_weights is None else weigh_experts(output, top_k_weights).to(hidden_states.dtype)
