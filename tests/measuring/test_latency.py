"""Ratios, order and intervals with a clock that only the callables move."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

import hf_moebert
from hf_moebert.measuring import latency
from hf_moebert.measuring.latency import compare_latency, environment


class Machine:
    """A clock, and callables that take a given time each time they are called."""

    def __init__(self):
        self.now = 0.0
        self.called = []

    def work(self, name, durations):
        remaining = iter(durations)

        def call():
            self.called.append(name)
            self.now += next(remaining)

        return call


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setitem(latency.CLOCKS, "wall", lambda: machine.now)
    monkeypatch.setitem(latency.CLOCKS, "cpu", lambda: machine.now)
    return machine


def test_ratio_of_constant_times_is_exact(machine):
    calls = {"dense": machine.work("dense", [6.0] * 8), "small": machine.work("small", [2.0] * 8)}
    result = compare_latency(calls, baseline="dense", rounds=5, warmup=3)
    assert list(result) == ["small"]
    small = result["small"]
    assert (small.median, small.low, small.high, small.spread) == (3.0, 3.0, 3.0, 0.0)
    assert (small.rounds, small.threads, small.clock) == (5, torch.get_num_threads(), "wall")


def test_order_rotates_from_round_to_round(machine):
    calls = {name: machine.work(name, [1.0] * 4) for name in "abc"}
    compare_latency(calls, baseline="a", rounds=3, warmup=1)
    assert "".join(machine.called) == "abc" + "bca" + "cab" + "abc"


def test_warmup_is_not_counted(machine):
    calls = {"a": machine.work("a", [900.0, 4.0, 4.0]), "b": machine.work("b", [1.0, 2.0, 2.0])}
    assert compare_latency(calls, baseline="a", rounds=2, warmup=1)["b"].high == 2.0


def test_a_slow_moment_of_the_machine_cancels_out(machine):
    slowness = np.random.default_rng(0).uniform(1, 50, size=20)
    calls = {"a": machine.work("a", 3 * slowness), "b": machine.work("b", slowness)}
    result = compare_latency(calls, baseline="a", rounds=20, warmup=0)["b"]
    assert result.median == pytest.approx(3.0)
    assert result.spread == pytest.approx(0.0, abs=1e-9)


def test_interval_agrees_with_the_order_statistics(machine):
    ratios = np.exp(np.random.default_rng(1).normal(size=41))
    calls = {"a": machine.work("a", ratios), "b": machine.work("b", [1.0] * 41)}
    result = compare_latency(calls, baseline="a", rounds=41, warmup=0)["b"]
    assert result.median == pytest.approx(np.median(ratios))
    assert result.spread == pytest.approx(np.subtract(*np.percentile(ratios, [75, 25])))
    # The exact interval of a median: the order statistics whose ranks hold 95 % of Binomial(n, 1/2).
    low, high = np.sort(ratios)[[int(binom.ppf(0.025, 41, 0.5)), int(binom.ppf(0.975, 41, 0.5))]]
    assert result.low == pytest.approx(low, rel=0.2)
    assert result.high == pytest.approx(high, rel=0.2)


def test_same_seed_same_interval(machine):
    ratios = [eighths / 8 for eighths in range(8, 18)]  # exact in binary, so the clock adds no rounding
    calls = {"a": machine.work("a", ratios * 2), "b": machine.work("b", [1.0] * 20)}
    first = compare_latency(calls, baseline="a", rounds=10, warmup=0, seed=3)
    np.random.seed(7)
    assert compare_latency(calls, baseline="a", rounds=10, warmup=0, seed=3) == first


def test_cpu_clock_needs_a_single_thread(machine, monkeypatch):
    calls = {"a": machine.work("a", [1.0] * 4)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="`clock='cpu'` sees one thread only, but torch computes with 2"):
        compare_latency(calls, baseline="a", clock="cpu")
    assert machine.called == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert compare_latency(calls, baseline="a", rounds=2, warmup=0, clock="cpu") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "c"}, r"`baseline` must be one of \['a'\], got 'c'"),
        ({"baseline": "a", "rounds": 1}, "`rounds` must be at least 2, got 1"),
        ({"baseline": "a", "warmup": -1}, "`warmup` must be at least 0, got -1"),
        ({"baseline": "a", "clock": "sun"}, "`clock` must be one of .* got 'sun'"),
    ],
)
def test_refuses_bad_options(machine, options, message):
    with pytest.raises(ValueError, match=message):
        compare_latency({"a": machine.work("a", [])}, **options)


def test_environment_is_json_and_names_what_matters():
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert all(described[key] for key in ("hf_moebert", "python", "transformers", "system", "cpu"))


def test_an_installed_copy_tells_its_version(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "__file__", str(tmp_path / "hf_moebert" / "measuring" / "latency.py"))
    assert environment()["hf_moebert"] == hf_moebert.__version__


def test_a_checkout_tells_its_commit():
    root = Path(latency.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True).strip()
    assert environment()["hf_moebert"] in (head, f"{head}-dirty")
