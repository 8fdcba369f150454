"""The recipe of a pruning run."""

import json
import math
from dataclasses import dataclass, fields
from typing import Any

from transformers.hf_argparser import HfArg


CHOICES = {
    "granularity": ("unstructured", "2:4", "structured"),
    "criterion": ("platon", "importance", "movement", "magnitude"),
    "sensitivity_at": ("pre_step", "post_step"),
}


@dataclass(frozen=True)
class PlatonConfig:
    """The recipe of a pruning run: how much to prune, by which criterion, and when.

    Raises:
        ValueError: If a value breaks the rule in its help text; the message names rule and remedy.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2206.12562. `sensitivity_at`, `include_bias` and
    `reference_parity` switch between the paper and its code. The defaults of `beta2` and of the warm-ups, which the
    paper chooses for each task, and `granularity`, `speed_up`, `modules`, `min_keep` and `balance_experts` are our own
    design.
    """

    keep_ratio: float = HfArg(default=0.1, help="Share of the prunable weights kept at the end, in (0, 1].")
    initial_warmup: float = HfArg(
        default=0.08,
        help="Length of the first phase, in which nothing is pruned: a share of the run if below 1, otherwise"
        " optimiser steps.",
    )
    final_warmup: float = HfArg(
        default=0.35,
        help="Length of the last phase, in which the final ratio holds and the mask is applied after every step: a"
        " share of the run if below 1, otherwise optimiser steps. Above 0.",
    )
    window: int = HfArg(
        default=10,
        help="Optimiser steps per window, whose mean sensitivity updates the averages and after which the mask is"
        " renewed; at least 1.",
    )
    beta1: float = HfArg(default=0.85, help="Decay of the average of the sensitivity, in (0, 1).")
    beta2: float = HfArg(default=0.9, help="Decay of the average of its uncertainty, in (0, 1).")
    sensitivity_at: str = HfArg(
        default="pre_step",
        help="Weights by which a gradient is multiplied: those at which it was computed, `pre_step` as in the paper,"
        " or the updated ones, `post_step` as in its code.",
    )
    include_bias: bool = HfArg(
        default=False, help="Whether the biases of the chosen modules are pruned too, as in the paper's code."
    )
    reference_parity: bool = HfArg(
        default=False,
        help="Whether weights are selected as in the paper's code: int((1 - ratio) * count) instead of rounding, one"
        " zero less than that, and none at all where scores tie at the threshold.",
    )
    granularity: str = HfArg(
        default="unstructured",
        help="What is pruned: single weights (`unstructured`), two of every four along the input (`2:4`), or whole"
        " feed-forward neurons and attention heads (`structured`), which `shrink` then removes.",
    )
    speed_up: float | None = HfArg(
        default=None,
        help="Time of the dense model over that of the pruned one, above 1, for `structured` units: it takes the place"
        " of `keep_ratio`. The callback then needs a latency table of this machine.",
    )
    criterion: str = HfArg(
        default="platon",
        help="What is kept: the weights of largest sensitivity times uncertainty (`platon`), of largest sensitivity"
        " alone (`importance`), those that gradient descent pushes away from zero (`movement`, whose mask holds in"
        " every step and lets a weight return with its old value), or the largest (`magnitude`). Of whole units, their"
        " weights' mean sensitivity and its uncertainty count; `movement` is not for them.",
    )
    modules: list[str] | None = HfArg(
        default=None,
        help="Paths of the modules in which linear layers are pruned, such as `bert.encoder.layer.0`. By default the"
        " repeated layers of the model, which leaves out embeddings, pooler and head.",
    )
    min_keep: float = HfArg(
        default=0.0,
        help="Share of every single matrix that is kept whatever its scores, or of the neurons and of the heads of"
        " every layer; in [0, keep_ratio]. The paper has no such floor.",
    )
    balance_experts: bool = HfArg(
        default=True,
        help="Whether the experts of one layer count alike, so that an expert is not pruned merely for its few tokens."
        " Not for movement, whose sums have a sign.",
    )

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("include_bias", "reference_parity", "balance_experts"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}. Write it unquoted.")
        self._check_ratios()
        self._check_speed_up()
        self._check_clock()
        if self.modules is not None and (isinstance(self.modules, str) or not all(map(_is_path, self.modules))):
            raise ValueError(
                f"`modules` must list paths of modules, got {self.modules!r}. Use ['bert.encoder.layer.0'], or None"
                " for all repeated layers."
            )
        self._check_granularity()

    def _check_granularity(self) -> None:
        if self.granularity == "2:4" and self.reference_parity:
            raise ValueError(
                "`reference_parity` must be False with granularity '2:4', got True. It leaves one weight too many."
            )
        if self.granularity == "structured" and self.criterion == "movement":
            raise ValueError(
                "`criterion` must be platon, importance or magnitude with granularity 'structured', got 'movement'. It"
                " ranks single weights, whose old values it keeps."
            )
        for name, default in (
            ("reference_parity", False),
            ("include_bias", False),
            ("modules", None),
        ):
            if self.granularity == "structured" and getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` must be {default} with granularity 'structured', got {getattr(self, name)!r}. It"
                    " applies to single weights; units include their biases, in every layer."
                )

    @property
    def final_share(self) -> float:
        """Share that is left at the end: of the weights, or of the time of the dense model."""
        return self.keep_ratio if self.speed_up is None else 1 / self.speed_up

    def _check_speed_up(self) -> None:
        if self.speed_up is None:
            return
        if not _is_number(self.speed_up) or self.speed_up <= 1:
            raise ValueError(f"`speed_up` must be above 1, got {self.speed_up!r}. Use 2.0 for half of the time.")
        if self.granularity != "structured":
            raise ValueError(
                f"`granularity` must be 'structured' with `speed_up`, got {self.granularity!r}. Zeros that stay"
                " save no time; use `keep_ratio`."
            )

    def _check_ratios(self) -> None:
        if not _is_number(self.keep_ratio) or not 0 < self.keep_ratio <= 1:
            raise ValueError(
                f"`keep_ratio` must be in (0, 1], got {self.keep_ratio!r}. Use 0.1 to keep a tenth of the weights."
            )
        if self.granularity == "2:4" and self.keep_ratio != 0.5:
            raise ValueError(
                f"`keep_ratio` must be 0.5 with granularity '2:4', got {self.keep_ratio}. Two of four are kept."
            )
        highest = 1 if self.speed_up is not None else self.keep_ratio
        if not _is_number(self.min_keep) or not 0 <= self.min_keep <= highest:
            raise ValueError(
                f"`min_keep` must be in [0, {highest}], got {self.min_keep!r}. Use 0.01 to keep a hundredth of every"
                " matrix, or of the units of every layer."
            )
        for name in ("beta1", "beta2"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be in (0, 1), got {getattr(self, name)!r}. Use 0.85; with 0 the uncertainty, and"
                    " so every score, would be zero."
                )

    def _check_clock(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"`window` must be a whole number of at least 1, got {self.window!r}. Use 10.")
        for name in ("initial_warmup", "final_warmup"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(
                    f"`{name}` must be a share below 1 or a whole number of steps, got {value!r}. Use 0.1 for a tenth"
                    " of the run."
                )
        if self.final_warmup == 0:
            raise ValueError(
                "`final_warmup` must be above 0, got 0. The final ratio holds only where the mask is applied after"
                " every step: use at least 1."
            )

    def resolve_steps(self, total_steps: int) -> tuple[int, int]:
        """Return the optimiser steps after which pruning begins, and after which the final ratio holds.

        Args:
            total_steps: Optimiser steps of the run.

        Raises:
            ValueError: If the run is too short for its warm-ups and one window.
        """
        begin = _steps(self.initial_warmup, total_steps)
        end = total_steps - max(1, _steps(self.final_warmup, total_steps))
        if end <= begin or end < self.window:
            raise ValueError(
                f"The run must be longer than `initial_warmup` and `final_warmup` together and leave one `window` for"
                f" scores before the final phase, got {total_steps} steps, of which {begin} and"
                f" {total_steps - end}, and a window of {self.window}. Train longer, or use smaller ones."
            )
        return begin, end

    def differences(self, other: dict[str, Any]) -> list[str]:
        """List the fields that differ from a saved recipe, with both values."""
        own = json.loads(json.dumps({field.name: getattr(self, field.name) for field in fields(self)}))
        pairs = {key: (other.get(key), own.get(key)) for key in own | other}
        return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in pairs.items() if old != new]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _steps(warmup: float, total_steps: int) -> int:
    return round(warmup * total_steps) if warmup < 1 else int(warmup)
