"""Feed-forward networks whose experts are masks on their activations."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mixture_of_masks import MoMFields
from .functional import choose_experts, draw_masks, mix_masks, settle_masks
from .modeling_routing import Routing, record
from .modeling_surgery import FeedForward, matrix_of


ROUTER_STD = 0.02
IMPORTANCE_SPREAD = 10.0  # initial score of the most important unit, minus that of the least important one
INITIAL_SCORE, SCORE_STD = 3.0, 0.01  # without noise, all masks are 1: the dense model
HIGHEST_SCORE = 14.0  # a mask is 1 whatever the noise, and 0 at minus as much
SCHEDULE_SIZE = 10  # numbers that describe how a run learns its masks: the fields of the recipe, its steps and seed


class MaskRouter(nn.Linear):
    """A router whose logits are computed in float32 whatever the model's dtype or autocast."""

    def __init__(self, config: MoMFields, hidden_size: int) -> None:
        super().__init__(hidden_size, config.num_experts, bias=False, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Draw small weights, so that all experts are about equally probable at first."""
        nn.init.normal_(self.weight, std=ROUTER_STD)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of the experts, `(..., hidden)` to `(..., experts)`."""
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():  # an unneeded context costs time
            return F.linear(hidden_states.float(), self.weight.float())


class Masks(nn.Module):
    """Masks of one network: scores while they are learned, 0 or 1 once they are fixed."""

    def __init__(self, config: MoMFields, num_units: int) -> None:
        super().__init__()
        self.group_size = config.group_size
        shape = (config.num_experts, num_units // config.group_size)
        self.scores: nn.Parameter | None = None
        if config.mask_stage == "learned":
            self.scores = nn.Parameter(torch.empty(shape, dtype=torch.float32))  # (experts, groups)
            self.reset_parameters()
        else:
            self.is_open: Tensor = nn.Buffer(torch.ones(shape, dtype=torch.uint8))  # (experts, groups)
        self.noise: Tensor | None = None  # of the current step; None outside of a run

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw scores at which all masks are open."""
        self.learned.normal_(INITIAL_SCORE, SCORE_STD, generator=generator)

    @property
    def learned(self) -> nn.Parameter:
        """Scores of masks that are being learned, `(experts, groups)`."""
        assert self.scores is not None
        return self.scores

    def fix(self, is_open: Tensor) -> None:
        """Replace the scores by masks of 0 and 1, `(experts, groups)`."""
        self.scores = self.noise = None
        self.is_open = nn.Buffer(is_open.to(torch.uint8))

    def expand(self, groups: Tensor) -> Tensor:
        """Repeat the value of each group for its units, `(..., groups)` to `(..., units)`."""
        return groups if self.group_size == 1 else groups.repeat_interleave(self.group_size, dim=-1)

    def forward(self) -> Tensor:
        """Return the masks in float32, `(experts, units)`."""
        if self.scores is None or self.noise is None or not self.training:
            return self.settled()
        return self.expand(draw_masks(self.scores, self.noise))

    def settled(self) -> Tensor:
        """Return the masks without noise, in float32, `(experts, units)`."""
        return self.expand(self.is_open.float() if self.scores is None else settle_masks(self.scores))

    def set_noise(self, noise: Tensor | None) -> None:
        """Set the noise of the current step, `(experts, groups)`; a method, because PEFT's wrappers forward calls."""
        self.noise = noise


class MaskBudget(nn.Module):
    """State of a run that learns masks.

    It is part of every checkpoint, so that a resumed run continues as if it had never stopped.
    """

    in_run = False  # whether a callback draws noise

    def __init__(self) -> None:
        super().__init__()
        self.clock: Tensor = nn.Buffer(torch.zeros((), dtype=torch.int64))  # counted optimiser steps
        self.schedule: Tensor = nn.Buffer(torch.zeros(SCHEDULE_SIZE, dtype=torch.float32))  # zeros before a run


class RoutedFeedForward(nn.Module):
    """Base of masked and compact networks: the dense matrices, and a router if there are several experts.

    Args:
        dense: The network as transformers built it; its matrices become those of this module.
        config: Configuration of the model.
    """

    def __init__(self, dense: FeedForward, config: MoMFields) -> None:
        super().__init__()
        parts = dense.separated()
        self.is_gated = "gate" in parts
        if self.is_gated:
            self.gate = parts["gate"]
        self.up, self.down, self.act_fn = parts["up"], parts["down"], dense.part("activation")
        self.inner_dropout = dense.part("inner_dropout") or nn.Identity()
        self.outer_dropout = dense.part("outer_dropout") or nn.Identity()
        self.router = MaskRouter(config, matrix_of(self.up).shape[1]) if config.num_experts > 1 else None
        self.top_k = config.num_experts_per_tok
        self.block = 0  # index among the blocks of the model
        self.load: Tensor | None = None  # tokens of each expert since the last log, (experts,)

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for each token, and record the decision: indices and weights, `(tokens, top_k)`."""
        assert self.router is not None  # with one expert there is nothing to choose
        logits = self.router(hidden_states)  # (batch, seq, experts), as a module: an adapter may wrap it
        index, weights = choose_experts(logits.flatten(0, -2), self.top_k)
        # Compilers cannot read a context variable: training breaks the graph here, inference skips the record
        if self.training or not torch.compiler.is_compiling():
            record(Routing(self, logits, index))
        return index, weights

    def activate(self, hidden_states: Tensor) -> Tensor:
        """Compute the activations, `(..., hidden)` to `(..., units)`."""
        if self.is_gated:
            return self.act_fn(self.gate(hidden_states)) * self.up(hidden_states)
        return self.act_fn(self.up(hidden_states))

    def project_down(self, inner: Tensor) -> Tensor:
        """Apply the down-projection, `(..., units)` to `(..., hidden)`."""
        inner = self.inner_dropout(inner)
        if not torch.is_autocast_enabled(inner.device.type):
            inner = inner.to(self.down.weight.dtype)  # T5 keeps this matrix in float32 beside float16
        if not inner.shape[-1]:  # `Conv1D` refuses it, but DDP wants gradients of empty weights, too
            return F.linear(inner, matrix_of(self.down), self.down.bias)
        return self.down(inner)


class MaskedFeedForward(RoutedFeedForward):
    """A feed-forward network with masks on its activations.

    Args:
        dense: The network as transformers built it; its matrices become those of this module.
        config: Configuration of the model.

    Raises:
        ValueError: If the groups of units do not divide the width.

    Source: Liu et al. 2025, "Masks Can be Learned as an Alternative to Experts", ACL, abstract.
    """

    def __init__(self, dense: FeedForward, config: MoMFields) -> None:
        super().__init__(dense, config)
        if dense.num_units % config.group_size:
            raise ValueError(
                f"`group_size` must divide the {dense.num_units} units of {dense.path!r}, got {config.group_size}. "
                "Use 8, or 1 for a mask of each unit."
            )
        self.masks = Masks(config, dense.num_units)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the dense network with the masks of each token's experts, `(..., hidden)` to the same shape.

        `down(h * sum(weight_e * mask_e))` is the weighted sum of the experts' outputs, because `down` is linear.
        """
        inner = self.activate(hidden_states)  # (..., units)
        return self.outer_dropout(self.project_down(inner * self.mask_tokens(hidden_states, inner.dtype)))

    def mask_tokens(self, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mask of each token, `(..., units)`, or one for all, `(units,)`."""
        masks = self.masks().to(dtype)  # (experts, units)
        if self.router is None:
            return masks[0]
        index, weights = self.route(hidden_states)
        return mix_masks(masks, index, weights).unflatten(0, hidden_states.shape[:-1])
