"""Routes: bodies and answers of text-embeddings-inference, of OpenAI's client and huggingface_hub's."""

import base64
import json
import math

import numpy as np
import pytest
from echo_server import Echo, running
from fastapi.testclient import TestClient
from huggingface_hub import InferenceClient
from test_predictors import LONG, embedder, folders  # noqa: F401  # fixtures

from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.serving import ServingLimits, build_app, load_predictor
from hf_moebert.serving.keys import read_keys


@pytest.fixture(scope="module")
def models(folders, embedder):  # noqa: F811
    found = {name: load_predictor(str(folders / name)) for name in ("sentiment", "names", "relevance", "answers")}
    return found | {"vectors": load_predictor(str(embedder))}


@pytest.fixture(scope="module")
def client(models):
    with TestClient(build_app(models, limits=ServingLimits(max_batch=8, max_wait_ms=0))) as client:
        yield client


def post(client, path, status=200, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    if status == 200:
        return answer.json()
    said = answer.json()
    assert said == dict.fromkeys(("detail", "message", "error_description"), said["detail"])  # as clients look for it
    return said["detail"]


def labels(models, *inputs):
    return models["sentiment"].answer([(one, AnswerOptions()) for one in inputs])


def vectors(models, *texts, **options):
    return np.array([one.vector for one in models["vectors"].answer([(t, AnswerOptions(**options)) for t in texts])])


def test_predict_as_text_embeddings_inference(client, models):
    pair = {"text": "good", "text_pair": "film"}
    wanted = json.loads(json.dumps(labels(models, "good", pair)))
    for inputs, expected in (
        ("good", wanted[0]),
        (["good"], wanted[0]),
        (["good", "film"], wanted[1]),
        (pair, wanted[1]),
        ([["good"], ["good", "film"]], wanted),
        ([pair, pair], [wanted[1], wanted[1]]),
    ):
        found = post(client, "/predict", model="sentiment", inputs=inputs)
        assert np.shape(found) == np.shape(expected)
        assert json.dumps(found)[:30] == json.dumps(expected)[:30]
    raw = post(client, "/predict", model="sentiment", inputs="good", raw_scores=True)
    assert sum(one["score"] for one in raw) != pytest.approx(1)
    assert "a list of 3. Send several texts as" in post(client, "/predict", 422, model="sentiment", inputs=["a"] * 3)


def test_predict_tags_and_answers(client):
    one = post(client, "/predict", model="names", inputs="ann lee in rome")
    assert post(client, "/predict", model="names", inputs=["ann lee in rome", LONG])[0] == one
    assert one[0].keys() == {"entity_group", "score", "word", "start", "end"}
    asked = {"question": "what is good ?", "context": "ann lee is good ."}
    found = post(client, "/predict", model="answers", inputs=asked)
    assert asked["context"][found["start"] : found["end"]] == found["answer"]


def test_embed_as_text_embeddings_inference(client, models):
    wanted = vectors(models, "good", "bad film")
    assert np.allclose(post(client, "/embed", inputs="good"), wanted[:1], atol=1e-6)
    assert np.allclose(post(client, "/embed", inputs=["good", "bad film"]), wanted, atol=1e-6)
    plain = post(client, "/embed", inputs="good", normalize=False)
    assert np.linalg.norm(plain) != pytest.approx(1, abs=1e-3)
    assert np.allclose(
        post(client, "/embed", inputs="good", prompt_name="query"), vectors(models, "good", prompt_name="query")
    )
    short = post(client, "/embed", inputs="good", dimensions=4)
    assert np.allclose(short, wanted[:1, :4] / np.linalg.norm(wanted[0, :4]), atol=1e-6)
    assert "`dimensions` must be at most 16, got 17" in post(client, "/embed", 422, inputs="good", dimensions=17)


def test_rerank_as_text_embeddings_inference(client, models):
    texts = ["good film", "bad", "not a very good film"]
    pairs = [({"text": "good", "text_pair": text}, AnswerOptions(raw_scores=True)) for text in texts]
    logits = [one[0]["score"] for one in models["relevance"].answer(pairs)]
    found = post(client, "/rerank", query="good", texts=texts, return_text=True)
    assert [one["index"] for one in found] == sorted(range(3), key=lambda index: -logits[index])
    for one in found:
        assert one["score"] == pytest.approx(1 / (1 + math.exp(-logits[one["index"]])), abs=1e-6)
        assert one["text"] == texts[one["index"]]
    raw = post(client, "/rerank", query="good", texts=texts, raw_scores=True)
    assert [one["score"] for one in raw] == pytest.approx(sorted(logits, reverse=True), abs=1e-5)
    assert "text" not in raw[0]


def test_embeddings_as_open_ai(client, models):
    wanted = vectors(models, "good", "bad film")
    found = post(client, "/v1/embeddings", model="vectors", input=["good", "bad film"])
    assert (found["object"], found["model"]) == ("list", "vectors")
    assert [one["index"] for one in found["data"]] == [0, 1]
    assert np.allclose([one["embedding"] for one in found["data"]], wanted, atol=1e-6)
    assert found["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    one = post(client, "/v1/embeddings", model="vectors", input="good", encoding_format="base64", user="u")
    assert np.allclose(np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4"), wanted[0], atol=1e-6)
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == list(models)
    assert "`model` must be among" in post(client, "/v1/embeddings", 404, model="text-embedding-3", input="good")
    assert "must be one for embedding" in post(client, "/v1/embeddings", 422, model="names", input="good")


def test_the_client_of_the_hub(models, monkeypatch):
    """Its base_url is that of the server: one model, one task."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it asks this machine alone

    def ask(name):
        return running(build_app({name: models[name]}))

    with ask("vectors") as url:
        hub = InferenceClient(base_url=url, token="none")
        wanted = vectors(models, "good", "bad film", normalize=True)
        assert np.allclose(hub.feature_extraction("good"), wanted[:1], atol=1e-6)
        assert np.allclose(hub.feature_extraction("good", prompt_name="passage", truncate=True), wanted[:1], atol=1e-6)
        similar = hub.sentence_similarity("good", other_sentences=["bad film", "good"])
        assert similar == pytest.approx([float(wanted[0] @ wanted[1]), 1.0], abs=1e-5)
    with ask("sentiment") as url:
        found = InferenceClient(base_url=url, token="none").text_classification("good")
        assert [one.label for one in found] == [one["label"] for one in labels(models, "good")[0]]
        assert len(InferenceClient(base_url=url, token="none").text_classification("good", top_k=1)) == 1
    with ask("names") as url:
        found = InferenceClient(base_url=url, token="none").token_classification("ann lee in rome")
        wanted = models["names"].answer([("ann lee in rome", AnswerOptions())])[0]
        assert [one.entity_group for one in found] == [one["entity_group"] for one in wanted]
    with ask("answers") as url:
        hub = InferenceClient(base_url=url, token="none")
        assert hub.question_answering(question="what ?", context="ann is good").answer in "ann is good"


def test_one_model_alone_needs_no_name(models):
    with TestClient(build_app({"a": models["sentiment"], "b": models["vectors"]})) as client:
        assert len(post(client, "/predict", inputs="good")) == 2
        assert len(post(client, "/embed", inputs="good")) == 1
        assert "No model here is one for reranking" in post(client, "/rerank", 404, query="a", texts=["b"])
        assert client.get("/tasks").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/predict", {"inputs": "a"}, 422, "`model` must be given: it may be one of ['sentiment', 'names'"),
        ("/predict", {"inputs": "a", "model": "vectors"}, 422, "`model` must be one for classification or"),
        ("/predict", {"inputs": "a", "model": "none"}, 404, "`model` must be among"),
        ("/predict", {"inputs": "a", "model": "names", "tasks": ["b"]}, 422, "`tasks` must be left out"),
        ("/predict", {"inputs": {"tokens": ["a"]}, "model": "sentiment"}, 422, "An input must hold ['text'] or"),
        ("/predict", {"inputs": LONG, "model": "sentiment"}, 422, "A text must have at most 16 tokens, got"),
        ("/embed", {"inputs": LONG}, 422, "A text must have at most 12 tokens, got"),
        ("/embed", {"inputs": ["a"] * 9}, 422, "`inputs` must be 1 to 8 inputs, got 9"),
        ("/embed", {"inputs": []}, 422, "`inputs` must be 1 to 8 inputs, got 0"),
        ("/embed", {"inputs": "a", "prompt_name": "x"}, 422, "`prompt_name` must be one of"),
        ("/embed", {"inputs": [1]}, 422, "inputs"),
        ("/rerank", {"query": "a", "texts": []}, 422, "`inputs` must be 1 to 8 inputs, got 0"),
        ("/rerank", {"query": "a"}, 422, "texts: Field required"),
        ("/similarity", {"inputs": {"source_sentence": "a"}}, 422, "sentences: Field required"),
        ("/v1/embeddings", {"input": "a"}, 422, "model: Field required"),
        ("/v1/embeddings", {"input": [[1, 2]], "model": "vectors"}, 422, "input"),
        ("/", {"inputs": ["a"], "model": "vectors", "normalise": True}, 422, "normalise: Extra inputs"),
        ("/", {"inputs": {"text": "a"}, "model": "vectors"}, 422, "`inputs` must be what the model reads"),
    ],
)
def test_bad_bodies_are_refused(client, path, body, status, message):
    assert message in post(client, path, status, **body)


def test_a_text_too_long_is_cut_on_request(client):
    assert len(post(client, "/predict", inputs=LONG, model="sentiment", truncate=True)) == 2
    assert len(post(client, "/embed", inputs=[LONG], truncate=True)) == 1


@pytest.mark.filterwarnings("error")
def test_info_and_open_api(client, models):
    found = client.get("/info").json()
    assert found["model_id"] == "sentiment"
    assert {name: one["kind"] for name, one in found["models"].items()} == {
        "sentiment": "classification",
        "names": "tagging",
        "relevance": "reranking",
        "answers": "question-answering",
        "vectors": "embedding",
    }
    paths = client.get("/openapi.json").json()["paths"]
    assert {
        "/predict",
        "/embed",
        "/rerank",
        "/v1/embeddings",
        "/info",
        "/health",
        "/metrics",
        "/tasks/{name}",
    } <= paths.keys()
    for path in ("/predict", "/embed", "/similarity", "/"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "inputs" in schema["properties"]
        assert "$ref" not in json.dumps(schema)


KEY = "0123456789abcdef"


def test_keys():
    with TestClient(build_app(Echo(), keys=["other" * 4, KEY])) as client:
        ask = lambda value: client.post("/predict", json={"inputs": "a"}, headers={"Authorization": value})  # noqa: E731
        assert ask(f"Bearer {KEY}").status_code == ask(f"bearer {KEY}").status_code == 200
        for value in ("", KEY, "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}0", f"Basic {KEY}", "Bearer é".encode()):
            answer = ask(value)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert KEY not in answer.text
        for path, status in (("/health", 200), ("/", 200), ("/docs", 200), ("/metrics", 401), ("/info", 401)):
            assert client.get(path).status_code == status


def test_a_file_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  {KEY}2 \n")
    assert read_keys(file) == [KEY, f"{KEY}2"]
    for content in ("", "\n", "short", f"{KEY} {KEY}", f"{KEY}é", f"{KEY}\0"):
        file.write_text(content)
        with pytest.raises(ValueError, match="must hold keys of at least 16") as error:
            read_keys(file)
        assert KEY not in str(error.value)


def test_no_text_of_a_request_is_in_a_log(models, monkeypatch, caplog):
    """Not if a library quotes it in its message, nor in that of the cause."""

    def fail(*_):
        raise ValueError("good secret") from RuntimeError("good secret")

    with TestClient(build_app({"m": models["sentiment"]})) as client, caplog.at_level("DEBUG"):
        monkeypatch.setattr(models["sentiment"], "run", fail)
        assert client.post("/predict", json={"inputs": "good secret"}).status_code == 500
        assert client.post("/predict", json={"inputs": {"secret": "secret"}}).status_code == 422
    assert "test_routes.py" in caplog.text
    assert "secret" not in caplog.text
