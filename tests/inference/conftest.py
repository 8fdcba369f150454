"""Exports that several tests share: each takes seconds."""

import pytest
from tiny_exports import PRECISIONS, TEXTS, make, make_tokenizer
from transformers import BertForSequenceClassification, BertModel

from hf_moebert import export_onnx
from hf_moebert.architectures.pooling import EmbeddingForm


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A classifier, its tokenizer, the folder of its export, and what was written down."""
    model, tokenizer = make(BertForSequenceClassification), make_tokenizer()  # in training mode, which stays
    folder = tmp_path_factory.mktemp("onnx") / "new" / "graphs"
    manifest = export_onnx(model, folder, precisions=PRECISIONS, tokenizer=tokenizer, texts=TEXTS)
    assert model.training
    return model.eval(), tokenizer, folder, manifest


@pytest.fixture(scope="session")
def reranker(tmp_path_factory):
    """A model of one score, its tokenizer, and the folder of its export."""
    model, tokenizer = make(BertForSequenceClassification, num_labels=1).eval(), make_tokenizer()
    folder = tmp_path_factory.mktemp("reranker") / "graphs"
    export_onnx(model, folder, tokenizer=tokenizer)
    return model, tokenizer, folder


@pytest.fixture(scope="session")
def embedder(tmp_path_factory):
    """A model without head, its tokenizer, the form of its embeddings, and the folder of its export."""
    model, tokenizer = make(BertModel).eval(), make_tokenizer()
    form = EmbeddingForm("mean", normalize=True, prompts={"query": "good "}, max_length=8)
    folder = tmp_path_factory.mktemp("embedder") / "graphs"
    export_onnx(model, folder, precisions=PRECISIONS, tokenizer=tokenizer, texts=TEXTS, form=form)
    return model, tokenizer, form, folder
