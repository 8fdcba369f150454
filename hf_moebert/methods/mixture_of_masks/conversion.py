"""Conversion of a dense model to one with masks, and of fixed masks to a smaller model."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_moebert.architectures.stacks import REMEDIES, refuse_forms

from .configuration_mixture_of_masks import MoMFields, MoMT5Config
from .modeling_compact import CompactFeedForward, copy_units, fill_units, split_units
from .modeling_masked import MoMModel
from .modeling_masks import (
    IMPORTANCE_SPREAD,
    ROUTER_STD,
    MaskedFeedForward,
)
from .modeling_mixture_of_masks import find_masked_class
from .modeling_surgery import find_feed_forwards, join_rows, matrix_of


logger = logging.get_logger(__name__)


@torch.no_grad()
def from_dense(
    model: PreTrainedModel,
    *,
    num_experts: int = 1,
    top_k: int = 1,
    group_size: int = 1,
    budget: str = "global",
    router_aux_loss_coef: float = 0.01,
    layers: list[int] | None = None,
    importance: Tensor | None = None,
    masks: Tensor | None = None,
    seed: int = 0,
) -> MoMModel:
    """Add masks for experts to the feed-forward networks of a dense model, all open: its outputs stay the same.

    Args:
        model: A stock model of a known family whose neurons are units, with any head; or a T5. It is not changed.
        num_experts: Number of masks of each block; with 1 there is no router, and units are only pruned.
        top_k: Number of masks that a token uses.
        group_size: Number of neighbouring units that share a mask.
        budget: Whether the target sparsity holds for all blocks together (`global`) or for each (`layer`).
        router_aux_loss_coef: Weight of the balance loss of the routers.
        layers: Blocks that get masks, by default all; T5 counts its encoder and then its decoder.
        importance: Score of each unit, from `measure_importance`: where masks should start from. Those of the least
            important units start nearest to closing and close first, unless training overrules it; by default all
            start alike. `(layers, units)`.
        masks: Masks that are fixed from the start instead of learned, such as those of `functional_plans`. Bool,
            `(layers, experts, units)`.
        seed: Seed of scores and routers.

    Returns:
        The new model in eval mode, with the dtypes, devices and frozen weights of the dense one; scores and routers
        are in float32.

    Raises:
        ValueError: If the model, masks or importance do not fit.
        ValueError: If an option breaks a rule of `MoMFields`.

    Source: Liu et al. 2025, "Masks Can be Learned as an Alternative to Experts", ACL, for masks as experts that
    are all active at the start. The options are our own design.
    """
    refuse_forms(
        model,
        "dense to get masks",
        *("adapters", "chains", "crf", "shared_experts", "tasks"),
        experts=REMEDIES["masks"],
        masks="Take masks of the dense model anew, with other options",
        shrunk=REMEDIES["masks"],
    )
    cls = find_masked_class(model)
    _check_dense(model)
    _check_given(importance, masks)
    config = cls.config_class.from_dense(
        model.config,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        group_size=group_size,
        mask_stage="learned" if masks is None else "fixed",
        mask_budget=budget,
        router_aux_loss_coef=router_aux_loss_coef,
        layers=layers,
    )
    if isinstance(config, MoMT5Config) and config.num_decoder_layers > config.num_layers:
        logger.warning("The decoder is deeper than the encoder: `shrink` will refuse this model.")
    found = find_feed_forwards(model)
    masked = _build(cls, config)
    networks = list(masked.masked_networks().values())
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.zeros(len(networks)) if importance is None else _score_offsets(networks, config, importance)
    for network, offset in zip(networks, offsets, strict=True):
        dense = found[network.block]
        for name, part in dense.separated().items():
            copy_units(getattr(network, name), part)
        if network.masks.scores is not None:
            network.masks.reset_parameters(generator)
            network.masks.learned.add_(offset)
        if network.router is not None:
            network.router.weight.normal_(std=ROUTER_STD, generator=generator)
    if masks is not None:
        _set_masks(networks, config, masks)
    replaced = [path for network in networks for path in found[network.block].matrix_paths]
    return _copy_rest(masked, model, replaced=replaced, done=[*masked.networks(), "budget"])


def _check_dense(model: PreTrainedModel) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")
    if model.config.is_heterogeneous:
        raise ValueError(
            f"`model` must have layers of equal widths, got {model.config.to_dict()['per_layer_config']} as its "
            "`per_layer_config`. Add masks before it is shrunk."
        )


def _check_given(importance: Tensor | None, masks: Tensor | None) -> None:
    if importance is not None and masks is not None:
        raise ValueError("`importance` must be left out with `masks`, which are fixed already. Give one of them.")
    for name, value in (("importance", importance), ("masks", masks)):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}. Use `torch.as_tensor`.")


def _score_offsets(networks: list[MaskedFeedForward], config: MoMFields, importance: Tensor) -> Tensor:
    """Compute what is added to the scores of groups, evenly spread by importance, `(layers, 1, groups)`."""
    wanted = (len(networks), matrix_of(networks[0].down).shape[1])
    if len(importance) == config.num_blocks:  # as measured, although not all blocks may have masks
        importance = importance[config.blocks]
    if importance.shape != wanted or not importance.isfinite().all():
        raise ValueError(
            f"`importance` must be finite and of shape (layers, units) = {wanted}, got {tuple(importance.shape)}. "
            "Measure it on the same dense model."
        )
    groups = importance.double().unflatten(-1, (-1, config.group_size)).sum(dim=-1)  # (layers, groups)
    ranks = groups.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    return IMPORTANCE_SPREAD * ranks[:, None] / max(groups.shape[-1] - 1, 1)


def _set_masks(networks: list[MaskedFeedForward], config: MoMFields, masks: Tensor) -> None:
    """Fix given masks, `(layers, experts, units)`."""
    wanted = (len(networks), config.num_experts, matrix_of(networks[0].down).shape[1])
    if masks.dtype != torch.bool or masks.shape != wanted:
        raise ValueError(
            f"`masks` must be boolean and of shape (layers, experts, units) = {wanted}, got {masks.dtype} and "
            f"{tuple(masks.shape)}. Compare with 0.5 if they are soft."
        )
    groups = masks.unflatten(-1, (-1, config.group_size))  # (layers, experts, groups, units of one)
    if (groups.any(dim=-1) != groups.all(dim=-1)).any():
        raise ValueError(
            f"`masks` must be equal for the {config.group_size} units of a group. Leave `group_size` out for 1."
        )
    if not (opens := masks.any(dim=-1)).all():
        place = (~opens).nonzero()[0].tolist()
        raise ValueError(f"`masks` must open at least one unit of each expert, got none at {place}. Raise the share.")
    for network, is_open in zip(networks, groups.any(dim=-1), strict=True):
        network.masks.fix(is_open)


@torch.no_grad()
def shrink(model: MoMModel) -> MoMModel:
    """Remove the units that the fixed masks of a model close; its outputs stay the same up to rounding.

    Units that no expert uses are removed. Units that all experts use run densely, for every token. Units that some
    experts use are stored with each of them, so that the copies can be trained independently. A block without such
    units is a narrower stock network. The units of experts have no dropout between their matrices.

    Args:
        model: A model with fixed masks. It is not changed.

    Returns:
        A model of the same class in eval mode, with the same dtypes, device and frozen weights.

    Raises:
        ValueError: If the masks are not fixed, or a network holds adapters.

    Source: Our own design.
    """
    stage = model.config.mask_stage if isinstance(model, MoMModel) else "dense, or wrapped by adapters"
    if stage != "fixed":
        raise ValueError(f"`model` must have fixed masks, but is {stage}. Merge adapters, and call `fix_masks` first.")
    masked = model.masked_networks()
    for path, network in masked.items():
        _check_convertible(path, network)
    units = {path: split_units(network) for path, network in masked.items()}
    sizes = {masked[path].block: (len(shared), [len(of) for of in own]) for path, (shared, own) in units.items()}
    widths = model.config.write_sizes(sizes)
    config = type(model.config).from_dense(model.config, mask_stage="compact", per_layer_config=widths)
    small = _build(type(model), config)
    routed = small.networks()
    narrowed = {dense.place: dense for dense in find_feed_forwards(small, missing_ok=True)}
    done = list(routed)
    for path, network in masked.items():
        target = routed.get(path)
        if isinstance(target, CompactFeedForward):
            fill_units(target, network)
            continue
        dense, (shared, _) = narrowed[path], units[path]
        for part in dense.paths.matrices:
            side, source = {"columns": shared} if part == "down" else {"rows": shared}, getattr(network, part)
            if part == "up" and dense.paths.fused:
                side = {"rows": torch.cat([shared, shared + len(matrix_of(source))])}
                source = join_rows(network.gate, network.up)
            copy_units(dense.part(part), source, **side)
        done += dense.matrix_paths
    return _copy_rest(small, model, replaced=masked, done=done)


def _check_convertible(path: str, network: MaskedFeedForward) -> None:
    for name in ("gate", "up", "down") if network.is_gated else ("up", "down"):
        if type(linear := getattr(network, name)) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"`{path}.{name}` must be a plain linear module, got {type(linear).__name__}. Merge adapters and "
                "dequantize first."
            )
    if not network.is_gated and network.router is not None and network.act_fn(torch.zeros(1)).any():
        raise ValueError(
            f"The activation function of {path!r} must be 0 at 0, got {network.act_fn}: the padding of experts "
            "would not stay zero. Use one expert."
        )


def _build(cls: type[MoMModel], config: MoMFields) -> MoMModel:
    with torch.random.fork_rng(devices=[]):  # all of it is overwritten
        return cls(config)


def _copy_rest(target: MoMModel, model: PreTrainedModel, *, replaced: Iterable[str], done: Iterable[str]) -> MoMModel:
    """Copy a model, except what is under the paths `replaced` there, and already done under the paths `done` here."""
    done, replaced = (tuple(f"{path}." for path in paths) for paths in (done, replaced))
    state = {name: x.clone() for name, x in model.state_dict().items() if not name.startswith(replaced)}
    missing, unexpected = target.load_state_dict(state, strict=False, assign=True)
    if (missing := [name for name in missing if not name.startswith(done)]) or unexpected:
        raise ValueError(
            f"`model` must have the body and head of a {type(target).__bases__[1].__name__}: missing {missing}, "
            f"unexpected {unexpected}. Load the checkpoint again."
        )
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(trains.get(name, parameter.requires_grad))
    target.all_tied_weights_keys = dict(model.all_tied_weights_keys)  # as they are, whatever the configuration says
    target.tie_weights(recompute_mapping=False)
    if model.can_generate():
        target.generation_config = copy.deepcopy(model.generation_config)
    return target.to(model.device).eval()


__all__ = ["from_dense", "shrink"]
