"""The heads of MoEBERT: sequence classification, token classification and question answering."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_moebert import MoEBertConfig
from .functional_losses import infer_problem_type, mean_cross_entropy, per_example_loss, span_loss
from .modeling_moebert import MoEBertModel, MoEBertOutput, MoEBertPreTrainedModel


logger = logging.get_logger(__name__)


@dataclass
class MoEBertSequenceClassifierOutput(MoEBertOutput, SequenceClassifierOutput):
    """Output of `MoEBertForSequenceClassification`."""


@dataclass
class MoEBertTokenClassifierOutput(MoEBertOutput, TokenClassifierOutput):
    """Output of `MoEBertForTokenClassification`."""


@dataclass
class MoEBertQuestionAnsweringOutput(MoEBertOutput, QuestionAnsweringModelOutput):
    """Output of `MoEBertForQuestionAnswering`."""


class MoEBertHead(MoEBertPreTrainedModel):
    """Base class of the heads: a balance term in the loss, and outputs with the records of the routing."""

    def _finish(self, output_class: Callable, outputs: Any, loss: Tensor | None, **logits: Tensor) -> Any:
        """Add the weighted balance loss to the task loss, and pass the encoder's records on."""
        if loss is not None and outputs.aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * outputs.aux_loss
        elif self.training and torch.is_grad_enabled() and outputs.aux_loss is not None:
            logger.warning_once(
                "Without labels the balance loss is in no loss, as with `label_smoothing_factor`: add "
                "`router_aux_loss_coef * aux_loss`."
            )
        names = ("hidden_states", "attentions", "aux_loss", "router_logits", "expert_load")
        records = {name: outputs.get(name) for name in names}
        return output_class(loss=loss, **logits, **records)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save like the base class, and name the body and the other heads, whose code is saved along."""
        code = {}
        for model_class in (MoEBertModel, *MoEBertHead.__subclasses__()):
            if model_class._auto_class:
                module = model_class.__module__.rpartition(".")[2]
                code[model_class._auto_class] = f"{module}.{model_class.__name__}"
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | code
        super().save_pretrained(*args, **kwargs)

    def _check_classes(self, labels: Tensor) -> None:
        """Refuse classes that the head does not have, before a GPU aborts the process over them."""
        if torch.compiler.is_compiling():
            return
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= self.config.num_labels))]
        if wrong.numel():
            raise ValueError(
                f"`labels` must be in [0, {self.config.num_labels}) or -100, got {int(wrong[0])}. Map the data set's "
                "labels to the model's `label2id`, or set `num_labels`."
            )


class MoEBertForSequenceClassification(MoEBertHead):
    """MoEBERT with a linear layer on the pooled [CLS]: classes, several labels at once, or regression."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MoEBertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEBertSequenceClassifierOutput:
        """Classify a batch; see `MoEBertModel.forward` for the inputs.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: Shape `(batch, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Shape `(batch, seq, hidden)`.
            labels: Classes `(batch,)`, or targets `(batch, labels)` for regression and several labels at once.
            **kwargs: The encoder's output flags.

        Raises:
            ValueError: If a label does not exist, or an input does not fit.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))  # (batch, labels)
        loss = None if labels is None else self._task_loss(logits, labels)
        return self._finish(MoEBertSequenceClassifierOutput, outputs, loss, logits=logits)

    def _task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type is None:  # inferred and kept, as stock heads do
            self.config.problem_type = infer_problem_type(self.num_labels, labels)
        labels = labels.to(logits.device)
        if self.config.problem_type == "single_label_classification":
            self._check_classes(labels)
            return mean_cross_entropy(logits, labels.flatten())
        losses = per_example_loss(logits, labels, self.config.problem_type)  # (batch,)
        return losses.sum() / max(len(losses), 1)


class MoEBertForTokenClassification(MoEBertHead):
    """MoEBERT with a linear layer on every token."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MoEBertModel(config, add_pooling_layer=False)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEBertTokenClassifierOutput:
        """Tag a batch; see `MoEBertModel.forward` for the inputs.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: Shape `(batch, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Shape `(batch, seq, hidden)`.
            labels: Class of each token, -100 where there is none. Shape `(batch, seq)`.
            **kwargs: The encoder's output flags.

        Raises:
            ValueError: If a label does not exist, or an input does not fit.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))  # (batch, seq, labels)
        loss = None
        if labels is not None:
            self._check_classes(labels)
            loss = mean_cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
        return self._finish(MoEBertTokenClassifierOutput, outputs, loss, logits=logits)


class MoEBertForQuestionAnswering(MoEBertHead):
    """MoEBERT with two scores on every token: that an answer starts there, and that it ends there."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MoEBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEBertQuestionAnsweringOutput:
        """Score the places where an answer may start and end; see `MoEBertModel.forward` for the inputs.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: Shape `(batch, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Shape `(batch, seq, hidden)`.
            start_positions: First token of each answer; past the end if there is none in here. Shape `(batch,)`.
            end_positions: Last token of each answer, likewise. Shape `(batch,)`.
            **kwargs: The encoder's output flags.

        Raises:
            ValueError: If an input does not fit.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)  # (batch, seq) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start_logits, end_logits, start_positions, end_positions).mean()
        return self._finish(
            MoEBertQuestionAnsweringOutput,
            outputs,
            loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
        )
