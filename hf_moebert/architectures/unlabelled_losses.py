"""A loss of each example that needs no label, for the importance of what a model does."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .functional_importance import draw_classes
from .functional_losses import per_example_loss, span_loss, token_loss
from .functional_pooling import pool, unit_length
from .functional_routing import real_tokens
from .heads import kinds_of_outputs


PROBLEMS = {"classes": "single_label_classification", "labels": "multi_label_classification", "numbers": "regression"}
Batch = dict[str, Tensor]


def unlabelled_losses(
    model: PreTrainedModel, batch: Batch, generators: Sequence[np.random.Generator], pooling: str | None
) -> Tensor:
    """Compute the loss of each example on what the model itself says of it.

    With a head, that is its task loss on a label drawn from its own prediction, whose gradients are those of the
    Fisher information. Without one, it is the projection of the embedding, scaled to the length 1, on a direction
    drawn from the normal distribution: its gradients have, in the mean over draws, the square of those of the whole
    embedding.

    Args:
        model: A model that runs on the batch.
        batch: Arguments of `forward`, without labels.
        generators: Of each example, so that what is drawn for it depends on nothing else in the batch.
        pooling: Of the embedding; `None` for a model with a head.

    Returns:
        Shape `(batch,)`.

    Source: our own design; the labels are those of Fisher information, Amari 1998 and Martens 2014,
    https://arxiv.org/abs/1412.1193, section 9.
    """
    outputs = model.forward(**batch)  # not what `model.compile()` made of it, which calls no hooks
    mask = batch.get("attention_mask")
    if pooling is not None:
        embeddings = unit_length(pool(outputs.last_hidden_state, mask, pooling))  # (batch, hidden)
        return (embeddings * _draw(generators, embeddings, normal=True)).sum(-1)
    if "start_logits" in outputs:
        real = real_tokens(mask, outputs.start_logits.shape).to(outputs.start_logits.device)
        lowest = torch.finfo(outputs.start_logits.dtype).min
        ends = [logits.masked_fill(~real, lowest) for logits in (outputs.start_logits, outputs.end_logits)]
        places = [draw_classes(logits, _draw(generators, logits[:, 0])) for logits in ends]
        return span_loss(*ends, *places)
    logits, problem = outputs.logits, PROBLEMS[kinds_of_outputs(model, outputs)["logits"]]
    if logits.dim() == 3:
        return _token_losses(logits, batch, generators, decodes=model.config.is_encoder_decoder)
    if problem == "single_label_classification":
        return per_example_loss(logits, draw_classes(logits, _draw(generators, logits[:, 0])), problem)
    if problem == "regression":
        return per_example_loss(logits, logits.detach() + _draw(generators, logits, normal=True), problem)
    return per_example_loss(logits, (_draw(generators, logits) < logits.sigmoid()).to(logits.dtype), problem)


def _token_losses(logits: Tensor, batch: Batch, generators: Sequence[np.random.Generator], *, decodes: bool) -> Tensor:
    """Draw a label for each real token: `(batch, seq, labels)` to `(batch,)`."""
    real = real_tokens(batch.get("decoder_attention_mask" if decodes else "attention_mask"), logits.shape[:2])
    real = real.to(logits.device)
    uniform = torch.zeros_like(real, dtype=logits.dtype)
    for row, generator in enumerate(generators):  # real tokens alone draw: padding changes nothing
        uniform[row, real[row]] = torch.from_numpy(generator.random(int(real[row].sum()))).to(uniform)
    labels = draw_classes(logits, uniform).masked_fill(~real, -100)  # (batch, seq)
    return token_loss(logits, labels).sum(1) / real.sum(1).clamp(min=1)


def _draw(generators: Sequence[np.random.Generator], like: Tensor, *, normal: bool = False) -> Tensor:
    """Draw numbers for each example, uniform in [0, 1) or normal, of the shape, dtype and device of a tensor."""
    shape = like.shape[1:]
    rows = [generator.standard_normal(shape) if normal else generator.random(shape) for generator in generators]
    return torch.from_numpy(np.asarray(rows)).to(like)
