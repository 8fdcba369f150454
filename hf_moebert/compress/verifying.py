"""Check on another machine that a compressed model computes there what it computed where it was made."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.tensor_files import read_tensors, save_tensors
from hf_moebert.inference.linears import Precision, check_precision
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.runtime.folders import MANIFEST
from hf_moebert.runtime.verifying import compare_outputs, verify_export


VERIFY_FILE = "verify.safetensors"
EXAMPLES = 8  # texts whose outputs are kept
REMEDY = "Compress again, or copy the whole folder."


def write_golden(folder: Path, model_folder: Path, batch: dict[str, Tensor], precision: str | None) -> None:
    """Keep some inputs with the outputs of a model, as it is and in the precision that it is to run in.

    Args:
        folder: Folder of the run.
        model_folder: The model.
        batch: Inputs, each `(batch, seq)`.
        precision: `None` for as it is.
    """
    tensors = {f"input.{name}": tensor for name, tensor in batch.items()}
    tensors["plain"] = compute(load_model(model_folder), batch)  # (batch, outputs)
    if precision is not None:
        tensors["optimised"] = compute(optimised(model_folder, precision), batch)  # (batch, outputs)
    save_tensors(folder / VERIFY_FILE, tensors, {"precision": precision or ""})


def verify(folder: str | os.PathLike[str]) -> dict[str, float]:
    """Compute the kept outputs of a run once more, here, and refuse a machine on which they are others.

    Args:
        folder: Folder of a run of `compress` or of `export_onnx`, or a copy of it.

    Returns:
        The largest difference, in units of the outputs' spread, of the model as it is and optimised, or of each
        precision that was exported.

    Raises:
        ValueError: If an output differs by more than rounding explains: the processor computes noise in this
            precision, or files are of different runs. If the precision cannot be had here, or files are damaged.
        OSError: If files are missing.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return verify_export(folder)
    tensors, facts = read_tensors(folder / VERIFY_FILE, remedy=REMEDY)
    kept = {name: tensor.numpy() for name, tensor in tensors.items()}
    compare = partial(compare_outputs, kept, plain="plain", file=VERIFY_FILE)
    found = {"plain": compare(answers(load_model(folder / "model")), "plain", precision="float32")}
    if precision := facts["precision"]:
        model = optimised(folder / "model", precision)
        found["optimised"] = compare(answers(model), "optimised", precision=precision)
    return found


def answers(model: PreTrainedModel) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return what computes the outputs of a model for arrays."""
    return lambda inputs: compute(model, {name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()


def optimised(folder: Path, precision: str) -> PreTrainedModel:
    """Load a model, ready to run in a precision."""
    check_precision(cast(Precision, precision))
    return optimize_for_inference(load_model(folder), precision=cast(Precision, precision))


@torch.no_grad()
def compute(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return the logits of texts or tokens, or what first tokens became, in float32, `(rows, outputs)`."""
    outputs = model.eval()(**batch)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()  # (batch, seq)
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)[real].float()
    if "logits" not in outputs:
        return outputs.last_hidden_state[:, 0].float()
    return (outputs.logits[real] if outputs.logits.dim() == 3 else outputs.logits).float()
