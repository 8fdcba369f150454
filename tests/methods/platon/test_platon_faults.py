"""Overflows, bad gradients, and models that cannot be pruned."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from platon_runs import (
    RECIPE,
    StopAt,
    assert_same_weights,
    callback_of,
    count_all_zeros,
    pruner_of,
    same_snapshots,
    snapshot,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import TrainerCallback

from hf_moebert import PlatonConfig, PlatonPruningCallback
from hf_moebert.methods.platon.training_pruner import Pruner


# Overflow in half precision


class Scaled(TrainerCallback):
    """Train with a loss scaler, as on a GPU, but in float32; `overflow` names optimiser steps whose loss is infinite.

    The Trainer uses no loss scaler on a CPU, so it is set in the two places where accelerate looks for it.
    """

    def __init__(self, monkeypatch, trainer, *, overflow=(), scale=2.0**14):
        self.trainer, self.overflow, self.skipped = trainer, overflow, []
        self.before, self.same, self.counted = None, [], 0
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        compute_loss = trainer.compute_loss

        def overflowing(*args, **kwargs):
            loss = compute_loss(*args, **kwargs)
            return loss * math.inf if trainer.state.global_step + 1 in self.overflow else loss

        trainer.compute_loss = overflowing
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.accelerator.native_amp = True  # only now: the model has not been wrapped in autocast

    def on_step_begin(self, args, state, control, **kwargs):
        self.before, self.scale = snapshot(pruner_of(self.trainer)), self.trainer.accelerator.scaler.get_scale()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.accelerator.scaler.get_scale() < self.scale:  # its word that it has skipped the step
            self.skipped.append(state.global_step)
            self.same.append(same_snapshots(self.before, snapshot(pruner_of(self.trainer))))
        else:
            self.counted += 1


OVERFLOWS = [1, 2, 6, 13, 17]  # at once, on what would be a mask step, on that of the final phase


@pytest.mark.parametrize(
    ("sensitivity_at", "max_grad_norm"), [("pre_step", 1.0), ("pre_step", 0.0), ("post_step", 0.0)]
)
@pytest.mark.parametrize(
    "arguments",
    [{"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "fused", "accumulation"],  # accelerate does not notice when a fused optimizer skips a step
)
def test_an_overflow_does_not_count(tiny_bert, make_trainer, monkeypatch, sensitivity_at, max_grad_norm, arguments):
    trainer = make_trainer(tiny_bert(), {"sensitivity_at": sensitivity_at}, max_grad_norm=max_grad_norm, **arguments)
    spy = Scaled(monkeypatch, trainer, overflow=OVERFLOWS)
    trainer.train()
    assert spy.skipped == OVERFLOWS
    assert spy.same == [True] * 5
    assert pruner_of(trainer).clock == spy.counted == 15
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round(0.7 * numel)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("sensitivity_at", ["pre_step", "post_step"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_loss_scale_is_no_part_of_the_statistics(
    tiny_bert, make_trainer, monkeypatch, sensitivity_at, max_grad_norm
):
    def make():
        recipe = {"sensitivity_at": sensitivity_at}
        return make_trainer(tiny_bert(), recipe, optim="sgd", max_grad_norm=max_grad_norm)

    plain, scaled = make(), make()
    plain.train()
    spy = Scaled(monkeypatch, scaled)
    scaled.train()
    assert spy.skipped == []
    for kind, named in pruner_of(plain).statistics.tensors.items():
        largest = max(float(tensor.max()) for tensor in named.values())
        assert largest > 0
        for name, tensor in named.items():
            ours = pruner_of(scaled).statistics.tensors[kind][name]
            torch.testing.assert_close(ours, tensor, rtol=1e-3, atol=largest * 1e-5)


def test_two_callbacks_unscale_once(tiny_bert, make_trainer, monkeypatch):
    recipe = PlatonConfig(keep_ratio=0.3, initial_warmup=2, final_warmup=6, window=3)
    trainer = make_trainer(tiny_bert(), callbacks=[PlatonPruningCallback(recipe)], max_grad_norm=0.0)
    Scaled(monkeypatch, trainer, overflow=[4])
    trainer.train()
    assert pruner_of(trainer).clock == 19


def test_the_end_comes_late_after_an_overflow(tiny_bert, make_trainer, monkeypatch, caplog_of_transformers):
    """The clock that stood still reaches the final phase that much later, and not at all if there were too many."""
    trainer = make_trainer(tiny_bert())
    Scaled(monkeypatch, trainer, overflow=range(1, 7))
    trainer.train()
    assert pruner_of(trainer).clock == 14
    assert "Training stopped after 14 steps, before the final ratio 0.3 was reached" in caplog_of_transformers.text


# Bad gradients


def make_pruner(model, **changes):
    return Pruner(model, PlatonConfig(**RECIPE | changes), 30)


@torch.no_grad()
def step(pruner, seed, *, bad=None):
    """One step with drawn gradients, without an optimizer; `bad` is put into one of them."""
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(pruner.parameters.values()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if bad is not None and index == 3:
            parameter.grad[0, 0] = bad
    pruner.observe()
    pruner.advance()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [3, 4, 5])  # of the window that step 6 closes: its first, middle and last step
def test_a_window_with_a_bad_gradient_is_left_out(tiny_bert, caplog_of_transformers, bad, position):
    pruner = make_pruner(tiny_bert())
    averages = {}
    for seed in range(1, 10):
        step(pruner, seed, bad=bad if seed == position else None)
        averages[seed] = {
            (kind, name): tensor.clone()
            for kind in ("importance", "uncertainty")
            for name, tensor in pruner.statistics.tensors[kind].items()
        }
        assert all(tensor.isfinite().all() for tensor in averages[seed].values())
    for key, tensor in averages[6].items():
        # What takes in its own average does not change; its uncertainty fades by one window.
        expected = tensor if key[0] == "importance" else averages[3][key] * 0.9
        torch.testing.assert_close(averages[6][key], expected, rtol=1e-6, atol=0)
        assert key[0] != "importance" or torch.equal(tensor, averages[3][key])
        assert not torch.equal(averages[9][key], averages[6][key])  # the next window counts again
    assert (
        caplog_of_transformers.text.count("A gradient was NaN or infinite: the window up to step 5 is left out.") == 1
    )
    assert pruner.dropped == 0  # forgiven by the good window that followed


def test_bad_gradients_in_three_windows_in_a_row_are_an_error(tiny_bert, caplog_of_transformers):
    pruner = make_pruner(tiny_bert())
    for seed in range(1, 9):
        step(pruner, seed, bad=math.nan if seed in (1, 4, 7) else None)
    with pytest.raises(FloatingPointError, match=r"up to step 8 some were not, in 3 windows of 3 steps in a row"):
        step(pruner, 9)
    assert caplog_of_transformers.text.count("is left out") == 3


def test_two_bad_windows_with_a_good_one_between_are_none(tiny_bert):
    pruner = make_pruner(tiny_bert())
    for seed in range(1, 31):
        step(pruner, seed, bad=math.nan if seed % 9 in (1, 4) else None)
    assert pruner.clock == 30
    assert pruner.dropped < 3


@pytest.mark.parametrize(
    ("at", "max_grad_norm"),
    [(4, 1.0), (4, 0.0), (5, 0.0), (6, 1.0), (6, 0.0), (16, 1.0)],  # step 6 makes a mask, 16 lies in the final phase
)
@pytest.mark.parametrize("criterion", ["platon", "movement", "magnitude"])
def test_a_nan_that_reaches_the_weights_is_an_error_at_last(tiny_bert, make_trainer, criterion, at, max_grad_norm):
    """Clipping spreads it to all weights, without it one matrix has it; a mask of such scores would mean nothing."""
    model = tiny_bert()
    trainer = make_trainer(model, {"criterion": criterion}, max_steps=40, max_grad_norm=max_grad_norm)
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step + 1 == at else 1.0))
    with pytest.raises(FloatingPointError, match="Gradients must be finite, but up to step"):
        trainer.train()
    assert trainer.state.global_step <= at + 9  # within three windows


def test_no_gradients_at_all_are_an_error(tiny_bert, make_trainer):
    class Forgetful(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.zero_grad()

    trainer = make_trainer(tiny_bert())
    trainer.callback_handler.callbacks.insert(0, Forgetful())
    with pytest.raises(RuntimeError, match="must leave gradients for the callback to read"):
        trainer.train()


def test_one_parameter_without_gradient_has_not_moved_the_loss(tiny_bert):
    pruner = make_pruner(tiny_bert())
    name = "bert.encoder.layer.1.output.dense.weight"
    for seed in range(1, 13):
        generator = torch.Generator().manual_seed(seed)
        for parameter in pruner.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        pruner.parameters[name].grad = None
        with torch.no_grad():
            pruner.observe()
            pruner.advance()
    assert all(not named[name].any() for named in pruner.statistics.tensors.values())
    assert not pruner.keep[name].any()
    assert all(keep.any() for other, keep in pruner.keep.items() if other != name)


# What cannot be pruned


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_sharded_training_is_refused(tiny_bert, make_trainer, monkeypatch, kind):
    trainer = make_trainer(tiny_bert())
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        monkeypatch.setitem(shared, "distributed_type", kind)
    with pytest.raises(ValueError, match=rf"which {kind.value}1? keeps in other shards. Use FSDP2 over all processes"):
        callback_of(trainer).on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard_one_matrix(model):
    linear = model.bert.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,))))


def shard_with_replicas(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))


def shard_but_one_matrix(model):
    whole = model.bert.encoder.layer[0].output.dense.weight
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params={whole})


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        (shard_one_matrix, "which tensor parallelism keeps in other shards"),
        (shard_with_replicas, "which FSDP2 with replicas or tensor parallelism keeps in other shards"),
        (shard_but_one_matrix, "The pruned parameters must all be sharded or none, got some of both"),
    ],
)
def test_other_shards_than_those_of_fsdp2_are_refused(tiny_bert, make_trainer, shard, reason):
    trainer = make_trainer(tiny_bert())
    shard(trainer.model)
    callback, optimizer = callback_of(trainer), torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(ValueError, match=reason):
        callback.on_train_begin(
            trainer.args,
            replace(trainer.state, max_steps=20),
            trainer.control,
            model=trainer.model,
            optimizer=optimizer,
        )


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [({}, 8), ({"initial_warmup": 0.5, "final_warmup": 0.5}, 20), ({"window": 15}, 20), ({"final_warmup": 20}, 20)],
)
def test_too_short_a_run_is_refused(tiny_bert, make_trainer, recipe, steps):
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, recipe, max_steps=steps)
    with pytest.raises(ValueError, match=rf"The run must be longer than .* got {steps} steps"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_callback_must_be_there_from_the_beginning(tiny_bert, make_trainer):
    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.add_callback(PlatonPruningCallback())

    trainer = make_trainer(tiny_bert(), False, callbacks=[Late()])
    with pytest.raises(RuntimeError, match="must be added to the Trainer before `train` is called"):
        trainer.train()


# Sparse to the bone


def kill_gradient_of(model, path):
    model.get_submodule(path).weight.register_hook(torch.zeros_like)


def test_an_empty_matrix_is_warned_of(tiny_bert, make_trainer, caplog_of_transformers):
    model = tiny_bert()
    kill_gradient_of(model, "bert.encoder.layer.1.attention.self.key")
    kill_gradient_of(model, "bert.encoder.layer.0.attention.self.query")
    make_trainer(model, {"window": 1}).train()
    assert not model.bert.encoder.layer[1].attention.self.key.weight.any()
    assert caplog_of_transformers.text.count("Nothing is left of a parameter") == 1  # not at every mask


@pytest.mark.parametrize("criterion", ["platon", "movement", "magnitude"])
@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_a_floor_under_every_matrix(tiny_bert, make_trainer, caplog_of_transformers, criterion, granularity):
    """The others make room: the total stays exact."""
    model = tiny_bert()
    for layer in range(2):
        kill_gradient_of(model, f"bert.encoder.layer.{layer}.attention.self.key")
    ratio = 0.5 if granularity == "2:4" else 0.11
    recipe = {"keep_ratio": ratio, "min_keep": 0.05, "criterion": criterion, "granularity": granularity}
    trainer = make_trainer(model, recipe)
    trainer.train()
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round((1 - ratio) * numel)
    for keep in pruner_of(trainer).keep.values():
        assert int(keep.sum()) >= math.ceil(0.05 * len(keep))
    assert "Nothing is left of" not in caplog_of_transformers.text


# A restart inside `train`


def test_a_smaller_batch_after_running_out_of_memory_starts_anew(tiny_bert, make_trainer, monkeypatch):
    """The Trainer begins its loop again, with the weights as they are: nothing may be counted twice."""
    trainer = make_trainer(tiny_bert(), auto_find_batch_size=True, optim="sgd")
    compute_loss, begun = trainer.compute_loss, []

    def out_of_memory(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 8 and trainer.state.global_step == 7:
            begun.append((pruner_of(trainer), {n: t.clone() for n, t in model.state_dict().items()}))
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = out_of_memory
    trainer.train()
    ((first, weights),) = begun
    assert first.clock == 7
    assert pruner_of(trainer) is not first
    assert pruner_of(trainer).clock == 20
    # just as if a run of the smaller batch had begun with these weights
    model = tiny_bert()
    model.load_state_dict(weights)
    fresh = make_trainer(model, optim="sgd", per_device_train_batch_size=trainer._train_batch_size)
    fresh.train()
    assert_same_weights(trainer.model, fresh.model)
    for name, tensor in pruner_of(fresh).statistics.tensors["importance"].items():
        assert torch.equal(tensor, pruner_of(trainer).statistics.tensors["importance"][name])


def test_stopping_too_early_says_how_dense_the_model_is(tiny_bert, make_trainer, caplog_of_transformers):
    trainer = make_trainer(tiny_bert(), callbacks=[StopAt(9)])
    trainer.train()
    zeros, numel = count_all_zeros(trainer.model)
    assert 0 < zeros < numel
    assert f"{1 - zeros / numel:.1%} of the weights are not zero" in caplog_of_transformers.text
