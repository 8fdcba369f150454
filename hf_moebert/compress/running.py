"""Run the stages of a recipe, each in a folder of its own, from which the next one goes on."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import numpy as np
from accelerate import PartialState
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_moebert.architectures.importance import measure_importance
from hf_moebert.architectures.surgery import find_feed_forwards
from hf_moebert.checkpoints.embedders import save_embedder
from hf_moebert.checkpoints.json_files import read_json, save_json
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.manifests import find_fault, write_manifest
from hf_moebert.checkpoints.packing import save_packed
from hf_moebert.checkpoints.resuming import last_complete_checkpoint
from hf_moebert.measuring.unit_latency import LatencyTable, measure_unit_latency
from hf_moebert.methods import mixture_of_masks, moebert
from hf_moebert.methods.distillation import DistillationConfig, DistillationTrainer
from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig
from hf_moebert.methods.platon import PlatonPruningCallback, prune_structured
from hf_moebert.methods.trimming import choose_layers, drop_layers, trim_vocabulary
from hf_moebert.training.dropout import without_dropout
from hf_moebert.training.sharding import refuse_sharded

from .recipe import Distil, DropLayers, Experts, Optimize, Pack, Prune, Recipe, Stage, TrimVocabulary
from .stages import shrink
from .tasks import TextData


STAGE_FILE = "stage.json"
CHECKPOINTS = 10  # of a training run, from which it can go on
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Workshop:
    """Everything that the stages of a run share.

    Attributes:
        teacher: The given model.
        tokenizer: Its tokenizer.
        data: Texts.
        recipe: All stages.
        folder: Where each stage leaves its model.
        training: Further fields of `TrainingArguments`.
        callbacks: Further callbacks of every training run.
        tell: Called with one line before and after each stage.
        losses: Steps and losses of the stage that is at work, if it trains.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TextData
    recipe: Recipe
    folder: Path
    training: Mapping[str, Any]
    callbacks: tuple[TrainerCallback, ...]
    tell: Callable[[str], None]
    losses: list[tuple[int, float]] = field(default_factory=list)

    def unit_latency(self) -> LatencyTable:
        """Measure once what a layer of the given model costs with fewer units, on this machine."""
        target, file = self.recipe.target, self.folder / "unit_latency.json"
        length = target.tokens
        if not isinstance(length, int):
            length = round(np.mean([len(ids) for ids in self.data.train["input_ids"]]))
        with PartialState().main_process_first():  # the others read its file
            return measure_unit_latency(self.teacher, batch_size=target.batch, seq_len=length, file=file)

    def run(self, given: str, fingerprint: str) -> tuple[Path, list[dict[str, Any]]]:
        """Run all stages, or those that a broken run has not finished.

        Args:
            given: Folder of the given model.
            fingerprint: Of the model, the data and the settings: a stage of another one is done again.

        Returns:
            The folder of the last model, and what each stage was and took.
        """
        model_folder, done = Path(given), []
        for number, stage in enumerate(self.recipe.stages, start=1):
            if isinstance(stage, Optimize) or is_pending(stage):  # at inference; while the next one trains
                continue
            name = f"{number}-{stage.name}"
            settings = self.settings_up_to(number) | {"fingerprint": fingerprint}
            folder = self.folder / f"{name}-{digest(settings)}"  # searches share the stages that they begin with
            took = find_finished(folder)
            if took is None:
                self.tell(f"{name}: begins")
                took = self.work(stage, model_folder, folder, settings, pending=self.recipe.stages[number - 2])
                self.tell(f"{name}: {took['parameters']:,} parameters, {took['seconds']:.0f} s")
            else:
                self.tell(f"{name}: found finished")
            done.append({"stage": name, "options": asdict(stage), **took})
            model_folder = folder
        return model_folder, done

    def settings_up_to(self, number: int) -> dict[str, Any]:
        """Return what a stage and those before it were told."""
        stages = [{stage.name: asdict(stage)} for stage in self.recipe.stages[:number]]
        settings = {"stages": stages, "seed": self.recipe.seed}
        settings["training"] = {name: str(value) for name, value in self.training.items()}
        if any(isinstance(stage, Prune) and stage.speed_up for stage in self.recipe.stages[:number]):
            settings["timed"] = [self.recipe.target.batch, self.recipe.target.tokens]
        return settings

    def work(
        self, stage: Stage, model_folder: Path, folder: Path, settings: dict[str, Any], *, pending: Stage
    ) -> dict[str, Any]:
        """Do one stage: load, change, save in a draft, which gets its name when it is whole.

        Of several processes each does all of it, for scores and steps are shared; the first one saves.
        """
        start, training = time.monotonic(), folder.with_suffix(".training")
        model = load_model(model_folder)  # as a resumed run does, so that both go on with the same numbers
        set_seed(self.recipe.seed)
        tokenizer = self.tokenizer
        if (model_folder / STAGE_FILE).is_file():  # an earlier stage may have trimmed it
            tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
        if isinstance(stage, TrimVocabulary):
            model, tokenizer = trim_vocabulary(model, tokenizer, self.data.texts_read, coverage=stage.coverage)
        else:
            model = self.change(stage, model, pending=pending, training=training)
        took: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "parameters": model.num_parameters()}
        if self.losses:
            took["losses"] = list(self.losses)
        processes = PartialState()
        processes.wait_for_everyone()  # nobody trains any more
        if processes.is_main_process:
            facts = {"settings": settings, "took": took}
            self.save(model.eval(), tokenizer, folder, facts, packed=isinstance(stage, Pack))
            shutil.rmtree(training, ignore_errors=True)
        processes.wait_for_everyone()  # the next stage begins with what was saved
        return took

    def change(self, stage: Stage, model: PreTrainedModel, *, pending: Stage, training: Path) -> PreTrainedModel:
        """Return what a stage makes of a model; a training run that saved nothing leaves no folder."""
        self.losses.clear()
        try:
            return apply(stage, model, self, pending=pending, training=training)
        finally:
            if PartialState().is_main_process and not any(training.glob("checkpoint-*")):
                shutil.rmtree(training, ignore_errors=True)

    def save(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        facts: dict[str, Any],
        *,
        packed: bool,
    ) -> None:
        """Save a model as what was given, whole or not at all: an embedder as a folder of sentence-transformers."""
        draft = folder.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        if self.data.form is not None:
            save_embedder(model, tokenizer, draft, self.data.form)
        elif packed:
            save_packed(model, draft)
        else:
            model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        save_json(draft / STAGE_FILE, facts)
        write_manifest(draft)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)


def is_pending(stage: Stage) -> TypeGuard[Prune]:
    """Return whether a stage acts while the next one trains."""
    return isinstance(stage, Prune) and stage.acts_while_training


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short name for all that decides what a stage makes."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def find_finished(folder: Path) -> dict[str, Any] | None:
    """Return what a finished stage took; `None` if it is not there or not whole."""
    if not folder.is_dir() or find_fault(folder) is not None:
        return None
    return read_json(folder / STAGE_FILE, remedy="Delete the folder.")["took"]


@singledispatch
def apply(stage: Stage, model: PreTrainedModel, workshop: Workshop, *, pending: Stage, training: Path) -> Any:
    """Return what a stage makes of a model.

    Args:
        stage: The stage.
        model: What the stage before it left; it may be changed.
        workshop: What all stages share.
        pending: The stage before it, which may act while this one trains.
        training: Folder of the checkpoints of a training run.
    """
    raise NotImplementedError(stage)


@apply.register
def _(stage: Pack, model: PreTrainedModel, workshop: Workshop, **_: Any) -> PreTrainedModel:
    return model


@apply.register
def _(stage: DropLayers, model: PreTrainedModel, workshop: Workshop, **_: Any) -> PreTrainedModel:
    return drop_layers(model, kept_layers(stage, model, workshop))


def kept_layers(stage: DropLayers, model: PreTrainedModel, workshop: Workshop) -> list[int]:
    """Return the indices of the layers that stay; the same for the same model and texts."""
    if isinstance(stage.keep, list):
        return stage.keep
    count = stage.count_layers(model.config.num_hidden_layers)
    by = cast(Literal["position", "importance"], stage.by)
    return choose_layers(model, count, workshop.data.texts, workshop.data.collator, by=by)


def follow(stage: Distil, workshop: Workshop) -> DistillationConfig:
    """Return the recipe of the Trainer: each layer that is left follows what went into the next one in the teacher."""
    groups = {"group_column": workshop.data.group_column}
    dropped = next((other for other in workshop.recipe.stages if isinstance(other, DropLayers)), None)
    if dropped is None or not stage.hidden_states:
        return stage.distillation(**groups)
    _, *behind = kept_layers(dropped, workshop.teacher, workshop)
    return stage.distillation(**groups, layer_map=[*behind, workshop.teacher.config.num_hidden_layers])


@apply.register
def _(stage: Prune, model: PreTrainedModel, workshop: Workshop, **_: Any) -> PreTrainedModel:
    goal: dict[str, Any] = {"keep_ratio": stage.keep_ratio}
    if stage.speed_up is not None:
        goal = {"speed_up": stage.speed_up, "latency": workshop.unit_latency()}
    goal |= {"multiple_of": stage.multiple_of, "uniform": stage.uniform}
    return prune_structured(model, workshop.data.texts, workshop.data.collator, seed=workshop.recipe.seed, **goal)


@apply.register
def _(stage: Experts, model: PreTrainedModel, workshop: Workshop, **_: Any) -> PreTrainedModel:
    data, seed = workshop.data, workshop.recipe.seed
    importance = importance_of(model, workshop, examples=stage.importance_examples)
    counts = None
    if stage.routing == "hash-balanced":
        counts = moebert.count_tokens(data.train, model.config.vocab_size)
    return cut_into_experts(stage, model, importance, counts, seed=seed)


def cut_into_experts(
    stage: Experts, model: PreTrainedModel, importance: Tensor, token_counts: Tensor | None, *, seed: int = 0
) -> PreTrainedModel:
    """Return a mixture of experts; layers that pruning left fewer neurons than experts stay as they are."""
    options: dict[str, Any] = {"num_experts": stage.num_experts, "routing": stage.routing, "seed": seed}
    optional: dict[str, Any] = {"expert_size": stage.expert_size, "token_counts": token_counts}
    widths = [network.num_units for network in find_feed_forwards(model)]
    wide = [layer for layer, width in enumerate(widths) if width >= stage.num_experts]
    if len(wide) < len(widths):
        optional["layers"] = wide
    options |= {name: value for name, value in optional.items() if value is not None}
    return moebert.from_dense(model, importance, **options)


def importance_of(model: PreTrainedModel, workshop: Workshop, *, examples: int) -> Tensor:
    """Measure the importance of the neurons, by labels where there are some."""
    data = workshop.data
    options: dict[str, Any] = {"max_examples": examples, "seed": workshop.recipe.seed, "labels": data.learns_labels}
    return measure_importance(model, data.train, data.collator, **options)


@apply.register
def _(stage: Distil, model: PreTrainedModel, workshop: Workshop, *, pending: Stage, training: Path) -> PreTrainedModel:
    args, callbacks = training_arguments(stage, workshop, training), list(workshop.callbacks)
    optimizers: tuple[Any, Any] = (None, None)
    if is_pending(pending) and pending.method == "masks":
        importance = importance_of(model, workshop, examples=Experts().importance_examples)
        model = mixture_of_masks.from_dense(model, importance=importance, group_size=pending.multiple_of)
        masks = MaskSparsityCallback(MaskSparsityConfig(keep_ratio=pending.keep_ratio or 1))
        callbacks, optimizers = [*callbacks, masks], (masks.make_optimizer(model, args), None)
    elif is_pending(pending):
        latency = None if pending.speed_up is None else workshop.unit_latency()
        callbacks.append(PlatonPruningCallback(pending.platon(**windows(stage, workshop)), latency=latency))
    trainer = DistillationTrainer(
        model=model,
        args=args,
        teacher=workshop.teacher,
        distillation=follow(stage, workshop),
        train_dataset=workshop.data.train,
        data_collator=workshop.data.collator,
        processing_class=workshop.tokenizer,
        callbacks=callbacks,
        optimizers=optimizers,
    )
    refuse_sharded(trainer.model, "A stage must save a whole model")
    trainer.remove_callback(PrinterCallback)  # one line a stage, and the losses in `trainer_state.json`
    with nullcontext() if stage.dropout else without_dropout(trainer.model):
        trainer.train(resume_from_checkpoint=find_checkpoint(training))
    logged = trainer.state.log_history
    workshop.losses.extend((entry["step"], round(entry["loss"], 6)) for entry in logged if "loss" in entry)
    return without_pruned(trainer.model, pending)


def without_pruned(model: Any, pending: Stage) -> PreTrainedModel:
    """Return a trained model without the units that were pruned while it trained."""
    if not is_pending(pending) or pending.granularity != "structured":
        return model
    if pending.method == "masks":
        return shrink(model.fix_masks(pending.keep_ratio))
    return shrink(model, multiple_of=pending.multiple_of, uniform=pending.uniform)


def windows(stage: Distil, workshop: Workshop) -> dict[str, Any]:
    """Let PLATON choose often enough for a short run: at least some ten times."""
    return {"window": max(1, min(100, stage.count_steps(len(workshop.data.train)) // 30))}


def training_arguments(stage: Distil, workshop: Workshop, folder: Path) -> TrainingArguments:
    """Return the arguments of a training run that can go on after a crash."""
    steps = stage.count_steps(len(workshop.data.train))
    fields: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup,
        "per_device_train_batch_size": stage.batch_size,
        # The documents of a query are compared with each other, and stay together
        "train_sampling_strategy": "sequential" if workshop.data.group_column else "group_by_length",
        "seed": workshop.recipe.seed,
        "save_steps": max(1, steps // CHECKPOINTS),
        "save_total_limit": 2,
        "logging_steps": max(1, steps // 20),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": PartialState().device.type == "cpu",  # or its processes never meet on a machine without accelerator
    }
    if PartialState().num_processes > 1:  # each step reads what it would in one process, in parts
        fields["accelerator_config"] = {"split_batches": True}
    return TrainingArguments(output_dir=str(folder), **fields | dict(workshop.training))


def find_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint of a broken run, if there is one."""
    if not folder.is_dir():
        return None
    try:
        return last_complete_checkpoint(folder)
    except ValueError as error:
        logger.info(str(error))
        return None
