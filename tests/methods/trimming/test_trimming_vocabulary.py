"""Tokens left out: every family, head and form, what names tokens, and what is refused."""

import copy
import json
from functools import cache

import pytest
import torch
from tiny_families import CONFIGS, IMAGES, LAYERS, UNITS, make_model
from tiny_tokenizers import SCRIPTS, make_texts, make_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from hf_moebert import compress_mpo
from hf_moebert.methods import masked_crf, moebert
from hf_moebert.methods.multitask import MultiTaskModel
from hf_moebert.methods.trimming import compare_splitting, trim_vocabulary


FAMILIES = sorted(set(CONFIGS) - set(IMAGES))
TEXTS = make_texts(40, 1, [*SCRIPTS[:1] * 7, *SCRIPTS[1:3]])
HELD_OUT = make_texts(20, 2, SCRIPTS[:4])


@cache
def tokenizer_of(kind="WordPiece"):
    return make_tokenizer(kind)


@cache
def model_of(family, auto=AutoModel):
    """A tiny model with a row for each token, and some more."""
    sizes = {"vocab_size": len(tokenizer_of()) + 3, "max_position_embeddings": 64}
    sizes = {"vocab_size": len(tokenizer_of()) + 3, "n_positions": 64} if family == "gpt2" else sizes
    return make_model(family, auto, **sizes)


@torch.no_grad()
def answer(model, tokenizer, texts=tuple(TEXTS[:6]), **options):
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs, **options)[0]


def kept_rows(tokenizer, trimmed, rows):
    """The numbers that the tokens of a trimmed tokenizer had; rows without a token that stayed are last."""
    numbers = trimmed.get_vocab()
    old = [tokenizer.get_vocab()[token] for token in sorted(numbers, key=numbers.get)]
    assert len(old) == rows
    return old


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_the_same(family):
    model, tokenizer = model_of(family), tokenizer_of()
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    assert type(smaller) is type(model)
    assert len(trimmed) == smaller.config.vocab_size == len(smaller.get_input_embeddings().weight) < len(tokenizer)
    assert torch.equal(answer(smaller, trimmed), answer(model, tokenizer))


HEADS = {
    "bert": AutoModelForMaskedLM,
    "albert": AutoModelForMaskedLM,
    "distilbert": AutoModelForMaskedLM,
    "electra": AutoModelForMaskedLM,
    "modernbert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "deberta-v2": AutoModelForMaskedLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bart": AutoModelForSeq2SeqLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("family", HEADS)
def test_heads_lose_the_same_tokens_and_stay_tied_or_not(family, tmp_path):
    model, tokenizer = model_of(family, HEADS[family]), tokenizer_of()
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    rows = kept_rows(tokenizer, trimmed, smaller.config.vocab_size)
    assert torch.allclose(answer(smaller, trimmed), answer(model, tokenizer)[..., rows], atol=1e-6)
    tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in (model, smaller)]
    assert tied[0] == tied[1]
    smaller.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    loaded, read = HEADS[family].from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(answer(loaded, read), answer(smaller, trimmed))
    if hasattr(smaller, "generation_config"):
        assert smaller.generation_config.eos_token_id == smaller.config.eos_token_id


def test_all_tokens_are_the_model():
    model, tokenizer = model_of("bert"), tokenizer_of()
    same, whole = trim_vocabulary(model, tokenizer, keep=list(range(len(tokenizer))))
    assert whole.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(answer(same, whole), answer(model, tokenizer))


@pytest.mark.parametrize("kind", ["WordPiece", "BPE of bytes", "Unigram"])
def test_all_that_names_tokens_follows(kind):
    tokenizer, chat = tokenizer_of(kind), [{"role": "user", "content": "abc"}]
    model = make_model("bert", vocab_size=len(tokenizer), max_position_embeddings=64)
    named = tokenizer.convert_tokens_to_ids("zzz")
    model.config.eos_token_id, model.config.decoder_start_token_id = [2, named], named
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    number = trimmed.convert_tokens_to_ids("zzz")
    assert number < named
    assert smaller.config.eos_token_id == [2, number]
    assert smaller.config.decoder_start_token_id == number
    assert trimmed("a zzz<mask>", "b").tokens() == tokenizer("a zzz<mask>", "b").tokens()
    assert trimmed.special_tokens_map == tokenizer.special_tokens_map
    assert trimmed.apply_chat_template(chat, tokenize=False) == "abc"
    assert trimmed.model_max_length == tokenizer.model_max_length
    assert trimmed.name_or_path == tokenizer.name_or_path
    assert trimmed.pad(trimmed(["a", "a b c"]))["input_ids"][0][-1] == trimmed.pad_token_id


def test_positions_are_counted_from_the_padding_s_number():
    """Its number stays, though no text uses the tokens before it."""
    data = json.loads(tokenizer_of().backend_tokenizer.to_str())
    other = {piece: index for index, piece in enumerate(sorted(data["model"]["vocab"]))}
    assert "<pad>" in other
    data["model"]["vocab"], data["post_processor"] = other, None
    data["added_tokens"] = [token | {"id": other[token["content"]]} for token in data["added_tokens"][:5]]
    fast = tokenizer_of().backend_tokenizer.from_str(json.dumps(data))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")
    number = tokenizer.pad_token_id
    assert number > 10
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    places = {"pad_token_id": number, "max_position_embeddings": number + 64}
    model = RobertaModel(RobertaConfig(vocab_size=len(tokenizer), **sizes, **places)).eval()
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    assert trimmed.pad_token_id == smaller.config.pad_token_id == number
    assert smaller.config.vocab_size < model.config.vocab_size
    assert torch.equal(answer(smaller, trimmed), answer(model, tokenizer))


@pytest.mark.parametrize("routing", ["hash-random", "gate-token"])
def test_experts_keep_the_table_of_each_token(routing):
    dense, tokenizer = model_of("bert"), tokenizer_of()
    model = moebert.from_dense(dense, torch.rand(LAYERS, UNITS), num_experts=2, routing=routing)
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    assert torch.equal(answer(smaller, trimmed), answer(model, tokenizer))


def tagger_of(family):
    model = copy.deepcopy(model_of(family, AutoModelForTokenClassification))
    model.config.id2label, model.config.label2id = {0: "O", 1: "B-A"}, {"O": 0, "B-A": 1}
    return masked_crf.from_dense(model, tag_scheme="IOB2").eval()


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_tagger_with_a_crf_follows(family, tmp_path):
    model, tokenizer = tagger_of(family), tokenizer_of()
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    size = len(tokenizer(TEXTS[:6], padding=True)["input_ids"][0])
    words = torch.ones(6, size, dtype=torch.int64)
    assert torch.equal(answer(smaller, trimmed, word_mask=words), answer(model, tokenizer, word_mask=words))
    smaller.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(answer(loaded, trimmed, word_mask=words), answer(smaller, trimmed, word_mask=words))


def test_all_tasks_of_a_trunk_follow():
    single = copy.deepcopy(model_of("bert", AutoModelForTokenClassification))
    single.config.frozen_layers = 1
    model, tokenizer = MultiTaskModel.from_tasks({"one": single, "two": single}), tokenizer_of()
    smaller, trimmed = trim_vocabulary(model, tokenizer, TEXTS)
    assert type(smaller) is type(model)
    assert smaller.config.vocab_size == len(trimmed)
    for name in ("one", "two"):
        wanted = answer(model.extract_task(name), tokenizer)
        assert torch.equal(answer(smaller.extract_task(name), trimmed), wanted)


def test_words_that_were_unknown_stay_so():
    tokenizer = tokenizer_of()
    texts = [*TEXTS, "aŋb abcŋ", "ŋ"]
    assert "<unk>" in tokenizer.tokenize(texts[-2])
    smaller, trimmed = trim_vocabulary(model_of("bert"), tokenizer, texts)
    assert [trimmed.tokenize(text) for text in texts] == [tokenizer.tokenize(text) for text in texts]
    assert smaller.config.vocab_size == len(trimmed)


def test_coverage_trades_size_for_finer_pieces_and_the_report_tells_how_much():
    model, tokenizer = model_of("bert"), tokenizer_of()
    sizes, splittings = [], []
    for coverage in (0.9, 1.0):
        _, trimmed = trim_vocabulary(model, tokenizer, TEXTS, coverage=coverage)
        sizes.append(len(trimmed))
        splittings.append(compare_splitting(tokenizer, trimmed, TEXTS))
    assert sizes == sorted(set(sizes))
    assert splittings[-1].same_texts == 1
    assert splittings[0].same_texts < 1
    assert splittings[0].trimmed_tokens_per_word > splittings[-1].trimmed_tokens_per_word
    held = compare_splitting(tokenizer, trimmed, HELD_OUT)
    assert held.trimmed_unknown <= held.unknown
    assert held.trimmed_tokens_per_word >= held.tokens_per_word
    with pytest.raises(ValueError, match="`texts` must have words, got none"):
        compare_splitting(tokenizer, trimmed, ["", " "])


def test_named_tokens_stay():
    model, tokenizer = model_of("bert"), tokenizer_of()
    rare = sorted(tokenizer.get_vocab().keys() - trim_vocabulary(model, tokenizer, TEXTS)[1].get_vocab().keys())[:2]
    _, trimmed = trim_vocabulary(model, tokenizer, TEXTS, keep=[rare[0], tokenizer.convert_tokens_to_ids(rare[1])])
    assert set(rare) <= trimmed.get_vocab().keys()


def test_the_model_and_the_tokenizer_are_left_as_they_were():
    model, tokenizer = model_of("bert"), tokenizer_of()
    state, text = copy.deepcopy(model.state_dict()), tokenizer.backend_tokenizer.to_str()
    config, random = model.config.to_dict(), torch.get_rng_state()
    trim_vocabulary(model, tokenizer, TEXTS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (tokenizer.backend_tokenizer.to_str(), model.config.to_dict()) == (text, config)
    assert torch.equal(torch.get_rng_state(), random)


def test_few_texts_are_warned_of(caplog):
    trim_vocabulary(model_of("bert"), tokenizer_of(), TEXTS[:3])
    assert "`texts` are few: about" in caplog.text


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (None, {}, "`texts` or `keep` must be given, got neither"),
        ([], {}, "`texts` must be a list of texts, got 0 empty ones. Give some thousand"),
        (["", "  "], {}, "`texts` must be a list of texts, got 2 empty ones"),
        ("one text", {}, "`texts` must be a list of texts, got 'one text'"),
        (["a", None], {}, "`texts` must be a list of texts, got None"),
        (
            ["ጤና ይስጥልኝ", "ŋŋ"],
            {},
            "must be in a language of the vocabulary, but 100% of their tokens",
        ),
        (TEXTS, {"coverage": 0}, r"`coverage` must be in \(0, 1\], got 0"),
        (TEXTS, {"coverage": 1.5}, r"`coverage` must be in \(0, 1\], got 1.5"),
        (
            TEXTS,
            {"keep": ["nothing"]},
            "`keep` must be tokens of the vocabulary, or their numbers in .*nothing",
        ),
        (TEXTS, {"keep": [10**6]}, "`keep` must be tokens of the vocabulary"),
        (TEXTS, {"keep": [-1]}, "`keep` must be tokens of the vocabulary"),
    ],
)
def test_bad_texts_and_options_are_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(model_of("bert"), tokenizer_of(), texts, **options)


def test_another_language_is_told_by_bytes_too():
    tokenizer = tokenizer_of("BPE of bytes")
    model = make_model("bert", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="of their tokens are unknown, or parts of characters"):
        trim_vocabulary(model, tokenizer, ["ጤና ይስጥልኝ"])


def test_tokenizers_of_another_model_or_kind_are_refused():
    model, tokenizer = model_of("bert"), tokenizer_of()
    with pytest.raises(ValueError, match="`tokenizer` must be that of the model, but it knows"):
        trim_vocabulary(make_model("bert"), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="`tokenizer` must be that of the model, but it knows"):
        trim_vocabulary(make_model("bert", vocab_size=3 * len(tokenizer)), tokenizer, TEXTS)
    with pytest.raises(ValueError, match=r"with a tokenizer.json, got ByT5Tokenizer. Load it by `AutoTokenizer`"):
        trim_vocabulary(model, ByT5Tokenizer(), TEXTS)
    with pytest.raises(ValueError, match=r"with a tokenizer.json, got NoneType"):
        trim_vocabulary(model, None, TEXTS)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"] = {"type": "WordLevel", "vocab": data["model"]["vocab"], "unk_token": "<unk>"}
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(data)))
    with pytest.raises(ValueError, match="`tokenizer` must be one of WordPiece, BPE, Unigram, got 'WordLevel'"):
        trim_vocabulary(model, words, TEXTS)
    drops = copy.deepcopy(tokenizer_of("BPE"))
    drops.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ValueError, match="must split a text always alike, got a dropout of merges of 0.1"):
        trim_vocabulary(model, drops, TEXTS)


def test_models_without_plain_embeddings_are_refused():
    tokenizer = tokenizer_of()
    with pytest.raises(ValueError, match="`model` must read token ids, got ViTModel"):
        trim_vocabulary(make_model("vit"), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="must hold plain weights, got the form 'mpo'"):
        trim_vocabulary(compress_mpo(model_of("bert"), num_cores=3), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="must be a model of transformers, got Linear"):
        trim_vocabulary(torch.nn.Linear(1, 1), tokenizer, TEXTS)
    odd = copy.deepcopy(model_of("bert"))
    odd.config.vocab_size += 1
    with pytest.raises(ValueError, match="`vocab_size` of the configuration must be that of the word embeddings"):
        trim_vocabulary(odd, tokenizer, TEXTS)
