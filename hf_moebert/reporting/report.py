"""Write a report about compressed models: a table, its origin and pictures."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .tables import escape_markdown, markdown_table, measurement_rows


def write_report(
    folder: str | PathLike[str],
    *,
    title: str,
    measurement: Mapping[str, Any],
    pictures: Mapping[str, str | PathLike[str]],
) -> Path:
    """Write `report.md`: the table, the command, seed and machine behind it, and the pictures.

    Args:
        folder: Folder to write to, which holds the pictures.
        title: Heading.
        measurement: Result of `hf_moebert.measuring.comparison.measure`.
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
