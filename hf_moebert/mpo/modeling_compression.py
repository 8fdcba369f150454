"""Replace the matrices of a pre-trained model by chains of cores, and load such a model again.

The shapes stand in config.json as the host's `quantization_config`, so that `from_pretrained` of any Auto class builds
the same modules after `import hf_moebert`; `model.dequantize()` returns the dense model.
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_mpo import MPOCompressionConfig
from .functional import GAUGES, check_option, decompose, round_cores
from .functional_shapes import check_num_cores, choose_bonds, factor_matrix, full_bonds
from .modeling_mpo import MPOMatrix
from .modeling_quantizer import MPOQuantizer, replace_matrices


DENSE = (nn.Linear, Conv1D, nn.Embedding)


def compress_mpo(
    model: PreTrainedModel,
    *,
    target_modules: str | Sequence[str] | None = None,
    num_cores: int = 5,
    bond: int | None = None,
    max_error: float | None = None,
    size_ratio: float | None = None,
    gauge: str = "symmetric",
    train_centre: bool = False,
) -> PreTrainedModel:
    """Write the matrices of a model as chains of cores, in place, with at most one of three ways to make them smaller.

    Args:
        model: Any model of the host, dense.
        target_modules: Ends of the modules' paths, or a regular expression for whole paths. By default the linear
            layers inside the repeated layers, the pooler, and the word embeddings with whatever is tied to them.
        num_cores: Odd, at least 3.
        bond: A cap on every bond.
        max_error: Largest relative error of every matrix, in the Frobenius norm, in [0, 1).
        size_ratio: Parameters of all chosen matrices together, as a share of the dense ones; the bonds are those
            with the least total error, chosen over all matrices.
        gauge: As in `decompose`.
        train_centre: Whether central tensors learn. Otherwise they are frozen, as published.

    Returns:
        The same model.

    Raises:
        ValueError: If an option is out of range, if two of the three ways are given, if nothing is chosen, or if the
            model is not dense.

    Source: Liu et al. 2021, section 3; choosing bonds by size or error over all matrices is our own design.
    """
    _check_options(num_cores, bond, max_error, size_ratio, gauge)
    _check_model(model)
    chosen = find_matrices(model, target_modules)
    weights = {paths[0]: model.get_parameter(f"{paths[0]}.weight") for paths in chosen}
    factors = {p: factor_matrix(weight.shape[0], weight.shape[1], num_cores) for p, weight in weights.items()}
    if max_error is None and size_ratio is None:
        caps = {path: [min(bond or full, full) for full in full_bonds(*factors[path])] for path in weights}
        chains = {path: decompose(weights[path], *factors[path], bonds=caps[path], gauge=gauge)[0] for path in weights}
    else:
        chains = _decompose_to_size(weights, factors, max_error=max_error, size_ratio=size_ratio, gauge=gauge)
    matrices = {}
    for path, (rows, columns) in factors.items():
        bonds = [core.shape[-1] for core in chains[path][:-1]]
        matrices[path] = {"row_factors": list(rows), "column_factors": list(columns), "bonds": bonds}
    config = MPOCompressionConfig(
        matrices, {path: paths[0] for paths in chosen for path in paths[1:]}, train_centre, gauge
    )
    replace_matrices(model, config)
    for path, cores in chains.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, MPOMatrix)
        layer.set_cores(cores)
    quantizer = MPOQuantizer(config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
    quantizer.postprocess_model(model)
    return model


def find_matrices(model: PreTrainedModel, target_modules: str | Sequence[str] | None = None) -> list[list[str]]:
    """Choose the modules whose matrices are decomposed.

    Args:
        model: Any dense model.
        target_modules: As in `compress_mpo`.

    Returns:
        For each matrix the paths of all modules that share it; an embedding first, otherwise in the model's order.

    Raises:
        ValueError: If nothing is chosen; the message lists what could be.
    """
    dense = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module) in DENSE and isinstance(module.weight, nn.Parameter) and module.weight.is_floating_point()
    }
    chosen = {path for path in dense if _is_target(path, target_modules)}
    if target_modules is None:
        chosen = _default_targets(model, dense)
    groups: dict[nn.Parameter, list[str]] = {}
    for path, module in dense.items():
        groups.setdefault(module.weight, []).append(path)
    found = [paths for paths in groups.values() if chosen & set(paths)]
    if not found:
        raise ValueError(
            f"`target_modules` must name linear layers or embeddings of the model, got {target_modules!r}. Choose "
            f"from {', '.join(sorted({path.rpartition('.')[2] for path in dense}))}."
        )
    return [sorted(paths, key=lambda path: not isinstance(dense[path], nn.Embedding)) for paths in found]


def _is_target(path: str, targets: str | Sequence[str] | None) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets or ())


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
    words = model.get_input_embeddings()
    return chosen | {path for path, module in dense.items() if module is words}


def _decompose_to_size(
    weights: dict[str, Tensor],
    factors: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    max_error: float | None,
    size_ratio: float | None,
    gauge: str,
) -> dict[str, list[Tensor]]:
    chains = {path: decompose(weight, *factors[path], gauge="left") for path, weight in weights.items()}
    sizes = [[i * j for i, j in zip(*factors[path], strict=True)] for path in weights]
    budget = None if size_ratio is None else size_ratio * sum(weight.numel() for weight in weights.values())
    bonds = choose_bonds([values for _, values in chains.values()], sizes, max_parameters=budget, max_error=max_error)
    return {
        path: round_cores(cores, wanted, gauge=gauge)[0]
        for (path, (cores, _)), wanted in zip(chains.items(), bonds, strict=True)
    }


def _check_options(
    num_cores: int, bond: int | None, max_error: float | None, size_ratio: float | None, gauge: str
) -> None:
    check_num_cores(num_cores)
    check_option("gauge", gauge, GAUGES)
    given = {"bond": bond, "max_error": max_error, "size_ratio": size_ratio}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"At most one of `bond`, `max_error` and `size_ratio` must be given, got {', '.join(named)}.")
    if bond is not None and bond < 1:
        raise ValueError(f"`bond` must be at least 1, got {bond}. Use None to keep every direction.")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"`max_error` must be in [0, 1), got {max_error}. Use 0.1 for a tenth of a matrix's norm.")
    if size_ratio is not None and not size_ratio > 0:
        raise ValueError(f"`size_ratio` must be above 0, got {size_ratio}. Use 0.5 for half of the dense parameters.")


def _check_model(model: PreTrainedModel) -> None:
    for wrong, what, remedy in (
        (not isinstance(model, PreTrainedModel), "no model of transformers", "Merge an adapter: `merge_and_unload`"),
        (
            getattr(model.config, "quantization_config", None) is not None,
            f"already in another form, {getattr(model, 'quantization_method', None)!r}",
            "Take the dense model, or call `model.dequantize()`",
        ),
        (getattr(model, "_hf_peft_config_loaded", False), "one with an adapter", "Merge or remove it"),
        (any(p.is_meta for p in model.parameters()), "partly on the meta device", "Load it without offloading"),
    ):
        if wrong:
            raise ValueError(f"`model` must be dense, but {type(model).__name__} is {what}. {remedy}.")
