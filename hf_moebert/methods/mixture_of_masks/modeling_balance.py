"""The training loss of models with masks: that of the base class, and the balance of the routers."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_mixture_of_masks import MoMFields
from .functional_routing import balance_loss, expert_load, real_tokens
from .modeling_masks import MaskedFeedForward, RoutedFeedForward
from .modeling_routing import Routing, recording
from .modeling_strict import StrictModel


logger = logging.get_logger(__name__)


def add_balance(forward: Callable) -> Callable:
    """Wrap the forward of a base class, so that its training loss includes the balance loss of the routers."""
    names = list(inspect.signature(forward).parameters)[1:]

    @can_return_tuple
    @functools.wraps(forward)
    def wrapped(self: "BalancedModel", *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        inputs.pop("return_dict", None)
        if not self.training:
            return self._replace_empty_loss(forward(self, **inputs, return_dict=True), inputs)
        with recording() as records:
            outputs = forward(self, **inputs, return_dict=True)
        return self._balance(self._replace_empty_loss(outputs, inputs), records, inputs)

    return wrapped


class BalancedModel(StrictModel):
    """A model with masks whose training loss balances its routers."""

    config: MoMFields
    _predicts_next = True  # whether labels are the inputs, and compared with the prediction of the token before

    def networks(self) -> dict[str, RoutedFeedForward]:
        """Return the masked feed-forward networks, or the compact ones that have experts, by path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, RoutedFeedForward)}

    def masked_networks(self) -> dict[str, MaskedFeedForward]:
        """Return the masked feed-forward networks by path.

        Raises:
            ValueError: If the model is compact.
        """
        networks = {path: module for path, module in self.networks().items() if isinstance(module, MaskedFeedForward)}
        if not networks:
            raise ValueError(
                f"The {type(self).__name__} must have masks, but its stage is {self.config.mask_stage!r}. Load the "
                "checkpoint from before `shrink`."
            )
        return networks

    def _balance(self, outputs: Any, records: list[Routing], inputs: dict[str, Any]) -> Any:
        """Add the balance loss of the routers to the loss, and count the tokens of their experts."""
        self._warn_if_idle()
        real = [self._real_tokens(record, inputs) for record in records]
        self._count_load(records, real)
        if not records or not self.config.router_aux_loss_coef:
            return outputs
        self._check_checkpointing(records[-1])
        outputs["aux_loss"] = self._balance_loss(records, real)
        if outputs.get("loss") is None:
            logger.warning_once("Without `labels` the balance of the routers is in no loss: add `aux_loss`.")
            return outputs
        weight = self._share_of_step(inputs) * self.config.router_aux_loss_coef
        outputs["loss"] = outputs["loss"] + weight * outputs["aux_loss"]
        return outputs

    def _warn_if_idle(self) -> None:
        """Warn if masks that could be learned are not, because no callback draws their noise."""
        if self.config.mask_stage == "learned" and not self.budget.in_run:
            logger.warning_once("No run of masks has begun, so they are not learned: add `MaskSparsityCallback`.")

    def _count_load(self, records: list[Routing], real: list[Tensor]) -> None:
        """Add the tokens of each expert to the load of its network."""
        for record, of_record in zip(records, real, strict=True):
            counts = expert_load(record.chosen, of_record, record.logits.shape[-1])
            record.network.load = counts if record.network.load is None else record.network.load + counts

    def _balance_loss(self, records: list[Routing], real: list[Tensor]) -> Tensor:
        """Return the mean balance loss of the routers."""
        losses = [
            balance_loss(x.logits.flatten(0, -2), x.chosen, place) for x, place in zip(records, real, strict=True)
        ]
        return torch.stack(losses).mean()

    def _real_tokens(self, record: Routing, inputs: dict[str, Any]) -> Tensor:
        """Mark the tokens seen by a router that are not padding, `(tokens,)`."""
        mask = self._token_mask(record.network, inputs)
        shape: tuple[int, ...] = record.logits.shape[:-1]
        if len(shape) == 1:  # a layer that puts all rows of the batch one after the other
            shape = mask.shape if torch.is_tensor(mask) and mask.dim() == 2 else (1, *shape)
        real = real_tokens(mask if torch.is_tensor(mask) else None, shape)
        return real.flatten().to(record.logits.device)

    def _token_mask(self, network: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is not None and ids is not None and ids.dim() == 3:  # (batch, choices, seq)
            return mask.flatten(0, 1)
        return mask

    def _share_of_step(self, inputs: dict[str, Any]) -> Tensor | float:
        """Return this batch's share of the labels of an accumulated step, in which the balance counts once."""
        total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
        if total is None or labels is None:
            return 1.0
        return (labels[..., 1:] != -100).sum() / torch.as_tensor(total, device=labels.device).clamp(min=1)

    def _replace_empty_loss(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        """Replace the mean over no label, which is NaN, by zero."""
        labels = inputs.get("labels")
        if labels is None or labels.is_floating_point() or torch.compiler.is_compiling():
            return outputs
        if not ((labels[..., 1:] if self._predicts_next else labels) != -100).any():
            outputs["loss"] = outputs["logits"].sum() * 0.0
        return outputs

    def _check_checkpointing(self, record: Routing) -> None:
        router = record.network.router
        trained = router is not None and any(parameter.requires_grad for parameter in router.parameters())
        if torch.is_grad_enabled() and trained and not record.logits.requires_grad:
            raise ValueError(
                "`use_reentrant` must be False with gradient checkpointing, or the balance loss has no gradient. Pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
