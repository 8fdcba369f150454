"""The plain alternative to matrix product operators: every matrix as a product of two, by singular values."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moebert.methods.mpo.conversion import find_matrices
from hf_moebert.methods.mpo.functional_bonds import choose_bonds


def cut_to_low_rank(model: PreTrainedModel, *, keep_ratio: float) -> PreTrainedModel:
    """Replace the matrices that `compress_mpo` would replace by two factors each, in place.

    Ranks are chosen as `compress_mpo` chooses bonds: over all matrices together, by the error that each parameter
    saves; a product of two factors is a chain of two cores. Only linear layers and tables that nothing is tied to.
    """
    paths = [group[0] for group in find_matrices(model)]
    weights = [model.get_parameter(f"{path}.weight").detach() for path in paths]
    parts = [torch.linalg.svd(weight.double(), full_matrices=False) for weight in weights]
    ranks = choose_bonds(
        [[values] for _, values, _ in parts],
        [weight.shape for weight in weights],
        max_parameters=keep_ratio * sum(weight.numel() for weight in weights),
    )
    for path, (u, values, vh), (rank,) in zip(paths, parts, ranks, strict=True):
        roots = values[:rank].sqrt()
        left, right = (u[:, :rank] * roots).float(), (roots[:, None] * vh[:rank]).float()
        module = model.get_submodule(path)
        model.set_submodule(
            path, _table(left, right) if isinstance(module, nn.Embedding) else _linear(module, left, right)
        )
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply the factors out again, in place: for saving what stock classes can load."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            first, second = module
            if isinstance(first, nn.Embedding):
                dense: nn.Module = nn.Embedding.from_pretrained(first.weight.detach() @ second.weight.detach().T)
            else:
                dense = nn.Linear(first.in_features, second.out_features)
                dense.weight.data, dense.bias.data = (
                    second.weight.detach() @ first.weight.detach(),
                    second.bias.detach(),
                )
            model.set_submodule(path, dense)
    return model


class LowRank(nn.Sequential):
    """Two layers in the place of one."""


def _linear(module: nn.Linear, left: Tensor, right: Tensor) -> LowRank:
    factors = LowRank(nn.Linear(*reversed(right.shape), bias=False), nn.Linear(*reversed(left.shape)))
    factors[0].weight.data, factors[1].weight.data, factors[1].bias.data = right, left, module.bias.detach().clone()
    return factors


def _table(left: Tensor, right: Tensor) -> LowRank:
    factors = LowRank(nn.Embedding(*left.shape), nn.Linear(*right.shape, bias=False))
    factors[0].weight.data, factors[1].weight.data = left, right.T.contiguous()
    return factors
