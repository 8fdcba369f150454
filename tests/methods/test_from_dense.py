"""What every way from a dense model to a compressed one keeps, and what each refuses before it begins."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    RobertaModel,
    T5Config,
    ViTConfig,
    ViTModel,
)

from hf_moebert import (
    MoEBertForSequenceClassification,
    MultiTaskBertModel,
    compress_mpo,
    measure_importance,
    shrink,
    to_dense,
)
from hf_moebert.methods import masked_crf, mixture_of_masks, moebert, mpoe
from hf_moebert.methods.platon.modeling_units import find_unit_groups


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
UNITS, VOCAB = 96, 30
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": UNITS, "max_position_embeddings": 16, "pad_token_id": 0}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "distilbert": DistilBertConfig(vocab_size=VOCAB, dim=16, n_layers=2, n_heads=4, hidden_dim=UNITS),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    ),
    "llama": LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2),
    "t5": T5Config(vocab_size=VOCAB, d_model=16, d_ff=UNITS, d_kv=4, num_layers=2, num_heads=4, pad_token_id=0),
    "roberta": RobertaConfig(**SIZES),
    "vit": ViTConfig(**{k: v for k, v in SIZES.items() if "size" in k or "num" in k}, image_size=8, patch_size=4),
}
CONFIGS["t5"].decoder_start_token_id = 0
CLASSIFIER, TAGGER = AutoModelForSequenceClassification, AutoModelForTokenClassification
IMPORTANCE = torch.rand(2, UNITS, generator=torch.Generator().manual_seed(0))


def dense(family="bert", auto=CLASSIFIER, **options):
    torch.manual_seed(0)
    return auto.from_config(copy.deepcopy(CONFIGS[family]), **options).eval()


# What is kept


def share_trunk(model):
    model.config.frozen_layers = 1
    return MultiTaskBertModel.from_tasks({"first": model, "second": copy.deepcopy(model)})


WAYS = {
    "moebert": (moebert.from_dense, ("bert", CLASSIFIER), {"importance": IMPORTANCE}),
    "moebert tags": (moebert.from_dense, ("bert", TAGGER), {"importance": IMPORTANCE}),
    "mpoe bert": (mpoe.from_dense, ("bert", CLASSIFIER), {"num_experts": 2, "num_cores": 3}),
    "mpoe gpt2": (mpoe.from_dense, ("gpt2", AutoModelForCausalLM), {"num_experts": 2, "num_cores": 3}),
    "mpoe t5": (mpoe.from_dense, ("t5", AutoModelForSeq2SeqLM), {"num_experts": 2, "num_cores": 3}),
    "masks bert": (mixture_of_masks.from_dense, ("bert", CLASSIFIER), {}),
    "masks llama": (mixture_of_masks.from_dense, ("llama", AutoModelForCausalLM), {}),
    "masks t5": (mixture_of_masks.from_dense, ("t5", AutoModelForSeq2SeqLM), {}),
    "masks compact": (
        lambda model: mixture_of_masks.shrink(mixture_of_masks.from_dense(model).fix_masks(0.5)),
        ("gpt2", AutoModelForCausalLM),
        {},
    ),
    "crf bert": (masked_crf.from_dense, ("bert", TAGGER), {"tag_scheme": "none"}),
    "crf distilbert": (masked_crf.from_dense, ("distilbert", TAGGER), {"tag_scheme": "none"}),
    "shrunk bert": (shrink, ("bert", CLASSIFIER), {}),
    "shrunk distilbert": (shrink, ("distilbert", CLASSIFIER), {}),
    "multi-task": (share_trunk, ("bert", CLASSIFIER), {}),
    "mpo": (compress_mpo, ("bert", CLASSIFIER), {}),
    "mpo and back": (lambda model: to_dense(compress_mpo(model)), ("bert", CLASSIFIER), {}),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
def test_the_attention_stays_that_of_the_dense_model(way, attention):
    convert, model, options = WAYS[way]
    found = convert(dense(*model, attn_implementation=attention), **options)
    configs = {id(module.config): module.config for module in found.modules() if hasattr(module, "config")}
    assert {config._attn_implementation for config in configs.values()} == {attention}
    if attention == "eager" and way != "multi-task":  # the one that can return them
        inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
        if "t5" in way:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        if "crf" in way:
            inputs["word_mask"] = torch.ones_like(inputs["input_ids"])
        output = found(**inputs, output_attentions=True)
        attentions = output.encoder_attentions if "t5" in way else output.attentions
        assert len(attentions) == 2
        assert all(tensor is not None for tensor in attentions)


# Labels that are all to be ignored


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("auto", [CLASSIFIER, TAGGER, AutoModelForMaskedLM])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_shrunk_models_have_no_loss_of_no_label(family, auto, return_dict):
    """The mean of the stock heads is NaN, and so would be every weight after a step."""
    model = shrink(dense(family, auto)).train()
    assert inspect.signature(model.forward) == inspect.signature(type(dense(family, auto)).forward.__get__(model))
    ids = torch.randint(3, VOCAB, (2, 5))
    labels = torch.full((2,) if auto is CLASSIFIER else (2, 5), -100)
    if return_dict:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    labels[0] = 1
    mixed = model.eval()(input_ids=ids, labels=labels, return_dict=return_dict)
    assert torch.isfinite(mixed[0] if not return_dict else mixed.loss)


# Bodies without pooler


@pytest.mark.parametrize("body", [BertModel, RobertaModel, ViTModel])
@torch.no_grad()
def test_bodies_without_pooler_shrink(body, tmp_path):
    torch.manual_seed(0)
    family = body.config_class.model_type
    model = body(copy.deepcopy(CONFIGS[family]), add_pooling_layer=False).eval()
    for group in find_unit_groups(model):
        group.writer.weight.unflatten(1, (group.num_units, group.unit_size))[:, ::2] = 0
    small = shrink(model)
    inputs = (
        {"pixel_values": torch.randn(2, 3, 8, 8)} if family == "vit" else {"input_ids": torch.randint(3, 30, (2, 5))}
    )
    expected = model(**inputs)
    assert small.pooler is None
    assert small.num_parameters() < model.num_parameters()
    torch.testing.assert_close(small(**inputs).last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path, add_pooling_layer=False)
    assert torch.equal(loaded(**inputs).last_hidden_state, small(**inputs).last_hidden_state)


def test_a_body_without_pooler_becomes_experts():
    model = BertModel(copy.deepcopy(CONFIGS["bert"]), add_pooling_layer=False)
    student = moebert.from_dense(model, IMPORTANCE)
    assert student.pooler is None
    assert student(input_ids=torch.tensor([[3, 4]])).last_hidden_state.shape == (1, 2, 16)


# Experts by their number alone


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 5, 6, 7, 8, 16, 64])
def test_any_number_of_experts_has_sizes_that_fit(num_experts):
    config = moebert.from_dense(dense(), IMPORTANCE, num_experts=num_experts).config
    assert config.expert_size == UNITS // num_experts
    assert config.num_shared_neurons == min(UNITS // 6, config.expert_size * 2 // 3)
    if num_experts in (2, 3, 4):
        assert config.num_shared_neurons == UNITS // 6  # the paper's
    assert config.expert_size > config.num_shared_neurons or num_experts == 1  # experts differ


@pytest.mark.parametrize("num_experts", [0, -1, 2.5, "4", None, 257])
@pytest.mark.parametrize("way", ["moebert", "mpoe bert", "masks bert"])
def test_other_numbers_of_experts_are_refused(way, num_experts):
    convert, model, options = WAYS[way]
    with pytest.raises(ValueError, match="num_experts"):
        convert(dense(*model), **options | {"num_experts": num_experts})


# What is refused


def shrunk(auto=CLASSIFIER):
    model = dense(auto=auto)
    with torch.no_grad():
        model.base_model.encoder.layer[0].output.dense.weight[:, :10] = 0
    return shrink(model)


WRONG = {
    "none": lambda: None,
    "module": lambda: nn.Linear(2, 2),
    "compiled": lambda: torch.compile(dense()),
    "adapted": lambda: get_peft_model(dense(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
    "choices": lambda: dense(auto=AutoModelForMultipleChoice),
    "meta": lambda: dense().to("meta"),
    "experts": lambda: moebert.from_dense(dense(), IMPORTANCE),
    "masks": lambda: mixture_of_masks.from_dense(dense()),
    "shrunk": shrunk,
}
DOORS = {
    "moebert": lambda model: moebert.from_dense(model, IMPORTANCE),
    "moebert class": lambda model: MoEBertForSequenceClassification.from_dense(model, IMPORTANCE),
    "mpoe": mpoe.from_dense,
    "masks": mixture_of_masks.from_dense,
    "crf": masked_crf.from_dense,
    "crf class": masked_crf.CrfForTokenClassification.from_dense,
    "bert crf class": masked_crf.BertCrfForTokenClassification.from_dense,
    "mpo": compress_mpo,
    "importance": lambda model: measure_importance(model, rows()),
}
WORKS = {
    ("importance", "compiled"),
    ("importance", "shrunk"),
    ("moebert", "shrunk"),
    ("moebert class", "shrunk"),
    ("masks", "choices"),
    ("moebert", "choices"),
    *(("mpo", kind) for kind in ("choices", "experts", "masks", "shrunk")),
}


@pytest.mark.parametrize(("door", "kind"), [(d, k) for d in DOORS for k in WRONG if (d, k) not in WORKS])
def test_what_is_no_dense_model_is_refused(door, kind):
    with pytest.raises(ValueError, match=r"`model`|of BertLayer|of MoMBert"):
        DOORS[door](WRONG[kind]())


@pytest.mark.parametrize(
    "model", [dense("distilbert"), dense("t5", AutoModelForSeq2SeqLM), BertModel(CONFIGS["bert"])]
)
def test_classes_name_the_class_they_convert(model):
    with pytest.raises(ValueError, match="must be a dense BertForSequenceClassification to become a MoEBertFor"):
        MoEBertForSequenceClassification.from_dense(model, IMPORTANCE)


@pytest.mark.parametrize("importance", [IMPORTANCE.numpy(), IMPORTANCE.tolist(), None])
def test_importance_that_is_no_tensor_is_refused(importance):
    with pytest.raises(ValueError, match=r"`importance` must be a tensor, got \w+. Use `torch.as_tensor`"):
        moebert.from_dense(dense(), importance)


# Importance


def rows(count=8, length=3, **columns):
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * length] * count, "labels": [0, 1] * (count // 2)} | columns
    )


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_compiled_models_are_measured(compiled):
    assert torch.equal(measure_importance(compiled(dense()), rows()), measure_importance(dense(), rows()))


TOKENS = {"labels": [[-100] * 3] * 8}
BAD_DATA = {
    "iterable": (dense, lambda: rows().to_iterable_dataset(), "`dataset` must have a length, got IterableDataset"),
    "generator": (dense, lambda: iter(rows()), "`dataset` must have a length, got generator"),
    "nothing": (dense, lambda: None, "`dataset` must have a length, got NoneType"),
    "long": (dense, lambda: rows(length=40), "`input_ids` must have at most 16 tokens, got 40"),
    "long for roberta": (lambda: dense("roberta"), lambda: rows(length=16), "at most 15 tokens, got 16"),
    "long for gpt2": (
        lambda: dense("gpt2", AutoModelForCausalLM),
        lambda: rows(length=17, labels=[[3] * 17] * 8),
        "at most 16 tokens, got 17",
    ),
    "ids": (dense, lambda: rows(input_ids=[[99, 2, 3]] * 8), r"`input_ids` must be in \[0, 30\), got 99"),
    "labels": (dense, lambda: rows(labels=[0, 7] * 4), r"Labels must be in \[0, 2\), or -100, got 7"),
    "no head": (lambda: BertModel(CONFIGS["bert"]), rows, "`pooling` must be given for a BertModel without head"),
    "no token labels": (lambda: dense(auto=TAGGER), lambda: rows(**TOKENS), "all labels are -100"),
    "no masked word": (lambda: dense(auto=AutoModelForMaskedLM), lambda: rows(**TOKENS), "all labels are -100"),
    "classes for tags": (lambda: dense(auto=TAGGER), rows, r"Labels must have the shape \(8, 3\) \(batch, seq\)"),
    "classes for words": (
        lambda: dense("t5", AutoModelForSeq2SeqLM),
        rows,
        r"Labels must have the shape \(batch, seq\)",
    ),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_do_not_fit_are_refused(kind):
    make, data, message = BAD_DATA[kind]
    with pytest.raises(ValueError, match=message):
        measure_importance(make(), data())


@pytest.mark.parametrize("trained", [False, True])
def test_an_untrained_head_is_named(trained, monkeypatch):
    said = []
    monkeypatch.setattr("hf_moebert.architectures.heads.logger.warning", said.append)
    model = CLASSIFIER.from_config(CONFIGS["bert"])
    torch.nn.init.constant_(model.classifier.bias, 0.1 if trained else 0.0)
    moebert.from_dense(model, IMPORTANCE, num_experts=2, expert_size=48)
    assert len(said) == (not trained)
