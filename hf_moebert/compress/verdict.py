"""The verdict on a compressed model: which targets it meets, and how sure that is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .recipe import Target


MET, DROPPED, UNDECIDED, MISSED = "met", "quality dropped", "too few examples", "speed or size missed"
EXIT_CODES = {MET: 0, DROPPED: 3, UNDECIDED: 3, MISSED: 4}


@dataclass(frozen=True)
class Verdict:
    """The outcome beside what was asked for.

    Attributes:
        outcome: One of "met", "quality dropped", "too few examples" and "speed or size missed".
        reasons: One sentence for each target.
        metric: The score that counts.
        difference: Its difference to the given model with the bounds of its 95 % interval, `value`, `low`, `high`.
        speedup: Median time of the given model over that of the result.
        size: Bytes of the result's weights on disk.
        examples: Examples that were scored; of a ranking, its queries.
        examples_needed: About how many would decide, if they are too few; `None` if they are not.
    """

    outcome: str
    reasons: list[str]
    metric: str
    difference: dict[str, float]
    speedup: float
    size: int
    examples: int
    examples_needed: int | None = None

    @property
    def exit_code(self) -> int:
        """Return the number that the command ends with."""
        return EXIT_CODES[self.outcome]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in a form that JSON knows."""
        return asdict(self)


def judge(measurement: Mapping[str, Any], name: str, target: Target) -> Verdict:
    """Compare a measured model with what was asked for.

    Quality counts before speed: a model that lost more than allowed is no success, however fast. It passes if the
    lower end of the 95 % interval of the paired difference is within the allowed drop, so few examples do not pass by
    chance.

    Args:
        measurement: Result of `hf_moebert.measuring.comparison.measure`, against the model that was given.
        name: The compressed model in it.
        target: What it must reach.

    Raises:
        ValueError: If the metric was not measured.
    """
    model = measurement["models"][name]
    metric = target.metric or next(iter(model["scores"]))
    if metric not in model["scores"]:
        raise ValueError(f"`metric` must be one of {', '.join(model['scores'])}, got {metric!r}.")
    difference, examples = model["differences"][metric], model["scored"]
    unit = "queries" if measurement["settings"]["group_column"] else "examples"
    speedup, size = model["speed_up"]["median"], model["footprint"]["bytes_on_disk"]
    interval = f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    reasons = [f"{metric} {interval} on {examples:,} {unit}, allowed -{target.max_drop:g}"]
    needed = None
    outcome = MET
    if difference["low"] < -target.max_drop - 1e-12:
        needed = examples_to_decide(difference, examples, target.max_drop)
        outcome = DROPPED if needed is None else UNDECIDED
        if needed is not None:
            reasons[0] += f"; about {needed:,} {unit} would decide"
    fast = target.speedup is None or speedup >= target.speedup
    small = target.max_size is None or size <= target.max_size
    if target.speedup is not None:
        reasons.append(f"{speedup:.2f} times as fast, asked for {target.speedup:g}")
    if target.max_size is not None:
        reasons.append(f"{size:,} bytes on disk, allowed {target.max_size:,}")
    if outcome == MET and not (fast and small):
        outcome = MISSED
    return Verdict(outcome, reasons, metric, dict(difference), speedup, size, examples, needed)


def examples_to_decide(difference: Mapping[str, float], examples: int, max_drop: float) -> int | None:
    """Estimate how many examples would bring the lower end within the allowed drop.

    An interval narrows with the square root of the number of examples.

    Returns:
        Their number; `None` if the difference itself is a larger drop than allowed, which more examples do not mend.
    """
    room = difference["value"] + max_drop
    if room <= 0:
        return None
    return math.ceil(examples * ((difference["value"] - difference["low"]) / room) ** 2)
