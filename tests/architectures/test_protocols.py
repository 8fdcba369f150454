"""The classes that implement a protocol between packages have its members."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_moebert import optimize_for_inference
from hf_moebert.architectures.protocols import (
    OptimizedForInference,
    PackedSentences,
    PartlyActive,
    Predictor,
    SortedExperts,
    UpdatablePredictor,
)
from hf_moebert.inference.optimized import OptimizedExperts
from hf_moebert.inference.unpadding import Sentences
from hf_moebert.methods import mixture_of_masks, moebert, mpoe
from hf_moebert.serving.many_tasks import ManyTasks
from hf_moebert.serving.predictors import TextPredictor


TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 8,
}


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY)).eval()


def make_moebert(dense):
    return moebert.MoEBertModel(moebert.MoEBertConfig(**TINY, num_experts=2, expert_size=16, num_shared_neurons=4))


def make_mpoe(dense):
    return mpoe.from_dense(dense, num_experts=2)


def make_masked(dense):
    return mixture_of_masks.shrink(mixture_of_masks.from_dense(dense, num_experts=2).fix_masks(0.5))


@pytest.mark.parametrize("make", [make_moebert, make_mpoe, make_masked])
def test_experts_are_partly_active(dense, make):
    active = [module for module in make(dense).modules() if isinstance(module, PartlyActive)]
    assert active
    assert all(0 < module.active_fraction <= 1 for module in active)


def test_stacked_experts_can_be_sorted_before_and_after_they_are_optimised(dense):
    model = make_moebert(dense)
    (experts,) = (module for module in model.modules() if isinstance(module, SortedExperts))
    optimize_for_inference(model)
    assert isinstance(experts, OptimizedExperts)
    assert isinstance(experts, SortedExperts)
    assert isinstance(experts, OptimizedForInference)
    assert not any(isinstance(module, OptimizedForInference) for module in dense.modules())


def test_sentences_without_padding():
    assert isinstance(Sentences.from_mask(torch.ones(1, 2) == 1), PackedSentences)


def test_the_pipeline_of_many_tasks_can_be_served():
    assert issubclass(TextPredictor, Predictor)
    assert issubclass(ManyTasks, UpdatablePredictor)
    assert not issubclass(TextPredictor, UpdatablePredictor)
