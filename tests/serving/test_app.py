"""The server: answers, refusals, updates between batches, many clients, and an orderly shutdown."""

import asyncio
import importlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import echo_server
import httpx
import numpy as np
import pytest
from echo_server import Echo, running
from fastapi.testclient import TestClient

import hf_moebert
from hf_moebert.serving import ServingLimits, build_app, run_server


LIMITS = {"max_batch": 4, "max_wait_ms": 0, "queue_size": 4, "max_body_bytes": 2000, "max_characters": 100}


@pytest.fixture
def echo():
    return Echo()


@pytest.fixture
def updates(tmp_path):
    folder = tmp_path / "updates"
    for name, text in (("old", "old {}"), ("new", "new {}"), ("bad", "no place")):
        (folder / name).mkdir(parents=True)
        (folder / name / "format.txt").write_text(text)
    return folder


@pytest.fixture
def client(echo, updates):
    app = build_app(echo, limits=ServingLimits(**LIMITS), allow_updates=updates)
    with TestClient(app) as client:
        yield client


def ask(client, inputs, **options):
    return client.post("/predict", json={"inputs": inputs} | options)


def metric(client, name, url=""):
    return float(re.search(rf"^{name} (\S+)$", client.get(f"{url}/metrics").text, re.MULTILINE)[1])


def test_one_input_and_several_with_all_tasks_and_some(client):
    assert ask(client, "Ab").json() == {"results": [{"answers": {"upper": "Ab!", "lower": "ab"}}]}
    answer = ask(client, ["A", "B", "C"], tasks=["lower"])
    assert answer.status_code == 200
    assert [result["answers"] for result in answer.json()["results"]] == [
        {"lower": "a"},
        {"lower": "b"},
        {"lower": "c"},
    ]


def test_tasks_health_and_metrics_are_shown(client):
    assert client.get("/tasks").json() == {"tasks": {"upper": {"kind": "echo"}, "lower": {"kind": "echo"}}}
    assert client.get("/health").json() == {"status": "ok"}
    assert ask(client, ["a", "b"]).status_code == 200
    assert ask(client, 1).status_code == 422
    text = client.get("/metrics").text
    for line in (
        'http_answers_total{status="200"} 3.0',
        'http_answers_total{status="422"} 1.0',
        "predict_seconds_count 1.0",
        'batch_inputs_bucket{le="2.0"} 1.0',
        "queue_inputs 0.0",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("path", ["/docs", "/"])
def test_no_page_loads_from_elsewhere(client, path):
    """The browser is told so, too; `test_pages.py` looks at them in one."""
    answer = client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"https?://|src=|@import|url\(", answer.text)
    assert client.get("/redoc").status_code == 404


def test_two_servers_count_for_themselves(client):
    other = TestClient(build_app(Echo()))
    other.get("/health")
    assert 'http_answers_total{status="200"}' not in client.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "Invalid JSON"),
        (b'{"inputs": "a"', 400, "Invalid JSON"),
        (b'{"inputs": "\xff"}', 400, "Invalid JSON"),
        (b'{"inputs": "\\ud800"}', 400, "Invalid JSON"),
        (b"[" * 1900, 400, "Invalid JSON"),
        (b"[]", 422, "body"),
        (b"{}", 422, "inputs: Field required"),
        (b'{"inputs": null}', 422, "inputs"),
        (b'{"inputs": [1]}', 422, "inputs"),
        (b'{"inputs": {"text": {"a": "b"}}}', 422, "inputs"),
        (b'{"inputs": {"text": "a"}}', 422, "An input must be a text"),
        (b'{"inputs": []}', 422, "`inputs` must be 1 to 4 inputs, got 0"),
        (b'{"inputs": ["a", "b", "c", "d", "e"]}', 422, "`inputs` must be 1 to 4 inputs, got 5"),
        (b'{"inputs": "a", "task": ["lower"]}', 422, "task: Extra inputs are not permitted"),
        (b'{"inputs": "a", "tasks": "lower"}', 422, "tasks"),
        (b'{"inputs": "a", "tasks": []}', 422, "tasks"),
        (b'{"inputs": "a", "tasks": ["lower", "title"]}', 404, "must be among ['upper', 'lower'], got ['title']"),
        (b'{"inputs": "' + b"a " * 60 + b'"}', 422, "at most 100 characters, got 120"),
        (b'{"inputs": {"tokens": [' + b'"", ' * 400 + b'""]}}', 422, "at most 100 characters, got 402"),
        (b'{"inputs": "' + b"a" * 2000 + b'"}', 413, "at most 2000 bytes"),
    ],
)
def test_bad_requests_are_refused(client, body, status, message):
    answer = client.post("/predict", content=body)
    assert answer.status_code == status
    assert message in answer.json()["detail"]
    assert len(answer.content) < 1000
    assert ask(client, "a").status_code == 200  # and nothing is broken


def test_a_body_without_length_is_cut_off_while_it_is_read(echo):
    read = []

    def chunks():
        for _ in range(1000):
            read.append(1)
            yield b"a" * 100

    with running(build_app(echo, limits=ServingLimits(**LIMITS))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"7d1\r\n" + b"a" * 2001 + b"\r\n")  # and no end
            answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 413")
        assert httpx.get(f"{url}/health").status_code == 200
    with TestClient(build_app(Echo(), limits=ServingLimits(**LIMITS))) as client:
        assert client.post("/predict", content=chunks()).status_code == 413


def test_a_body_that_never_ends_is_given_up(echo):
    with running(build_app(echo, limits=ServingLimits(timeout_s=0.2))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
            assert connection.recv(10_000).startswith(b"HTTP/1.1 408")


def test_unexpected_errors_have_an_id_and_show_nothing(client, caplog):
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda text: ask(client, text), ["a", "trap", "b"]))
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    detail = answers[1].json()
    assert detail.keys() == {"detail", "message", "error_description", "id"}
    assert not re.search("secret|path|Error|Traceback|File", json.dumps(detail))
    (record,) = caplog.records
    assert detail["id"] in record.getMessage()
    assert "RuntimeError" in caplog.text
    assert "echo_server.py" in caplog.text
    assert "secret" not in caplog.text  # a message may hold the text of a client


def test_a_full_queue_asks_to_come_again(client, echo):
    echo.open.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, client, "first")
        assert echo.entered.wait(10)
        waiting = [pool.submit(ask, client, ["a", "b"]) for _ in range(2)]
        while metric(client, "queue_inputs") < 4:
            pass
        refused = ask(client, "too many")
        echo.open.set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert [answer.result(10).status_code for answer in (first, *waiting)] == [200, 200, 200]


def test_an_answer_that_takes_too_long_is_given_up(echo):
    echo.open.clear()
    limits = ServingLimits(timeout_s=0.1, max_wait_ms=0)
    with TestClient(build_app(echo, limits=limits)) as client:
        answer = ask(client, "slow")
        echo.open.set()
        assert answer.status_code == 504
        assert "within 0.1 seconds" in answer.json()["detail"]


def test_tasks_are_added_replaced_and_removed(client):
    for folder, expected in (("old", "old a"), ("new", "new a")):
        answer = client.put("/tasks/age", json={"folder": folder})
        assert answer.json() == {"tasks": {"age": {"kind": "echo"}}}
        assert ask(client, "a", tasks=["age"]).json()["results"] == [{"answers": {"age": expected}}]
    assert client.delete("/tasks/age").status_code == 204
    assert ask(client, "a", tasks=["age"]).status_code == 404
    assert client.delete("/tasks/age").status_code == 404
    assert client.get("/tasks").json()["tasks"].keys() == {"upper", "lower"}


def test_an_update_that_fails_changes_nothing(client, updates):
    client.put("/tasks/age", json={"folder": "old"})
    answer = client.put("/tasks/age", json={"folder": "bad"})
    assert (answer.status_code, answer.json()["detail"]) == (422, "`format` must hold a place for the text.")
    (updates / "empty").mkdir()
    answer = client.put("/tasks/age", json={"folder": "empty"})
    assert answer.status_code == 422
    assert str(updates) not in answer.text
    assert ask(client, "a", tasks=["age"]).json()["results"] == [{"answers": {"age": "old a"}}]


def test_updates_come_from_below_their_directory_only(client, updates):
    (updates.parent / "outside").mkdir()
    (updates.parent / "outside/format.txt").write_text("outside {}")
    (updates / "link").symlink_to(updates.parent / "outside")
    (updates / "around").symlink_to(updates)
    (updates / "inner").mkdir()
    (updates / "inner/format.txt").symlink_to(updates.parent / "outside/format.txt")
    outside = str(updates.parent / "outside")
    for folder in (
        *("../outside", outside, "link", "inner", "around/new", "new/../../outside", "new/format.txt"),
        *("", ".", "/", "no such folder", "a" * 3000, "new\0", "~", "new/../new"),
    ):
        answer = client.put("/tasks/age", json={"folder": folder} if len(folder) < 1000 else {"folder": folder[:1000]})
        assert (folder, answer.status_code) == (folder, 422)
        assert "`folder` must be a folder in the directory of updates" in answer.json()["detail"]
    assert client.put("/tasks/age", content=b"{").status_code == 400
    assert "age" not in client.get("/tasks").json()["tasks"]


def test_without_a_directory_nothing_is_updated(echo):
    client = TestClient(build_app(echo))
    assert client.put("/tasks/age", json={"folder": "new"}).status_code == 403
    assert client.delete("/tasks/upper").status_code == 403
    assert echo.formats.keys() == {"upper", "lower"}


def test_every_answer_under_updates_is_whole(client, echo):
    """Answers to several inputs come from one version, and none fails while versions come and go."""
    assert client.put("/tasks/age", json={"folder": "old"}).status_code == 200
    done = threading.Event()

    def ask_on():
        found = []
        while not done.is_set():
            found.append(ask(client, ["a", "b", "c"], tasks=["age", "lower"]))
        return found

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask_on) for _ in range(3)]
        for number in range(12):
            assert client.put("/tasks/age", json={"folder": ("new", "old")[number % 2]}).status_code == 200
            assert client.put("/tasks/other", json={"folder": "new"}).status_code == 200
            assert client.delete("/tasks/other").status_code == 204
        done.set()
        answers = [answer for one in asking for answer in one.result(20)]
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 429}
    seen = Counter()
    for answer in answers:
        if answer.status_code == 200:
            versions = {result["answers"]["age"].split()[0] for result in answer.json()["results"]}
            assert len(versions) == 1
            seen.update(versions)
    assert seen.keys() == {"old", "new"}


def test_what_was_accepted_before_a_removal_is_answered(client, echo):
    echo.open.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, client, "first")
        assert echo.entered.wait(10)
        waiting = pool.submit(ask, client, ["a", "b"], tasks=["upper"])
        while metric(client, "queue_inputs") < 2:
            pass
        removal = pool.submit(client.delete, "/tasks/upper")
        late = pool.submit(ask, client, "late", tasks=["upper"])
        echo.open.set()
        assert first.result(10).status_code == 200
        assert waiting.result(10).status_code == 200
        assert removal.result(10).status_code == 204
        assert late.result(10).status_code in {200, 404}  # on either side of it, never an error
    assert ask(client, "a", tasks=["upper"]).status_code == 404


def test_a_thousand_clients_at_once(echo):
    echo.seconds = 0.005

    async def ask_once(url, text):
        """Return status and body, over a connection of its own, without the cost of a client of httpx."""
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"inputs": text})
        writer.write(b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\n")
        writer.write(f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(body)

    async def crowd(url):
        return await asyncio.gather(*(ask_once(url, f"Text {number}") for number in range(1000)))

    with running(build_app(echo, limits=ServingLimits(max_batch=16, queue_size=128))) as url:
        answers = asyncio.run(crowd(url))
        statuses = Counter(status for status, _ in answers)
        assert set(statuses) <= {200, 429}
        assert statuses[200] >= 128
        for number, (status, body) in enumerate(answers):
            if status == 200:
                expected = {"upper": f"Text {number}!", "lower": f"text {number}"}
                assert body == {"results": [{"answers": expected}]}
        assert max(echo.batches) == 16
        assert sum(echo.batches) == statuses[200]
        assert httpx.get(f"{url}/health").status_code == 200
        counted = httpx.get(f"{url}/metrics").text
    assert f'http_answers_total{{status="200"}} {statuses[200] + 1}.0' in counted


# Runs a script in which `import hf_moebert` takes no seconds: the server needs nothing of the package but itself.
WITHOUT_MODELS = """
import runpy, sys, types
sys.modules["hf_moebert"] = types.ModuleType("hf_moebert")
sys.modules["hf_moebert"].__path__ = [sys.argv[1]]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.process
def test_a_signal_ends_the_server_after_its_answers():
    command = [sys.executable, "-c", WITHOUT_MODELS, hf_moebert.__path__[0], echo_server.__file__]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process, ThreadPoolExecutor() as pool, httpx.Client() as client:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        asking = [pool.submit(client.post, f"{url}/predict", json={"inputs": "a"}, timeout=30) for _ in range(6)]
        while sum(metric(client, name, url) for name in ("queue_inputs", "batch_inputs_sum")) < 6:
            pass
        process.send_signal(signal.SIGTERM)
        assert [answer.result(30).status_code for answer in asking] == 6 * [200]
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.process
@pytest.mark.parametrize("http", [False, True])
def test_the_benchmark_checks_every_answer_and_pairs_rounds(monkeypatch, tmp_path, capsys, http):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    benchmark, output = importlib.import_module("serving"), tmp_path / "serving.json"
    benchmark.main(benchmark.ServingArguments(tasks=[2], smoke=True, http=http, output=output))
    found = json.loads(output.read_text())["results"]
    assert [one["asks for"] for one in found] == ["all", "one"]
    assert found[0]["layers run"] == {"merged": 4 + 2 * 2, "separate": 2 * 6}
    for one in found:
        for rival, ratios in one["merged over"].items():
            seconds = one["seconds"]["p50"]
            assert ratios["p50"]["median"] == pytest.approx(np.median(np.divide(seconds[rival], seconds["merged"])))
    assert "| 2 | all | 1.50 times | separate | " in capsys.readouterr().out
    requests, wrong = [benchmark.Asked("a", ["t"])], [{"t": {"label": "x", "score": 0.9}}]
    with pytest.raises(RuntimeError, match="t must answer y with 0.9, got"):
        benchmark.check_answers(requests, wrong, {("a", "t"): ("y", 0.9)})
    with pytest.raises(ValueError, match="at most `layers` = 6 together, got 5 and 2"):
        benchmark.ServingArguments(frozen=5)


def test_a_missing_directory_of_updates_is_refused(echo):
    with pytest.raises(FileNotFoundError):
        build_app(echo, allow_updates=Path("no such folder"))


def test_a_port_in_use_is_an_error(echo):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        run_server(build_app(echo), host="127.0.0.1", port=taken.getsockname()[1], announce=print)
