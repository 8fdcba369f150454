"""The words of each row, packed to its front, and unpacked again."""

import torch
from torch import Tensor


def pack_words(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the words of each row to its front, in their order, and drop positions that no row needs.

    Args:
        values: Entry of each position. Shape `(batch, seq, ...)`.
        mask: True at words; any pattern, also none. Shape `(batch, seq)`.

    Returns:
        The entries, zero where a row has no more words, shape `(words, batch, ...)`; the number of words of each row,
        shape `(batch,)`; and the position that each word came from, shape `(batch, words)`.
    """
    lengths = mask.sum(1)  # (batch,)
    words = int(lengths.max()) if len(lengths) else 0
    real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]  # (batch, seq)
    if torch.equal(real, mask):  # the words already come first
        positions = torch.arange(words, device=mask.device).expand(len(mask), words)
    else:
        positions = torch.argsort(~mask, dim=1, stable=True)[:, :words]  # (batch, words)
        values = values[torch.arange(len(mask), device=mask.device)[:, None], positions]
    packed = values[:, :words].transpose(0, 1).contiguous()  # (words, batch, ...)
    if not real[:, :words].all():
        absent = ~real[:, :words].T  # (words, batch)
        packed = packed.masked_fill(absent.view(*absent.shape, *[1] * (packed.dim() - 2)), 0)
    return packed, lengths, positions


def unpack_words(packed: Tensor, mask: Tensor, positions: Tensor, *, fill: float) -> Tensor:
    """Put the entries of words back where `pack_words` took them from, and `fill` everywhere else.

    Args:
        packed: Shape `(words, batch, ...)`.
        mask: As for `pack_words`. Shape `(batch, seq)`.
        positions: From `pack_words`. Shape `(batch, words)`.
        fill: Entry of the positions that are not words.

    Returns:
        Shape `(batch, seq, ...)`.
    """
    spread = packed.new_zeros(*mask.shape, *packed.shape[2:])  # (batch, seq, ...)
    rows = torch.arange(len(mask), device=mask.device)[:, None]  # (batch, 1)
    spread[rows, positions] = packed.transpose(0, 1)
    return spread.masked_fill(~mask.view(*mask.shape, *[1] * (packed.dim() - 2)), fill)
