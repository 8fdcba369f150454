"""`torch.compile`: the same outputs, and no graph anew for each step of training."""

import pytest
import torch
from tiny_masks import assert_near, logits_of, make_batch, make_fixed, make_masked
from torch._dynamo.testing import CompileCounter

from hf_moebert.methods.mixture_of_masks import shrink


pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_compiled_masked_model_is_one_graph(top_k):
    model, batch = make_masked("llama", top_k=top_k, layers=[0]), make_batch("llama")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        found = [compiled(**batch, use_cache=False).logits for _ in range(3)]
    assert counter.frame_count == 1
    for logits in found:
        assert_near(logits, logits_of(model, "llama"))


def test_a_compiled_compact_model_has_the_same_outputs():
    model, batch = shrink(make_fixed("llama")), make_batch("llama")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_near(compiled(**batch, use_cache=False).logits, logits_of(model, "llama"))


def test_steps_of_training_share_their_graphs():
    """Noise and clock change in every step."""
    model, batch = make_masked("llama", layers=[0]).train(), make_batch("llama", labels=True)
    counter, graphs = CompileCounter(), []
    compiled = torch.compile(model, backend=counter)
    for _ in range(6):
        model.budget.clock += 1
        model.draw_noise(0)
        found = compiled(**batch, use_cache=False)
        graphs.append(counter.frame_count)
        wanted = model(**batch, use_cache=False)
        torch.testing.assert_close(found.loss, wanted.loss)
        found.loss.backward()
    assert graphs[-1] == graphs[3]
