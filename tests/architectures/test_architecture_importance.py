"""The importance of neurons against its definition, on every kind of network and head."""

import pytest
import torch
from tiny_families import GATED, IMAGES, LAYERS, UNITS, VOCAB, make_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_moebert import measure_importance
from hf_moebert.architectures import functional_importance
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.surgery import find_feed_forwards, matrix_of


HEADS = {
    "classes": AutoModelForSequenceClassification,
    "images": AutoModelForImageClassification,
    "tokens": AutoModelForTokenClassification,
    "spans": AutoModelForQuestionAnswering,
    "next": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "targets": AutoModelForSeq2SeqLM,
}
CASES = [  # plain and gated, `Conv1D`, fused, shared by layers, tokens in one dimension, two stacks
    *(("bert", head) for head in ("classes", "tokens", "spans", "masked")),
    *(("modernbert", head) for head in ("classes", "masked")),
    *((family, "targets") for family in ("t5", "t5 gated", "bart")),
    *((family, "images") for family in (*IMAGES, "dinov2 gated")),
    ("distilbert", "spans"),
    ("gpt2", "tokens"),
    ("t5", "classes"),
]
ONE_STACK = {family for family, row in ARCHITECTURES.items() if len(row.stacks) == 1}
CASES += [(family, "next") for family in ("gpt2", "llama", "opt", "bloom", "gpt_neox", "phi", "gemma3_text")]
CASES += [(family, "tokens") for family in sorted(ONE_STACK.difference(IMAGES, (family for family, _ in CASES)))]


def build(family, head, **fields):
    labels = {} if head in ("next", "masked", "targets", "spans") else {"num_labels": 3}
    gated = GATED.get(family, {})
    return make_model(family.split()[0], auto=HEADS[head], **labels, **gated, **fields)


def make_examples(head, count=5):
    generator = torch.Generator().manual_seed(3)
    examples = []
    for number in range(count):
        length = 4 + number % 3
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if head == "images":
            example = {"pixel_values": torch.randn(3, 8, 8, generator=generator).double()}
        if head in ("classes", "images"):
            example["labels"] = torch.tensor(number % 3)
            ids[-1] = 2  # T5 reads the class off the end
        elif head == "spans":
            example |= {"start_positions": torch.tensor(1), "end_positions": torch.tensor(length - 1)}
        elif head == "targets":
            example["labels"] = torch.randint(3, VOCAB, (2 + number % 2,), generator=generator)
        else:
            example["labels"] = torch.where(ids % 5 == 0, -100, ids % 3 if head == "tokens" else ids)
        examples.append(example)
    return examples


def collate(examples):
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        fill = -100 if name == "labels" else 0
        batch[name] = (
            pad_sequence(values, batch_first=True, padding_value=fill) if values[0].dim() == 1 else torch.stack(values)
        )
    return batch


def by_definition(model, examples):
    """The score as it is written: one backward of the stock loss per example, weights times their gradients."""
    networks = find_feed_forwards(model)
    scores = torch.zeros(len(networks), networks[0].num_units, dtype=model.dtype)
    for example in examples:
        model.zero_grad()
        model(**collate([example])).loss.backward()
        for score, network in zip(scores, networks, strict=True):
            products = 0
            for name in network.paths.matrices:
                linear = network.part(name)
                product = linear.weight.detach() * linear.weight.grad
                product = product if matrix_of(linear) is linear.weight else product.T  # (out, in)
                product = product.sum(dim=0) if name == "down" else product.sum(dim=1)
                products = products + product.unflatten(0, (-1, network.num_units)).sum(dim=0)
            score += products.abs()
    return scores


@pytest.mark.parametrize(("family", "head"), CASES)
def test_importance_equals_its_definition(family, head):
    model, examples = build(family, head).double(), make_examples(head)
    wanted = by_definition(model, examples)
    assert (wanted > 0).any(dim=1).all()
    for batch_size in (2, 5):
        scores = measure_importance(model, examples, collate, batch_size=batch_size)
        # transformers computes some normalisations and losses in single precision
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_both_stacks_are_scored_in_their_order():
    model, examples = build("t5", "targets"), make_examples("targets")
    scores = measure_importance(model, examples, collate)
    assert scores.shape == (2 * LAYERS, UNITS)
    with torch.no_grad():
        model.decoder.block[1].layer[2].DenseReluDense.wo.weight[:, 3] = 0
    assert measure_importance(model, examples, collate)[:, 3].eq(0).tolist() == [False, False, False, True]


def test_signs_of_examples_do_not_cancel():
    model = build("bert", "classes", num_hidden_layers=1)
    one = make_examples("classes", count=1)[0]
    both = [one | {"labels": torch.tensor(label)} for label in (0, 1)]
    apart = sum(measure_importance(model, [example], collate) for example in both)
    torch.testing.assert_close(measure_importance(model, both, collate), apart)


def test_the_model_is_left_as_it_was():
    model = build("llama", "next").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examples = make_examples("next")
    one = measure_importance(model, examples, collate)
    assert torch.equal(one, measure_importance(model, examples, collate))
    outside = [example | {"input_ids": example["input_ids"] + VOCAB} for example in examples]
    with pytest.raises(ValueError, match="`input_ids` must be in"):
        measure_importance(model, outside, collate)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_measured_in_single():
    examples = make_examples("next")
    half = measure_importance(build("llama", "next").bfloat16(), examples, collate)
    assert half.dtype == torch.float32
    whole = measure_importance(build("llama", "next").bfloat16().float(), examples, collate)
    assert torch.equal(half, whole)


def test_what_cannot_be_measured_is_refused():
    model, examples = build("llama", "next"), make_examples("next")
    with pytest.raises(ValueError, match="`dataset` is empty"):
        measure_importance(model, [], collate)
    unlabelled = [{name: value for name, value in e.items() if name != "labels"} for e in examples]
    with pytest.raises(ValueError, match=r"must have labels, got the columns \['attention_mask', 'input_ids'\]"):
        measure_importance(model, unlabelled, collate)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"importance of layers \[0, 1\] is not finite"):
        measure_importance(model, examples, collate)
    find_feed_forwards(model)[0].replace_in(model, torch.nn.Identity())
    with pytest.raises(ValueError, match="must be a plain Linear or Conv1D, got nothing"):
        measure_importance(model, examples, collate)


def test_the_closed_form_example():
    # One input x=2, two neurons, identity activation: h=(2.5, -2), y=-3.5, L=y^2/2, so the scores are |7.5y+...|.
    w1, b1, w2 = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -1.0], [0.5, 0.0], [1.0, 3.0]))
    z = (2 * w1 + b1).view(1, 1, 2).requires_grad_()
    h = z * 1
    loss = (h @ w2).square().sum() / 2
    grad_z, grad_h = torch.autograd.grad(loss, (z, h))
    products = [
        functional_importance.weights_times_gradients(values.detach(), grad, bias, 1)
        for values, grad, bias in ((z, grad_z, b1), (h, grad_h, None))
    ]
    score = functional_importance.neuron_importance(products, 2)
    torch.testing.assert_close(score, torch.tensor([15.75, 42.0], dtype=torch.float64), rtol=0, atol=0)
