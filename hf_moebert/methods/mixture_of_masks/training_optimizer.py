"""The optimizer that learns masks: minimised over weights and scores, maximised over the multipliers."""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from hf_moebert.training.optimizers import make_adamw

from .modeling_constraint import MaskBudget
from .modeling_masked import MoMModel
from .recipe import MaskSparsityConfig


SCORE_EPSILON = 1e-15  # scores far from closing have tiny gradients, to which Adam's usual 1e-8 is not negligible
SCORE_BETAS = (0.5, 0.999)  # a longer memory of gradients makes the masks overshoot their target
MULTIPLIER_EPSILON = 1e-2  # gradients of multipliers are distances from the target; smaller ones hardly count
# Key of parameter groups without a schedule: the field of the recipe that holds their rate. It is in checkpoints.
CONSTANT_RATE = "steady_rate"


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
    multipliers = [masked.budget.multipliers]
    own = {id(parameter) for parameter in [*scores, *routers, *multipliers]}
    if recipe.freeze_backbone:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
    groups: list[dict[str, Any]] = [
        {"params": routers, "lr": recipe.router_rate},
        {"params": scores, CONSTANT_RATE: "score_rate", "eps": SCORE_EPSILON, "betas": SCORE_BETAS},
        {"params": multipliers, CONSTANT_RATE: "multiplier_rate", "eps": MULTIPLIER_EPSILON, "maximize": True},
    ]
    set_constant_rates(groups, recipe)
    return make_adamw(model, args, groups, rate=recipe.backbone_rate)


def set_constant_rates(groups: list[dict[str, Any]], recipe: MaskSparsityConfig) -> None:
    """Give scores and multipliers the rates of the recipe, whatever the schedule or the checkpoint says."""
    for group in groups:
        if CONSTANT_RATE in group:
            group["lr"] = getattr(recipe, group[CONSTANT_RATE])


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
