"""The recipe of the gradient mask of shared central tensors."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from .configuration_mpoe import GRANULARITIES


@dataclass(frozen=True)
class MPOEGradientMaskConfig:
    """The probability that central tensors are updated in a step, and its schedule.

    Raises:
        ValueError: If a value breaks the rule in its help text; the message names rule and remedy.

    Source: Gao et al. 2022, https://arxiv.org/abs/2203.01104, mask the gradient of the central tensor at random; the
    probabilities, the granularities and the schedule are our own.
    """

    keep: float | None = HfArg(
        default=None,
        help="Probability that a central tensor is updated in a step, in [0, 1]. By default 1 / num_experts: as often"
        " as an expert's own tensors see a token. That is our default, not the paper's.",
    )
    final_keep: float | None = HfArg(
        default=None, help="Probability at the end of the run, reached linearly. By default it does not change."
    )
    granularity: str = HfArg(
        default="tensor", help="Unit of a draw: a whole central tensor (`tensor`), or each of its entries (`element`)."
    )
    rescale: bool = HfArg(default=False, help="Whether kept gradients are divided by their probability.")
    seed: int = HfArg(default=0, help="Seed of the draws.")

    def __post_init__(self) -> None:
        for name in ("keep", "final_keep"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
                raise ValueError(
                    f"`{name}` must be a number in [0, 1], got {value!r}. Use 0.125 to update every eighth step."
                )
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}. Leave it out for "
                "whole tensors."
            )
        if type(self.rescale) is not bool:
            raise ValueError(f"`rescale` must be True or False, got {self.rescale!r}. Leave it out for False.")
        if type(self.seed) is not int:
            raise ValueError(f"`seed` must be an integer, got {self.seed!r}. Leave it out for 0.")
