"""The linear map from a student's hidden states to those of a wider or narrower teacher."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_moebert.checkpoints.tensor_files import read_tensors, save_tensors


STATE_FILE = "distillation_state.safetensors"


class Projection(nn.Linear):
    """Map hidden states of the student to the teacher's size, one map for all layers.

    It is no part of the student: the optimizer of its trainer knows it, checkpoints keep it in a file of its own, and
    what is saved as a model is without it. It begins as the identity, cut or filled with zeros.

    Args:
        student_size: Hidden size of the student.
        teacher_size: Hidden size of the teacher.
        accelerator: Of the trainer, whose processes average its gradients.

    Source: Jiao et al. 2020, https://arxiv.org/abs/1909.10351, eq. 8; one for all layers as in the authors' code, its
    beginning is our own choice.
    """

    def __init__(self, student_size: int, teacher_size: int, accelerator: Accelerator) -> None:
        super().__init__(student_size, teacher_size, bias=False, device=accelerator.device)
        nn.init.eye_(self.weight)
        if accelerator.num_processes > 1:

            def average(weight: Tensor) -> None:
                # With accumulation, what is averaged already is equal in all processes, and stays as it is.
                assert weight.grad is not None
                weight.grad.copy_(accelerator.reduce(weight.grad, "mean"))

            self.weight.register_post_accumulate_grad_hook(average)

    def add_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer train the map, without decay, if it does not yet."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if id(self.weight) not in known:
            optimizer.add_param_group({"params": [self.weight], "weight_decay": 0.0})

    def save(self, folder: Path) -> None:
        """Write the map into a checkpoint."""
        save_tensors(folder / STATE_FILE, {"projection": self.weight})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the map of a checkpoint.

        Raises:
            ValueError: If it is damaged, or of other sizes.
            FileNotFoundError: If there is none.
        """
        remedy = "Resume from another checkpoint."
        saved: Tensor = read_tensors(folder / STATE_FILE, remedy=remedy)[0]["projection"]
        if saved.shape != self.weight.shape:
            raise ValueError(
                f"{STATE_FILE} in {str(folder)!r} must map between the sizes {tuple(self.weight.shape)} of teacher "
                f"and student, got {tuple(saved.shape)}. {remedy}"
            )
        self.weight.copy_(saved)
