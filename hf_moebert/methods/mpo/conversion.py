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
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_moebert.architectures.stacks import refuse_forms

from .configuration_mpo import MPOCompressionConfig
from .conversion_calibration import Statistics, measure_inputs
from .conversion_chains import Chain, Size, make_chains
from .functional_decomposition import GAUGES, check_option
from .functional_shapes import check_cap, check_num_cores
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
    table_cores: int | None = None,
    bond: int | None = None,
    max_error: float | None = None,
    keep_ratio: float | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gauge: str = "symmetric",
    train_centre: bool = False,
) -> PreTrainedModel:
    """Copy a model with its matrices as chains of cores, with at most one of three ways to make them smaller.

    With `calibration` the error is that of every layer's *outputs* on the model's own inputs instead of the weights':
    all cores of linear layers are refined to it, two factors have the least possible one, and rows of tables are
    sorted and scaled by how often they are used. Rare words get worse.

    Args:
        model: Any dense model of transformers. It is not changed.
        target_modules: Ends of the modules' paths, or a regular expression for whole paths. By default the linear
            layers inside the repeated layers, the pooler, and the word embeddings with all modules tied to them.
        num_cores: 2 for two factors, or odd and at least 3.
        table_cores: The same for embeddings; by default as `num_cores`.
        bond: A cap on every bond.
        max_error: Largest relative error of every matrix, in the Frobenius norm, in [0, 1), before the cores are
            rounded to the model's dtype.
        keep_ratio: Parameters of all chosen matrices together, as a share of the dense ones; the bonds are about
            those with the least total error, see `choose_bonds`. With `calibration` it is that of the model's
            outputs, and tables and linear layers keep this share each. Below 1, as with `max_error` or
            `calibration`, a matrix whose chain would be larger than itself stays dense.
        calibration: Some hundreds of texts of the model's use, or batches as a `DataLoader` yields and the model
            takes. Padding and labels have no part in it.
        tokenizer: Of the model; needed for texts.
        gauge: As in `decompose`.
        train_centre: Whether central tensors are trained. Otherwise they are frozen, as published.

    Returns:
        A new model of the same class. `to_dense` makes it dense again.

    Raises:
        ValueError: If an option is out of range, if two of the three ways are given, if nothing is chosen, if no
            matrix would be smaller, if the model is not dense, or as `measure_inputs`.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; two factors with calibration: Wang et al. 2024,
    https://arxiv.org/abs/2403.07378; choosing bonds by size or error, and chains with calibration, are our own design.
    """
    size = Size(bond, max_error, keep_ratio)
    _check_options(num_cores, table_cores, size, gauge)
    _check_model(model)
    if calibration is not None and size == Size():
        raise ValueError(
            "One of `bond`, `max_error` and `keep_ratio` must be given with `calibration`: exact chains lose nothing. "
            "Use `keep_ratio=0.5` for half of the parameters."
        )
    chosen = find_matrices(model, target_modules)
    _check_weights(model, chosen)
    statistics = None
    if calibration is not None:
        joint = keep_ratio is not None  # only then bonds of different matrices are weighed up
        statistics = measure_inputs(model, chosen, calibration, tokenizer, sensitivities=joint)
        _warn_of_unseen(chosen, statistics)
    of_tables = num_cores if table_cores is None else table_cores
    cores = {paths[0]: of_tables if _is_table(model, paths[0]) else num_cores for paths in chosen}
    chains = make_chains(model, cores, size, gauge, statistics)
    chosen = [paths for paths in chosen if paths[0] in chains]
    _warn_of_growth(model, chains)
    tied = {path: paths[0] for paths in chosen for path in paths[1:]}
    compressed = _copy_rest(model, chosen)
    shapes = {path: chain.describe() for path, chain in chains.items()}
    sizes = {path: list(model.get_parameter(f"{path}.weight").shape) for path in chains}
    _install(compressed, chains, MPOCompressionConfig(shapes, tied, train_centre, gauge, sizes))
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


def _check_weights(model: PreTrainedModel, chosen: list[list[str]]) -> None:
    weights = {paths[0]: model.get_parameter(f"{paths[0]}.weight").detach() for paths in chosen}
    if broken := [path for path, weight in weights.items() if not bool(weight.isfinite().all())]:
        raise ValueError(
            f"`model` must hold finite weights, got NaN or infinity in {', '.join(broken)}. Repair it first."
        )


def _warn_of_growth(model: PreTrainedModel, chains: dict[str, Chain]) -> None:
    total = sum(chain.count() for chain in chains.values())
    dense = sum(model.get_parameter(f"{path}.weight").numel() for path in chains)
    if total > dense:
        logger.warning(
            f"The chains hold {total / dense:.2f} times the parameters of their matrices: bonds have still to be cut, "
            "by `bond`, `max_error` or `keep_ratio`, or by an `MPOSqueezingCallback`."
        )


def _copy_rest(model: PreTrainedModel, chosen: list[list[str]]) -> PreTrainedModel:
    """Copy a model, but share the weights that its copy is about to lose, so that they take no memory twice."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = {}
    for paths in chosen:
        weight = model.get_parameter(f"{paths[0]}.weight")
        if places[id(weight)] == len(paths):  # nothing holds it but the modules that are replaced
            shared[id(weight)] = weight
    return copy.deepcopy(model, shared)


def _install(model: PreTrainedModel, chains: dict[str, Chain], config: MPOCompressionConfig) -> None:
    """Bring the model into the state in which transformers would have loaded it."""
    replace_matrices(model, config)
    for path, chain in chains.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, MPOMatrix)
        layer.set_cores(chain.cores, chain.use)
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


def _is_table(model: PreTrainedModel, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.Embedding)


def _warn_of_unseen(chosen: list[list[str]], statistics: Statistics) -> None:
    seen = statistics.moments.keys() | statistics.counts.keys()
    if unseen := [paths[0] for paths in chosen if paths[0] not in seen]:
        logger.warning(
            f"{len(unseen)} of {len(chosen)} matrices had no input in `calibration`, and are decomposed by the error "
            f"of their weights: {', '.join(unseen)}."
        )


def _check_options(num_cores: int, table_cores: int | None, size: Size, gauge: str) -> None:
    for name, cores in (("num_cores", num_cores), ("table_cores", table_cores)):
        if cores is not None:
            check_num_cores(cores, name, two=True)
    check_cap(size.bond)
    check_option("gauge", gauge, GAUGES)
    max_error, keep_ratio = size.max_error, size.keep_ratio
    if len(named := [name for name, value in asdict(size).items() if value is not None]) > 1:
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
    refuse_forms(
        model,
        "dense",
        *("adapters", "chains", "optimised"),
        tasks="Compress what `extract_task` returns",
    )
    method = getattr(model, "quantization_method", None)
    is_model = isinstance(model, PreTrainedModel)
    if not is_model:
        raise ValueError(
            f"`model` must be dense, but {type(model).__name__} is no model of transformers. Give the model inside: "
            "merge an adapter by `merge_and_unload`, take `_orig_mod` of a compiled or `module` of a parallel one."
        )
    for wrong, fault, remedy in (
        (method is not None, f"already compressed by {method!r}", "Take the dense model"),
        (any(p.is_meta for p in model.parameters()), "partly on the meta device", "Load it without offloading"),
    ):
        if wrong:
            raise ValueError(f"`model` must be dense, but {type(model).__name__} is {fault}. {remedy}.")
