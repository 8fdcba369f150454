"""MoEBERT: a fine-tuned BERT's feed-forward networks become experts, and one runs per token."""

from .configuration_moebert import MoEBertConfig
from .modeling_heads import (
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
)
from .modeling_moebert import MoEBertModel
from .training import measure_importance


__all__ = [
    "MoEBertConfig",
    "MoEBertForQuestionAnswering",
    "MoEBertForSequenceClassification",
    "MoEBertForTokenClassification",
    "MoEBertModel",
    "measure_importance",
]
