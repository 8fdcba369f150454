"""Export of a tagger: the encoder as a graph that returns emissions, and the scores of the CRF beside it."""

import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file
from transformers import PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter

from .functional_numpy import digest
from .modeling_decoder import SCORES


@torch.no_grad()
def export_crf(model: PreTrainedModel, folder: str | PathLike[str], **inputs: Any) -> None:
    """Write `model.onnx`, which returns the emissions, `crf.safetensors`, which `load_decoder` reads, and config.json.

    Viterbi decoding loops over words, which graphs do slowly, so it stays outside, as a few lines of numpy. Moves
    that decoding forbids are written as the score -inf.

    Args:
        model: Tagger with a CRF.
        folder: Folder to write to.
        **inputs: Names and example values of the graph's inputs, if not `input_ids` and `attention_mask`. The exported
            graph takes any batch size and length.

    Raises:
        ValueError: If the model has no CRF.
    """
    if not hasattr(model, "crf"):
        raise ValueError(
            f"`model` must be a tagger with a CRF, got {type(model).__name__}. Make one with "
            "`CrfForTokenClassification.from_dense`."
        )
    if not inputs:
        mask = torch.ones(2, 9, dtype=torch.long, device=model.device)
        mask[-1, 7:] = 0
        inputs = {"input_ids": 2 * mask, "attention_mask": mask}
    was_training = model.training
    try:
        OnnxExporter().export(model.eval(), inputs, OnnxConfig(dynamic=True)).save_pretrained(folder)
    finally:
        model.train(was_training)
    scores = model.crf.scores_for("decoding", torch.float32)
    arrays = {name: score.contiguous().cpu().numpy() for name, score in zip(SCORES, scores, strict=True)}
    place = Path(folder) / "crf.safetensors"
    draft = place.with_name(f".{place.name}.draft")
    save_file(arrays, draft, metadata={"sha256": digest(arrays)})
    os.replace(draft, place)
