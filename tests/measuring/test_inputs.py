"""Models that need more than ids are measured without data, too."""

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_moebert import DistillationConfig, DistillationTrainer
from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.measuring.sparse_forms import compare_sparse_forms
from hf_moebert.methods.masked_crf import from_dense


TAGS = {"id2label": {0: "O", 1: "B-X", 2: "I-X"}, "vocab_size": 30}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, **TAGS}
TAGGERS = {
    "bert": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "distilbert": lambda: DistilBertForTokenClassification(
        DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, **TAGS)
    ),
}


def pad(rows):
    """Make a batch of rows of several lengths."""
    fills = {"input_ids": 0, "labels": -100}
    return {name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill) for name, fill in fills.items()}


@pytest.fixture(params=TAGGERS)
def tagger(request):
    """A tagger with a CRF, and the dense one."""
    torch.manual_seed(0)
    dense = TAGGERS[request.param]().eval()
    return from_dense(dense), dense


def test_a_crf_runs_on_words_and_a_decoder_on_ids(tagger):
    ids = torch.ones(2, 3, dtype=torch.long)
    assert complete_inputs(tagger[1], ids).keys() == {"input_ids"}
    assert complete_inputs(tagger[0], ids)["word_mask"].tolist() == ids.tolist()
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
    assert complete_inputs(t5, ids).keys() == {"input_ids", "decoder_input_ids"}


def test_a_crf_has_a_footprint(tagger):
    with_crf, dense = (measure_footprint(model) for model in tagger)
    assert with_crf.total > dense.total
    assert with_crf.flops_per_token >= dense.flops_per_token > 0


def test_sparse_forms_of_a_crf_are_timed(tagger):
    model, _ = tagger
    with torch.no_grad():
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:, ::2] = 0
    assert compare_sparse_forms(model, batch=1, seq=8, rounds=2)


@pytest.mark.parametrize("tagger", ["bert"], indirect=True)
def test_a_crf_teaches(tagger, tmp_path):
    teacher, student = tagger
    texts, tags = [[3, 4, 5], [6, 7]], [[0, -100, 1], [2, 0]]
    rows = Dataset.from_dict({"input_ids": texts, "labels": tags})
    trainer = DistillationTrainer(
        student,
        teacher=teacher,
        distillation=DistillationConfig(),
        args=TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=rows,
        data_collator=pad,
    )
    assert trainer.train().training_loss > 0
