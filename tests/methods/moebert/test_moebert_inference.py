"""Optimised MoEBERT: every routing and head gives the same outputs, with and without padding."""

import copy
import pickle

import pytest
import torch
from transformers import logging

from hf_moebert import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    MoEBertModel,
    optimize_for_inference,
    revert_optimizations,
)
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.inference.optimized import OptimizedExperts
from hf_moebert.methods.moebert.functional import masked_mean, sentence_means


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "expert_size": 16,
    "num_shared_neurons": 8,
    "num_labels": 2,
    "initializer_range": 0.2,
}
ROUTINGS = {
    "hash-random": {"routing": "hash-random"},
    "hash-balanced": {"routing": "hash-balanced"},
    "gate-token": {"routing": "gate-token"},
    "gate-token, two experts": {"routing": "gate-token", "top_k": 2, "gate_scaling": "probability"},
    "gate-token, reference": {"routing": "gate-token", "gate_scaling": "reference"},
    "gate-sentence": {"routing": "gate-sentence"},
    "gate-sentence, two experts": {"routing": "gate-sentence", "top_k": 2},
    "gate-sentence, balanced": {"routing": "gate-sentence", "router_aux_loss_coef": 0.1},
    "one expert": {"num_experts": 1, "expert_size": 64, "num_shared_neurons": 64},
    "some layers": {"routing": "gate-token", "layers": [0, 2]},
}
HEADS = [MoEBertForSequenceClassification, MoEBertForTokenClassification, MoEBertForQuestionAnswering]


def make(head=MoEBertModel, routing="hash-random"):
    torch.manual_seed(0)
    return head(MoEBertConfig(**TINY | ROUTINGS[routing])).eval()


def padded(lengths):
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(6, 2, 9, 1, 9), (7,), (5, 5, 5), (3, 0, 4)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_gives_the_same(routing, lengths):
    model, batch = make(routing=routing), padded(lengths)
    expected = model(**batch)
    found = optimize_for_inference(model)(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-5, rtol=1e-5)
    if expected.aux_loss is not None:
        torch.testing.assert_close(found.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    reverted = revert_optimizations(model)(**batch)
    assert torch.equal(reverted.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["hash-random", "gate-sentence"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_the_same(head, routing):
    model, batch = make(head, routing), padded((6, 2, 9, 1))
    expected = model(**batch)
    found = optimize_for_inference(model)(**batch)
    real = batch["attention_mask"].bool()
    for name, value in expected.items():
        chosen = real if value.shape[:2] == real.shape else slice(None)
        torch.testing.assert_close(found[name][chosen], value[chosen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("precision", [p for p in ("bfloat16", "int8") if unsupported_reason(p, True) is None])
@pytest.mark.parametrize("routing", ["hash-random", "gate-sentence"])
def test_lower_precisions_stay_close(routing, precision):
    model, batch = make(MoEBertForSequenceClassification, routing), padded((6, 2, 9, 1))
    expected = model(**batch).logits
    found = optimize_for_inference(model, precision=precision)(**batch).logits
    assert 1e-5 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sorted_mm", "eager"])
def test_the_experts_themselves_are_packed(implementation, monkeypatch):
    model, batch = make(), padded((6, 2))
    model.set_experts_implementation(implementation)
    optimize_for_inference(model)
    used = []
    linears = OptimizedExperts.inference_linears

    def record(self, x):
        used.append(linears(self, x))
        return used[-1]

    monkeypatch.setattr(OptimizedExperts, "inference_linears", record)
    model(**batch)
    assert len(used) == 3
    assert all(len(packed) == 8 for packed in used)  # up and down of four experts


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_an_implementation_that_passes_by_the_packed_experts_is_named(implementation, caplog):
    model, batch = make(), padded((6, 2))
    expected = model(**batch).last_hidden_state
    model.set_experts_implementation(implementation)
    logging.enable_propagation()
    found = optimize_for_inference(model)(**batch).last_hidden_state
    logging.disable_propagation()
    assert f"Experts stay as they are: their implementation is '{implementation}'" in caplog.text
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_expert_for_all_and_experts_without_a_token():
    model, batch = make(), padded((6, 2, 4))
    for expert in range(4):
        model.router.table.fill_(expert)
        revert_optimizations(model)
        expected = model(**batch).last_hidden_state
        found = optimize_for_inference(model)(**batch).last_hidden_state
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_load_of_the_experts_is_the_same():
    model, batch = make(), padded((6, 2, 9, 1))
    expected = model(**batch, output_expert_load=True).expert_load
    found = optimize_for_inference(model)(**batch, output_expert_load=True).expert_load
    assert torch.equal(torch.stack(found), torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
def test_recorded_gates_are_the_same(routing):
    model, batch = make(routing=routing), padded((6, 2, 9, 1))
    expected = model(**batch, output_router_logits=True).router_logits
    found = optimize_for_inference(model)(**batch, output_router_logits=True).router_logits
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_checkpoint_does_not_know(tmp_path):
    model = make(MoEBertForSequenceClassification)
    model.save_pretrained(tmp_path / "before")
    optimize_for_inference(model, precision="int8")(**padded((6, 2)))
    model.save_pretrained(tmp_path / "after")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_means_of_sentences_in_one_row_are_those_of_the_batch():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(sentence_means(x[mask].unsqueeze(0), [3, 0, 1]), masked_mean(x, mask))


@torch.no_grad()
@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
def test_other_dtypes_copies_and_pickles(routing):
    model, batch = optimize_for_inference(make(routing=routing)), padded((6, 2, 9))
    expected = model(**batch).last_hidden_state
    for part in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(isinstance(module, OptimizedExperts) for module in part.modules())
        assert torch.equal(part(**batch).last_hidden_state, expected)
    half = model.to(torch.bfloat16)(**batch).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    wanted = make(routing=routing).to(torch.bfloat16).float()(**batch).last_hidden_state
    torch.testing.assert_close(model.float()(**batch).last_hidden_state[:, 0], wanted[:, 0], atol=1e-5, rtol=1e-5)
