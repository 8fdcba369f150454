"""The running statistics of the pruned parameters, and the scores computed from them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .functional import chunks, close_window_, update_movement_, update_window_
from .recipe import PlatonConfig


# Statistics of each criterion: one flat float32 tensor of each kind for every pruned parameter.
STATISTICS = {"platon": ("window", "importance", "uncertainty"), "movement": ("movement", "value"), "magnitude": ()}


class Statistics:
    """The running statistics of the pruned parameters.

    Attributes:
        tensors: By kind and name of the parameter. Shapes `(numel,)`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: PlatonConfig) -> None:
        self.parameters, self.config = parameters, config
        self.tensors = {
            kind: {name: torch.zeros(p.numel(), device=p.device) for name, p in parameters.items()}
            for kind in STATISTICS[config.criterion]
        }
        for name, value in self.tensors.get("value", {}).items():
            value.copy_(parameters[name].detach().view(-1))
        device = next(iter(parameters.values())).device
        self._scratch = torch.empty(next(chunks(1 << 30, device)).stop, device=device)

    def observe(self, position: int) -> bool:
        """Take in the gradients of a step at this position of its window; return whether there was any gradient."""
        seen = False
        for name, parameter in self.parameters.items():
            weight = parameter.detach().reshape(-1)
            seen |= parameter.grad is not None
            # A parameter that was not used, such as an expert without tokens, did not change the loss.
            gradient = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.reshape(-1)
            of_parameter = [tensors[name] for tensors in self.tensors.values()]
            if self.config.criterion == "movement":
                movement, value = of_parameter  # the value behind the mask, through which the gradient passes
                update_movement_(movement, value, gradient)
            elif self.config.criterion == "platon" and position:
                update_window_(of_parameter[0], weight, gradient, position)
            elif self.config.criterion == "platon":
                window, importance, uncertainty = of_parameter
                betas = {"beta1": self.config.beta1, "beta2": self.config.beta2}
                close_window_(window, importance, uncertainty, weight, gradient, **betas)
        return seen

    def is_finite(self) -> bool:
        """Check whether all gradients of the window were finite; without windows, those of the run, or the weights."""
        tensors = next(iter(self.tensors.values()), self.parameters).values()
        return bool(torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in tensors]).isfinite().all())

    def is_zero(self) -> bool:
        """Check whether no gradient of the run so far told weights apart; magnitudes need none."""
        kinds = {"platon": "importance", "movement": "movement"}
        kind = kinds.get(self.config.criterion)
        return kind is not None and not any(bool(tensor.any()) for tensor in self.tensors[kind].values())

    def reset_window(self) -> None:
        """Set the window to the average importance, so that the next update leaves the average unchanged."""
        for name, window in self.tensors["window"].items():
            window.copy_(self.tensors["importance"][name])

    def store_values(self, keep: Mapping[str, Tensor]) -> None:
        """Store the values of the weights that are kept; the stored values of masked weights stay unchanged.

        Only movement pruning stores values, so that a weight can return with its old value.
        """
        for name, value in self.tensors.get("value", {}).items():
            weight = self.parameters[name].detach().view(-1).float()
            if name in keep:
                torch.where(keep[name], weight, value, out=value)
            else:
                value.copy_(weight)

    def restore_values(self) -> bool:
        """Give the weights their stored values back; return whether any were stored."""
        values = self.tensors.get("value", {})
        for name, value in values.items():
            self.parameters[name].detach().view(-1).copy_(value)
        return bool(values)

    def score(self, name: str, part: slice) -> Tensor:
        """Score a flat slice of a parameter, `(n,)`; the next call may overwrite the result."""
        if self.config.criterion == "magnitude":
            return self.parameters[name].detach().reshape(-1)[part].float().abs()
        if self.config.criterion == "movement":
            return self.tensors["movement"][name][part].clone()
        factors = [self.tensors[kind][name][part] for kind in ("importance", "uncertainty")]
        length = len(factors[0])
        return torch.mul(*factors, out=self._scratch[:length] if length <= len(self._scratch) else None)
