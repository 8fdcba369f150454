"""The gradient mask: how often the central tensors, which every token trains, take part in an optimiser step."""

from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..schedules import linear_ramp
from .configuration_mpoe import GradientMaskConfig
from .functional import apply_mask, draw_mask
from .modeling_experts import MPOEFeedForward


class MPOEGradientMaskCallback(TrainerCallback):
    """Leave central tensors out of optimiser steps at random, while any stock `Trainer` trains.

    Once per step, and whatever the number of processes or of accumulated batches, one draw for each central tensor
    says whether it is updated. Where it is not, its gradient is zero from the backward on, so that it has no part in
    clipping, and gone when the optimiser looks: neither momentum nor weight decay move the tensor. With `element`
    single entries are drawn; they keep their values and their moments.

    Draws depend on seed, step and tensor alone, so a resumed run makes those of an uninterrupted one.

    Args:
        config: The recipe; by default `GradientMaskConfig()`.

    Raises:
        ValueError: When training begins, if no central tensor is shared and trained, or if the model is sharded
            (FSDP, DeepSpeed, tensor parallelism).

    Source: Gao et al. 2022, https://arxiv.org/abs/2203.01104, for the idea; see `GradientMaskConfig` for what is our
    own.
    """

    def __init__(self, config: GradientMaskConfig | None = None) -> None:
        self.config = GradientMaskConfig() if config is None else config
        self.keep = 1.0
        self._centres: dict[int, nn.Parameter] = {}
        self._masks: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # mask, tensor and its values before the step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the central tensors and watch their gradients."""
        model: nn.Module = kwargs["model"]
        _refuse_sharded(model)
        networks = [module for module in model.modules() if isinstance(module, MPOEFeedForward)]
        centres = [centre for network in networks if network.shares_centre for centre in network.centres.values()]
        self._centres = {index: centre for index, centre in enumerate(centres) if centre.requires_grad}
        if not self._centres:
            raise ValueError(
                "`model` must have central tensors that are shared (`share_centre=True`) and trained, got none of "
                f"them in {type(model).__name__}. Leave the callback out."
            )
        self._first = 1 / networks[0].num_experts if self.config.keep is None else self.config.keep
        self.on_train_end(args, state, control)  # `train` may be called twice, or have stopped with an error
        self._handles = [centre.register_hook(self._make_hook(index)) for index, centre in self._centres.items()]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what is updated in this step."""
        last = self._first if self.config.final_keep is None else self.config.final_keep
        progress = linear_ramp(state.global_step, begin=0, end=max(state.max_steps - 1, 1))
        self.keep = self._first + (last - self._first) * progress
        for index, centre in self._centres.items():
            where: tuple = (centre.shape, centre.device) if self.config.granularity == "element" else ((), "cpu")
            self._masks[index] = draw_mask(
                where[0], self.keep, seed=self.config.seed, step=state.global_step, index=index, device=where[1]
            )

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hide from the optimiser what it must not move."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        for index, mask in self._masks.items():
            centre = self._centres[index]
            if self.config.granularity == "tensor":
                centre.grad = centre.grad if mask else None  # a zero would let momentum and weight decay move it
            else:
                moments = [x for x in optimizer.state[centre].values() if torch.is_tensor(x)]
                alike = [centre, *(x for x in moments if x.shape == centre.shape)]
                self._held += [(mask, tensor, tensor.clone()) for tensor in alike]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put back the entries that were not drawn."""
        for mask, tensor, before in self._held:
            tensor.copy_(torch.where(mask, tensor, before))
        self._held, self._masks = [], {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._masks, self._held = [], {}, []

    def _make_hook(self, index: int) -> Any:
        """Mask every gradient before it is accumulated, or averaged over processes: all of them draw alike."""

        def hook(gradient: Tensor) -> Tensor | None:
            if index not in self._masks:
                return None
            return apply_mask(gradient, self._masks[index], 1 / self.keep if self.config.rescale and self.keep else 1)

        return hook


def _refuse_sharded(model: nn.Module) -> None:
    kinds = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else DistributedType.NO
    if kind in kinds or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        who = kind.value if kind in kinds else "tensor parallelism"
        raise ValueError(
            f"The gradient mask must see whole central tensors, which {who} keeps in shards. Use plain data "
            "parallelism (torchrun without FSDP, DeepSpeed or tensor parallelism)."
        )


__all__ = ["MPOEGradientMaskCallback"]
