"""The recipe of dimension squeezing."""

import math
from dataclasses import dataclass

from transformers.hf_argparser import HfArg


@dataclass(frozen=True)
class MPOSqueezingConfig:
    """A schedule for cutting bonds step by step, and the metric that stops it.

    Raises:
        ValueError: If a field is out of range.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205, for the idea; all fields and defaults are our own.
    """

    metric: str = HfArg(default="eval_accuracy", help="Metric that decides, as the Trainer logs it.")
    higher_is_better: bool = HfArg(default=True, help="Whether a larger metric is better.")
    allowance: float = HfArg(
        default=0.01, help="How much worse than before the first cut the metric may get, in its own units."
    )
    start_step: int = HfArg(default=0, help="Evaluations before this step cut nothing.")
    cuts: int = HfArg(default=1, help="Cuts after every evaluation; the training until the next one repairs them.")
    directions: int = HfArg(default=1, help="Directions that one cut drops from a bond.")
    min_bond: int = HfArg(default=1, help="No bond gets smaller than this.")
    max_squeezes: int = HfArg(default=-1, help="Stop cutting after so many evaluations that cut; -1 for no limit.")
    relative: bool = HfArg(default=True, help="Compare errors relative to the norm of their matrix.")

    def __post_init__(self) -> None:
        for name in ("cuts", "directions", "min_bond"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}. Use 1 for the finest steps."
                )
        if self.start_step < 0:
            raise ValueError(f"`start_step` must not be negative, got {self.start_step}. Use 0 to cut at once.")
        if not (math.isfinite(self.allowance) and self.allowance >= 0):
            raise ValueError(
                f"`allowance` must be a number from 0, got {self.allowance}. Use 0.01 for a point of 100."
            )
        if self.max_squeezes < -1:
            raise ValueError(f"`max_squeezes` must be -1 or more, got {self.max_squeezes}. Use -1 for no limit.")
