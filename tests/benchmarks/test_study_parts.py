"""The parts of the studies: what they read, plan, train by and score."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from mask_runs import MaskOptions, plan_masks, read_rows
from masked_crf_ner import Method, TaggingOptions, TaggingStudy
from mixture_of_masks_generation import MaskStudy
from quality_and_speed import halve_depth
from smoke import make_smoke_tags
from study import make_optimizer
from tasks import TaggingArguments, TaggingTask
from tiny_language import make_task
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_moebert import CrfForTokenClassification, MaskSparsityConfig
from hf_moebert.data.questions import find_answer
from hf_moebert.measuring.metrics.seqeval.seqeval import count_illegal
from hf_moebert.measuring.predictions import best_spans
from hf_moebert.methods.mpoe import MPOEGPT2LMHeadModel, MPOET5ForConditionalGeneration


def test_answers_are_the_best_legal_spans():
    logits = torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(0))
    context = torch.tensor([[2, 7], [3, 3], [1, 8], [0, 4], [6, 7]] * 10)
    spans = best_spans(*logits, context, max_tokens=3).tolist()
    for row, (first, last) in enumerate(context.tolist()):
        legal = [(start, end) for end in range(first, last + 1) for start in range(max(first, end - 2), end + 1)]
        start, end = logits[:, row].tolist()
        assert tuple(spans[row]) == max(legal, key=lambda span: start[span[0]] + end[span[1]])


@pytest.mark.parametrize(
    ("start", "text", "tokens"),
    [(0, "The", (3, 3)), (4, "box 17", (4, 5)), (8, "17 ", (5, 5)), (8, "17 coins", (0, 0)), (11, "coins", (0, 0))],
)
def test_answers_are_found_among_the_tokens_unless_they_were_cut_off(start, text, tokens):
    offsets = [(0, 0), (0, 3), (0, 0), (0, 3), (4, 7), (8, 10), (0, 0)]  # a question, and "The box 17" of a context
    assert find_answer(offsets, [3, 4, 5], start, text) == tokens


def test_half_of_the_depth_is_every_second_layer_and_the_last():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 7}
    teacher = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=6)).eval()
    student = halve_depth(teacher)
    ids = torch.arange(7)[None]  # (batch, seq)
    states = teacher.bert.embeddings(ids)  # (batch, seq, hidden)
    for number in (1, 3, 5):
        states = teacher.bert.encoder.layer[number](states)  # (batch, seq, hidden)
    torch.testing.assert_close(student(ids).logits, teacher.classifier(teacher.bert.pooler(states)))
    assert (student.config.num_hidden_layers, teacher.config.num_hidden_layers) == (3, 6)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_losses_of_blocks_are_those_of_the_model(tmp_path, kind):
    task = make_task(tmp_path, kind, labelled=False, max_validation_blocks=3)
    dense = task.new_model().eval()
    model = {"gpt2": MPOEGPT2LMHeadModel, "t5": MPOET5ForConditionalGeneration}[kind].from_dense(dense, num_experts=2)
    ids = torch.tensor(task.validation["input_ids"])  # (blocks, tokens)
    assert ids.shape == (3, 16 if kind == "gpt2" else 8)
    expected = [
        dense(input_ids=row[None], labels=torch.tensor([task.validation[n]["labels"]])).loss
        for n, row in enumerate(ids)
    ]
    assert task.predict(dense) == pytest.approx(torch.stack(expected).tolist(), rel=1e-5)
    assert task.predict(model) == pytest.approx(torch.stack(expected).tolist(), rel=1e-4)
    load = np.array(task.measure_load(model))
    assert load.shape == (2, 2)
    np.testing.assert_allclose(load.sum(axis=1), 1)


@pytest.mark.process
def test_masks_of_an_encoder_decoder_that_is_taught(tmp_path):
    task = make_task(tmp_path, "t5", labelled=False, layers=2, max_validation_blocks=3)
    args = TrainingArguments(output_dir=tmp_path, max_steps=4, logging_steps=1, use_cpu=True, save_strategy="no")
    options = MaskOptions(kinds=["masks", "importance"], taught=True, importance_batches=1)
    study = MaskStudy(task, args, options, MaskSparsityConfig(ramp_share=0.25, learn_share=0.5))
    study.make_all([study.first, study.dense, study.plan("masks", 0.5), study.plan("importance", 0.5)], [0])
    start, ours = (study.load(name, 0).state_dict() for name in ("start", "dense"))
    given = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").state_dict()
    assert all(start[name].equal(tensor) for name, tensor in given.items())  # no step was made
    assert not all(ours[name].equal(tensor) for name, tensor in given.items())
    taught, split = (study.result(name, 0) for name in ("masks-0.5", "importance-0.5"))
    assert all("loss_prediction" in entry for entry in (*taught["log"][:4], *split["log"][:4]))
    assert np.shape(taught["load"]) == np.shape(split["load"]) == (4, 4)
    assert split["used"] == pytest.approx([0.5] * 4)  # every expert has that many units
    assert np.mean(taught["used"]) == pytest.approx(0.5, abs=0.02)


def test_all_rows_are_read_before_one_comes_again():
    def read(count, seed):
        return list(read_rows(Dataset.from_dict({"n": range(10)}), count, seed=[seed])["n"])

    whole = read(25, 3)
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert read(12, 3) == whole[:12]
    assert read(10, 4) != whole[:10]


def test_one_shot_splits_read_the_matrices_that_they_should():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, initializer_range=0.5))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:4, 0] += 9
            layer.mlp.gate_proj.weight[4:, 0] -= 9
            layer.mlp.down_proj.weight[:, [1, 6]] = 0  # units without effect
    ids = torch.arange(20).view(2, 10)
    examples = [{"input_ids": row, "labels": row} for row in ids]

    def plan(kind, experts, ratio):
        return plan_masks(
            kind, model, examples, num_experts=experts, keep_ratio=ratio, seed=0
        ).int()  # (2, experts, 8)

    for clusters in plan("clustered", 2, 0.5):
        assert sorted(clusters.tolist()) == [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert plan("magnitude", 1, 0.75).tolist() == [[[1, 0, 1, 1, 1, 1, 0, 1]]] * 2
    important = plan("importance", 2, 0.75).sum(dim=1)  # experts that hold a unit, (2, 8)
    assert important[:, [1, 6]].tolist() == [[1, 1], [1, 1]]
    assert important.sum(dim=1).tolist() == [12, 12]
    assert plan("random", 4, 0.5).sum(dim=-1).tolist() == [[4] * 4] * 2


def test_masked_crf_ner_on_any_encoder(tmp_path):
    arguments = TaggingArguments()
    make_smoke_tags(arguments, tmp_path)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}
    words = len(AutoTokenizer.from_pretrained(tmp_path))
    DistilBertModel(DistilBertConfig(vocab_size=words, **sizes)).save_pretrained(tmp_path)
    args = TrainingArguments(output_dir=tmp_path, learning_rate=1e-4, weight_decay=0.1, use_cpu=True)
    task = TaggingTask(arguments, seed=0)
    model = TaggingStudy(task, args, TaggingOptions()).start(Method("masked", kind="masked-training"), 0)
    assert isinstance(model, CrfForTokenClassification)
    sentences = task.predict(model)
    guesses, truth = [sentence["tags"] for sentence in sentences], task.true_tags(task.validation)
    assert [len(tags) for tags in guesses] == [len(tags) for tags in truth] == [len(s["shares"]) for s in sentences]
    assert len({tag for tags in guesses for tag in tags}) > 1
    assert count_illegal(guesses, "IOB2") == 0
    groups = make_optimizer(model, args, part="crf.", rate=0.5).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-4, 0.1), (1e-4, 0), (0.5, 0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in model.crf.parameters()}
