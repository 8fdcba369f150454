from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, DataCollatorWithPadding

from hf_moebert.measuring.metrics import load_metric
from hf_moebert.measuring.metrics.seqeval.seqeval import count_spans, span_f1
from hf_moebert.measuring.predictions import predict_logits
from hf_moebert.measuring.scores import (
    SPAN_SCORES,
    Interval,
    bootstrap_interval,
    paired_bootstrap,
    score,
    tags_of,
)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def collator():
    return DataCollatorWithPadding(BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL)}))


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(0)
    ids = [generator.integers(5, 50, size=size).tolist() for size in generator.integers(3, 20, size=23)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids], "labels": [0] * 23})


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return BertForSequenceClassification(config)


def one_by_one(model, dataset):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in dataset]).numpy()


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_logits_equal_those_of_single_unpadded_examples_in_order(model, dataset, collator, batch_size):
    logits = predict_logits(model, dataset, data_collator=collator, batch_size=batch_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, one_by_one(model, dataset), atol=1e-6)
    assert len(np.unique(logits, axis=0)) == 23


def test_no_more_is_padded_than_sorting_needs(model, dataset, collator):
    tokens = []

    def count(rows):
        batch = collator(rows)
        tokens.append(batch["input_ids"].numel())
        assert "labels" not in batch
        return batch

    predict_logits(model, dataset, data_collator=count, batch_size=4)
    lengths = sorted((len(ids) for ids in dataset["input_ids"]), reverse=True)
    assert sum(tokens) == sum(lengths[i] * len(lengths[i : i + 4]) for i in range(0, 23, 4))


def test_modes_and_gradients_are_left_as_they_were(model, dataset, collator):
    model.train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    dropped = predict_logits(model, dataset, data_collator=collator)
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    np.testing.assert_array_equal(dropped, predict_logits(model, dataset, data_collator=collator))


def test_modes_are_restored_after_a_failure(model, dataset, collator):
    model.train()
    too_long = Dataset.from_dict({"input_ids": [[5] * 600], "attention_mask": [[1] * 600]})
    with pytest.raises(RuntimeError):
        predict_logits(model, too_long, data_collator=collator)
    assert all(module.training for module in model.modules())


def test_inputs_that_cannot_be_predicted_are_refused(model, dataset, collator):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        predict_logits(model, dataset, data_collator=collator, batch_size=0)
    with pytest.raises(ValueError, match="encoded examples with 'input_ids', got 0"):
        predict_logits(model, dataset.select([]), data_collator=collator)
    with pytest.raises(ValueError, match=r"got 1 with the columns \['text'\]. Use `encode_text`"):
        predict_logits(model, Dataset.from_dict({"text": ["x"]}), data_collator=collator)


def test_logits_of_tokens_are_refused(dataset, collator):
    class TokenLogits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 4)

        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"logits": self.embedding(input_ids)})

    with pytest.raises(ValueError, match=r"must return logits of shape \(batch, labels\), got \(23, 19, 4\)"):
        predict_logits(TokenLogits(), dataset, data_collator=collator)


def agreement(predictions, references):
    return float(np.mean(predictions == references))


def test_interval_covers_the_truth_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    truth, trials, hits = 0.7, 300, 0
    for seed in range(trials):
        right = generator.random(200) < truth
        interval = bootstrap_interval(agreement, right, np.ones(200), rounds=200, confidence=0.9, seed=seed)
        hits += interval.low <= truth <= interval.high
    # the share covered has a standard error of sqrt(0.9 * 0.1 / 300) = 0.017
    assert hits / trials == pytest.approx(0.9, abs=0.05)


def test_interval_of_a_binomial_has_its_width():
    right = np.arange(1000) < 800
    interval = bootstrap_interval(agreement, right, np.ones(1000), rounds=4000)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert interval.value == 0.8
    assert (interval.low, interval.high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.003)


def test_resampling_depends_on_its_seed_only():
    guess, truth = np.random.default_rng(0).integers(2, size=(2, 101))
    first = bootstrap_interval(agreement, guess, truth, rounds=50)
    np.random.default_rng(1).random(7)
    torch.manual_seed(3)
    assert bootstrap_interval(agreement, guess, truth, rounds=50) == first
    assert bootstrap_interval(agreement, guess, truth, rounds=50, seed=1) != first
    with pytest.raises(FrozenInstanceError):
        first.value = 1.0


def test_identical_predictions_differ_by_exactly_nothing():
    guess, truth = np.random.default_rng(0).integers(2, size=(2, 100))
    assert paired_bootstrap(agreement, guess, guess.copy(), truth, rounds=100) == Interval(0.0, 0.0, 0.0)


def test_pairs_share_their_resamples():
    truth = np.random.default_rng(0).integers(2, size=500)
    better = np.where(np.arange(500) < 400, truth, 1 - truth)
    worse = np.where(np.arange(500) < 380, truth, 1 - truth)
    paired = paired_bootstrap(agreement, better, worse, truth)
    swapped = paired_bootstrap(agreement, worse, better, truth)
    # they differ on 20 examples of 500: a binomial of p = 0.04, half as wide as either score's own interval
    half = 1.96 * np.sqrt(0.04 * 0.96 / 500)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.04, 0.04 - half, 0.04 + half), abs=0.004)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-paired.value, -paired.high, -paired.low))


def test_resampling_refuses_what_it_cannot_pair():
    ones = np.ones(4)
    with pytest.raises(ValueError, match="one length above 0, got {'predictions': 3, 'references': 4}"):
        bootstrap_interval(agreement, ones[:3], ones)
    with pytest.raises(ValueError, match="one length above 0"):
        bootstrap_interval(agreement, ones[:0], ones[:0])
    with pytest.raises(ValueError, match="'predictions_a': 4, 'predictions_b': 3"):
        paired_bootstrap(agreement, ones, ones[:3], ones)
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        bootstrap_interval(agreement, ones, ones, rounds=0)
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\), got 95"):
        bootstrap_interval(agreement, ones, ones, confidence=95)


def test_classes_are_scored_by_their_largest_logit():
    generator = np.random.default_rng(0)
    logits, truth = generator.normal(size=(300, 2)), generator.integers(2, size=300)
    guess = logits.argmax(1)
    found = score(["accuracy", "f1", "matthews_correlation"], logits, truth, rounds=50)
    assert {name: interval.value for name, interval in found.items()} == {
        "accuracy": accuracy_score(truth, guess),
        "f1": f1_score(truth, guess),
        "matthews_correlation": matthews_corrcoef(truth, guess),
    }
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())
    assert found["accuracy"] == bootstrap_interval(agreement, guess, truth, rounds=50)


def test_a_regression_is_scored_by_its_number():
    truth = np.random.default_rng(0).normal(size=100)
    logits = (truth + np.random.default_rng(1).normal(size=100))[:, None]
    found = score("pearson_spearman", logits, truth, rounds=50)
    expected = load_metric("pearson_spearman").compute(predictions=logits[:, 0], references=truth)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pearson_spearman", (4, 3), "must be among accuracy, f1, .* for logits of 3 labels, got 'pearson_spearman'"),
        ("accuracy", (4, 1), "must be among pearson_spearman for logits of 1 labels, got 'accuracy'"),
        ("squad", (4, 3), "got 'squad'"),
        ("accuracy", (4,), r"`logits` must be of shape \(examples, labels\), got \(4,\)"),
    ],
)
def test_metrics_that_do_not_fit_the_logits_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        score(name, np.zeros(shape), np.zeros(4))


def test_tags_are_named_where_there_are_words():
    labels = np.array([[-100, 0, -100, 2, -100], [-100, 1, 1, 1, -100], [-100] * 5])
    predictions = np.array([[2, 1, 2, 0, -100], [-100, 2, 0, 1, 7], [9] * 5])
    names = ["O", "B-a", "I-a"]
    assert tags_of(predictions, labels, names) == [["B-a", "O"], ["I-a", "O", "B-a"], []]
    assert tags_of(labels, labels, names) == [["O", "I-a"], ["B-a"] * 3, []]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (np.zeros((2, 3, 4)), r"one shape \(examples, seq\), got \(2, 3, 4\) and \(2, 3\). Take the argmax"),
        (np.zeros((2, 2), dtype=int), r"got \(2, 2\) and \(2, 3\)"),
        (np.full((2, 3), -100), r"must be in \[0, 2\) at every word, got -100"),
        (np.full((2, 3), 2), r"must be in \[0, 2\) at every word, got 2"),
    ],
)
def test_predictions_that_are_no_tags_are_refused(predictions, message):
    with pytest.raises(ValueError, match=message):
        tags_of(predictions, np.array([[0, 1, -100], [-100] * 3]), ["O", "B"])


def test_span_scores_are_resampled_by_sentences():
    generator = np.random.default_rng(0)
    truth = [generator.choice(["O", "B-a", "I-a"], size=8).tolist() for _ in range(40)]
    guess = [[tag if generator.random() < 0.8 else "O" for tag in tags] for tags in truth]
    found, true = count_spans(guess, truth)
    interval = bootstrap_interval(SPAN_SCORES["f1"], found, true, rounds=50, seed=3)
    assert interval.value == span_f1(guess, truth)
    resampling = np.random.default_rng(3)
    draws = [resampling.integers(40, size=40) for _ in range(50)]
    scores = [span_f1([guess[row] for row in rows], [truth[row] for row in rows]) for rows in draws]
    np.testing.assert_allclose((interval.low, interval.high), np.quantile(scores, [0.025, 0.975]))
    worse = count_spans([["O"] * 8] * 40, truth)[0]
    assert paired_bootstrap(SPAN_SCORES["f1"], found, worse, true, rounds=50, seed=3) == interval
