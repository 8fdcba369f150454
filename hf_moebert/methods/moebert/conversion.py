"""The way from a dense BERT to a MoEBERT, and what it needs: token counts, and files of importance."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moebert.architectures.families import name_family
from hf_moebert.architectures.heads import warn_of_untrained_head
from hf_moebert.architectures.importance import LABELS, load_batches
from hf_moebert.architectures.stacks import refuse_forms
from hf_moebert.architectures.stock import refuse_other_classes, stock_classes
from hf_moebert.checkpoints.tensor_files import read_tensors, save_tensors

from .configuration_moebert import ENCODERS, why_not_experts
from .modeling_moebert import MoEBertPreTrainedModel, moe_class


FORMAT_VERSION = "1"  # of importance files


def classes_to_cut(dense: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """Return the classes of a family whose outputs can tell what routers decided, by the name of the Auto class."""
    return {auto: stock for auto, stock in stock_classes(dense).items() if auto != "AutoModelForCausalLM"}


def find_moe_class(model: PreTrainedModel) -> type[MoEBertPreTrainedModel]:
    """Return the class of mixtures for a dense model.

    Raises:
        ValueError: If it is compressed in another way than by removing units, its family is not cut into experts, or
            its class is not one of transformers for the family.
    """
    refuse_forms(
        model,
        "dense, or shrunk, to be cut into experts",
        *("adapters", "chains", "crf", "masks", "shared_experts", "tasks"),
        experts="Cut the dense model anew, with other options",
    )
    family = name_family(model)
    if reason := why_not_experts(family):
        raise ValueError(
            f"`model` must be of a family whose networks can be cut into experts, got {family!r}, of which they "
            f"cannot, because {reason}. Use an encoder, one of {ENCODERS}, or describe another family by "
            "`hf_moebert.register_architecture`."
        )
    known = classes_to_cut(CONFIG_MAPPING[family]).values()
    dense = next((stock for stock in known if isinstance(model, stock)), None)
    if dense is None:
        refuse_other_classes(model, known)
    return moe_class(dense)  # type: ignore[arg-type]  # refused above


def from_dense(model: PreTrainedModel, importance: Tensor, **options: Any) -> MoEBertPreTrainedModel:
    """Convert a fine-tuned dense model to the mixture of experts with the same head.

    Args:
        model: The dense model, of a family that `hf_moebert.architectures` knows, or its shrunk form, whose layers are
            cut by their own widths. It is not changed.
        importance: Score of each neuron, from `measure_importance`. Shape `(layers, intermediate)`.
        **options: See `MoEBertModel.from_dense`: `num_experts`, `expert_size`, `num_shared_neurons`, `routing`,
            `token_counts`, `seed`, and further fields of the configuration.

    Returns:
        The student in eval mode, with the dense model's dtype and device.

    Raises:
        ValueError: If the family is not known, it has no such head, or the importance or an option does not fit.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.2.
    """
    student_class = find_moe_class(model)
    warn_of_untrained_head(model, "the student")
    return student_class.from_dense(model, importance, **options)


def count_tokens(dataset: Any, vocab_size: int) -> Tensor:
    """Count how often each token id occurs in a tokenised, unpadded data set, for `hash-balanced` routing.

    Args:
        dataset: Has a column `input_ids`.
        vocab_size: Size of the vocabulary.

    Returns:
        Shape `(vocab_size,)`, int64.

    Raises:
        ValueError: If an id is outside the vocabulary.
    """
    ids = torch.as_tensor(list(itertools.chain.from_iterable(dataset["input_ids"])), dtype=torch.long)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise ValueError(f"`input_ids` must be in [0, {vocab_size}), got {int(wrong[0])}. Use the model's tokenizer.")
    return ids.bincount(minlength=vocab_size)


@torch.no_grad()
def measure_expert_load(
    model: PreTrainedModel, dataset: Any, data_collator: Callable | None = None, *, batch_size: int = 32
) -> Tensor:
    """Count the real tokens of a data set that each expert of a MoEBERT processes.

    Args:
        model: Any MoEBERT.
        dataset: Tokenised examples.
        data_collator: Makes a batch of examples.
        batch_size: Examples per forward.

    Returns:
        Shape `(converted layers, experts)`, int64.
    """
    training = model.training
    model.eval()
    loads = []
    for batch in load_batches(model, dataset, data_collator, batch_size):
        inputs = {name: value for name, value in batch.items() if name not in LABELS}
        loads.append(torch.stack(model(**inputs, output_expert_load=True).expert_load))  # (layers, experts)
    model.train(training)
    return torch.stack(loads).sum(dim=0).cpu()


def fingerprint(model: PreTrainedModel) -> str:
    """Hash all weights of a model with their names, shapes and dtypes (SHA-256)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_importance(path: str | Path, importance: Tensor, model: PreTrainedModel, **metadata: str) -> None:
    """Save scores as safetensors, with the fingerprint of the model they were measured on.

    Args:
        path: File to write, ending in `.safetensors`; it appears complete or not at all.
        importance: Shape `(layers, intermediate)`.
        model: The dense model.
        **metadata: Further facts to keep, e.g. data set, number of examples, seed.

    Raises:
        OSError: If it cannot be written.
    """
    header = {**metadata, "format_version": FORMAT_VERSION, "model": fingerprint(model)}
    save_tensors(path, {"importance": importance}, header)


def load_importance(path: str | Path, model: PreTrainedModel) -> Tensor:
    """Load scores that were measured on exactly this model.

    Args:
        path: File from `save_importance`.
        model: The dense model.

    Returns:
        Shape `(layers, intermediate)`.

    Raises:
        ValueError: If the file is no importance file, damaged, of a newer version or of another model.
        FileNotFoundError: If there is no such file.
    """
    remedy = (
        "Pickles and other formats are not read. Measure the importance with `measure_importance`, and save it with "
        "`save_importance`."
    )
    tensors, header = read_tensors(path, remedy=remedy)
    if list(tensors) != ["importance"] or "model" not in header:
        raise ValueError(
            f"{str(path)!r} must hold the tensor 'importance' and a fingerprint, got {list(tensors)}, {header}. "
            f"{remedy}"
        )
    if (version := header.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {version}, this release reads {FORMAT_VERSION}. Update hf_moebert."
        )
    if header["model"] != (own := fingerprint(model)):
        raise ValueError(
            f"{str(path)!r} was measured on another model: its fingerprint is {header['model']}, this model's is "
            f"{own}. Measure it again, or give the model it belongs to."
        )
    return tensors["importance"]
