"""Folders of sentence-transformers: what comes in goes out, and the library itself says that it is the same."""

import json

import numpy as np
import pytest
import torch
from tiny_classifiers import WORDS, save_classifier
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from hf_moebert import EmbeddingForm, prune_structured, save_embedder
from hf_moebert.architectures.functional_pooling import pool, unit_length
from hf_moebert.architectures.pooling import read_embedding_form


TEXTS = ["a good film", "very bad", "not a bad film at all", "good"]
FORMS = [
    EmbeddingForm(pooling="mean", normalize=True, max_length=8),
    EmbeddingForm(pooling="cls", prompts={"query": "good ", "passage": "bad "}, default_prompt="query"),
    EmbeddingForm(pooling="last", normalize=True, prompts={"query": "very "}),
]


@pytest.fixture
def embedder():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(special + WORDS)}, model_max_length=16)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, initializer_range=1.0, **sizes)
    return BertModel(config).eval(), tokenizer


def embed(folder, texts=TEXTS):
    """Embed texts as a folder says, without sentence-transformers."""
    form, model, tokenizer = (
        read_embedding_form(folder),
        AutoModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer(
        [form.prefix + text for text in texts],
        padding=True,
        truncation=True,
        max_length=form.max_length,
        return_tensors="pt",
    )
    with torch.no_grad():
        pooled = pool(model(**inputs).last_hidden_state, inputs["attention_mask"], form.pooling)
    return (unit_length(pooled) if form.normalize else pooled).numpy()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.pooling)
@pytest.mark.filterwarnings("error:.*deprecated")
def test_sentence_transformers_loads_what_was_saved(embedder, tmp_path, form):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save_embedder(*embedder, tmp_path / "first", form)
    library = sentence_transformers.SentenceTransformer(str(tmp_path / "first"), device="cpu")
    np.testing.assert_allclose(library.encode(TEXTS), embed(tmp_path / "first"), atol=1e-5)
    assert library.prompts.items() >= form.prompts.items()
    assert read_embedding_form(tmp_path / "first") == form
    library.save_pretrained(str(tmp_path / "second"))  # in the words of its own release
    again = read_embedding_form(tmp_path / "second")
    assert (again.pooling, again.normalize, again.default_prompt) == (
        form.pooling,
        form.normalize,
        form.default_prompt,
    )
    np.testing.assert_allclose(embed(tmp_path / "second"), embed(tmp_path / "first"), atol=1e-6)


def test_a_compressed_embedder_keeps_the_form_of_the_folder_it_came_from(embedder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save_embedder(*embedder, tmp_path / "dense", FORMS[0])
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "dense"), embedder[1]
    small = prune_structured(model, TEXTS * 8, tokenizer, keep_ratio=0.5)
    save_embedder(small, tokenizer, tmp_path / "small")
    assert read_embedding_form(tmp_path / "small") == FORMS[0]
    library = sentence_transformers.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert library[0].auto_model.num_parameters() == small.num_parameters() < model.num_parameters()
    np.testing.assert_allclose(library.encode(TEXTS), embed(tmp_path / "small"), atol=1e-5)


def test_a_compressed_reranker_is_a_cross_encoder(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = save_classifier(tmp_path / "dense", labels=("score",))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    small = prune_structured(model, TEXTS * 8, tokenizer, keep_ratio=0.5)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    pairs = [("good film", text) for text in TEXTS]
    inputs = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = small(**inputs).logits.squeeze(-1).sigmoid().numpy()
    library = sentence_transformers.CrossEncoder(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(library.predict(pairs), expected, atol=1e-5)


def test_what_has_no_form_is_refused(embedder, tmp_path):
    model, tokenizer = embedder
    with pytest.raises(ValueError, match="`form` must be given: '' has no modules.json"):
        save_embedder(model, tokenizer, tmp_path / "none")
    with pytest.raises(ValueError, match="`pooling` must be one of mean, cls, last, got 'max'"):
        save_embedder(model, tokenizer, tmp_path / "none", EmbeddingForm(pooling="max"))
    with pytest.raises(ValueError, match="`model` must have no head to give embeddings, got BertForSequence"):
        save_embedder(save_classifier(tmp_path / "head"), tokenizer, tmp_path / "none", FORMS[0])
    assert not (tmp_path / "none").exists()
    save_embedder(model, tokenizer, tmp_path, FORMS[0])
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "Transformer"}]))
    with pytest.raises(ValueError, match="must list modules by type and path"):
        read_embedding_form(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="modules.json of .* must be JSON"):
        read_embedding_form(tmp_path)
