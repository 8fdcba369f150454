"""Tables that show any text as it is, and reports."""

import io

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console

from hf_moebert.reporting.pictures import plot_expert_load
from hf_moebert.reporting.report import write_report
from hf_moebert.reporting.tables import (
    escape_markdown,
    markdown_table,
    measurement_rows,
    rich_table,
    short_number,
)


MEASUREMENT = {
    "baseline": "dense",
    "models": {
        "dense": {
            "source": "a/dense",
            "footprint": {"total": 2000, "active": 2000, "nonzero": 1990, "pruned": 0, "bytes_on_disk": 8100},
            "scores": {"accuracy": {"value": 0.9, "low": 0.85, "high": 0.95}},
            "differences": None,
            "speed_up": None,
        },
        "small": {
            "source": "a/small",
            "footprint": {
                "total": 1500,
                "active": 750,
                "nonzero": 600,
                "pruned": 1000,
                "pruned_nonzero": 100,
                "bytes_on_disk": 6100,
            },
            "scores": {"accuracy": {"value": 0.88, "low": 0.83, "high": 0.93}},
            "differences": {"accuracy": {"value": -0.02, "low": -0.05, "high": 0.01}},
            "speed_up": {"median": 1.5, "low": 1.4, "high": 1.625},
        },
    },
    "command": "hf-moebert measure a/small --baseline a/dense",
    "seed": 3,
    "settings": {"examples": 40},
    "environment": {"cpu": "Z80", "threads": 1},
}


def test_markdown_table():
    rows = [{"model": "dense", "size": "10"}, {"model": "small", "size": "2"}]
    assert markdown_table(rows).splitlines() == [
        "| model | size |",
        "| --- | ---: |",
        "| dense | 10 |",
        "| small | 2 |",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a|b",
        "a\nb",
        "<b>x</b>",
        "*x*",
        "__x__",
        "`x`",
        "[x](y)",
        "![x](y)",
        "\\|",
        "~~x~~",
        "&lt;",
        "# x",
        "\x1b[1m",
        "- x",
        "1. x",
        "--",
        "-1.5",
        "0.5",
    ],
)
def test_any_cell_reads_as_it_was_written(text):
    table = markdown_table([{"model": text, "size": "1"}])
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(table)
    first_cell = [token for token in tokens if token.type == "inline"][2]
    shown = "".join(child.content for child in first_cell.children)
    assert {child.type for child in first_cell.children} <= {"text", "text_special"}
    assert shown == " ".join(text.replace("\x1b", " ").split())


@pytest.mark.parametrize("text", ["0.9375", "-0.5", "+0.01 [-0.2, 0.3]", "1.50x", "2:4", "a - b"])
def test_numbers_stay_readable(text):
    assert escape_markdown(text).replace("\\[", "[").replace("\\]", "]") == text


def test_escaped_text_is_one_line():
    assert escape_markdown(" a\r\nb\u2028c\t ") == "a b c"


def test_tables_refuse_uneven_rows():
    with pytest.raises(ValueError, match="`rows` must hold at least one row"):
        markdown_table([])
    with pytest.raises(ValueError, match=r"must all have the columns \['a'\], got \['b'\]"):
        rich_table([{"a": "1"}, {"b": "1"}], "title")


def test_rich_table_shows_markup_as_text():
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(rich_table([{"model": "[red]x[/red]", "size": "7"}], title="[b]T[/b]"))
    text = console.export_text()
    assert "[red]x[/red]" in text
    assert "[b]T[/b]" in text


def test_measurement_rows_compare_with_the_baseline():
    dense, small = measurement_rows(MEASUREMENT)
    assert dense["zeros: pruned, all"] == "-"
    assert dense["accuracy difference"] == dense["speed-up"] == "baseline"
    assert small == {
        "model": "small",
        "accuracy": "0.8800 [0.8300, 0.9300]",
        "accuracy difference": "-0.0200 [-0.0500, +0.0100]",
        "parameters stored": "1.5k",
        "effective": "750",
        "zeros: pruned, all": "90%, 60%",
        "on disk": "6.1kB",
        "speed-up": "1.50x [1.40x, 1.62x]",
    }


def test_report_holds_the_table_its_origin_and_the_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "expert load (é).png"
    plot_expert_load(torch.ones(1, 2), picture)
    path = write_report(tmp_path, title="A *small* model", measurement=MEASUREMENT, pictures={"load": picture})
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.md"
    assert text.startswith("# A \\*small\\* model\n")
    assert markdown_table(measurement_rows(MEASUREMENT)) in text
    for fact in ("| command | hf-moebert measure a/small", "| seed | 3 |", "| cpu | Z80 |", "| examples | 40 |"):
        assert fact in text
    assert "![load](pictures/expert%20load%20%28%C3%A9%29.png)" in text


def test_report_refuses_pictures_that_would_not_travel(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"png")
    (tmp_path / "report").mkdir()
    for picture in (outside, tmp_path / "report" / "missing.png"):
        with pytest.raises(ValueError, match="`pictures` must be files inside"):
            write_report(tmp_path / "report", title="t", measurement=MEASUREMENT, pictures={"load": picture})


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1500, "1.5k"), (22_714_371, "22.7M"), (7_000_000_000, "7.0G")]
)
def test_counts_are_written_short(number, text):
    assert short_number(number) == text
