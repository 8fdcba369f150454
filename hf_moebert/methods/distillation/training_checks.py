"""The checks that student, teacher and checkpoint belong together, each before any work is done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import unwrap_peft_model

from hf_moebert.architectures.heads import has_head
from hf_moebert.training.sharding import local_values


def refuse_shared_parameters(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is no loaded model, or has a parameter in common with the student."""
    if getattr(teacher, "config", None) is None:
        raise ValueError(f"`teacher` must be a loaded model, got {teacher!r}. Load it with `from_pretrained`.")
    storages = {local_values(p).untyped_storage().data_ptr() for p in student.parameters()} - {0}  # 0: empty
    for name, parameter in teacher.named_parameters():
        if local_values(parameter).untyped_storage().data_ptr() in storages:
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
                " family: both read the same token ids. Hidden sizes may differ with `projection=True`."
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


def refuse_other_vocabulary(processing_class: Any, teacher: PreTrainedModel) -> None:
    """Refuse a tokenizer that numbers its tokens differently from the one in the teacher's folder, if there is one."""
    folder = Path(getattr(teacher, "name_or_path", "") or "")
    if not isinstance(processing_class, PreTrainedTokenizerBase) or not (folder / "tokenizer_config.json").is_file():
        return
    ours = processing_class.get_vocab()
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    if differing := [token for token in sorted(theirs) if ours.get(token) != theirs[token]]:
        raise ValueError(
            f"`processing_class` must number its tokens as the tokenizer of the teacher in {str(folder)!r}, but"
            f" {differing[0]!r} is {ours.get(differing[0])} and not {theirs[differing[0]]}. Use the teacher's"
            " tokenizer for both: they read the same token ids."
        )


def refuse_other_heads(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two models of which one alone has a head, and embedders that read two sequences."""
    ours, theirs = (unwrap_peft_model(model) for model in (student, teacher))
    if has_head(ours) != has_head(theirs):
        raise ValueError(
            f"`model` and `teacher` must both have a head or both none, got {type(ours).__name__} and"
            f" {type(theirs).__name__}. Load both with the same Auto class."
        )
    if not has_head(ours) and ours.config.is_encoder_decoder:
        raise ValueError(
            f"`model` must be an encoder if it has no head, got {type(ours).__name__}. Use its encoder alone, or add a"
            " head to student and teacher."
        )


def refuse_hidden_states_of_shards(hidden_states: bool) -> None:
    """Refuse hidden states of models without head under FSDP2, which makes of a body a class that records none."""
    if hidden_states:
        raise ValueError(
            "`hidden_states` must be False for models without head under FSDP2, got True: transformers records none of"
            " a model that FSDP2 wraps itself. Use DistillationConfig(hidden_states=False), or data parallelism."
        )


def refuse_idle_projection(compares_states: bool, is_sharded: bool) -> None:
    """Refuse a projection that nothing is compared through, and one beside a model that FSDP shards."""
    if not compares_states or is_sharded:
        raise ValueError(
            "`projection` must be False "
            + ("with FSDP, which does not shard it" if is_sharded else "when predictions alone are compared")
            + ", got True. Leave it out, and `hidden_states` too where sizes differ."
        )


def refuse_batches_of_one(size: int) -> None:
    """Refuse batches in which a text has no other to be similar to."""
    if size < 2:
        raise ValueError(
            f"`per_device_train_batch_size` must be at least 2 for similarities inside a batch, got {size}. Use 16, or"
            " DistillationConfig(similarity_weight=0)."
        )


def refuse_bad_groups(column: str, dataset: Any, student: PreTrainedModel) -> None:
    """Refuse groups for a model of more than one score, a column that is not there, and groups of one.

    Nothing is known of the columns of a stream, nor of rows that are no mapping.
    """
    if student.config.num_labels != 1 or not has_head(unwrap_peft_model(student)):
        raise ValueError(
            f"`group_column` must be None but for models with one score, got {column!r} for a"
            f" {type(unwrap_peft_model(student)).__name__} of {student.config.num_labels} labels. Leave it out."
        )
    names = getattr(dataset, "column_names", None)
    if not names or not hasattr(dataset, "__len__"):
        return
    if column not in names:
        raise ValueError(f"`group_column` must be one of the columns {names}, got {column!r}. Name the queries.")
    groups = dataset.with_format(None)[column][:]
    if not all(isinstance(group, int) for group in groups):
        raise ValueError(
            f"`group_column` must hold whole numbers, {column!r} does not. Number the queries, for instance by"
            " `pandas.factorize`."
        )
    if len(set(groups)) == len(groups):
        raise ValueError(
            f"`group_column` must put several texts in a group, but those of {column!r} all have one: they have no"
            " margins. Leave it out."
        )


def refuse_empty_texts(count: int) -> None:
    """Refuse texts without a single token, which have no embedding."""
    if count:
        raise ValueError(
            f"`train_dataset` must hold texts of at least one token, {count} had none since the last log: they have no"
            " embedding. Drop empty texts."
        )


def refuse_no_pairs(count: int | None, column: str | None) -> None:
    """Refuse batches that hold no two texts of one group; `None` if nothing was grouped."""
    if count == 0:
        raise ValueError(
            f"`group_column` must put two texts of a group into a batch, but none was met in those of {column!r}. Sort"
            ' the rows by group, and use `train_sampling_strategy="sequential"`.'
        )


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
    for name in ("last_hidden_state", "hidden_states", "logits", "start_logits", "end_logits"):
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
