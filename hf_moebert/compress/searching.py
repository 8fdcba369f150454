"""Find a recipe by trying: short runs of everything, measured in one go, then long ones of the best."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset

from hf_moebert.inference.linears import Precision, unsupported_reason
from hf_moebert.measuring.comparison import Latency, measure

from .recipe import Distil, DropLayers, Experts, Optimize, Prune, Search, Stage, Target
from .running import Workshop, count_steps


GIVEN = "given"
PRECISIONS = ("float32", "bfloat16", "int8")
FEWEST_STEPS = 20  # of a short run
# What is tried, from cheap to dear; the precision is chosen for each of them
STRUCTURES: dict[str, tuple[Stage, ...]] = {
    "as it is": (),
    "half of the layers": (DropLayers(),),
    "pruned to 70 %": (Prune(keep_ratio=0.7),),
    "pruned to 50 %": (Prune(keep_ratio=0.5),),
    "pruned to 30 %": (Prune(keep_ratio=0.3),),
    "experts": (Experts(),),
    "pruned to 70 %, experts": (Prune(keep_ratio=0.7), Experts()),
    "pruned to 50 %, experts": (Prune(keep_ratio=0.5), Experts()),
}


@dataclass(frozen=True)
class Candidate:
    """A structure in one precision, and what it was measured to be worth.

    Attributes:
        structure: Name in `STRUCTURES`.
        precision: What it is optimised for.
        steps: Steps it was trained for.
        difference: Of its score to that of the given model, on examples that choose.
        speedup: Over the given model in plain torch.
        size: Bytes on disk.
    """

    structure: str
    precision: str
    steps: int
    difference: float
    speedup: float
    size: int

    def meets(self, target: Target) -> bool:
        """Return whether it is fast and small enough."""
        fast = target.speedup is None or self.speedup >= target.speedup
        return fast and (target.max_size is None or self.size <= target.max_size)

    def row(self) -> dict[str, str]:
        """Return it as a row of the report."""
        return {
            "tried": f"{self.structure}, {self.precision}",
            "steps": str(self.steps),
            "difference": f"{self.difference:+.4f}",
            "speed-up": f"{self.speedup:.2f}x",
            "bytes": f"{self.size:,}",
        }


def search(
    shop: Workshop, given: str, fingerprint: str, *, threads: int | None, rounds: int
) -> tuple[Workshop, list[dict[str, str]]]:
    """Try all structures for a short time, then train the best of them to the end until one keeps the quality.

    What chooses is held out of the training examples: neither the stages nor the verdict see it.

    Args:
        shop: The run, whose recipe begins with `Search`.
        given: Folder of the given model.
        fingerprint: Of the model and the data.
        threads: Threads that are timed.
        rounds: Timed passes.

    Returns:
        The run with the recipe that was found, whose stages are done, and a row for everything that was tried.
    """
    hunt = _Hunt(shop, given, fingerprint, threads, rounds)
    short = hunt.measure(hunt.try_all())
    tried, best, target = list(short), None, shop.recipe.target
    for candidate in rank(short, target):
        if best is not None and hunt.is_late():
            break
        folder = hunt.train(candidate.structure, short=False)
        (long,) = hunt.measure({candidate.structure: folder}, candidate.precision)
        tried.append(long)
        if best is None or (long.meets(target), long.difference) > (best.meets(target), best.difference):
            best = long
        if long.difference >= -target.max_drop and long.meets(target):
            break
    assert best is not None  # there is always the model as it is
    shop.tell(f"search: {best.structure}, {best.precision}")
    return hunt.shop_of(best.structure, best.precision), [candidate.row() for candidate in tried]


def rank(candidates: list[Candidate], target: Target) -> list[Candidate]:
    """Order what was tried: each structure once, in its best precision.

    First come those that are fast and small enough, the best score first; then the others, the fastest first.
    """
    enough = sorted((c for c in candidates if c.meets(target)), key=lambda c: (-c.difference, -c.speedup))
    others = sorted((c for c in candidates if not c.meets(target)), key=lambda c: -c.speedup)
    first: dict[str, Candidate] = {}
    for candidate in [*enough, *others]:
        first.setdefault(candidate.structure, candidate)
    return list(first.values())


def timing(target: Target, rounds: int) -> Latency:
    """Return how models are timed: on one thread by processor time, which others on the machine disturb less."""
    return Latency(target.batch, target.tokens, rounds, "cpu" if torch.get_num_threads() == 1 else "wall")


class _Hunt:
    """The runs of one search."""

    def __init__(self, shop: Workshop, given: str, fingerprint: str, threads: int | None, rounds: int) -> None:
        stage = cast(Search, shop.recipe.stages[0])
        self.given, self.fingerprint, self.threads, self.rounds = given, fingerprint, threads, rounds
        self.budget, self.short, self.start = stage.budget, stage.short, time.monotonic()
        self.shop, self.distil = shop, cast(Distil, shop.recipe.stages[1])
        self.longest = 0.0  # seconds of a long run

    def try_all(self) -> dict[str, Path]:
        """Train every structure that the model can have for a short time; return their folders."""
        folders = {}
        for name in STRUCTURES:
            try:
                folders[name] = self.train(name, short=True)
            except ValueError as error:  # the family has no such units, or its shape does not divide
                self.shop.tell(f"search: not {name}: {error}")
        return folders

    def steps(self, name: str, *, short: bool) -> int:
        """Return for how many steps a structure is trained; what is not changed is not trained."""
        if not STRUCTURES[name]:
            return 0
        steps = count_steps(self.distil, self.shop)
        return max(FEWEST_STEPS, round(self.short * steps)) if short else steps

    def shop_of(self, name: str, precision: str, *, short: bool = False) -> Workshop:
        """Return the run of one structure."""
        steps = self.steps(name, short=short)
        training = (replace(self.distil, steps=steps),) if steps else ()
        stages = (*STRUCTURES[name], *training, Optimize(precision))
        return replace(self.shop, recipe=replace(self.shop.recipe, stages=stages))

    def train(self, name: str, *, short: bool) -> Path:
        """Make a structure and train it; return its folder."""
        start = time.monotonic()
        shop = self.shop_of(name, "float32", short=short)
        self.shop.tell(f"search: {'short, ' if short else ''}{name}")
        folder, _ = replace(shop, tell=lambda line: None).run(self.given, self.fingerprint)
        if not short:
            self.longest = max(self.longest, time.monotonic() - start)
        return folder

    def is_late(self) -> bool:
        """Return whether another long run would end after the budget."""
        return self.budget is not None and time.monotonic() - self.start + self.longest > self.budget

    def measure(self, folders: Mapping[str, Path], precision: str | None = None) -> list[Candidate]:
        """Measure structures in all precisions or in one, beside each other and the given model."""
        target = self.shop.recipe.target
        can = [p for p in PRECISIONS if not unsupported_reason(cast(Precision, p), True)]
        precisions = can if precision is None else [precision]
        measured = measure(
            {GIVEN: self.given} | {name: str(folder) for name, folder in folders.items()},
            cast(Dataset, self.shop.data.selection),
            baseline=GIVEN,
            optimized=precisions,
            columns=self.shop.data.columns,
            latency=timing(target, self.rounds),
            threads=self.threads,
            seed=self.shop.recipe.seed,
        )
        short = precision is None
        return [
            self.candidate(measured["models"][f"{name}, {p}"], name, p, target, short=short)
            for name in folders
            for p in precisions
        ]

    def candidate(
        self, model: Mapping[str, Any], name: str, precision: str, target: Target, *, short: bool
    ) -> Candidate:
        """Read a candidate off its measurement."""
        metric = target.metric or next(iter(model["scores"]))
        return Candidate(
            name,
            precision,
            self.steps(name, short=short),
            model["differences"][metric]["value"],
            model["speed_up"]["median"],
            model["footprint"]["bytes_on_disk"],
        )
