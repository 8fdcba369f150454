"""Optimised models: the same outputs, the same checkpoint, and a way back."""

import copy
import pickle
import threading

import pytest
import torch
from peft_support import NEEDS_PEFT
from tiny_classifiers import classifiers  # noqa: F401
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertForTokenClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaModel,
    logging as transformers_logging,
    pipeline,
)

from hf_moebert import (
    MoEBertConfig,
    MoEBertForSequenceClassification,
    optimize_for_inference,
    revert_optimizations,
)
from hf_moebert.inference import optimize
from hf_moebert.inference.linears import PackedLinear, PlainLinear, make_linear, unsupported_reason
from hf_moebert.inference.optimized import OptimizedModule, apply_to_slices, round_up_rows
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods import masked_crf


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}
DISTILBERT = DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=20)
MODELS = {
    "bert": (BertModel, BertConfig(**TINY)),
    "bert classifier": (BertForSequenceClassification, BertConfig(**TINY)),
    "bert tagger": (BertForTokenClassification, BertConfig(**TINY)),
    "bert reader": (BertForQuestionAnswering, BertConfig(**TINY)),
    "bert masked": (BertForMaskedLM, BertConfig(**TINY)),
    "bert tanh": (BertModel, BertConfig(**TINY, hidden_act="gelu_new")),
    "bert silu": (BertModel, BertConfig(**TINY, hidden_act="silu")),
    "bert in chunks": (BertModel, BertConfig(**TINY, chunk_size_feed_forward=1)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**TINY)),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig(**TINY)),
    "camembert": (CamembertModel, CamembertConfig(**TINY)),
    "electra": (ElectraForSequenceClassification, ElectraConfig(**TINY, embedding_size=16)),
    "distilbert": (DistilBertModel, DISTILBERT),
}
ROUTINGS = ("hash-random", "gate-token", "gate-sentence")
# What of an output holds a value for each token, so that padding has to be left out of a comparison
BY_TOKEN = {"last_hidden_state", "start_logits", "end_logits"}
PRECISIONS = [p for p in ("bfloat16", "int8") if unsupported_reason(p, True) is None]


def make(name="bert classifier"):
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    return model_class(copy.deepcopy(config)).eval()


def make_mixture(routing):
    torch.manual_seed(0)
    config = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 4, "routing": routing}
    return MoEBertForSequenceClassification(MoEBertConfig(**TINY, **config)).eval()


def padded(lengths=(6, 2, 9, 1, 9), side="right"):
    """Sentences with padding, `(batch, seq)`."""
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def assert_equal_on_real_tokens(found, expected, mask, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        by_token = name in BY_TOKEN or (name == "logits" and value.shape[:2] == mask.shape)
        chosen = mask.bool() if by_token else slice(None)
        torch.testing.assert_close(found[name][chosen], value[chosen], atol=atol, rtol=1e-5, msg=name)


def is_optimized(model):
    return any(isinstance(module, OptimizedModule) for module in model.modules())


@pytest.fixture
def log(caplog):
    """The records of this package's logger."""
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same(name, side):
    model, batch = make(name), padded(side=side)
    expected = model(**batch)
    assert optimize_for_inference(model) is model
    assert is_optimized(model)
    assert_equal_on_real_tokens(model(**batch), expected, batch["attention_mask"])


@torch.no_grad()
@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("skip_padding", [True, False])
def test_each_part_can_be_chosen(prepack, skip_padding):
    model, batch = make(), padded()
    expected = model(**batch)
    optimize_for_inference(model, prepack=prepack, skip_padding=skip_padding)
    assert is_optimized(model) == (prepack or skip_padding)
    optimized = [module for module in model.modules() if isinstance(module, OptimizedModule)]
    kinds = {type(linear) for module in optimized for linear in module.built.value}
    assert kinds == ({PackedLinear} if prepack else {PlainLinear} if skip_padding else set())
    assert_equal_on_real_tokens(model(**batch), expected, batch["attention_mask"])


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lower_precisions_stay_close(precision):
    model, batch = make(), padded()
    expected = model(**batch).logits
    found = optimize_for_inference(model, precision=precision)(**batch).logits
    assert 1e-5 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor lacks int8 products")
@pytest.mark.parametrize("name", [*MODELS, *ROUTINGS])
def test_an_int8_answer_does_not_depend_on_neighbours(name):
    model = optimize_for_inference(make_mixture(name) if name in ROUTINGS else make(name), precision="int8")
    batch = padded((6, 2, 9, 1, 9, 15, 3))
    # Attention in float32 rounds by the length of its rows, padding included, which may move a value to the next step
    tolerance = 1e-6 if "unpadding" in model.base_model.__dict__ else 1e-2
    together = model(**batch)
    for number, length in enumerate(batch["attention_mask"].sum(dim=1)):
        alone = model(**{key: value[number : number + 1, :length] for key, value in batch.items()})
        for key, value in alone.items():
            found = together[key][number : number + 1]
            found = found[:, :length] if found.shape[1:2] == batch["input_ids"].shape[1:] else found
            torch.testing.assert_close(found, value, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.skipif("int8" not in PRECISIONS, reason="the processor lacks int8 products")
@pytest.mark.parametrize("name", ["bert", "distilbert", *ROUTINGS[:1]])
def test_large_channels_leave_int8_steps_for_the_others(name, monkeypatch):
    model = make_mixture(name) if name in ROUTINGS else make(name)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight[3] *= 60  # as in a trained model, whose weights make up for it
        if isinstance(module, nn.Linear) and module.in_features == 32:
            module.weight[:, 3] /= 60
    batch = padded()
    expected = model(**batch)[0]
    errors = []
    for measure in (optimize.measure_inputs, lambda base: {}):
        monkeypatch.setattr(optimize, "measure_inputs", measure)
        found = optimize_for_inference(copy.deepcopy(model), precision="int8")(**batch)[0]
        real = batch["attention_mask"].bool() if found.dim() == 3 else slice(None)
        errors.append(float((found - expected)[real].norm()))
    assert errors[0] < 0.5 * errors[1]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(7,), (5, 5), (3, 0, 4), (0, 0), (1, 1, 1)])
def test_batches_with_little_to_skip(lengths):
    model, batch = make("bert"), padded(lengths) if any(lengths) else None
    if batch is None:
        batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}
    expected = model(**batch).last_hidden_state
    found = optimize_for_inference(model)(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert found.shape == expected.shape


@torch.no_grad()
def test_a_mask_with_holes_and_every_other_input():
    model = make("bert")
    ids = torch.randint(3, 50, (2, 6))
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])
    types, positions = torch.randint(0, 2, (2, 6)), torch.randperm(20)[:6].unsqueeze(0)
    embeddings = model.embeddings.word_embeddings(ids)
    calls = [
        ((ids, mask), {}),
        ((ids, mask, types), {"position_ids": positions}),
        ((ids, mask.bool()), {"token_type_ids": types}),
        ((), {"inputs_embeds": embeddings, "attention_mask": mask.float()}),
        ((ids,), {}),
        ((ids, (mask.unsqueeze(1) * mask.unsqueeze(2)).unsqueeze(1).bool() | torch.eye(6).bool()), {}),
        ((ids, mask), {"return_dict": False}),
    ]
    before = [model(*args, **kwargs)[0] for args, kwargs in calls]
    optimize_for_inference(model)
    for (args, kwargs), expected in zip(calls, before, strict=True):
        found = model(*args, **kwargs)[0]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_heads_leave_padding_out_whatever_they_are_given(given):
    model, batch, seen = optimize_for_inference(make()), padded(), []
    batch["inputs_embeds"] = model.bert.embeddings.word_embeddings(batch["input_ids"])
    model.bert.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**{given: batch[given]}, attention_mask=batch["attention_mask"])
    assert seen == [(1, int(batch["attention_mask"].sum()), 32)]


@torch.no_grad()
def test_roberta_counts_positions_from_the_ids_and_from_embeddings():
    model, batch = make("roberta").roberta, padded()
    embeddings = model.embeddings.word_embeddings(batch["input_ids"])
    calls = [batch, {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}]
    before = [model(**call).last_hidden_state for call in calls]
    optimize_for_inference(model)
    real = batch["attention_mask"].bool()
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(model(**call).last_hidden_state[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_only_real_tokens_run(name):
    model, batch = optimize_for_inference(make(name)), padded()
    seen = []
    layers = (model.encoder if name == "bert" else model.transformer).layer
    layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**batch)
    optimize_for_inference(model, skip_padding=False)(**batch)
    optimize_for_inference(model)(**padded(side="left"))  # heads read the first place
    padding_too = (*batch["input_ids"].shape, 32)
    assert seen == [(1, int(batch["attention_mask"].sum()), 32), padding_too, padding_too]


@torch.no_grad()
@pytest.mark.parametrize("kind", [BertForTokenClassification, DistilBertForTokenClassification])
def test_a_crf_around_any_tagger_skips_padding(kind):
    torch.manual_seed(0)
    names = dict(enumerate(["O", "B-a", "I-a"]))
    config = BertConfig(**TINY) if kind is BertForTokenClassification else copy.deepcopy(DISTILBERT)
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    model, batch, seen = masked_crf.from_dense(kind(config).eval(), tag_scheme="IOB2"), padded(), []
    given = batch | {"word_mask": batch["attention_mask"] == 1}
    wanted = model(**given)
    optimize_for_inference(model)
    embeddings = next(module for name, module in model.named_modules() if name.endswith("embeddings"))
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    found = model(**given)
    assert seen == [(1, int(batch["attention_mask"].sum()), 32)]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], wanted.logits[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(found.predictions, wanted.predictions)


@torch.no_grad()
def test_recorded_hidden_states_are_those_of_transformers():
    model, batch = make("bert"), padded()
    expected = model(**batch, output_hidden_states=True)
    found = optimize_for_inference(model)(**batch, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_weights_are_those_of_transformers(log):
    model, batch = make("bert"), padded()
    model.set_attn_implementation("eager")
    expected = model(**batch, output_attentions=True)
    found = optimize_for_inference(model)(**batch, output_attentions=True)
    assert "`skip_padding` is skipped: attention is 'eager'" in log.text
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", *PRECISIONS])
def test_the_checkpoint_does_not_know(tmp_path, precision):
    model = make()
    model.save_pretrained(tmp_path / "before")
    optimize_for_inference(model, precision=precision)(**padded())
    model.save_pretrained(tmp_path / "after")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    assert not is_optimized(AutoModel.from_pretrained(tmp_path / "after"))


@torch.no_grad()
def test_the_way_back_leaves_no_trace():
    model, batch = make(), padded()
    expected, names = model(**batch).logits, {name: set(m.__dict__) for name, m in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    for _ in range(2):
        optimize_for_inference(model, precision=PRECISIONS[0] if PRECISIONS else "float32")(**batch)
    assert revert_optimizations(model) is model
    assert revert_optimizations(model) is model  # twice is once
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**batch).logits, expected)


def test_training_is_the_same_to_the_last_bit_and_is_seen_afterwards():
    losses = {}
    batch = padded() | {"labels": torch.tensor([0, 1, 0, 1, 1])}
    for optimized in (False, True):
        model = optimize_for_inference(make()) if optimized else make()
        with torch.no_grad():
            model(**batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        torch.manual_seed(0)  # of dropout
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            losses[optimized] = loss.item(), model(**batch).loss.item()
    assert losses[True][0] == losses[False][0]
    assert losses[True][1] == pytest.approx(losses[False][1], abs=1e-5)
    assert losses[True][1] != pytest.approx(losses[True][0], abs=1e-3)


@torch.no_grad()
def test_loaded_and_replaced_weights_are_used():
    model, batch = optimize_for_inference(make()), padded()
    torch.manual_seed(5)
    other = BertForSequenceClassification(model.config).eval()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, atol=1e-5, rtol=1e-5)
    for weights in (model, other):
        weights.bert.encoder.layer[0].output.dense.weight = nn.Parameter(torch.zeros(32, 64))
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_dtype_takes_the_way_of_transformers():
    model, batch = optimize_for_inference(make()), padded()
    expected = make().double()(**batch).logits
    torch.testing.assert_close(model.double()(**batch).logits, expected, atol=1e-9, rtol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(**batch).logits.isfinite().all()


@torch.no_grad()
def test_layers_that_peft_wraps_stay_as_they_are(log):
    from peft import LoraConfig, inject_adapter_in_model

    def adapt(model):
        torch.manual_seed(3)
        config = LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
        return inject_adapter_in_model(config, model).eval()

    expected = adapt(make())(**padded()).logits
    before = optimize_for_inference(adapt(make()))
    assert "stay as they are" in log.text
    torch.testing.assert_close(before(**padded()).logits, expected, atol=1e-5, rtol=1e-5)
    after = optimize_for_inference(make())
    after(**padded())
    torch.testing.assert_close(adapt(after)(**padded()).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_adapters_that_were_merged_are_seen():
    from peft import LoraConfig, get_peft_model

    model, batch = optimize_for_inference(make()), padded()
    model(**batch)
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
    merged = get_peft_model(model, config).merge_and_unload()  # edits weights in a way that torch does not count
    found = merged(**batch).logits
    torch.testing.assert_close(found, revert_optimizations(merged)(**batch).logits, atol=1e-5, rtol=1e-5)
    assert (found - make()(**batch).logits).abs().max() > 0.1


@NEEDS_PEFT
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_prefix_tuning_takes_the_way_of_transformers():
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(make(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    expected = tuned(**padded()).logits
    optimize_for_inference(tuned.base_model)
    torch.testing.assert_close(tuned(**padded()).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_forward_of_one_module_is_respected(log):
    def replaced(model):
        layer = model.encoder.layer[1]
        plain = type(layer.attention).forward.__get__(layer.attention)
        layer.attention.forward = lambda *args, **kwargs: plain(*args, **kwargs)  # as accelerate does
        return model

    batch = padded()
    real = batch["attention_mask"].bool()
    expected = make("bert")(**batch).last_hidden_state[real]
    before = optimize_for_inference(replaced(make("bert")))
    assert "`skip_padding` is skipped: the layers' forward is not the one known here" in log.text
    torch.testing.assert_close(before(**batch).last_hidden_state[real], expected, atol=1e-5, rtol=1e-5)
    after = optimize_for_inference(make("bert"))
    after.encoder.layer[0].intermediate.dense.forward = lambda x: torch.zeros(*x.shape[:-1], 64)
    twin = make("bert")
    twin.encoder.layer[0].intermediate.dense.forward = lambda x: torch.zeros(*x.shape[:-1], 64)
    found, expected = after(**batch).last_hidden_state[real], twin(**batch).last_hidden_state[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_replaced_norm_is_used():
    model, twin, batch = optimize_for_inference(make("bert")), make("bert"), padded((5, 5))
    for each in (model, twin):
        each.encoder.layer[0].output.LayerNorm = nn.Identity()
    expected = twin(**batch).last_hidden_state
    torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropout_at_inference_stays():
    model, batch = optimize_for_inference(make()), padded()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_layers_of_the_same_name_from_elsewhere_are_left_alone():
    class BertLayer(type(make("bert").encoder.layer[0])):
        def feed_forward_chunk(self, attention_output):
            return super().feed_forward_chunk(attention_output) * 2

    model, batch = make("bert"), padded((5, 5))
    for layer in model.encoder.layer:
        layer.__class__ = BertLayer
    expected = model(**batch).last_hidden_state
    found = optimize_for_inference(model)(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_footprint_of_an_optimised_model_is_refused():
    with pytest.raises(ValueError, match="`model` must not be optimised for inference"):
        measure_footprint(optimize_for_inference(make("bert")), seq_len=4)


@torch.no_grad()
def test_whoever_watches_a_linear_layer_sees_it():
    model, seen = optimize_for_inference(make("bert")), []
    model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *args: seen.append(1))
    model(**padded())
    assert seen == [1]


@torch.no_grad()
def test_a_copy_is_optimised_and_independent():
    model, batch = optimize_for_inference(make()), padded()
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    assert is_optimized(twin)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(twin(**batch).logits, expected, atol=1e-6, rtol=1e-6)
    assert not is_optimized(revert_optimizations(twin))
    torch.testing.assert_close(twin(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_run_as_without_and_a_way_back(name, dtype):
    model, batch = optimize_for_inference(make(name)), padded()
    expected = make(name).to(dtype)(**batch)
    found = model.to(dtype)(**batch)
    assert_equal_on_real_tokens(found, expected, batch["attention_mask"], atol=0.1)
    for part in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = part(**batch)
        assert_equal_on_real_tokens(again, found, batch["attention_mask"], atol=0)
    back = model.float()(**batch)
    assert_equal_on_real_tokens(back, make(name).to(dtype).float()(**batch), batch["attention_mask"])


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", *PRECISIONS])
@pytest.mark.parametrize("name", MODELS)
def test_pickled_models_are_optimised_and_can_be_reverted(name, precision):
    """Workers that are spawned get a model as a pickle."""
    model, batch = optimize_for_inference(make(name), precision=precision), padded()
    expected = model(**batch)
    found = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in found.modules()] == [type(module) for module in model.modules()]
    assert_equal_on_real_tokens(found(**batch), expected, batch["attention_mask"], atol=0)
    plain = revert_optimizations(found)
    assert not is_optimized(plain)
    assert_equal_on_real_tokens(plain(**batch), make(name)(**batch), batch["attention_mask"])


def answer(model, batch, queue):
    with torch.no_grad():
        queue.put((is_optimized(model), model(**batch).logits.tolist()))


@pytest.mark.process
@torch.no_grad()
def test_spawned_processes_run_optimised_models():
    model, batch = optimize_for_inference(make()), padded()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=answer, args=(model, batch, queue))
    process.start()
    optimized, logits = queue.get()
    process.join()
    assert optimized
    torch.testing.assert_close(torch.tensor(logits), model(**batch).logits)


@torch.no_grad()
def test_threads_may_share_a_model():
    model = optimize_for_inference(make())
    batches = [padded((2, 5)), padded((9, 1, 4)), padded((6, 6, 6, 3))]
    expected = [model(**batch).logits for batch in batches]
    right = []

    def work(i):
        equal = 0
        with torch.no_grad():
            for _ in range(20):
                equal += torch.equal(model(**batches[i]).logits, expected[i])
        right.append(equal)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [20, 20, 20]


@pytest.mark.process
@torch.no_grad()
def test_export_sees_the_model_of_transformers():
    model, batch = make("bert"), padded()
    expected = model(**batch).last_hidden_state
    exported = torch.export.export(optimize_for_inference(model), (), batch)
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.process
@torch.no_grad()
def test_torch_compile_sees_the_model_of_transformers():
    model, batch = make("bert"), padded()
    expected = model(**batch).last_hidden_state
    compiled = torch.compile(optimize_for_inference(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_inference_mode_and_weights_made_in_it():
    batch = padded()
    with torch.inference_mode():
        model = make()
        expected = model(**batch).logits
        torch.testing.assert_close(optimize_for_inference(model)(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_pipeline_takes_an_optimised_model(classifiers):  # noqa: F811
    texts = ["a good film", "bad", "not very good film film"]
    classify = pipeline("text-classification", model=str(classifiers / "large"), batch_size=3)
    expected = classify(texts, top_k=None)
    optimize_for_inference(classify.model)
    for ours, theirs in zip(classify(texts, top_k=None), expected, strict=True):
        assert [label["label"] for label in ours] == [label["label"] for label in theirs]
        assert [label["score"] for label in ours] == pytest.approx([label["score"] for label in theirs], abs=1e-5)


@torch.no_grad()
def test_what_a_machine_lacks_is_said_in_one_line_and_skipped(monkeypatch, log):
    reasons = {("int8", True): "no VNNI", ("bfloat16", False): "no bfloat16", ("float32", True): "no oneDNN"}
    monkeypatch.setattr(optimize, "unsupported_reason", lambda precision, packed: reasons.get((precision, packed)))
    model, batch = make(), padded()
    expected = model(**batch).logits
    for precision in ("int8", "bfloat16"):
        log.clear()
        optimize_for_inference(model, precision=precision)
        lines = [record.getMessage() for record in log.records]
        assert lines == [
            f"`precision` '{precision}' is skipped, float32 stays: {reasons[precision, precision == 'int8']}.",
            "`prepack` is skipped: no oneDNN.",
        ]
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_unknown_architecture_gets_packed_linears_and_a_line(log):
    model = optimize_for_inference(MPNetModel(MPNetConfig(**TINY)))
    assert "`skip_padding` is skipped: the attention of MPNetModel" in log.text
    assert is_optimized(model)


def test_a_decoder_is_not_taken_for_an_encoder(log):
    model = BertModel(BertConfig(**TINY, is_decoder=True)).eval()
    batch = padded()
    with torch.no_grad():
        expected = model(**batch, use_cache=True)
        found = optimize_for_inference(model)(**batch, use_cache=True)
    assert "`skip_padding` is skipped" in log.text
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert found.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("counts", [[3, 0, 80, 1], [70, 65, 0, 0], [0, 0, 0, 67], [65, 65, 65, 65], [1, 1, 1, 1]])
def test_slices_are_those_of_separate_products(counts):
    torch.manual_seed(0)
    x, weights = torch.randn(sum(counts), 8), torch.randn(4, 6, 8)
    linears = [make_linear(weight, None, precision="float32", packed=False) for weight in weights]
    expected = torch.cat([part @ weight.T for part, weight in zip(x.split(counts), weights, strict=True)])
    torch.testing.assert_close(apply_to_slices(linears, x, counts), expected)


def test_few_numbers_of_rows_are_ever_multiplied():
    rounded = [round_up_rows(count) for count in range(1, 1025)]
    assert rounded[:64] == list(range(1, 65))
    assert all(count <= more <= count * 1.04 for count, more in enumerate(rounded, start=1))
    assert len(set(rounded)) == 64 + 4 * 32


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`precision` must be one of .*got 'float16'"):
        optimize_for_inference(make(), precision="float16")
    with pytest.raises(ValueError, match=r"`model` must be a transformers model in float32, got .*bfloat16"):
        optimize_for_inference(make().bfloat16())
    with pytest.raises(ValueError, match="got Linear in None"):
        optimize_for_inference(nn.Linear(2, 2))
    model = optimize_for_inference(make("bert"))
    with torch.no_grad(), pytest.raises(ValueError, match="must have 1 to 20 tokens, got 21"):
        model(torch.ones(1, 21, dtype=torch.long), torch.tensor([[1] * 20 + [0]]))


def test_a_layer_with_another_network_keeps_it():
    class Network(nn.Module):
        def forward(self, x):
            return x.tanh()

    model, batch = make(), padded()
    layer = model.bert.encoder.layer[0]
    layer.intermediate, layer.output.dense = Network(), nn.Identity()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(optimize_for_inference(model)(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert [isinstance(layer, OptimizedModule) for layer in model.bert.encoder.layer] == [False, True]
