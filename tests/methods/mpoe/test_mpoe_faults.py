"""Refusals of the models, and inputs at the edge."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mpoe import CLASSES, KINDS, VOCAB, make, make_batch, make_dense
from transformers import T5Config, T5ForSequenceClassification, T5Model

from hf_moebert.methods.mpoe import from_dense


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_gives_no_loss_and_no_nan(kind):
    model = make(kind, router="switch").train()
    batch = make_batch(kind, labels=True)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    model.config.router_aux_loss_coef = 0
    output = model(**batch)
    assert output.loss == 0
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_inputs_are_refused(kind):
    model, batch = make(kind), make_batch(kind, labels=True)
    for name, value, text in (
        ("input_ids", VOCAB, rf"`input_ids` must be in \[0, {VOCAB}\), got {VOCAB}"),
        ("input_ids", -1, r"`input_ids` must be in"),
        ("labels", 99, r"`labels` must be in \[0, \d+\) or -100, got 99"),
    ):
        wrong = batch[name].clone()
        wrong.flatten()[1] = value
        with pytest.raises(ValueError, match=text):
            model(**batch | {name: wrong})
    with pytest.raises(ValueError, match="must be integers"):
        model(**batch | {"input_ids": batch["input_ids"].float()})
    for shape in ((0, 7), (2, 0)):
        with pytest.raises(ValueError, match="`input_ids` must hold one row and one id or more"):
            model(input_ids=torch.zeros(shape, dtype=torch.long))
    if not kind.startswith("t5"):
        long = {"input_ids": torch.ones(1, 33, dtype=torch.long)}
        with pytest.raises(ValueError, match="must have 1 to 32 tokens, got 33"):
            model(**long)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="must be dense and have the architecture 't5', got 'bert'"):
        CLASSES["t5"].from_dense(make_dense("bert"))
    with pytest.raises(ValueError, match="must be dense and have the architecture 't5', got 'mpoe_t5'"):
        CLASSES["t5"].from_dense(make("t5"))
    with pytest.raises(ValueError, match="`noise` must be finite"):
        make("t5", noise=-1)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB}
    for wrong in (T5ForSequenceClassification(T5Config(**sizes)), T5Model(T5Config(**sizes))):
        with pytest.raises(ValueError, match=f"must be a T5ForConditionalGeneration, .* got {type(wrong).__name__}"):
            CLASSES["t5"].from_dense(wrong)
        with pytest.raises(
            ValueError, match=f"must be one of BertFor.*, GPT2LM.*, T5For.*, got {type(wrong).__name__}"
        ):
            from_dense(wrong)
    with pytest.raises(ValueError, match="must be dense and have the architecture 'bert', got 'mpoe_bert'"):
        from_dense(make("bert"))
    broken = make_dense("gpt2")
    with torch.no_grad():
        broken.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must hold finite values"):
        CLASSES["gpt2"].from_dense(broken)
    model = make("bert")
    model.config.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="`chunk_size_feed_forward` must be 0"):
        CLASSES["bert"](model.config)


def test_experts_are_never_made_up(tmp_path):
    model = make("t5")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if ".centres." in name)
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"not so for {lost}"):
        CLASSES["t5"].from_pretrained(tmp_path)
    save_file(state | {lost: state[lost] * float("nan")}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="must hold finite weights"):
        CLASSES["t5"].from_pretrained(tmp_path)


def test_experts_of_other_sizes_are_not_made_up(tmp_path):
    make("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold all weights of .* not so for .*auxiliary"):
        CLASSES["bert"].from_pretrained(tmp_path, num_experts=6, ignore_mismatched_sizes=True)
