"""The models with what others do to them: adapters, replicas, inference on packed weights, compilers."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_mpoe import KINDS, make, make_batch, randomise_routers, separate_experts
from torch.nn.parallel import replicate  # noqa: F401  # its module is patched below

from hf_moebert import optimize_for_inference, revert_optimizations


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_lora_on_the_router_trains_and_merges(kind):
    model = get_peft_model(
        separate_experts(randomise_routers(make(kind, router="switch"))), LoraConfig(target_modules=["router"])
    )
    model.train()(**make_batch(kind, labels=True)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        batch = make_batch(kind) | {"output_router_logits": True}
        adapted = model.eval()(**batch)
        with model.disable_adapter():
            plain = model(**batch)
        merged = model.merge_and_unload()(**batch)
    assert not torch.allclose(adapted.router_logits[0], plain.router_logits[0])
    torch.testing.assert_close(merged.router_logits, adapted.router_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.logits, adapted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_replica_of_data_parallel_computes_the_same(kind, training, monkeypatch):
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda *_: 0)  # there is no GPU to copy to
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda xs, ds, detach: [[x * 1 for x in xs] for _ in ds]
    )
    model = separate_experts(randomise_routers(make(kind, router="switch"))).train(training)
    batch = make_batch(kind, labels=True)
    with torch.set_grad_enabled(training):
        one, two = module.replicate(model, ["cpu", "cpu"])
        torch.testing.assert_close(two(**batch).loss, model(**batch).loss)
        if training:
            one(**batch).loss.backward()
            assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("asks", [{}, {"output_router_logits": True}, {"labels": torch.tensor([0, 1, 2])}])
def test_an_optimised_bert_computes_the_same(asks):
    model = separate_experts(randomise_routers(make("bert", router="switch")))
    batch = make_batch("bert") | asks
    with torch.no_grad():
        expected = model(**batch)
        found = optimize_for_inference(model)(**batch)
        torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dict(revert_optimizations(model)(**batch)), dict(expected))


@pytest.mark.process
def test_a_compiled_network_is_not_compiled_for_every_expert():
    network = next(iter(separate_experts(randomise_routers(make("bert", num_experts=8))).networks().values()))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled, counts = torch.compile(network, backend=backend), []
    for seed in range(3):
        tokens = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(tokens), network(tokens))
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[2]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_experts_are_refused(tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" if name == model.base_model_prefix else "cpu" for name, _ in model.named_children()}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(ValueError, match="The experts' tensors must be in memory, some are offloaded"):
        loaded.eval()(**make_batch("bert"))
