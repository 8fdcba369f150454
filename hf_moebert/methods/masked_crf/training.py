"""The optimizer that trains the scores of a CRF faster than the encoder below it."""

import torch
from torch import nn
from transformers import TrainingArguments

from hf_moebert.training.optimizers import make_adamw

from .modeling_crf import MaskedCRF


def make_optimizer(model: nn.Module, args: TrainingArguments, *, score_rate: float = 1e-2) -> torch.optim.AdamW:
    """Make the optimizer for `Trainer(..., optimizers=(optimizer, None))`.

    AdamW moves a score by about the learning rate a step, and scores of transitions have to move by some units: at the
    rate of an encoder they hardly leave zero. They get a rate of their own, and no weight decay; the schedule of the
    Trainer holds for them, too. Our own design.

    Args:
        model: As given to the Trainer; PEFT may have wrapped it if `modules_to_save` names the CRF.
        args: As given to the Trainer; the rate, the decay and all else of other weights.
        score_rate: Learning rate of the scores, above 0.

    Raises:
        ValueError: If there is no CRF whose scores can be trained, `score_rate` is not above 0, or `args` ask for
            another optimizer than AdamW.
    """
    if not score_rate > 0:
        raise ValueError(f"`score_rate` must be above 0, got {score_rate!r}. Use 1e-2.")
    layers = [module for module in model.modules() if isinstance(module, MaskedCRF)]
    scores = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    if not scores:
        raise ValueError(
            f"`model` must have a CRF to train, got a {type(model).__name__} "
            f"{'whose CRF is frozen' if layers else 'without'}. Make one with `from_dense`; with PEFT, name `crf` in "
            "`modules_to_save`."
        )
    return make_adamw(model, args, [{"params": scores, "lr": score_rate}])


__all__ = ["make_optimizer"]
