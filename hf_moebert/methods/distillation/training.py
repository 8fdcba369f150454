"""The `Trainer` of a student: a subclass, because it needs a second model, the teacher."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput, unwrap_peft_model
from transformers.utils import logging
from transformers.utils.generic import find_labels

from hf_moebert.architectures.functional_pooling import pool
from hf_moebert.architectures.heads import has_head, warn_of_untrained_head
from hf_moebert.architectures.pooling import find_pooling
from hf_moebert.checkpoints.resuming import last_complete_checkpoint
from hf_moebert.training.sharding import refuse_sharded_but_fsdp2, shard_frozen

from .functional import classification_loss, hidden_state_loss, multi_label_loss, regression_loss, span_loss
from .functional_embeddings import embedding_loss, margin_loss, similarity_loss
from .recipe import DistillationConfig
from .training_checks import (
    agreed_problem_type,
    refuse_bad_groups,
    refuse_batches_of_one,
    refuse_empty_texts,
    refuse_foreign_checkpoint,
    refuse_hidden_states_of_shards,
    refuse_idle_projection,
    refuse_no_pairs,
    refuse_noise,
    refuse_non_finite_outputs,
    refuse_other_heads,
    refuse_other_labels,
    refuse_other_sizes,
    refuse_other_vocabulary,
    refuse_shared_parameters,
)
from .training_projection import Projection
from .training_recipe import DistillationRecipeCallback


logger = logging.get_logger(__name__)

LABEL_COLUMNS = ("label", "label_ids", "labels")  # of data with labels that a model without a head has no use for


class DistillationTrainer(Trainer):
    """Train a student on its task and on the hidden states and predictions of a frozen teacher.

    The loss is `task + weight * (hidden + prediction)`. `task` is what the stock `Trainer` would minimise; `hidden`
    sums one mean squared error per hidden state, embeddings included, or is left out; `prediction` compares the
    outputs. While training, all terms are logged without the weight as `loss_task`, `loss_hidden`, `loss_hidden_<k>`
    (0 = embeddings) and `loss_prediction`, each the mean over the micro-batches of all processes since the last log.
    Evaluation is the stock one. Batches without labels are taught by the teacher alone: their `task` is zero.

    Models without a head need no labels at all: `prediction` is the distance of the embeddings and, weighted, of the
    similarities inside the batch, logged as `loss_embedding` and `loss_similarity`. With a `group_column`, models of
    one score also follow the margins inside each group, logged as `loss_margin`.

    The teacher becomes frozen and moves to the device of `args`; where FSDP2 spreads the student over processes, it is
    spread, too. It is no part of the student: no checkpoint and no optimizer holds it.

    Args:
        *args: As for `Trainer`.
        teacher: A trained model with the labels, vocabulary and hidden size of the student.
        distillation: The recipe; by default `DistillationConfig()`.
        allow_changes: As for `CheckpointManifestCallback`, which every run of this class has.
        **kwargs: As for `Trainer`; `model` is the student.

    Raises:
        ValueError: If student, teacher and recipe do not fit each other, and the message names what differs; or if
            the run shards its model by other means than FSDP2.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, layer-wise distillation.
    """

    # `compute_loss` returns a mean over the micro-batch, so `training_step` must divide by their number. By default
    # transformers trusts every model with `**kwargs` to do so, and stock heads do not.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        distillation: DistillationConfig | None = None,
        allow_changes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = DistillationConfig() if distillation is None else distillation
        refuse_sharded_but_fsdp2(self.model, "The student must be whole beside its teacher, or in rows as it is")
        refuse_noise(self.args.neftune_noise_alpha)
        refuse_shared_parameters(self.model, teacher)
        refuse_other_heads(self.model, teacher)
        compares_states = self.distillation.hidden_states or not has_head(unwrap_peft_model(teacher))
        names = ("vocab_size", "hidden_size") if compares_states else ("vocab_size",)
        if self.distillation.projection:
            refuse_idle_projection(compares_states, self.is_fsdp_enabled)
            names = ("vocab_size",)
        refuse_other_sizes(self.model.config, teacher.config, self.processing_class, names=names)
        refuse_other_vocabulary(self.processing_class, teacher)
        self._projection = self._make_projection(teacher) if self.distillation.projection else None
        self._pooling = None if has_head(unwrap_peft_model(teacher)) else self._prepare_embeddings(teacher)
        if self._pooling is None:
            refuse_other_labels(self.model.config, teacher.config)
        elif self.accelerator.is_fsdp2:
            refuse_hidden_states_of_shards(self.distillation.hidden_states)
        if self.distillation.group_column is not None:
            refuse_bad_groups(self.distillation.group_column, self.train_dataset, self.model)
        self._teacher_layers = self.distillation.teacher_layers(
            self.model.config.num_hidden_layers, teacher.config.num_hidden_layers
        )

        teacher.requires_grad_(False).train(self.distillation.reference_teacher_dropout)
        inner = unwrap_peft_model(teacher)
        if not isinstance(teacher, FSDPModule):  # that of an earlier run
            warn_of_untrained_head(inner, "the student")
        self._teacher_inputs = set(inspect.signature(inner.forward).parameters) - set(find_labels(type(inner)))
        self._teacher_checked = False
        self.teacher = teacher
        if self.accelerator.is_fsdp2:
            shard_frozen(teacher, self.args.device)
        else:
            teacher.to(self.args.device)
        self._reset_terms()
        self._recipe_callback = DistillationRecipeCallback(
            self.distillation, self._projection, allow_changes=allow_changes
        )
        self.add_callback(self._recipe_callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the stock `Trainer` does.

        Raises:
            ValueError: If `resume_from_checkpoint` is not a whole checkpoint of the student.
            FloatingPointError: If the teacher or a term of the loss is NaN or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            refuse_foreign_checkpoint(Path(resume_from_checkpoint), self.model.config, self.teacher.config)
            self._recipe_callback.check_whole(Path(resume_from_checkpoint))
        self._reset_terms()
        if self.args.push_to_hub:
            self.save_model()  # pushes during training take the model's code from here, and weights from checkpoints
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of the task, plus that of the distillation while training."""
        if self.compute_loss_func is None and self.label_smoother is None:
            # Only these two divide by the number of items; a model's own loss is the mean over its micro-batch.
            num_items_in_batch = None
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        groups = self._take_groups(inputs)  # (batch,)
        task, student = self._student_loss(model, inputs, num_items_in_batch)
        teacher = self._teacher_outputs(inputs)
        if self._pooling is not None:
            predictions = self._embedding_losses(student, teacher, inputs)
        else:
            predictions = self._score_losses(student, teacher, inputs, groups)
        hidden = self._hidden_losses(student, teacher, self._real_tokens(inputs))
        self._record({"loss_task": task.mean(), **hidden, **predictions})
        weights = {"loss_similarity": self.distillation.similarity_weight}
        terms = [weights.get(name, 1.0) * term for name, term in predictions.items()]
        loss = task + self.distillation.weight * sum(terms, hidden.get("loss_hidden", 0.0))
        return (loss, student) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the stock `Trainer` does, without the column of groups."""
        inputs.pop(self.distillation.group_column or "", None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the stock `Trainer` does, with the terms of the loss beside a training loss.

        Raises:
            FloatingPointError: If a term was NaN or infinite since the last log.
        """
        if self._micro_batches and not logs.keys().isdisjoint({"loss", "train_loss"}):
            means = self._mean_terms()  # at the end of training, `train_loss`, only for the check
            if "loss" in logs:
                logs |= means
        super().log(logs, start_time)

    def _student_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Mapping[str, Any]]:
        columns = {**inputs, **self._output_options()}
        if self._pooling is not None:
            columns = {name: value for name, value in columns.items() if name not in LABEL_COLUMNS}
        labelled = self._pooling is None and any(name in inputs for name in self.label_names)
        if self.compute_loss_func is None and not labelled:
            if self._pooling is None:
                logger.warning_once(f"No {self.label_names} in the batch: the student learns from the teacher alone.")
            return torch.zeros((), device=self.args.device), self._check_outputs(model(**columns), "model")
        loss, outputs = super().compute_loss(model, columns, True, num_items_in_batch)
        if num_items_in_batch is not None:  # a share of the accumulated batch: back to the scale of a micro-batch
            loss = loss * self.current_gradient_accumulation_steps
        return loss, self._check_outputs(outputs, "model")

    @torch.no_grad()
    def _teacher_outputs(self, inputs: dict[str, Any]) -> Mapping[str, Any]:
        columns = {name: value for name, value in inputs.items() if name in self._teacher_inputs}
        if "word_mask" in self._teacher_inputs and "labels" in inputs:  # a CRF's, whose words are where labels are
            columns.setdefault("word_mask", inputs["labels"] != -100)
        with self.accelerator.autocast():
            outputs = self.teacher(**columns, **self._output_options())
        outputs = self._check_outputs(outputs, "teacher")
        if not self._teacher_checked:  # once: a frozen teacher does not break later, and each check waits for the GPU
            refuse_non_finite_outputs(outputs)
            self._teacher_checked = True
        return outputs

    def _output_options(self) -> dict[str, bool]:
        return {"output_hidden_states": self.distillation.hidden_states, "return_dict": True}

    def _check_outputs(self, outputs: Any, role: str) -> Mapping[str, Any]:
        names = list(outputs) if isinstance(outputs, Mapping) else []
        needed = "`hidden_states` and `logits`" if self.distillation.hidden_states else "`logits`"
        silent = self.distillation.hidden_states and "hidden_states" not in names
        if self._pooling is not None and not silent and "last_hidden_state" in names:
            return outputs
        if silent or not {"logits", "start_logits"} & set(names):
            raise ValueError(
                f"`{role}` must return {needed} (or `start_logits` and `end_logits`), got {names}. Use an encoder with"
                " a head for classification, regression or question answering."
            )
        return outputs

    def _hidden_losses(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], real: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the sum of the losses and each of them by its name; nothing if hidden states are left out."""
        if not self.distillation.hidden_states:
            return {}
        layers = [
            hidden_state_loss(self._project(state), teacher["hidden_states"][layer], real)
            for state, layer in zip(student["hidden_states"], self._teacher_layers, strict=True)
        ]
        named = {f"loss_hidden_{k}": layer for k, layer in enumerate(layers)}
        return {"loss_hidden": torch.stack(layers).sum(), **named}

    def _make_projection(self, teacher: PreTrainedModel) -> Projection:
        return Projection(self.model.config.hidden_size, teacher.config.hidden_size, self.accelerator)

    def _project(self, states: Tensor) -> Tensor:
        return states if self._projection is None else self._projection(states)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as the stock `Trainer` does, which also learns a projection if there is one."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._projection is not None:
            self._projection.add_to(optimizer)
        return optimizer

    def _prepare_embeddings(self, teacher: PreTrainedModel) -> str:
        """Return the pooling of two models without heads."""
        if self.distillation.similarity_weight:
            refuse_batches_of_one(self.args.per_device_train_batch_size)
        return find_pooling(unwrap_peft_model(teacher), self.distillation.pooling)

    def _embedding_losses(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        mask = inputs.get("attention_mask")
        if mask is not None:
            self._count("empty texts", (mask.sum(1) == 0).sum())
        pooling = str(self._pooling)
        ours, theirs = (pool(outputs["last_hidden_state"], mask, pooling) for outputs in (student, teacher))
        losses = {"loss_embedding": embedding_loss(self._project(ours), theirs, self.distillation.embedding_distance)}
        if self.distillation.similarity_weight:
            losses["loss_similarity"] = similarity_loss(ours, theirs, self.distillation.similarity_temperature)
        return losses

    def _take_groups(self, inputs: dict[str, Any]) -> Tensor | None:
        column = self.distillation.group_column
        if column is not None and column not in inputs:
            raise ValueError(
                f"`group_column` must be a column of the batches, which have {sorted(inputs)}, got {column!r}. Let the"
                " data set and the collator carry it."
            )
        return inputs.pop(column or "", None)

    def _score_losses(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any], groups: Tensor | None
    ) -> dict[str, Tensor]:
        real, labels = self._real_tokens(inputs), inputs.get("labels")
        losses = {"loss_prediction": self._prediction_loss(student, teacher, labels, real)}
        if groups is not None:
            ours, theirs = (outputs["logits"].squeeze(-1) for outputs in (student, teacher))  # (batch,)
            losses["loss_margin"], pairs = margin_loss(ours, theirs, groups)
            self._count("pairs", pairs)
        return losses

    def _real_tokens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        mask = inputs.get("attention_mask")
        if mask is None or not self.distillation.mask_padding:
            return None
        if mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` must have the shape (batch, seq) to tell padding apart, got {tuple(mask.shape)}."
                " Use DistillationConfig(mask_padding=False) with other masks."
            )
        return mask.bool()

    def _prediction_loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], labels: Tensor | None, real: Tensor | None
    ) -> Tensor:
        temperature = self.distillation.temperature
        if "start_logits" in student:
            ours, theirs = ((outputs["start_logits"], outputs["end_logits"]) for outputs in (student, teacher))
            return span_loss(ours, theirs, real, temperature=temperature)
        if student["logits"].dim() == 3:  # (batch, seq, labels)
            if labels is not None and self.distillation.mask_padding:
                labelled = labels != -100
                real = labelled if real is None else labelled & real
            shared = min(outputs["logits"].shape[-1] for outputs in (student, teacher))  # a padded vocabulary has more
            ours, theirs = (outputs["logits"][..., :shared] for outputs in (student, teacher))
            return classification_loss(ours, theirs, real, temperature=temperature)
        problem_type = agreed_problem_type(self.model.config, self.teacher.config)
        if problem_type is None:  # the rule by which stock heads read an undeclared problem off its labels
            several = labels is not None and labels.is_floating_point()
            problem_type = "multi_label_classification" if several else "single_label_classification"
        if problem_type == "regression":  # numbers have nothing to soften
            return regression_loss(student["logits"], teacher["logits"])
        loss = multi_label_loss if problem_type == "multi_label_classification" else classification_loss
        return loss(student["logits"], teacher["logits"], temperature=temperature)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if (column := self.distillation.group_column) and column not in self._signature_columns:
            self._signature_columns.append(column)

    def _reset_terms(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._counts: dict[str, Tensor] = {}

    def _record(self, terms: Mapping[str, Tensor]) -> None:
        # Stays on the device: nothing waits for it before the next log.
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach().float()
        self._micro_batches += 1

    def _count(self, name: str, count: Tensor) -> None:
        self._counts[name] = self._counts.get(name, 0) + count

    def _mean_terms(self) -> dict[str, float]:
        names, values = list(self._terms), torch.stack(list(self._terms.values())) / self._micro_batches
        means = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        counts = {name: int(self.accelerator.reduce(count, "sum")) for name, count in self._counts.items()}
        refuse_empty_texts(counts.get("empty texts", 0))
        refuse_no_pairs(counts.get("pairs"), self.distillation.group_column)
        self._reset_terms()
        for name in names:
            # the first broken layer says more than the sum
            if name != "loss_hidden" and not math.isfinite(means[name]):
                raise FloatingPointError(
                    f"`{name}` must be finite, got {means[name]} by step {self.state.global_step}. Use a smaller"
                    " `learning_rate`, clip with `max_grad_norm`, or train in bf16 instead of fp16."
                )
        return means
