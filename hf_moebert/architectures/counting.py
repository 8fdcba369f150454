"""How many parameters of a model one token uses."""

from torch import nn

from .protocols import PartlyActive


def count_active(model: nn.Module) -> int:
    """Count the parameters used for one token.

    Args:
        model: Any model; modules that use only a part of their own are `PartlyActive`.
    """
    fractions: dict[nn.Parameter, float] = {}
    for module in model.modules():
        fraction = module.active_fraction if isinstance(module, PartlyActive) else 1.0
        for parameter in module.parameters(recurse=False):
            # A parameter tied to two modules is used as often as the busier one uses it.
            fractions[parameter] = max(fraction, fractions.get(parameter, 0.0))
    return round(sum(parameter.numel() * fraction for parameter, fraction in fractions.items()))
