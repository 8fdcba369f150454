"""Recipe of a sweep over splits of an encoder into frozen layers and branches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg


INITS = ("teacher", "next", "random")


@dataclass(frozen=True)
class MultiTaskSweepConfig:
    """Recipe of a sweep: which splits of the encoder to try, and how to distil deep branches into shallow ones.

    Raises:
        ValueError: If a value breaks the rule in its help text; the message names rule and remedy.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377; the defaults are those of a base model with 12 layers.
    """

    teacher_layers: list[int] = HfArg(
        default_factory=lambda: list(range(4, 11)),
        help="Numbers of top layers to try for the teacher of a task; the layers below stay frozen. The best on the"
        " dev examples is kept, of equal ones the one with fewer layers.",
    )
    student_layers: list[int] = HfArg(
        default_factory=lambda: [1, 2, 3],
        help="Numbers of layers to try for the branch of a task. Where the teacher has no more, it is the branch.",
    )
    student_init: str = HfArg(
        default="teacher",
        help="Initial layers of a branch: the first ones of its teacher (`teacher`), those of the encoder after the"
        " frozen ones (`next`), or random ones (`random`). Pooler and head are those of the teacher.",
    )
    temperature: float = HfArg(
        default=2.0,
        help="Temperature that softens predictions of teacher and student, above 0; 2 in the published code.",
    )
    min_gain: float = HfArg(
        default=1.0,
        help="Points (hundredths of a score) that one more layer must gain on the dev examples of a task; at least 0."
        " The paper tries 1, 2 and 3.",
    )

    def __post_init__(self) -> None:
        for name in ("teacher_layers", "student_layers"):
            if not _is_layer_list(getattr(self, name)):
                raise ValueError(
                    f"`{name}` must list different numbers of layers from 1 up, got {getattr(self, name)!r}. Use"
                    " [1, 2, 3]."
                )
        if max(self.student_layers) > max(self.teacher_layers):
            raise ValueError(
                f"`student_layers` must not go beyond the largest of `teacher_layers`, {max(self.teacher_layers)}, got"
                f" {list(self.student_layers)}. Drop the larger ones, or add larger `teacher_layers`."
            )
        if self.student_init not in INITS:
            raise ValueError(f"`student_init` must be one of {', '.join(INITS)}, got {self.student_init!r}.")
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"`temperature` must be a finite number above 0, got {self.temperature!r}. Use 2.0.")
        if not (_is_number(self.min_gain) and self.min_gain >= 0):
            raise ValueError(f"`min_gain` must be a finite number of at least 0, got {self.min_gain!r}. Use 1.0.")

    def check_depth(self, depth: int) -> None:
        """Refuse an encoder with fewer layers than the largest teacher.

        Args:
            depth: Layers of the encoder.

        Raises:
            ValueError: If a teacher has more layers.
        """
        if max(self.teacher_layers) > depth:
            raise ValueError(
                f"`teacher_layers` must be in [1, {depth}] for an encoder of {depth} layers, got"
                f" {list(self.teacher_layers)}. Use {list(range(max(1, depth // 3), depth))}."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_layer_list(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value or len(set(value)) < len(value):
        return False
    return all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 1 for layer in value)
