"""Pictures of the report of a compression, as the numbers that its page draws: no library, no file, no network."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tables import short_number


WIDTH, HEIGHT = 480, 240  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 34  # margins
TICKS = 5


def draw_front(
    models: Mapping[str, Mapping[str, Any]],
    given: str,
    chosen: str,
    metric: str,
    candidates: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Place all that was measured by speed and by the difference of its score to the given model.

    Args:
        models: By name, as `measure` returns them.
        given: What they are compared with, at 1 and 0.
        chosen: The result.
        metric: The score that counts.
        candidates: Rows of a search; those without a difference are left out.

    Returns:
        "points" with a name, what they are, `x`, `y`, and their interval `low` to `high`; "ticks_x" and "ticks_y".
    """
    found: list[dict[str, Any]] = [{"name": given, "what": "given", "x": 1.0, "y": 0.0, "low": 0.0, "high": 0.0}]
    for name, model in models.items():
        if name != given and model["speed_up"] and model["differences"]:
            gap = model["differences"][metric]
            place = {"x": model["speed_up"]["median"], "y": gap["value"], "low": gap["low"], "high": gap["high"]}
            found.append({"name": name, "what": "chosen" if name == chosen else "measured", **place})
    for row in candidates:
        if row["difference"] != "-":
            gap, speed = float(row["difference"]), float(row["speed-up"].removesuffix("x"))
            name = f"{row['tried']}, {row['steps']} steps"
            found.append({"name": name, "what": "tried", "x": speed, "y": gap, "low": gap, "high": gap})
    across = Scale([point["x"] for point in found], LEFT, WIDTH - RIGHT)
    up = Scale([point[end] for point in found for end in ("low", "high")], HEIGHT - BOTTOM, TOP)
    points = [
        point | {"x": across(point["x"])} | {end: up(point[end]) for end in ("y", "low", "high")} for point in found
    ]
    return {"points": points, "ticks_x": across.ticks("{:.2f}x".format), "ticks_y": up.ticks("{:+.3f}".format)}


def draw_losses(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Place the losses of a training run by their steps.

    Args:
        losses: A step and its loss each.

    Returns:
        "line", the points of a polyline; "ticks_x" and "ticks_y".
    """
    across = Scale([step for step, _ in losses], LEFT, WIDTH - RIGHT)
    up = Scale([loss for _, loss in losses], HEIGHT - BOTTOM, TOP)
    line = " ".join(f"{across(step):.1f},{up(loss):.1f}" for step, loss in losses)
    return {"line": line, "ticks_x": across.ticks("{:.0f}".format), "ticks_y": up.ticks("{:.3g}".format)}


def draw_layers(layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Place the parameters of each layer as bars, those of the given model beside those of the result.

    Args:
        layers: Parameters of each layer, of "given" and of "chosen", which may have fewer.

    Returns:
        "bars" with a name, what they are, `x`, `y`, `width` and `height`; "ticks_x" and "ticks_y".
    """
    most, up = max(map(len, layers.values())), Scale([0, *layers["given"], *layers["chosen"]], HEIGHT - BOTTOM, TOP)
    step, floor = (WIDTH - RIGHT - LEFT) / most, up(0)
    bars = [
        {
            "name": f"layer {number}, {what}: {count:,} parameters",
            "what": what,
            "x": LEFT + step * (number + (0.1 if what == "given" else 0.5)),
            "y": up(count),
            "width": 0.4 * step,
            "height": floor - up(count),
        }
        for what, counts in layers.items()
        for number, count in enumerate(counts)
    ]
    shown = range(0, most, math.ceil(most / 12))
    numbers = [{"at": round(LEFT + step * (number + 0.5), 1), "text": str(number)} for number in shown]
    return {"bars": bars, "ticks_x": numbers, "ticks_y": up.ticks(short_number)}


class Scale:
    """Numbers onto a length of the drawing, with a little room at both ends.

    Args:
        values: All that is to be seen.
        start: Where the smallest one is.
        end: Where the largest one is.
    """

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        """Return the place of a number."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, form: Callable[[float], str]) -> list[dict[str, Any]]:
        """Return places at equal distances, with their numbers."""
        values = [self.low + (self.high - self.low) * part / (TICKS - 1) for part in range(TICKS)]
        return [{"at": round(self(value), 1), "text": form(value)} for value in values]
