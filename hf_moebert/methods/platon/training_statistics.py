"""The running statistics of the pruned parameters, or of their units, and the scores computed from them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_moebert.training.sharding import join_processes, local_part, local_values

from .functional import chunks, close_window_, sensitivity, sum_sensitivity, update_movement_, update_window_
from .functional_selection import ALONE, Processes
from .modeling_surgery import output_dim
from .modeling_units import UnitGroup
from .recipe import PlatonConfig


# Statistics of each criterion: one flat float32 tensor of each kind for every pruned parameter, or group of units.
STATISTICS = {
    "platon": ("window", "importance", "uncertainty"),
    "importance": ("window", "importance"),
    "movement": ("movement", "value"),
    "magnitude": (),
}


def find_processes(parameters: Iterable[nn.Parameter]) -> Processes:
    """Return the processes that hold parameters together: by rows where they are sharded, or this one alone."""
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    return Processes(dist.get_rank(), join_processes) if sharded else ALONE


class Statistics:
    """The running statistics of the pruned parameters, or of the rows of them that FSDP2 leaves to this process.

    Attributes:
        parts: Which elements of each parameter are here, by its name. Below, `numel` is their number.
        processes: The processes that hold the parameters together.
        tensors: By kind and name of the parameter. Shapes `(numel,)`.
        sizes: Elements of each statistic in all processes, by its name.
        replicated: True if every process has them all.
    """

    replicated = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: PlatonConfig, sizes: Mapping[str, int] | None = None
    ) -> None:
        self.parameters, self.config = parameters, config
        self.parts = {name: local_part(parameter) for name, parameter in parameters.items()}
        self.processes = find_processes(parameters.values())
        self.device = next(iter(parameters.values())).device
        self.sizes = sizes or {name: parameter.numel() for name, parameter in parameters.items()}
        self.tensors = {
            kind: {name: torch.zeros(self.length(name), device=self.device) for name in self.sizes}
            for kind in STATISTICS[config.criterion]
        }
        for name, value in self.tensors.get("value", {}).items():
            value.copy_(self.weight(name))
        self._scratch = torch.empty(next(chunks(1 << 30, self.device)).stop, device=self.device)

    def part(self, name: str) -> slice:
        """Return which elements of a statistic are here."""
        return self.parts[name]

    def length(self, name: str) -> int:
        """Return how many elements of a statistic are here."""
        return self.part(name).stop - self.part(name).start

    def numel(self, name: str) -> int:
        """Return how many elements of a parameter are here."""
        return self.parts[name].stop - self.parts[name].start

    def weight(self, name: str) -> Tensor:
        """View the elements of a parameter that are here. Shape `(numel,)`."""
        return local_values(self.parameters[name]).view(-1)

    def gradient(self, name: str) -> Tensor:
        """Return the gradients of the elements that are here. Shape `(numel,)`."""
        gradient = self.parameters[name].grad
        # A parameter that was not used, such as an expert without tokens, did not change the loss.
        return torch.zeros_like(self.weight(name)) if gradient is None else local_values(gradient).reshape(-1)

    @property
    def has_windows(self) -> bool:
        """True if gradients are averaged over windows, any of which can be left out."""
        return "window" in self.tensors

    def observe(self, position: int) -> bool:
        """Take in the gradients of a step at this position of its window; return whether there was any gradient."""
        for name in self.parameters if self.tensors else ():
            weight, gradient = self.weight(name), self.gradient(name)
            of_parameter = [tensors[name] for tensors in self.tensors.values()]
            if self.config.criterion == "movement":
                movement, value = of_parameter  # the value behind the mask, through which the gradient passes
                update_movement_(movement, value, gradient)
                continue
            for part in chunks(len(weight), self.device):
                s = sensitivity(weight[part], gradient[part], out=self._scratch[: part.stop - part.start])
                self._update_(position, s, [tensor[part] for tensor in of_parameter])
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def _update_(self, position: int, s: Tensor, statistics: Sequence[Tensor]) -> None:
        """Take in sensitivities at this position of the window. Shapes `(n,)`."""
        window, importance, *others = statistics
        if position:
            update_window_(window, s, position)
        else:
            betas = {"beta1": self.config.beta1, "beta2": self.config.beta2}
            close_window_(window, importance, next(iter(others), None), s, **betas)

    def is_finite(self) -> bool:
        """Check whether all gradients of the window were finite; without windows, those of the run, or the weights."""
        tensors = next(iter(self.tensors.values()), None) or {name: self.weight(name) for name in self.parameters}
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors.values()])
        return bool(self.processes.join(sums).isfinite().all())

    def is_zero(self) -> bool:
        """Check whether no gradient of the run so far told weights apart; magnitudes need none."""
        kind = next((kind for kind in ("importance", "movement") if kind in self.tensors), None)
        if kind is None:
            return False
        found = torch.stack([tensor.any() for tensor in self.tensors[kind].values()])
        return not self.processes.add(found).any()

    def reset_window(self) -> None:
        """Set the window to the average importance, so that the next update leaves the average unchanged."""
        for name, window in self.tensors["window"].items():
            window.copy_(self.tensors["importance"][name])

    def store_values(self, keep: Mapping[str, Tensor]) -> None:
        """Store the values of the weights that are kept; the stored values of masked weights stay unchanged.

        Only movement pruning stores values, so that a weight can return with its old value.
        """
        for name, value in self.tensors.get("value", {}).items():
            weight = self.weight(name).float()
            if name in keep:
                torch.where(keep[name], weight, value, out=value)
            else:
                value.copy_(weight)

    def restore_values(self) -> bool:
        """Give the weights their stored values back; return whether any were stored."""
        values = self.tensors.get("value", {})
        for name, value in values.items():
            self.weight(name).copy_(value)
        return bool(values)

    def score(self, name: str, part: slice) -> Tensor:
        """Score a flat slice of what is here of a parameter, `(n,)`; the next call may overwrite the result."""
        if self.config.criterion == "magnitude":
            return self.weight(name)[part].float().abs()
        if self.config.criterion != "platon":  # by the statistic of the same name
            return self.tensors[self.config.criterion][name][part].clone()
        factors = [self.tensors[kind][name][part] for kind in ("importance", "uncertainty")]
        length = len(factors[0])
        return torch.mul(*factors, out=self._scratch[:length] if length <= len(self._scratch) else None)


class UnitStatistics(Statistics):
    """The running statistics of whole neurons and heads, each by the mean of its weights: our own design.

    The average of a mean is the mean of averages, so that importance is what that of single weights would give, for a
    thousandth of the memory and half of the time; the uncertainty is that of the whole unit. Every process has the
    statistics of all units.

    Attributes:
        groups: The units.
        columns: Name of each group's writer, by which its statistics and masks go.
        numels: Weights of each group.
        tensors: By kind and name of the writer. Shapes `(units,)`.
    """

    replicated = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: PlatonConfig, groups: Sequence[UnitGroup]
    ) -> None:
        self.groups = groups
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self.columns = [self.names[group.writer.weight] for group in groups]
        self.numels = [g.writer.weight.numel() + sum(p.numel() for p in g.reader_parameters) for g in groups]
        units = {name: group.num_units for name, group in zip(self.columns, groups, strict=True)}
        super().__init__(parameters, config, units)

    def part(self, name: str) -> slice:
        """Return all units."""
        return slice(0, self.sizes[name])

    def observe(self, position: int) -> bool:
        """Take in the gradients of a step at this position of its window; return whether there was any gradient."""
        for name, s in zip(self.columns, self._average(gradients=True), strict=True) if self.tensors else ():
            self._update_(position, s, [tensors[name] for tensors in self.tensors.values()])
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def score_units(self) -> list[Tensor]:
        """Score the units of each group. Shapes `(units,)`."""
        if self.config.criterion == "magnitude":
            return self._average(gradients=False)
        return [self.score(name, self.part(name)).clone() for name in self.columns]

    def _average(self, *, gradients: bool) -> list[Tensor]:
        """Average the sensitivities, or the sizes, of the weights of each unit. Shapes `(units,)`."""
        sums = [self._sum_over_units(group, gradients) for group in self.groups]
        whole = self.processes.add(torch.cat(sums)).split([len(total) for total in sums])
        return [total * (len(total) / numel) for total, numel in zip(whole, self.numels, strict=True)]

    def _sum_over_units(self, group: UnitGroup, gradients: bool) -> Tensor:
        """Sum over what is here of the weights of each unit. Shape `(units,)`."""
        total = torch.zeros(group.num_units, device=self.device)
        for reader in group.readers:
            for parameter in reader.parameters(recurse=False):
                rows = self._sum_parameter(parameter, output_dim(reader, parameter), gradients)
                total += rows.view(group.blocks, group.num_units, -1).sum((0, 2))
        weight = group.writer.weight
        columns = self._sum_parameter(weight, 1 - output_dim(group.writer, weight), gradients)
        return total + columns.view(group.num_units, -1).sum(1)

    def _sum_parameter(self, parameter: Tensor, dim: int, gradients: bool) -> Tensor:
        """Sum all but one dimension of a parameter; zero where it lies in another process. Shape `(size,)`."""
        name, width = self.names[parameter], parameter.shape[1] if parameter.dim() > 1 else 1
        weight = self.weight(name).view(-1, width)  # (rows here, columns)
        gradient = self.gradient(name).view(-1, width) if gradients else None
        here = sum_sensitivity(weight, gradient, dim)
        if dim or len(here) == len(parameter):
            return here
        rows = torch.zeros(len(parameter), device=self.device)
        first = self.parts[name].start // width
        rows[first : first + len(here)] = here
        return rows
