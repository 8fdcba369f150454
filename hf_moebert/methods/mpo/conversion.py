"""Write the matrices of a pre-trained model as chains of cores, and multiply such a model out again.

config.json describes the chains in its `quantization_config`, so that `from_pretrained` of any Auto class builds the
same modules after `import hf_moebert`.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_moebert.architectures.protocols import OptimizedForInference
from hf_moebert.checkpoints.packing import has_adapters

from .configuration_mpo import MPOCompressionConfig
from .functional_bonds import choose_bonds
from .functional_decomposition import GAUGES, check_option, decompose, round_cores
from .functional_shapes import cap_bonds, check_cap, check_num_cores, factor_matrix
from .modeling_matrix import MPOMatrix, list_matrices
from .modeling_mpo import TiedMPOEmbedding, TiedMPOLinear, restore_layer
from .modeling_quantizer import MPOQuantizer, replace_matrices, restore_ties


logger = logging.get_logger(__name__)
DENSE = (nn.Linear, Conv1D, nn.Embedding)


def compress_mpo(
    model: PreTrainedModel,
    *,
    target_modules: str | Sequence[str] | None = None,
    num_cores: int = 5,
    bond: int | None = None,
    max_error: float | None = None,
    keep_ratio: float | None = None,
    gauge: str = "symmetric",
    train_centre: bool = False,
) -> PreTrainedModel:
    """Copy a model with its matrices as chains of cores, with at most one of three ways to make them smaller.

    Args:
        model: Any dense model of transformers. It is not changed.
        target_modules: Ends of the modules' paths, or a regular expression for whole paths. By default the linear
            layers inside the repeated layers, the pooler, and the word embeddings with all modules tied to them.
        num_cores: Odd, at least 3.
        bond: A cap on every bond.
        max_error: Largest relative error of every matrix, in the Frobenius norm, in [0, 1), before the cores are
            rounded to the model's dtype. A matrix whose chain would be larger than itself stays dense.
        keep_ratio: Parameters of all chosen matrices together, as a share of the dense ones; the bonds are about
            those with the least total error, see `choose_bonds`.
        gauge: As in `decompose`.
        train_centre: Whether central tensors are trained. Otherwise they are frozen, as published.

    Returns:
        A new model of the same class. `to_dense` makes it dense again.

    Raises:
        ValueError: If an option is out of range, if two of the three ways are given, if nothing is chosen, if
            `max_error` makes no matrix smaller, or if the model is not dense.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; choosing bonds by size or error is our own design.
    """
    _check_options(num_cores, bond, max_error, keep_ratio, gauge)
    _check_model(model)
    chosen = find_matrices(model, target_modules)
    chains = _decompose(
        _finite_weights(model, chosen),
        num_cores=num_cores,
        bond=bond,
        max_error=max_error,
        keep_ratio=keep_ratio,
        gauge=gauge,
    )
    if max_error is not None:
        chains = _keep_smaller(model, chains, max_error)
        chosen = [paths for paths in chosen if paths[0] in chains]
    _warn_of_growth(model, chains)
    tied = {path: paths[0] for paths in chosen for path in paths[1:]}
    compressed = _copy_rest(model, chosen)
    sizes = {path: list(model.get_parameter(f"{path}.weight").shape) for path in chains}
    _install(compressed, chains, MPOCompressionConfig(_describe(chains), tied, train_centre, gauge, sizes))
    return compressed


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply the chains of a compressed model out.

    Args:
        model: From `compress_mpo`, or loaded from its checkpoint. It is not changed.

    Returns:
        A dense model of the same class, which saves a stock checkpoint. What was tied is tied again, and matrices
        are of the dtype of their cores.

    Raises:
        ValueError: If the model has no matrix product operators, or is offloaded.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "quantization_method", None) != "mpo":
        raise ValueError(
            f"`model` must hold matrices as chains of cores, as `compress_mpo` makes them, got {type(model).__name__} "
            "without any. Merge an adapter with `merge_and_unload`; a dense model needs nothing."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without `device_map`.")
    cores = [core for matrix in list_matrices(model).values() for core in matrix.chain()]
    dense = copy.deepcopy(model, {id(core): core for core in cores})  # the copies of cores would be dropped at once
    weights = {module: nn.Parameter(module.weight.detach().clone()) for module in list_matrices(dense).values()}
    for path, module in list(dense.named_modules()):
        if isinstance(module, MPOMatrix):
            dense.set_submodule(path, restore_layer(module, weights[module]))
        elif isinstance(module, TiedMPOEmbedding | TiedMPOLinear):
            dense.set_submodule(path, restore_layer(module, weights[module._source[0]]))
    restore_ties(dense)
    dense.hf_quantizer.remove_quantization_config(dense)
    return dense


def _finite_weights(model: PreTrainedModel, chosen: list[list[str]]) -> dict[str, Tensor]:
    weights = {paths[0]: model.get_parameter(f"{paths[0]}.weight").detach() for paths in chosen}
    if broken := [path for path, weight in weights.items() if not bool(weight.isfinite().all())]:
        raise ValueError(
            f"`model` must hold finite weights, got NaN or infinity in {', '.join(broken)}. Repair it first."
        )
    return weights


def _decompose(
    weights: dict[str, Tensor],
    *,
    num_cores: int,
    bond: int | None,
    max_error: float | None,
    keep_ratio: float | None,
    gauge: str,
) -> dict[str, list[Tensor]]:
    """Return the cores of each matrix, in float64."""
    weights = {path: weight.double() for path, weight in weights.items()}  # rounded once, when they are installed
    factors = {path: factor_matrix(len(w), w.shape[1], num_cores) for path, w in weights.items()}
    if max_error is None and keep_ratio is None:
        caps = {path: cap_bonds(*factors[path], bond) for path in weights}
        return {path: decompose(weights[path], *factors[path], bonds=caps[path], gauge=gauge)[0] for path in weights}
    chains = {path: decompose(weight, *factors[path], gauge="left") for path, weight in weights.items()}
    sizes = [[i * j for i, j in zip(*factors[path], strict=True)] for path in weights]
    budget = None if keep_ratio is None else keep_ratio * sum(weight.numel() for weight in weights.values())
    bonds = choose_bonds([values for _, values in chains.values()], sizes, max_parameters=budget, max_error=max_error)
    return {
        path: round_cores(cores, wanted, gauge=gauge)[0]
        for (path, (cores, _)), wanted in zip(chains.items(), bonds, strict=True)
    }


def _keep_smaller(
    model: PreTrainedModel, chains: dict[str, list[Tensor]], max_error: float
) -> dict[str, list[Tensor]]:
    """Return the chains that are smaller than their matrices, and tell of the others."""
    kept = {path: cores for path, cores in chains.items() if _count(cores) < _size(model, path)}
    if not kept:
        raise ValueError(
            f"`max_error` must allow chains smaller than their matrices, {max_error} does so for none of "
            f"{len(chains)}. Allow a larger error, or leave it out for exact chains, which are larger."
        )
    if larger := [path for path in chains if path not in kept]:
        logger.warning(
            f"{len(larger)} of {len(chains)} matrices stay dense, because a chain within `max_error` {max_error} "
            f"would be larger: {', '.join(larger)}."
        )
    return kept


def _warn_of_growth(model: PreTrainedModel, chains: dict[str, list[Tensor]]) -> None:
    total, dense = sum(map(_count, chains.values())), sum(_size(model, path) for path in chains)
    if total > dense:
        logger.warning(
            f"The chains hold {total / dense:.2f} times the parameters of their matrices: bonds have still to be cut, "
            "by `bond`, `max_error` or `keep_ratio`, or by an `MPOSqueezingCallback`."
        )


def _count(cores: list[Tensor]) -> int:
    return sum(core.numel() for core in cores)


def _size(model: PreTrainedModel, path: str) -> int:
    return model.get_parameter(f"{path}.weight").numel()


def _describe(chains: dict[str, list[Tensor]]) -> dict[str, dict[str, list[int]]]:
    return {
        path: {
            "row_factors": [core.shape[1] for core in cores],
            "column_factors": [core.shape[2] for core in cores],
            "bonds": [core.shape[3] for core in cores[:-1]],
        }
        for path, cores in chains.items()
    }


def _copy_rest(model: PreTrainedModel, chosen: list[list[str]]) -> PreTrainedModel:
    """Copy a model, but share the weights that its copy is about to lose, so that they take no memory twice."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = {}
    for paths in chosen:
        weight = model.get_parameter(f"{paths[0]}.weight")
        if places[id(weight)] == len(paths):  # nothing holds it but the modules that are replaced
            shared[id(weight)] = weight
    return copy.deepcopy(model, shared)


def _install(model: PreTrainedModel, chains: dict[str, list[Tensor]], config: MPOCompressionConfig) -> None:
    """Bring the model into the state in which transformers would have loaded it."""
    replace_matrices(model, config)
    for path, cores in chains.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, MPOMatrix)
        layer.set_cores(cores)
    quantizer = MPOQuantizer(config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
    quantizer.postprocess_model(model)


def find_matrices(model: PreTrainedModel, target_modules: str | Sequence[str] | None = None) -> list[list[str]]:
    """Choose the modules whose matrices are decomposed.

    Args:
        model: Any dense model.
        target_modules: As in `compress_mpo`.

    Returns:
        For each matrix the paths of all modules that share it; an embedding first, otherwise in the model's order.

    Raises:
        ValueError: If nothing is chosen; the message lists the modules there are.
    """
    dense: dict[str, nn.Module] = {}
    groups: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            groups.setdefault(weight, []).append(path)
            if _is_plain(module):
                dense[path] = module
    if target_modules is None:
        chosen = _default_targets(model, dense)
    else:
        chosen = _named_targets(dense, target_modules)
    found = [paths for paths in groups.values() if chosen & set(paths)]
    for paths in found:
        if foreign := [path for path in paths if path not in dense]:
            raise ValueError(
                f"`target_modules` must not name a matrix that another kind of layer shares, got {paths}, of which "
                f"{', '.join(foreign)} is a {type(model.get_submodule(foreign[0])).__name__}. Leave them out."
            )
    return [sorted(paths, key=lambda path: not isinstance(dense[path], nn.Embedding)) for paths in found]


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, DENSE) or type(module) not in DENSE or not module.weight.is_floating_point():
        return False
    # `max_norm` changes the table in place and `sparse` its gradient, neither of which cores can follow
    return not isinstance(module, nn.Embedding) or (module.max_norm is None and not module.sparse)


def _named_targets(dense: dict[str, nn.Module], targets: str | Sequence[str]) -> set[str]:
    wanted = [targets] if isinstance(targets, str) else list(targets)
    matched = {target: {path for path in dense if _is_target(path, target, targets)} for target in wanted}
    if unmatched := [target for target, paths in matched.items() if not paths]:
        known = sorted({path.rpartition(".")[2] for path in dense})
        raise ValueError(
            f"`target_modules` must name linear layers or embeddings of the model, got "
            f"{', '.join(map(repr, unmatched))}. Choose from {', '.join(known)}."
        )
    return set().union(*matched.values())


def _is_target(path: str, target: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(target, path) is not None
    return path == target or path.endswith(f".{target}")


def _default_targets(model: PreTrainedModel, dense: dict[str, nn.Module]) -> set[str]:
    body = set(model.base_model.modules())
    repeated = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module in body]
    routers = {child for module in body if hasattr(module, "num_experts") for child in module.children()}
    chosen = {
        path
        for path, module in dense.items()
        if not isinstance(module, nn.Embedding)
        and module in body - routers
        and (any(path.startswith(f"{root}.") for root in repeated) or "pooler" in path.split("."))
    }
    with suppress(NotImplementedError):  # a model without an embedding of tokens
        table = getattr(model.get_input_embeddings(), "weight", None)
        named = model.named_modules(remove_duplicate=False)
        sharers = {path for path, m in named if table is not None and getattr(m, "weight", None) is table}
        chosen |= sharers if sharers <= dense.keys() else set()
    if not chosen:
        raise ValueError(
            f"`model` must have linear layers in repeated layers, {type(model).__name__} has none. Name them."
        )
    return chosen


def _check_options(
    num_cores: int, bond: int | None, max_error: float | None, keep_ratio: float | None, gauge: str
) -> None:
    check_num_cores(num_cores)
    check_cap(bond)
    check_option("gauge", gauge, GAUGES)
    given = {"bond": bond, "max_error": max_error, "keep_ratio": keep_ratio}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"At most one of `bond`, `max_error` and `keep_ratio` must be given, got {', '.join(named)}.")
    if max_error is not None and not (_is_number(max_error) and 0 <= max_error < 1):
        raise ValueError(f"`max_error` must be in [0, 1), got {max_error!r}. Use 0.1 for a tenth of a matrix's norm.")
    if keep_ratio is not None and not (_is_number(keep_ratio) and 0 < keep_ratio < math.inf):
        raise ValueError(
            f"`keep_ratio` must be above 0, got {keep_ratio!r}. Use 0.5 for half of the dense parameters."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_model(model: PreTrainedModel) -> None:
    method = getattr(model, "quantization_method", None)
    is_model = isinstance(model, PreTrainedModel)
    if not is_model:
        raise ValueError(
            f"`model` must be dense, but {type(model).__name__} is no model of transformers. Merge an adapter: "
            "`merge_and_unload`."
        )
    for wrong, fault, remedy in (
        (method is not None, f"already compressed by {method!r}", "Take the dense model, or call `to_dense(model)`"),
        (has_adapters(model), "one with a PEFT adapter", "Merge or remove it"),
        (
            any(isinstance(m, OptimizedForInference) for m in model.modules()),
            "optimised",
            "Call `revert_optimizations`",
        ),
        (any(p.is_meta for p in model.parameters()), "partly on the meta device", "Load it without offloading"),
    ):
        if wrong:
            raise ValueError(f"`model` must be dense, but {type(model).__name__} is {fault}. {remedy}.")
