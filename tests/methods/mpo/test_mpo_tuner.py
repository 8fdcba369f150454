"""Adapters of auxiliary tensors: identity, equation, files, refusals, what trains, and the stock Trainer."""

import copy
import json

import peft.mapping
import pytest
import torch
from datasets import Dataset
from mpo_adapters import MODELS, build, ids, logits, train
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_moebert.methods.mpo import MPOConfig, modeling_adapted, modeling_tuner
from hf_moebert.methods.mpo.functional import contract
from hf_moebert.methods.mpo.functional_decomposition import GAUGES, decompose
from hf_moebert.methods.mpo.functional_shapes import factor_matrix


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


class Tower(nn.Module):
    """One layer of each kind, of sizes that have to be padded, in float64."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(67, 12)
        self.conv = Conv1D(20, 12)
        self.line = nn.Linear(20, 71, bias=False)
        self.double()

    def forward(self, x):
        return self.line(torch.tanh(self.conv(self.table(x))))


def tower(seed=0, **options):
    torch.manual_seed(seed)
    config = MPOConfig(target_modules=["table", "conv", "line"], **options)
    return get_peft_model(Tower(), config), torch.randint(0, 67, (5, 3))


def dense(cores):
    """Multiply a chain out, entry by entry of the equation."""
    whole = torch.ones(1, 1, 1, dtype=cores[0].dtype)
    for core in cores:
        whole = torch.einsum("abx,xijy->aibjy", whole, core).flatten(2, 3).flatten(0, 1)
    return whole[..., 0]


# ------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("bond", [None, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_an_untrained_adapter_changes_no_bit(kind, bond):
    model, x = build(kind), ids()
    before = logits(model, x)
    adapted = get_peft_model(model, MPOConfig(bond=bond, num_cores=3 if bond else 5))
    assert torch.equal(logits(adapted, x), before)
    assert torch.equal(logits(adapted.train(False), x, grad=True), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(adapted, x, grad=True), logits(build(kind), x))
    assert sum(p.requires_grad for p in adapted.parameters()) > 10


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("bond", [None, 3])
def test_sizes_that_do_not_factor_and_every_layer_type(gauge, bond):
    model, x = tower(gauge=gauge, bond=bond)
    assert torch.equal(model(x), model.unload()(x))


@pytest.mark.parametrize("matrix", [torch.zeros(12, 8), torch.ones(12, 8), torch.eye(12, 8)])
def test_shapes_do_not_hang_on_the_rank_of_a_matrix(matrix):
    line = nn.Linear(8, 12)
    line.weight.data = matrix
    model = get_peft_model(nn.Sequential(line), MPOConfig(target_modules=["0"], num_cores=3))
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(1, 2, 2, 4), (4, 2, 2, 1)]
    x = torch.randn(3, 8)
    assert torch.equal(model(x), nn.functional.linear(x, matrix, line.bias))


# ------------------------------------------------------------------------------------------------ equation


@pytest.mark.parametrize("bond", [None, 3])
@pytest.mark.parametrize("name", ["table", "conv", "line"])
def test_the_matrix_in_use_is_the_one_of_the_equation(name, bond):
    model, _ = tower(bond=bond)
    layer = getattr(model.base_model.model, name)
    weight = layer.weight.T if name == "conv" else layer.weight
    initial = [core.clone() for core in layer.mpo_initial["default"]]
    auxiliary = layer.mpo_auxiliary["default"]
    with torch.no_grad():
        for core in auxiliary:
            core.add_(torch.randn_like(core), alpha=0.1)
    centre = layer._constants("default")[0]
    assert centre.shape[1:3] == tuple(factors[2] for factors in factor_matrix(*weight.shape, 5))
    if bond is None:
        cores, _ = decompose(weight, *factor_matrix(*weight.shape, 5))
        torch.testing.assert_close(
            dense([*initial[:2], centre, *initial[2:]])[: len(weight), : weight.shape[1]], weight
        )
        for own, found in zip(initial, cores[:2] + cores[3:], strict=True):  # smaller where rows are padding
            assert torch.equal(own[: found.shape[0], :, :, : found.shape[3]], found)
    change = dense([*auxiliary[:2], centre, *auxiliary[2:]]) - dense([*initial[:2], centre, *initial[2:]])
    expected = weight + change[: weight.shape[0], : weight.shape[1]]
    used = layer._weight_in_use()
    torch.testing.assert_close(used.T if name == "conv" else used, expected)


def test_training_at_full_bonds_is_training_a_chain_with_a_frozen_centre():
    torch.manual_seed(0)
    line, x, y = nn.Linear(12, 16).double(), torch.randn(8, 12).double(), torch.randn(8, 16).double()
    cores, _ = decompose(line.weight, *factor_matrix(16, 12, 5))
    chain = [core.clone().requires_grad_(k != 2) for k, core in enumerate(cores)]
    model = get_peft_model(nn.Sequential(copy.deepcopy(line)), MPOConfig(target_modules=["0"]))
    own = [p for p in model.parameters() if p.requires_grad]
    other = [core for core in chain if core.requires_grad]
    optimizers = [torch.optim.AdamW(group, lr=0.01) for group in (own, other)]
    for _ in range(5):
        nn.functional.mse_loss(model(x), y).backward()
        nn.functional.mse_loss(nn.functional.linear(x, contract(chain), line.bias), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    assert not torch.equal(own[0], cores[0])


def test_gradients_are_those_of_finite_differences():
    model, x = tower(num_cores=3, bond=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.base_model.model.table.requires_grad_(False)  # rows are picked, which is checked by the other two
    assert torch.autograd.gradcheck(lambda *_: model(x[:1, :2]).sum(), parameters, atol=1e-6)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module", params=[None, 2])
def saved(request, tmp_path_factory):
    """Folders of a base model and of an adapter trained on it, which no test changes, an input, and the logits."""
    folder = tmp_path_factory.mktemp("saved")
    build("bert").save_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    adapted = get_peft_model(model, MPOConfig(bond=request.param, task_type="SEQ_CLS"))
    x = ids()
    train(adapted, x)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", x, logits(adapted, x)


def load_in_every_way(base, folder):
    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(base)

    yield PeftModel.from_pretrained(fresh(), folder)
    yield PeftModel.from_pretrained(fresh(), folder, low_cpu_mem_usage=True)
    yield PeftModel.from_pretrained(fresh(), folder, is_trainable=True)
    yield AutoPeftModelForSequenceClassification.from_pretrained(folder)
    yield AutoModelForSequenceClassification.from_pretrained(folder)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        model = fresh()
        model.load_adapter(folder, **options)
        yield model
    model = PeftModel.from_pretrained(fresh(), folder, adapter_name="first")
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("second")
    yield model


def test_every_way_of_loading_gives_the_same_bits_without_a_decomposition(saved, monkeypatch):
    base, folder, x, expected = saved

    def refuse(*args, **kwargs):
        raise AssertionError("loading decomposed a matrix")

    monkeypatch.setattr(modeling_adapted, "decompose", refuse)
    for model in load_in_every_way(base, folder):
        assert torch.equal(logits(model, x), expected)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert all("mpo_auxiliary" in name or "modules_to_save" in name for name in trainable), trainable


def test_the_file_holds_auxiliary_tensors_and_no_matrix(saved):
    _, folder, _, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    kinds = {name.split(".mpo_")[1].split(".")[0] for name in tensors if ".mpo_" in name}
    assert kinds == {"auxiliary", "initial"}
    heads = {name for name in tensors if ".mpo_" not in name}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_weights"]) == ("MPO", False)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert isinstance(PeftConfig.from_pretrained(folder), MPOConfig)


def test_other_signs_of_a_decomposition_do_not_matter_to_a_file(saved, monkeypatch):
    base, folder, x, expected = saved

    def flipped(*args, **kwargs):
        cores, values = decompose(*args, **kwargs)
        return [-cores[0], -cores[1], cores[2], -cores[3], -cores[4]], values

    monkeypatch.setattr(modeling_adapted, "decompose", flipped)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), MPOConfig())
    model.load_adapter(folder, adapter_name="saved")
    model.set_adapter("saved")
    assert torch.equal(logits(model.base_model.model, x), expected)


def test_a_file_saved_again_is_the_same_file(saved, tmp_path):
    base, folder, _, _ = saved
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder)
    model.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"  # its config lists the head once more: PEFT does that
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_cores": 4}, "`num_cores` must be odd and at least 3, got 4"),
        ({"num_cores": 1}, "`num_cores` must be odd"),
        ({"num_cores": 5.0}, "`num_cores` must be odd"),
        ({"bond": 0}, "`bond` must be a whole number of at least 1, got 0"),
        ({"bond": True}, "`bond` must be a whole number"),
        ({"gauge": "right"}, "`gauge` must be one of symmetric, left, centre, even, got 'right'"),
        ({"init_weights": "no"}, "`init_weights` must be True or False"),
        ({"target_modules": [1]}, "`target_modules` must list names"),
        ({"exclude_modules": 3}, "`exclude_modules` must list names"),
        ({"layers_pattern": "layer"}, "`layers_to_transform` must be given with `layers_pattern`"),
    ],
)
def test_options_are_refused_at_the_door(options, text):
    with pytest.raises(ValueError, match=text):
        MPOConfig(**options)


class Quantised(nn.Linear):
    """Stands for the layers of quantisation libraries."""


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 4, 3), nn.LayerNorm(8), Quantised(4, 4), nn.Embedding(9, 4, max_norm=1.0), nn.GELU()],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_refused_by_name(layer):
    with pytest.raises(ValueError, match=f"not quantised, got `1`, a {type(layer).__name__}"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), layer), MPOConfig(target_modules=["1"]))


def test_a_matrix_that_cannot_be_decomposed_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`0` cannot get an adapter: `matrix` must hold finite values"):
        get_peft_model(model, MPOConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="`0` cannot get an adapter: the matrix must be loaded"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4, device="meta")), MPOConfig(target_modules=["0"]))


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {}])
def test_an_empty_adapter_is_refused_at_first_use(options):
    config = MPOConfig(target_modules=["0"], init_weights=bool(options))
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, **options)
    for use in (lambda: model.train()(torch.ones(1, 4)), lambda: model.eval()(torch.ones(1, 4)), model.merge_adapter):
        with pytest.raises(RuntimeError, match="Adapter `default` must be filled before it is used"):
            use()


def test_another_peft_is_named_with_the_supported_one(monkeypatch):
    modeling_tuner._register()  # once more does no harm
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match=r"needs peft>=0.21, got .* no table of type PREFIX"):
        modeling_tuner._register()


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_step_moves_every_auxiliary_tensor_and_nothing_else(kind):
    model = get_peft_model(build(kind), MPOConfig(num_cores=3))
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    model.set_adapter("default")
    before = {name: p.clone() for name, p in model.named_parameters()}
    constants = {
        n: m.mpo_constants["default"].value[0] for n, m in model.named_modules() if hasattr(m, "mpo_constants")
    }
    train(model, ids(), steps=1, weight_decay=0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("mpo_auxiliary" in name), name
    for name, centre in constants.items():
        assert model.get_submodule(name).mpo_constants["default"].value[0] is centre


def test_the_stock_trainer_trains_and_resumes_to_the_same_bits(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": k % 2} for k, row in enumerate(ids(16))]

    def trainer(steps):
        model = get_peft_model(build("bert"), MPOConfig(bond=4, task_type="SEQ_CLS"))
        args = TrainingArguments(
            tmp_path / "run", max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], seed=3,
            learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        args.max_steps = steps
        return Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows))

    whole = trainer(4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name
