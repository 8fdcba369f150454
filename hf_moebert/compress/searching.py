"""Find a recipe by trying: short runs of everything, measured in one go, then long ones of the best."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset

from hf_moebert.inference.linears import Precision, unsupported_reason
from hf_moebert.measuring.comparison import Latency, measure

from .recipe import Distil, DropLayers, Experts, Optimize, Prune, Search, Stage, Target
from .running import Workshop
from .tasks import FEWEST, find_metrics


GIVEN = "given"
PRECISIONS = ("float32", "bfloat16", "int8")
FEWEST_STEPS = 20  # of a short run
FASTEST = 2  # structures that are trained where none is fast enough
NEAR = 0.85  # of the speed-up that is asked for is tried, too: what is fast enough may lose too much
HOPE = 3  # a short run may have lost so many times the allowed drop: a long one wins some of it back
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

MARGIN = 1.1  # what a latency table promises is missed by a little


def structures_for(target: Target) -> dict[str, tuple[Stage, ...]]:
    """Return what is tried: `STRUCTURES`, and units pruned to the speed-up that is asked for."""
    if target.speedup is None:
        return STRUCTURES
    asked = round(MARGIN * target.speedup, 2)
    return STRUCTURES | {f"pruned to {asked:g}x": (Prune(speed_up=asked),)}


@dataclass(frozen=True)
class Candidate:
    """A structure in one precision, and what it was measured to be worth.

    Attributes:
        structure: Name in `structures_for` the target.
        precision: What it is optimised for.
        steps: Steps it was trained for.
        difference: Of its score to that of the given model, on examples that choose; NaN if it was only timed.
        speedup: Over the given model in plain torch.
        size: Bytes on disk.
    """

    structure: str
    precision: str
    steps: int
    difference: float
    speedup: float
    size: int

    def meets(self, target: Target, *, share: float = 1.0) -> bool:
        """Return whether it is fast enough, or this share of it, and small enough."""
        fast = target.speedup is None or self.speedup >= share * target.speedup
        return fast and (target.max_size is None or self.size <= target.max_size)

    def keeps(self, target: Target, *, times: float = 1.0) -> bool:
        """Return whether it lost no more than is allowed, or so many times that."""
        return self.difference >= -times * target.max_drop

    def worth(self, target: Target) -> tuple[bool, bool, bool, float]:
        """Return what the better one of two has more of after a long run.

        The given model may have learned the texts that choose, so only what lost far too much stands behind what is
        too slow.
        """
        hopeful, kept = self.keeps(target, times=HOPE), self.keeps(target)
        return hopeful, hopeful and self.meets(target), kept, self.speedup if kept else self.difference

    def row(self) -> dict[str, str]:
        """Return it as a row of the report."""
        return {
            "tried": f"{self.structure}, {self.precision}",
            "steps": str(self.steps),
            "difference": "-" if math.isnan(self.difference) else f"{self.difference:+.4f}",
            "speed-up": f"{self.speedup:.2f}x",
            "bytes": f"{self.size:,}",
        }


def search(
    shop: Workshop, given: str, fingerprint: str, *, threads: int | None, rounds: int
) -> tuple[Workshop, list[dict[str, str]]]:
    """Time all structures, train those that are fast enough for a short time, and the best of these to the end.

    The next best one follows until one keeps the quality. What chooses is held out of the training examples: neither
    the stages nor the verdict see it.

    Args:
        shop: The run, whose recipe begins with `Search`.
        given: Folder of the given model.
        fingerprint: Of the model and the data.
        threads: Threads that are timed.
        rounds: Timed passes.

    Returns:
        The run with the recipe that was found, whose stages are done, and a row for everything that was tried.
    """
    hunt, target = Hunt(shop, given, fingerprint, threads, rounds), shop.recipe.target
    untrained = hunt.measure(hunt.train_all(share=0.0), share=0.0)
    chosen = choose_fast(untrained, target)
    short = hunt.measure({name: hunt.train(name, share=hunt.short) for name in chosen}, share=hunt.short)
    tried, best = [*(c for c in untrained if c.structure not in chosen), *short], None
    for candidate in rank(short, target):
        if best is not None and hunt.is_late():
            break
        folder = hunt.train(candidate.structure, share=1.0)
        (long,) = hunt.measure({candidate.structure: folder}, candidate.precision, share=1.0)
        tried.append(long)
        if best is None or long.worth(target) > best.worth(target):
            best = long
        if long.keeps(target) and long.meets(target):
            break
    assert best is not None  # there is always the model as it is
    shop.tell(f"search: {best.structure}, {best.precision}")
    return hunt.shop_of(best.structure, best.precision), [candidate.row() for candidate in tried]


def choose_fast(untrained: list[Candidate], target: Target) -> list[str]:
    """Choose the structures that are nearly fast, and small enough, in some precision; the fastest otherwise."""
    if names := list(dict.fromkeys(c.structure for c in untrained if c.meets(target, share=NEAR))):
        return names
    return list(dict.fromkeys(c.structure for c in sorted(untrained, key=lambda c: -c.speedup)))[:FASTEST]


def rank(candidates: list[Candidate], target: Target) -> list[Candidate]:
    """Order what was tried for a short time: each structure once, in its best precision.

    Those that a longer training may mend come first: of these, those that reach a target of speed or size, the best
    score first, and behind them the fastest. What lost too much is last, the best score first.
    """
    asked = target.speedup is not None or target.max_size is not None

    def place(candidate: Candidate) -> tuple[int, float, float]:
        score, speed = -candidate.difference, -candidate.speedup
        if not candidate.keeps(target, times=HOPE):
            return 2, score, speed
        return (0, score, speed) if asked and candidate.meets(target) else (1, speed, score)

    order = sorted(candidates, key=place)
    once: dict[str, Candidate] = {}
    for candidate in order:
        once.setdefault(candidate.structure, candidate)
    return list(once.values())


def timing(target: Target, rounds: int) -> Latency:
    """Return how models are timed: on one thread by processor time, which others on the machine disturb less."""
    tokens = target.tokens if isinstance(target.tokens, int) else None
    return Latency(target.batch, tokens, rounds, "cpu" if torch.get_num_threads() == 1 else "wall")


class Hunt:
    """The runs of one search, whose stages lie beside each other: what is there already is not done again.

    Args:
        shop: The run, whose recipe is a `Search` and a `Distil`.
        given: Folder of the given model.
        fingerprint: Of the model and the data.
        threads: Threads that are timed.
        rounds: Timed passes.
    """

    def __init__(self, shop: Workshop, given: str, fingerprint: str, threads: int | None, rounds: int) -> None:
        stage = cast(Search, shop.recipe.stages[0])
        self.given, self.fingerprint, self.threads, self.rounds = given, fingerprint, threads, rounds
        self.budget, self.short, self.start = stage.budget, stage.short, time.monotonic()
        self.shop, self.distil = shop, cast(Distil, shop.recipe.stages[1])
        self.structures = structures_for(shop.recipe.target)
        self.longest = 0.0  # seconds of a long run

    def train_all(self, *, share: float) -> dict[str, Path]:
        """Train every structure that the model can have, as `train` does; return their folders."""
        folders = {}
        for name in self.structures:
            try:
                folders[name] = self.train(name, share=share)
            except ValueError as error:  # the family has no such units, or its shape does not divide
                self.shop.tell(f"search: not {name}: {error}")
        return folders

    def steps(self, name: str, share: float) -> int:
        """Return for how many steps a structure is trained; what is not changed is not trained."""
        if not self.structures[name] or not share:
            return 0
        return max(FEWEST_STEPS, round(share * self.distil.count_steps(len(self.shop.data.train))))

    def shop_of(self, name: str, precision: str, share: float = 1.0) -> Workshop:
        """Return the run of one structure that is trained for a share of the steps."""
        steps = self.steps(name, share)
        training = (replace(self.distil, steps=steps),) if steps else ()
        stages = (*self.structures[name], *training, Optimize(precision))
        return replace(self.shop, recipe=replace(self.shop.recipe, stages=stages))

    def train(self, name: str, *, share: float) -> Path:
        """Make a structure and train it for a share of the steps; return its folder."""
        start, steps = time.monotonic(), self.steps(name, share)
        self.shop.tell(f"search: {name}{f', {steps} steps' if steps else ''}")
        shop = replace(self.shop_of(name, "float32", share), tell=lambda line: None)
        folder, _ = shop.run(self.given, self.fingerprint)
        if share == 1:
            self.longest = max(self.longest, time.monotonic() - start)
        return folder

    def is_late(self) -> bool:
        """Return whether another long run would end after the budget."""
        return self.budget is not None and time.monotonic() - self.start + self.longest > self.budget

    def measure(self, folders: Mapping[str, Path], precision: str | None = None, *, share: float) -> list[Candidate]:
        """Measure structures in all precisions or in one, beside each other and the given model.

        What was not trained is to be timed: it is scored on a few texts alone.
        """
        target, texts = self.shop.recipe.target, cast(Dataset, self.shop.data.selection)
        can = [p for p in PRECISIONS if not unsupported_reason(cast(Precision, p), True)]
        precisions = can if precision is None else [precision]
        measured = measure(
            {GIVEN: self.given} | {name: str(folder) for name, folder in folders.items()},
            texts if share else texts.select(range(FEWEST)),
            baseline=GIVEN,
            optimized=precisions,
            metrics=find_metrics(self.shop.teacher, target.metric, self.shop.data.columns),
            columns=self.shop.data.columns,
            latency=timing(target, self.rounds),
            threads=self.threads,
            seed=self.shop.recipe.seed,
        )["models"]
        candidates = []
        for name in folders:
            for form in precisions:
                model = measured[f"{name}, {form}"]
                metric = target.metric or next(iter(model["scores"]))
                quality = model["differences"][metric]["value"] if share else math.nan
                speedup, size = model["speed_up"]["median"], model["footprint"]["bytes_on_disk"]
                candidates.append(Candidate(name, form, self.steps(name, share), quality, speedup, size))
        return candidates
