"""Compare the speed of callables fairly: interleaved rounds, paired ratios, intervals, environment."""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import bootstrap


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up over the baseline with its uncertainty.

    Attributes:
        median: Median over the rounds of time(baseline) / time(this); above 1 is faster.
        low: Lower end of the 95 % bootstrap interval of the median.
        high: Upper end of that interval.
        spread: Inter-quartile range of the ratios.
        rounds: Number of ratios.
        threads: Threads that torch computed with.
        clock: "wall" or "cpu".
    """

    median: float
    low: float
    high: float
    spread: float
    rounds: int
    threads: int
    clock: str


def compare_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 20,
    warmup: int = 3,
    clock: Literal["wall", "cpu"] = "wall",
    seed: int = 0,
) -> dict[str, SpeedUp]:
    """Time callables in turns, and compare them with one of them.

    Each round calls every callable once, in an order that rotates from round to round, so that a slow moment of the
    machine affects all of them alike. Only times of the same round are compared.

    Args:
        calls: Callables by name; a call returns once its work is done.
        baseline: The name in `calls` that the others are compared with.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        clock: "wall" for elapsed time; "cpu" for the time of this thread alone, which others on the machine disturb
            less.
        seed: Seed of the bootstrap.

    Returns:
        The speed-up of every callable but the baseline, by name.

    Raises:
        ValueError: If the baseline is not among the callables, if a number is too small, if the clock is unknown, or
            if the clock is "cpu" and torch computes with several threads.
    """
    if baseline not in calls:
        raise ValueError(f"`baseline` must be one of {sorted(calls)}, got {baseline!r}.")
    times = time_rounds(calls, rounds=rounds, warmup=warmup, clock=clock)
    return compare_times(times, baseline=baseline, clock=clock, seed=seed)


def time_rounds(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    clock: Literal["wall", "cpu"] = "wall",
) -> dict[str, np.ndarray]:
    """Time callables in turns, as `compare_latency` does, and with its refusals.

    Returns:
        Seconds of each callable in each round after the warm-up, `(rounds,)`.
    """
    if rounds < 2:
        raise ValueError(f"`rounds` must be at least 2, got {rounds}. Use 20 for an interval worth reading.")
    if warmup < 0:
        raise ValueError(f"`warmup` must be at least 0, got {warmup}. Use 3 to fill the caches first.")
    if clock not in CLOCKS:
        raise ValueError(f"`clock` must be one of {sorted(CLOCKS)}, got {clock!r}.")
    threads = torch.get_num_threads()
    if clock == "cpu" and threads != 1:
        raise ValueError(
            f"`clock='cpu'` sees one thread only, but torch computes with {threads}. Call torch.set_num_threads(1) "
            f"first, or use clock='wall'."
        )
    names, now = list(calls), CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = now()
            calls[name]()
            times[name].append(now() - start)
    return {name: np.array(durations[warmup:]) for name, durations in times.items()}


def compare_times(times: Mapping[str, np.ndarray], *, baseline: str, clock: str, seed: int = 0) -> dict[str, SpeedUp]:
    """Compare the times of `time_rounds` with those of one callable, round by round.

    The same times can be compared with several baselines.

    Returns:
        The speed-up of every callable but the baseline, by name.
    """
    speed_ups = {}
    for name in [name for name in times if name != baseline]:
        ratios = times[baseline] / times[name]  # (rounds,)
        low, high = _median_interval(ratios, seed)
        quarter, median, three_quarters = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
        spread = three_quarters - quarter
        speed_ups[name] = SpeedUp(median, low, high, spread, len(ratios), torch.get_num_threads(), clock)
    return speed_ups


def _median_interval(ratios: np.ndarray, seed: int) -> tuple[float, float]:
    interval = bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(seed))
    return float(interval.confidence_interval.low), float(interval.confidence_interval.high)


def environment() -> dict[str, Any]:
    """Describe the environment of a measurement: versions, processor, threads and the back ends torch may use."""
    return {
        "hf_moebert": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "mkl": torch.backends.mkl.is_available(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _revision() -> str:
    checkout = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    # An installed copy may lie inside the checkout of something else, whose commit means nothing here.
    if git is None or not (checkout / ".git").exists():
        return metadata.version("hf_moebert")
    describe = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(describe, capture_output=True, text=True, check=False)  # noqa: S603 - no input  # nosec B603
    return answer.stdout.strip() or metadata.version("hf_moebert")
