"""The common part of all models here: conversion, loading, and the routing in outputs."""

import copy
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from hf_moebert.architectures.functional_routing import balance_loss, expert_load
from hf_moebert.architectures.routing import Routing
from hf_moebert.checkpoints.strict_model import StrictModel

from .configuration_mpoe import MPOEFields
from .modeling_experts import ROUTER_STD, MPOEFeedForward


logger = logging.get_logger(__name__)
WATCH_FORWARDS = 100  # training forwards without a token after which an expert counts as dead

Config = TypeVar("Config", bound=MPOEFields)


class MPOEMixin(StrictModel):
    """The base class of all models here; a model names its dense weights and builds its networks."""

    accepts_loss_kwargs = False  # losses are means over the batch, so that the Trainer divides by accumulation steps
    _keep_in_fp32_modules_strict = {"router"}  # a set, as in transformers
    _can_compile_fullgraph = False  # what is rebuilt depends on the experts that have tokens
    transposes_dense = False  # whether dense matrices are stored as `(in, out)`

    @staticmethod
    def dense_name(path: str, matrix: str) -> str:
        """Return the module in the dense model that holds a matrix of the network at `path`."""
        return f"{path}.{matrix}"

    @classmethod
    def dense_class(cls) -> type[PreTrainedModel]:
        """Return the class of transformers that this one extends."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        model: PreTrainedModel,
        *,
        num_experts: int = 8,
        num_cores: int = 5,
        bond: int | None = None,
        gauge: str = "symmetric",
        router: str = "reference",
        share_centre: bool = True,
        router_aux_loss_coef: float | None = None,
        layers: list[int] | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """Convert a dense model: every expert starts as the whole feed-forward network.

        With full bonds the new model gives the outputs of the dense one, whichever experts its routers choose.

        Args:
            model: Of the class that this one extends. It is not changed.
            num_experts: Experts of each converted block.
            num_cores: Tensors in the chain of each matrix.
            bond: Largest size of each bond; `None` truncates nothing.
            gauge: See `MPOEFields`.
            router: See `MPOEFields`.
            share_centre: See `MPOEFields`.
            router_aux_loss_coef: See `MPOEFields`.
            layers: Blocks to convert; see `MPOEFields.mpoe_layers`.
            noise: Standard deviation of noise on the experts' own tensors, relative to their entries' root mean
                square (our own design). Without it experts separate only because they see different tokens.
            seed: Seed of routers and noise.

        Returns:
            The new model in eval mode, with the dense model's dtypes and device; routers are in float32.

        Raises:
            ValueError: If the model or an option does not fit.

        Source: The authors' code.
        """
        if not 0 <= noise < float("inf"):
            raise ValueError(f"`noise` must be finite and >= 0, got {noise}. Use 0.01, or leave it out.")
        if (form := getattr(model, "quantization_method", None)) is not None:
            raise ValueError(
                f"`model` must be dense to become the experts of {cls.__name__}, but its form is {form!r}. Call "
                "`to_dense(model)` first."
            )
        config = cls.config_class.from_dense(
            model.config,
            num_experts=num_experts,
            num_cores=num_cores,
            bond=bond,
            gauge=gauge,
            router=router,
            share_centre=share_centre,
            router_aux_loss_coef=router_aux_loss_coef,
            mpoe_layers=layers,
        )
        dense = cls.dense_class()
        if dense not in type(model).__mro__:
            raise ValueError(
                f"`model` must be a {dense.__name__}, with its body under {cls.base_model_prefix!r} and its head, got "
                f"{type(model).__name__}. Load the checkpoint with `{dense.__name__}.from_pretrained`, merge adapters."
            )
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
            student = cls(config)
        state = student._cut_state(model.state_dict(), noise, torch.Generator().manual_seed(seed))
        missing, unexpected = student.load_state_dict(state, strict=False, assign=True)
        if missing or unexpected:
            raise ValueError(
                f"`model` must have the body and head of a dense {cls.__name__}, got {type(model).__name__}: missing "
                f"{missing}, unexpected {unexpected}. Convert with the class that has the same head."
            )
        student.all_tied_weights_keys = dict(model.all_tied_weights_keys)  # which may differ from the configuration
        student.tie_weights(recompute_mapping=False)
        if model.can_generate():
            student.generation_config = copy.deepcopy(model.generation_config)
        return student.to(model.device).eval()

    def networks(self) -> dict[str, MPOEFeedForward]:
        """Return the converted feed-forward networks by path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, MPOEFeedForward)}

    def _cut_state(self, dense: dict[str, Tensor], noise: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Decompose the feed-forward weights of a dense state dict, and copy the others."""
        paths = {path: (network, list(network.sizes)) for path, network in self.networks().items()}
        wanted = [f"{self.dense_name(path, name)}.weight" for path, (_, names) in paths.items() for name in names]
        if lost := [name for name in wanted if name not in dense or dense[name].is_meta]:
            raise ValueError(f"`model` must hold its feed-forward weights in memory, it lacks {lost}. Load it whole.")
        dense = dict(dense)
        state: dict[str, Tensor] = {}
        for path, (network, names) in paths.items():
            for name in names:
                place = self.dense_name(path, name)
                weight = dense.pop(f"{place}.weight")
                weight = weight.T if self.transposes_dense else weight
                options: Any = {"gauge": self.config.gauge, "noise": noise, "generator": generator}
                cut = network.cut_matrix(name, weight, **options)
                if name in network.biases:
                    cut[f"biases.{name}"] = dense.pop(f"{place}.bias").repeat(network.num_experts, 1)
                state |= {f"{path}.{key}": value for key, value in cut.items()}
            drawn = torch.randn(network.router.weight.shape, generator=generator) * ROUTER_STD
            state[f"{path}.router.weight"] = drawn.to(weight.device)
            state[f"{path}.router.bias"] = torch.zeros(network.num_experts, device=weight.device)
        return state | {name: tensor.clone() for name, tensor in dense.items()}

    def _finish(
        self,
        output_class: Callable,
        outputs: ModelOutput,
        records: list[Routing],
        masks: list[Tensor],
        output_router_logits: bool | None,
        *,
        share: Tensor | float = 1.0,
    ) -> Any:
        """Add the weighted balance loss to the task loss, and the routing to the outputs.

        Args:
            output_class: Class of the result.
            outputs: Those of the base class.
            records: Decisions of each network.
            masks: True at the real tokens that each router saw, `(batch, seq)`.
            output_router_logits: Whether the logits are wanted; `None` asks the config.
            share: Of this batch in those that are accumulated for one step, if the task loss is divided by all their
                targets: the balance then counts once in a step, too.
        """
        values, coef = dict(outputs), self.config.balance_coef
        shows = self._shows(output_router_logits)
        if records and (shows or self.training or "loss" in values):  # but not at every generated token
            places = [mask.flatten().to(x.logits.device) for mask, x in zip(masks, records, strict=True)]  # (tokens,)
            if coef > 0:
                self._check_checkpointing(records)
                pairs = zip(records, places, strict=True)
                losses = [balance_loss(x.logits.flatten(0, -2), x.chosen, place) for x, place in pairs]
                values["aux_loss"] = torch.stack(losses).sum()
            if self.training:
                self._watch(records, places)
        if "loss" in values and "aux_loss" in values:
            values["loss"] = values["loss"] + coef * share * values["aux_loss"]
        elif self.training and coef > 0:
            logger.warning_once("Without `labels` the balance loss is not in any loss: add `coef * aux_loss`.")
        if shows:
            values["router_logits"] = tuple(x.logits for x in records)
        return output_class(**values)

    def _shows(self, output_router_logits: bool | None) -> bool:
        return self.config.output_router_logits if output_router_logits is None else output_router_logits

    def _check_checkpointing(self, records: list[Routing]) -> None:
        trained = any(parameter.requires_grad for x in records for parameter in x.network.router.parameters())
        if self.training and torch.is_grad_enabled() and trained and not records[-1].logits.requires_grad:
            raise ValueError(
                "`use_reentrant` must be False with gradient checkpointing, or the balance loss has no gradient. Pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )

    @torch.compiler.disable
    def _watch(self, records: list[Routing], masks: list[Tensor]) -> None:
        """Warn about experts that had no token for a long time."""
        for x, mask in zip(records, masks, strict=True):
            x.network.watch(expert_load(x.chosen, mask, x.network.num_experts))
        due = [x.network for x in records if x.network.num_watched % WATCH_FORWARDS == 0]
        if not due:  # the rest waits for the GPU, so it is done seldom
            return
        loads = {network: network.idle for network in due if network.idle is not None}
        dead = {network: (idle >= WATCH_FORWARDS).nonzero().flatten().tolist() for network, idle in loads.items()}
        where = {path: dead[network] for path, network in self.networks().items() if dead.get(network)}
        if where:
            logger.warning(
                f"{sum(map(len, where.values()))} of {sum(network.num_experts for network in due)} experts had no "
                f"token in the last {WATCH_FORWARDS} forwards of this process: {where}. Raise `router_aux_loss_coef`."
            )

    def _check_ids(self, name: str, ids: Tensor | None, size: int, *, ignored: bool = False) -> None:
        """Refuse ids that are out of range, which would abort the process on a GPU; -100 is a label to ignore."""
        if ids is None or torch.compiler.is_compiling():
            return
        if ids.is_floating_point():
            raise ValueError(f"`{name}` must be integers, got {ids.dtype}. Give embeddings as `inputs_embeds`.")
        if not ids.numel():
            raise ValueError(f"`{name}` must hold one row and one id or more, got the shape {tuple(ids.shape)}.")
        wrong = (ids < 0) | (ids >= size)
        wrong = wrong & (ids != -100) if ignored else wrong
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"`{name}` must be in [0, {size}){' or -100' if ignored else ''}, got {int(ids[tuple(place)])} at "
                f"{place}. Use the model's own tokenizer and labels."
            )


def with_shapes(config: Config) -> Config:
    """Return the config with the shapes of its chains: itself, or a copy if the shapes had to be filled in."""
    if config.mpoe_shapes is None:
        config = copy.deepcopy(config)
        config.mpoe_shapes = config.plan_shapes()
    config.validate_shapes()
    return config
