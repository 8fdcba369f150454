"""The head of a model: what stands beside its body."""

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def warn_of_untrained_head(model: PreTrainedModel, use: str) -> None:
    """Warn if a layer of the head is as transformers draws one that a checkpoint lacks: its bias is exactly zero.

    Args:
        model: Any model; output embeddings and layers without bias tell nothing.
        use: What would follow a head that knows nothing.
    """
    body, outputs = set(model.base_model.modules()), model.get_output_embeddings()
    untrained = []
    for name, layer in model.named_modules():
        told = type(layer) is nn.Linear and layer not in body and layer is not outputs and layer.bias is not None
        if told and not layer.bias.is_meta and not layer.bias.any():
            untrained.append(name)
    if untrained:
        logger.warning(
            f"The head of the {type(model).__name__} looks untrained: `{'`, `'.join(untrained)}` has a bias of zeros, "
            f"and {use} would follow a random one. Fine-tune the model first."
        )
