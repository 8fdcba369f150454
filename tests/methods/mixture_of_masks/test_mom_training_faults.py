"""Faults that must not go unnoticed: wrong optimizers, losses and models, overflows, NaN, experts without tokens."""

import math

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from mom_runs import assert_same, callback_of, make, make_args, make_data, make_dense, make_trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import Trainer, TrainerCallback

from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback


def begin(trainer):
    trainer.state.max_steps = 12
    callback_of(trainer).on_train_begin(
        trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer
    )


# At the door


def test_another_optimizer_is_refused(tmp_path):
    model, args = make(), make_args(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = Trainer(model, args, train_dataset=make_data(), callbacks=[MaskSparsityCallback()])
    with pytest.raises(
        ValueError, match=r"must hold the one in which the scores .* a rate of their own, got Adam.*make_optim"
    ):
        stock.train()
    other = MaskSparsityCallback().make_optimizer(make(), args)  # of another model
    trainer = Trainer(
        model, args, train_dataset=make_data(), callbacks=[MaskSparsityCallback()], optimizers=(other, None)
    )
    with pytest.raises(ValueError, match="have a rate of their own, got AdamW without"):
        trainer.train()
    assert_same(model.state_dict(), before)


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must have masks to learn, got LlamaForCausalLM whose stage is 'dense'"):
        MaskSparsityCallback().make_optimizer(make_dense(), make_args(tmp_path))
    with pytest.raises(ValueError, match="must have masks to learn, got LlamaForCausalLM"):
        Trainer(
            make_dense(), make_args(tmp_path), train_dataset=make_data(), callbacks=[MaskSparsityCallback()]
        ).train()


def test_masks_that_were_fixed_meanwhile_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, make())
    trainer.train()
    trainer.model.fix_masks(0.5)
    with pytest.raises(ValueError, match="whose stage is 'fixed'"):
        trainer.train()


def test_too_short_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`ramp_share` must leave at least one of the run's 2 steps .* got 0.1"):
        make_trainer(tmp_path, make(), {"ramp_share": 0.1}, max_steps=2).train()


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_sharded_training_is_refused(tmp_path, monkeypatch, kind):
    trainer = make_trainer(tmp_path, make())
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        monkeypatch.setitem(shared, "distributed_type", kind)
    with pytest.raises(
        ValueError, match=rf"Masks must be seen whole, which {kind.value}1? keeps in shards. Use plain data"
    ):
        begin(trainer)


def test_tensor_parallelism_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        linear = trainer.model.model.layers[0].mlp.up
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="which tensor parallelism keeps in shards"):
            begin(trainer)
    finally:
        dist.destroy_process_group()


def test_the_callback_must_be_there_from_the_beginning(tmp_path):
    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.add_callback(MaskSparsityCallback())

    trainer = Trainer(make(), make_args(tmp_path), train_dataset=make_data(), callbacks=[Late()])
    with pytest.raises(RuntimeError, match="must be added to the Trainer before `train` is called"):
        trainer.train()


@pytest.mark.parametrize("way", ["label smoothing", "a loss of one's own"])
def test_any_loss_learns_masks(tmp_path, way):
    """The Trainer takes the labels away from the model, whose loss is then not used."""
    smoothing = {"label_smoothing_factor": 0.1} if way == "label smoothing" else {}
    extra = {} if smoothing else {"compute_loss_func": lambda outputs, labels, **_: outputs["logits"].square().mean()}
    model = make(num_experts=1)
    make_trainer(tmp_path, model, extra=extra, **smoothing).train()
    settled = torch.stack([network.masks.settled() for network in model.masked_networks().values()])
    assert settled.mean() == 0.5


# Numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_stop_the_run(tmp_path, bad):
    model = make()

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                model.model.layers[1].mlp.masks.scores.data[1, 3] = bad

    trainer = make_trainer(tmp_path, model, callbacks=[Break()], logging_steps=5)
    with pytest.raises(FloatingPointError, match="Scores of masks must be finite, but by step 5 some are not. Lower"):
        trainer.train()
    assert trainer.state.global_step == 5


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """The Trainer's own filter would hide it in the log."""
    model = make()
    trainer = make_trainer(tmp_path, model, logging_steps=5)
    model.lm_head.weight.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step == 2 else 1))
    with pytest.raises(FloatingPointError, match="by step 5 some are not"):
        trainer.train()


class Scaled(TrainerCallback):
    """Train with a loss scaler, as on a GPU, but in float32; the steps named have an infinite loss.

    The Trainer uses no loss scaler on a CPU, so it is set in the two places where accelerate looks for it.
    """

    def __init__(self, monkeypatch, trainer, overflow):
        self.trainer, self.seen = trainer, []
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        compute_loss = trainer.compute_loss

        def overflowing(*args, **kwargs):
            loss = compute_loss(*args, **kwargs)
            return loss * math.inf if trainer.state.global_step + 1 in overflow else loss

        trainer.compute_loss = overflowing
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.accelerator.native_amp = True  # only now: the model has not been wrapped in autocast

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        masks = model.model.layers[0].mlp.masks
        kept = {
            "noise": masks.noise,
            "scores": masks.scores.detach(),
        }
        kept = {name: tensor.clone() for name, tensor in kept.items()}
        self.seen.append((int(model.budget.clock), kept))


def test_an_overflow_does_not_count(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make(), max_steps=14)
    assert trainer.optimizer.defaults["fused"]
    monkeypatch.setattr(trainer.args, "fp16", True)
    trainer.optimizer = callback_of(trainer).make_optimizer(trainer.model, trainer.args)
    monkeypatch.setattr(trainer.args, "fp16", False)
    spy = Scaled(monkeypatch, trainer, overflow=[1, 4, 5])
    trainer.train()
    assert [clock for clock, _ in spy.seen] == [0, 0, 1, 2, 2, 2, *range(3, 11)]
    assert int(trainer.model.budget.clock) == 11
    for step in (1, 4, 5):  # the next one is that step again
        assert_same(spy.seen[step - 1][1], spy.seen[step][1])
    assert not torch.equal(spy.seen[1][1]["noise"], spy.seen[2][1]["noise"])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


# Experts that nobody chooses


def test_experts_without_tokens_are_warned_of_and_training_goes_on(tmp_path, caplog_of_transformers):
    model = make(num_experts=3, router_aux_loss_coef=0.0)
    with torch.no_grad():
        for network in model.masked_networks().values():
            network.router.weight.zero_()  # equal, so the lowest index is chosen
    trainer = make_trainer(tmp_path, model, {"router_rate": 0.0}, logging_steps=6)
    trainer.train()
    assert trainer.state.global_step == 12
    warning = "experts had no token since the last log, by block: {0: [1, 2], 1: [1, 2]}. Raise `router_aux_loss_coef`"
    assert f"Up to step 6, {warning}" in caplog_of_transformers.text
    assert f"Up to step 12, {warning}" in caplog_of_transformers.text
    assert [entry["mom_load"] for entry in trainer.state.log_history if "loss" in entry] == [1.0, 1.0]


def test_experts_with_tokens_are_not_warned_of(tmp_path, caplog_of_transformers):
    make_trainer(tmp_path, make()).train()
    assert "experts had no token" not in caplog_of_transformers.text


def test_without_any_target_masks_close_all_the_same(tmp_path):
    """A batch in which no token counts has no gradient; the budget holds."""
    data = make_data("bert").map(lambda row: {"labels": -100})
    model = make("bert")
    make_trainer(tmp_path, model, data=data).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert float(model.measure_sparsity()) == pytest.approx(0.5, abs=1e-3)
