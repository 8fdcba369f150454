"""Whole models as chains of cores: the same outputs, ties, sizes, round trips, training, and refusals."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_mpo import IDS, MODELS, arguments, logits, make
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    logging as transformers_logging,
)

from hf_moebert import (
    MoEBertForSequenceClassification,
    PlatonPruningCallback,
    compress_mpo,
    optimize_for_inference,
    save_packed,
    to_dense,
)
from hf_moebert.checkpoints.forms import allow
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods.mpo.conversion import find_matrices
from hf_moebert.methods.mpo.functional import contract
from hf_moebert.methods.mpo.functional_shapes import count_parameters, factor_matrix, full_bonds
from hf_moebert.methods.mpo.modeling_matrix import MPOMatrix
from hf_moebert.methods.mpo.modeling_mpo import MPOConv1D, MPOEmbedding, MPOLinear, TiedMPOEmbedding, TiedMPOLinear
from hf_moebert.methods.mpoe import MPOEBertForSequenceClassification


ALL = pytest.mark.parametrize("name", MODELS)


def count(model):
    return sum(p.numel() for p in model.parameters())


def matrices(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, MPOMatrix)}


def dense_size(name):
    model = make(name)
    return sum(model.get_parameter(f"{paths[0]}.weight").numel() for paths in find_matrices(model))


@ALL
def test_with_full_bonds_a_model_is_the_dense_one(name):
    dense = make(name)
    expected = logits(name, dense)
    model = compress_mpo(make(name))
    torch.testing.assert_close(logits(name, model), expected, atol=2e-5, rtol=1e-5)
    assert sum(core.numel() for m in matrices(model).values() for core in m.chain()) > dense_size(name)


@ALL
def test_saved_and_loaded_it_gives_the_same_bytes(name, tmp_path):
    model = compress_mpo(make(name), keep_ratio=0.6)
    model.save_pretrained(tmp_path)
    loaded, info = MODELS[name][0].from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(name, loaded.eval()), logits(name, model))
    assert not any(info.values())
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert not {f"{path}.weight" for path in matrices(model)} & set(load_file(tmp_path / "model.safetensors"))


@ALL
def test_made_dense_it_is_the_stock_model_and_tied_again(name):
    dense = make(name)
    model = to_dense(compress_mpo(make(name)))
    assert type(model) is type(dense)
    torch.testing.assert_close(logits(name, model), logits(name, dense), atol=2e-5, rtol=1e-5)
    assert count(model) == count(dense)
    assert not matrices(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert not hasattr(model.config, "quantization_config")


@ALL
def test_both_ways_leave_the_given_model_alone(name):
    """No tensor is shared, none has changed, and both train on."""
    dense = make(name).train()
    before = copy.deepcopy(dense.state_dict())
    compressed = compress_mpo(dense, keep_ratio=0.6)
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in make(name).named_parameters()]
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert not hasattr(dense.config, "quantization_config")
    kept = copy.deepcopy(compressed.state_dict())
    again = to_dense(compressed)
    models = (dense, compressed, again)
    addresses = [{p.data_ptr() for p in model.parameters()} for model in models]
    assert not addresses[0] & addresses[1]
    assert not addresses[1] & addresses[2]
    for model in models:
        assert model.training
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    assert all(torch.equal(value, kept[key] + 1) for key, value in compressed.state_dict().items() if "cores" in key)
    assert matrices(compressed)
    assert compressed.config.quantization_config.matrices


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, about gradient checkpointing
def test_what_has_no_cores_is_refused():
    with pytest.raises(ValueError, match="as `compress_mpo` makes them, got BertForSequenceClassification without"):
        to_dense(make("bert"))
    adapted = get_peft_model(make("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="Merge an adapter with `merge_and_unload`"):
        to_dense(adapted)


def test_a_dense_copy_can_be_saved_and_loaded_by_the_stock_class(tmp_path):
    model = compress_mpo(make("bert"), keep_ratio=0.5)
    expected = logits("bert", model)
    to_dense(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits("bert", BertForSequenceClassification.from_pretrained(tmp_path)), expected)


def test_the_body_loads_from_a_model_with_a_head_and_the_other_way_round(tmp_path):
    model = compress_mpo(make("bert"), keep_ratio=0.5)
    model.save_pretrained(tmp_path / "head")
    body = AutoModel.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        expected = model.bert(IDS).pooler_output
        assert torch.equal(body(IDS).pooler_output, expected)
    body.save_pretrained(tmp_path / "body")
    with allow("missing"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body").eval()
    with torch.no_grad():
        assert torch.equal(again.bert(IDS).pooler_output, expected)


def test_it_loads_in_another_precision(tmp_path):
    compress_mpo(make("bert")).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits("bert", model).float(), logits("bert", make("bert")), atol=0.05, rtol=0.1)


def test_what_is_decomposed_and_what_is_not():
    model = compress_mpo(make("albert"))
    names = {path.rpartition(".")[2] for path in matrices(model)}
    assert names == {"word_embeddings", "query", "key", "value", "dense", "ffn", "ffn_output"} | names & {"pooler"}
    assert type(model.albert.encoder.embedding_hidden_mapping_in) is torch.nn.Linear
    assert type(model.albert.embeddings.position_embeddings) is torch.nn.Embedding
    assert isinstance(model.predictions.decoder, TiedMPOLinear)
    gpt2 = compress_mpo(make("gpt2"))
    assert isinstance(gpt2.transformer.h[0].mlp.c_fc, MPOConv1D)
    assert isinstance(gpt2.transformer.wte, MPOEmbedding)
    assert isinstance(gpt2.lm_head, TiedMPOLinear)
    assert type(gpt2.transformer.wpe) is torch.nn.Embedding
    llama = compress_mpo(make("llama"))
    assert isinstance(llama.model.layers[0].mlp.gate_proj, MPOLinear)
    assert type(llama.lm_head) is torch.nn.Linear  # a head of its own, and not tied


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "llama-tied", "t5", "roberta", "albert"])
def test_tied_tables_stay_tied(name, tmp_path):
    model = compress_mpo(make(name), keep_ratio=0.7)
    tied = [m for m in model.modules() if isinstance(m, TiedMPOEmbedding | TiedMPOLinear)]
    table = model.get_input_embeddings()
    assert tied
    assert all(m._source[0] is table or m._source[0] is model.shared for m in tied)
    model.save_pretrained(tmp_path)
    loaded = MODELS[name][0].from_pretrained(tmp_path).eval()
    with torch.no_grad():
        source = next(m for m in loaded.modules() if isinstance(m, TiedMPOLinear))._source[0]
        source.cores[0].mul_(2)
        assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    loaded.tie_weights()  # what resizing and old scripts call: nothing of the table is left to tie


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query", "value"], {"query", "value"}),
        (r".*\.0\.attention\.self\.(query|key)", {"query", "key"}),
        (["word_embeddings"], {"word_embeddings"}),
        (["classifier"], {"classifier"}),
    ],
)
def test_targets_are_ends_of_paths_or_an_expression(targets, expected):
    model = compress_mpo(make("bert"), target_modules=targets)
    assert {path.rpartition(".")[2] for path in matrices(model)} == expected


def test_a_cap_holds_for_every_bond():
    model = compress_mpo(make("bert"), bond=5)
    for matrix in matrices(model).values():
        full = full_bonds(matrix.row_factors, matrix.column_factors)
        assert all(bond <= min(5, largest) for bond, largest in zip(matrix.bonds, full, strict=True))


@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_a_target_size_is_met_and_used_up(name, keep_ratio):
    model = compress_mpo(make(name), keep_ratio=keep_ratio)
    size = dense_size(name) - (count(make(name)) - count(model))  # with those that stay dense
    assert 0.9 * keep_ratio < size / dense_size(name) <= keep_ratio


def test_a_target_error_holds_for_every_matrix():
    dense, model = make("bert"), compress_mpo(make("bert"), max_error=0.5)
    for path, matrix in matrices(model).items():
        weight = dense.get_parameter(f"{path}.weight")
        assert (matrix.weight - weight).norm() <= 0.5 * weight.norm()
    assert count(model) < count(compress_mpo(make("bert"), max_error=0.3)) <= count(dense)


@pytest.fixture
def log(caplog):
    """The records of this package's logger."""
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


@ALL
def test_a_target_error_never_makes_a_model_larger(name, log):
    """One matrix has directions of equal weight, and its chain would be larger: it stays as it is."""
    dense = make(name)
    groups = find_matrices(dense)
    first = groups[-1][0]
    generator = torch.Generator().manual_seed(0)
    for paths in groups:
        weight = dense.get_parameter(f"{paths[0]}.weight")
        if paths[0] == first:
            torch.nn.init.orthogonal_(weight.data, generator=generator)
            continue
        factors = zip(*factor_matrix(*weight.shape, 5), strict=True)
        product = contract([torch.randn(1, i, j, 1, generator=generator) for i, j in factors], *weight.shape)
        weight.data = product * weight.norm() / product.norm()
    expected = logits(name, dense)
    model = compress_mpo(dense, max_error=1e-3)
    assert first not in matrices(model)
    assert matrices(model)
    assert count(model) < count(dense)
    assert f"1 of {len(groups)} matrices stay dense" in log.text
    assert first in log.text
    torch.testing.assert_close(logits(name, model), expected, atol=2e-2, rtol=2e-2)
    assert count(to_dense(model)) == count(dense)


def test_an_error_that_makes_nothing_smaller_is_refused():
    with pytest.raises(ValueError, match="`max_error` must allow chains smaller than their matrices, 0.0 does so for"):
        compress_mpo(make("bert"), max_error=0.0)


def test_exact_chains_say_that_they_are_larger(log):
    compress_mpo(make("bert"))
    assert "times the parameters of their matrices: bonds have still to be cut" in log.text
    log.clear()
    compress_mpo(make("bert"), keep_ratio=0.5)
    assert not log.text


def test_optimising_says_that_chains_stay_as_they_are(log):
    optimize_for_inference(compress_mpo(make("bert"), keep_ratio=0.5))
    assert "Linear layers of other forms, such as chains of cores, stay as they are" in log.text
    log.clear()
    optimize_for_inference(make("bert"))
    assert not log.text


def test_bert_base_shapes_are_the_published_ones():
    config = BertConfig()
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    sizes = {}
    for paths in find_matrices(model):
        rows, columns = model.get_parameter(f"{paths[0]}.weight").shape
        factors = factor_matrix(rows, columns, 5)
        sizes[rows, columns] = sum(count_parameters(*factors, full_bonds(*factors)))
    assert sizes == {(768, 768): 663840, (3072, 768): 2544016, (768, 3072): 2544016, (30522, 768): 24773760}
    assert len(find_matrices(model)) == 12 * 6 + 2  # of every layer, the pooler, the word embeddings


def test_central_tensors_are_frozen_unless_asked():
    model = compress_mpo(make("bert"))
    assert not any(m.centre.requires_grad for m in matrices(model).values())
    assert all(p.requires_grad for n, p in model.named_parameters() if ".cores.2" not in n)
    assert all(m.centre.requires_grad for m in matrices(compress_mpo(make("bert"), train_centre=True)).values())


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_a_step_with_decay_leaves_central_tensors_and_moves_all_others(name):
    model = compress_mpo(make(name)).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(**arguments(name, labels=True)).loss.backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        if ".cores." in key:
            assert torch.equal(value, before[key]) == key.endswith(".cores.2"), key


def rows(count=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def train(model, folder, **options):
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 6, "save_strategy": "no", **options},
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows())
    return trainer


def test_the_stock_trainer_trains_saves_and_resumes(tmp_path):
    trainer = train(
        compress_mpo(make("bert"), keep_ratio=0.5), tmp_path / "whole", save_strategy="steps", save_steps=3
    )
    trainer.train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole/checkpoint-3")
    resumed = train(loaded, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    expected = trainer.model.state_dict()
    for name, mine in resumed.model.state_dict().items():
        assert torch.equal(mine, expected[name]), name


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = compress_mpo(make("bert")).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(**arguments("bert", labels=True)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_it_generates_what_the_dense_model_generates(name):
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = make(name).generate(IDS, **options)
    assert torch.equal(compress_mpo(make(name)).generate(IDS, **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cores": 4}, "`num_cores` must be odd and at least 3, or 2, got 4"),
        ({"num_cores": 1}, "`num_cores` must be odd and at least 3, or 2, got 1"),
        ({"num_cores": 5.0}, "`num_cores` must be odd and at least 3, or 2, got 5.0"),
        ({"bond": 0}, "`bond` must be a whole number of at least 1, got 0"),
        ({"bond": 2.5}, "`bond` must be a whole number of at least 1, got 2.5"),
        ({"bond": "4"}, "`bond` must be a whole number of at least 1, got '4'"),
        ({"bond": True}, "`bond` must be a whole number of at least 1, got True"),
        ({"keep_ratio": "0.5"}, "`keep_ratio` must be above 0, got '0.5'"),
        ({"keep_ratio": float("inf")}, "`keep_ratio` must be above 0, got inf"),
        ({"max_error": "1"}, "`max_error` must be in .*, got '1'"),
        ({"max_error": 1.0}, r"`max_error` must be in \[0, 1\), got 1.0"),
        ({"max_error": float("nan")}, "`max_error` must be in"),
        ({"keep_ratio": 0.0}, "`keep_ratio` must be above 0"),
        ({"keep_ratio": 1e-9}, "must leave room for one direction"),
        ({"bond": 4, "keep_ratio": 0.5}, "At most one of .* got bond, keep_ratio"),
        ({"gauge": "right"}, "`gauge` must be one of symmetric, left, centre, even, got 'right'"),
        ({"target_modules": ["nothing"]}, "`target_modules` must name linear layers .*, got 'nothing'. .*classifier"),
        ({"target_modules": ["query", "qurey"]}, "`target_modules` must name linear layers .*, got 'qurey'. Choose"),
        ({"target_modules": "query"}, "`target_modules` must name linear layers .*, got 'query'. Choose"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_changes(options, message):
    model = make("bert")
    with pytest.raises(ValueError, match=message):
        compress_mpo(model, **options)
    assert not matrices(model)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, about gradient checkpointing
def test_a_model_that_is_not_dense_is_refused():
    model = compress_mpo(make("bert"))
    with pytest.raises(ValueError, match="is one whose matrices are chains of cores. Chains come after it"):
        compress_mpo(model)
    with pytest.raises(ValueError, match="is optimised for inference. Call `revert_optimizations`"):
        compress_mpo(optimize_for_inference(make("bert")))
    adapted = make("bert")
    get_peft_model(adapted, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="is one with an adapter of PEFT"):
        compress_mpo(adapted)
    with torch.device("meta"):
        hollow = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="partly on the meta device"):
        compress_mpo(hollow)


def test_weights_that_are_not_finite_are_refused():
    model = make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weights, got NaN or infinity in bert.encoder.layer.0.intermediate"):
        compress_mpo(model)
    assert not matrices(model)


def saved(folder, change):
    compress_mpo(make("bert"), bond=4).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    change(config["quantization_config"], weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, w: w.pop(f"{QUERY}.cores.1"), rf"must hold all weights .* not so for {QUERY}.cores.1\."),
        (lambda c, w: w.update({f"{QUERY}.cores.1": torch.zeros(2, 2)}), "of shape .*, got .2, 2."),
        (lambda c, w: c["matrices"][QUERY].update(bonds=[4, 4, 4]), "`bonds` must name 4 sizes"),
        (lambda c, w: c["matrices"][QUERY].update(bonds=[4, 4, 4, 400]), "must be from 1 to"),
        (lambda c, w: c["matrices"][QUERY].pop("bonds"), "must hold factors and bonds"),
        (
            lambda c, w: c.update(format_version="3"),
            "`format_version` .* must be '1' or '2' for this release, got '3'",
        ),
        (lambda c, w: c.update(tied={"x": "nowhere"}), "`tied` must name one of `matrices`, got 'nowhere'"),
    ],
)
def test_a_broken_checkpoint_is_refused(change, message, tmp_path):
    saved(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    compress_mpo(make("bert"), bond=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="must have the module 'bert.encoder.layer.1"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_another_head_leaves_the_first_ones_modules_out(tmp_path):
    model = compress_mpo(make("bert-mlm"), bond=4)
    model.save_pretrained(tmp_path)
    with allow("missing", "unexpected"):
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not classifier.config.quantization_config.tied
    for name, matrix in matrices(classifier).items():
        assert torch.equal(matrix.weight, matrices(model)[name].weight)


def test_conversions_that_conflict_are_refused_and_both_named(tmp_path):
    model = compress_mpo(make("bert"))
    with pytest.raises(ValueError, match="dense to be cut into the experts of MoEBertFor.*, but its form is 'mpo'"):
        MoEBertForSequenceClassification.from_dense(model, torch.rand(2, 48), num_experts=2)
    with pytest.raises(ValueError, match="dense to become the experts of MPOEBertFor.*, but its form is 'mpo'"):
        MPOEBertForSequenceClassification.from_dense(model, num_experts=2)
    with pytest.raises(ValueError, match="is one whose matrices are chains of cores. Chains hold no zeros"):
        save_packed(model, tmp_path)
    with pytest.raises(ValueError, match="is one whose matrices are chains of cores. Chains come after it"):
        Trainer(
            model,
            TrainingArguments(tmp_path, max_steps=1000, report_to="none", use_cpu=True),
            train_dataset=rows(),
            callbacks=[PlatonPruningCallback()],
        ).train()


def test_of_experts_only_what_is_around_them_is_decomposed():
    """Their own matrices are stacked, and routers are too small."""
    model = compress_mpo(MPOEBertForSequenceClassification.from_dense(make("bert"), num_experts=2))
    names = {path.rpartition(".")[2] for path in matrices(model)}
    assert names == {"word_embeddings", "query", "key", "value", "dense"}
    assert not any("intermediate" in path or "router" in path for path in matrices(model))


def test_the_footprint_counts_cores_and_the_operations_of_the_kept_matrix():
    dense, model = measure_footprint(make("bert"), seq_len=8), compress_mpo(make("bert"), keep_ratio=0.5)
    found = measure_footprint(model, seq_len=8)
    assert found.total == count(model) < dense.total
    assert found.flops_per_token == dense.flops_per_token


def test_inference_forms_leave_chains_as_they_are():
    model = compress_mpo(make("bert"))
    expected = logits("bert", model)
    assert torch.equal(logits("bert", optimize_for_inference(model, precision="float32")), expected)


def test_another_model_of_the_same_configuration_stays_dense(tmp_path):
    config = copy.deepcopy(MODELS["bert"][1])
    first, second = BertForSequenceClassification(config), BertForSequenceClassification(config)
    compressed = compress_mpo(first, bond=4)
    second.save_pretrained(tmp_path)
    assert not matrices(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    assert compressed.bert.config is compressed.config


def test_what_was_frozen_stays_frozen():
    model = make("bert")
    model.bert.embeddings.requires_grad_(False)
    model = compress_mpo(model, train_centre=True)
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in model.bert.encoder.parameters())


def test_half_precision_rounds_once():
    model = make("bert").to(torch.bfloat16)
    plain = compress_mpo(model)
    for options in ({"bond": 10**6}, {"keep_ratio": 2.0}):
        for name, matrix in matrices(compress_mpo(model, **options)).items():
            weight = model.get_parameter(f"{name}.weight").float()
            error = (contract([c.float() for c in matrix.chain()], *weight.shape) - weight).norm()
            other = contract([c.float() for c in matrices(plain)[name].chain()], *weight.shape)
            assert error <= 1.2 * (other - weight).norm()


def test_names_that_transformers_changes_on_disk_are_found_again(tmp_path):
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
    )
    model = compress_mpo(ViTForImageClassification(config).eval(), bond=6)
    model.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert matrices(loaded)


def test_a_matrix_shared_with_another_kind_of_layer_is_left_or_refused():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = GemmaConfig(**sizes, num_key_value_heads=1, head_dim=12, vocab_size=99, tie_word_embeddings=True)
    model = GemmaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="must not name a matrix that another kind of layer shares, got .*lm_head"):
        compress_mpo(model, target_modules=["lm_head"])
    model = compress_mpo(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "model.layers.0.mlp.up_proj" in matrices(model)


def test_a_model_with_ties_of_its_own_gets_them_back():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = MarianConfig(**sizes, d_model=24, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, pad_token_id=0)
    dense = MarianMTModel(config).eval()
    model = to_dense(compress_mpo(dense))
    assert count(model) == count(dense)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]


def test_a_head_that_is_not_tied_stays_so_whatever_the_configuration_says(tmp_path):
    model = make("t5")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.all_tied_weights_keys.pop("lm_head.weight")
    expected = logits("t5", model)
    model = compress_mpo(model)
    torch.testing.assert_close(logits("t5", model), expected, atol=1e-3, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = MODELS["t5"][0].from_pretrained(tmp_path).eval()
    assert torch.equal(logits("t5", loaded), logits("t5", model))
    torch.testing.assert_close(logits("t5", to_dense(loaded)), expected, atol=1e-3, rtol=1e-4)
