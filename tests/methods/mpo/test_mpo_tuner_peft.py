"""Adapters of auxiliary tensors do what PEFT's own do: merge, add up, switch, and keep up with every change."""

import copy
import warnings

import pytest
import torch
from mpo_adapters import MODELS, READ, build, ids, inputs, logits, read_directly, train
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft_support import NEEDS_PEFT
from torch import nn

from hf_moebert.methods.mpo import MPOConfig, modeling_adapted
from hf_moebert.methods.mpo.modeling_adapted import MPOLayer
from hf_moebert.methods.mpo.modeling_tuner import TARGETS


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def adapted(kind="bert", *, trained=True, base=None, **options):
    model = get_peft_model(build(kind) if base is None else base, MPOConfig(**options))
    if trained:
        train(model, ids())
    return model


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MPOLayer)}


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("kind", MODELS)
def test_merged_and_unmerged_give_the_same_bits(kind):
    model, x = adapted(kind), ids()
    trained, plain = logits(model, x), logits(build(kind), x)
    assert not torch.equal(trained, plain)
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, x), trained)
    assert not any(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model).items())
    assert torch.equal(logits(model, x), trained)
    merged = model.merge_and_unload()
    assert type(merged) is MODELS[kind][0]
    assert not layers(merged)
    assert torch.equal(logits(merged, x), trained)


def test_a_merged_model_is_a_stock_checkpoint(tmp_path):
    model, x = adapted("t5"), ids()
    expected = logits(model, x)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert torch.equal(logits(MODELS["t5"][0].from_pretrained(tmp_path), x), expected)


def test_a_merge_of_infinity_is_refused():
    model = adapted(trained=False)
    next(iter(layers(model).values())).mpo_auxiliary["default"][0].data.fill_(torch.inf)
    with pytest.raises(
        ValueError, match="must be finite to be merged with `safe_merge`, got NaN or infinity from def"
    ):
        model.merge_adapter(safe_merge=True)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Input and output embeddings")
def test_a_merge_leaves_what_is_tied_to_an_embedding(tmp_path):
    model, x = adapted("gpt2", target_modules=["wte"], bond=4), ids()
    assert model.base_model.model.lm_head.weight is model.base_model.model.transformer.wte.weight
    trained = logits(model, x)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, x), trained)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(MODELS["gpt2"][0].from_pretrained(tmp_path), x), trained)


class ReadsTable(nn.Module):
    """Adds the rows of a table without looking them up."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        """Map `(rows, 6)` to `(6, 8)`."""
        return self.linear(self.table.weight) + x.sum()


@pytest.mark.parametrize("kind", READ)
def test_layers_whose_matrix_others_read_learn_and_merge(kind):
    """Some modules multiply by `weight`, and never call the layer."""
    base, targets, x = read_directly(kind)
    model = get_peft_model(base, MPOConfig(target_modules=targets, num_cores=3)).eval()
    first = model(**x)[0]
    first.square().sum().backward()
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learnt.values())
    with torch.no_grad():
        for parameter in learnt.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        moved = model(**x)[0]
        assert not torch.allclose(moved, first)
        model.merge_adapter()
        assert torch.equal(model(**x)[0], moved)
        model.unmerge_adapter()
        assert torch.equal(model(**x)[0], moved)
        with model.disable_adapter():
            assert torch.equal(model(**x)[0], first)


def test_layers_that_are_not_called_are_named(monkeypatch):
    said = []
    monkeypatch.setattr("hf_moebert.methods.mpo.modeling_tuner.logger.warning", said.append)
    model = get_peft_model(ReadsTable(), MPOConfig(target_modules=["table", "linear"], num_cores=3))
    for training in (False, True, True):
        model.train(training)(ids())
    assert len(said) == 1
    assert "as after the first batch `table`: they take no part, or a module reads" in said[0]


@pytest.mark.parametrize("options", [{}, {"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}])
@pytest.mark.parametrize("targets", [None, ["query"]])
def test_a_new_head_that_would_stay_frozen_is_named(monkeypatch, options, targets):
    said = []
    monkeypatch.setattr("hf_moebert.methods.mpo.modeling_tuner.logger.warning", said.append)
    adapted(trained=False, target_modules=targets, **options)
    assert [f"modules_to_save={['classifier']}" in text for text in said] == ([] if options else [True])
    base = build("bert")
    base.classifier.bias.data.fill_(0.1)
    adapted(trained=False, base=base, target_modules=targets)
    assert len(said) == (0 if options else 1)


# ------------------------------------------------------------------------------------------------ several adapters


@pytest.mark.filterwarnings("ignore:Adapter second was active")
def test_adapters_add_up_switch_and_go():
    model, x = adapted(), ids()
    first, plain = logits(model, x), logits(build("bert"), x)
    model.add_adapter("second", MPOConfig(bond=2, num_cores=3, target_modules=["key", "dense"]))
    assert torch.equal(logits(model, x), first)  # added, not active
    model.set_adapter("second")
    assert torch.equal(logits(model, x), plain)
    train(model, x)
    second = logits(model, x)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, x)
    for layer in layers(model).values():
        names = [name for name in ("default", "second") if name in layer.mpo_auxiliary]
        with torch.no_grad():
            expected = layer.base_layer.weight + sum(layer.get_delta_weight(name) for name in names)
            torch.testing.assert_close(layer._weight_in_use(), expected)
    model.merge_adapter(["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some layers had none to merge so far
        model.merge_adapter(["second"])
    assert torch.equal(logits(model, x), both)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, x), plain)
    assert torch.equal(logits(model, x), both)
    model.set_adapter("second")
    assert torch.equal(logits(model, x), second)
    model.delete_adapter("second")
    assert not any("second" in layer.mpo_constants for layer in layers(model).values())
    model.set_adapter("default")
    assert torch.equal(logits(model, x), first)
    assert torch.equal(logits(model.unload(), x), plain)


def test_an_adapter_of_other_layers_is_saved_and_loaded_alone(tmp_path):
    model, x = adapted(target_modules=["query"]), ids()
    model.add_adapter("second", MPOConfig(target_modules=["key"]))
    model.set_adapter("second")
    train(model, x)
    expected = logits(model, x)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = adapted(target_modules=["query"])
        loaded.load_adapter(tmp_path / "second", "other", **options)
        loaded.set_adapter("other")
        assert torch.equal(logits(loaded, x), expected)


@NEEDS_PEFT
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT saves the table itself, too
@pytest.mark.parametrize(("kind", "target"), [("llama", "embed_tokens"), ("bert", "word_embeddings")])
def test_transformers_adds_saves_and_loads_an_adapter(kind, target, tmp_path):
    cls, x = MODELS[kind][0], ids()
    build(kind).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    model.add_adapter(MPOConfig(target_modules=[target]))
    train(model, x)
    expected = logits(model, x)
    model.save_pretrained(tmp_path / "adapter")
    loaded = cls.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, x), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, x), logits(build(kind), x))
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded, x), logits(build(kind), x))


def test_names_of_adapters_for_the_rows_of_a_batch_are_refused():
    model, x = adapted(trained=False), ids()
    with pytest.raises(ValueError, match="`adapter_names` must be None for MPO adapters, got .*'default'"):
        model(x, adapter_names=["default", "__base__", "default"])


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
def test_another_method_on_the_same_layers_is_refused():
    model = get_peft_model(build("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="a Linear"):
        get_peft_model(model.base_model.model, MPOConfig(target_modules=["query"]))


# ------------------------------------------------------------------------------------------------ choosing layers


@pytest.mark.parametrize("kind", MODELS)
def test_by_default_attention_and_feed_forward_matrices_are_adapted(kind):
    model = adapted(kind, trained=False)
    found = {id(layer.base_layer) for layer in layers(model).values()}
    left = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and id(m) not in found]
    assert all(any(part in n for part in ("pooler", "classifier", "lm_head", "hidden_mapping")) for n in left), left
    assert kind in TARGETS
    config, layer_count = model.peft_config["default"], len(layers(model))
    assert layer_count >= 6
    assert config.target_modules <= set(TARGETS[kind])


def test_all_linear_a_pattern_and_single_layers():
    everything = adapted(trained=False, target_modules="all-linear", exclude_modules=["classifier"])
    everything.add_adapter("second", MPOConfig(target_modules="all-linear"))
    assert "model.bert.pooler.dense" in layers(everything.base_model)
    assert "model.classifier" not in layers(everything.base_model)
    assert everything.peft_config["default"].modules_to_save is None  # excluded is excluded
    assert everything.peft_config["second"].modules_to_save == ["classifier"]
    one = adapted(trained=False, target_modules=r".*layer\.1.*\.query")
    assert list(layers(one.base_model)) == ["model.bert.encoder.layer.1.attention.self.query"]
    one = adapted(trained=False, target_modules=["key"], layers_to_transform=[0], layers_pattern="layer")
    assert list(layers(one.base_model)) == ["model.bert.encoder.layer.0.attention.self.key"]
    gpt2 = adapted("gpt2", trained=False, target_modules="all-linear")
    assert len(layers(gpt2)) == 8


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("kind", ["bert", "albert", "distilbert"])
def test_all_linear_saves_a_new_head(kind, task_type, tmp_path):
    """The head of the model that the adapter is loaded into is another random one."""
    base, x = build(kind), ids()
    model = get_peft_model(copy.deepcopy(base), MPOConfig(target_modules="all-linear", task_type=task_type))
    assert not [name for name in layers(model) if name.split(".")[-1] in {"classifier", "pre_classifier"}]
    train(model, x)
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "classifier" in name:
                parameter.normal_()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), x), expected)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "llama"])
def test_all_linear_leaves_output_embeddings_frozen(kind):
    model = get_peft_model(build(kind), MPOConfig(target_modules="all-linear"))
    assert not model.peft_config["default"].modules_to_save
    assert not any("lm_head" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_layers_that_albert_repeats_are_adapted_once():
    model = adapted("albert")
    assert len(layers(model)) == 6
    assert len(list(model.named_parameters())) == len({id(p) for p in model.parameters()})


def test_modules_to_save_train_next_to_the_adapter():
    model = adapted(trained=False, modules_to_save=["classifier"])
    before = model.base_model.model.classifier.modules_to_save["default"].weight.clone()
    train(model, ids(), steps=1)
    assert not torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, before)


def test_peft_says_what_trains(capsys):
    model = adapted(trained=False)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.print_trainable_parameters()
    assert f"trainable params: {own:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.trainable_params, status.num_adapter_layers) == (own, 12)
    assert (status.enabled, status.requires_grad, status.peft_types) == (True, {"default": True}, {"default": "MPO"})
    assert {entry.module_type for entry in model.get_layer_status()} == {"AdaptedLinear"}


def test_peft_turns_an_adapter_into_a_low_rank_one():
    model, x = adapted(target_modules=["query", "value"]), ids()
    config, tensors = convert_to_lora(model, rank=16)
    low_rank = get_peft_model(build("bert"), config)
    low_rank.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, strict=False)
    torch.testing.assert_close(logits(low_rank, x), logits(model, x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ keeping up


@pytest.fixture
def one():
    model = adapted(target_modules=["query"], trained=False)
    return model, next(iter(layers(model).values()))


def test_evaluation_rebuilds_nothing_until_something_changes(one, monkeypatch):
    model, layer = one
    x, calls, contract = ids(), [], modeling_adapted.contract
    monkeypatch.setattr(modeling_adapted, "contract", lambda *a: calls.append(1) or contract(*a))

    def count(change=lambda: None):
        change()
        calls.clear()
        logits(model, x)
        return len(calls)

    @torch.no_grad()
    def add(tensor):
        tensor.add_(0.01)

    def copy_of(tensor):
        tensor.data = tensor.data.clone()

    assert count() == 2  # two layers
    assert count() == 2  # `logits` has called `eval` once more
    model.eval = lambda: model
    assert count() == 0
    assert count(lambda: add(layer.mpo_auxiliary["default"][1])) == 1
    assert count() == 0
    assert count(lambda: add(next(iter(layer.mpo_initial["default"])))) == 2  # the centre follows
    assert count(lambda: add(layer.base_layer.weight)) == 2
    assert count(lambda: copy_of(layer.base_layer.weight)) == 2
    assert count(lambda: model.add_adapter("second", MPOConfig(target_modules=["query"]))) == 0
    assert count(lambda: model.set_adapter("second")) == 2
    assert count(lambda: model.base_model.set_adapter(["default", "second"])) == 4
    assert count(lambda: model.half()) == 8
    assert count() == 0


def test_a_changed_base_weight_moves_the_centre(one):
    model, _ = one
    train(model, ids())
    other = build("bert")
    nn.init.normal_(other.bert.encoder.layer[0].attention.self.query.weight)
    fresh = get_peft_model(other, MPOConfig(target_modules=["query"]))
    state = {name: value for name, value in model.state_dict().items() if "mpo_" in name}
    fresh.load_state_dict(state, strict=False)
    logits(model, ids())
    model.load_state_dict(fresh.state_dict())
    assert torch.equal(logits(model, ids()), logits(fresh, ids()))


def test_evaluation_in_inference_mode_does_not_hinder_training(one):
    model, layer = one
    layer.mpo_constants.clear()
    with torch.inference_mode():
        model.eval()(ids())
    train(model, ids(), steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_in_float32(dtype, tmp_path):
    build("llama").to(dtype).save_pretrained(tmp_path / "base")
    base, x = MODELS["llama"][0].from_pretrained(tmp_path / "base", dtype=dtype), ids()
    plain = logits(base, x)
    model = adapted("llama", base=base, trained=False)
    assert torch.equal(logits(model, x), plain)
    train(model, x)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"low_cpu_mem_usage": True}):
        base = MODELS["llama"][0].from_pretrained(tmp_path / "base", dtype=dtype)
        assert torch.equal(
            logits(PeftModel.from_pretrained(base, tmp_path / "adapter", **options), x), logits(model, x)
        )
    base = MODELS["llama"][0].from_pretrained(tmp_path / "base", dtype=dtype)
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base, x), logits(model, x))
    merged = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert torch.equal(logits(merged, x), logits(model, x))


def test_a_whole_model_cast_to_half_precision_stays_untouched():
    model, x = adapted(trained=False).to(torch.bfloat16), ids()
    assert torch.equal(logits(model, x), logits(build("bert").to(torch.bfloat16), x))


def test_checkpointed_activations_give_the_same_gradients():
    plain, checkpointed = adapted("bert"), adapted("bert")
    checkpointed.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model.train()(**inputs(model, ids())).logits.square().sum().backward()
    assert checkpointed.base_model.model.is_activation_checkpointing
    for one, two in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, two.grad)


@pytest.mark.process
@pytest.mark.parametrize(("kind", "derived"), [("bert", True), ("gpt2", False)])
def test_a_compiled_model_evaluates_and_trains_in_one_graph(kind, derived):
    torch._dynamo.reset()
    model, x = adapted(base=build(kind, num_hidden_layers=1), target_modules=["query", "c_attn"]), ids()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    reference, expected = copy.deepcopy(model), logits(model, x)
    if not derived:
        model.to(torch.float32)  # as a move to another device: everything is forgotten
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, x), expected)
    for one in (compiled, reference):
        one.train()(**inputs(model, x)).logits.square().mean().backward()
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-6)
    train(compiled, x, steps=1)
    torch.testing.assert_close(logits(compiled, x), logits(model, x))
