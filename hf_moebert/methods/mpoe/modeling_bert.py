"""BERT whose feed-forward networks are experts that share central tensors."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertForSequenceClassification
from transformers.utils.generic import can_return_tuple

from hf_moebert.architectures.functional_routing import real_tokens
from hf_moebert.architectures.routing import RoutingOutput, recording

from .configuration_mpoe import MPOEBertConfig
from .modeling_experts import MPOEFeedForward
from .modeling_mpoe import MPOEMixin, with_shapes


SINGLE_LABEL = (None, "single_label_classification")  # None: the base class infers the kind of problem from the labels


@dataclass
class MPOESequenceClassifierOutput(RoutingOutput, SequenceClassifierOutput):
    """Output of `MPOEBertForSequenceClassification`."""


class MPOEBertForSequenceClassification(MPOEMixin, BertForSequenceClassification):
    """BERT with a linear layer on the pooled [CLS], whose feed-forward networks are experts."""

    config: MPOEBertConfig
    config_class = MPOEBertConfig

    def __init__(self, config: MPOEBertConfig) -> None:
        if config.chunk_size_feed_forward:
            raise ValueError(
                f"`chunk_size_feed_forward` must be 0, got {config.chunk_size_feed_forward}: experts see all tokens "
                "of a batch at once. Leave it out."
            )
        config = with_shapes(config)
        super().__init__(config)
        blocks: Any = self.bert.encoder.layer
        for block in (blocks[place] for place in config.converted_layers):
            block.intermediate = MPOEFeedForward(config, config.hidden_act, has_bias=True)
            block.output.dense = nn.Identity()  # dropout, residual and LayerNorm stay there

    @staticmethod
    def dense_name(path: str, matrix: str) -> str:
        """See `MPOEMixin`; the down-projection is in the next module."""
        return f"{path if matrix == 'up' else path.removesuffix('intermediate') + 'output'}.dense"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MPOESequenceClassifierOutput:
        """Run the base class's forward, and add the routers' logits and balance loss to the output.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: Shape `(batch, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Shape `(batch, seq, hidden)`.
            labels: Classes `(batch,)`, or targets `(batch, labels)`.
            output_router_logits: Whether the routers' logits are returned.
            **kwargs: As for the base class.

        Raises:
            ValueError: If an id or a label does not exist, or the sequence is too long.
        """
        self._check_ids("input_ids", input_ids, self.bert.embeddings.word_embeddings.num_embeddings)
        given = input_ids if inputs_embeds is None else inputs_embeds
        limit = self.config.max_position_embeddings
        if given is not None and position_ids is None and not 0 < given.shape[1] <= limit:
            raise ValueError(f"Sequences must have 1 to {limit} tokens, got {given.shape[1]}. Truncate longer ones.")
        classes = labels if self.num_labels > 1 and self.config.problem_type in SINGLE_LABEL else None
        classes = None if classes is None or classes.is_floating_point() else classes
        self._check_ids("labels", classes, self.num_labels, ignored=True)
        if labels is not None or self._shows(output_router_logits):
            kwargs["output_router_logits"] = True  # so that `optimize_for_inference` keeps the padding
        with recording() as records:
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
        if classes is not None and not (classes != -100).any():  # the base class's mean over no example is NaN
            outputs.loss = outputs.logits.sum() * 0.0
        masks = [real_tokens(attention_mask, x.logits.shape[:2]) for x in records]
        return self._finish(MPOESequenceClassifierOutput, outputs, records, masks, output_router_logits)


__all__ = ["MPOEBertForSequenceClassification"]
