"""The callback with the stock Trainer: identity, an oracle loop, the budget, and everything a Trainer can do."""

import copy
import itertools

import pytest
import torch
from mom_runs import (
    KINDS,
    Spy,
    assert_same,
    callback_of,
    gather_state,
    logged,
    make,
    make_args,
    make_data,
    make_dense,
    make_trainer,
    scores_of,
    without_opinion,
)
from transformers import Trainer

from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback
from hf_moebert.methods.mixture_of_masks.training_optimizer import SCORES
from hf_moebert.training.schedules import linear_ramp


OURS = {"masks", "router"}  # modules that the stock models do not have


# Identity


def test_nothing_to_close_is_untouched_training(tmp_path, caplog_of_transformers):
    dense, options = make_dense(), {"max_grad_norm": 0.0, "weight_decay": 0.1}
    Trainer(dense, make_args(tmp_path, **options), train_dataset=make_data()).train()
    trainer = make_trainer(tmp_path, make(num_experts=1), {"keep_ratio": 1}, **options)
    trainer.train()
    ours, theirs = trainer.model.state_dict(), dense.state_dict()
    named = {name: ours[name.replace("_proj", "") if ".mlp." in name else name] for name in theirs}
    assert_same(named, theirs)
    assert "`keep_ratio` is 1: no mask will be closed." in caplog_of_transformers.text
    assert "Training stopped" not in caplog_of_transformers.text


# Oracle


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_loop_by_hand(tmp_path, kind):
    """The same in plain torch: what is set when, and which rate each parameter has; bit for bit."""
    trainer = make_trainer(tmp_path, make(kind, top_k=2), {"learn_share": 0.75}, weight_decay=0.1)
    model, batches = copy.deepcopy(trainer.model), []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batches.append(copy.deepcopy(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    trainer.train()

    kinds = {"scores": [], "router": [], "decayed": [], "other": []}
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        kind_of = "router" if ".router." in name else last if last in kinds else None
        kinds[kind_of or ("other" if "norm" in name.lower() or "bias" in name else "decayed")].append(parameter)
    adam = {"lr": 1e-3, "weight_decay": 0.0, "fused": True}
    optimizers = [
        torch.optim.AdamW(kinds["decayed"], **adam | {"weight_decay": 0.1}),
        torch.optim.AdamW(kinds["router"] + kinds["other"], **adam),
        torch.optim.AdamW(kinds["scores"], **adam | {"lr": 0.1}, betas=(0.5, 0.999), eps=1e-15),
    ]
    model.train()
    for step, batch in enumerate(batches):
        model.budget.clock.fill_(step)
        if step < 9:
            model.draw_noise(0)
        if kind == "llama":
            batch["num_items_in_batch"] = (batch["labels"][:, 1:] != -100).sum()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[2].param_groups[0]["lr"] = 0.1 if step < 9 else 0.0
        for optimizer in optimizers:
            if optimizer in optimizers[:2]:
                optimizer.param_groups[0]["lr"] = 1e-3 * (12 - step) / 12
            optimizer.step()
            optimizer.zero_grad()
        if step < 8:
            model.hold_masks(0.5 * min((step + 1) / 6, 1))
        elif step == 8:
            model.harden_masks(0.5)
    ours, theirs = dict(trainer.model.named_parameters()), dict(model.named_parameters())
    assert len(batches) == 12
    assert_same(ours, theirs)


# The budget


@pytest.mark.parametrize(
    ("steps", "budget", "ramp"), [(30, "global", "linear"), (60, "layer", "linear"), (100, "global", "cubic")]
)
def test_masks_follow_the_ramp_however_short_the_run(tmp_path, steps, budget, ramp):
    """Exactly, until they are fixed at the share itself."""
    model = make(num_experts=1, budget=budget)
    trainer = make_trainer(tmp_path, model, {"ramp": ramp, "keep_ratio": 0.5}, max_steps=steps)
    trainer.train()
    targets = [callback_of(trainer).target_at(step) for step in range(1, steps + 1)]
    assert targets == sorted(targets)
    assert targets[steps // 2 :] == [0.5] * (steps - steps // 2)
    assert logged(trainer, "mom_target") == targets
    assert logged(trainer, "mom_sparsity") == pytest.approx(targets, abs=1e-4)
    assert logged(trainer, "mom_active")[-1] == pytest.approx(0.5)
    settled = torch.stack([network.masks.settled() for network in model.masked_networks().values()])
    assert ((settled == 0) | (settled == 1)).all()


def test_the_loss_decides_which_masks_close(tmp_path):
    """One that would rather have those of the second block open."""
    found = {}
    for budget in ("global", "layer"):
        model = without_opinion(make(num_experts=1, budget=budget))
        pulled = model.model.layers[1].mlp.masks.scores
        pulled.register_hook(lambda gradient: gradient - 0.05)
        make_trainer(tmp_path, model, {"freeze_backbone": True}, max_steps=30, logging_steps=30).train()
        found[budget] = [
            float(network.masks.settled().detach().mean()) for network in model.masked_networks().values()
        ]
    assert sum(found["global"]) / 2 == pytest.approx(0.5, abs=0.02)
    assert found["global"][1] - found["global"][0] > 0.5
    assert found["layer"] == [0.5, 0.5]


def test_masks_are_fixed_early_and_the_rest_recovers(tmp_path):
    model, seen = make(num_experts=2), []
    spy = Spy("on_step_end", lambda state, **_: seen.append((scores_of(model).clone(), model.lm_head.weight.clone())))
    trainer = make_trainer(tmp_path, model, {"ramp_share": 0.25, "learn_share": 0.5}, callbacks=[spy])
    trainer.train()
    for (scores, weight), (later, moved) in itertools.pairwise(seen[5:]):  # the sixth step is the last to learn masks
        assert torch.equal(scores, later)
        assert not torch.equal(weight, moved)
    assert not torch.equal(seen[4][0], seen[5][0])
    opened = [network.masks.settled() for network in model.masked_networks().values()]
    model.fix_masks(0.5)
    assert all(torch.equal(n.masks(), x) for n, x in zip(model.masked_networks().values(), opened, strict=True))


# Rates


def rates_of(trainer):
    """The rate of each group at each step, by what is in it."""
    seen = []
    trainer.add_callback(
        Spy(
            "on_pre_optimizer_step",
            lambda state, optimizer, **_: seen.append([g["lr"] for g in optimizer.param_groups]),
        )
    )
    trainer.train()
    return list(zip(*seen, strict=True))


def test_only_the_rates_of_weights_and_routers_fall(tmp_path):
    recipe = {"score_rate": 0.07, "router_rate": 0.02, "backbone_rate": 0.004, "learn_share": 0.75}
    decayed, other, routers, scores = rates_of(make_trainer(tmp_path, make(), recipe))
    assert scores == (0.07,) * 9 + (0.0,) * 3
    assert routers == pytest.approx([0.02 * (12 - step) / 12 for step in range(12)])
    assert decayed == other == pytest.approx([0.004 * (12 - step) / 12 for step in range(12)])


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_of_the_trainer_but_for_ours(tmp_path, kind):
    model, args = make(kind), make_args(tmp_path, weight_decay=0.1, learning_rate=0.01)
    ours = {id(p) for name, p in model.named_parameters() if name.split(".")[-2] in OURS}
    groups = MaskSparsityCallback().make_optimizer(model, args).param_groups
    stock = Trainer(model, args).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.0]
    for mine, theirs in zip(groups, stock, strict=False):
        assert [id(p) for p in mine["params"]] == [id(p) for p in theirs["params"] if id(p) not in ours]
        assert mine["lr"] == theirs["lr"] == 0.01
    assert {id(p) for group in groups[2:] for p in group["params"]} == ours
    assert [SCORES in group for group in groups] == [False, False, False, True]


def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, {"freeze_backbone": True}, weight_decay=0.1)
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in moved} == OURS | {"budget"}
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == OURS


# Batches and steps


def plain_descent(trainer):
    """The same groups without moments, in which differences of rounding stay what they are."""
    kept = ("params", "lr", "weight_decay", SCORES)
    groups = [{key: group[key] for key in kept if key in group} for group in trainer.optimizer.param_groups]
    trainer.optimizer = torch.optim.SGD(groups)
    return trainer


@pytest.mark.parametrize(
    ("kind", "num_experts", "padded"),
    [
        ("llama", 1, True),
        ("llama", 1, False),
        ("llama", 2, False),
        ("t5", 2, False),
        ("bert", 2, False),
        ("bert", 1, True),
    ],
)
def test_accumulation_changes_nothing(tmp_path, kind, num_experts, padded):
    """36 examples, so that the last window of an epoch is incomplete; counted by labels where the Trainer does so."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = plain_descent(
            make_trainer(
                tmp_path,
                make(kind, num_experts=num_experts, router_aux_loss_coef=0.0),
                {"score_rate": 50.0, "router_rate": 0.1},
                data=make_data(kind, count=36, padded=padded),
                max_steps=6,
                learning_rate=0.05,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
            )
        )
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        assert int(trainer.model.budget.clock) == 6
        found.append(trainer.model.state_dict())
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if num_experts > 1 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found[0], found[1], **tolerance)
    moved = [(found[0][name] - tensor).abs().max() for name, tensor in before.items() if name.endswith(".scores")]
    assert min(moved) > 0.15  # what the tolerance is to be held against


def test_a_step_has_one_noise(tmp_path):
    seen = {}
    trainer = make_trainer(tmp_path, make(), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4)
    compute_loss, model = trainer.compute_loss, trainer.model

    def watching(*args, **kwargs):
        noises = torch.stack([network.masks.noise for network in model.masked_networks().values()])
        seen.setdefault(trainer.state.global_step, []).append(noises)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = watching
    trainer.train()
    assert [len(noises) for noises in seen.values()] == [4] * 4
    assert all(torch.equal(noise, noises[0]) for noises in seen.values() for noise in noises)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert all(network.masks.noise is None for network in model.masked_networks().values())
    model.budget.clock.fill_(2)
    model.draw_noise(0)  # of seed and clock alone
    assert torch.equal(torch.stack([n.masks.noise for n in model.masked_networks().values()]), seen[2][0])
    model.draw_noise(1)
    assert not torch.equal(next(iter(model.masked_networks().values())).masks.noise, seen[2][0][0])


def test_train_twice_starts_anew(tmp_path):
    trainer = make_trainer(tmp_path, make())
    trainer.train()
    trainer.train()
    assert int(trainer.model.budget.clock) == 12
    targets = [entry["mom_target"] for entry in trainer.state.log_history if "loss" in entry]
    assert targets == [0.5 * linear_ramp(step, begin=0, end=6) for step in range(1, 13)]


def test_two_callbacks_do_what_one_does(tmp_path):
    one = make_trainer(tmp_path, make())
    two = make_trainer(tmp_path, make(), callbacks=[MaskSparsityCallback(callback_of(one).config)])
    one.train()
    two.train()
    assert_same(gather_state(two), gather_state(one))


def test_a_smaller_batch_after_running_out_of_memory_starts_anew(tmp_path):
    trainer = make_trainer(tmp_path, make(), auto_find_batch_size=True)
    compute_loss = trainer.compute_loss

    def out_of_memory(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 8 and trainer.state.global_step == 4:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = out_of_memory
    trainer.train()
    assert trainer._train_batch_size < 8
    assert int(trainer.model.budget.clock) == 12
    targets = [entry["mom_target"] for entry in trainer.state.log_history if "loss" in entry]
    assert targets[-12:] == [0.5 * linear_ramp(step, begin=0, end=6) for step in range(1, 13)]
