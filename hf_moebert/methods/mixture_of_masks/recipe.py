"""The recipe of a run that learns masks: how fast they close, when they are fixed, and the learning rates."""

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
    grows during training. The ramp, the exact budget, the rates and the early end are our own design.
    """

    keep_ratio: float = HfArg(
        default=0.5, help="Share of the masks that stay open: with top-1 of the units that a token uses. In (0, 1]."
    )
    ramp: str = HfArg(
        default="linear",
        help="How the target rises: evenly (`linear`), or fast at first and then slower (`cubic`).",
    )
    ramp_share: float = HfArg(
        default=0.2, help="Share of the run's steps over which the target rises, in (0, 1]. Then it stays constant."
    )
    score_rate: float = HfArg(default=0.1, help="Learning rate of the scores of the masks.")
    learn_share: float = HfArg(
        default=0.3,
        help="Share of the run's steps in which masks are learned, from `ramp_share` to 1. Then they are fixed, and"
        " the other weights recover.",
    )
    router_rate: float = HfArg(default=1e-3, help="Learning rate of the routers.")
    backbone_rate: float | None = HfArg(
        default=None, help="Learning rate of all other weights. By default that of the training arguments."
    )
    freeze_backbone: bool = HfArg(default=False, help="Whether only masks and routers are trained.")

    def __post_init__(self) -> None:
        for name in ("keep_ratio", "ramp_share", "learn_share"):
            value = getattr(self, name)
            if not (type(value) in (int, float) and 0 < value <= 1):
                raise ValueError(f"`{name}` must be a number in (0, 1], got {value!r}. Use 0.5.")
        if self.learn_share < self.ramp_share:
            raise ValueError(
                f"`learn_share` must be at least `ramp_share`, got {self.learn_share} and {self.ramp_share}: masks "
                "are fixed when they have reached their target. Raise it, or lower `ramp_share`."
            )
        if self.ramp not in RAMPS:
            raise ValueError(f"`ramp` must be one of {', '.join(RAMPS)}, got {self.ramp!r}. Leave it out for linear.")
        for name in ("score_rate", "router_rate", "backbone_rate"):
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

    def learn_steps(self, total_steps: int) -> int:
        """Return the number of steps in which masks are learned.

        Args:
            total_steps: Optimiser steps of the run.
        """
        return round(self.learn_share * total_steps)
