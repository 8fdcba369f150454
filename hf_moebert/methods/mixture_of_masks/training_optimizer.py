"""The optimizer that learns masks, whose scores have a rate of their own."""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from hf_moebert.training.optimizers import make_adamw

from .modeling_masked import MoMModel
from .modeling_masks import MaskBudget
from .recipe import MaskSparsityConfig


SCORE_EPSILON = 1e-15  # scores far from closing have tiny gradients, to which Adam's usual 1e-8 is not negligible
SCORE_BETAS = (0.5, 0.999)  # most of a mask's gradients are zero, and a long memory would carry on old ones
SCORES = "of_scores"  # key of the group of the scores; it is in checkpoints


def make_optimizer(
    model: nn.Module, masked: MoMModel, recipe: MaskSparsityConfig, args: TrainingArguments
) -> torch.optim.AdamW:
    """Make the optimizer described in `MaskSparsityCallback.make_optimizer`.

    Args:
        model: The model as given to the Trainer.
        masked: The model with masks in it.
        recipe: The learning rates, and whether other weights are frozen.
        args: As given to the Trainer.
    """
    networks = masked.masked_networks().values()
    scores = [network.masks.learned for network in networks]
    routers = [network.router.weight for network in networks if network.router is not None]
    own = {id(parameter) for parameter in [*scores, *routers]}
    if recipe.freeze_backbone:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
    groups: list[dict[str, Any]] = [
        {"params": routers, "lr": recipe.router_rate},
        {"params": scores, SCORES: True, "lr": recipe.score_rate, "eps": SCORE_EPSILON, "betas": SCORE_BETAS},
    ]
    return make_adamw(model, args, groups, rate=recipe.backbone_rate)


def set_score_rate(groups: list[dict[str, Any]], rate: float) -> None:
    """Give the scores their rate, whatever the schedule or the checkpoint says."""
    for group in groups:
        if SCORES in group:
            group["lr"] = rate


def find_learned(model: nn.Module) -> MoMModel:
    """Return the model with masks to learn that is given to a Trainer, perhaps wrapped by PEFT.

    Raises:
        ValueError: If there is none, or if PEFT would not save its masks.
    """
    inner = unwrap_peft_model(model)
    stage = getattr(getattr(inner, "config", None), "mask_stage", "dense")
    if not isinstance(inner, MoMModel) or stage != "learned":
        raise ValueError(
            f"`model` must have masks to learn, got {type(inner).__name__} whose stage is {stage!r}. Make one with "
            "`from_dense(dense)`; fixed masks need no callback."
        )
    is_saved = isinstance(model, MoMModel) or not isinstance(inner.budget, MaskBudget)  # PEFT has wrapped it
    if not is_saved:
        raise ValueError(
            "`modules_to_save` of the PEFT configuration must name the masks, or no checkpoint would hold them. Use "
            '`LoraConfig(..., modules_to_save=["masks", "router", "budget"])`.'
        )
    return inner
