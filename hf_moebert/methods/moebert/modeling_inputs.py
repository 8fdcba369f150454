"""Checks of the inputs of a mixture of experts, which would fail later without a reason."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .modeling_surgery import get_part


def check_inputs(body: Any, given: dict[str, Any]) -> None:
    """Refuse inputs that would fail later without a reason, or on a GPU take the whole process down.

    Args:
        body: A mixture without its head.
        given: Arguments of its `forward`.

    Raises:
        ValueError: If ids, lengths or types do not fit.
    """
    if body.main_input_name != "input_ids":
        return
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if ids is None and body.router is not None:
        raise ValueError(
            f"`inputs_embeds` cannot be routed by `routing` {body.config.routing!r}, which looks token ids up. Give "
            "`input_ids`, or convert with a gate."
        )
    tokens: Any = embeds if ids is None else ids
    limit = None if given.get("position_ids") is not None else find_max_length(body)
    if tokens.shape[1] == 0 or (limit and tokens.shape[1] > limit):
        raise ValueError(
            f"Sequences must have 1 to {limit or 'any number of'} tokens, got {tokens.shape[1]}. Truncate longer ones."
        )
    if tokens.shape[0] == 0:
        raise ValueError("A batch must have at least one row, got none. Leave it out.")
    vocab = body.get_input_embeddings().num_embeddings
    if body.router is not None and body.router.table.shape[1] != vocab:
        raise ValueError(
            f"`router.table` must have a column for each of {vocab} token ids, got {body.router.table.shape[1]}. Use "
            "`resize_token_embeddings`, which changes both."
        )
    if ids is None or torch.compiler.is_compiling():
        return
    if ids.is_floating_point():
        raise ValueError(f"`input_ids` must be integers, got {ids.dtype}. Give embeddings as `inputs_embeds`.")
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        row, column = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"`input_ids` must be in [0, {vocab}), got {int(ids[row, column])} at row {row}, position {column}. Use "
            "the model's own tokenizer, or `resize_token_embeddings` after adding tokens."
        )


def check_table(model: Any, source: Any) -> None:
    """Refuse tables that name experts which do not exist.

    Args:
        model: A mixture that was loaded.
        source: Where from.

    Raises:
        ValueError: If one does.
    """
    router, experts = model.base_model.router, model.config.num_experts
    if router is None or router.table.is_meta:
        return
    wrong = router.table[router.table >= experts]
    if wrong.numel():
        raise ValueError(
            f"`router.table` of {str(source)!r} must name experts in [0, {experts}), got {int(wrong[0])}. Get the "
            "checkpoint again."
        )


def find_max_length(body: PreTrainedModel) -> int | None:
    """Return the tokens for which a body has positions; `None` if it computes them."""
    table = get_part(body, "embeddings.position_embeddings")
    if not isinstance(table, nn.Embedding):
        return None
    first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from behind the padding's
    return table.num_embeddings - first


def check_classes(model: Any, given: dict[str, Any]) -> None:
    """Refuse classes that a head does not have, before a GPU aborts the process over them.

    Args:
        model: A mixture with a head.
        given: Arguments of its `forward`.

    Raises:
        ValueError: If there is one.
    """
    labels, count = given.get("labels"), getattr(model, "num_labels", 1)  # language models have no `num_labels`
    if not isinstance(labels, Tensor) or torch.compiler.is_compiling() or count == 1 or labels.is_floating_point():
        return
    if model.config.problem_type in ("regression", "multi_label_classification"):
        return
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= count))]
    if wrong.numel():
        raise ValueError(
            f"`labels` must be in [0, {count}) or -100, got {int(wrong[0])}. Map the data set's labels to the model's "
            "`label2id`, or set `num_labels`."
        )
