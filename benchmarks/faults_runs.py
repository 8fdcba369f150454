"""Tiny training runs that save in every step: one for each callback of this package, a sweep, and a recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_moebert import (
    CheckpointManifestCallback,
    DistillationConfig,
    DistillationTrainer,
    MaskSparsityCallback,
    MaskSparsityConfig,
    MPOEGradientMaskCallback,
    MPOEGradientMaskConfig,
    MPOSqueezingCallback,
    MPOSqueezingConfig,
    MultiTaskSweep,
    MultiTaskSweepConfig,
    MultiTaskSweepTask,
    PlatonConfig,
    PlatonPruningCallback,
    compress_mpo,
    last_complete_checkpoint,
)
from hf_moebert.compress.door import compress
from hf_moebert.compress.recipe_file import parse_recipe
from hf_moebert.measuring.comparison import TextColumns
from hf_moebert.methods import mixture_of_masks, mpoe


STEPS = 8
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
SQUEEZING = {"metric": "eval_loss", "higher_is_better": False, "allowance": 9.0, "cuts": 2}
# The callback of each kind, its recipe, and another recipe
CALLBACKS = {
    "manifest": (CheckpointManifestCallback, None, None),
    "pruning": (
        PlatonPruningCallback,
        PlatonConfig(keep_ratio=0.3, initial_warmup=1, final_warmup=1, window=2),
        PlatonConfig(keep_ratio=0.4, initial_warmup=1, final_warmup=1, window=2),
    ),
    "squeezing": (
        MPOSqueezingCallback,
        MPOSqueezingConfig(**SQUEEZING),
        MPOSqueezingConfig(**SQUEEZING, directions=2),
    ),
    "gradient mask": (
        MPOEGradientMaskCallback,
        MPOEGradientMaskConfig(keep=0.5),
        MPOEGradientMaskConfig(keep=0.6),
    ),
    "masks": (MaskSparsityCallback, MaskSparsityConfig(keep_ratio=0.6), MaskSparsityConfig(keep_ratio=0.7)),
    "distillation": (None, DistillationConfig(), DistillationConfig(weight=0.5)),
}
KINDS = tuple(CALLBACKS)


def make_bert(layers: int = 2, seed: int = 0) -> BertForSequenceClassification:
    """Make a tiny classifier, always of the same weights for a seed."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=16))
    model.accepts_loss_kwargs = False  # the stock head averages over a batch
    return model


def make_data(seed: int = 0) -> Dataset:
    """Make sequences whose label is whether they begin with a small id."""
    ids = torch.randint(5, 20, (32, 6), generator=torch.Generator().manual_seed(seed))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] < 10).long()}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def make_arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """Make the arguments of a short run on a CPU that leaves no traces but its checkpoints."""
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0, "logging_steps": 1}
    run = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    return TrainingArguments(str(folder), **quiet | run | {"save_strategy": "steps", "save_steps": 1} | options)


def make_model(kind: str) -> PreTrainedModel:
    """Make the model that a kind of run begins with."""
    dense = make_bert()
    if kind == "squeezing":
        return compress_mpo(dense)
    if kind == "gradient mask":
        return mpoe.from_dense(dense, num_experts=2)
    return mixture_of_masks.from_dense(dense, num_experts=2) if kind == "masks" else dense


def make_trainer(
    kind: str, folder: str | Path, *, model: PreTrainedModel | None = None, changed: bool = False, **options: Any
) -> Trainer:
    """Make a run of a kind.

    Args:
        kind: One of `KINDS`.
        folder: Its `output_dir`.
        model: Model to train, by default a new one.
        changed: Whether it has another recipe.
        **options: Arguments of the callback, `resume_from` and `allow_changes`, and of `TrainingArguments`.
    """
    made, recipe = CALLBACKS[kind][0], CALLBACKS[kind][2 if changed else 1]
    own = {name: options.pop(name) for name in ("resume_from", "allow_changes") if name in options}
    model = make_model(kind) if model is None else model
    if kind == "squeezing":
        options = {"eval_strategy": "steps", "eval_steps": 2} | options
    args = make_arguments(folder, **options)
    data: dict[str, Any] = {"train_dataset": make_data(), "eval_dataset": make_data(1)}
    if made is None:
        return DistillationTrainer(model, args, teacher=make_bert(seed=1), distillation=recipe, **data, **own)
    callback = made(**own) if recipe is None else made(recipe, **own)
    if kind == "masks":
        data["optimizers"] = (callback.make_optimizer(model, args), None)
    return Trainer(model, args, callbacks=[callback], **data)


def find_checkpoint(folder: str | Path) -> str | None:
    """Return the last complete checkpoint of a run, or None if there is none yet."""
    try:
        return last_complete_checkpoint(folder)
    except ValueError:
        return None


def train(kind: str, folder: str | Path, **options: Any) -> dict[str, Tensor]:
    """Begin a run, or go on with one that was killed, and return the weights at its end."""
    if kind == "sweep":
        sweep = make_sweep(folder, **options)
        return sweep.merge(sweep.choose_depths()).state_dict()
    if kind == "recipe":
        return compress_by_recipe(Path(folder))
    checkpoint = find_checkpoint(folder)
    model = None  # the bonds of a squeezed model are those of its checkpoint
    if checkpoint and kind == "squeezing":
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    trainer = make_trainer(kind, folder, model=model, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return dict(trainer.model.state_dict())


def compress_by_recipe(folder: Path) -> dict[str, Tensor]:
    """Go through the stages of a recipe, and return the weights at their end."""
    given, words = folder.with_suffix(".given"), [f"w{number}" for number in range(15)]
    make_bert().save_pretrained(given)  # again whenever a run goes on: always the same bytes
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    BertTokenizer(vocab={token: n for n, token in enumerate([*special, *words])}).save_pretrained(given)
    texts = [f"{first} {second}" for first in words for second in words]
    data = Dataset.from_dict({"text": texts, "label": [int(text < "w5") for text in texts]})
    stages = [{"prune": {"keep_ratio": 0.5}}, {"experts": {"num_experts": 2}}, {"distil": {"steps": STEPS}}]
    recipe = parse_recipe({"stages": stages, "target": {"tokens": 8}})
    quiet = {"use_cpu": True}
    columns = TextColumns(max_length=12)
    result = compress(
        given, recipe, data=data, output_dir=folder, columns=columns, training=quiet, resume=True, rounds=2
    )
    return dict(result.load().state_dict())


def make_sweep(folder: str | Path, *, changed: bool = False, allow_changes: bool = False) -> MultiTaskSweep:
    """Make a sweep of one task: two teachers and a student."""
    task = MultiTaskSweepTask(
        new_model=make_bert,
        train_dataset=make_data(),
        dev_dataset=make_data(1),
        score=lambda answers: float(np.mean(answers.predictions.argmax(-1) == answers.label_ids)),
        metric="accuracy",
    )
    rate = 2e-2 if changed else 1e-2
    args = make_arguments(folder, save_strategy="no", max_steps=4, learning_rate=rate)
    recipe = MultiTaskSweepConfig(teacher_layers=[1, 2], student_layers=[1])
    return MultiTaskSweep({"task": task}, args, recipe, allow_changes=allow_changes)
