"""The verdict: quality before speed, by the lower end of the interval, and how many examples would decide."""

import pytest

from hf_moebert.compress.recipe import Target
from hf_moebert.compress.verdict import examples_to_decide, judge


def measured(value, low, *, speedup=3.0, size=100, groups=None):
    difference = {"value": value, "low": low, "high": 2 * value - low}
    model = {
        "scores": {"accuracy": {"value": 0.9, "low": 0.8, "high": 1.0}},
        "differences": {"accuracy": difference},
        "speed_up": {"median": speedup},
        "footprint": {"bytes_on_disk": size},
        "scored": 400,
    }
    return {"models": {"small": model}, "settings": {"group_column": groups}}


@pytest.mark.parametrize(
    ("measurement", "outcome", "code"),
    [
        (measured(0.0, -0.005), "met", 0),
        (measured(-0.02, -0.03), "quality dropped", 3),
        (measured(-0.005, -0.02), "too few examples", 3),
        (measured(0.0, -0.005, speedup=1.9), "speed or size missed", 4),
        (measured(0.0, -0.005, size=1001), "speed or size missed", 4),
        (measured(-0.02, -0.03, speedup=1.9), "quality dropped", 3),
    ],
)
def test_targets_are_met_or_not(measurement, outcome, code):
    verdict = judge(measurement, "small", Target(speedup=2.0, max_size=1000, max_drop=0.01))
    assert (verdict.outcome, verdict.exit_code) == (outcome, code)
    assert len(verdict.reasons) == 3


def test_more_examples_are_asked_for_where_they_would_decide():
    verdict = judge(measured(-0.005, -0.025), "small", Target(max_drop=0.01))
    assert verdict.examples_needed == 400 * 16
    assert "about 6,400 examples would decide" in verdict.reasons[0]
    asked = judge(measured(-0.005, -0.025, groups="query"), "small", Target(max_drop=0.01))
    assert "on 400 queries, allowed -0.01; about 6,400 queries would decide" in asked.reasons[0]
    assert examples_to_decide({"value": -0.02, "low": -0.03}, 400, 0.01) is None


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="`metric` must be one of accuracy, got 'f1'"):
        judge(measured(0, 0), "small", Target(metric="f1"))
