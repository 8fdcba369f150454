"""A feed-forward network of experts whose matrices are chains that share the central tensor."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_moebert.architectures.routing import Routing, record
from hf_moebert.inference.caching import Derived
from hf_moebert.methods.mpo.functional import contract, pad_core
from hf_moebert.methods.mpo.functional_decomposition import decompose

from .configuration_mpoe import MPOEFields
from .functional import choose_expert, copy_to_experts


ROUTER_STD = 0.02


class Router(nn.Linear):
    """A linear layer that computes in float32 in any dtype; rounding would decide where tokens go."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits, `(tokens, hidden)` to `(tokens, experts)`."""
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class MPOEFeedForward(nn.Module):
    """A router and its experts, which replace a feed-forward network without its residual and normalisation.

    Central tensors are stored once, `(bond, rows, columns, next bond)`, and stacked by expert only if they are not
    shared; auxiliary tensors and biases are stacked by expert. A forward that may need a gradient rebuilds the
    matrices of the experts that have tokens; between forwards that need none, matrices are kept.

    Args:
        config: Config of the model.
        activation: Name of the activation function.
        inner_dropout: Probability after the activation.
        outer_dropout: Probability after the down-projection.
        has_bias: Whether the experts' linear maps have biases, one for each expert (our own design: they are few,
            and distinguish the experts).
    """

    def __init__(
        self,
        config: MPOEFields,
        activation: str,
        *,
        inner_dropout: float = 0.0,
        outer_dropout: float = 0.0,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.num_experts = config.matrix_sizes(), config.num_experts
        self.gates_input, self.shares_centre = config.router == "reference", config.share_centre
        self.act_fn = ACT2FN[activation]
        self.inner_dropout, self.outer_dropout = nn.Dropout(inner_dropout), nn.Dropout(outer_dropout)
        hidden = next(iter(self.sizes.values()))[1]
        self.router = Router(hidden, self.num_experts, dtype=torch.float32)  # whatever the model's dtype
        self.centres, self.auxiliary, self.biases = nn.ParameterDict(), nn.ModuleDict(), nn.ParameterDict()
        self.shapes = {name: core_shapes(**chain) for name, chain in config.plan_shapes().items()}
        for name, shapes in self.shapes.items():
            middle = len(shapes) // 2
            stacked = [(self.num_experts, *shape) for shape in shapes]
            self.centres[name] = nn.Parameter(torch.empty(shapes[middle] if self.shares_centre else stacked[middle]))
            del stacked[middle]
            self.auxiliary[name] = nn.ParameterList([torch.empty(shape) for shape in stacked])
            if has_bias:
                self.biases[name] = nn.Parameter(torch.empty(self.num_experts, self.sizes[name][0]))
        for module in (self.biases, *self.auxiliary.values(), *([] if self.shares_centre else [self.centres])):
            module.active_fraction = 1 / self.num_experts  # type: ignore[assignment]  # read by `measure_footprint`
        self.num_watched = 0
        self.idle: Tensor | None = None  # see `watch`
        self._rebuilt: dict[str, Derived[Tensor]] = {name: Derived() for name in self.sizes}
        self.reset_parameters(config)

    @torch.no_grad()
    def reset_parameters(self, config: MPOEFields) -> None:
        """Draw tensors whose matrices have the standard deviation of the dense architecture's."""
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
        nn.init.zeros_(self.router.bias)
        for name, shapes in self.shapes.items():
            paths = torch.Size(shape[3] for shape in shapes).numel()  # products that are summed in one entry
            std = (config.matrix_std(name) / paths**0.5) ** (1 / len(shapes))
            for core in self.chain(name):
                nn.init.normal_(core, std=std)
        for bias in self.biases.values():
            nn.init.zeros_(bias)

    def chain(self, name: str) -> list[nn.Parameter]:
        """Return the tensors of a matrix in order."""
        own: Any = self.auxiliary[name]
        cores = [own[k] for k in range(len(own))]  # a replica of `nn.DataParallel` has no `parameters()`
        cores.insert(len(cores) // 2, self.centres[name])
        return cores

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Send every token through the expert that the router finds most probable.

        Args:
            hidden_states: Shape `(..., hidden)`.

        Returns:
            Of the same shape.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (tokens, hidden)
        logits = self.score(tokens)  # (tokens, experts)
        index, gate = choose_expert(logits)
        record(Routing(self, logits.view(*hidden_states.shape[:-1], logits.shape[-1]), index[:, None]))
        gate = gate.to(tokens.dtype)
        output = self.run(tokens * gate, index) if self.gates_input else self.run(tokens, index) * gate
        return self.outer_dropout(output).view_as(hidden_states)

    def score(self, tokens: Tensor) -> Tensor:
        """Return the router's logits in float32, whatever the model's dtype or autocast, `(tokens, experts)`."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.router(tokens.float())

    @torch.compiler.disable  # which experts have tokens is known at run time only
    def run(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Apply to each token its expert; input and output have the shape `(tokens, hidden)`."""
        counts = index.bincount(minlength=self.num_experts).tolist()
        active = [expert for expert in range(self.num_experts) if counts[expert]]
        active = active or [0]  # so that all parameters get gradients without any token
        weights = list(zip(*(self.rebuild(name, active) for name in self.sizes), strict=True))
        stacks = [self.biases[name].unbind(0) if name in self.biases else None for name in self.sizes]
        biases = [[stack and stack[expert] for stack in stacks] for expert in active]
        if len(active) == 1:
            return self.run_expert(tokens, weights[0], biases[0])
        order = index.argsort(stable=True)
        slots = tokens[order].split([counts[expert] for expert in active])
        parts = [self.run_expert(*slot) for slot in zip(slots, weights, biases, strict=True)]
        return torch.cat(parts)[order.argsort()]

    def run_expert(self, slots: Tensor, weights: tuple[Tensor, ...], bias: list[Tensor | None]) -> Tensor:
        """Apply one expert to its tokens, `(slots, hidden)`; with two up-projections the network is gated."""
        *ups, down = weights
        inner = self.act_fn(F.linear(slots, ups[0], bias[0]))  # (slots, intermediate)
        for factor in ups[1:]:
            inner = inner * F.linear(slots, factor)
        inner = self.inner_dropout(inner).to(down.dtype)  # which T5 keeps in float32 where others are in float16
        return F.linear(inner, down, bias[-1])

    def rebuild(self, name: str, active: list[int]) -> list[Tensor]:
        """Return a matrix of each active expert, `(rows, columns)`."""
        chain = self.chain(name)
        shared = getattr(self, "_is_replica", False)  # by threads of `nn.DataParallel`, on other devices
        if self.training or torch.is_grad_enabled() or shared:
            return list(self.contract(name, active).unbind(0))
        stack = self._rebuilt[name].get(chain, lambda: self.contract(name, list(range(self.num_experts))))
        return [stack[expert] for expert in active]

    def contract(self, name: str, experts: list[int]) -> Tensor:
        """Rebuild a matrix of some experts in the dtype of the tensors, `(experts, rows, columns)`.

        Raises:
            ValueError: If they are not in memory.
        """
        cores: list[Tensor] = list(self.chain(name))
        if any(core.is_meta for core in cores):
            raise ValueError(
                "The experts' tensors must be in memory, some are offloaded or on the meta device. Load the model "
                "without offloading."
            )
        middle = len(cores) // 2
        if len(experts) < self.num_experts:
            some = torch.tensor(experts, device=cores[0].device)
            cores = [
                core if self.shares_centre and k == middle else core.index_select(0, some)
                for k, core in enumerate(cores)
            ]
        with torch.autocast(cores[0].device.type, enabled=False):  # rounded once instead of at every bond
            return contract(cores, *self.sizes[name])

    @torch.compiler.disable
    @torch.no_grad()
    def watch(self, load: Tensor) -> None:
        """Count the consecutive forwards in which each expert had no token; `load` is their tokens, `(experts,)`."""
        self.num_watched += 1
        before = torch.zeros_like(load) if self.idle is None else self.idle.to(load.device)
        self.idle = torch.where(load > 0, 0, before + 1)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop kept matrices."""
        for stack in self._rebuilt.values():
            stack.clear()
        return super().train(mode)

    def cut_matrix(
        self, name: str, matrix: Tensor, *, gauge: str, noise: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Decompose a dense matrix into tensors of this network.

        Args:
            name: Name of the matrix.
            matrix: Shape `(rows, columns)`.
            gauge: As in `hf_moebert.methods.mpo.functional_decomposition.decompose`.
            noise: Relative standard deviation of the noise on the experts' own tensors.
            generator: Source of the noise.

        Returns:
            The part of this module's state dict that holds the matrix.
        """
        shapes = self.shapes[name]
        rows, columns = ([shape[side] for shape in shapes] for side in (1, 2))
        cores, _ = decompose(matrix, rows, columns, bonds=[shape[3] for shape in shapes[:-1]], gauge=gauge)
        cores = [pad_core(core, shape) for core, shape in zip(cores, shapes, strict=True)]
        centre = cores.pop(len(cores) // 2)
        if not self.shares_centre:
            centre = copy_to_experts(centre, self.num_experts, noise=0.0, generator=generator)
        state = {f"centres.{name}": centre.contiguous()}
        for k, core in enumerate(cores):
            stack = copy_to_experts(core, self.num_experts, noise=noise, generator=generator)
            state[f"auxiliary.{name}.{k}"] = stack
        return state


def core_shapes(rows: list[int], columns: list[int], bonds: list[int]) -> list[tuple[int, int, int, int]]:
    """Return the shapes of the tensors of a chain, from one entry of `mpoe_shapes`."""
    return list(zip([1, *bonds], rows, columns, [*bonds, 1], strict=True))
