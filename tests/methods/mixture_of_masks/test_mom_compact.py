"""Compact models: what the masks close is gone, and outputs stay the same."""

import copy

import pytest
import torch
from tiny_masks import (
    GENERATIVE,
    HIDDEN,
    KINDS,
    LAYERS,
    STRUCTURES,
    UNITS,
    assert_near,
    logits_of,
    make_batch,
    make_dense,
    make_fixed,
    make_masked,
    seeded,
)
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods.mixture_of_masks import from_dense, shrink
from hf_moebert.methods.mixture_of_masks.modeling_compact import CompactFeedForward, split_units
from hf_moebert.methods.mixture_of_masks.modeling_masks import MaskRouter
from hf_moebert.methods.mixture_of_masks.modeling_surgery import matrix_of


ROUTES = [{"num_experts": 1}, {"num_experts": 4}, {"num_experts": 4, "top_k": 2}]
IMPLEMENTATIONS = ("sliced_mm", "eager", "grouped_mm", "batched_mm")


def blocks_of(kind):
    return 2 * LAYERS if kind.startswith("t5") else LAYERS


def given_masks(kind, how):
    """Masks of each kind of split: `apart`, `open`, `mixed` (shared, specific and inactive units), or `one-sided`."""
    masks = torch.zeros(blocks_of(kind), 4, UNITS, dtype=torch.bool)
    for expert in range(4):
        masks[:, expert, 5 * expert : 5 * expert + 3 + expert] = True
    if how == "mixed":
        masks[:, :, 25:30] = True
    if how == "open":
        masks[:] = True
    if how == "one-sided":  # the first block has no specific units, the others have
        masks[:, :, 25:30] = True
        masks[0] = False
        masks[0, :, 4:11] = True
    return masks


@pytest.mark.parametrize("options", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_compact_model_is_the_masked_one(kind, options):
    masked = make_fixed(kind, **options)
    before = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    small = shrink(masked)
    assert_near(logits_of(small, kind), logits_of(masked, kind))
    assert (logits_of(masked, kind) - logits_of(make_dense(kind), kind)).abs().max() > 0.1
    assert type(small) is type(masked)
    assert small.config.mask_stage == "compact"
    assert not small.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in masked.state_dict().items())
    shared = {name for name, p in small.named_parameters() if any(p is q for q in masked.parameters())}
    assert shared == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["apart", "open", "mixed", "one-sided"])
def test_every_split_of_units_compacts(kind, how):
    for top_k in (1, 2):
        masked = make_masked(kind, masks=given_masks(kind, how), top_k=top_k)
        small = shrink(masked)
        assert_near(logits_of(small, kind), logits_of(masked, kind))
        networks = small.networks()
        assert len(networks) == {"open": 0, "one-sided": blocks_of(kind) - 1}.get(how, blocks_of(kind))
        if how != "open":
            network = list(networks.values())[-1]
            assert len(matrix_of(network.up)) == (0 if how == "apart" else 5)
            assert network.experts.sizes == [3, 4, 5, 6]
            assert network.experts.down_proj.shape == (4, HIDDEN, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_becomes_narrower_modules_of_the_host(kind):
    masked, dense = make_fixed(kind, 0.4, num_experts=1), make_dense(kind)
    small = shrink(masked)
    widths = [int(network.masks().sum()) for network in masked.networks().values()]
    assert small.networks() == {}
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    assert small.state_dict().keys() == shapes.keys()
    changed = {name: t.shape for name, t in small.state_dict().items() if t.shape != shapes[name]}
    assert {width for shape in changed.values() for width in shape} <= {*widths, HIDDEN}
    width_name = type(small.config).width_name
    layers = small.config.to_dict()["per_layer_config"]
    if kind.startswith("t5"):
        found = [layer[width_name] for layer in layers.values()]
        found += [layer["d_ff_of_decoder"] for layer in layers.values()]
    else:
        assert all(layer.keys() == {width_name} for layer in layers.values())
        found = [layer[width_name] for layer in layers.values()]
    assert found == widths
    kinds = {type(module) for module in dense.modules()}
    assert {type(module) for module in small.modules()} - {type(small)} <= kinds


@pytest.mark.parametrize("kind", GENERATIVE)
def test_a_compact_model_generates_what_the_masked_one_does(kind):
    masked, ids = make_fixed(kind, top_k=2), make_batch(kind)["input_ids"][1:]
    small = shrink(masked)
    for options in ({}, {"use_cache": False}):
        limits = {"max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(small.generate(ids, **limits), masked.generate(ids, **limits))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_all_implementations_of_experts_agree(kind, top_k):
    masked = make_masked(kind, masks=given_masks(kind, "mixed"), top_k=top_k)
    small, wanted, batch = shrink(masked), logits_of(masked, kind), make_batch(kind, labels=True)
    assert small.config._experts_implementation == "sliced_mm"
    grads = {}
    for name in IMPLEMENTATIONS:
        small.set_experts_implementation(name)
        assert_near(logits_of(small, kind), wanted)
        small.zero_grad()
        small(**batch).loss.backward()
        grads[name] = {n: p.grad.clone() for n, p in small.named_parameters() if p.grad is not None}
    for name in IMPLEMENTATIONS[1:]:
        assert grads[name].keys() == grads["sliced_mm"].keys()
        torch.testing.assert_close(grads[name], grads["sliced_mm"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ROUTES)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_deleted_units_change_a_network_by_rounding_alone(kind, options):
    """In float64 and network by network: normalisations of transformers compute in float32.

    So do routers, whose two weights add up to 1 in float32 only: there, no unit is shared.
    """
    apart = {"masks": given_masks(kind, "apart")} if options.get("top_k") == 2 else {}
    masked = make_masked(kind, **options, **apart)
    masked = (masked if apart else masked.fix_masks(0.5)).double()
    small = shrink(masked)
    modules, hidden = dict(small.named_modules()), torch.randn(3, 5, HIDDEN, generator=seeded(), dtype=torch.float64)
    for path, network in masked.networks().items():
        place, inputs = modules[path], hidden
        if kind == "bert" and options["num_experts"] == 1:  # the stock network begins in another module
            inputs = modules[path.replace("output.dense", "intermediate")](hidden)
        assert (place(inputs) - network(hidden)).abs().max() < 1e-12


def test_padding_of_the_stack_is_zero_and_stays_so():
    small = shrink(make_masked("bert", masks=given_masks("bert", "mixed")))
    experts = [network.experts for network in small.networks().values()]

    def padding():
        for stack in experts:
            for expert, size in enumerate(stack.sizes):
                yield (
                    stack.up_proj[expert, size:],
                    stack.up_proj_bias[expert, size:],
                    stack.down_proj[expert, :, size:],
                )

    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1)
    for name in IMPLEMENTATIONS:
        small.set_experts_implementation(name)
        small.train()(**make_batch("bert", labels=True)).loss.backward()
        optimizer.step()
    assert all(not part.any() for parts in padding() for part in parts)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_training_reaches_every_parameter_even_of_no_shared_unit(kind):
    """One without a gradient would stop DDP."""
    small = shrink(make_masked(kind, masks=given_masks(kind, "apart"))).train()
    small(**make_batch(kind, labels=True)).loss.backward()
    assert [name for name, p in small.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_compact_model_has_the_loss_of_the_masked_one_and_its_router_learns(top_k):
    masked = make_masked("llama", masks=given_masks("llama", "mixed"), top_k=top_k)
    small, batch, grads = shrink(masked), make_batch("llama", labels=True), []
    losses = [model.train()(**batch) for model in (masked, small)]
    torch.testing.assert_close(losses[0].aux_loss, losses[1].aux_loss)
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    for loss, model in zip(losses, (masked, small), strict=True):
        loss.loss.backward()
        grads.append([network.router.weight.grad for network in model.networks().values()])
    assert all(grad.abs().sum() > 0 for grad in grads[1])
    if top_k == 2:  # with one expert, the shared units that its weight is not applied to are in no gradient
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_footprint_counts_the_parameters_that_a_token_meets(kind, top_k):
    masked = make_fixed(kind, 0.4, top_k=top_k)
    small = shrink(masked)
    matrices = 3 if kind in ("llama", "t5-gated") else 2
    biases = 1 if kind in ("gpt2", "bert") else 0  # of units
    met = sum(p.numel() for name, p in small.named_parameters() if ".experts." not in name)
    for network in masked.networks().values():
        _, specific = split_units(network)
        met += top_k * sum(map(len, specific)) / 4 * (matrices * HIDDEN + biases)  # in the mean over experts
    assert measure_footprint(small, seq_len=16).active == pytest.approx(met, abs=1)


@pytest.mark.parametrize("kind", ["t5", "t5-gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_t5_in_half_keeps_its_last_matrices_as_the_host_does(kind, dtype, tmp_path):
    make_dense(kind).save_pretrained(tmp_path / "dense")
    dense = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=dtype)
    masked = make_masked(kind, dense=dense, masks=given_masks(kind, "mixed"))
    small = shrink(masked)
    small.save_pretrained(tmp_path / "small")
    back = type(small).from_pretrained(tmp_path / "small", dtype=dtype)
    last = torch.float32 if dtype == torch.float16 else dtype
    for model in (small, back):
        for network in model.networks().values():
            assert network.up.weight.dtype == network.experts.get_parameter(network.experts.up_name).dtype == dtype
            assert network.down.weight.dtype == network.experts.down_proj.dtype == last
            assert network.router.weight.dtype == torch.float32
    assert_near(logits_of(small, kind).float(), logits_of(masked, kind).float(), 0.05)
    assert_near(logits_of(back, kind).float(), logits_of(small, kind).float(), 1e-3)


@torch.no_grad()
def test_autocast_runs_experts_in_half():
    small = shrink(make_masked("llama", masks=given_masks("llama", "mixed")))
    wanted = logits_of(small, "llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(logits_of(small, "llama").float(), wanted, 0.05)


def test_only_masked_blocks_are_compacted():
    masked = make_fixed("llama", layers=[1])
    small = shrink(masked)
    assert list(small.networks()) == ["model.layers.1.mlp"]
    assert list(small.config.to_dict()["per_layer_config"]) == ["1"]
    assert_near(logits_of(small, "llama"), logits_of(masked, "llama"))


def test_a_copy_of_a_compact_model_is_equal_and_apart():
    small = shrink(make_fixed("bert"))
    twin = copy.deepcopy(small)
    assert torch.equal(logits_of(twin, "bert"), logits_of(small, "bert"))
    next(iter(twin.networks().values())).experts.down_proj.data.add_(1)
    assert not torch.equal(logits_of(twin, "bert"), logits_of(small, "bert"))


def test_compact_networks_are_built_of_few_modules():
    network = next(iter(shrink(make_fixed("llama")).networks().values()))
    assert type(network) is CompactFeedForward
    assert type(network.router) is MaskRouter
    assert network.router.weight.shape == (4, HIDDEN)


# refusals


def test_only_fixed_masks_can_be_compacted():
    for model, stage in ((make_masked("llama"), "learned"), (make_dense("llama"), "dense")):
        with pytest.raises(ValueError, match=f"`model` must have fixed masks, but is {stage}"):
            shrink(model)
    small = shrink(make_fixed("llama"))
    with pytest.raises(ValueError, match="`model` must have fixed masks, but is compact"):
        shrink(small)
    with pytest.raises(ValueError, match="must be dense to get masks, but MoMLlamaForCausalLM is one with masks"):
        from_dense(small)
    for name in ("fix_masks", "count_units"):
        with pytest.raises(ValueError, match="but (its|the) stage is 'compact'"):
            getattr(small, name)()
    assert isinstance(small, LlamaForCausalLM)


def test_a_t5_with_a_deeper_decoder_stays_masked():
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=2, num_heads=4, vocab_size=61)
    config.decoder_start_token_id = 0
    model = make_fixed("t5", dense=T5ForConditionalGeneration(config).eval(), num_experts=2)
    assert len(model.networks()) == 3
    with pytest.raises(ValueError, match="must have no more decoder layers than its 1 encoder layers, got 2"):
        shrink(model)


def test_compacting_draws_no_random_numbers():
    masked = make_fixed("bert")
    before = torch.get_rng_state()
    shrink(masked)
    assert torch.equal(torch.get_rng_state(), before)
