"""The recipe of the first stage: how fast masks close, and the learning rates."""

import math
from dataclasses import dataclass

from transformers.hf_argparser import HfArg


RAMPS = ("linear", "cubic")


@dataclass(frozen=True)
class MaskSparsityConfig:
    """The recipe by which masks are learned while a model trains.

    Raises:
        ValueError: If a value breaks the rule in its help text; the message names rule and remedy.

    Source: Liu et al. 2025, "Masks Can be Learned as an Alternative to Experts", ACL, abstract, for a sparsity that
    grows during training. The ramp, the rates and the multipliers are our own design, after Xia et al. 2022,
    https://arxiv.org/abs/2204.00408, section 3.
    """

    keep_ratio: float = HfArg(default=0.5, help="Share of the units that a token uses at the end, in (0, 1].")
    ramp: str = HfArg(
        default="linear",
        help="How the target rises: evenly (`linear`), or fast at first and then slower (`cubic`).",
    )
    ramp_share: float = HfArg(
        default=0.5, help="Share of the run's steps over which the target rises, in (0, 1]. Then it stays constant."
    )
    score_rate: float = HfArg(default=0.1, help="Learning rate of the scores of the masks.")
    multiplier_rate: float = HfArg(
        default=1.0, help="Learning rate of the multipliers that hold the masks to the target."
    )
    router_rate: float = HfArg(default=1e-3, help="Learning rate of the routers.")
    backbone_rate: float | None = HfArg(
        default=None, help="Learning rate of all other weights. By default that of the training arguments."
    )
    freeze_backbone: bool = HfArg(default=False, help="Whether only masks and routers are trained.")

    def __post_init__(self) -> None:
        for name in ("keep_ratio", "ramp_share"):
            value = getattr(self, name)
            if not (type(value) in (int, float) and 0 < value <= 1):
                raise ValueError(f"`{name}` must be a number in (0, 1], got {value!r}. Use 0.5.")
        if self.ramp not in RAMPS:
            raise ValueError(f"`ramp` must be one of {', '.join(RAMPS)}, got {self.ramp!r}. Leave it out for linear.")
        for name in ("score_rate", "multiplier_rate", "router_rate", "backbone_rate"):
            value = getattr(self, name)
            if value is None and name == "backbone_rate":
                continue
            if not (type(value) in (int, float) and 0 <= value < math.inf):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}. Leave it out.")
        if type(self.freeze_backbone) is not bool:
            raise ValueError(f"`freeze_backbone` must be True or False, got {self.freeze_backbone!r}. Leave it out.")

    def ramp_steps(self, total_steps: int) -> int:
        """Return the number of steps over which the target rises.

        Args:
            total_steps: Optimiser steps of the run.

        Raises:
            ValueError: If the run is too short for a ramp.
        """
        steps = round(self.ramp_share * total_steps)
        if steps < 1:
            raise ValueError(
                f"`ramp_share` must leave at least one of the run's {total_steps} steps for the ramp, got "
                f"{self.ramp_share}. Train for longer, or raise it."
            )
        return steps
