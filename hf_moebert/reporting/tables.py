"""Lay out tables for a terminal, a report or a model card."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


Rows = Sequence[Mapping[str, str]]


def one_line(text: object) -> str:
    """Write any text on one line, without control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def escape_markdown(text: object) -> str:
    """Write any text so that Markdown shows it as it is: one line, no markup, no list, no HTML, no table border."""
    escaped = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(one_line(text), quote=False))
    return re.sub(r"^(\d*)([-+.)](?= |$)|-(?=-))", r"\1\\\2", escaped)  # at its start: a list, or a rule


def markdown_table(rows: Rows) -> str:
    """Write rows as a Markdown table, the first column to the left and the others to the right.

    Args:
        rows: Cells by column; every row has the columns of the first. The cells are text, not markup.

    Raises:
        ValueError: If there is no row, or if rows differ in their columns.
    """
    columns = _columns(rows)
    lines = [[escape_markdown(column) for column in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[escape_markdown(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_table(rows: Rows, title: str) -> Table:
    """Lay out rows for a terminal; markup in a cell is shown as text.

    Raises:
        ValueError: If there is no row, or if rows differ in their columns.
    """
    table = Table(title=Text(title))
    for number, column in enumerate(_columns(rows)):
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    return table


def _columns(rows: Rows) -> list[str]:
    if not rows:
        raise ValueError("`rows` must hold at least one row, got none.")
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"`rows` must all have the columns {columns}, got {list(row)}.")
    return columns


def measurement_rows(measurement: Mapping[str, Any]) -> list[dict[str, str]]:
    """Convert the result of `measuring.comparison.measure` to one row per model, numbers with their intervals."""
    return [
        _measurement_row(name, model, name == measurement["baseline"]) for name, model in measurement["models"].items()
    ]


def _measurement_row(name: str, model: Mapping[str, Any], is_baseline: bool) -> dict[str, str]:
    footprint, speed_up = model["footprint"], model["speed_up"]
    row = {"model": name}
    for metric, value in model["scores"].items():
        row[metric] = _with_interval(value, "value", "{:.4f}")
        row[f"{metric} difference"] = (
            "baseline" if is_baseline else _with_interval(model["differences"][metric], "value", "{:+.4f}")
        )
    row["parameters stored"] = short_number(footprint["total"])
    row["effective"] = short_number(footprint["active"])
    shares = _sparsities(footprint) if footprint["pruned"] else ()
    row["zeros: pruned, all"] = ", ".join(f"{share:.0%}" for share in shares) or "-"
    row["on disk"] = short_number(footprint["bytes_on_disk"]) + "B"
    row["speed-up"] = "baseline" if is_baseline else _with_interval(speed_up, "median", "{:.2f}x")
    return row


def describe_sparsity(footprint: Mapping[str, Any]) -> str:
    """Write the share of zeros, in the pruned matrices and in the whole model, on one line.

    Args:
        footprint: The fields of a `measuring.footprint.Footprint`.
    """
    if not footprint["pruned"]:
        return "nothing pruned"
    pruned, everything = _sparsities(footprint)
    return f"{pruned:.1%} of pruned matrices, {everything:.1%} of the model"


def _sparsities(footprint: Mapping[str, Any]) -> tuple[float, float]:
    """Return the share of zeros in the pruned matrices, and in the whole model."""
    pruned = 1 - footprint["pruned_nonzero"] / footprint["pruned"]
    return pruned, 1 - footprint["nonzero"] / footprint["total"]


def short_number(number: float) -> str:
    """Format a count in about three digits: 22.7M."""
    thousands = min(int(math.log10(max(number, 1))) // 3, 3)
    return f"{number / 1000**thousands:.1f}{'kMG'[thousands - 1]}" if thousands else f"{number}"


def _with_interval(interval: Mapping[str, float], middle: str, number: str) -> str:
    value, low, high = (number.format(interval[key]) for key in (middle, "low", "high"))
    return f"{value} [{low}, {high}]"
