"""The lengths of texts that a model can take."""

from torch import nn


LEARNED = ("position_embeddings", "wpe", "embed_positions")  # the names of tables


def count_positions(model: nn.Module) -> int | None:
    """Count the tokens that a text may have.

    Args:
        model: Any model.

    Returns:
        The learned positions, or the length that the configuration names where none are learned; `None` if there is no
        limit.
    """
    learned = count_learned_positions(model)
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) if learned is None else learned


def count_learned_positions(model: nn.Module) -> int | None:
    """Count the tokens that have a position in a table, of which RoBERTa and its like leave the first to padding.

    Args:
        model: Any model.

    Returns:
        `None` if there is no table.
    """
    tables = [
        table
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in LEARNED
    ]
    return min((table.num_embeddings - _first_position(table) for table in tables), default=None)


def _first_position(table: nn.Embedding) -> int:
    before = 0 if table.padding_idx is None else table.padding_idx + 1
    return getattr(table, "offset", before)
