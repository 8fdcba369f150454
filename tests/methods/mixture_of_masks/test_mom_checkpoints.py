"""Resuming, bit for bit, in each of the stages; what has changed since, and what checkpoints of adapters hold."""

import pytest
import torch
from mom_runs import assert_same, callback_of, gather_state, logged, make, make_args, make_data, make_trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig, shrink
from hf_moebert.methods.mixture_of_masks.training_optimizer import SCORES


RECIPE = {"score_rate": 0.3, "learn_share": 0.75}
# An epoch has 4 steps, the ramp 6 of 12, and masks are fixed after 9.
SAVING = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
SAVING |= {"gradient_accumulation_steps": 2, "weight_decay": 0.1}


def logs_of(trainer):
    clocks = ("runtime", "per_second", "train_loss", "total_flos")
    return [{key: value for key, value in entry.items() if not key.endswith(clocks)} for entry in logged_all(trainer)]


def logged_all(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def make_any(stage, kind="llama"):
    model = make(kind, dropout=0.1, num_experts=2)
    if stage == "learned":
        return model
    with torch.no_grad():
        for network in model.masked_networks().values():
            network.masks.scores.copy_(torch.linspace(-3, 3, 48).view(2, 24))
            network.masks.scores[0, -8:] = -9
    model.fix_masks()
    return model if stage == "fixed" else shrink(model)


def make_stage(folder, stage, kind="llama", **options):
    """A Trainer of the stage: with the callback while masks are learned, without it later."""
    if stage == "learned":
        return make_trainer(folder, make_any(stage, kind), RECIPE, **options)
    return Trainer(make_any(stage, kind), make_args(folder, **options), train_dataset=make_data(kind))


# A resumed run is the uninterrupted one.


@pytest.mark.parametrize(
    ("stage", "kind", "steps"),
    [
        ("learned", "llama", (3, 8, 9, 10)),
        ("learned", "t5", (3,)),
        ("fixed", "llama", (5,)),
        ("compact", "bert", (5,)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stage, kind, steps):
    whole = make_stage(tmp_path, stage, kind, **SAVING)
    whole.train()
    for step in steps:
        resumed = make_stage(tmp_path / "resumed", stage, kind, **SAVING | {"save_strategy": "no"})
        with torch.no_grad():
            for parameter in resumed.model.parameters():
                parameter.zero_()  # all comes from the checkpoint
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(gather_state(resumed), gather_state(whole))
        assert logs_of(resumed) == logs_of(whole)
    if stage == "learned":
        assert int(whole.model.budget.clock) == 12
        assert any(name.startswith("moment/") for name in gather_state(whole))


def test_resume_from_the_last_checkpoint_of_a_folder(tmp_path):
    whole = make_stage(tmp_path / "whole", "learned", **SAVING | {"save_strategy": "no"})
    whole.train()
    cut = make_stage(tmp_path, "learned", **SAVING | {"save_steps": 5})
    cut.train()
    (tmp_path / "checkpoint-10").rename(tmp_path / "later")
    (tmp_path / "checkpoint-12").rename(tmp_path / "end")
    resumed = make_stage(tmp_path, "learned", **SAVING | {"save_strategy": "no"})
    resumed.train(resume_from_checkpoint=True)
    assert_same(gather_state(resumed), gather_state(whole))


def test_a_finished_run_has_nothing_to_say(tmp_path, caplog_of_transformers):
    trainer = make_trainer(tmp_path, make(), save_strategy="epoch")
    trainer.train()
    resumed = make_trainer(tmp_path, make())
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed.model.state_dict(), trainer.model.state_dict())
    assert "Training stopped" not in caplog_of_transformers.text
    assert "mom_sparsity" not in resumed.state.log_history[-1]


# What has changed since


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was cut after 4 of its 12 steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    make_trainer(folder, make(), RECIPE, save_strategy="steps", save_steps=4).train()
    return str(folder / "checkpoint-4")


@pytest.mark.parametrize(
    ("recipe", "options", "changes"),
    [
        ({"keep_ratio": 0.25}, {}, "`keep_ratio` from 0.5 to 0.25"),
        ({"ramp": "cubic", "ramp_share": 0.6}, {}, "`ramp` from 0 to 1, `ramp_share` from 0.5 to 0.6"),
        ({"router_rate": 1.0005e-3}, {}, "`router_rate` from 0.001 to 0.0010005"),
        ({"backbone_rate": 2e-5}, {}, "`backbone_rate` from -1 to 2e-05"),
        ({"score_rate": 0.2}, {"max_steps": 20}, "`score_rate` from 0.3 to 0.2, `max_steps` from 12 to 20"),
        ({"freeze_backbone": True}, {}, "`freeze_backbone` from 0 to 1"),
        ({"learn_share": 1.0}, {}, "`learn_share` from 0.75 to 1"),
    ],
)
def test_a_changed_run_is_refused(tmp_path, interrupted, recipe, options, changes):
    trainer = make_trainer(tmp_path, make(), RECIPE | recipe, **options)
    if "freeze_backbone" in recipe:  # torch would refuse its optimizer before
        trainer._load_optimizer_and_scheduler = lambda checkpoint: None
    with pytest.raises(ValueError, match=rf"must go on as it began, this one changes {changes}. Use the old"):
        trainer.train(resume_from_checkpoint=interrupted)


def test_changes_may_be_allowed(tmp_path, interrupted):
    """They hold from then on: the target, and the rates that no schedule moves."""
    changes = {"score_rate": 0.05, "keep_ratio": 0.25}
    trainer = make_trainer(tmp_path, make(), changes, max_steps=20)
    callback_of(trainer).allow_changes = True
    rates = []
    step = trainer.training_step

    def watching(*args, **kwargs):
        rates.extend(group["lr"] for group in trainer.optimizer.param_groups if SCORES in group)
        return step(*args, **kwargs)

    trainer.training_step = watching
    trainer.train(resume_from_checkpoint=interrupted)
    model = trainer.model
    assert int(model.budget.clock) == 20
    assert logged(trainer, "mom_target")[-1] == 0.75
    assert logged(trainer, "mom_target")[4] == pytest.approx(0.75 * 5 / 10)  # after the fifth step
    assert logged(trainer, "mom_sparsity")[4] == pytest.approx(0.75 * 5 / 10, abs=1e-4)
    assert rates == [0.05] * 16


def test_a_checkpoint_that_knows_no_run_is_refused(tmp_path, interrupted):
    """Weights of the model alone: saved before masks were trained."""
    model = make()
    trainer = make_trainer(tmp_path, model)
    trainer.state.global_step, trainer.state.max_steps = 4, 12
    with pytest.raises(ValueError, match="must be a checkpoint of a run with this callback, got one without"):
        callback_of(trainer).on_train_begin(
            trainer.args, trainer.state, trainer.control, model=model, optimizer=trainer.optimizer
        )


# Checkpoints as models


def test_a_checkpoint_is_a_model_of_its_stage(tmp_path, interrupted):
    model = AutoModelForCausalLM.from_pretrained(interrupted)
    assert model.config.mask_stage == "learned"
    assert int(model.budget.clock) == 4
    trainer = make_trainer(tmp_path, model, RECIPE)
    trainer.train()  # anew
    assert int(model.budget.clock) == 12
    assert logged(trainer, "mom_target")[0] == pytest.approx(0.5 / 6)


# Adapters


def wrap(model, **options):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))


KEEP = {"modules_to_save": ["masks", "router", "budget"]}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")


def test_adapters_that_would_lose_the_masks_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`modules_to_save` of the PEFT configuration must name the masks.* Use `Lora"
    ):
        make_trainer(tmp_path, wrap(make()))


def test_masks_are_learned_beside_adapters(tmp_path):
    """The same masks as with a frozen backbone while the adapter has no rate; checkpoints hold them, and go on."""
    recipe = RECIPE | {"backbone_rate": 0.0}
    data, options = make_data(), {"max_grad_norm": 0.0}
    alone = make_trainer(tmp_path / "alone", make(), recipe, **options)
    alone.train()
    whole = make_trainer(tmp_path, wrap(make(), **KEEP), recipe, data=data, **SAVING | {"save_steps": 4})
    whole.train()
    resumed = make_trainer(
        tmp_path / "on", wrap(make(), **KEEP), recipe, data=data, **SAVING | {"save_strategy": "no"}
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(gather_state(resumed), gather_state(whole))
    assert int(whole.model.base_model.model.budget.clock) == 12

    beside = make_trainer(tmp_path / "beside", wrap(make(), **KEEP), recipe, data=data, **options)
    beside.train()
    merged = beside.model.merge_and_unload()
    assert_same(merged.state_dict(), alone.model.state_dict())
    assert merged.fix_masks(0.5).config.mask_stage == "fixed"


def test_what_is_not_learned_is_refused(tmp_path):
    for stage in ("fixed", "compact"):
        with pytest.raises(ValueError, match=rf"whose stage is '{stage}'. Make one with `from_dense\(dense\)`; fixed"):
            MaskSparsityCallback(MaskSparsityConfig()).make_optimizer(make_any(stage), make_args(tmp_path))
