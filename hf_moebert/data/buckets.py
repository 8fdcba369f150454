"""Inputs of like length together, so that little is padded."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar


Row = TypeVar("Row")
Result = TypeVar("Result")


def group_by_length(lengths: Sequence[int], shortest: float = 0.75) -> list[list[int]]:
    """Group inputs by length, longest first, so that none is padded to much more than its length.

    Args:
        lengths: Length of each input.
        shortest: Length of the shortest input of a group, as a share of the longest, in (0, 1].

    Returns:
        Indices of the inputs of each group.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and lengths[place] >= shortest * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def run_by_length(
    rows: Sequence[Row],
    lengths: Sequence[int],
    call: Callable[[list[Row]], Iterable[Result]],
    *,
    batch_size: int,
    shortest: float = 0.75,
) -> list[Result]:
    """Run rows of like length together, and return the results in the order of the rows.

    Args:
        rows: What is run.
        lengths: Length of each.
        call: Runs some rows, and returns a result for each.
        batch_size: Most rows of a call.
        shortest: Length of the shortest row of a call, as a share of the longest, in (0, 1].
    """
    found: dict[int, Result] = {}
    for group in group_by_length(lengths, shortest):
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            found.update(zip(part, call([rows[place] for place in part]), strict=True))
    return [found[place] for place in range(len(rows))]
