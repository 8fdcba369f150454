"""Importance, frozen weights, and what `from_dense`, `fix_masks` and `shrink` refuse."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_masks import (
    KINDS,
    LAYERS,
    STOCK,
    STRUCTURES,
    UNITS,
    logits_of,
    make_batch,
    make_dense,
    make_fixed,
    make_masked,
    seeded,
)

from hf_moebert.methods.mixture_of_masks import from_dense, shrink


def test_what_cannot_be_masked_is_refused():
    dense = make_dense("llama")
    with pytest.raises(ValueError, match=r"`model` must be one of \[.*\], got LlamaModel. Load a dense"):
        from_dense(dense.model)
    with pytest.raises(ValueError, match="MoMLlamaForCausalLM is one with masks .* anew"):
        from_dense(make_masked("llama"))
    importance, masks = torch.ones(LAYERS, UNITS), torch.ones(LAYERS, 4, UNITS, dtype=torch.bool)
    with pytest.raises(ValueError, match="`importance` must be left out with `masks`"):
        from_dense(dense, importance=importance, masks=masks)
    for options in ({"importance": importance.numpy()}, {"masks": masks.numpy()}):
        with pytest.raises(ValueError, match="must be a tensor, got ndarray"):
            from_dense(dense, **options)
    uneven = make_dense("llama")
    uneven.config.per_layer_config = {0: {"intermediate_size": 8}}
    with pytest.raises(ValueError, match="`model` must have layers of equal widths, got {'0'"):
        from_dense(uneven)
    with torch.device("meta"):
        empty = STOCK["llama"]()
    with pytest.raises(ValueError, match="`model` must hold its weights in memory"):
        from_dense(empty)
    with pytest.raises(ValueError, match="`group_size` must divide the 32 units of 'model.layers.0.mlp', got 5"):
        from_dense(dense, group_size=5)
    broken = make_dense("llama")
    del broken.model.norm.weight
    with pytest.raises(ValueError, match=r"must have the body and head of a LlamaForCausalLM: missing .*norm"):
        from_dense(broken)
    other = make_dense("llama")
    other.model.layers[0].mlp.up_proj = torch.nn.Bilinear(16, 16, 32)
    with pytest.raises(
        ValueError, match="`mlp.up_proj` of LlamaDecoderLayer must be a plain Linear or Conv1D, got .*Bilinear"
    ):
        from_dense(other)


def test_masks_that_do_not_fit_are_refused():
    dense, masks = make_dense("llama"), torch.ones(LAYERS, 4, UNITS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`masks` must be boolean and of shape .* = \(2, 4, 32\), got torch.float32"):
        from_dense(dense, num_experts=4, masks=masks.float())
    with pytest.raises(ValueError, match=r"`masks` must be boolean .* and \(1, 4, 32\)"):
        from_dense(dense, num_experts=4, masks=masks[:1])
    masks[1, 2, 3] = False
    with pytest.raises(ValueError, match="`masks` must be equal for the 4 units of a group"):
        from_dense(dense, num_experts=4, masks=masks, group_size=4)
    masks[1, 2] = False
    with pytest.raises(ValueError, match=r"must open at least one unit of each expert, got none at \[1, 2\]"):
        from_dense(dense, num_experts=4, masks=masks)


def test_importance_orders_the_scores_and_leaves_the_model_dense():
    dense = make_dense("llama")
    importance = torch.rand(LAYERS, UNITS, generator=seeded(3))
    model = from_dense(dense, num_experts=3, importance=importance)
    for network, of_layer in zip(model.masked_networks().values(), importance, strict=True):
        scores = network.masks.scores.detach()
        assert torch.equal(scores.argsort(dim=-1), of_layer.argsort().expand(3, -1))
        assert scores.min() == pytest.approx(3, abs=0.1)
        assert scores.max() == pytest.approx(13, abs=0.1)
    assert torch.equal(logits_of(model, "llama"), logits_of(dense, "llama"))
    grouped = from_dense(dense, group_size=4, importance=importance)
    first = next(iter(grouped.masked_networks().values())).masks.scores.detach()
    assert torch.equal(first[0].argsort(), importance[0].view(-1, 4).sum(dim=1).argsort())


def test_importance_of_all_blocks_serves_those_with_masks():
    importance = torch.rand(LAYERS, UNITS, generator=seeded(3))
    (network,) = from_dense(make_dense("llama"), importance=importance, layers=[1]).masked_networks().values()
    assert torch.equal(network.masks.scores[0].argsort(), importance[1].argsort())


@pytest.mark.parametrize("kind", STRUCTURES)
def test_frozen_weights_stay_frozen(kind):
    dense = make_dense(kind).requires_grad_(False)
    masked = from_dense(dense, num_experts=4)
    trained = {name.split(".")[-2] for name, p in masked.named_parameters() if p.requires_grad}
    assert trained == {"masks", "router"}
    masked.fix_masks(0.5)
    small = shrink(masked)
    assert all(".router." in name for name, p in small.named_parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_and_activations_that_would_be_lost_are_refused():
    model = make_fixed("llama")
    lora = get_peft_model(model, LoraConfig(target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="must have fixed masks, but is dense, or wrapped by adapters"):
        shrink(lora)
    with pytest.raises(ValueError, match=r"mlp.up` must be a plain linear module, got Linear. Merge adapters"):
        shrink(lora.base_model.model)
    plain = make_fixed("bert")
    for network in plain.networks().values():
        network.act_fn = torch.nn.Sigmoid()
    with pytest.raises(ValueError, match="must be 0 at 0"):
        shrink(plain)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", [["router"], "all-linear"])
@pytest.mark.parametrize("stage", ["learned", "fixed", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_routers_take_adapters(kind, stage, targets):
    model = make_masked(kind, num_experts=3) if stage == "learned" else make_fixed(kind, num_experts=3)
    model = shrink(model) if stage == "compact" else model
    plain = logits_of(model.eval(), kind)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=True)).eval()
    assert torch.equal(logits_of(adapted, kind), plain)
    adapted(**make_batch(kind, labels=True)).loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if ".router.lora_B" in n}
    assert len(gradients) == len(model.networks())
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".router.lora_B" in name:
                parameter.normal_(std=2.0)
    assert not torch.equal(logits_of(adapted, kind), plain)
    merged = logits_of(adapted, kind)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), kind), merged, atol=1e-4, rtol=1e-4)


def test_masks_without_a_callback_are_not_learned(caplog_of_transformers):
    model = make_masked("llama").train()
    model(**make_batch("llama", labels=True))
    assert "No run of masks has begun, so they are not learned: add `MaskSparsityC" in caplog_of_transformers.text
    model.fix_masks(0.5)
    assert "No training step of the masks was counted" in caplog_of_transformers.text


def test_importance_of_another_model_is_refused():
    for wrong in (torch.ones(LAYERS, UNITS + 1), torch.full((LAYERS, UNITS), torch.nan)):
        with pytest.raises(
            ValueError, match=r"`importance` must be finite and of shape \(layers, units\) = \(2, 32\)"
        ):
            from_dense(make_dense("llama"), importance=wrong)


def test_masks_are_fixed_once():
    model = make_fixed("llama")
    with pytest.raises(ValueError, match="`fix_masks` must come while masks are learned, but the stage is 'fixed'"):
        model.fix_masks(0.5)
    model = make_masked("llama")
    with pytest.raises(ValueError, match=r"`keep_ratio` must be a number in \(0, 1\], got 0"):
        model.fix_masks(0)
    assert model.config.mask_stage == "learned"  # nothing was changed
    model.networks()["model.layers.1.mlp"].masks.scores.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`scores` must be finite"):
        model.fix_masks(0.5)
