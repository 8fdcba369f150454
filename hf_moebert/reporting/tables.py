"""Tables and texts about a compressed model: for a terminal, a report, a model card."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table
from rich.text import Text


Rows = Sequence[Mapping[str, str]]


def one_line(text: object) -> str:
    """Write any text on one line, without control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def escape_markdown(text: object) -> str:
    """Write any text so that Markdown shows it as it is: one line, no markup, no HTML, no table border."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(one_line(text), quote=False))


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
    """Lay rows out for a terminal; whatever looks like markup in a cell is shown as it is.

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
    """Turn the result of `measuring.comparison.measure` into one row per model, numbers with their intervals."""
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
    row["on disk"] = short_number(footprint["bytes_on_disk"]) + "B"
    row["speed-up"] = "baseline" if is_baseline else _with_interval(speed_up, "median", "{:.2f}x")
    return row


def short_number(number: float) -> str:
    """Write a count in three digits or so: 22.7M."""
    thousands = min(int(math.log10(max(number, 1))) // 3, 3)
    return f"{number / 1000**thousands:.1f}{'kMG'[thousands - 1]}" if thousands else f"{number}"


def _with_interval(interval: Mapping[str, float], middle: str, number: str) -> str:
    value, low, high = (number.format(interval[key]) for key in (middle, "low", "high"))
    return f"{value} [{low}, {high}]"


def write_report(
    folder: str | PathLike[str],
    *,
    title: str,
    measurement: Mapping[str, Any],
    pictures: Mapping[str, str | PathLike[str]],
) -> Path:
    """Write `report.md`: the table, the command, seed and machine behind it, and the pictures.

    Args:
        folder: Where to write, and where the pictures lie.
        title: Heading.
        measurement: What `hf_moebert.measuring.comparison.measure` returned.
        pictures: Caption and file of each picture.

    Returns:
        The written file.

    Raises:
        ValueError: If a picture is not a file inside the folder.
    """
    folder = Path(folder)
    facts = {"command": measurement["command"], "seed": measurement["seed"]}
    facts |= measurement["settings"] | measurement["environment"]
    parts = [
        f"# {escape_markdown(title)}",
        markdown_table(measurement_rows(measurement)),
        "Intervals (95 %) are bootstrapped over examples for scores, over interleaved rounds for the speed-up.",
        "## How it was measured",
        markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]),
        *(picture_link(folder, caption, file) for caption, file in pictures.items()),
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def picture_link(folder: Path, caption: str, file: str | PathLike[str]) -> str:
    """Write a Markdown picture whose link is relative to the folder, so that both can travel together.

    Raises:
        ValueError: If the picture is not a file inside the folder.
    """
    picture = Path(file).resolve()
    if not picture.is_file() or not picture.is_relative_to(folder.resolve()):
        raise ValueError(f"`pictures` must be files inside {str(folder)!r}, got {str(file)!r}. Save it there.")
    return f"![{escape_markdown(caption)}]({quote(picture.relative_to(folder.resolve()).as_posix())})"
