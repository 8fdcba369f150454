# Copied from hf_moebert/architectures/functional_routing.py by `make copies`; edit there.
"""The equations that every router of tokens to experts needs: which tokens are real, load, and balance."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def real_tokens(attention_mask: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Mark which of the newest tokens are not padding, from any kind of attention mask.

    Args:
        attention_mask: `None`, or of any dtype and shape `(batch, past + seq)`, or boolean or additive of shape
            `(batch, 1, seq, past + seq)`, where a real token is one that some other may look at.
        shape: `(batch, seq)`.

    Returns:
        True at real tokens. Shape `(batch, seq)`.
    """
    if attention_mask is None:
        return torch.ones(tuple(shape), dtype=torch.bool)
    if attention_mask.dim() == 2:
        return attention_mask.to(torch.bool)[:, -shape[1] :]
    allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0  # 0, or very negative
    return allowed.flatten(1, -2).any(dim=1)[:, -shape[1] :]


def expert_load(index: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """Count the tokens that each expert gets.

    Args:
        index: Experts of each token. Shape `(tokens, top_k)`.
        mask: True at the tokens that count. Shape `(tokens,)`.
        num_experts: Number of experts.

    Returns:
        Shape `(experts,)`, int64.
    """
    return (F.one_hot(index, num_experts).sum(dim=1) * mask[:, None]).sum(dim=0)


def balance_loss(logits: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Penalise a router for using its experts unevenly.

    Args:
        logits: Shape `(tokens, experts)`.
        index: Experts of each token. Shape `(tokens, top_k)`.
        mask: True at the tokens that count. Shape `(tokens,)`.

    Returns:
        `experts * sum(share of choices * mean probability)`: 1 if both are uniform, the number of experts if one
        gets all. Scalar; the shares carry no gradient.

    Source: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, section 2.2.
    """
    num_experts, total = logits.shape[-1], mask.sum().clamp(min=1)
    weight = mask / total  # (tokens,)
    probability = (logits.float().softmax(dim=-1) * weight[:, None]).sum(dim=0)  # (experts,)
    share = expert_load(index, mask, num_experts) / (total * index.shape[1])  # (experts,)
    return num_experts * (share * probability).sum()
