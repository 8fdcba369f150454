"""Decompositions that know their data: moments, the least error of outputs, scaled tables, round trips, refusals."""

import copy
import json
from functools import cache

import pytest
import torch
from new_process import run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_mpo import MODELS, arguments, logits, make
from torch import nn
from transformers import BertTokenizer, ViTConfig, ViTForImageClassification

from hf_moebert import compress_mpo, optimize_for_inference, to_dense
from hf_moebert.methods.mpo.conversion import find_matrices
from hf_moebert.methods.mpo.conversion_calibration import measure_inputs
from hf_moebert.methods.mpo.functional import contract, contract_activation, gather_rows
from hf_moebert.methods.mpo.functional_calibration import output_error, refine_chain, stabilise, whiten
from hf_moebert.methods.mpo.functional_decomposition import decompose, round_cores
from hf_moebert.methods.mpo.functional_shapes import factor_matrix, full_bonds
from hf_moebert.methods.mpo.modeling_matrix import list_matrices
from hf_moebert.methods.mpo.modeling_mpo import MPOEmbedding, TiedMPOLinear


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(99 - len(SPECIAL))]
TABLES = {"bert": "bert.embeddings.word_embeddings", "bert-mlm": "bert.embeddings.word_embeddings"}
TABLES |= {"gpt2": "transformer.wte", "t5": "shared", "llama-tied": "model.embed_tokens"}
FAMILIES = pytest.mark.parametrize("name", TABLES)
FORMS = {"two": {"num_cores": 2}, "chains": {"num_cores": 3}, "mixture": {"num_cores": 2, "table_cores": 5}}
PAIRS = [  # every form of one family, and two of each other
    *(("bert", form) for form in FORMS),
    *(("bert-mlm", form) for form in ("chains", "mixture")),
    *(("gpt2", form) for form in ("chains", "mixture")),
    *(("t5", form) for form in ("two", "mixture")),
    *(("llama-tied", form) for form in ("two", "chains")),
]


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL + WORDS)})


def make_texts(count=60, seed=0):
    """Texts of different lengths, of few words that are frequent and many that are rare."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    odds = 1 / torch.arange(1, len(WORDS) + 1)
    return [" ".join(WORDS[i] for i in odds.multinomial(n, True, generator=generator)) for n in lengths]


def make_batches(name, count=8, seed=0):
    """Batches of random ids, as a DataLoader yields them."""
    generator = torch.Generator().manual_seed(seed)
    return [arguments(name, torch.randint(3, 40, (4, 9), generator=generator)) for _ in range(count)]


def make_inputs(columns, count=200):
    """Inputs whose directions differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(columns)
    sizes = torch.logspace(0, -2, columns, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    return torch.randn(count, columns, generator=generator, dtype=torch.float64) * sizes @ turn


# Equations


def test_the_error_is_that_of_the_outputs():
    x, w = make_inputs(12), torch.randn(9, 12, dtype=torch.float64)
    v = w + 0.1 * torch.randn_like(w)
    expected = (x @ (w - v).T).norm() / (x @ w.T).norm()
    assert output_error(w, v, x.T @ x) == pytest.approx(float(expected))
    assert output_error(w, w, x.T @ x) == 0


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_two_factors_have_the_least_error_that_their_rank_allows(rank):
    """The oracle is the projection of the outputs on their first principal directions."""
    x, w = make_inputs(12), torch.randn(9, 12, dtype=torch.float64)
    left, values, right = whiten(w, x.T @ x)
    cut = left[:, :rank] * values[:rank] @ right[:rank]
    spectrum = torch.linalg.svdvals(x @ w.T)
    assert output_error(w, cut, x.T @ x) == pytest.approx(float(spectrum[rank:].norm() / spectrum.norm()))
    torch.testing.assert_close(values, spectrum)
    torch.testing.assert_close(left * values @ right, w)


def test_an_exact_chain_stays_as_it_is():
    w, x = torch.randn(16, 24), make_inputs(24)
    cores, _ = decompose(w, *factor_matrix(16, 24, 3))
    for core, other in zip(cores, refine_chain(cores, w, x.T @ x), strict=True):
        assert torch.equal(core.double(), other)


@pytest.mark.parametrize("num_cores", [3, 5])
def test_refined_cores_are_at_a_minimum_of_the_outputs_error(num_cores):
    w, moments = torch.randn(24, 24, dtype=torch.float64), make_inputs(24).T @ make_inputs(24)
    factors = factor_matrix(24, 24, num_cores)
    cores, _ = decompose(w, *factors, bonds=[min(4, full) for full in full_bonds(*factors)])
    refined = refine_chain(cores, w, moments, steps=3000)
    assert [core.shape for core in refined] == [core.shape for core in cores]
    before, after = (output_error(w, contract(chain), moments) for chain in (cores, refined))
    assert after < 0.6 * before
    leaves = [core.clone().requires_grad_() for core in refined]
    difference = contract(leaves) - w
    ((difference @ moments * difference).sum() / (w @ moments * w).sum()).backward()
    assert max(float(core.grad.norm()) for core in leaves) < 1e-2
    torch.testing.assert_close(contract(round_cores(refined)[0]), contract(refined))


def test_moments_of_inputs_that_were_never_seen_can_be_inverted():
    moments = torch.zeros(6, 6, dtype=torch.float64)
    torch.linalg.cholesky(stabilise(moments))
    moments[0, 0] = 1.0
    moments[:2, :2] = 1.0
    torch.linalg.cholesky(stabilise(moments))
    torch.testing.assert_close(stabilise(moments), moments, atol=2e-3, rtol=0)


def test_two_cores_are_multiplied_as_any_chain():
    left, right = torch.randn(1, 7, 1, 3), torch.randn(3, 1, 5, 1)
    expected = left[0, :, 0] @ right[:, 0, :, 0]
    torch.testing.assert_close(contract([left, right]), expected)
    torch.testing.assert_close(contract_activation(torch.eye(5), [left, right]), expected.T)
    ids = torch.tensor([6, 0, 0, 3])
    torch.testing.assert_close(gather_rows([left, right], ids), expected[ids])


# What is measured


def test_moments_are_those_of_real_tokens_whatever_the_batches(tokenizer):
    model, texts = make("bert"), make_texts()
    groups = find_matrices(model)
    whole = measure_inputs(model, groups, texts, tokenizer)
    again = measure_inputs(model, groups, texts, tokenizer, batch_size=7)
    path = "bert.encoder.layer.1.intermediate.dense"
    expected, counts = 0, torch.zeros(99, dtype=torch.long)
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            x = model.bert(**ids, output_hidden_states=True)
        counts += ids["input_ids"].flatten().bincount(minlength=99)
        x = x.hidden_states[0][0]
        expected = expected + x.T @ x
    first = "bert.encoder.layer.0.attention.self.query"
    torch.testing.assert_close(whole.moments[first], expected.double(), rtol=1e-4, atol=1e-3)
    assert torch.equal(whole.counts[TABLES["bert"]], counts)
    torch.testing.assert_close(whole.moments[path], again.moments[path], rtol=1e-4, atol=1e-3)
    assert whole.seen == again.seen
    assert whole.moments.keys() | whole.counts.keys() == {paths[0] for paths in groups}


@pytest.mark.parametrize("name", MODELS)
def test_measuring_leaves_the_model_alone(name):
    model = make(name).train()
    before = copy.deepcopy(model.state_dict())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    statistics = measure_inputs(model, find_matrices(model), make_batches(name, 16))
    assert statistics.moments
    assert model.training
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sensitivities_tell_which_layers_the_outputs_depend_on():
    """Behind a projection that is nearly closed, errors hardly matter; without one, they matter as they are."""
    model = make("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight *= 20
            layer.output.dense.weight *= 20
        model.bert.encoder.layer[0].output.dense.weight *= 1e-3
    before = copy.deepcopy(model.state_dict())
    found = measure_inputs(model, find_matrices(model), make_batches("bert", 16), sensitivities=True).sensitivities
    assert found.keys() == {paths[0] for paths in find_matrices(model)}
    first, second = (f"bert.encoder.layer.{number}.intermediate.dense" for number in (0, 1))
    assert found[first] < 0.02 * found[second]
    assert (
        found
        == measure_inputs(model, find_matrices(model), make_batches("bert", 16), sensitivities=True).sensitivities
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    compressed = list_matrices(compress_mpo(model, keep_ratio=0.4, num_cores=2, calibration=make_batches("bert", 16)))
    assert first in compressed
    assert second not in compressed or compressed[first].bonds < compressed[second].bonds  # or stays dense


# Whole models


@cache
def calibrate(name, form, keep_ratio):
    """Compress a model with the moments of its inputs; several tests look at it, and none changes it."""
    return compress_mpo(make(name), keep_ratio=keep_ratio, calibration=make_batches(name, 16), **FORMS[form])


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_outputs_are_closer_than_without_calibration(name, form):
    """By the error of each layer's outputs on inputs that were not seen."""
    model = make(name)
    held_out = measure_inputs(model, find_matrices(model), make_batches(name, 16, seed=1)).moments

    def error(compressed):
        dense = to_dense(compressed)
        pairs = {path: [m.get_submodule(path) for m in (model, dense)] for path in held_out}
        pairs = {path: pair for path, pair in pairs.items() if not isinstance(pair[0], nn.Embedding)}
        errors = [
            output_error(*(m.weight.mT if type(m) is not nn.Linear else m.weight for m in pair), held_out[path])
            for path, pair in pairs.items()
        ]
        return sum(errors) / len(errors)

    plain = compress_mpo(model, keep_ratio=0.4, **FORMS[form])
    assert error(calibrate(name, form, 0.4)) < 0.95 * error(plain)


@pytest.mark.parametrize(
    ("name", "form", "keep_ratio"),
    [
        *((name, form, 0.4) for name, form in PAIRS if name in ("bert", "t5", "gpt2")),
        *(("bert", form, 0.7) for form in FORMS),
    ],
)
def test_a_target_size_is_met_and_used_up(name, form, keep_ratio):
    dense, model = make(name), calibrate(name, form, keep_ratio)
    size = sum(dense.get_parameter(f"{paths[0]}.weight").numel() for paths in find_matrices(dense))
    kept = size - sum(p.numel() for p in dense.parameters()) + sum(p.numel() for p in model.parameters())
    assert 0.75 * keep_ratio < kept / size <= keep_ratio  # one more direction of a tiny matrix costs much


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_saved_and_loaded_it_gives_the_same_bytes(name, form, tmp_path):
    model = calibrate(name, form, 0.4)
    model.save_pretrained(tmp_path)
    loaded, info = MODELS[name][0].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(name, loaded.eval()), logits(name, model))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    torch.testing.assert_close(logits(name, to_dense(loaded)), logits(name, model), atol=1e-4, rtol=1e-4)
    again = copy.deepcopy(loaded)
    torch.testing.assert_close(logits(name, again), logits(name, model))
    parts = {name.rpartition(".")[0] for name in load_file(tmp_path / "model.safetensors")}
    assert any(part.endswith("row_use") for part in parts) == (form != "two")


@pytest.mark.process
def test_a_mixture_loads_in_a_new_process(tmp_path):
    model = calibrate("bert", "mixture", 0.4)
    model.save_pretrained(tmp_path)
    ids = make_batches("bert")[0]["input_ids"]
    save_file({"ids": ids, "logits": logits("bert", model, ids)}, tmp_path / "expected.safetensors")
    run(
        "import sys, torch, hf_moebert\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "expected = load_file(sys.argv[1] + '/expected.safetensors')\n"
        "with torch.no_grad():\n"
        "    found = Auto.from_pretrained(sys.argv[1])(expected['ids']).logits\n"
        "assert torch.equal(found, expected['logits'])\n",
        str(tmp_path),
    )


@FAMILIES
def test_plain_two_factors_need_no_data(name, tmp_path):
    """They are the truncated singular values of every matrix, and train as a whole."""
    dense, model = make(name), compress_mpo(make(name), num_cores=2, bond=3)
    for path, matrix in list_matrices(model).items():
        u, values, v = torch.linalg.svd(dense.get_parameter(f"{path}.weight").double(), full_matrices=False)
        expected = (u[:, :3] * values[:3] @ v[:3]).float()
        torch.testing.assert_close(matrix.weight, expected, atol=1e-4, rtol=1e-4)
        assert matrix.bonds == (3,)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()(**arguments(name, labels=True)).loss.backward()
    assert all(core.grad is not None for matrix in list_matrices(model).values() for core in matrix.chain())


def test_training_and_evaluation_multiply_alike():
    for form in ({"num_cores": 2}, {"num_cores": 3}):
        model = compress_mpo(make("bert-mlm"), keep_ratio=0.5, calibration=make_batches("bert-mlm", 16), **form)
        table = model.get_input_embeddings()
        ids = torch.tensor([[3, 4, 3, 98]])
        with torch.no_grad():
            expected, scores = table.weight[ids], model.cls.predictions.decoder(table.weight[:5])
        torch.testing.assert_close(table(ids), expected)
        assert table(ids).requires_grad
        assert isinstance(model.cls.predictions.decoder, TiedMPOLinear)
        bias = model.cls.predictions.decoder.bias
        torch.testing.assert_close(scores, table.weight[:5] @ table.weight.T + bias, atol=1e-5, rtol=1e-5)


def test_frequent_words_of_a_scaled_table_are_closer():
    dense = make("bert")
    model = compress_mpo(dense, target_modules=["word_embeddings"], keep_ratio=0.5, calibration=make_batches("bert"))
    table = model.get_input_embeddings()
    assert isinstance(table, MPOEmbedding)
    assert not table.row_use[0].requires_grad
    wanted = dense.get_input_embeddings().weight
    rows = (table.weight - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert rows[3:40].mean() < 0.5 * rows[40:].mean()  # of the ids in the batches, and of the others
    assert sum(parameter.numel() for parameter in table.parameters()) <= 0.5 * 99 * 24


def test_an_error_of_the_outputs_holds_for_every_layer():
    model, batches = make("bert"), make_batches("bert", 16)
    statistics = measure_inputs(model, find_matrices(model), batches)
    for form in ({"num_cores": 2}, {"num_cores": 3}):
        compressed = compress_mpo(model, max_error=0.5, calibration=batches, **form)
        dense = to_dense(compressed)
        assert list_matrices(compressed)
        for path, moments in statistics.moments.items():
            weights = [m.get_parameter(f"{path}.weight") for m in (model, dense)]
            assert output_error(*weights, moments) < 0.51


def test_it_is_calibrated_and_loaded_in_half_precision(tmp_path):
    form = {"keep_ratio": 0.8, "num_cores": 3, "calibration": make_batches("bert", 16)}
    model = compress_mpo(make("bert"), **form)
    model.save_pretrained(tmp_path)
    loaded = MODELS["bert"][0].from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded.get_input_embeddings().row_use[1], model.get_input_embeddings().row_use[1])
    torch.testing.assert_close(logits("bert", loaded).float(), logits("bert", model), atol=0.05, rtol=0.1)
    half = compress_mpo(make("bert").to(torch.bfloat16), **form)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16, torch.int32}
    torch.testing.assert_close(logits("bert", half).float(), logits("bert", model), atol=0.05, rtol=0.1)


def test_pictures_calibrate_too():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=2
    )
    model = ViTForImageClassification(config).eval()
    pixels = [{"pixel_values": torch.randn(4, 3, 8, 8)} for _ in range(8)]
    compressed = compress_mpo(model, keep_ratio=0.5, num_cores=2, calibration=pixels)
    assert list_matrices(compressed)
    with torch.no_grad():
        assert compressed(**pixels[0]).logits.isfinite().all()


def test_plain_chains_are_still_saved_for_earlier_releases(tmp_path):
    for options, version in (({"bond": 3}, "1"), ({"bond": 3, "num_cores": 2}, "2")):
        compress_mpo(make("bert"), **options).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["quantization_config"]["format_version"] == version


def test_it_is_no_other_model_that_is_loaded(tmp_path):
    options = {"target_modules": ["word_embeddings"], "num_cores": 3, "keep_ratio": 0.5}
    compress_mpo(make("bert"), calibration=make_batches("bert"), **options).save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), (tmp_path / "config.json").read_text()
    scale, places = (f"{TABLES['bert']}.row_use.{number}" for number in (0, 1))
    for change, message in (
        (lambda: weights.pop(scale), "not so for .*row_use.0"),
        (lambda: weights.update({scale: torch.ones(98)}), r"'.*row_use.0' of shape \[99\], got \[98\]"),
        (lambda: weights.update({scale: torch.full((99,), float("nan"))}), "row_use.0"),
        (lambda: weights.update({scale: torch.ones(99), places: torch.zeros(99, dtype=torch.int32)}), "each row once"),
    ):
        change()
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            MODELS["bert"][0].from_pretrained(tmp_path)
    described = json.loads(config)
    described["quantization_config"]["matrices"]["classifier"] = {
        "row_factors": [1, 2, 1], "column_factors": [2, 6, 2], "bonds": [2, 2], "sorted_rows": True
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="`sorted_rows` must be of an embedding, got Linear"):
        MODELS["bert"][0].from_pretrained(tmp_path)


# Neighbours


@pytest.mark.parametrize("form", FORMS)
def test_neighbours_work_or_refuse(form, tmp_path):
    model = copy.deepcopy(calibrate("bert", form, 0.4))
    with pytest.raises(ValueError, match=r"`new_num_tokens` must be 99 .*, got 120\. Resize the dense model"):
        model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match=r"^Target module MPO\w+\([\d, ]+bonds=\([\d,  ]+\)\) is not supported\."):
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["query"]))
    expected = logits("bert", model)
    assert torch.equal(logits("bert", optimize_for_inference(copy.deepcopy(model), precision="float32")), expected)
    model.save_pretrained(tmp_path / "model")
    places = {"bert.embeddings": "disk", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    loaded = MODELS["bert"][0].from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    for _ in range(2):
        torch.testing.assert_close(logits("bert", loaded), expected)


# Refusals


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "`calibration` must hold texts or batches, got none"),
        (iter([]), "`calibration` must hold texts or batches, got none"),
        ("a text", "`calibration` must be a list of texts, or batches .*, got str"),
        (5, "`calibration` must be a list of texts, or batches .*, got int"),
        ({"input_ids": torch.ones(1, 3)}, "got dict. Put a single text or batch into a list"),
        ([["a", "b"]], "each a mapping of tensors as the model takes it, got list"),
        ([{"input_ids": [[1, 2]]}], "each a mapping of tensors as the model takes it, got dict"),
        (["w1 w2", 5], "`calibration` must hold texts alone, got int among them"),
        (["w1 w2"], "must hold at least 48 tokens, as many as the widest matrix has inputs, got 4. Give more texts"),
        ([{"input_ids": torch.full((9, 9), 99)}], r"`input_ids` must be in \[0, 99\), got 99. Use the model's token"),
        ([{"pixels": torch.ones(2, 3)}], r"`calibration` must hold what the model takes, got \['pixels'\]"),
    ],
)
def test_data_that_does_not_fit_is_refused(calibration, message, tokenizer):
    model = make("bert")
    with pytest.raises(ValueError, match=message):
        compress_mpo(model, keep_ratio=0.5, calibration=calibration, tokenizer=tokenizer)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    texts = make_texts()
    with pytest.raises(ValueError, match="`tokenizer` must be that of the model for texts, got NoneType"):
        compress_mpo(make("bert"), keep_ratio=0.5, calibration=texts)
    for size in (40, 110):
        other = BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL, *map(str, range(size - 5))])})
        with pytest.raises(ValueError, match=f"but it knows {size} tokens, and the model 99. Load both from the same"):
            compress_mpo(make("bert"), keep_ratio=0.5, calibration=texts, tokenizer=other)


def test_activations_that_are_not_finite_are_refused(tokenizer):
    model = make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.LayerNorm.bias[0] = float("inf")
    with pytest.raises(
        ValueError, match="got NaN or infinity at the input of bert.encoder.layer.0.intermediate.dense"
    ):
        compress_mpo(model, keep_ratio=0.5, calibration=make_texts(), tokenizer=tokenizer)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, about gradient checkpointing
def test_models_that_cannot_be_calibrated_are_refused():
    calibration = make_batches("bert")
    with torch.device("meta"):
        hollow = MODELS["bert"][0].from_config(MODELS["bert"][1])
    for model, message in (
        (hollow, "partly on the meta device"),
        (compress_mpo(make("bert"), bond=4), "is one whose matrices are chains of cores"),
        (
            get_peft_model(make("bert"), LoraConfig(target_modules=["query"])),
            "Merge the adapter by `merge_and",
        ),
        (nn.DataParallel(make("bert")), "or `module` of a parallel one"),
        (torch.compile(make("bert"), backend="eager"), "take `_orig_mod` of a compiled"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_mpo(model, keep_ratio=0.5, calibration=calibration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "One of `bond`, `max_error` and `keep_ratio` must be given with `calibration`"),
        ({"keep_ratio": 0.5, "table_cores": 4}, "`table_cores` must be odd and at least 3, or 2, got 4"),
        ({"keep_ratio": 0.5, "table_cores": 2.0}, "`table_cores` must be odd and at least 3, or 2, got 2.0"),
        ({"keep_ratio": 9.0}, "`keep_ratio` must allow chains smaller than their matrices, 9.0 does so for none"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compress_mpo(make("bert"), calibration=make_batches("bert", 16), **options)
