"""The classes of transformers for each family and head."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .families import ARCHITECTURES, name_family


# Where transformers names the class of each family for a head, by the name of the Auto class
HEADS: dict[str, Any] = {
    "AutoModel": modeling_auto.MODEL_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}


def stock_classes(dense: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Return the classes of a family that methods take, by the name of the Auto class.

    Args:
        dense: Configuration of the family. There are none for that of a compressed form.
    """
    found: dict[str, type[PreTrainedModel]] = {}
    for auto, mapping in HEADS.items() if dense.model_type in ARCHITECTURES else ():
        stock = mapping.get(dense, None)
        if stock is not None and not (auto == "AutoModelForCausalLM" and "AutoModelForMaskedLM" in found):
            found[auto] = stock[0] if isinstance(stock, tuple) else stock
    return found


def refuse_other_classes(model: PreTrainedModel, known: Iterable[type[PreTrainedModel]]) -> None:
    """Refuse a model that is of none of some classes.

    Raises:
        ValueError: If it is not; the message names them.
    """
    if type(model) not in (known := list(known)):
        names = sorted(cls.__name__ for cls in known) or f"the dense classes of {name_family(model)!r}"
        raise ValueError(
            f"`model` must be one of {names}, got {type(model).__name__}. Load a dense checkpoint with one of these, "
            "and merge adapters."
        )


__all__ = ["refuse_other_classes", "stock_classes"]
