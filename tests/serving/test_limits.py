"""Limits of the server: what is refused, and that the table of the README has the defaults."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import hf_moebert
from hf_moebert.serving.limits import ServingLimits


def test_the_readme_lists_every_limit_with_its_default():
    page = Path(hf_moebert.__file__).with_name("serving") / "README.md"
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    written = {"queue_size": "8 x `max_batch`"}
    assert rows == [
        (field.name, written.get(field.name) or f"{field.default:,.0f}") for field in fields(ServingLimits)
    ]


@pytest.mark.parametrize(("limits", "waiting"), [({}, 256), ({"max_batch": 512}, 4096), ({"queue_size": 40}, 40)])
def test_the_queue_grows_with_the_batch(limits, waiting):
    assert ServingLimits(**limits).max_waiting == waiting


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch": 0}, "`max_batch` must be at least 1, got 0. Use 32."),
        ({"max_wait_ms": -1}, "`max_wait_ms` must be at least 0, got -1. Use 5."),
        ({"queue_size": 8}, "`queue_size` must be at least `max_batch` = 32, got 8."),
        ({"max_batch": 512, "queue_size": 256}, "= 512, got 256. Leave it out for 4096, or lower `max_batch`."),
        ({"max_body_bytes": 0}, "`max_body_bytes` must be above 0, got 0. Use 1000000."),
        ({"max_characters": 0}, "`max_characters` must be above 0, got 0. Use 20000."),
        ({"timeout_s": 0}, "`timeout_s` must be above 0, got 0. Use 30.0."),
        ({"timeout_s": float("nan")}, "`timeout_s` must be above 0, got nan. Use 30.0."),
        ({"max_header_bytes": 0}, "`max_header_bytes` must be above 0, got 0. Use 16384."),
        ({"header_timeout_s": -1}, "`header_timeout_s` must be above 0, got -1. Use 10.0."),
        ({"keep_alive_s": 0}, "`keep_alive_s` must be above 0, got 0. Use 5.0."),
        ({"max_connections": 0}, "`max_connections` must be above 0, got 0. Use 2000."),
        ({"grace_s": 0}, "`grace_s` must be above 0, got 0. Use 20.0."),
    ],
)
def test_limits_that_are_too_small_are_refused(limits, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ServingLimits(**limits)
