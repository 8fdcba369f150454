"""The base of all models with masks: building, fixing the masks, and loading."""

import hashlib
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from .configuration_mixture_of_masks import MoMFields
from .configuration_widths import as_dense
from .functional import choose_masks, classify_units, open_probability, shift_to_share
from .modeling_balance import BalancedModel, add_balance
from .modeling_compact import CompactExperts, CompactFeedForward
from .modeling_masks import (
    HIGHEST_SCORE,
    INITIAL_SCORE,
    ROUTER_STD,
    SCORE_STD,
    MaskBudget,
    MaskedFeedForward,
    MaskRouter,
    Masks,
    RoutedFeedForward,
)
from .modeling_surgery import find_feed_forwards


logger = logging.get_logger(__name__)


class MoMModel(BalancedModel):
    """Base of all models with masks; a subclass only adds the class of transformers that it extends."""

    config: MoMFields
    _tp_plan: dict[str, str] = {}  # nothing is sharded: see `base_model_tp_plan` of the configurations
    # Patterns of names; all that match become float32, also integers such as `masks.is_open` and `budget.clock`
    _keep_in_fp32_modules_strict = {"masks.scores", "router.weight", "budget.schedule"}
    _keys_to_ignore_on_load_unexpected = [r"budget\.multipliers$"]  # in 0.1.0 they held the masks to their target

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if MoMModel in cls.__bases__:  # further subclasses inherit the wrapped method
            cls.forward = add_balance(cls.forward)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for its decorator in another file

    def __init__(self, config: MoMFields, *args: Any, **kwargs: Any) -> None:
        with as_dense(config):
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
            self.budget = MaskBudget()

    @torch.no_grad()
    def fix_masks(self, keep_ratio: float | None = None) -> Self:
        """Turn learned scores into masks of 0 and 1, in place: the end of the first stage.

        Existing optimizers still hold the scores: continue with a new `Trainer`.

        Args:
            keep_ratio: Share of all masks that stay open, in (0, 1]; of each block if `mask_budget` is `layer`. With
                `top_k` 1 it is the share of the units that a token uses; with more experts a token uses more units.
                `None` keeps as many as are open with a probability of at least 1/2. All experts of a block keep the
                same number of masks: those with their highest scores.

        Raises:
            ValueError: If masks are not being learned, scores are not finite, or the share does not exist.
        """
        if self.config.mask_stage != "learned":
            raise ValueError(
                f"`fix_masks` must come while masks are learned, but the stage is {self.config.mask_stage!r}. Start "
                "from the dense model again."
            )
        if not self.budget.clock:
            logger.warning("No training step of the masks was counted: they are fixed at their initial scores.")
        for network, is_open in self._choose(keep_ratio):
            network.masks.fix(is_open)
        del self.budget
        self.config.mask_stage = "fixed"
        return self

    @torch.no_grad()
    def hold_masks(self, sparsity: float) -> None:
        """Shift all scores of a budget together, in place, so that its masks are closed with this mean probability.

        Their order and differences stay as they are: what closes is learned, how much is not.

        Args:
            sparsity: In (0, 1).
        """
        for scores in self._budgets():
            shift = shift_to_share(torch.cat([of_block.flatten() for of_block in scores]), 1 - sparsity)
            for of_block in scores:
                of_block.add_(shift)

    @torch.no_grad()
    def measure_sparsity(self) -> Tensor:
        """Return the mean probability of the masks of each budget to be closed, `(budgets,)`."""
        closed = [torch.stack([1 - open_probability(x).mean() for x in scores]).mean() for scores in self._budgets()]
        return torch.stack(closed)

    @torch.no_grad()
    def harden_masks(self, keep_ratio: float) -> None:
        """Set the scores, in place, so that masks are the 0 and 1 of `fix_masks`, and gradients move them no more.

        Args:
            keep_ratio: As of `fix_masks`.
        """
        for network, is_open in self._choose(keep_ratio):
            scores = network.masks.learned
            scores.copy_(torch.where(is_open, HIGHEST_SCORE, -HIGHEST_SCORE))
            network.masks.set_noise(None)

    def _choose(self, keep_ratio: float | None) -> list[tuple[MaskedFeedForward, Tensor]]:
        """Return each network with the masks that stay open, `(experts, groups)`."""
        networks = self.masked_networks().values()
        scores = torch.stack([network.masks.learned for network in networks])  # (layers, experts, groups)
        chosen = choose_masks(scores, keep_ratio, by_layer=self.config.mask_budget == "layer")
        return list(zip(networks, chosen, strict=True))

    def _budgets(self) -> list[list[nn.Parameter]]:
        """Return the scores of the blocks that share a target, by budget."""
        scores = [network.masks.learned for network in self.masked_networks().values()]
        return [[of_block] for of_block in scores] if self.config.mask_budget == "layer" else [scores]

    @torch.no_grad()
    def count_units(self) -> dict[str, dict[str, int]]:
        """Count the shared, specific and inactive units of each masked network, by path.

        Masks that are being learned count as open if they are open without noise.
        """
        counts = {}
        for path, network in self.masked_networks().items():
            shared, specific, inactive = classify_units(network.masks.settled() > 0)
            counts[path] = {
                "shared": int(shared.sum()),
                "specific": int(specific.sum()),
                "inactive": int(inactive.sum()),
            }
        return counts

    @torch.no_grad()
    def draw_noise(self, seed: int) -> None:
        """Draw the noise of one optimiser step, which is the same in every forward pass and on every process.

        Args:
            seed: Seed of the run; the noise depends on it and on the clock.
        """
        digest = hashlib.sha256(f"{seed}/{int(self.budget.clock)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        for network in self.masked_networks().values():
            scores = network.masks.learned
            network.masks.set_noise(torch.rand(scores.shape, generator=generator).to(scores.device))

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the requested implementation, by default `sliced_mm`."""
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
            init.zeros_(module.clock)
            init.zeros_(module.schedule)
        elif isinstance(module, CompactExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=ROUTER_STD)
