"""The importance of neurons without labels, against the exact Jacobian, and the exact mean over all labels."""

import math
from itertools import product

import pytest
import torch
from test_architecture_importance import build, collate, make_examples
from tiny_families import make_model
from transformers import AutoModelForSequenceClassification

from hf_moebert import measure_importance
from hf_moebert.architectures.functional_importance import draw_classes
from hf_moebert.architectures.functional_pooling import pool, unit_length
from hf_moebert.architectures.surgery import find_feed_forwards, matrix_of


DRAWS = 1000


def without(examples):
    return [
        {name: value for name, value in e.items() if "labels" not in name and "positions" not in name}
        for e in examples
    ]


def jacobian_norms(model, example, pooling):
    """For every neuron the length of the derivative of the embedding by a factor on all its weights."""
    networks, squares = find_feed_forwards(model), 0.0
    states = model(**collate([example])).last_hidden_state
    for value in unit_length(pool(states, None, pooling))[0]:
        model.zero_grad()
        value.backward(retain_graph=True)
        rows = []
        for network in networks:
            total = 0.0
            for name in network.paths.matrices:
                linear = network.part(name)
                terms = linear.weight.detach() * linear.weight.grad
                terms = terms if matrix_of(linear) is linear.weight else terms.T  # (out, in)
                terms = terms.sum(dim=0) if name == "down" else terms.sum(dim=1)
                total = total + terms.unflatten(0, (-1, network.num_units)).sum(dim=0)
            rows.append(total)
        squares = squares + torch.stack(rows).square()
    return squares.sqrt()


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("modernbert", "cls"), ("gpt2", "last")])
def test_projections_have_the_mean_of_the_exact_jacobian(family, pooling):
    model, (example,) = make_model(family).double(), without(make_examples("classes", count=1))
    wanted = jacobian_norms(model, example, pooling) * math.sqrt(2 / math.pi)  # the mean of |normal| times the length
    found = measure_importance(model, [example] * DRAWS, collate, batch_size=500, pooling=pooling) / DRAWS
    torch.testing.assert_close(found, wanted, rtol=0.12, atol=0)
    assert found.sum().item() == pytest.approx(wanted.sum().item(), rel=0.05)


def classifier(labels, problem_type):
    fields = {"num_labels": labels, "problem_type": problem_type}
    return make_model("bert", auto=AutoModelForSequenceClassification, **fields).double()


def mean_over_labels(model, example, problem_type):
    logits = model(**collate([example])).logits[0].detach()
    if problem_type == "regression":  # |d/ds (s - y)^2| = 2 |s - y|, and s - y is normal; a label of s - 1/2 has 1
        scores = measure_importance(model, [example | {"labels": logits - 0.5}], collate)
        return scores * 2 * math.sqrt(2 / math.pi)
    if problem_type == "single_label_classification":
        labels = {torch.tensor(label): share for label, share in enumerate(logits.softmax(-1))}
    else:
        shares = torch.stack([1 - logits.sigmoid(), logits.sigmoid()])
        kinds = product((0, 1), repeat=len(logits))
        labels = {torch.tensor(kind, dtype=torch.double): shares[kind, range(len(kind))].prod() for kind in kinds}
    return sum(share * measure_importance(model, [example | {"labels": y}], collate) for y, share in labels.items())


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_drawn_labels_have_the_mean_over_all_labels(problem_type):
    model = classifier(1 if problem_type == "regression" else 3, problem_type)
    (example,) = without(make_examples("classes", count=1))
    wanted = mean_over_labels(model, example, problem_type)
    found = measure_importance(model, [example] * DRAWS, collate, batch_size=500, labels=False) / DRAWS
    assert found.sum().item() == pytest.approx(wanted.sum().item(), rel=0.05)
    torch.testing.assert_close(found, wanted, rtol=0.15, atol=0.02 * float(wanted.max()))


def test_classes_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, 0.0, -1.0])
    drawn = draw_classes(logits.expand(10_000, 3), torch.arange(10_000) / 10_000)
    torch.testing.assert_close(drawn.bincount() / 10_000, logits.softmax(-1), atol=1e-3, rtol=0)
    assert draw_classes(torch.zeros(2, 3), torch.tensor([0.0, 1.0])).tolist() == [0, 2]


CASES = [("bert", head) for head in ("classes", "tokens", "spans", "masked")]
CASES += [("t5", "targets"), ("bart", "targets"), ("gpt2", "next"), ("vit", "images"), ("gpt2", "tokens")]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_what_is_drawn_depends_on_the_example_alone(family, head):
    model, examples = build(family, head).double(), make_examples(head)
    if head != "targets":  # whose decoder is given what the labels say
        examples = without(examples)
    whole, parts = (measure_importance(model, examples, collate, batch_size=n, labels=False) for n in (5, 2))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5 * float(whole.max()))
    assert whole.gt(0).any(dim=1).all()
    other = measure_importance(model, examples, collate, labels=False, seed=1)
    assert not torch.allclose(other, whole, rtol=0.01)


def test_embedders_are_measured_alike_whatever_the_batch_and_the_labels():
    model, examples = make_model("bert").double(), make_examples("classes")
    whole = measure_importance(model, examples, collate, pooling="mean")
    parts = measure_importance(model, without(examples), collate, pooling="mean", batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6 * float(whole.max()))


def test_what_cannot_be_measured_without_labels_is_refused():
    examples = without(make_examples("classes"))
    with pytest.raises(
        ValueError, match="`pooling` must be given for a BertModel without head, one of mean, cls, last"
    ):
        measure_importance(make_model("bert"), examples, collate)
    with pytest.raises(ValueError, match="`pooling` must be one of mean, cls, last, got 'max'"):
        measure_importance(make_model("bert"), examples, collate, pooling="max")
    with pytest.raises(ValueError, match="`pooling` must be None for a model with a head, got 'mean'"):
        measure_importance(build("bert", "classes"), examples, collate, pooling="mean", labels=False)
    with pytest.raises(ValueError, match=r"`model` must be an encoder, or have a head .* got T5Model"):
        measure_importance(make_model("t5"), examples, collate, pooling="mean")
    with pytest.raises(ValueError, match="must have labels, got the columns .* with `labels=False`"):
        measure_importance(build("bert", "classes"), examples, collate)
    with pytest.raises(ValueError, match="`dataset` must have `decoder_input_ids` or `labels` for a T5For"):
        measure_importance(build("t5", "targets"), without(make_examples("targets")), collate, labels=False)
