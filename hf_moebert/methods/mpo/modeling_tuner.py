"""Lightweight fine-tuning as a PEFT method: only the auxiliary tensors of a matrix are trained.

Importing this module registers the method in PEFT's tables, so that `get_peft_model` and every loader know it.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.mapping
import torch
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_moebert.architectures.empty_losses import hook_empty_loss, unhook_empty_loss, zero_empty_loss
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.heads import find_untrained

from .configuration_tuner import SUPPORTED_PEFT, ExtraPeftType, MPOConfig
from .modeling_matrix import MPOMatrix, list_matrices
from .modeling_mpo import TiedMPOEmbedding, TiedMPOLinear


try:
    from peft.tuners.tuners_utils import BaseTuner

    from .modeling_adapted import AdaptedEmbedding, AdaptedLinear, MPOLayer
except ImportError as error:
    raise ImportError(f"The MPO adapter needs {SUPPORTED_PEFT}, got {peft.__version__}: {error}.") from error

logger = logging.get_logger(__name__)

# What gets an adapter by default: the matrices of attentions and feed-forward networks
TARGETS = {family: architecture.matrix_names for family, architecture in ARCHITECTURES.items()}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MPOModel(BaseTuner):
    """A model whose linear layers or embeddings have adapters of auxiliary tensors; made by `get_peft_model`.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205.
    """

    prefix = "mpo_"
    tuner_layer_cls = MPOLayer
    target_module_mapping = TARGETS
    _is_first = True  # no batch was trained on so far

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter; of 'all-linear' layers, those of the head train as a whole and are saved with it instead.

        A head is often new: adapted, its base would be drawn anew wherever the adapter is loaded. PEFT knows the heads
        of some `task_type` alone.
        """
        config = self.peft_config[adapter_name]
        if config.init_weights and config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
            _refuse_chains(model)
        if config.init_weights and config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            excluded = config.exclude_modules if isinstance(config.exclude_modules, set) else set()
            heads = {*(config.modules_to_save or []), *_find_heads(model)} - excluded
            config.modules_to_save = sorted(heads) or None
        if config.init_weights and isinstance(model, PreTrainedModel):
            _warn_of_frozen_head(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        hook_empty_loss(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does; a loss over no label is zero, as by the model's hook, which PEFT passes by."""
        return zero_empty_loss(self, args, kwargs, super().forward(*args, **kwargs))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unhook_empty_loss(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: MPOConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, MPOLayer) else _wrap(target, current_key)
        try:
            layer.update_layer(adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"`{current_key}` cannot get an adapter: {error}") from error
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse names of adapters, which PEFT would ignore without a warning; it enters this around every forward."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"`adapter_names` must be None for MPO adapters, got {kwargs['adapter_names']}: all rows of a batch"
                " share one matrix. Call `set_adapter` and run one batch for each adapter."
            )
        yield
        if self._is_first and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._is_first = False
            self._warn_of_unused()

    def _warn_of_unused(self) -> None:
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, MPOLayer)}
        if unused := [name for name, layer in layers.items() if not layer.is_used]:
            logger.warning(
                f"Adapters learn nothing where their layers are not called, as after the first batch `"
                f"{'`, `'.join(unused)}`: they take no part, or a module reads their weights. Leave them out with "
                "`exclude_modules`, unless later batches use them."
            )


def _refuse_chains(model: nn.Module) -> None:
    if chains := list_matrices(model):
        raise ValueError(
            f"`model` must be dense to get adapters, but {len(chains)} of its matrices are chains, whose own cores "
            "train. Train it without adapters, use `to_dense(model)`, or name dense layers in `target_modules`."
        )


def _wrap(target: nn.Module, name: str) -> MPOLayer:
    # Exact types only: a subclass may be quantised, or use its weight in another way.
    weight = getattr(target, "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in DTYPES
    if plain and type(target) in (nn.Linear, Conv1D):
        return AdaptedLinear(target, transposed=isinstance(target, Conv1D))
    if plain and type(target) is nn.Embedding and target.max_norm is None and not target.sparse:
        return AdaptedEmbedding(target)
    is_chain = isinstance(target, MPOMatrix | TiedMPOEmbedding | TiedMPOLinear)
    if is_chain:
        raise ValueError(
            f"`target_modules` must be dense layers, got `{name}`, a {type(target).__name__}: its own cores train. "
            "Leave it out, or use `to_dense(model)`."
        )
    raise ValueError(
        "`target_modules` must be `nn.Linear`, `Conv1D` or `nn.Embedding` (without `max_norm` and `sparse`) that are"
        f" not quantised, got `{name}`, a {type(target).__name__}. Leave it out with `exclude_modules`, or load the"
        " model without quantisation."
    )


def _find_heads(model: nn.Module) -> list[str]:
    """Name the parts of a model beside its body that have weights, but for output embeddings, which are trained."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    outputs = model.get_output_embeddings()
    parts = [(name, part) for name, part in model.named_children() if part is not model.base_model]
    return [name for name, part in parts if any(True for _ in part.parameters()) and outputs not in [*part.modules()]]


def _warn_of_frozen_head(model: PreTrainedModel, config: MPOConfig) -> None:
    """Warn of a new head that would neither train nor be saved; PEFT itself cares for it if it knows the task."""
    heads = {name.partition(".")[0] for name in find_untrained(model)}
    if frozen := sorted(heads - set(config.modules_to_save or [])):
        logger.warning(
            f"The head of the {type(model).__name__} looks untrained, but `{'`, `'.join(frozen)}` would neither train "
            f"as a whole nor be saved with the adapter. Use `MPOConfig(modules_to_save={frozen})`, or name the "
            "`task_type`."
        )


def _register() -> None:
    """Enter the method in PEFT's tables; `register_peft_method` accepts only members of a closed enumeration."""
    entries = {"CONFIG": MPOConfig, "TUNER": MPOModel, "PREFIX": MPOModel.prefix}
    tables = {kind: getattr(peft.mapping, f"PEFT_TYPE_TO_{kind}_MAPPING", None) for kind in entries}
    for kind, table in tables.items():
        if table is None:
            raise ImportError(
                f"The MPO adapter needs {SUPPORTED_PEFT}, got {peft.__version__}, which has no table of type {kind}."
            )
        table[ExtraPeftType.MPO] = entries[kind]


_register()
