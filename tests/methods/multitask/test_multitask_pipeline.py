"""The pipeline "multitask" gives the answers of the single-task models, and serves as a predictor."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings, strategies as st
from tiny_tasks import KINDS, TAGS, make_task, make_tasks, make_tokenizer, save_merged
from transformers import (
    BertForSequenceClassification,
    LlamaTokenizer,
    RobertaTokenizer,
    TextClassificationPipeline,
    pipeline,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_moebert.methods.multitask.functional_answers import Example, read_answer, read_entities
from hf_moebert.methods.multitask.functional_inputs import read_input
from hf_moebert.methods.multitask.functional_spans import word_spans
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel
from hf_moebert.methods.multitask.pipeline import MultiTaskPipeline, group_by_length
from hf_moebert.serving.app import ServingLimits, build_app
from hf_moebert.serving.many_tasks import ManyTasks


TEXT = "anna lee in rome. a good film"
INPUTS = [
    TEXT,
    "good",
    {"text": "a good film", "text_pair": "by ann"},
    {"tokens": ["anna", "lee", "is", "not", "in", "rome."]},
    {"question": "what is good?", "context": "a film by anna lee"},
    "",
]


def make_pipeline(tasks=None):
    model = MultiTaskBertModel.from_tasks(make_tasks() if tasks is None else tasks)
    return MultiTaskPipeline(model=model, tokenizer=make_tokenizer(), task="multitask", device="cpu")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture
def trunk_layers(pipe):
    """List the layers of the trunk that run, one entry for each run."""
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(pipe.model.trunk.layer, 1)
    ]
    yield ran
    for hook in hooks:
        hook.remove()


def near(found, expected):
    """Compare answers, their scores approximately."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[key], expected[key]) for key in found)
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(near, found, expected))
    return math.isclose(found, expected, abs_tol=1e-4) if isinstance(found, float) else found == expected


@torch.no_grad()
def run_alone(name, *texts):
    encoded = make_tokenizer()(*texts, return_tensors="pt", truncation=True, max_length=16)
    return make_task(name)(**encoded)


def test_a_classification_is_that_of_the_pipeline_of_transformers(pipe):
    alone = TextClassificationPipeline(model=make_task("sentiment"), tokenizer=make_tokenizer(), device="cpu")
    for text in (TEXT, "bad", {"text": "good film", "text_pair": "bad book"}):
        assert near(
            pipe(text, tasks=["sentiment"]), {"sentiment": alone(text)[0] if type(text) is str else alone(text)}
        )


def test_scores_are_those_of_the_single_task_models(pipe):
    answers = pipe(TEXT)
    assert answers.keys() == {"sentiment", "topics", "stars", "names", "slots"}
    assert answers["stars"]["score"] == pytest.approx(run_alone("stars", TEXT).logits.item(), abs=1e-5)
    scores = dict(zip("abc", run_alone("topics", TEXT).logits[0].sigmoid().tolist(), strict=True))
    expected = {label: pytest.approx(score, abs=1e-5) for label, score in scores.items() if score > 0.5}
    assert {one["label"]: one["score"] for one in answers["topics"]} == expected


def test_words_are_tagged_through_their_first_tokens(pipe):
    scores, tags = run_alone("names", "anna lee").logits[0].softmax(-1).max(-1)
    words = [(1, "anna"), (3, "lee")]  # [CLS] ann ##a lee [SEP]
    labels = [TAGS[tags[position]] for position, _ in words]
    entities = pipe("anna lee", tasks=["names"])["names"]
    assert [entity["label"] for entity in entities] == [label[2:] for label in labels if label != "O"]
    if len(entities) == 2:
        assert [entity["word"] for entity in entities] == ["anna", "lee"]
        assert [entity["score"] for entity in entities] == pytest.approx(
            [scores[1].item(), scores[3].item()], abs=1e-4
        )


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], [("PER", "anna lee"), ("LOC", "rome")]),
        (["I-PER", "I-PER", "I-LOC", "I-LOC"], [("PER", "anna lee"), ("LOC", "in rome")]),
        (["B-PER", "B-PER", "O", "I-PER"], [("PER", "anna"), ("PER", "lee"), ("PER", "rome")]),
        (["B-PER", "E-PER", "S-LOC", "I-LOC"], [("PER", "anna lee"), ("LOC", "in"), ("LOC", "rome")]),
        (["U-PER", "B-LOC", "I-LOC", "L-LOC"], [("PER", "anna"), ("LOC", "lee in rome")]),
        (["B-PER", "M-PER", "E-PER", "M-LOC"], [("PER", "anna lee in"), ("LOC", "rome")]),
        (["O", "O", "O", "O"], []),
        (["NOUN", "NOUN", "ADP", "I-"], [("NOUN", "anna"), ("NOUN", "lee"), ("ADP", "in"), ("", "rome")]),
    ],
)
def test_prefixes_say_what_belongs_together(tags, entities):
    text = "anna lee in rome"
    spans = word_spans(make_tokenizer()(text).encodings[0], text)
    labels = sorted(set(tags))
    logits = torch.zeros(7, len(labels))  # [CLS] ann ##a lee in rome [SEP]
    for (position, *_), tag in zip(spans, tags, strict=True):
        logits[position, labels.index(tag)] = 5.0
    found = read_entities({"logits": logits}, dict(enumerate(labels)), Example(text, ("text",), None, spans, False))
    assert [(one["label"], one["word"]) for one in found] == entities
    assert all(text[one["start"] : one["end"]] == one["word"] for one in found)


@pytest.mark.parametrize("kind", ["keeps words together", "counts blanks with words"])
def test_words_end_at_blanks_whatever_the_tokenizer_does(kind):
    characters = {symbol: number for number, symbol in enumerate(["<unk>", "\u2581", *"anleirom\n\u3000"])}
    if kind == "keeps words together":
        tokenizer = LlamaTokenizer(vocab=characters, merges=[])
    else:
        symbols = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
        vocab = {symbol: number for number, symbol in enumerate(symbols)}
        tokenizer = RobertaTokenizer(vocab=vocab, merges=[], trim_offsets=False)
    for text in ("anna lee  in\nrome", "rome", " anna\u3000lee "):
        spans = word_spans(tokenizer(text).encodings[0], text)
        assert [text[start:end] for _, start, end in spans] == text.split()
        words = text.split()
        listed = word_spans(make_tokenizer()(words, is_split_into_words=True).encodings[0], words)
        assert [" ".join(words)[start:end] for _, start, end in listed] == words


def test_tags_of_a_crf_are_its_path_and_their_scores_its_marginals():
    text = "anna lee"
    spans = word_spans(make_tokenizer()(text).encodings[0], text)
    found = {
        "logits": torch.zeros(5, 3),
        "predictions": torch.tensor([-100, 1, -100, 2, -100]),
        "marginals": torch.tensor([[0.0, 0, 0], [0.1, 0.7, 0.2], [0, 0, 0], [0.2, 0.3, 0.5], [0, 0, 0]]),
    }
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    (entity,) = read_entities(found, labels, Example(text, ("text",), None, spans, False))
    assert entity.pop("score") == pytest.approx(0.6)
    assert entity == {"label": "PER", "word": "anna lee", "start": 0, "end": 8}


@torch.no_grad()
def test_a_crf_sees_words_only(pipe):
    tokens = ["anna", "lee", "is", "in", "rome."]
    encoded = make_tokenizer()([tokens], is_split_into_words=True, return_tensors="pt")
    starts = [1, 3, 4, 5, 6]  # [CLS] ann ##a lee is in rome . [SEP]
    words = torch.zeros_like(encoded["input_ids"]).bool()
    words[0, starts] = True
    output = make_task("slots")(**encoded, word_mask=words, output_marginals=True)
    tags = output.predictions[0, starts]
    scores = output.marginals[0, starts].gather(-1, tags[:, None]).squeeze(-1).tolist()
    entities = pipe([{"tokens": tokens}, "a good film by ann"], tasks=["slots"], batch_size=2)[0]["slots"]
    begins = [number for number, tag in enumerate(tags.tolist()) if TAGS[tag].startswith("B-")]
    assert [entity["start"] for entity in entities] == [len(" ".join([*tokens[:n], ""])) for n in begins]
    assert all(TAGS[tag] == "O" or n >= begins[0] for n, tag in enumerate(tags.tolist()))  # the scheme is kept
    kept = [score for score, tag in zip(scores, tags.tolist(), strict=True) if TAGS[tag] != "O"]
    lengths = [len(entity["word"].split()) for entity in entities]
    total = sum(entity["score"] * length for entity, length in zip(entities, lengths, strict=True))
    assert total == pytest.approx(sum(kept), abs=1e-4)


def test_words_split_already_are_found_in_their_joined_text():
    tokens = ["anna", "lee", "rome."]
    encoding = make_tokenizer()(tokens, is_split_into_words=True).encodings[0]
    text = " ".join(tokens)
    assert [text[start:end] for _, start, end in word_spans(encoding, tokens)] == tokens
    assert [text[start:end] for _, start, end in word_spans(make_tokenizer()(text).encodings[0], text)] == [
        *("anna", "lee", "rome", ".")
    ]


def test_an_answer_is_the_best_span_by_brute_force():
    torch.manual_seed(0)
    text = "x" * 40
    for length in (1, 3, 40):
        spans = [(position + 4, position, position + 1) for position in range(length)]
        start, end = torch.randn(2, 50)
        first, last = (logits[4 : 4 + length].softmax(-1).tolist() for logits in (start, end))
        pairs = [(first[i] * last[j], i, j) for i in range(length) for j in range(i, min(i + 30, length))]
        score, i, j = max(pairs)
        found = read_answer(start, end, Example(text, ("question", "context"), None, spans, False))
        assert found.pop("score") == pytest.approx(score)
        assert found == {"answer": text[i : j + 1], "start": i, "end": j + 1}


def test_a_question_is_answered_from_its_context(pipe):
    context = "a film by anna lee"
    answer = pipe({"question": "what is good?", "context": context})["answers"]
    assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
    output = run_alone("answers", "what is good?", context)
    inside = slice(6, 12)  # [CLS] what is good ? [SEP] and then a film by ann ##a lee
    first, last = (x[0, inside].softmax(-1) for x in (output.start_logits, output.end_logits))
    assert answer["score"] == pytest.approx(torch.outer(first, last).triu().max().item(), abs=1e-5)


def test_batches_answer_as_one_by_one(pipe):
    alone = [pipe(one) for one in INPUTS]
    for batch_size in (2, 4, 6):
        assert near(pipe(INPUTS, batch_size=batch_size), alone)
    assert near(list(pipe((one for one in INPUTS), batch_size=3)), alone)


def test_everyone_gets_the_tasks_asked_for(pipe, trunk_layers):
    asked = [["stars"], ["topics", "stars"], None, ["names"], None, ["sentiment"]]
    found = pipe.answer(list(zip(INPUTS, asked, strict=True)))
    groups = group_by_length([pipe.preprocess(one)["input_ids"].shape[1] for one in INPUTS])
    assert max(trunk_layers.count(1), trunk_layers.count(2)) <= len(groups) < len(INPUTS)  # once for each group
    for one, tasks, answer in zip(INPUTS, asked, found, strict=True):
        assert not answer["truncated"]
        assert near(answer["answers"], pipe(one, tasks=tasks))
        assert tasks is None or answer["answers"].keys() == set(tasks)


def test_the_trunk_runs_once_for_inputs_of_one_length(pipe, trunk_layers):
    pipe.answer([("good", ["stars"]), ("bad", ["topics", "stars"]), ("rome", None), ("good", ["sentiment"])])
    assert trunk_layers == [1, 2]


@settings(deadline=None)
@given(st.lists(st.integers(1, 512), max_size=64))
def test_groups_hold_every_input_once_and_pad_little(lengths):
    groups = group_by_length(lengths)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        assert min(lengths[place] for place in group) >= 0.75 * max(lengths[place] for place in group)
    longest = [max(lengths[place] for place in group) for group in groups]
    assert all(shorter < 0.75 * longer for longer, shorter in pairwise(longest))  # no more groups than needed


def test_the_trunk_runs_as_deep_as_it_must(pipe, trunk_layers):
    for tasks, layers in ((["stars"], []), (["stars", "sentiment"], [1]), (["topics"], [1, 2])):
        pipe(TEXT, tasks=tasks)
        assert trunk_layers == layers
        trunk_layers.clear()


def test_long_texts_are_cut_and_it_is_said(pipe):
    long = " ".join(["good film"] * 5000)
    (answer,) = pipe.answer([(long, None)])
    assert answer["truncated"]
    assert near(answer["answers"], pipe(" ".join(["good film"] * 7)))
    (answer,) = pipe.answer([({"question": long, "context": "rome"}, None)])
    assert answer["truncated"]


@pytest.mark.parametrize(
    ("inputs", "tasks", "message"),
    [
        (1, None, "An input must be a text, or a dict with .*, got int"),
        ({}, None, r"got \[\]"),
        ({"text": "a", "words": "b"}, None, r"got \['text', 'words'\]"),
        ({"text": 1}, None, "`text` must be a text, got 1"),
        ({"tokens": []}, None, r"`tokens` must be a list of words, got \[\]"),
        ({"tokens": ["a", 1]}, None, "`tokens` must be a list of words"),
        ({"question": "a", "context": " "}, None, "`context` must be a text that is not empty"),
        ("a", ["sst2"], r"`tasks` must be a list of names in \['sentiment', .*\], got \['sst2'\]"),
        ("a", "sentiment", "`tasks` must be a list of names"),
        ("a", [], r"`tasks` must be a list of names in .*, got \[\]"),
        ("a", ["answers"], r"`tasks` must be among .* to read \['text'\], got \['answers'\]"),
        ({"text": "a", "text_pair": "b"}, ["names"], r"to read \['text', 'text_pair'\], got \['names'\]"),
    ],
)
def test_what_cannot_be_answered_is_refused(pipe, inputs, tasks, message):
    for call in (pipe.check, lambda one, tasks: pipe([one], tasks=tasks), lambda *pair: pipe.answer([pair])):
        with pytest.raises(ValueError, match=message):
            call(inputs, tasks)


def test_inputs_that_no_task_reads_and_unknown_options_are_refused(pipe):
    with pytest.raises(ValueError, match=r"must be one that a task can read, got \['question', 'context'\]"):
        make_pipeline({"stars": make_task("stars")}).check({"question": "a", "context": "b"})
    with pytest.raises(TypeError, match=r"takes `tasks` and `batch_size`, got \['task'\]"):
        pipe(TEXT, task="stars")
    with pytest.raises(ValueError, match="`tokenizer` must be a fast one"):
        MultiTaskPipeline(model=pipe.model, tokenizer=SimpleNamespace(is_fast=False), device="cpu")
    assert read_input("a") == (("text",), ["a"])


def test_what_there_is(pipe):
    found = pipe.describe_tasks()
    assert [one["kind"] for one in found.values()] == [
        *("classification", "multi-label", "regression", "tagging", "tagging", "question-answering")
    ]
    assert found["names"] == {"kind": "tagging", "labels": TAGS, "frozen_layers": 2, "task_layers": 1}


def test_a_folder_is_a_pipeline(pipe, tmp_path):
    loaded = pipeline("multitask", model=str(save_merged(tmp_path / "a")), device="cpu")
    assert type(loaded) is MultiTaskPipeline
    loaded.save_pretrained(tmp_path / "b")
    assert "custom_pipelines" not in (tmp_path / "b/config.json").read_text()
    again = pipeline("multitask", model=str(tmp_path / "b"), device="cpu")
    assert again(INPUTS) == loaded(INPUTS) == pipe(INPUTS)


@pytest.fixture
def client(tmp_path):
    """Return a client of all tasks but one, and folders of other versions."""
    for seed in (0, 7):
        make_task("sentiment", seed=seed).save_pretrained(tmp_path / f"sentiment-{seed}")
    make_task("sentiment", trunk_seed=3).save_pretrained(tmp_path / "stranger")
    shutil.copytree(tmp_path / "sentiment-0", tmp_path / "no-weights")
    (tmp_path / "no-weights/model.safetensors").unlink()
    (tmp_path / "no-task").mkdir()
    config = json.loads((tmp_path / "sentiment-0/config.json").read_text())
    (tmp_path / "no-task/config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    tasks = {name: make_task(name) for name in KINDS if name != "sentiment"}
    app = build_app(ManyTasks(make_pipeline(tasks)), limits=ServingLimits(max_wait_ms=1), allow_updates=tmp_path)
    with TestClient(app) as client:
        yield client


def test_the_server_answers_as_the_pipeline(client, pipe):
    answer = client.post("/predict", json={"inputs": INPUTS})
    found = [result["answers"] for result in answer.json()["results"]]
    expected = [{name: said for name, said in one.items() if name != "sentiment"} for one in pipe(INPUTS)]
    assert near(found, expected)
    long = "a " * 9999
    assert client.post("/predict", json={"inputs": long}).json()["results"][0]["truncated"]
    for inputs in ({"words": "a"}, {"text": 1}, {"question": "a", "context": ""}):
        assert client.post("/predict", json={"inputs": inputs}).status_code == 422


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])  # the last is finite, and what it computes is not
@pytest.mark.parametrize("name", KINDS)
def test_a_task_that_is_not_finite_is_refused(client, tmp_path, name, value):
    task = make_task(name)
    with torch.no_grad():
        task.base_model.encoder.layer[-1].output.dense.weight.fill_(value)
    task.save_pretrained(tmp_path / "broken")
    before = client.get("/tasks").json()
    answer = client.put(f"/tasks/{name}", json={"folder": "broken"})
    assert (answer.status_code, client.get("/tasks").json()) == (422, before)
    assert client.post("/predict", json={"inputs": TEXT}).status_code == 200


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("name", KINDS)
def test_a_server_does_not_start_with_a_task_that_is_not_finite(name, value):
    broken = make_pipeline({other: make_task(other) for other in KINDS})
    with torch.no_grad():
        broken.model.branches[name].base_model.encoder.layer[-1].output.dense.weight.fill_(value)
    with pytest.raises(ValueError, match=rf"The task '{name}' must be able to answer .*, but: .* must compute finite"):
        build_app(ManyTasks(broken))


@pytest.mark.parametrize("name", KINDS)
def test_a_task_that_is_not_finite_on_some_inputs_answers_them_with_an_error(name):
    """One word makes what the branch computes infinite: its request fails alone, whatever is in the batch."""
    tasks = make_pipeline({other: make_task(other) for other in ("sentiment", name)})
    app = build_app(ManyTasks(tasks), limits=ServingLimits(max_wait_ms=50))
    words = tasks.model.trunk.embeddings.word_embeddings.weight
    with torch.no_grad():
        words[tasks.tokenizer.convert_tokens_to_ids("film")] = math.nan
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor() as pool:

        def ask(text):
            one = text if name != "answers" else {"question": text, "context": text}
            return client.post("/predict", json={"inputs": one, "tasks": [name]}).status_code

        assert list(pool.map(ask, ["good", "a film", "lee", "rome", "film"])) == [200, 500, 200, 200, 500]


@pytest.mark.parametrize("name", KINDS)
def test_a_task_that_is_finite_is_loaded(pipe, tmp_path, name):
    make_task(name).save_pretrained(tmp_path)
    assert not pipe.load_task(tmp_path).training


def test_updates_under_load_give_the_old_or_the_new_answer(client):
    put = {seed: {"folder": f"sentiment-{seed}"} for seed in (0, 7)}
    assert client.put("/tasks/sentiment", json=put[0]).status_code == 200
    expected = [
        MultiTaskPipeline(
            model=MultiTaskBertModel.from_tasks({"sentiment": make_task("sentiment", seed)}),
            tokenizer=make_tokenizer(),
            device="cpu",
        )(TEXT)["sentiment"]
        for seed in (0, 7)
    ]
    assert not near(*expected)

    def ask(_):
        return client.post("/predict", json={"inputs": TEXT, "tasks": ["sentiment", "stars"]})

    with ThreadPoolExecutor(4) as pool:
        asking = pool.map(ask, range(150))
        statuses = [client.put("/tasks/sentiment", json=put[seed]).status_code for seed in (7, 0, 7)]
        answers = list(asking)
    assert statuses == [200, 200, 200]
    assert {answer.status_code for answer in answers} == {200}
    found = [answer.json()["results"][0]["answers"]["sentiment"] for answer in answers]
    assert all(any(near(one, said) for said in expected) for one in found)
    assert near(ask(0).json()["results"][0]["answers"]["sentiment"], expected[1])


def test_updates_that_do_not_fit_are_refused_and_change_nothing(client):
    before = client.get("/tasks").json()
    for folder, message in (
        ("stranger", "frozen part of `model`"),
        ("no-weights", "must hold a model of one task"),
        ("no-task", "must hold a model of one task"),
    ):
        answer = client.put("/tasks/sentiment", json={"folder": folder})
        assert answer.status_code == 422
        assert message in answer.json()["detail"]
    assert client.put("/tasks/a.b", json={"folder": "sentiment-0"}).status_code == 422
    assert client.delete("/tasks/sentiment").status_code == 404
    assert client.get("/tasks").json() == before
    for name in list(before["tasks"]):
        assert client.delete(f"/tasks/{name}").status_code == 204
    assert client.post("/predict", json={"inputs": TEXT}).status_code == 422
    assert client.put("/tasks/sentiment", json={"folder": "sentiment-0"}).status_code == 200
    assert client.post("/predict", json={"inputs": TEXT}).json()["results"][0]["answers"].keys() == {"sentiment"}


def test_kinds_follow_the_rules_of_transformers():
    for options, kind in (({"num_labels": 1}, "regression"), ({"problem_type": "regression"}, "regression")):
        model = make_task("sentiment")
        config = type(model.config).from_dict(model.config.to_dict() | {"id2label": None, "label2id": None} | options)
        other = BertForSequenceClassification(config)
        other.load_state_dict(model.state_dict() | other.classifier.state_dict(prefix="classifier."))
        assert make_pipeline({"a": other}).describe_tasks()["a"]["kind"] == kind
