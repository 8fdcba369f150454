"""The scores of a CRF move at a rate of their own, whatever trains them."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_masked_crf_training import data, make_trainer  # noqa: F401 - a fixture
from tiny_crf import LABELS, make, make_batch
from torch import nn

from hf_moebert.methods.masked_crf import MaskedCRF
from hf_moebert.methods.masked_crf.modeling_rates import BASE_RATE


RATE = 1e-5  # of the encoders here
STRETCH = 2**10  # the power of two next to 1e-2 / RATE
FAMILIES = ["bert", "any bert", "roberta", "distilbert", "deberta", "moebert"]


def scores_of(model):
    return {name: p for name, p in model.named_parameters() if ".crf." in f".{name}" and p.requires_grad}


def make_tagger(rate=None, dtype=torch.float32):
    """A layer of emissions and a CRF, with random emissions and legal tags to learn."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"emit": nn.Linear(4, len(LABELS)), "crf": MaskedCRF(LABELS)}).to(dtype)
    if rate is not None:
        model["crf"].score_rate = rate
    return model


def compute_loss(model):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 5, 4, generator=generator).to(model["emit"].weight.dtype)
    tags, mask = torch.tensor([[0, 1, 2, 0, 3]] * 3), torch.ones(3, 5, dtype=torch.bool)
    return -model["crf"].log_likelihood(model["emit"](inputs), tags, mask).sum()


def run(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        compute_loss(model).backward()
        optimizer.step()


def moved(model):
    return max(float(p.detach().abs().max()) for p in model["crf"].parameters())


class Averaging(torch.optim.SGD):
    """Evaluates other weights than it trains."""

    def eval(self):
        """Take averages."""


class Nested(torch.optim.AdamW):
    """Its step holds another step that torch has given the same hooks."""

    def step(self, closure=None):
        """Make the step of the base class."""
        return super().step(closure)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_move_by_default_in_a_stock_trainer(tmp_path, data, family):  # noqa: F811
    model = make(family, scores=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(tmp_path, data, model, max_steps=10, learning_rate=RATE).train()
    change = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    assert max(change[name] for name in scores_of(model)) > 0.03
    assert max(size for name, size in change.items() if name not in scores_of(model)) < 2e-4


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd", "stable_adamw"]
)
def test_scores_move_further_under_every_optimizer_of_the_trainer(tmp_path, data, optim):  # noqa: F811
    if optim == "stable_adamw":
        pytest.importorskip("optimi")
    found = {}
    for rate in (None, 1e-2):
        model = make("bert", scores=False)
        model.crf.score_rate = rate
        options = {"max_steps": 5, "learning_rate": RATE, "optim": optim, "max_grad_norm": 0.0}
        make_trainer(tmp_path, data, model, **options).train()
        found[rate] = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores = scores_of(model)
    slow, fast = ({name: found[rate][name] for name in scores} for rate in (None, 1e-2))
    ratio = sum(float(t.abs().sum()) for t in fast.values()) / sum(float(t.abs().sum()) for t in slow.values())
    assert STRETCH / 2 < ratio < STRETCH * 2
    others = found[None].keys() - scores
    assert all(torch.allclose(found[None][name], found[1e-2][name], atol=1e-3) for name in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_step_is_the_rate_itself(dtype):
    model = make_tagger(dtype=dtype)
    run(model, torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0))
    assert moved(model) == pytest.approx(STRETCH * RATE, rel=1e-2)


def test_many_steps_move_scores_in_half_precision():
    model = make_tagger(dtype=torch.bfloat16)
    run(model, torch.optim.AdamW(model.parameters(), lr=RATE), steps=60)
    assert moved(model) > 0.3


def test_the_schedule_holds_for_scores_too():
    model = make_tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moves = []
    for _ in range(3):
        before = model["crf"].transitions.detach().clone()
        run(model, optimizer)
        gradient = model["crf"].transitions.grad
        moves.append(float(((model["crf"].transitions.detach() - before) / gradient).nanmean()))
        schedule.step()
    assert moves == pytest.approx([-STRETCH * RATE * 0.5**step for step in range(3)], rel=1e-3)


def test_a_warm_up_begins_at_nothing(tmp_path, data):  # noqa: F811
    trainer = make_trainer(tmp_path, data, max_steps=4, learning_rate=RATE, warmup_steps=2, lr_scheduler_type="linear")
    trainer.train()
    assert {group[BASE_RATE] for group in trainer.optimizer.param_groups if BASE_RATE in group} == {RATE}


# What leaves the rate to the optimizer


class NoRate(torch.optim.SGD):
    """Chooses its rate by itself."""

    def step(self, closure=None):
        """Make a step at the rate 1e-5."""
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= RATE * parameter.grad


@pytest.mark.parametrize("rate", [None, "without"])
def test_an_optimizer_that_has_no_rate_is_left_alone(rate):
    model = make_tagger()
    optimizer = NoRate(model.parameters(), lr=RATE)
    optimizer.param_groups[0]["lr"] = None
    if rate == "without":
        del optimizer.param_groups[0]["lr"]
    run(model, optimizer)
    gradient = model["crf"].start.grad
    torch.testing.assert_close(model["crf"].start.detach(), -RATE * gradient)


@pytest.mark.parametrize("case", ["own group", "none", "higher", "closure", "averages", "evaluation"])
def test_the_rate_of_the_optimizer_holds(case):
    plain, model = make_tagger(), make_tagger(rate=1e-9 if case == "higher" else None)
    model["crf"].score_rate = None if case == "none" else model["crf"].score_rate
    plain["crf"].score_rate = None
    for tagger in (plain, model):
        groups = [{"params": tagger["emit"].parameters()}, {"params": tagger["crf"].parameters()}]
        kind = Averaging if case == "averages" else torch.optim.SGD
        optimizer = kind(groups if case == "own group" else tagger.parameters(), lr=RATE)
        if case == "evaluation":
            tagger.eval()
        if case == "closure":
            loss = compute_loss(tagger)
            loss.backward()
            optimizer.step(lambda loss=loss: loss)
        else:
            run(tagger, optimizer)
    assert 0 < moved(model) == moved(plain)


def test_averages_are_said_to_be_why(monkeypatch):
    said = []
    monkeypatch.setattr("hf_moebert.methods.masked_crf.modeling_rates.logger.warning_once", said.append)
    model = make_tagger()
    run(model, Averaging(model.parameters(), lr=RATE))
    assert len(said) == 1
    assert "because Averaging evaluates averages of them" in said[0]


def test_a_rate_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`score_rate` must be above 0 or None, got -1"):
        compute_loss(make_tagger(rate=-1))


# What must not change


@torch.no_grad()
def test_scores_without_gradient_stay_bit_for_bit():
    model = make_tagger()
    model["crf"].transitions.copy_(torch.randn_like(model["crf"].transitions))
    before = model["crf"].transitions.clone()
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
        run(model, optimizer)
        after = model["crf"].transitions.detach().clone()
        for parameter in model["crf"].parameters():
            parameter.grad = None
        optimizer.step()
    assert torch.equal(model["crf"].transitions, after)
    illegal = ~model["crf"].legal
    assert torch.equal(after[illegal], before[illegal])


@pytest.mark.parametrize("kind", [Nested, torch.optim.AdamW])
def test_a_step_within_a_step_counts_once(kind):
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # its step has hooks before the subclass's own
    model = make_tagger()
    run(model, kind(model.parameters(), lr=RATE, weight_decay=0))
    assert moved(model) == pytest.approx(STRETCH * RATE, rel=1e-2)


def test_a_step_that_fails_loses_nothing():
    model = make_tagger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    run(model, optimizer, steps=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, optimizer)
    compute_loss(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_models_and_optimizers_are_left_alone():
    first, second = make_tagger(), make_tagger()
    run(first, torch.optim.AdamW(first.parameters(), lr=RATE))
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    run(second, torch.optim.AdamW(second.parameters(), lr=RATE), steps=3)
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())


def test_copies_and_pickles_train_as_their_originals():
    model = make_tagger()
    run(model, torch.optim.AdamW(model.parameters(), lr=RATE))
    twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        run(twin, torch.optim.AdamW(twin.parameters(), lr=RATE), steps=2)
    for twin in twins[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_runs_resume(tmp_path, data, schedule):  # noqa: F811
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": RATE}
    options |= {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1}
    whole = make_trainer(tmp_path, data, **options)
    whole.train()
    resumed = make_trainer(tmp_path, data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, score in scores_of(whole.model).items():
        assert torch.equal(resumed.model.get_parameter(name), score), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_scores_beside_adapters(tmp_path, data):  # noqa: F811
    config = LoraConfig(target_modules=["query"], task_type="TOKEN_CLS", modules_to_save=["classifier", "crf"])
    model = get_peft_model(make("bert", scores=False), config)
    make_trainer(tmp_path, data, model, max_steps=10, learning_rate=RATE).train()
    assert max(float(p.detach().abs().max()) for p in scores_of(model).values()) > 0.03


def test_training_without_labels_is_said(monkeypatch):
    said = []
    monkeypatch.setattr("hf_moebert.methods.masked_crf.modeling_masked_crf.logger.warning_once", said.append)
    model, batch = make().train(), make_batch(2, 7)
    batch.pop("labels", None)
    model(**batch)
    with torch.no_grad():
        model(**batch)
    assert sum("`label_smoothing_factor`" in text for text in said) == 1
