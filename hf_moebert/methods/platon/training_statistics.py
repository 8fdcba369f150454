"""The running statistics of the pruned parameters, and the scores computed from them."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_moebert.training.sharding import join_processes, local_part, local_values

from .functional import chunks, close_window_, update_movement_, update_window_
from .functional_selection import ALONE, Processes
from .recipe import PlatonConfig


# Statistics of each criterion: one flat float32 tensor of each kind for every pruned parameter.
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
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: PlatonConfig) -> None:
        self.parameters, self.config = parameters, config
        self.parts = {name: local_part(parameter) for name, parameter in parameters.items()}
        self.processes = find_processes(parameters.values())
        self.tensors = {
            kind: {name: torch.zeros(self.numel(name), device=p.device) for name, p in parameters.items()}
            for kind in STATISTICS[config.criterion]
        }
        for name, value in self.tensors.get("value", {}).items():
            value.copy_(self.weight(name))
        device = next(iter(parameters.values())).device
        self._scratch = torch.empty(next(chunks(1 << 30, device)).stop, device=device)

    def numel(self, name: str) -> int:
        """Return how many elements of a parameter are here."""
        return self.parts[name].stop - self.parts[name].start

    def weight(self, name: str) -> Tensor:
        """View the elements of a parameter that are here. Shape `(numel,)`."""
        return local_values(self.parameters[name]).view(-1)

    @property
    def has_windows(self) -> bool:
        """True if gradients are averaged over windows, any of which can be left out."""
        return "window" in self.tensors

    def observe(self, position: int) -> bool:
        """Take in the gradients of a step at this position of its window; return whether there was any gradient."""
        seen = False
        for name, parameter in self.parameters.items():
            weight = self.weight(name)
            seen |= parameter.grad is not None
            # A parameter that was not used, such as an expert without tokens, did not change the loss.
            gradient = torch.zeros_like(weight) if parameter.grad is None else local_values(parameter.grad).reshape(-1)
            of_parameter = [tensors[name] for tensors in self.tensors.values()]
            if self.config.criterion == "movement":
                movement, value = of_parameter  # the value behind the mask, through which the gradient passes
                update_movement_(movement, value, gradient)
            elif self.has_windows and position:
                update_window_(of_parameter[0], weight, gradient, position)
            elif self.has_windows:
                window, importance, *others = of_parameter
                betas = {"beta1": self.config.beta1, "beta2": self.config.beta2}
                close_window_(window, importance, next(iter(others), None), weight, gradient, **betas)
        return seen

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
