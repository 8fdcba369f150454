"""What all models with masks share: the constraint in the loss, fixing the masks, loading."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_mixture_of_masks import MoMFields
from .functional import (
    active_share,
    balance_loss,
    choose_masks,
    chosen_experts,
    classify_units,
    open_probability,
    real_tokens,
    sparsity_penalty,
)
from .modeling_compact import CompactExperts, CompactFeedForward
from .modeling_feed_forward import find_feed_forwards
from .modeling_masks import (
    INITIAL_SCORE,
    ROUTER_STD,
    SCORE_STD,
    MaskedFeedForward,
    MaskRouter,
    Masks,
    RoutedFeedForward,
    Routing,
    recording,
)


logger = logging.get_logger(__name__)
SCHEDULE = 10  # numbers that say how a run learns its masks: the fields of the recipe, its steps and seed


class MaskBudget(nn.Module):
    """What holds the masks to their target while they are learned.

    All of it is in the checkpoints, so that a resumed run goes on as if it had never stopped.

    Args:
        num_budgets: One for all blocks, or as many as there are.
    """

    target: float | None = None  # the sparsity asked for in this step, once a run asks

    def __init__(self, num_budgets: int) -> None:
        super().__init__()
        self.multipliers = nn.Parameter(torch.zeros(2, num_budgets))  # of the gap and of its square; maximised over
        self.clock: Tensor = nn.Buffer(torch.zeros((), dtype=torch.int64))  # optimiser steps that counted
        self.schedule: Tensor = nn.Buffer(torch.zeros(SCHEDULE))  # the recipe's numbers; zeros before a run
        self.sparsity: Tensor = nn.Buffer(torch.zeros(num_budgets), persistent=False)  # expected in the last forward


def _constrained(forward: Callable) -> Callable:
    """Wrap a host's forward: while training, its loss gets the constraint and the balance of the routers."""
    names = list(inspect.signature(forward).parameters)[1:]

    @can_return_tuple
    @functools.wraps(forward)
    def wrapped(self: "MoMModel", *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        given.pop("return_dict", None)
        if not self.training:
            return self._mend_empty(forward(self, **given, return_dict=True), given)
        with recording() as records:
            outputs = forward(self, **given, return_dict=True)
        return self._constrain(self._mend_empty(outputs, given), records, given)

    return wrapped


class MoMModel(PreTrainedModel):
    """What all models of this folder share; a model says only which host it extends."""

    config: MoMFields
    _can_set_experts_implementation_cached_value = True  # the host would search the wrong file for its decorator
    # Patterns of names; all that match become float32, also integers such as `masks.is_open` and `budget.clock`
    _keep_in_fp32_modules_strict = {"masks.scores", "router.weight", "budget.multipliers", "budget.schedule"}
    _predicts_next = True  # whether labels are the inputs, and compared with the prediction before them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if MoMModel in cls.__bases__:  # a subclass of a model inherits what is wrapped
            cls.forward = _constrained(cls.forward)

    def __init__(self, config: MoMFields, *args: Any, **kwargs: Any) -> None:
        with _as_dense(config):
            super().__init__(config, *args, **kwargs)
        found = find_feed_forwards(self)
        for block in config.blocks:
            dense = found[block]
            network: RoutedFeedForward | None = None
            if config.mask_stage != "compact":
                network = MaskedFeedForward(dense, config)
            else:
                width, sizes = config.block_sizes(block)
                width = dense.num_units if width is None else width
                if any(sizes):
                    network = CompactFeedForward(dense, config, width, sizes)
                else:
                    dense.narrow(width)
            if network is not None:
                network.block = block
                dense.replace_in(self, network)
        if config.mask_stage == "learned":
            self.budget = MaskBudget(len(config.blocks) if config.mask_budget == "layer" else 1)

    def networks(self) -> dict[str, RoutedFeedForward]:
        """Return the masked feed-forward networks, or those with experts of their own, by path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, RoutedFeedForward)}

    def masked_networks(self) -> dict[str, MaskedFeedForward]:
        """Return the masked networks by path.

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

    @torch.no_grad()
    def fix_masks(self, active: float | None = None) -> Self:
        """Turn learned scores into masks of 0 and 1, in place: the end of the first stage.

        Optimisers that were made before know nothing of it: go on with a new `Trainer`.

        Args:
            active: Share of all masks that stay open, in (0, 1]; of each block if the budget is that of a `layer`.
                With `top_k` 1 that is the share of units which a token uses, with more it uses more of them. `None`
                keeps as many as are open with a probability of at least 1/2. All experts of a block get the same
                number: their own highest scores.

        Raises:
            ValueError: If masks are not being learned, scores are not finite, or the share does not exist.
        """
        if self.config.mask_stage != "learned":
            raise ValueError(
                f"`fix_masks` must come while masks are learned, but the stage is {self.config.mask_stage!r}. Start "
                "from the dense model again."
            )
        if not self.budget.clock:
            logger.warning("No step was counted in which masks are learned: they are fixed as they began.")
        networks = self.masked_networks().values()
        scores = torch.stack([network.masks.learned for network in networks])  # (layers, experts, groups)
        chosen = choose_masks(scores, active, by_layer=self.config.mask_budget == "layer")
        for network, is_open in zip(networks, chosen, strict=True):
            network.masks.fix(is_open)
        del self.budget
        self.config.mask_stage = "fixed"
        return self

    @torch.no_grad()
    def count_units(self) -> dict[str, dict[str, int]]:
        """Count for each masked network the units that are shared, specific and inactive, by path.

        While masks are learned, those count as open that are so without noise.
        """
        kinds = ("shared", "specific", "inactive")
        return {
            path: {k: int(units.sum()) for k, units in zip(kinds, classify_units(n.masks.settled() > 0), strict=True)}
            for path, n in self.masked_networks().items()
        }

    @torch.no_grad()
    def draw_noise(self, seed: int) -> None:
        """Draw the noise of one optimiser step: the same in every forward until the next draw, on every process.

        Args:
            seed: Of the run; with the clock it decides what is drawn.
        """
        digest = hashlib.sha256(f"{seed}/{int(self.budget.clock)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        for network in self.masked_networks().values():
            scores = network.masks.learned
            network.masks.set_noise(torch.rand(scores.shape, generator=generator).to(scores.device))

    def _constrain(self, outputs: Any, records: list[Routing], given: dict[str, Any]) -> Any:
        """Add the balance of the routers and the constraint on the masks to the loss."""
        real = [self._real_tokens(record, given) for record in records]
        extra: dict[str, Tensor] = {}
        for record, of_record in zip(records, real, strict=True):
            counts = chosen_experts(record.chosen, of_record, record.logits.shape[-1]).sum(dim=0)
            record.network.load = counts if record.network.load is None else record.network.load + counts
        if records and self.config.router_aux_loss_coef:
            self._check_checkpointing(records[-1])
            losses = [balance_loss(x.logits, x.chosen, place) for x, place in zip(records, real, strict=True)]
            extra["aux_loss"] = torch.stack(losses).mean()
        target = self.budget.target if self.config.mask_stage == "learned" else None
        if target is not None:
            sparsity = 1 - self._active_shares(records, real)  # (networks,)
            sparsity = sparsity if self.config.mask_budget == "layer" else sparsity.mean(dim=0, keepdim=True)
            self.budget.sparsity = sparsity.detach()
            extra["sparsity_loss"] = sparsity_penalty(sparsity, target, self.budget.multipliers)
        elif self.config.mask_stage == "learned":
            logger.warning_once("Nobody sets the target, so masks are not learned: add `MaskSparsityCallback`.")
        if outputs.get("loss") is not None:
            weights = {"aux_loss": self.config.router_aux_loss_coef, "sparsity_loss": 1.0}
            share = self._share_of_step(given)
            outputs["loss"] = outputs["loss"] + share * sum(weights[name] * value for name, value in extra.items())
        elif extra:
            logger.warning_once("Without `labels` the constraint on the masks is in no loss: add `sparsity_loss`.")
        for name, value in extra.items():
            outputs[name] = value
        return outputs

    def _active_shares(self, records: list[Routing], real: list[Tensor]) -> Tensor:
        """Return the expected share of the units of each network that a token uses, `(networks,)`."""
        routed = {
            id(record.network): (record.chosen, of_record) for record, of_record in zip(records, real, strict=True)
        }
        shares = []
        for network in self.masked_networks().values():
            probability = open_probability(network.masks.learned)  # (experts, groups)
            known = routed.get(id(network))  # nothing of one that did not run, or has nothing to decide
            shares.append(probability.mean() if known is None else active_share(probability, *known))
        return torch.stack(shares)

    def _real_tokens(self, record: Routing, given: dict[str, Any]) -> Tensor:
        """Say which of the tokens that a router saw are not padding, `(tokens,)`."""
        mask = self._token_mask(record.network, given)
        return real_tokens(mask if torch.is_tensor(mask) else None, record.shape, record.logits.device)

    def _token_mask(self, network: nn.Module, given: dict[str, Any]) -> Tensor | None:
        return given.get("attention_mask")

    def _share_of_step(self, given: dict[str, Any]) -> Tensor | float:
        """Return this batch's share of the targets of all that are accumulated: terms then count once in a step."""
        total, labels = given.get("num_items_in_batch"), given.get("labels")
        if total is None or labels is None:
            return 1.0
        return (labels[..., 1:] != -100).sum() / torch.as_tensor(total, device=labels.device).clamp(min=1)

    def _mend_empty(self, outputs: Any, given: dict[str, Any]) -> Any:
        """Replace the host's mean over no target, which is NaN."""
        labels = given.get("labels")
        if labels is None or labels.is_floating_point() or torch.compiler.is_compiling():
            return outputs
        if not ((labels[..., 1:] if self._predicts_next else labels) != -100).any():
            outputs["loss"] = outputs["logits"].sum() * 0.0
        return outputs

    def _check_checkpointing(self, record: Routing) -> None:
        router = record.network.router
        trained = router is not None and router.weight.requires_grad
        if torch.is_grad_enabled() and trained and not record.logits.requires_grad:
            raise ValueError(
                "`use_reentrant` must be False with gradient checkpointing, or the balance loss has no gradient. Pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Prefer `sliced_mm` to the host's choice."""
        return super().get_correct_experts_implementation(requested_experts or "sliced_mm")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Masks) and module.scores is not None:
            init.normal_(module.scores, INITIAL_SCORE, SCORE_STD)
        elif isinstance(module, Masks):
            init.ones_(module.is_open)
        elif isinstance(module, MaskRouter):
            init.normal_(module.weight, std=ROUTER_STD)
        elif isinstance(module, MaskBudget):
            init.zeros_(module.multipliers)
            init.zeros_(module.clock)
            init.zeros_(module.sparsity)
            init.zeros_(module.schedule)
        elif isinstance(module, CompactExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=ROUTER_STD)

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, allow_nonfinite: bool = False, **kwargs: Any
    ) -> Any:
        """Load like the host, but never make up what the checkpoint lacks.

        Args:
            *args: As for the host.
            output_loading_info: As for the host.
            allow_nonfinite: Whether weights may be NaN or infinite.
            **kwargs: As for the host.

        Raises:
            ValueError: If the checkpoint is incomplete, or a weight is not finite.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        misfits = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
        if lost := sorted([*info["missing_keys"], *misfits]):
            raise ValueError(
                f"The checkpoint must hold all weights, masks, routers and experts in their sizes, it lacks {lost}. "
                "Convert a dense model with `from_dense`, or get the whole checkpoint."
            )
        broken = [name for name, p in model.named_parameters() if not (p.is_meta or p.isfinite().all())]
        if broken and not allow_nonfinite:
            raise ValueError(
                f"The checkpoint must hold finite weights, these are not: {broken}. Train again with a smaller "
                "learning rate, or load with `allow_nonfinite=True` to look at them."
            )
        return (model, info) if output_loading_info else model


@contextmanager
def _as_dense(config: MoMFields) -> Iterator[None]:
    """Hide the widths of single layers while the host, which does not know them, builds the dense model."""
    described: Any = config
    layers = described.to_dict().get("per_layer_config")
    described.per_layer_config = None
    try:
        yield
    finally:
        described.per_layer_config = layers
