"""The models: equal to the dense ones at first, in every precision, and again from a checkpoint."""

import copy
import json

import new_process
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mpoe import (
    CLASSES,
    KINDS,
    centres,
    make,
    make_batch,
    make_dense,
    randomise_routers,
    separate_experts,
)
from transformers import T5ForConditionalGeneration

from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods.mpo.functional import contract
from hf_moebert.methods.mpo.functional_decomposition import decompose
from hf_moebert.methods.mpoe import from_dense


ROUTERS = ("reference", "switch")
GENERATE = ({}, {"num_beams": 3}, {"use_cache": False})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("share", [True, False])
def test_a_converted_model_is_the_dense_one_whatever_its_routers_say(kind, router, share):
    dense = make_dense(kind)
    before = copy.deepcopy(dense.state_dict())
    model = CLASSES[kind].from_dense(dense, num_experts=4, router=router, share_centre=share)
    batch = make_batch(kind)
    for std in (0.02, 5.0):
        randomise_routers(model, std)
        with torch.no_grad():
            output = model(**batch, output_router_logits=True)
            torch.testing.assert_close(output.logits, dense(**batch).logits, rtol=1e-5, atol=1e-5)
    chosen = torch.cat([x.argmax(-1).flatten() for x in output.router_logits])
    assert len(chosen.unique()) > 2
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_finds_the_class_by_the_model(kind):
    dense, options = make_dense(kind), {"num_experts": 2, "layers": [1], "seed": 3}
    model, expected = from_dense(dense, **options), CLASSES[kind].from_dense(dense, **options).state_dict()
    assert type(model) is CLASSES[kind]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["t5", "t5-gated", "gpt2"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_converted_model_generates_what_the_dense_one_does(kind, router):
    dense, model = make_dense(kind), randomise_routers(make(kind, router=router))
    ids = make_batch(kind)["input_ids"][1:]
    for options in GENERATE:
        expected = dense.generate(ids, max_new_tokens=9, do_sample=False, **options)
        assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_asked_for_are_converted(kind):
    model = make(kind, layers=[1])
    assert len(model.networks()) == 1
    batch = make_batch(kind)
    torch.testing.assert_close(model(**batch).logits, make_dense(kind)(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_is_the_dense_model_compressed_to_the_same_bonds(kind):
    model, dense = make(kind, num_experts=1, bond=6), make_dense(kind)
    state = dense.state_dict()
    for path in model.networks():
        for name, chain in model.config.mpoe_shapes.items():
            weight = state[f"{model.dense_name(path, name)}.weight"]
            matrix = weight.T if model.transposes_dense else weight
            cores, _ = decompose(matrix, chain["rows"], chain["columns"], bonds=chain["bonds"])
            small = contract(cores, *matrix.shape)
            assert (small - matrix).norm() > 0.1 * matrix.norm()
            weight.copy_(small.T if model.transposes_dense else small)
    batch = make_batch(kind)
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-5, atol=1e-5)


AUTO = {"t5": "Seq2SeqLM", "t5-gated": "Seq2SeqLM", "gpt2": "CausalLM", "bert": "SequenceClassification"}
RELOAD = """
import pathlib, sys
import torch, transformers
from safetensors.torch import load_file
import hf_moebert.methods.mpoe
for name, auto in (x.split("/") for x in sys.argv[2:]):
    model_class = getattr(hf_moebert.methods.mpoe, name)
    auto = getattr(transformers, "AutoModelFor" + auto)
    transformers.AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    auto.register(model_class.config_class, model_class)
    for folder in sorted(pathlib.Path(sys.argv[1]).glob(name + "*")):
        model = auto.from_pretrained(folder)
        assert type(model) is model_class
        batch = load_file(folder / "expected")
        logits, loss = batch.pop("logits"), batch.pop("loss")
        with torch.no_grad():
            output = model(**batch)
        assert torch.equal(output.logits, logits) and torch.equal(output.loss, loss), folder
        folder.joinpath("done").touch()
"""


@pytest.mark.process
def test_checkpoints_hold_every_tensor_once_and_come_back_in_a_new_process(tmp_path):
    for kind in KINDS:
        model = separate_experts(randomise_routers(make(kind, router="switch")))
        folder = tmp_path / f"{type(model).__name__}-{kind}"
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        names = [name for name in state if ".centres." in name]
        assert len(names) == len(model.networks()) * len(model.config.matrix_sizes()) == len(centres(model))
        assert json.loads((folder / "config.json").read_text())["mpoe_shapes"]
        batch = make_batch(kind, labels=True)
        with torch.no_grad():
            expected = model(**batch)
        save_file({**batch, "logits": expected.logits, "loss": expected.loss}, folder / "expected")
    pairs = sorted({f"{CLASSES[kind].__name__}/{AUTO[kind]}" for kind in KINDS})
    new_process.run(RELOAD, tmp_path, *pairs)
    assert len(list(tmp_path.glob("*/done"))) == len(KINDS)


def test_half_precision_is_close_and_routes_in_float32():
    dense, batch = make_dense("t5").to(torch.bfloat16), make_batch("t5")
    model = CLASSES["t5"].from_dense(dense, num_experts=4)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16)
    output = model(**batch, output_router_logits=True)
    assert output.router_logits[0].dtype == torch.float32
    assert (output.logits - dense(**batch).logits).norm() < 0.05 * output.logits.norm()


def test_autocast_rebuilds_and_routes_in_float32():
    model, batch = randomise_routers(make("t5")), make_batch("t5", labels=True)
    exact = model(**batch, output_router_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = model(**batch, output_router_logits=True)
    assert output.router_logits[0].dtype == torch.float32
    assert {kept.value.dtype for network in model.networks().values() for kept in network._rebuilt.values()} == {
        torch.float32
    }
    assert (output.logits - exact.logits).norm() < 0.05 * exact.logits.norm()


def test_t5_in_half_keeps_its_last_matrix_in_float32(tmp_path):
    make("t5").save_pretrained(tmp_path)
    model = CLASSES["t5"].from_pretrained(tmp_path, dtype=torch.float16)
    network = next(iter(model.networks().values()))
    assert network.centres["wi"].dtype == network.auxiliary["wi"][0].dtype == torch.float16
    assert network.centres["wo"].dtype == network.auxiliary["wo"][0].dtype == torch.float32
    assert model(**make_batch("t5")).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routers_are_in_float32_before_and_after_a_checkpoint(tmp_path, dtype):
    make_dense("t5").save_pretrained(tmp_path / "dense")
    dense = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=dtype)
    model = separate_experts(CLASSES["t5"].from_dense(dense, num_experts=4))
    model.save_pretrained(tmp_path / "experts")
    back = CLASSES["t5"].from_pretrained(tmp_path / "experts")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in back.named_parameters()}
    assert {dtypes[name] for name in dtypes if ".router." in name} == {torch.float32}
    batch = make_batch("t5")
    assert torch.equal(model(**batch).logits, back(**batch).logits)
    assert model.to(dtype)(**batch).logits.isfinite().all()  # routers in half, too, compute in float32


def test_a_head_of_its_own_stays_one(tmp_path):
    dense = make_dense("t5-gated")  # `tie_word_embeddings` is forced by transformers, even for a head of its own
    dense.lm_head.weight = torch.nn.Parameter(dense.shared.weight.detach() * 1.5 + 0.1)
    dense.save_pretrained(tmp_path / "dense")
    dense = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense")
    assert dense.lm_head.weight is not dense.shared.weight
    assert not torch.equal(dense.lm_head.weight, dense.shared.weight)
    model, batch = CLASSES["t5"].from_dense(dense, num_experts=4), make_batch("t5")
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "experts")
    back = CLASSES["t5"].from_pretrained(tmp_path / "experts")
    assert torch.equal(back(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    found = []
    for checkpointing in (False, True):
        model = separate_experts(randomise_routers(make(kind, router="switch"))).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = make_batch(kind, labels=True)
        output = model(**batch, output_router_logits=True, use_cache=False) if kind != "bert" else model(**batch)
        output.loss.backward()
        found.append((output.loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])
    assert any(grad.abs().sum() > 0 for name, grad in found[1][1].items() if ".router." in name)


def test_reentrant_checkpointing_is_refused_where_it_loses_the_balance():
    model = make("bert", router="switch").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="`use_reentrant` must be False"):
        model(**make_batch("bert", labels=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_balance_is_in_the_loss_and_padding_is_not_in_the_balance(kind):
    model = separate_experts(randomise_routers(make(kind, router="switch", router_aux_loss_coef=0.5)))
    batch = make_batch(kind, labels=True)
    output = model(**batch, output_router_logits=True)
    model.config.router_aux_loss_coef = 0
    plain = model(**batch)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * output.aux_loss)
    expected = 0
    in_encoder = 2 if kind.startswith("t5") else 0
    for place, logits in enumerate(output.router_logits):
        mask = batch["attention_mask"].bool() if not in_encoder or place < in_encoder else batch["labels"] != -100
        real = logits[mask].softmax(-1)
        share = logits[mask].argmax(-1).bincount(minlength=4) / len(real)
        expected = expected + 4 * (share * real.mean(0)).sum()
    torch.testing.assert_close(output.aux_loss, expected)


def test_a_decoder_mask_counts_and_a_finished_encoder_does_not():
    model, batch = randomise_routers(make("t5", router="switch")), make_batch("t5")
    mask = torch.ones_like(batch["decoder_input_ids"])
    mask[0, 2:] = 0
    encoded = model.get_encoder()(batch["input_ids"], batch["attention_mask"])
    inputs = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
    inputs |= {"decoder_input_ids": batch["decoder_input_ids"], "decoder_attention_mask": mask}
    output = model(**inputs, output_router_logits=True)
    assert len(output.router_logits) == 2
    kept = [x[mask.bool()] for x in output.router_logits]
    expected = sum(4 * (x.argmax(-1).bincount(minlength=4) / len(x) * x.softmax(-1).mean(0)).sum() for x in kept)
    torch.testing.assert_close(output.aux_loss, expected)


def test_outputs_are_a_tuple_if_asked_for():
    batch = make_batch("t5", labels=True)
    model = make("t5", router="switch")
    assert isinstance(model(**batch, return_dict=False), tuple)
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)
    model.config.output_router_logits = True
    assert [x.shape for x in model(**batch).router_logits] == [(3, 7, 4)] * 2 + [(3, 5, 4)] * 2
    assert model(**batch, output_router_logits=False).router_logits is None


def test_seed_and_noise_decide_the_draws():
    dense = make_dense("t5")
    before = torch.get_rng_state()
    one, two, other = (CLASSES["t5"].from_dense(dense, seed=s, noise=0.1).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    router = next(name for name in one if name.endswith("router.weight"))
    assert not torch.equal(one[router], other[router])
    stack = one["encoder.block.0.layer.1.DenseReluDense.auxiliary.wi.1"]
    assert not torch.equal(stack[0], stack[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_scratch_has_matrices_of_the_dense_scale(kind):
    config = make(kind).config
    torch.manual_seed(0)
    for network in CLASSES[kind](config).networks().values():
        for name in network.sizes:
            stack = network.contract(name, [0, 1, 2, 3])
            assert 0.3 < stack.std().item() / config.matrix_std(name) < 3


def test_the_footprint_counts_one_expert_as_active():
    model = make("t5")
    own = sum(p.numel() for name, p in model.named_parameters() if ".auxiliary." in name)
    found = measure_footprint(model)
    assert found.active == found.total - round(own * 3 / 4)
