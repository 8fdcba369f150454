"""The gradient mask in runs that stop, meet each other, or have optimisers of other kinds."""

import pytest
import torch
from tiny_mpoe import centres, make, make_args, make_batch, make_examples, randomise_routers
from transformers import Trainer, TrainerCallback

from hf_moebert.methods.mpoe import MPOEGradientMaskCallback, MPOEGradientMaskConfig


class Interrupt(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


def run(folder, model, callbacks=(), optimizer=None, **options):
    args = make_args(folder, **{"learning_rate": 1e-2, "weight_decay": 0.1, **options})
    optimizers = (optimizer, None)
    trainer = Trainer(
        model, args, train_dataset=make_examples("bert"), callbacks=list(callbacks), optimizers=optimizers
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"])
@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_an_interrupted_run_leaves_later_ones_alone(tmp_path, event, granularity):
    mask = MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0, granularity=granularity))
    accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model = randomise_routers(make("bert"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, [mask, Interrupt(event)], **accumulated)
    fresh = randomise_routers(make("bert"))
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        each.zero_grad()
        run(tmp_path, each, **accumulated, max_steps=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))
    model.train().zero_grad()
    model(**make_batch("bert", labels=True)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in centres(model).values())


def test_a_loop_without_trainer_is_masked_for_one_backward_at_most(tmp_path):
    model = randomise_routers(make("bert"))
    mask = MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, [mask, Interrupt("on_step_begin")])
    for _ in range(2):
        model.zero_grad()
        model(**make_batch("bert", labels=True)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in centres(model).values())


def test_two_masks_in_one_run_are_refused(tmp_path):
    one, two = MPOEGradientMaskCallback(), MPOEGradientMaskCallback()
    with pytest.raises(ValueError, match="must have one MPOEGradientMaskCallback, got two"):
        run(tmp_path, make("bert"), [one, two])
    run(tmp_path, make("bert"), [one])
    run(tmp_path, make("bert"), [two])


def test_moments_made_in_the_first_step_know_the_mask(tmp_path):
    model = randomise_routers(make("bert"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    run(tmp_path, model, [MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0, granularity="element"))], optimizer)
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in centres(model).values())


def test_factored_moments_are_refused_for_entries(tmp_path):
    recipe = MPOEGradientMaskConfig(keep=0.3, granularity="element")
    with pytest.raises(ValueError, match="`granularity` must be 'tensor' with Adafactor"):
        run(tmp_path, make("bert"), [MPOEGradientMaskCallback(recipe)], optim="adafactor")
    run(tmp_path, make("bert"), [MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0.3))], optim="adafactor")
