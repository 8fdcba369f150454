"""The equations of many tasks on one trunk: their cost, the depth that is enough, and fingerprints of layers.

Source: Wei, Qi, He 2022, https://arxiv.org/abs/2107.05377. Our own design is marked as such.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor


def layers_run(splits: Mapping[str, tuple[int, int]]) -> int:
    """Count the layers that one request to all tasks runs: `max of frozen + sum of own`.

    Args:
        splits: Frozen layers and own layers of each task.

    Raises:
        ValueError: If there is no task, or a number is negative.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377.
    """
    if not splits or any(frozen < 0 or own < 0 for frozen, own in splits.values()):
        raise ValueError(f"`splits` must give each of one or more tasks two numbers >= 0, got {dict(splits)}.")
    return max(frozen for frozen, _ in splits.values()) + sum(own for _, own in splits.values())


def overhead(splits: Mapping[str, tuple[int, int]], num_layers: int) -> float:
    """Relate the layers run to those of separate models: `layers_run / (num_layers * tasks)`.

    Args:
        splits: Frozen layers and own layers of each task.
        num_layers: Layers of each separate model.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377.
    """
    return layers_run(splits) / (num_layers * len(splits))


def total_parameters(
    splits: Mapping[str, tuple[int, int]], *, layer: int, embeddings: int, pooler: int = 0, heads: int = 0
) -> int:
    """Count the parameters of all tasks on one trunk.

    Args:
        splits: Frozen layers and own layers of each task.
        layer: Parameters of one layer.
        embeddings: Parameters of the embeddings.
        pooler: Parameters of one pooler; every task has its own.
        heads: Parameters of all heads together.
    """
    return embeddings + layers_run(splits) * layer + len(splits) * pooler + heads


def separate_parameters(
    num_tasks: int, num_layers: int, *, layer: int, embeddings: int, pooler: int = 0, heads: int = 0
) -> int:
    """Count the parameters of a model of its own for every task; the arguments are those of `total_parameters`."""
    return num_tasks * (embeddings + num_layers * layer + pooler) + heads


def choose_depth(scores: Mapping[int, float], min_gain: float) -> int:
    """Choose the smallest number of layers after which one more layer gains too little.

    Between depths that are not neighbours the gain must pay for all layers in between. Of equal scores the shallower
    depth is chosen. Both rules are our own design.

    Args:
        scores: Score of a task for each number of own layers; larger is better.
        min_gain: Gain that one more layer must bring, in the unit of the scores.

    Raises:
        ValueError: If there is no score, one is not finite, or `min_gain` is negative.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377, who trade quality for cost by a gain of one, two or
    three points; the exact rule is our own.
    """
    if not scores or not all(math.isfinite(score) for score in scores.values()):
        raise ValueError(f"`scores` must hold a finite score for one depth or more, got {dict(scores)}.")
    if not 0 <= min_gain < math.inf:
        raise ValueError(f"`min_gain` must be finite and >= 0, got {min_gain}. Use 0.01 for a point of accuracy.")
    depths = sorted(scores)
    for depth, deeper in pairwise(depths):
        gain, required = scores[deeper] - scores[depth], min_gain * (deeper - depth)
        if gain <= 0 or (gain < required and not math.isclose(gain, required)):
            return depth
    return depths[-1]


def choose_uniform(scores: Mapping[str, Mapping[int, float]], min_gain: float) -> int:
    """Choose one number of layers for all tasks: `choose_depth` on the mean of their scores.

    Args:
        scores: Score of each task for each number of own layers, in one unit.
        min_gain: Gain that one more layer must bring on average.

    Raises:
        ValueError: If tasks have no depth in common.

    Source: Our own design.
    """
    common = set.intersection(*(set(depths) for depths in scores.values())) if scores else set()
    if not common:
        found = {task: sorted(depths) for task, depths in scores.items()}
        raise ValueError(f"`scores` must hold a depth that all tasks have, got {found}.")
    means = {depth: sum(depths[depth] for depths in scores.values()) / len(scores) for depth in common}
    return choose_depth(means, min_gain)


def chain_hashes(parts: Iterable[Mapping[str, Tensor]], start: str = "") -> list[str]:
    """Fingerprint every prefix of a stack of layers.

    Hash `i` is the SHA-256 of hash `i - 1` and of the names, dtypes, shapes and bytes of part `i`, so two stacks share
    their first hashes exactly as far as they are equal bit for bit. Our own design.

    Args:
        parts: Tensors by name, of the embeddings, of the first layer, and so on.
        start: Fingerprint of all that precedes the first part.

    Returns:
        One hash for each part, in hexadecimal.
    """
    hashes: list[str] = []
    for part in parts:
        digest = hashlib.sha256((hashes[-1] if hashes else start).encode())
        for name, tensor in sorted(part.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        hashes.append(digest.hexdigest())
    return hashes
