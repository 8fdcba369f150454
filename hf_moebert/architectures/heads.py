"""The head of a model: what stands beside its body."""

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


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
