"""The head of a model: what stands beside its body."""

from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import find_labels


logger = logging.get_logger(__name__)
Kind = Literal["classes", "labels", "numbers"]


def find_untrained(model: PreTrainedModel) -> list[str]:
    """List the layers of the head that are as transformers draws those that a checkpoint lacks: of zero bias.

    Args:
        model: Any model; output embeddings and layers without bias tell nothing.
    """
    body, outputs = set(model.base_model.modules()), model.get_output_embeddings()
    untrained = []
    for name, layer in model.named_modules():
        told = type(layer) is nn.Linear and layer not in body and layer is not outputs and layer.bias is not None
        if told and not layer.bias.is_meta and not layer.bias.any():
            untrained.append(name)
    return untrained


def warn_of_untrained_head(model: PreTrainedModel, use: str) -> None:
    """Warn of the layers that `find_untrained` lists.

    Args:
        model: Any model.
        use: What would follow a head that knows nothing.
    """
    if untrained := find_untrained(model):
        logger.warning(
            f"The head of the {type(model).__name__} looks untrained: `{'`, `'.join(untrained)}` has a bias of zeros, "
            f"and {use} would follow a random one. Fine-tune the model first."
        )


def kinds_of_outputs(model: PreTrainedModel, outputs: Any) -> dict[str, Kind]:
    """Name the outputs that a model answers by: logits of "classes", of independent "labels", or "numbers".

    Args:
        model: Any model.
        outputs: What its forward returned.
    """
    if "start_logits" in outputs:
        return {"start_logits": "classes", "end_logits": "classes"}
    if "logits" not in outputs:
        return {"last_hidden_state": "numbers"}
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression" or outputs["logits"].shape[-1] == 1:
        return {"logits": "numbers"}
    return {"logits": "labels" if problem == "multi_label_classification" else "classes"}


def has_head(model: PreTrainedModel) -> bool:
    """Return whether a model predicts something, or gives hidden states alone.

    Args:
        model: Any model, without adapters around it.
    """
    return model.base_model is not model or bool(find_labels(type(model)))


def kind_of(model: PreTrainedModel) -> str:
    """Return the kind of a model, by which the runtime and the server know what it can answer."""
    if not has_head(model):
        return "embedding"
    names = [cls.__name__ for cls in type(model).__mro__]
    for head, kind in (("TokenClassification", "tagging"), ("QuestionAnswering", "question-answering")):
        if any(name.endswith(f"For{head}") for name in names):
            return kind
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return "other"
    known = {"multi_label_classification": "multi-label", "regression": "regression"}
    usual = "reranking" if model.config.num_labels == 1 else "classification"
    return known.get(model.config.problem_type, usual)
