"""Optimised mixtures of every family of encoders: the same outputs with and without padding, from packed experts."""

import pytest
import torch
from test_moebert_families import CASES, convert, inputs_of
from tiny_families import IMAGES, LAYERS, make_model

from hf_moebert import optimize_for_inference, revert_optimizations
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.inference.optimized import OptimizedExperts


EXPERTS = 3
ROUTINGS = [
    (case, routing)
    for case, (family, _) in CASES.items()
    for routing in (("gate-token", "gate-sentence") if family in IMAGES else ("hash-random", "gate-sentence"))
]


@pytest.fixture
def packed(monkeypatch):
    """How many packed products each call of experts found, as the list grows."""
    found = []
    linears = OptimizedExperts.inference_linears

    def record(self, x):
        products = linears(self, x)
        found.append(products and len(products))
        return products

    monkeypatch.setattr(OptimizedExperts, "inference_linears", record)
    return found


def without_mask(batch):
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def real_outputs(model, batch):
    """The last hidden states, where there is a token or patch."""
    states = model(**batch).last_hidden_state
    return states[batch["attention_mask"].bool()] if "attention_mask" in batch else states


@torch.no_grad()
@pytest.mark.parametrize(("case", "routing"), ROUTINGS)
def test_every_family_gives_the_same_from_packed_experts(case, routing, packed):
    family, fields = CASES[case]
    model, _ = convert(make_model(family, **fields), routing=routing, num_experts=EXPERTS)
    for batch in (inputs_of(model), without_mask(inputs_of(model))):
        expected = real_outputs(model, batch)
        optimize_for_inference(model)
        packed.clear()
        torch.testing.assert_close(real_outputs(model, batch), expected, atol=2e-5, rtol=1e-5)
        assert len(packed) >= LAYERS
        assert set(packed) == {2 * EXPERTS}  # what comes before the activation, and the down-projection, of each
        assert torch.equal(real_outputs(revert_optimizations(model), batch), expected)


@torch.no_grad()
@pytest.mark.skipif(unsupported_reason("int8", True) is not None, reason="This machine has no fast int8.")
@pytest.mark.parametrize("case", CASES)
def test_int8_stays_close_in_every_family(case, packed):
    """All experts serve each token, for a gate may decide a tie in another way."""
    family, fields = CASES[case]
    model, _ = convert(make_model(family, **fields), routing="gate-token", num_experts=EXPERTS, top_k=EXPERTS)
    for batch in (inputs_of(model), without_mask(inputs_of(model))):
        expected = real_outputs(revert_optimizations(model), batch)
        optimize_for_inference(model, precision="int8")
        packed.clear()
        found = real_outputs(model, batch)
        assert set(packed) == {2 * EXPERTS}
        assert 1e-5 < (found - expected).abs().mean() < 0.1 * expected.abs().mean()
