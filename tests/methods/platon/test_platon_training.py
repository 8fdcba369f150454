"""The callback with the stock Trainer: identity, an oracle loop, exact counts, and everything a Trainer can do."""

import copy
import itertools

import pytest
import torch
from platon_runs import assert_same_weights, callback_of, count_all_zeros, pruner_of
from transformers import TrainerCallback, set_seed

from hf_moebert import PlatonConfig, PlatonPruningCallback
from hf_moebert.methods.platon.training_parameters import find_prunable
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.training.schedules import cubic_decay


class Spy(TrainerCallback):
    """Counts zeros after every step and at every evaluation and save."""

    def __init__(self):
        self.after_step, self.at_evaluation = {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after_step[state.global_step] = count_all_zeros(model)[0]

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.at_evaluation[state.global_step] = count_all_zeros(model)[0]


# Identity


def test_nothing_pruned_is_untouched_training(tiny_bert, make_trainer):
    dense, pruned = make_trainer(tiny_bert(), False), make_trainer(tiny_bert(), {"keep_ratio": 1.0})
    dense.train()
    pruned.train()
    assert_same_weights(pruned.model, dense.model)


# Oracle


@pytest.mark.parametrize("sensitivity_at", ["pre_step", "post_step"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_as_a_loop_by_hand(tiny_bert, make_trainer, sensitivity_at, accumulation):
    """The same in plain torch, whole tensors and no caching; weights, statistics and masks are equal bit for bit."""
    recipe = {"sensitivity_at": sensitivity_at, "window": 4, "initial_warmup": 5, "final_warmup": 7}
    trainer = make_trainer(
        tiny_bert(), recipe, max_steps=25, gradient_accumulation_steps=accumulation, per_device_train_batch_size=4
    )
    model = copy.deepcopy(trainer.model)
    batches = record_batches(trainer)
    trainer.train()
    pruner = pruner_of(trainer)

    optimizer = make_trainer(model, False).create_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (25 - step) / 25)
    names = [name for name, _ in find_prunable(model, PlatonConfig()).items()]
    weights = dict(model.named_parameters())
    window, importance, uncertainty = ({n: torch.zeros_like(weights[n]) for n in names} for _ in range(3))
    model.train()
    for t in range(1, 26):
        for batch in batches[(t - 1) * accumulation : t * accumulation]:
            (model(**batch).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        old = {n: weights[n].detach().clone() for n in names}
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for n in names:
                s = ((old[n] if sensitivity_at == "pre_step" else weights[n]) * weights[n].grad).abs()
                if t % 4 == 0:
                    importance[n] = torch.lerp(importance[n], window[n], 1 - 0.85)
                    uncertainty[n] = torch.lerp(uncertainty[n], (window[n] - importance[n]).abs(), 1 - 0.9)
                    window[n] = s
                else:
                    window[n] = torch.lerp(window[n], s, 1 / (t % 4 + 1))
            ratio = cubic_decay(t, begin=5, end=18, final=0.3)
            if t > 5 and (t % 4 == 0 or t > 18):
                scores = torch.cat([(importance[n] * uncertainty[n]).flatten() for n in names])
                mask = torch.ones_like(scores, dtype=torch.bool)
                mask[scores.argsort(stable=True)[: round((1 - ratio) * len(scores))]] = False
                for n, part in zip(names, mask.split([weights[n].numel() for n in names]), strict=True):
                    weights[n].masked_fill_(~part.view_as(weights[n]), 0.0)
        optimizer.zero_grad()

    assert_same_weights(trainer.model, model)
    for kind, tensors in {"window": window, "importance": importance, "uncertainty": uncertainty}.items():
        for n in names:
            assert torch.equal(pruner.statistics.tensors[kind][n].view_as(weights[n]), tensors[n]), (kind, n)


def record_batches(trainer):
    """Keep the batches that the Trainer is about to see, without the labels' rename it does itself."""
    batches = []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        if model.training:
            batches.append({key: value.clone() for key, value in inputs.items()})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return batches


# Exactness


@pytest.mark.parametrize(
    ("criterion", "changes"),
    [
        *itertools.product(("platon", "movement", "magnitude"), ({}, {"include_bias": True}, {"min_keep": 0.2})),
        ("importance", {}),
    ],
)
def test_exactly_as_sparse_as_asked_for(tiny_bert, make_trainer, criterion, changes):
    spy = Spy()
    evaluation = {} if changes else {"eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tiny_bert(), {"criterion": criterion} | changes, callbacks=[spy], **evaluation)
    trainer.train()
    pruner = pruner_of(trainer)
    config = callback_of(trainer).config
    zeros, numel = count_all_zeros(trainer.model, config)
    assert numel == pruner.numel
    assert zeros == round(0.7 * numel)
    if not changes:
        assert {spy.after_step[step] for step in range(15, 21)} == {zeros}  # steps of the final phase
        assert {spy.at_evaluation[step] for step in range(15, 21)} == {zeros}
        assert spy.after_step[12] == round((1 - cubic_decay(12, begin=2, end=14, final=0.3)) * numel)
        # masks are soft in time: between two, weights grow back, but for movement, whose mask is always there
        assert spy.after_step[13] == (spy.after_step[12] if criterion == "movement" else 0)
        assert spy.after_step[1] == 0
    if "min_keep" in changes:
        assert all(keep.float().mean() >= 0.2 for keep in pruner.keep.values())


@pytest.mark.parametrize("keep_ratio", [0.9, 0.5, 0.001])
def test_the_mask_of_the_final_phase_is_cached_and_right(tiny_bert, make_trainer, monkeypatch, keep_ratio):
    """Renewing it at every step changes nothing, since scores change at the end of a window only."""

    def train(always):
        trainer = make_trainer(tiny_bert(), {"keep_ratio": keep_ratio})
        renewed = []
        renew = Pruner._renew_masks
        monkeypatch.setattr(Pruner, "_renew_masks", lambda self: (renewed.append(self.clock), renew(self))[1])
        if always:
            apply = Pruner.apply_masks
            monkeypatch.setattr(Pruner, "apply_masks", lambda self: (renew(self), apply(self))[1])
        trainer.train()
        monkeypatch.undo()
        return trainer.model, renewed

    cached, renewed = train(always=False)
    fresh, _ = train(always=True)
    assert_same_weights(cached, fresh)
    assert renewed == [3, 6, 9, 12, 15, 18]


def test_reference_parity_has_the_quirks_of_the_code(tiny_bert, make_trainer):
    trainer = make_trainer(
        tiny_bert(), {"reference_parity": True, "include_bias": True, "sensitivity_at": "post_step"}
    )
    trainer.train()
    zeros, numel = count_all_zeros(trainer.model, PlatonConfig(include_bias=True))
    assert zeros == int(numel * (1 - 0.3)) - 1


def test_weights_come_back(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert(), max_steps=40)
    trainer.train()
    assert max(entry["platon_revived"] for entry in trainer.state.log_history) > 0


def test_movement_is_that_of_weights_behind_a_mask(tiny_bert, make_trainer):
    """A loop in plain torch with a mask in the forward pass: scores, masks and values are the same."""
    trainer = make_trainer(tiny_bert(), {"criterion": "movement"}, optim="sgd", max_grad_norm=0.0)
    model = copy.deepcopy(trainer.model)
    batches = record_batches(trainer)
    trainer.train()

    names = list(pruner_of(trainer).parameters)
    weights = dict(model.named_parameters())
    values = {n: weights[n].detach().clone() for n in names}
    movement, keep = ({n: torch.zeros_like(weights[n]) for n in names} for _ in range(2))
    model.train()
    for t, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        with torch.no_grad():
            for name, weight in weights.items():
                step = 1e-2 * (20 - t + 1) / 20 * weight.grad
                if name not in names:
                    weight -= step
                else:
                    movement[name] -= values[name] * weight.grad
                    values[name] -= step * (keep[name] if t > 3 else 1)
            ratio = cubic_decay(t, begin=2, end=14, final=0.3)
            if t > 2 and (t % 3 == 0 or t == 15):
                scores = torch.cat([movement[n].flatten() for n in names])
                flat = torch.ones_like(scores)
                flat[scores.argsort(stable=True)[: round((1 - ratio) * len(scores))]] = 0
                keep = {
                    n: m.view_as(values[n])
                    for n, m in zip(names, flat.split([values[n].numel() for n in names]), strict=True)
                }
            for n in names:
                weights[n].copy_(values[n] * keep[n] if t > 2 else values[n])
        model.zero_grad()
    for n in names:
        torch.testing.assert_close(trainer.model.get_parameter(n), weights[n], rtol=1e-4, atol=1e-6)
        assert torch.equal(trainer.model.get_parameter(n) == 0, keep[n] == 0)


def test_equal_scores_are_pruned_by_position(tiny_bert):
    """All sensitivities alike: exactly so many weights go all the same, never all or none of the model."""
    model = tiny_bert()
    pruner = Pruner(model, PlatonConfig(keep_ratio=0.4, initial_warmup=1, final_warmup=2, window=1), 4)
    with torch.no_grad():
        for parameter in pruner.parameters.values():
            parameter.fill_(1)
            parameter.grad = torch.ones_like(parameter)
        for _ in range(4):
            pruner.observe()
            pruner.advance()
    kept = torch.cat(list(pruner.keep.values()))
    zeros = round(0.6 * len(kept))
    assert not kept[:zeros].any()
    assert kept[zeros:].all()


def test_two_of_four(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert(), {"granularity": "2:4", "keep_ratio": 0.5})
    trainer.train()
    for parameter in pruner_of(trainer).parameters.values():
        assert ((parameter != 0).view(-1, 4).sum(1) == 2).all()
    # the two of the higher score
    statistics, name = pruner_of(trainer).statistics, next(iter(pruner_of(trainer).parameters))
    scores = statistics.score(name, slice(0, 256)).view(-1, 4)
    kept = pruner_of(trainer).keep[name].view(-1, 4)
    assert (scores[kept].view(-1, 2).amin(1) >= scores[~kept].view(-1, 2).amax(1)).all()


# What the Trainer can do


def test_gradient_accumulation_sees_steps_not_batches(tiny_bert, make_trainer):
    arguments = {"max_grad_norm": 0.0, "optim": "sgd"}  # Adam would blow up the difference in rounding
    whole = make_trainer(tiny_bert(), per_device_train_batch_size=8, **arguments)
    halves = make_trainer(tiny_bert(), per_device_train_batch_size=4, gradient_accumulation_steps=2, **arguments)
    whole.train()
    halves.train()
    assert pruner_of(whole).clock == pruner_of(halves).clock == 20
    for name, keep in pruner_of(whole).keep.items():
        assert torch.equal(keep, pruner_of(halves).keep[name]), name
    ours, theirs = (pruner_of(t).statistics.tensors["importance"] for t in (whole, halves))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_grad_norm": 0.0},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.process),
        {"gradient_accumulation_steps": 3},  # the last window of an epoch is incomplete
    ],
    ids=lambda arguments: next(iter(arguments)) + str(next(iter(arguments.values()))),
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_trainer_options(tiny_bert, make_trainer, arguments):
    trainer = make_trainer(tiny_bert(), **arguments)
    trainer.train()
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round(0.7 * numel)
    assert pruner_of(trainer).clock == 20


def test_checkpointed_activations_change_nothing(tiny_bert, make_trainer):
    plain, checkpointed = make_trainer(tiny_bert()), make_trainer(tiny_bert(), activation_checkpointing=True)
    plain.train()
    checkpointed.train()
    for name, keep in pruner_of(plain).keep.items():
        assert torch.equal(keep, pruner_of(checkpointed).keep[name])


def test_a_bf16_model_has_statistics_in_single_precision(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert().bfloat16())
    trainer.train()
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round(0.7 * numel)
    for tensors in pruner_of(trainer).statistics.tensors.values():
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_train_twice_starts_anew(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert())
    trainer.train()
    first = pruner_of(trainer)
    trainer.train()
    assert pruner_of(trainer) is not first
    assert pruner_of(trainer).clock == 20


def test_two_callbacks_do_what_one_does(tiny_bert, make_trainer):
    recipe = PlatonConfig(keep_ratio=0.3, initial_warmup=2, final_warmup=6, window=3)
    one, two = make_trainer(tiny_bert()), make_trainer(tiny_bert(), callbacks=[PlatonPruningCallback(recipe)])
    one.train()
    two.train()
    assert_same_weights(one.model, two.model)


def test_the_state_is_three_tensors_and_a_mask(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert())
    trainer.train()
    pruner = pruner_of(trainer)
    stored = sum(t.nbytes for tensors in pruner.statistics.tensors.values() for t in tensors.values())
    assert stored == 3 * 4 * pruner.numel
    assert sum(keep.nbytes for keep in pruner.keep.values()) == pruner.numel


def test_a_seed_fixes_everything(tiny_bert, make_trainer):
    def train():
        set_seed(3)
        torch.rand(5)
        trainer = make_trainer(tiny_bert(hidden_dropout_prob=0.1), seed=3)
        trainer.train()
        return trainer.model

    assert_same_weights(train(), train())
