"""Recipes of the door: which stages a model goes through, in which order, and what must come out."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from transformers.hf_argparser import HfArg

from hf_moebert.inference.linears import check_precision
from hf_moebert.methods.distillation import DistillationConfig
from hf_moebert.methods.platon import PlatonConfig


FORMAT_VERSION = 1
METHODS = ("one-shot", "platon", "masks")  # of pruning


@dataclass(frozen=True)
class Target:
    """Everything that the compressed model must reach.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    speedup: float | None = HfArg(default=None, help="Times as fast as the given model in plain torch.")
    max_size: int | None = HfArg(default=None, help="Bytes of its weights on disk.")
    max_drop: float = HfArg(
        default=0.01,
        help="Largest drop of the score, at least 0. The lower end of the 95 % interval of the difference counts.",
    )
    metric: str | None = HfArg(default=None, help="Score that counts; by default the first one of the task.")
    batch: int = HfArg(default=1, help="Texts in a timed forward pass.")
    tokens: int | str = HfArg(default=128, help='Tokens of each of them, or "real": texts of the verdict.')

    def __post_init__(self) -> None:
        _check(
            self.speedup is None or _is_number(self.speedup, above=1), "speedup", "above 1", self.speedup, "Use 2.0"
        )
        size = self.max_size
        _check(size is None or (type(size) is int and size > 0), "max_size", "a number of bytes", size, "Use 60000000")
        drop = self.max_drop
        _check(_is_number(drop, above=-1e-9), "max_drop", "a finite number of at least 0", drop, "Use 0.01")
        _check(type(self.batch) is int and self.batch > 0, "batch", "a whole number above 0", self.batch, "Use 1")
        counted = type(self.tokens) is int and self.tokens > 0
        _check(counted or self.tokens == "real", "tokens", "a whole number above 0, or real", self.tokens, "Use 128")


@dataclass(frozen=True)
class Search:
    """Try what can be done to the model, for a short time each, and go on with what is best.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    name: ClassVar[str] = "search"
    short: float = HfArg(default=0.1, help="Share of the steps of `distil` that each one tried is trained for.")
    budget: float | None = HfArg(default=None, help="Seconds after which no further training is begun.")

    def __post_init__(self) -> None:
        inside = _is_number(self.short, above=0) and self.short <= 1
        _check(inside, "short", "in (0, 1]", self.short, "Use 0.1")
        budget = self.budget
        _check(budget is None or _is_number(budget, above=0), "budget", "above 0", budget, "Use 1800 for half an hour")


@dataclass(frozen=True)
class DropLayers:
    """Leave out whole layers.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    name: ClassVar[str] = "drop_layers"
    keep: float | list[int] = HfArg(default=0.5, help="Share of the layers that stay, in (0, 1), or their indices.")
    by: str = HfArg(default="position", help='"position": every so many; "importance": by what texts need.')

    def __post_init__(self) -> None:
        is_share = _is_number(self.keep, above=0) and self.keep < 1  # type: ignore[operator]  # a number, then
        is_list = isinstance(self.keep, list) and all(type(index) is int and index >= 0 for index in self.keep)
        _check(is_share or is_list, "keep", "a share in (0, 1), or a list of indices", self.keep, "Use 0.5")
        _check(self.by in ("position", "importance"), "by", "position or importance", self.by, "Use position")

    def count_layers(self, depth: int) -> int:
        """Return how many of so many layers stay."""
        return len(self.keep) if isinstance(self.keep, list) else max(1, round(self.keep * depth))


@dataclass(frozen=True)
class Prune:
    """Remove the least needed neurons and heads, at once or while the model is trained, or single weights.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    name: ClassVar[str] = "prune"
    method: str = HfArg(
        default="one-shot",
        help='"one-shot": at once, without labels; "platon": bit by bit during the `distil` that follows; "masks":'
        " learned in its first part, feed-forward units alone.",
    )
    granularity: str = HfArg(default="structured", help='"structured", or with platon "unstructured" or "2:4".')
    keep_ratio: float | None = HfArg(default=None, help="Share of the weights that stays, in (0, 1).")
    speed_up: float | None = HfArg(
        default=None, help="Times as fast as the model was, instead, by a table measured on this machine."
    )
    multiple_of: int = HfArg(default=8, help="Neurons of each layer are a multiple of this.")
    uniform: bool = HfArg(default=False, help="One width for all layers: a stock model, which loads without us.")

    def __post_init__(self) -> None:
        _check(self.method in METHODS, "method", " or ".join(METHODS), self.method, "Use one-shot")
        if (self.keep_ratio is None) == (self.speed_up is None):
            raise ValueError(
                "`prune` must have exactly one of `keep_ratio` and `speed_up`, got "
                f"{self.keep_ratio} and {self.speed_up}. Use keep_ratio: 0.5."
            )
        ratio = self.keep_ratio
        _check(
            ratio is None or (_is_number(ratio, above=0) and ratio < 1), "keep_ratio", "in (0, 1)", ratio, "Use 0.5"
        )
        if self.method == "platon":
            self.platon()
        elif self.granularity != "structured":
            raise ValueError(
                f"`granularity` must be structured for the method {self.method}, got {self.granularity!r}. Use platon."
            )
        elif self.method == "masks" and (self.keep_ratio is None or self.uniform):
            raise ValueError(
                "`prune` by masks must have a `keep_ratio`, and no `uniform`, got "
                f"{self.keep_ratio} and {self.uniform}. Use one-shot for a time or one width."
            )

    @property
    def acts_while_training(self) -> bool:
        """Return whether it acts during the `distil` that follows."""
        return self.method != "one-shot"

    def platon(self, **timing: Any) -> PlatonConfig:
        """Return the recipe of the callback."""
        goal = {"keep_ratio": self.keep_ratio} if self.speed_up is None else {"speed_up": self.speed_up}
        return PlatonConfig(granularity=self.granularity, **goal, **timing)


@dataclass(frozen=True)
class Experts:
    """Cut the feed-forward networks into experts.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    name: ClassVar[str] = "experts"
    num_experts: int = HfArg(default=4, help="Experts per layer.")
    routing: str = HfArg(default="gate-sentence", help="hash-random, hash-balanced, gate-token or gate-sentence.")
    expert_size: int | None = HfArg(default=None, help="Neurons per expert; by default intermediate / num_experts.")
    importance_examples: int = HfArg(default=1024, help="Training examples that the importance is measured on.")

    def __post_init__(self) -> None:
        for name in ("num_experts", "importance_examples"):
            value = getattr(self, name)
            _check(type(value) is int and value > 0, name, "a whole number above 0", value, "Use 4, or 1024")


@dataclass(frozen=True)
class Distil:
    """Train: the given model teaches what has become of it.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    name: ClassVar[str] = "distil"
    steps: int | None = HfArg(default=None, help="Steps of the optimizer; by default by `epochs`.")
    epochs: float = HfArg(default=2.0, help="Passes over the texts.")
    learning_rate: float = HfArg(default=5e-5, help="Largest learning rate.")
    batch_size: int = HfArg(default=16, help="Texts in a step.")
    warmup: float = HfArg(default=0.06, help="Share of the steps in which the learning rate rises.")
    weight: float = HfArg(default=1.0, help="Weight of the teacher's part of the loss.")
    hidden_states: bool = HfArg(default=True, help="Whether the student follows the hidden states, too.")
    dropout: bool = HfArg(default=True, help="Whether the model is trained with the dropout of its configuration.")

    def __post_init__(self) -> None:
        _check(
            self.steps is None or (type(self.steps) is int and self.steps > 0),
            "steps",
            "above 0",
            self.steps,
            "Use 600",
        )
        for name in ("epochs", "learning_rate", "batch_size"):
            value = getattr(self, name)
            _check(_is_number(value, above=0), name, "a finite number above 0", value, "Leave it out")
        _check(
            _is_number(self.warmup, above=-1e-9) and self.warmup < 1, "warmup", "in [0, 1)", self.warmup, "Use 0.06"
        )
        self.distillation()

    def count_steps(self, examples: int) -> int:
        """Return how many steps so many examples make."""
        return self.steps or max(1, round(self.epochs * examples / self.batch_size))

    def distillation(self, **layers: Any) -> DistillationConfig:
        """Return the recipe of the Trainer."""
        return DistillationConfig(weight=self.weight, hidden_states=self.hidden_states, **layers)


@dataclass(frozen=True)
class TrimVocabulary:
    """Leave out the tokens that no given text uses, with their rows of the word embeddings.

    Raises:
        ValueError: If a value breaks the rule in its help text.
    """

    name: ClassVar[str] = "trim_vocabulary"
    coverage: float = HfArg(
        default=1.0, help="Share of the tokens of the texts that stay, in (0, 1]; below 1 the rarest go, too."
    )

    def __post_init__(self) -> None:
        inside = _is_number(self.coverage, above=0) and self.coverage <= 1
        _check(inside, "coverage", "in (0, 1]", self.coverage, "Use 1")


@dataclass(frozen=True)
class Pack:
    """Save only the weights that are not zero."""

    name: ClassVar[str] = "pack"


@dataclass(frozen=True)
class Optimize:
    """Choose the precision in which the model is to run, by `optimize_for_inference`.

    Raises:
        ValueError: If the precision is not known, or this machine cannot compute in it.
    """

    name: ClassVar[str] = "optimize"
    precision: str = HfArg(default="float32", help="float32, bfloat16 or int8.")

    def __post_init__(self) -> None:
        check_precision(self.precision)  # type: ignore[arg-type]  # checked there


Stage = Search | DropLayers | Prune | Experts | Distil | TrimVocabulary | Pack | Optimize
STAGES: dict[str, type[Stage]] = {
    cls.name: cls for cls in (Search, DropLayers, Prune, Experts, Distil, TrimVocabulary, Pack, Optimize)
}
EXPORTS = {"onnx": "float32", "onnx-int8": "int8"}  # forms for ONNX Runtime, by their precision
# Each of these works on what those before it made; the other way round it is refused, or worth less.
ORDER = ("drop_layers", "prune", "experts", "trim_vocabulary", "pack", "optimize")


@dataclass(frozen=True)
class Recipe:
    """Stages in their order, and what must come out.

    Raises:
        ValueError: If the stages cannot follow each other so; the message names an order that works.
    """

    stages: tuple[Stage, ...]
    target: Target = field(default_factory=Target)
    export: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if unknown := [form for form in self.export if form not in EXPORTS]:
            raise ValueError(f"`export` must hold {' or '.join(EXPORTS)}, got {unknown[0]!r}. Leave it out.")
        if not names:
            raise ValueError("`stages` must hold at least one stage, got none. Use optimize to begin with.")
        if "search" in names and names != ["search", "distil"]:
            raise ValueError(
                f"`search` must be followed by distil alone, got {', '.join(names)}: it chooses the others. Drop them."
            )
        if repeated := sorted({name for name in names if name != "distil" and names.count(name) > 1}):
            raise ValueError(f"`stages` must hold each of {', '.join(ORDER)} once, got {repeated[0]} again. Drop one.")
        changing = [name for name in names if name in ORDER]
        if changing != sorted(changing, key=ORDER.index):
            works = ", ".join(sorted(changing, key=ORDER.index))
            raise ValueError(f"`stages` must be in the order {works}, got {', '.join(changing)}. Swap them.")
        for stage in (stage for stage in self.stages if isinstance(stage, Prune) and stage.acts_while_training):
            if "distil" not in names[names.index("prune") + 1 :][:1]:
                raise ValueError(
                    f"`distil` must follow `prune` by {stage.method}, which prunes while it trains, got "
                    f"{', '.join(names)}. Put distil behind it, or use the method one-shot."
                )
            if stage.method == "masks" and "experts" in names:
                raise ValueError(
                    f"`prune` by masks must not be followed by experts, got {', '.join(names)}: both change the same "
                    "networks. Use one-shot."
                )
            if stage.granularity != "structured" and {"experts", "optimize"} & set(names):
                raise ValueError(
                    f"`prune` of {stage.granularity} must be followed by distil and pack alone, got "
                    f"{', '.join(names)}: neither experts nor optimised forms keep its zeros. Use structured."
                )
        if "distil" in names[names.index("trim_vocabulary") :] if "trim_vocabulary" in names else False:
            raise ValueError(
                f"`trim_vocabulary` must follow distil, got {', '.join(names)}: while it learns, the model reads the "
                "tokens of its teacher. Swap them."
            )
        if "distil" in names and names[-1] == "distil" and "distil" in names[-2:-1]:
            raise ValueError("`distil` must not follow another one, got two. Give one of them all steps.")

    @property
    def precision(self) -> str | None:
        """Precision in which the result runs; `None` as it is."""
        return next((stage.precision for stage in self.stages if isinstance(stage, Optimize)), None)

    def as_dict(self) -> dict[str, Any]:
        """Return what a file of this recipe says."""
        stages = [{stage.name: asdict(stage)} for stage in self.stages]
        return {
            "version": FORMAT_VERSION,
            "target": asdict(self.target),
            "stages": stages,
            "export": list(self.export),
            "seed": self.seed,
        }


def _check(holds: bool, name: str, rule: str, value: Any, remedy: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}. {remedy}.")


def _is_number(value: Any, *, above: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > above
