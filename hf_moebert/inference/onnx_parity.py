"""How near an exported graph is to the model in torch, and its int8 form to float32."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_moebert.architectures.positions import count_positions

from .onnx_runtime import OnnxModel


Batch = dict[str, Tensor]
TOLERANCE = 1e-4  # between torch and ONNX Runtime in float32, for values around 1
# Rows, tokens and padding of the batches that must give the same: none has the shape of the example that is traced
EXAMPLE, CHECKED = (2, 9, 2), ((1, 1, 0), (1, 7, 2), (3, 16, 16), (5, 12, 0))


def check_parity(model: PreTrainedModel, found: OnnxModel, max_length: int | None) -> float:
    """Return the largest difference between a model and its graph.

    Raises:
        ValueError: If it is too large.
    """
    largest = 0.0
    for rows, length, pad in CHECKED:
        batch = make_batch(model, rows, min(length, max_length or length), pad)
        for wanted, got in zip(compute(model, batch), tensors_of(found(**batch)), strict=True):
            difference = float((got - wanted).abs().max())
            if got.shape != wanted.shape or not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
                raise ValueError(
                    f"`model` must give in ONNX Runtime what it gives in torch up to {TOLERANCE}, "
                    f"{type(model).__name__} differs by {difference:.1e} for {rows} x {length}. Use "
                    "`optimize_for_inference`."
                )
            largest = max(largest, difference)
    return largest


def compute(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Return what the graph of a model must give: the emissions of a CRF, which is decoded outside."""
    if not hasattr(model, "crf"):
        return tensors_of(model(**batch))
    return [model(**batch, word_mask=batch["attention_mask"] == 1).logits]


def compare(found: OnnxModel, wanted: OnnxModel, samples: list[Batch]) -> dict[str, float]:
    """Compare the first outputs of two graphs, text by text."""
    pairs = [(tensors_of(found(**one))[0].flatten(), tensors_of(wanted(**one))[0].flatten()) for one in samples]
    cosines = torch.stack([F.cosine_similarity(*pair, dim=0) for pair in pairs])
    return {
        "texts": len(samples),
        "worst_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def samples_of(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> list[Batch]:
    """Return each text as a batch of one, or drawn ids where there are none."""
    names = make_batch(model, *EXAMPLE).keys()
    if not texts:
        return [make_batch(model, 1, 8, 0, seed=seed) for seed in range(8)]
    options = {"truncation": True, "max_length": min(count_positions(model) or 512, 512), "return_tensors": "pt"}
    encoded = [tokenizer(text, **options) for text in texts]
    return [{name: one[name] for name in names if name in one} for one in encoded]


def collate(samples: Sequence[Batch]) -> Batch:
    """Put batches of one row into one batch, padded by zeros to the longest."""
    if "pixel_values" in samples[0]:
        return samples[0]  # one image is enough
    longest = max(one["input_ids"].shape[1] for one in samples)
    return {
        name: torch.cat([F.pad(one[name], (0, longest - one[name].shape[1])) for one in samples])
        for name in samples[0]
    }


def make_batch(model: PreTrainedModel, rows: int, length: int, pad: int, seed: int = 0) -> Batch:
    """Draw inputs; the last row has padding, at most as much as leaves it empty."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        return {"pixel_values": torch.randn(rows, config.num_channels, *size, generator=generator)}
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(length - pad, 0) :] = 0
    batch = {"input_ids": ids.where(mask == 1, getattr(config, "pad_token_id", None) or 0), "attention_mask": mask}
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and (getattr(config, "type_vocab_size", None) or 0) > 1:
        batch["token_type_ids"] = torch.randint(2, (rows, length), generator=generator)
    return batch


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output, in order."""
    parts = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [one for part in parts for one in (part if isinstance(part, tuple) else (part,)) if isinstance(one, Tensor)]
