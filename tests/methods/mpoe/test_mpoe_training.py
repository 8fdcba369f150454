"""The gradient mask under the stock Trainer, and training of the models themselves."""

import pytest
import torch
from tiny_mpoe import KINDS, centres, make, make_args, make_batch, make_examples, randomise_routers
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_moebert.methods.mpoe import MPOEGradientMaskCallback, MPOEGradientMaskConfig
from hf_moebert.methods.mpoe.functional import draw_mask
from hf_moebert.methods.mpoe.modeling_mpoe import WATCH_FORWARDS


def train(folder, kind="bert", recipe=None, callbacks=(), model=None, **options):
    model = randomise_routers(make(kind, num_experts=4)) if model is None else model
    masks = [] if recipe is None else [MPOEGradientMaskCallback(recipe)]
    args = make_args(folder, **{"weight_decay": 0.1, "learning_rate": 1e-2, **options})
    trainer = Trainer(model, args, train_dataset=make_examples(kind), callbacks=[*masks, *callbacks])
    trainer.train()
    return model


class Watch(TrainerCallback):
    """Keeps the central tensors as they are after each step."""

    def __init__(self):
        self.values = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.values.append({name: p.detach().clone() for name, p in centres(model).items()})


def moved(watch):
    """Check whether each central tensor moved in each step."""
    pairs = zip(watch.values, watch.values[1:], strict=False)
    return [[not torch.equal(before[name], after[name]) for name in before] for before, after in pairs]


def same(one, two, **tolerance):
    one, two = one.state_dict(), two.state_dict()
    if tolerance:
        torch.testing.assert_close(one, two, **tolerance)
    return all(torch.equal(one[name], two[name]) for name in one)


def test_nothing_kept_means_that_nothing_moves(tmp_path):
    before = {name: p.detach().clone() for name, p in centres(randomise_routers(make("bert"))).items()}
    model = train(tmp_path, recipe=MPOEGradientMaskConfig(keep=0), max_steps=8)
    assert all(torch.equal(p, before[name]) for name, p in centres(model).items())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), make("bert").parameters(), strict=True))


@pytest.fixture(scope="module")
def unmasked(tmp_path_factory):
    """A model that was trained without a mask."""
    return train(tmp_path_factory.mktemp("unmasked"))


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_everything_kept_is_no_mask(tmp_path, unmasked, granularity):
    masked = train(tmp_path, recipe=MPOEGradientMaskConfig(keep=1, granularity=granularity, rescale=True))
    assert same(unmasked, masked)


def test_the_draws_say_which_tensors_move(tmp_path):
    watch = Watch()
    train(
        tmp_path,
        recipe=MPOEGradientMaskConfig(keep=0.5, seed=7),
        callbacks=[watch],
        max_steps=12,
        lr_scheduler_type="constant",
    )
    drawn = [[bool(draw_mask((), 0.5, seed=7, step=s, index=i)) for i in range(4)] for s in range(12)]
    assert moved(watch) == drawn


def test_by_default_a_tensor_moves_as_often_as_an_expert_sees_a_token(tmp_path):
    watch = Watch()
    train(tmp_path, recipe=MPOEGradientMaskConfig(), callbacks=[watch], max_steps=12, lr_scheduler_type="constant")
    assert moved(watch) == [[bool(draw_mask((), 0.25, seed=0, step=s, index=i)) for i in range(4)] for s in range(12)]


def test_the_mask_comes_before_clipping(tmp_path):
    options = {"max_grad_norm": 1e-3, "optim": "sgd", "learning_rate": 1.0, "max_steps": 2}
    masked = train(tmp_path, recipe=MPOEGradientMaskConfig(keep=0), **options)
    model = randomise_routers(make("bert"))
    for centre in centres(model).values():
        centre.requires_grad_(False)
    same(train(tmp_path, model=model, **options), masked, rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError):
        same(train(tmp_path, **options), masked, rtol=1e-5, atol=1e-7)


def test_entries_that_are_not_drawn_keep_values_and_moments(tmp_path):
    found = []

    class Moments(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            optimizer = getattr(optimizer, "optimizer", optimizer)
            found.append([{k: v.clone() for k, v in optimizer.state[p].items()} for p in centres(model).values()])

    watch = Watch()
    recipe = MPOEGradientMaskConfig(keep=0.4, granularity="element")
    train(tmp_path, recipe=recipe, callbacks=[watch, Moments()], max_steps=6, lr_scheduler_type="constant")
    for step in range(1, 6):
        values = zip(watch.values[step].values(), watch.values[step + 1].values(), strict=True)
        for index, (before, after) in enumerate(values):
            mask = draw_mask(before.shape, 0.4, seed=0, step=step, index=index)
            assert torch.equal(before[~mask], after[~mask])
            assert (before != after)[mask].any()
            for name in ("exp_avg", "exp_avg_sq"):
                was, now = found[step - 1][index][name], found[step][index][name]
                assert torch.equal(was[~mask], now[~mask])
                assert (was != now)[mask].any()


def test_rescaling_keeps_the_mean_gradient(tmp_path):
    recipe = MPOEGradientMaskConfig(keep=0.5, rescale=True, granularity="element")
    options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.0}
    before, plain = centres(randomise_routers(make("bert"))), centres(train(tmp_path, **options))
    masked = centres(train(tmp_path, recipe=recipe, **options))
    for index, name in enumerate(before):
        mask = draw_mask(before[name].shape, 0.5, seed=0, step=0, index=index)
        step, expected = masked[name] - before[name], (plain[name] - before[name]) * 2 * mask
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


def test_the_schedule_is_linear(tmp_path):
    kept = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(callback.keep)

    callback = MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0.0, final_keep=1.0))
    Trainer(
        make("bert"),
        make_args(tmp_path, max_steps=5),
        train_dataset=make_examples("bert"),
        callbacks=[callback, Keep()],
    ).train()
    assert kept == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_accumulation_draws_once_and_changes_nothing(tmp_path, granularity):
    recipe = MPOEGradientMaskConfig(keep=0.5, granularity=granularity)
    options = {"max_steps": 3, "learning_rate": 1e-3, "optim": "sgd"}  # three draws that differ
    whole = train(tmp_path, recipe=recipe, per_device_train_batch_size=8, **options)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    same(train(tmp_path, recipe=recipe, **split, **options), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "granularity"), [("t5", "tensor"), ("bert", "element")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, granularity):
    def run(folder, resume=None, **options):
        model = randomise_routers(make(kind, dropout=0.1, router="switch"))
        recipe = MPOEGradientMaskConfig(keep=0.5, granularity=granularity)
        args = make_args(folder, max_steps=4, save_strategy="steps", save_steps=2, **options)
        callbacks = [MPOEGradientMaskCallback(recipe)]
        trainer = Trainer(model, args, train_dataset=make_examples(kind), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(whole, resumed)


def test_hooks_are_gone_after_training_and_training_twice_is_fine(tmp_path):
    model, callback = make("bert"), MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0))
    for _ in range(2):
        args = make_args(tmp_path)
        Trainer(model, args, train_dataset=make_examples("bert"), callbacks=[callback]).train()
        model(**make_batch("bert", labels=True)).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in centres(model).values())
        model.zero_grad()


def test_a_model_without_common_tensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have central tensors that are shared"):
        train(tmp_path, model=make("bert", share_centre=False), recipe=MPOEGradientMaskConfig())
    frozen = make("bert")
    for centre in centres(frozen).values():
        centre.requires_grad_(False)
    with pytest.raises(ValueError, match="and trained, got none"):
        train(tmp_path, model=frozen, recipe=MPOEGradientMaskConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(tmp_path, kind):
    model = make(kind, router="switch")
    batch = make_batch(kind, labels=True, count=8)
    before = model(**batch).loss.item()
    train(tmp_path, kind, model=model, max_steps=10, learning_rate=5e-3, weight_decay=0.0)
    assert model.eval()(**batch).loss.item() < before - 0.1


def test_predictions_hold_logits_alone(tmp_path):
    model = make("bert", router="switch")
    model.config.output_router_logits = True
    trainer = Trainer(model, make_args(tmp_path))
    found = trainer.predict(make_examples("bert"))
    assert found.predictions.shape == (8, 3)
    assert found.metrics["test_loss"] > 0


def test_the_seq2seq_trainer_generates(tmp_path):
    model = make("t5", router="switch")
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, generation_max_length=6, **options)
    trainer = Seq2SeqTrainer(model, args, train_dataset=make_examples("t5"))
    trainer.train()
    found = trainer.predict(make_examples("t5"))
    assert found.predictions.shape[0] == 8
    assert found.metrics["test_loss"] > 0


@pytest.mark.parametrize("router", ["reference", "switch"])
def test_accumulated_batches_weigh_by_their_targets(tmp_path, router):
    examples = make_examples("gpt2")
    for row, example in enumerate(examples[:6]):
        example["labels"][2 + row % 2 :] = -100

    def step(model, **options):
        args = make_args(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        Trainer(model, args, train_dataset=examples).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    def error(coef):
        whole, split = (
            step(
                randomise_routers(make("gpt2", router=router, router_aux_loss_coef=coef)),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            )
            for size in (8, 2)
        )
        return (whole - split).norm() / whole.norm()

    assert error(0) < 1e-5
    if router == "switch":  # the balance of parts is not that of the whole, but it counts once
        assert error(0.1) < 0.1


def test_a_share_of_the_targets_is_a_share_of_the_balance():
    model, batch = randomise_routers(make("gpt2", router="switch")), make_batch("gpt2", labels=True)
    model.config.router_aux_loss_coef = 0.5
    alone, part = model(**batch), model(**batch, num_items_in_batch=torch.tensor(4 * 18))
    torch.testing.assert_close(part.loss, alone.loss / 4)
    torch.testing.assert_close(part.aux_loss, alone.aux_loss)


def test_dead_experts_are_reported(monkeypatch):
    model, batch, said = make("bert").train(), make_batch("bert", labels=True), []
    for network in model.networks().values():
        torch.nn.init.zeros_(network.router.weight)  # all ties: expert 0 gets everything
    monkeypatch.setattr("hf_moebert.methods.mpoe.modeling_mpoe.logger.warning", said.append)
    for _ in range(WATCH_FORWARDS):
        model(**batch)
    assert len(said) == 1
    assert "6 of 8 experts had no token in the last 100 forwards of this process" in said[0]
    assert "{'bert.encoder.layer.0.intermediate': [1, 2, 3], " in said[0]


def test_a_finished_encoder_does_not_disturb_the_watch():
    model, batch = make("t5", router="switch").train(), make_batch("t5", labels=True)
    model(**batch)
    encoded = model.get_encoder()(batch["input_ids"], batch["attention_mask"])
    model(encoder_outputs=encoded, attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert [network.num_watched for network in model.networks().values()] == [1, 1, 2, 2]
