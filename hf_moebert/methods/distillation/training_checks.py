"""The checks that student, teacher and checkpoint belong together, each before any work is done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def refuse_shared_parameters(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is no loaded model, or has a parameter in common with the student."""
    if getattr(teacher, "config", None) is None:
        raise ValueError(f"`teacher` must be a loaded model, got {teacher!r}. Load it with `from_pretrained`.")
    storages = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()} - {0}  # 0: empty
    for name, parameter in teacher.named_parameters():
        if parameter.untyped_storage().data_ptr() in storages:
            raise ValueError(
                f"`teacher` must share no parameter with the student, got `{name}` in both. Load the teacher a"
                " second time, or use `copy.deepcopy`: a student cannot learn from itself."
            )


def refuse_other_sizes(
    student: PreTrainedConfig, teacher: PreTrainedConfig, processing_class: Any, *, names: tuple[str, ...]
) -> None:
    """Refuse models that differ in one of the named sizes, and a tokenizer with more tokens than they have.

    A vocabulary may be the other's with padding, up to a multiple that suits kernels: the ids mean the same.
    """
    for name in names:
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if ours != theirs and not (name == "vocab_size" and ours and theirs and _is_padded(*sorted((ours, theirs)))):
            raise ValueError(
                f"`{name}` must be equal in student and teacher, got {ours} and {theirs}. Use a teacher of the same"
                " family: both read the same token ids, and their hidden states are compared without a projection."
            )
    sizes = [size for size in (getattr(config, "vocab_size", None) for config in (student, teacher)) if size]
    vocab_size = min(sizes, default=None)
    if isinstance(processing_class, PreTrainedTokenizerBase) and vocab_size and len(processing_class) > vocab_size:
        raise ValueError(
            f"`processing_class` must have at most the {vocab_size} tokens of the models, got {len(processing_class)}."
            " Use the tokenizer of the teacher, or call `resize_token_embeddings` on both models."
        )


def _is_padded(size: int, padded: int) -> bool:
    """Check whether a size becomes another one when it is rounded up to a power of two of 8 to 512."""
    return any(-(-size // multiple) * multiple == padded for multiple in (8, 16, 32, 64, 128, 256, 512))


def refuse_noise(alpha: float | None) -> None:
    """Refuse noise on the embeddings, which the student alone would see."""
    if alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha` must be None with a teacher, got {alpha}: the student would have noise on its "
            "embeddings, and the teacher none. Leave it out."
        )


def refuse_other_labels(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse models whose logits do not mean the same labels, by number, names, order and problem type."""
    if student.num_labels != teacher.num_labels:
        raise ValueError(
            f"`num_labels` must be equal in student and teacher, got {student.num_labels} and {teacher.num_labels}."
            " Fine-tune the teacher on the student's task first."
        )
    if student.id2label != teacher.id2label:
        raise ValueError(
            f"`id2label` must be equal in student and teacher, names and order, got {student.id2label} and"
            f" {teacher.id2label}. If both mean the same, set `config.id2label` and `config.label2id` of the model"
            " with the wrong names to those of the other; if the order differs, train them on equal label ids."
        )
    agreed_problem_type(student, teacher)


def agreed_problem_type(student: PreTrainedConfig, teacher: PreTrainedConfig) -> str | None:
    """Return the problem type of both models; None if neither config declares one.

    Raises:
        ValueError: If they differ.
    """
    ours, theirs = (declared_problem_type(config) for config in (student, teacher))
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"`problem_type` must be equal in student and teacher, got {ours} and {theirs}. Set `config.problem_type`"
            " of both to what the labels are."
        )
    return ours or theirs


def declared_problem_type(config: PreTrainedConfig) -> str | None:
    """Return the problem type that a config declares, or that a single label implies."""
    if config.problem_type is None and config.num_labels == 1:
        return "regression"
    return config.problem_type


def refuse_non_finite_outputs(outputs: Mapping[str, Any]) -> None:
    """Refuse outputs of the teacher that are NaN or infinite."""
    for name in ("hidden_states", "logits", "start_logits", "end_logits"):
        values = outputs.get(name, ())
        tensors = values if isinstance(values, tuple) else (values,)
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise FloatingPointError(
                f"`teacher` must give finite `{name}`, got NaN or infinity at the first step. Check its weights, or"
                " use bf16 instead of fp16."
            )


def refuse_foreign_checkpoint(folder: Path, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse to resume from a checkpoint that is not the student's.

    A teacher's folder holds a `trainer_state.json`, too: resuming from it would skip that many steps.
    """
    if not (folder / "config.json").is_file():
        return
    source = teacher.name_or_path
    remedy = "Resume from a checkpoint that this student wrote, or train without `resume_from_checkpoint`."
    if source and Path(source).is_dir() and folder.samefile(source):
        raise ValueError(f"`resume_from_checkpoint` must not be the teacher's folder, got {folder}. {remedy}")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        expected = getattr(student, name, None)
        if saved.get(name, expected) != expected:
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint of the student, whose `{name}` is {expected}, got"
                f" {saved[name]} in {folder}. {remedy}"
            )
