"""Turn a dense model into experts that share central tensors, whatever its architecture."""

from typing import Any

from transformers import PreTrainedModel

from .modeling_bert import MPOEBertForSequenceClassification
from .modeling_gpt2 import MPOEGPT2LMHeadModel
from .modeling_mpoe import MPOEMixin
from .modeling_t5 import MPOET5ForConditionalGeneration


CLASSES: tuple[type[MPOEMixin], ...] = (
    MPOEBertForSequenceClassification,
    MPOEGPT2LMHeadModel,
    MPOET5ForConditionalGeneration,
)


def from_dense(model: PreTrainedModel, **options: Any) -> MPOEMixin:
    """Convert a dense model with the class of ours that extends the model's own.

    Args:
        model: `BertForSequenceClassification`, `GPT2LMHeadModel` or `T5ForConditionalGeneration`. It is not changed.
        **options: As for `from_dense` of the class, such as `num_experts` and `layers`.

    Returns:
        The new model, in eval mode.

    Raises:
        ValueError: If no class fits the model, or the model or an option does not fit its class.
    """
    for cls in CLASSES:
        if isinstance(model, cls.dense_class()):
            return cls.from_dense(model, **options)
    names = ", ".join(cls.dense_class().__name__ for cls in CLASSES)
    raise ValueError(
        f"`model` must be one of {names}, got {type(model).__name__}. Load the checkpoint with one of these classes, "
        "or merge its adapter."
    )
