"""The equations of MoEBERT on tensors.

Source of all of them, unless said otherwise: Zuo et al. 2022, https://arxiv.org/abs/2204.07675.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def assign_neurons(importance: Tensor, num_experts: int, expert_size: int, num_shared: int) -> Tensor:
    """Deal the neurons of one dense feed-forward layer out to its experts.

    Every expert gets the `num_shared` most important neurons; the others are dealt like cards, in order of
    importance, so that expert `e` also gets neurons `e, e + num_experts, e + 2 * num_experts, ...` of the rest.

    Args:
        importance: Score of each neuron, larger is kept first; ties go to the smaller index. Shape `(intermediate,)`.
        num_experts: Number of experts.
        expert_size: Neurons per expert.
        num_shared: Neurons that every expert holds.

    Returns:
        Index of each expert's neurons in the dense layer, ascending. Shape `(num_experts, expert_size)`.

    Raises:
        ValueError: If the neurons left after sharing are too few to fill every expert.

    Source: section 3.2.
    """
    own = expert_size - num_shared
    rest = importance.numel() - num_shared
    if not 0 <= own <= rest // num_experts:
        raise ValueError(
            f"`expert_size` must be in [{num_shared}, {num_shared + max(rest, 0) // num_experts}] for {num_experts} "
            f"experts that share {num_shared} of {importance.numel()} neurons, got {expert_size}. Share more neurons, "
            "or make the experts smaller."
        )
    order = torch.sort(importance, descending=True, stable=True).indices  # (intermediate,)
    shared = order[:num_shared].expand(num_experts, -1)  # (experts, num_shared)
    dealt = order[num_shared : num_shared + own * num_experts].view(own, num_experts).T  # (experts, own)
    return torch.cat([shared, dealt], dim=1).sort(dim=1).values  # ascending: one full expert is the dense layer


def cut_experts(
    up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, *, index: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Copy each expert's neurons out of a dense feed-forward layer; every expert gets the whole output bias.

    Args:
        up: One matrix above the other, where the network has a gate before its up-projection. Shape
            `(gates * intermediate, hidden)`.
        up_bias: Shape `(gates * intermediate,)`.
        down: Shape `(hidden, intermediate)`.
        down_bias: Shape `(hidden,)`.
        index: Neurons of each expert, from `assign_neurons`. Shape `(experts, expert_size)`.

    Returns:
        The stacks `(experts, gates * expert_size, hidden)`, `(experts, gates * expert_size)`, `(experts, hidden,
        expert_size)` and `(experts, hidden)`; no biases where there are none.

    Source: section 3.2.
    """
    index = index.to(up.device)
    units = down.shape[1]
    rows = torch.cat([index + start for start in range(0, len(up), units)], dim=1)  # (experts, gates * expert_size)
    cut_down = down[:, index].transpose(0, 1).contiguous()  # (experts, hidden, expert_size)
    bias = None if up_bias is None else up_bias[rows]
    return up[rows], bias, cut_down, None if down_bias is None else down_bias.repeat(len(index), 1)


def random_table(vocab_size: int, num_experts: int, *, generator: Generator) -> Tensor:
    """Assign each token id to an expert drawn uniformly.

    Returns:
        Expert of each token id. Shape `(vocab,)`, dtype uint8.

    Source: the paper's "hash-random" routing.
    """
    return torch.randint(num_experts, (vocab_size,), generator=generator, device=generator.device).to(torch.uint8)


def balanced_table(token_counts: Tensor, num_experts: int, *, generator: Generator) -> Tensor:
    """Assign token ids to experts so that each expert sees about the same share of a corpus.

    Ids are taken by falling count (ties by id) and each goes to the expert with the smallest load so far (ties to
    the lowest expert). Ids that the corpus never shows go to a random expert.

    Args:
        token_counts: Occurrences of each token id in the corpus. Shape `(vocab,)`.
        num_experts: Number of experts.
        generator: Where the randomness for unseen ids comes from.

    Returns:
        Expert of each token id. Shape `(vocab,)`, dtype uint8.

    Source: the paper's "hash-balance" routing; the order among ties is our own.
    """
    table = random_table(token_counts.numel(), num_experts, generator=generator)
    counts = token_counts.tolist()
    loads = [0] * num_experts
    for token_id in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        if counts[token_id] == 0:
            break
        expert = loads.index(min(loads))
        loads[expert] += counts[token_id]
        table[token_id] = expert
    return table


def choose_experts(logits: Tensor, top_k: int, scaling: str) -> tuple[Tensor, Tensor]:
    """Choose the experts of each routed item and their weights from a gate's logits.

    Args:
        logits: Gate logits in float32. Shape `(..., experts)`.
        top_k: Experts per item; ties go to the lower index.
        scaling: `probability` weighs an expert by its probability (eq. 2). Otherwise the chosen probabilities are
            divided by their detached sum: they add up to 1, so a converted model starts next to its teacher, and the
            gate still gets a gradient (our own design).

    Returns:
        Index and weight of the chosen experts, most probable first. Shapes `(..., top_k)`.

    Source: eqs. 2 and 3.
    """
    probabilities = logits.softmax(dim=-1)
    if top_k == 1:
        weights, index = probabilities.max(dim=-1, keepdim=True)  # of equal ones the first; faster than a sort
    else:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        weights, index = ordered[..., :top_k], order[..., :top_k]
    if scaling == "probability":
        return index, weights
    return index, weights / weights.detach().sum(dim=-1, keepdim=True)


def masked_mean(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Average the real tokens of each sentence, in float32; a sentence of padding alone gives zeros.

    Args:
        hidden_states: Shape `(batch, seq, hidden)`.
        mask: True at real tokens. Shape `(batch, seq)`.

    Returns:
        Shape `(batch, hidden)`.
    """
    share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)  # (batch, seq)
    return (hidden_states.float() * share.unsqueeze(-1)).sum(dim=1)


def sentence_means(hidden_states: Tensor, lengths: list[int]) -> Tensor:
    """Average the tokens of each sentence of one row without padding; a sentence without tokens gives zeros.

    Args:
        hidden_states: Sentences one after the other, in float32. Shape `(1, tokens, hidden)`.
        lengths: Tokens of each sentence.

    Returns:
        Shape `(sentences, hidden)`.
    """
    counts = torch.tensor(lengths, device=hidden_states.device)
    sentence = torch.arange(len(lengths), device=counts.device).repeat_interleave(counts)  # (tokens,)
    sums = hidden_states.new_zeros(len(lengths), hidden_states.shape[-1]).index_add_(0, sentence, hidden_states[0])
    return sums / counts.clamp(min=1).unsqueeze(1)


def weigh_experts(outputs: Tensor, weights: Tensor) -> Tensor:
    """Add up the outputs of each token's experts by their weights.

    Args:
        outputs: Of each token's experts, one after the other. Shape `(tokens * top_k, hidden)`.
        weights: Shape `(tokens, top_k)`.

    Returns:
        Shape `(tokens, hidden)`.

    Source: eq. 3.
    """
    if weights.shape[1] == 1:
        return outputs * weights
    return (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def sort_by_expert(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order the slots of each layer by expert, keeping the order within an expert.

    Args:
        expert_index: Expert of each slot (a token times one of its experts). Shape `(layers, slots)`.
        num_experts: Number of experts.

    Returns:
        Slots in order of their expert, its inverse permutation, both `(layers, slots)`, and slots per expert,
        `(layers, experts)`.
    """
    order = expert_index.argsort(dim=-1, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(-1, order, places)
    counts = F.one_hot(expert_index.long(), num_experts).sum(dim=1)
    return order, inverse, counts
