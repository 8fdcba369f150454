"""The masked models: the dense ones at first, in every precision, and what their loss and gradients are."""

import copy

import pytest
import torch
from tiny_masks import (
    GENERATIVE,
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
    scatter_masks,
    seeded,
)

from hf_moebert.architectures.functional_routing import balance_loss
from hf_moebert.methods.mixture_of_masks import from_dense
from hf_moebert.methods.mixture_of_masks.functional import (
    choose_experts,
    choose_masks,
    draw_masks,
    open_probability,
    settle_masks,
)


ROUTES = [{"num_experts": 1}, {"num_experts": 4}, {"num_experts": 4, "top_k": 2}]
GENERATE = ({}, {"use_cache": False}, {"num_beams": 3})


# identity


@pytest.mark.parametrize("options", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_masks_open_a_model_is_the_dense_one(kind, options):
    dense = make_dense(kind)
    before = copy.deepcopy(dense.state_dict())
    model = from_dense(dense, **options)
    with torch.no_grad():
        for network in model.networks().values():  # whatever the routers say
            if network.router is not None:
                network.router.weight.normal_(generator=seeded(3))
    wanted = logits_of(dense, kind)
    if options.get("top_k") == 2:  # whose weights add up to 1 but for rounding
        assert_near(logits_of(model, kind), wanted)
    else:
        assert torch.equal(logits_of(model, kind), wanted)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not model.training
    assert type(model).__bases__[1] is type(dense)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", GENERATIVE)
def test_with_all_masks_open_it_generates_what_the_dense_one_does(kind, top_k):
    dense, ids = make_dense(kind), make_batch(kind)["input_ids"][1:]
    model = from_dense(dense, num_experts=4, top_k=top_k)
    for options in GENERATE:
        limits = {"max_new_tokens": 7, "do_sample": False, **options}
        assert torch.equal(model.generate(ids, **limits), dense.generate(ids, **limits))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_one_in_bfloat16_with_masks_and_routers_in_float32(kind, tmp_path):
    make_dense(kind).save_pretrained(tmp_path)
    dense = type(make_dense(kind)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = logits_of(dense, kind)
    for options in ROUTES:
        model = from_dense(dense, **options)
        assert_near(logits_of(model, kind), wanted, 2e-2)
        for name, parameter in model.named_parameters():
            own = ".masks." in name or ".router." in name or name.startswith("budget.")
            assert parameter.dtype == (torch.float32 if own else torch.bfloat16), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "t5"])
def test_padding_on_the_left_changes_nothing(kind):
    """With closed masks and routers that send tokens everywhere."""
    model = make_fixed(kind, top_k=2)
    ids = make_batch(kind)["input_ids"][1:2]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    batched = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    start = 0 if kind == "t5" else ids.shape[1]
    assert torch.equal(alone[:, start:], batched[:, start and start + 3 :])


@pytest.mark.parametrize("kind", STRUCTURES)
def test_blocks_without_masks_stay_what_they_are(kind):
    dense, last = make_dense(kind), 2 * LAYERS - 1 if kind.startswith("t5") else LAYERS - 1
    model = make_masked(kind, dense=dense, layers=[last])
    (network,) = model.networks().values()
    assert network.block == last
    assert model.config.layers == [last]
    model.fix_masks(1.0)
    assert torch.equal(logits_of(model, kind), logits_of(dense, kind))
    model.networks()[next(iter(model.networks()))].masks.is_open.zero_()
    assert not torch.equal(logits_of(model, kind), logits_of(dense, kind))


# oracle


@pytest.mark.parametrize("options", [*ROUTES, {"num_experts": 3, "group_size": 8}])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_masked_network_is_the_gated_sum_of_its_experts(kind, options):
    """Each expert computed by itself, from the matrices."""
    model = make_masked(kind, **options)
    for network in model.masked_networks().values():
        hidden = torch.randn(2, 3, 16, generator=seeded(1))
        masks = settle_masks(network.masks.scores).repeat_interleave(options.get("group_size", 1), dim=1)
        assert masks.shape == (options["num_experts"], UNITS)
        inner = network.act_fn(network.gate(hidden)) * network.up(hidden) if network.is_gated else None
        inner = network.act_fn(network.up(hidden)) if inner is None else inner
        with torch.no_grad():
            found = network(hidden)
            outputs = torch.stack([network.down(inner * mask) for mask in masks], dim=-2)  # (batch, seq, experts, ...)
            if network.router is None:
                wanted = outputs.squeeze(-2)
            else:
                logits = (hidden @ network.router.weight.T).flatten(0, 1)
                index, weights = choose_experts(logits, options.get("top_k", 1))
                gates = torch.zeros_like(logits).scatter(1, index, weights).view(2, 3, -1, 1)
                wanted = (outputs * gates).sum(dim=-2)
        assert_near(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_balance_over_real_tokens(kind):
    model = make_masked(kind, top_k=2, router_aux_loss_coef=0.5)
    batch = make_batch(kind, labels=True)
    seen = {}
    for name, network in model.masked_networks().items():
        network.router.register_forward_hook(lambda module, _, logits, name=name: seen.__setitem__(name, logits))
    stock = model(**batch).loss
    output = model.train()(**batch)
    balances = []
    for name, network in model.masked_networks().items():
        in_decoder = kind.startswith("t5") and network.block >= LAYERS
        mask = batch["labels"] != -100 if in_decoder else batch["attention_mask"].bool()
        logits = seen[name][mask]  # (real, experts)
        index, _ = choose_experts(logits, 2)
        balances.append(balance_loss(logits, index, torch.ones(len(logits), dtype=torch.bool)))
        assert network.load.sum() == 2 * mask.sum()
    torch.testing.assert_close(output.aux_loss, torch.stack(balances).mean())
    torch.testing.assert_close(output.loss, stock + 0.5 * output.aux_loss)


@pytest.mark.parametrize("budget", ["global", "layer"])
def test_budgets_are_held_together_or_each_by_itself(budget):
    model = make_masked("t5", budget=budget)
    before = torch.stack([network.masks.scores.detach().clone() for network in model.masked_networks().values()])
    model.hold_masks(0.7)
    after = torch.stack([network.masks.scores.detach() for network in model.masked_networks().values()])
    closed = 1 - open_probability(after).mean(dim=(1, 2))  # (blocks,)
    closed = closed if budget == "layer" else closed.mean()[None]
    torch.testing.assert_close(closed, torch.full_like(closed, 0.7), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.measure_sparsity(), closed)
    shifts = (after - before).mean(dim=(1, 2), keepdim=True)  # (blocks, 1, 1)
    torch.testing.assert_close(after - before, shifts.expand_as(after), rtol=0, atol=1e-4)
    assert (shifts.max() - shifts.min() > 1e-2) == (budget == "layer")


@pytest.mark.parametrize("budget", ["global", "layer"])
def test_hardened_masks_are_those_that_will_be_fixed(budget):
    model = make_masked("llama", budget=budget)
    model.draw_noise(0)
    wanted = copy.deepcopy(model).fix_masks(0.3)
    model.harden_masks(0.3)
    model.train()(**make_batch("llama", labels=True)).loss.backward()
    for network, fixed in zip(model.networks().values(), wanted.networks().values(), strict=True):
        assert torch.equal(network.masks(), fixed.masks())
        assert not network.masks.scores.grad.any()
    model.fix_masks()  # as many as are open
    for network, fixed in zip(model.networks().values(), wanted.networks().values(), strict=True):
        assert torch.equal(network.masks(), fixed.masks())


def test_a_subclass_counts_the_balance_once():
    model, batch = make_masked("llama").train(), make_batch("llama", labels=True)
    wanted = model(**batch).loss
    model.__class__ = type("Mine", (type(model),), {})
    assert model(**batch).loss == wanted


def test_noise_is_that_of_the_step_and_of_training_only():
    model, batch = make_masked("llama"), make_batch("llama", labels=True)
    settled = model(**batch).loss
    model.draw_noise(3)
    drawn = [network.masks.noise.clone() for network in model.networks().values()]
    assert torch.equal(model(**batch).loss, settled)
    for network in model.train().networks().values():
        masks = draw_masks(network.masks.scores, network.masks.noise)
        assert torch.equal(network.masks(), masks)
    torch.manual_seed(99)  # whatever drew random numbers before
    model.draw_noise(3)
    assert all(torch.equal(n.masks.noise, old) for n, old in zip(model.networks().values(), drawn, strict=True))
    model.budget.clock += 1
    model.draw_noise(3)
    assert not any(torch.equal(n.masks.noise, old) for n, old in zip(model.networks().values(), drawn, strict=True))


def test_seeds_decide_scores_and_routers_and_nothing_else_is_drawn():
    dense = make_dense("llama")
    before = torch.get_rng_state()
    one, two, other = (from_dense(dense, num_experts=4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one if "schedule" not in name)
    assert not torch.equal(one["model.layers.0.mlp.router.weight"], other["model.layers.0.mlp.router.weight"])
    assert not torch.equal(one["model.layers.0.mlp.masks.scores"], other["model.layers.0.mlp.masks.scores"])


# masks that are given or fixed


@pytest.mark.parametrize("kind", STRUCTURES)
def test_given_masks_are_fixed_from_the_start(kind):
    blocks = 2 * LAYERS if kind.startswith("t5") else LAYERS
    masks = torch.rand(blocks, 4, UNITS // 4, generator=seeded(2)) < 0.5
    masks[:, :, 0] = True
    masks = masks.repeat_interleave(4, dim=-1)
    model = make_masked(kind, masks=masks, group_size=4)
    assert model.config.mask_stage == "fixed"
    assert not hasattr(model, "budget")
    for network, wanted in zip(model.masked_networks().values(), masks, strict=True):
        assert torch.equal(network.masks(), wanted.float())
        assert network.masks.is_open.shape == (4, UNITS // 4)
        assert not any("scores" in name for name, _ in network.named_parameters())
    counts = model.count_units()
    assert all(sum(kinds.values()) == UNITS for kinds in counts.values())
    assert [kinds["shared"] for kinds in counts.values()] == masks.all(dim=1).sum(dim=1).tolist()


@pytest.mark.parametrize("budget", ["global", "layer"])
def test_fixing_keeps_the_exact_share_with_the_highest_scores(budget):
    model = make_masked("llama", budget=budget)
    scores = torch.stack([network.masks.scores.detach().clone() for network in model.networks().values()])
    assert model.fix_masks(0.3) is model
    opened = torch.stack([network.masks() for network in model.networks().values()]).bool()
    assert torch.equal(opened, choose_masks(scores, 0.3, by_layer=budget == "layer"))
    assert opened.sum() == (2 * 4 * round(0.3 * UNITS) if budget == "layer" else 4 * round(0.3 * 2 * UNITS))
    assert model.config.mask_stage == "fixed"


def test_labels_and_gradients_reach_what_they_should():
    for options in ROUTES:
        model = make_masked("llama", **options).train()
        model.draw_noise(0)
        model(**make_batch("llama", labels=True)).loss.backward()
        lost = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert lost == []
        for network in model.networks().values():
            assert network.masks.scores.grad.abs().sum() > 0
            assert network.router is None or network.router.weight.grad.abs().sum() > 0


# inputs at the edge


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_gives_no_loss_of_its_own_and_no_nan(kind):
    model, batch = make_masked(kind, router_aux_loss_coef=0).train(), make_batch(kind, labels=True)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch)
    assert output.loss == 0
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.eval()(**batch).loss == 0


def test_every_form_of_a_mask_gives_the_same_balance():
    model, batch = make_masked("llama", top_k=2).train(), make_batch("llama", labels=True)
    rows = batch["attention_mask"]
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & rows.bool()[:, None, None]
    wanted = model(**batch)
    for mask in (rows.bool(), rows.float(), causal):
        output = model(**batch | {"attention_mask": mask})
        torch.testing.assert_close(output.aux_loss, wanted.aux_loss)
        torch.testing.assert_close(output.loss, wanted.loss)


def test_routers_and_masks_compute_in_float32_under_autocast():
    model, batch = make_masked("llama", top_k=2).train(), make_batch("llama", labels=True)
    model.draw_noise(0)
    exact, seen = model(**batch), []
    for network in model.networks().values():
        for part in (network.router, network.masks):
            part.register_forward_hook(lambda module, _, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert set(seen) == {torch.float32}
    assert output.loss.dtype == output.aux_loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.05, atol=0)
    output.loss.backward()
    assert all(n.masks.scores.grad.dtype == torch.float32 for n in model.networks().values())


# beside features of transformers


@pytest.mark.parametrize("kind", STRUCTURES)
def test_gradient_checkpointing_changes_nothing(kind):
    found = []
    for checkpointing in (False, True):
        model = make_masked(kind, top_k=2).train()
        model.draw_noise(0)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        options = {} if kind == "bert" else {"use_cache": False}
        output = model(**make_batch(kind, labels=True), **options)
        output.loss.backward()
        loads = {name: network.load for name, network in model.networks().items()}
        found.append((output.loss, loads, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])


def test_reentrant_checkpointing_is_refused_where_it_loses_the_balance():
    model, batch = make_masked("llama").train(), make_batch("llama", labels=True)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="`use_reentrant` must be False with gradient checkpointing"):
        model(**batch, use_cache=False)


def test_copies_of_a_trained_model_are_equal_and_apart():
    model, batch = make_masked("llama", top_k=2).train(), make_batch("llama", labels=True)
    model.draw_noise(0)
    model(**batch).loss.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).loss, model(**batch).loss)
    before = logits_of(model.eval(), "llama")
    scatter_masks(twin, seed=1)
    assert torch.equal(logits_of(model, "llama"), before)


def test_outputs_are_a_tuple_if_asked_for():
    model, batch = make_masked("llama"), make_batch("llama", labels=True)
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)
    assert isinstance(model.train()(**batch, return_dict=False), tuple)
    positional = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(positional.loss, model(**batch).loss)
