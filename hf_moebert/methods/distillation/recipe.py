"""The recipe of a distillation run."""

import math
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moebert.architectures.functional_pooling import POOLINGS


DISTANCES = ("cosine", "squared")


@dataclass(frozen=True)
class DistillationConfig:
    """The recipe of a distillation: how strongly, and in which layers, a student follows its teacher.

    Raises:
        ValueError: If a value breaks the rule in its help text; the message names rule and remedy.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, layer-wise distillation; `temperature` without
    `hidden_states` is the recipe of Wei et al. 2022, https://arxiv.org/abs/2107.05377. That of embeddings and scores
    is our own, of terms that `functional_embeddings.py` gives the sources of.
    """

    weight: float = HfArg(
        default=1.0,
        help="Weight of the distillation loss against the task loss, finite and at least 0. The paper searches 1 to 5;"
        " with 0 the student trains on the task alone.",
    )
    layer_map: list[int] | None = HfArg(
        default=None,
        help="The teacher layer that each student layer follows, one number per student layer, both counted from 1:"
        " `2 4 6` lets a student of three layers follow every other one of six. The embedding outputs always follow"
        " each other. By default layer follows layer, which needs equal depths.",
    )
    mask_padding: bool = HfArg(
        default=True,
        help="Whether padding is left out, so that an example's loss depends on its own tokens only. False averages"
        " over all positions, as the paper's code does.",
    )
    reference_teacher_dropout: bool = HfArg(
        default=False,
        help="Whether dropout stays on in the teacher, as in the paper's code, which makes its targets noisy.",
    )
    hidden_states: bool = HfArg(
        default=True,
        help="Whether the student follows the teacher's hidden states too. False: predictions alone, for which depths"
        " and hidden sizes may differ.",
    )
    projection: bool = HfArg(
        default=False,
        help="Whether a linear map from the student's hidden states to the teacher's is learned beside the student, so"
        " that hidden sizes may differ; for models without a head also of their embeddings.",
    )
    temperature: float | None = HfArg(
        default=None,
        help="Predictions follow the teacher's, both softened by this temperature, in cross-entropy times its square;"
        " 2 in the published code. By default they are compared by the symmetric divergence, without temperature.",
    )
    pooling: str | None = HfArg(
        default=None,
        help="For models without a head: how hidden states become an embedding, `mean` over the real tokens, `cls` or"
        " `last`. By default as `modules.json` in the teacher's folder says.",
    )
    embedding_distance: str = HfArg(
        default="cosine",
        help="For models without a head: the distance of embeddings, `cosine` (one minus it) or `squared` (mean of the"
        " squared differences, for embeddings that are not compared by cosines).",
    )
    similarity_weight: float = HfArg(
        default=1.0,
        help="For models without a head: weight of the similarities inside a batch against the distance of embeddings,"
        " finite and at least 0. They need at least two texts in a batch, and depend on which these are.",
    )
    similarity_temperature: float | None = HfArg(
        default=None,
        help="Similarities are compared by the divergence of the softmax over each text's neighbours at this"
        " temperature. By default by the mean squared difference of the cosines.",
    )
    group_column: str | None = HfArg(
        default=None,
        help="For models with one score: column of whole numbers that say to which query a text belongs. The margins"
        " between the texts of one query in a batch then follow the teacher's, too.",
    )

    def __post_init__(self) -> None:
        if not _is_weight(self.weight):
            raise ValueError(
                f"`weight` must be a finite number of at least 0, got {self.weight!r}. Use 1.0 to start with, or 0 for"
                " the task loss alone."
            )
        if self.layer_map is not None and not _is_layer_list(self.layer_map):
            raise ValueError(
                f"`layer_map` must list layer numbers counted from 1, got {self.layer_map!r}. Use [2, 4, 6] for a"
                " student of three layers and a teacher of six; embeddings need no entry."
            )
        for name in ("mask_padding", "reference_teacher_dropout", "hidden_states", "projection"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}. Write it unquoted.")
        if self.layer_map is not None and not self.hidden_states:
            raise ValueError(
                f"`layer_map` must be None when `hidden_states` is False, got {self.layer_map!r}. Drop one of the two."
            )
        for name, usual in (("temperature", 2.0), ("similarity_temperature", 0.05)):
            value = getattr(self, name)
            if value is not None and not (_is_weight(value) and value > 0):
                raise ValueError(f"`{name}` must be None or a finite number above 0, got {value!r}. Use {usual}.")
        self._check_embeddings()

    def _check_embeddings(self) -> None:
        for name, known in (("pooling", (None, *POOLINGS)), ("embedding_distance", DISTANCES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}. Leave it out"
                    " for the default."
                )
        if not _is_weight(self.similarity_weight):
            raise ValueError(
                f"`similarity_weight` must be a finite number of at least 0, got {self.similarity_weight!r}. Use 1.0"
                " to start with, or 0 to leave similarities out."
            )
        if self.group_column is not None and not (isinstance(self.group_column, str) and self.group_column):
            raise ValueError(f"`group_column` must be None or the name of a column, got {self.group_column!r}.")

    def teacher_layers(self, student_depth: int, teacher_depth: int) -> list[int]:
        """Return the hidden state of the teacher that each hidden state of the student follows.

        Args:
            student_depth: Layers of the student.
            teacher_depth: Layers of the teacher.

        Returns:
            One index per hidden state of the student, embeddings (0) first. Length `student_depth + 1`; empty if
            `hidden_states` is False.

        Raises:
            ValueError: If the depths differ and `layer_map` is not set, or if `layer_map` does not fit the depths.
        """
        if not self.hidden_states:
            return []
        example = [round((k + 1) * teacher_depth / student_depth) for k in range(student_depth)]
        if self.layer_map is None:
            if student_depth != teacher_depth:
                raise ValueError(
                    f"`layer_map` must be set when the depths differ, got a student of {student_depth} and a teacher"
                    f" of {teacher_depth} layers. Use layer_map={example} to spread the layers evenly."
                )
            return list(range(student_depth + 1))
        if len(self.layer_map) != student_depth or max(self.layer_map) > teacher_depth:
            raise ValueError(
                f"`layer_map` must have one number from 1 to {teacher_depth} for each of the {student_depth} layers of"
                f" the student, got {list(self.layer_map)}. Use layer_map={example} to spread the layers evenly."
            )
        return [0, *self.layer_map]


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_layer_list(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 1 for layer in value)
