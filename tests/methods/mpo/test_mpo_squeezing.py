"""Dimension squeezing: the cheapest bonds go first, what is cut still learns, too much is taken back bit for bit."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_mpo import make
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_moebert import MPOSqueezingCallback, MPOSqueezingConfig, compress_mpo
from hf_moebert.checkpoints.manifests import MANIFEST_FILE
from hf_moebert.methods.mpo.functional import contract
from hf_moebert.methods.mpo.functional_decomposition import decompose, round_cores
from hf_moebert.methods.mpo.modeling_matrix import list_matrices
from hf_moebert.methods.mpo.modeling_mpo import decompose_layer
from hf_moebert.methods.mpo.training import STATE_FILE


def rows(count=16):
    ids = torch.randint(3, 99, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


class Scripted(Trainer):
    """A trainer whose evaluations return what the test says, in turn."""

    def __init__(self, *args, scores, **kwargs):
        super().__init__(*args, **kwargs)
        self.scores, self.seen = list(scores), []

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_accuracy": self.scores.pop(0), "epoch": self.state.epoch}
        self.seen.append(copy.deepcopy(self.model.state_dict()))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer(folder, scores, *, model=None, callback=None, **options):
    recipe = {key: options.pop(key) for key in tuple(options) if key in MPOSqueezingConfig.__dataclass_fields__}
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        eval_steps=2,
        **{"eval_strategy": "steps", "max_steps": 8, "save_strategy": "no", **options},
    )
    callback = callback or MPOSqueezingCallback(MPOSqueezingConfig(**{"cuts": 3, "directions": 2, **recipe}))
    model = model or compress_mpo(make("bert"))
    return Scripted(model, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback], scores=scores)


def callback_of(run):
    return next(c for c in run.callback_handler.callbacks if isinstance(c, MPOSqueezingCallback))


def bonds(model):
    return {path: matrix.bonds for path, matrix in list_matrices(model).items()}


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def test_bonds_shrink_while_the_metric_holds(tmp_path):
    run = trainer(tmp_path, [0.9, 0.9, 0.895, 0.9])
    before = bonds(run.model)
    run.train()
    sizes = logged(run, "mpo_parameters")
    assert len(sizes) == 3  # the last evaluation judges, and cuts no more
    assert sizes == sorted(sizes, reverse=True)
    assert all(new <= old for path in before for new, old in zip(bonds(run.model)[path], before[path], strict=True))
    assert sizes[-1] == sum(core.numel() for m in list_matrices(run.model).values() for core in m.chain())


def test_the_bond_with_the_least_discarded_values_is_cut(tmp_path):
    run = trainer(tmp_path, [0.9, 0.9], cuts=1, directions=1, max_steps=4)
    run.train()
    ((path, new),) = logged(run, "mpo_cuts")[0].items()
    at_cut = run.seen[0]
    losses = {}
    for name, matrix in list_matrices(run.model).items():
        cores = [at_cut[f"{name}.cores.{k}"] for k in range(len(matrix.cores))]
        weight = contract(cores)
        factors = matrix.row_factors, matrix.column_factors
        _, values = decompose(weight, *factors, gauge="left")
        losses |= {
            (name, k): float(spectrum[-1] / weight.norm()) for k, spectrum in enumerate(values) if len(spectrum) > 1
        }
    cheapest = min(losses.values())
    old = tuple(at_cut[f"{path}.cores.{k}"].shape[-1] for k in range(len(new)))
    (place,) = [k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    assert losses[path, place] == pytest.approx(cheapest, rel=1e-3)


def test_a_cut_costs_what_the_values_say():
    layer = decompose_layer(torch.nn.Linear(24, 48))
    layer.requires_grad_(False)
    before = layer.weight.clone()
    _, values = round_cores(layer.chain(), gauge="left")
    wanted = list(layer.bonds)
    wanted[1] -= 3
    layer.set_cores(round_cores(layer.chain(), wanted)[0])
    assert float((layer.weight - before).norm()) == pytest.approx(float(values[1][-3:].norm()), rel=1e-4)
    x = torch.randn(7, 24)
    bound = values[1][-3:].norm() * x.norm()
    assert float((layer(x) - torch.nn.functional.linear(x, before, layer.bias)).norm()) <= float(bound) * (1 + 1e-5)


def test_what_was_cut_still_learns_and_the_optimizer_starts_afresh(tmp_path):
    run = trainer(tmp_path, [0.9, 0.9], max_steps=4)
    identity = {name: id(p) for name, p in run.model.named_parameters()}
    run.train()
    (cuts,) = logged(run, "mpo_cuts")
    assert {name: id(p) for name, p in run.model.named_parameters()} == identity
    states = {id(p): state for p, state in run.optimizer.state.items()}
    for path, matrix in list_matrices(run.model).items():
        for k, core in enumerate(matrix.cores):
            if k == 2:
                assert id(core) not in states
            else:
                assert states[id(core)]["exp_avg"].shape == core.shape
                assert states[id(core)]["step"] == (2 if path in cuts else 4)


def test_too_large_a_loss_is_taken_back_and_ends_training(tmp_path):
    run = trainer(tmp_path, [0.9, 0.89, 0.85, 0.9], allowance=0.02)
    run.train()
    assert run.state.global_step == 6
    assert len(logged(run, "mpo_undone")) == 1
    assert bonds(run.model) == {
        path: tuple(run.seen[1][f"{path}.cores.{k}"].shape[-1] for k in range(4)) for path in bonds(run.model)
    }
    for name, value in run.model.state_dict().items():  # as it was judged good, before the cuts that were not
        assert torch.equal(value, run.seen[1][name]), name


def test_a_metric_that_is_not_a_number_is_too_bad(tmp_path):
    run = trainer(tmp_path, [0.9, math.nan])
    run.train()
    assert run.state.global_step == 4
    assert logged(run, "mpo_undone")


def test_a_smaller_metric_can_be_the_better_one(tmp_path):
    run = trainer(tmp_path, [0.5, 0.4, 0.6], higher_is_better=False)
    run.train()
    assert run.state.global_step == 6
    assert len(logged(run, "mpo_undone")) == 1


class Stop(TrainerCallback):
    """Somebody else ends the training."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_cuts_that_nothing_judged_are_taken_back(tmp_path):
    run = trainer(tmp_path, [0.9])
    run.add_callback(Stop())
    run.train()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, run.seen[0][name]), name


def test_start_limit_and_floor(tmp_path):
    run = trainer(tmp_path, [0.1, 0.9, 0.9, 0.9], start_step=4, max_squeezes=1, directions=100, cuts=1000, min_bond=2)
    full = bonds(run.model)
    run.train()
    assert len(logged(run, "mpo_cuts")) == 1
    assert callback_of(run).reference == 0.9
    for path, new in bonds(run.model).items():
        assert all(bond == min(2, old) for bond, old in zip(new, full[path], strict=True))


def test_a_checkpoint_has_the_bonds_of_its_time_and_a_resumed_run_goes_on_alike(tmp_path):
    scores = [0.9, 0.9, 0.9, 0.8]
    whole = trainer(tmp_path / "whole", list(scores), save_strategy="steps", save_steps=2)
    whole.train()
    folder = tmp_path / "whole/checkpoint-4"
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    for path, found in bonds(loaded).items():
        assert found == tuple(saved[f"{path}.cores.{k}"].shape[-1] for k in range(4))
    resumed = trainer(
        tmp_path / "resumed",
        scores[2:],
        callback=MPOSqueezingCallback(MPOSqueezingConfig(cuts=3, directions=2), resume_from=folder),
    )
    resumed.train(resume_from_checkpoint=str(folder))
    assert logged(resumed, "mpo_undone") == logged(whole, "mpo_undone") == [0.8]
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_training_twice_starts_anew(tmp_path):
    run = trainer(tmp_path, [0.9, 0.9, 0.5, 0.5], max_steps=4)
    run.train()
    run.train()
    assert callback_of(run).reference == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no"}, "`eval_strategy` must be 'steps' or 'epoch' to squeeze, got 'no'"),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2},
            "`load_best_model_at_end` must be False",
        ),
        ({"model": make("bert")}, "must have matrix product operators, got none"),
        (
            {"metric": "eval_f1"},
            "`metric` must be one that evaluations return, got 'eval_f1'. Choose from epoch, eval_acc",
        ),
    ],
)
def test_runs_that_cannot_squeeze_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [0.9] * 4, **options).train()


def test_resuming_without_the_state_is_refused(tmp_path):
    run = trainer(tmp_path / "whole", [0.9, 0.9], max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    (tmp_path / "whole/checkpoint-2" / STATE_FILE).unlink()
    again = trainer(tmp_path / "whole", [0.9], max_steps=4)
    with pytest.raises(ValueError, match="must be as it was saved .* but mpo_squeezing_state.safetensors is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    (tmp_path / "whole/checkpoint-2" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="must be resumed with .*mpo_squeezing_state.safetensors', which is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": 0}, "`cuts` must be at least 1, got 0"),
        ({"directions": -1}, "`directions` must be at least 1, got -1"),
        ({"min_bond": 0}, "`min_bond` must be at least 1, got 0"),
        ({"start_step": -1}, "`start_step` must not be negative"),
        ({"allowance": -0.1}, "`allowance` must be a number from 0, got -0.1"),
        ({"allowance": math.nan}, "`allowance` must be a number from 0, got nan"),
        ({"max_squeezes": -2}, "`max_squeezes` must be -1 or more"),
    ],
)
def test_recipes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MPOSqueezingConfig(**options)


def test_evaluations_by_hand_change_nothing(tmp_path):
    run = trainer(tmp_path, [0.1, 0.9, 0.9, 0.5, 0.9, 0.9], max_steps=12)
    run.evaluate()
    before = bonds(run.model)
    assert before == bonds(compress_mpo(make("bert")))
    run.train()
    assert logged(run, "mpo_undone") == [0.5]
    left = bonds(run.model)
    run.evaluate()
    run.evaluate()
    assert bonds(run.model) == left


def test_evaluations_after_an_interrupted_run_change_nothing(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    run = trainer(tmp_path, [0.9, 0.9])
    run.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    left = bonds(run.model)
    run.evaluate()
    assert bonds(run.model) == left


def test_evaluations_of_other_data_decide_nothing(tmp_path):
    class Two(Scripted):
        """Every evaluation is of two data sets, as the Trainer makes them from a dictionary."""

        def evaluate(self, *args, **kwargs):
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, {"eval_b_accuracy": 0}
            )
            return super().evaluate()

    run = trainer(tmp_path, [0.9, 0.9, 0.9, 0.9])
    run.__class__ = Two
    run.train()
    assert len(logged(run, "mpo_cuts")) == 3


def test_a_resumed_run_does_not_cut_again_what_was_taken_back(tmp_path):
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path, [0.9, 0.9, 0.5], **options)
    run.train()
    assert run.state.global_step == 6
    again = trainer(tmp_path, [0.9] * 3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 12
    assert len(logged(again, "mpo_cuts")) == len(logged(run, "mpo_cuts")) == 2
    assert bonds(again.model) == bonds(run.model)


def test_the_state_of_another_run_is_refused(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path / "mine", [0.9, 0.9], **options).train()
    trainer(tmp_path / "other", [0.8, 0.8], **options).train()
    mixed = trainer(tmp_path / "other", [0.9], **options)
    with pytest.raises(ValueError, match="must belong to the run that is resumed, but was written after other cuts"):
        mixed.train(resume_from_checkpoint=str(tmp_path / "mine/checkpoint-2"))


def test_a_reference_that_is_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`eval_accuracy` must be finite before the first cut, got nan"):
        trainer(tmp_path, [math.nan, 0.9]).train()
