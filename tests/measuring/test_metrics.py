import json
import sys
from pathlib import Path

import datasets
import evaluate
import new_process
import numpy as np
import pytest
import seqeval.metrics
import seqeval.scheme
from scipy import stats
from setuptools import find_packages
from sklearn import metrics as sk

import hf_moebert.measuring.metrics
from hf_moebert.measuring.metrics import METRICS, load_metric, metrics_for_task
from hf_moebert.measuring.metrics.seqeval.seqeval import (
    count_illegal,
    count_spans,
    find_spans,
    micro_f1,
    micro_precision,
    micro_recall,
    span_f1,
)
from hf_moebert.measuring.metrics.squad.squad import normalise, token_f1


FOLDER = Path(hf_moebert.measuring.metrics.__file__).parent


@pytest.fixture
def classes():
    generator = np.random.default_rng(0)
    truth = generator.integers(2, size=200)
    guess = np.where(generator.random(200) < 0.8, truth, 1 - truth)
    return guess, truth


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("accuracy", sk.accuracy_score), ("f1", sk.f1_score), ("matthews_correlation", sk.matthews_corrcoef)],
)
def test_classification_metrics_equal_sklearn_in_one_go_and_in_batches(classes, name, oracle):
    guess, truth = classes
    metric = load_metric(name)
    assert metric.compute(predictions=guess, references=truth) == {name: oracle(truth, guess)}
    for rows in np.split(np.arange(200), 4):
        metric.add_batch(predictions=guess[rows], references=truth[rows])
    assert metric.compute() == {name: oracle(truth, guess)}


def test_f1_averages_over_many_classes_on_request():
    guess, truth = np.random.default_rng(0).integers(3, size=(2, 50))
    expected = sk.f1_score(truth, guess, average="macro")
    assert load_metric("f1").compute(predictions=guess, references=truth, average="macro") == {"f1": expected}
    with pytest.raises(ValueError, match="average='binary'"):
        load_metric("f1").compute(predictions=guess, references=truth)


def test_correlations_equal_scipy():
    truth = np.random.default_rng(0).normal(size=100)
    guess = truth + np.random.default_rng(1).normal(size=100)
    scores = load_metric("pearson_spearman").compute(predictions=guess, references=truth)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(guess, truth).statistic, abs=1e-12)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(guess, truth).statistic, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_constant_prediction_scores_zero():
    scores = load_metric("pearson_spearman").compute(predictions=[2.0] * 5, references=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert scores == {"pearson": 0, "spearman": 0}
    assert load_metric("f1").compute(predictions=[0, 0], references=[0, 1]) == {"f1": 0}
    assert load_metric("matthews_correlation").compute(predictions=[0, 0], references=[0, 1]) == {
        "matthews_correlation": 0
    }


def test_accuracy_and_f1_combine(classes):
    guess, truth = classes
    both = evaluate.combine([load_metric(name) for name in metrics_for_task("mrpc")])
    scores = both.compute(predictions=guess, references=truth)
    assert scores == {"accuracy": sk.accuracy_score(truth, guess), "f1": sk.f1_score(truth, guess)}


def question(key, predicted, *golds):
    return (
        {"id": key, "prediction_text": predicted},
        {"id": key, "answers": {"text": list(golds), "answer_start": [0] * len(golds)}},
    )


def squad(*questions):
    predictions, references = zip(*questions, strict=True)
    return load_metric("squad").compute(predictions=list(predictions), references=list(references))


def brute_force_f1(prediction, gold):
    """Pair off equal tokens one by one."""
    left, shared = normalise(gold).split(), 0
    for token in normalise(prediction).split():
        if token in left:
            left.remove(token)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(normalise(prediction).split()), shared / len(normalise(gold).split())
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's\tHat.", "cats hat"),
        ("An apple a day", "apple day"),
        ("theatre and banana", "theatre and banana"),
        ("the-end", "theend"),
        ("A.", ""),
        ("Élan vital", "élan vital"),
    ],
)
def test_answers_are_normalised(text, expected):
    assert normalise(text) == expected


def test_token_f1_equals_brute_force():
    generator = np.random.default_rng(0)
    words = np.array(["red", "blue", "green", "Blue!", "sky"])
    for _ in range(100):
        guess, gold = (" ".join(generator.choice(words, size=generator.integers(1, 6))) for _ in range(2))
        assert token_f1(guess, gold) == pytest.approx(brute_force_f1(guess, gold))


def test_squad_takes_the_best_gold_answer_of_each_question():
    scores = squad(
        question("a", "The Eiffel Tower!", "tower in Paris", "Eiffel tower"),  # equal to the second: 1, 1
        question("b", "in the year 1889", "1889", "March 1889"),  # 1 of 3 and 1 of 1 tokens: 0, 1/2
        question("c", "Rome", "Paris"),
    )
    assert scores == pytest.approx({"exact_match": 100 / 3, "f1": 50.0})


def test_squad_with_questions_that_have_no_answer():
    scores = squad(
        question("a", "", "Paris"),  # wrongly abstains
        question("b", "red car", "a red bus"),  # 1 of 2 and 1 of 2: 0, 1/2
        question("c", ""),  # rightly abstains
        question("d", "Rome"),  # wrongly answers
        question("e", "the"),  # says nothing
    )
    assert scores == pytest.approx(
        {
            "exact_match": 40.0,
            "f1": 50.0,
            "has_answer_exact_match": 0.0,
            "has_answer_f1": 25.0,
            "no_answer_exact_match": 200 / 3,
            "no_answer_f1": 200 / 3,
        }
    )


def test_a_gold_answer_of_articles_alone_does_not_count():
    assert squad(question("a", "", "the", "cat"))["f1"] == 0
    assert squad(question("a", "", "the"))["f1"] == 100  # nothing else is left to say


def test_squad_matches_predictions_by_id_and_refuses_strangers():
    (p1, r1), (p2, r2) = question("a", "x", "x"), question("b", "y", "y")
    metric = load_metric("squad")
    assert metric.compute(predictions=[p2, p1], references=[r1, r2]) == {"exact_match": 100, "f1": 100}
    with pytest.raises(ValueError, match="every question `id` exactly once, got 2 predictions, 2 references and 1"):
        metric.compute(predictions=[p1, p1], references=[r1, r2])
    with pytest.raises(ValueError, match="exactly once"):
        metric.compute(predictions=[p1, p1], references=[r1, r1])


def test_squad_reads_a_dataset_column():
    rows = datasets.Dataset.from_list([{"id": "a", "answers": {"text": ["Paris"], "answer_start": [3]}}])
    scores = load_metric("squad").compute(
        predictions=[{"id": row["id"], "prediction_text": "paris"} for row in rows], references=rows
    )
    assert scores == {"exact_match": 100, "f1": 100}


SCHEMES = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU", "IOB1": "BI", "IOE2": "IE"}


def random_tags(scheme):
    """Sentences of random tags, most of them illegal; some of no words."""
    generator = np.random.default_rng(0)
    names = ["O"] + [f"{prefix}-{kind}" for prefix in SCHEMES[scheme] for kind in ("x", "y-z", "y")]
    return [generator.choice(names, size=size).tolist() for size in generator.integers(12, size=200)]


def test_an_illegal_span_counts_leniently_and_not_strictly():
    prediction, reference = [["O", "I-X", "I-X", "O"]], [["O", "B-X", "I-X", "O"]]
    assert span_f1(prediction, reference) == 1.0
    assert span_f1(prediction, reference, strict=True) == 0.0
    assert (count_illegal(prediction, "IOB2"), count_illegal(reference)) == (1, 0)


def test_tags_that_are_all_inner_are_read_strictly_under_a_named_scheme():
    """They may be IOB1, in which they are legal: to guess IOB2 would score perfect predictions 0."""
    for tags in ([["O", "I-X", "I-X"]], [["O", "I-X", "E-X"]], [["E-X"]]):
        assert span_f1(tags, tags) == 1.0
        for read in (lambda tags=tags: span_f1(tags, tags, strict=True), lambda tags=tags: count_illegal(tags)):
            with pytest.raises(ValueError, match="`scheme` must be named"):
                read()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("strict", [False, True])
def test_spans_are_scored_as_by_seqeval(scheme, strict):
    truth, generator = random_tags(scheme), np.random.default_rng(1)
    names = sorted({tag for tags in truth for tag in tags})
    guess = [[tag if generator.random() < 0.8 else str(generator.choice(names)) for tag in tags] for tags in truth]
    options = {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)} if strict else {}
    plain = [[[tag.translate(str.maketrans("LU", "ES")) for tag in tags] for tags in part] for part in (truth, guess)]
    truths, guesses = (truth, guess) if strict else plain  # conlleval knows no BILOU
    scores = load_metric("seqeval").compute(
        predictions=guess, references=truth, mode="strict" if strict else None, scheme=scheme
    )
    for name, oracle in (("precision", "precision_score"), ("recall", "recall_score"), ("f1", "f1_score")):
        found = getattr(seqeval.metrics, oracle)(truths, guesses, zero_division=0, **options)
        assert scores[f"overall_{name}"] == pytest.approx(found)
    assert 0 < scores["overall_f1"] < 1
    assert scores["overall_accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(truth, guess))
    report = seqeval.metrics.classification_report(truths, guesses, output_dict=True, zero_division=0, **options)
    for kind in ("x", "y-z", "y"):
        assert scores[kind]["f1"] == pytest.approx(report[kind]["f1-score"])
        assert scores[kind]["number"] == report[kind]["support"]
    assert span_f1(guess, truth, strict, scheme=scheme) == scores["overall_f1"]
    found, true = count_spans(guess, truth, strict, scheme=scheme)
    assert micro_precision(found, true) == scores["overall_precision"]
    assert micro_recall(found, true) == scores["overall_recall"]
    half = slice(50, 150)
    assert micro_f1(found[half], true[half]) == span_f1(guess[half], truth[half], strict, scheme=scheme)


@pytest.mark.parametrize(
    ("tags", "scheme", "spans", "illegal"),
    [
        ("B-a I-a I-a O B-b", "IOB2", {("a", 0, 2), ("b", 4, 4)}, 0),
        ("B-a I-b O I-a", "IOB2", {("a", 0, 0), ("b", 1, 1), ("a", 3, 3)}, 2),
        ("B-a B-a E-a", "IOBES", {("a", 0, 0), ("a", 1, 2)}, 1),
        ("S-a S-a B-a I-a", "IOBES", {("a", 0, 0), ("a", 1, 1), ("a", 2, 3)}, 1),
        ("U-a U-a B-a L-a B-a L-a", "BILOU", {("a", 0, 0), ("a", 1, 1), ("a", 2, 3), ("a", 4, 5)}, 0),
        ("B-x-y I-x-y I-x", "IOB2", {("x-y", 0, 1), ("x", 2, 2)}, 1),
        ("B-a- I-a- I-a", "IOB2", {("a-", 0, 1), ("a", 2, 2)}, 1),
        ("B I O I", "IOB2", {("", 0, 1), ("", 3, 3)}, 1),
        ("B-a M-a E-a S-a M-b", "BMES", {("a", 0, 2), ("a", 3, 3), ("b", 4, 4)}, 1),
        ("I-a B-a O I-b", "IOB1", {("a", 0, 0), ("a", 1, 1), ("b", 3, 3)}, 0),
        ("I-a E-a E-a", "IOE2", {("a", 0, 1), ("a", 2, 2)}, 0),
        ("O O", "IOB2", set(), 0),
        ("", "IOBES", set(), 0),
    ],
)
def test_segments_that_break_the_scheme_are_counted(tags, scheme, spans, illegal):
    sentence = tags.split()
    assert find_spans([sentence]) == [spans]
    assert count_illegal([sentence], scheme) == illegal
    assert len(find_spans([sentence], True, scheme=scheme)[0]) == len(spans) - illegal
    assert count_illegal([sentence] * 3, scheme) == 3 * illegal


@pytest.mark.filterwarnings("error")
def test_nothing_to_find_scores_zero():
    scores = load_metric("seqeval").compute(predictions=[["O"], []], references=[["O"], []])
    assert scores == {f"overall_{name}": 0.0 for name in ("precision", "recall", "f1")} | {"overall_accuracy": 1.0}
    assert span_f1([], []) == 0.0


def test_the_scheme_is_read_off_the_tags_of_both():
    # the prediction alone would be legal IOB2
    prediction, reference = [["B-a", "I-a"]], [["B-a", "E-a"]]
    assert span_f1(prediction, reference) == 1.0
    assert span_f1(prediction, reference, strict=True) == 0.0
    assert span_f1(prediction, prediction, strict=True) == 1.0


@pytest.mark.parametrize(
    ("tags", "options", "message"),
    [
        (["NOUN"], {}, r"Tags must be 'O', or B, I, E, S, L, U or M, a dash and a type, got prefixes \['NOUN'\]"),
        (["E-a"], {"scheme": "IOE1"}, "`scheme` must be one of IOB2, IOBES, .*, got 'IOE1'. Read others leniently"),
        (["B-a"], {"scheme": "BIOUS"}, "`scheme` must be one of IOB2, IOBES, .*, got 'BIOUS'. Read others leniently"),
        (["E-a"], {"scheme": "IOB2", "mode": "strict"}, r"must be of IOB2, got the prefixes \['E'\]"),
        (["E-a", "L-a"], {"mode": "strict"}, r"must be of one scheme, got the prefixes \['E', 'L'\]"),
        (["B-a"], {"mode": "loose"}, "`mode` must be 'strict' or None, got 'loose'"),
    ],
)
def test_tags_that_cannot_be_read_are_refused(tags, options, message):
    with pytest.raises(ValueError, match=message):
        load_metric("seqeval").compute(predictions=[tags], references=[tags], **options)


def test_sentences_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="got 1 and 1 sentences of 2 and 1 tags. Pair them up"):
        span_f1([["O", "O"]], [["O"]])
    with pytest.raises(ValueError, match="got 2 and 1 sentences"):
        span_f1([["O"], []], [["O"]])


LOAD_BY_PATH = """
import json, socket, sys
def refuse(*args): raise AssertionError("a metric opened a connection")
socket.socket.connect = refuse
import evaluate

folder, inputs = sys.argv[1], json.loads(sys.argv[2])
found = {}
for name, pair in inputs.items():
    found[name] = evaluate.load(f"{folder}/{name}").compute(**pair)
    assert evaluate.load(f"{folder}/{name}/{name}.py").compute(**pair) == found[name]
print(json.dumps(found))
"""


@pytest.mark.process
def test_every_metric_loads_by_its_path_without_a_network(tmp_path):
    prediction, reference = question("a", "blue sky", "sky")
    inputs = {name: {"predictions": [0, 1, 1], "references": [0, 1, 0]} for name in METRICS}
    inputs["squad"] = {"predictions": [prediction], "references": [reference]}
    inputs["seqeval"] = {"predictions": [["O", "I-a"]], "references": [["O", "B-a"]]}
    done = new_process.run(LOAD_BY_PATH, FOLDER, json.dumps(inputs), cwd=tmp_path, HF_EVALUATE_OFFLINE="1")
    here = {name: load_metric(name).compute(**pair) for name, pair in inputs.items()}
    assert json.loads(done.stdout) == here


def test_every_metric_is_packaged_and_described():
    packages = find_packages(FOLDER.parents[2], include=["hf_moebert", "hf_moebert.*"])
    assert {path.parent.name for path in FOLDER.glob("*/*.py")} == set(METRICS)
    for name, metric in METRICS.items():
        assert f"hf_moebert.measuring.metrics.{name}" in packages
        assert (FOLDER / name / f"{name}.py").is_file()
        assert metric().description == sys.modules[metric.__module__].__doc__


def test_unknown_metrics_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="got 'acuracy'. Did you mean 'accuracy'?"):
        load_metric("acuracy")
    with pytest.raises(ValueError, match="must be one of accuracy, f1, .* got 'bleu'. Load others"):
        load_metric("bleu")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("cola", ("matthews_correlation",)),
        ("CoLA", ("matthews_correlation",)),
        ("stsb", ("pearson_spearman",)),
        ("STS-B", ("pearson_spearman",)),
        ("mrpc", ("accuracy", "f1")),
        ("qqp", ("accuracy", "f1")),
        ("sst2", ("accuracy",)),
        ("mnli", ("accuracy",)),
        ("regression", ("pearson_spearman",)),
        ("single_label_classification", ("accuracy",)),
        ("squad_v2", ("squad",)),
        ("CoNLL-2003", ("seqeval",)),
    ],
)
def test_usual_metrics_of_a_task(task, expected):
    assert metrics_for_task(task) == expected
    assert set(expected) <= METRICS.keys()


def test_many_labels_per_example_have_no_usual_metric():
    with pytest.raises(ValueError, match="got 'multi_label_classification'"):
        metrics_for_task("multi_label_classification")
