"""The server and its connections: slow clients, clients that leave, faults of the worker, and an end in time."""

import asyncio
import importlib
import socket
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import echo_server
import httpx
import pytest
from echo_server import Echo, running
from fastapi.testclient import TestClient
from test_app import WITHOUT_MODELS, ask, metric

import hf_moebert
from hf_moebert.serving import ServingLimits, build_app, run_server
from hf_moebert.serving.server import LimitedServer


pytestmark = pytest.mark.process  # servers on real sockets, whose time limits are waited for
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
BODY = b'{"inputs": "Ab"}'
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
ANSWER = b'{"results":[{"answers":{"upper":"Ab!","lower":"ab"}}]}'
HALVES = {
    "nothing": b"",
    "half a line": b"POST /pre",
    "half of the headers": HEAD + b"X-Slow: ",
    "a whole request, and half of the next": WHOLE + HEAD,
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{",
}


@pytest.fixture(scope="module")
def load():
    """Return the benchmark that puts servers under load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("serving_load")


@contextmanager
def impatient(**limits):
    """Serve, and yield a function that connects, which sends something and returns the connection."""
    with running(build_app(Echo(), limits=ServingLimits(**limits))) as url:
        host, port = url.removeprefix("http://").split(":")

        def connect(sent):
            connection = socket.create_connection((host, int(port)), timeout=10)
            connection.sendall(sent)
            return connection

        yield url, connect


def read_all(connection):
    """Return what arrives until the server closes the connection."""
    found = b""
    with connection, suppress(ConnectionResetError):
        while part := connection.recv(10_000):
            found += part
    return found


@pytest.mark.parametrize("half", HALVES)
def test_what_is_never_whole_is_closed(half):
    with impatient(header_timeout_s=0.2, keep_alive_s=0.3) as (url, connect):
        found = read_all(connect(HALVES[half]))
        assert found.count(b"HTTP/1.1 200") == (half in {"a whole request, and half of the next", list(HALVES)[-1]})
        assert httpx.get(f"{url}/health").status_code == 200


def test_headers_that_drip_are_closed_as_well():
    """Each byte is on time, and the whole is not."""

    def drip(connection):
        while True:
            connection.sendall(b"X: y\r\n")
            time.sleep(0.01)

    with (
        impatient(header_timeout_s=0.3) as (_, connect),
        connect(HEAD) as connection,
        pytest.raises(OSError, match=r"reset|[Bb]roken pipe"),
    ):
        drip(connection)


def test_an_answer_may_take_longer_than_headers():
    with running(build_app(Echo(0.4), limits=ServingLimits(header_timeout_s=0.1, keep_alive_s=0.1))) as url:
        assert httpx.post(f"{url}/predict", json={"inputs": "a"}).status_code == 200


def test_a_connection_is_kept_for_the_next_request():
    with impatient(header_timeout_s=5) as (url, _), httpx.Client() as client:
        for _ in range(3):
            assert client.post(f"{url}/predict", json={"inputs": "a"}).status_code == 200
        assert len(client._transport._pool.connections) == 1


def test_headers_that_are_too_large_are_refused():
    with impatient(max_header_bytes=1000) as (url, connect):
        assert read_all(connect(HEAD + b"X: " + 2000 * b"y")).startswith(b"HTTP/1.1 400")
        assert httpx.get(f"{url}/health").status_code == 200


LARGE = {
    "header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n" % (1000 * b"a"),
    "many headers": b"GET /health HTTP/1.1\r\nHost: a\r\n%b\r\n" % (300 * b"X: a\r\n"),
    "target": b"GET /health?%b HTTP/1.1\r\nHost: a\r\n\r\n" % (1000 * b"a"),
}


@pytest.mark.parametrize("large", LARGE)
@pytest.mark.parametrize("size", [10**6, 700])
def test_headers_that_are_too_large_are_refused_however_they_come(large, size):
    """At once, and in parts."""
    with impatient(max_header_bytes=1000, keep_alive_s=0.3) as (url, connect):
        connection = connect(LARGE[large][:size])
        for start in range(size, len(LARGE[large]), size):
            connection.sendall(LARGE[large][start : start + size])
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_client_that_does_not_read_is_closed():
    """Its answer is larger than what the kernel takes for it."""
    limits = {"timeout_s": 1, "max_body_bytes": 30_000_000, "max_characters": 30_000_000}
    with impatient(**limits) as (url, connect):
        body = b'{"inputs": "%s"}' % (4_000_000 * b"a")
        with connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body)) as connection:
            connection.sendall(body)
            time.sleep(2.5)
            found = read_all(connection)
        assert found.startswith(b"HTTP/1.1 200")
        assert len(found) < 2 * len(body)  # of two tasks that answer with the text
        assert httpx.get(f"{url}/health").status_code == 200


def test_too_many_connections_close_those_without_a_request():
    with impatient(max_connections=20) as (url, connect):
        half_open = [connect(HEAD) for _ in range(60)]
        for _ in range(3):
            assert httpx.post(f"{url}/predict", json={"inputs": "Ab"}).content == ANSWER
        assert [read_all(connection) for connection in half_open[:40]] == 40 * [b""]
        for connection in half_open:
            connection.close()


def test_requests_beyond_all_connections_are_refused():
    echo = Echo()
    echo.open.clear()
    app = build_app(echo, limits=ServingLimits(max_connections=2, max_batch=1))
    with running(app) as url, ThreadPoolExecutor() as pool:
        busy = [pool.submit(httpx.post, f"{url}/predict", json={"inputs": "a"}) for _ in range(2)]
        assert echo.entered.wait(10)
        while app.state.service.batcher.depth < 1:  # one runs, one waits
            pass
        assert httpx.get(f"{url}/health").status_code == 503
        echo.open.set()
        assert [answer.result(10).status_code for answer in busy] == [200, 200]


# Clients that leave


def test_who_leaves_is_not_computed_and_gives_its_seats_back():
    echo = Echo()
    echo.open.clear()
    limits = ServingLimits(max_batch=4, queue_size=4, max_wait_ms=0)
    with running(build_app(echo, limits=limits)) as url, ThreadPoolExecutor() as pool:
        host, port = url.removeprefix("http://").split(":")
        first = pool.submit(httpx.post, f"{url}/predict", json={"inputs": "first"})
        assert echo.entered.wait(10)
        leaving = [socket.create_connection((host, int(port)), timeout=10) for _ in range(4)]
        for connection in leaving:
            connection.sendall(WHOLE)
        while metric(httpx, "queue_inputs", url) < 4:
            pass
        assert httpx.post(f"{url}/predict", json={"inputs": "a"}).status_code == 429
        for connection in leaving:
            connection.close()
        while metric(httpx, "queue_inputs", url):
            pass
        last = pool.submit(httpx.post, f"{url}/predict", json={"inputs": "last"})
        while not metric(httpx, "queue_inputs", url):
            pass
        echo.open.set()
        assert [answer.result(10).status_code for answer in (first, last)] == [200, 200]
        assert echo.batches == [1, 1]
        assert metric(httpx, r'http_answers_total\{status="499"\}', url) == 4


def test_who_gives_up_waiting_gives_its_seats_back():
    echo = Echo()
    echo.open.clear()
    with TestClient(build_app(echo, limits=ServingLimits(timeout_s=0.1, max_batch=1, max_wait_ms=0))) as client:
        assert ask(client, "first").status_code == 504
        assert metric(client, "queue_inputs") == 0
        echo.open.set()


# Faults of the worker


class Panic(BaseException):
    """As a tokenizer in Rust raises it."""


ERRORS = (Panic, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, CancelledError, MemoryError)


@pytest.mark.parametrize("method", ["answer", "check", "load_task", "put_task"])
def test_whatever_a_predictor_raises_the_server_goes_on(method, tmp_path, caplog, monkeypatch):
    echo, errors = Echo(), list(ERRORS)
    whole = getattr(echo, method)

    def fail(*arguments):
        if "trap" in str(arguments):
            raise errors[0]("secret")
        return whole(*arguments)

    monkeypatch.setattr(echo, method, fail)
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "format.txt").write_text("trap {}")
    with running(build_app(echo, allow_updates=tmp_path)) as url, httpx.Client() as client:
        while errors:
            if method.endswith("task"):
                answer = client.put(f"{url}/tasks/trap", json={"folder": "trap"})
            else:
                answer = client.post(f"{url}/predict", json={"inputs": ["a", "trap"]})
            assert answer.status_code == (422 if method == "load_task" else 500), errors[0]
            assert "secret" not in answer.text
            assert client.post(f"{url}/predict", json={"inputs": "Ab"}).content == ANSWER
            assert client.get(f"{url}/health").status_code == 200
            errors.pop(0)
    assert "Exception in ASGI application" not in caplog.text


def test_a_batch_without_end_is_said_so():
    echo = Echo()
    echo.open.clear()
    with TestClient(build_app(echo, limits=ServingLimits(timeout_s=0.1, max_wait_ms=0))) as client:
        assert ask(client, "a").status_code == 504
        while client.get("/health").json() != {"status": "stuck"}:
            pass
        assert ask(client, "b").status_code == client.get("/health").status_code == 503
        echo.open.set()
        while client.get("/health").json() != {"status": "ok"}:
            pass
        assert ask(client, "b").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_worker_ended_ends(monkeypatch):
    app = build_app(Echo(), limits=ServingLimits(grace_s=5))
    batcher = app.state.service.batcher
    monkeypatch.setattr(batcher, "_choose", lambda: 1 / 0)

    async def serve():
        server = LimitedServer(app, port=0)
        running = asyncio.create_task(server.serve())
        waiting = batcher.submit(("a", None))
        await asyncio.wait_for(running, 10)
        return server, waiting

    server, waiting = asyncio.run(serve())
    assert server.worker_failed
    assert "has ended" in str(waiting.exception(0))


# Paths


@pytest.mark.parametrize("path", ["/health", "/tasks", "/metrics"])
def test_head_is_get_without_a_body(path):
    with TestClient(build_app(Echo())) as client:
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("path", ["/health/", "/tasks/", "/predict/", "/metrics/", "//evil.example/"])
def test_no_path_redirects(path):
    with TestClient(build_app(Echo()), follow_redirects=False) as client:
        for method in ("GET", "POST", "PUT"):
            answer = client.request(method, path, headers={"Host": "evil.example"})
            assert answer.status_code in ({200, 400, 405} if path.startswith("//") else {404, 405})  # that of "/"
            assert "location" not in answer.headers


# The end


@contextmanager
def process(load, *arguments):
    """Start a server of echoes in a process."""
    command = [sys.executable, "-c", WITHOUT_MODELS, hf_moebert.__path__[0], echo_server.__file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        texts = [f"Text {number}" for number in range(16)]
        expected = {text: {"answers": {"upper": f"{text}!", "lower": text.lower()}} for text in texts}
        try:
            yield load.Server(server, int(server.stdout.readline().rpartition(":")[2]), expected)
        finally:
            server.kill()


@pytest.mark.process
def test_no_request_is_lost_at_the_end(load):
    """Clients ask on while the server ends, and one never ends its body and one its headers."""
    with process(load, "0.02", "5") as server:
        outcomes = asyncio.run(load.stop(server, honest=10, delay=0.5))
        assert server.process.wait(10) == 0  # it would be 1 beyond the grace of 5 seconds
    assert outcomes[200] > 0
    assert outcomes[503] > 0
    assert outcomes["lost"] == 0
    assert set(outcomes) <= {200, 429, 503, "refused", "closed"}


@pytest.mark.process
def test_a_batch_without_end_does_not_hold_up_the_end(load):
    with process(load, "60", "2") as server:

        async def ask_and_stop():
            client = load.Client(server)
            await client.open()
            client.send("Text 0")
            while not (await load.read_metrics(server))["batch_inputs_sum"]:
                pass
            server.process.terminate()
            return await client.reader.read()

        assert asyncio.run(ask_and_stop()).startswith(b"HTTP/1.1 503")
        assert server.process.wait(10) == 1


def test_more_connections_than_the_system_allows_are_refused(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    app = build_app(Echo())
    with pytest.raises(ValueError, match="`max_connections` must be at most 924, since this system allows 1024"):
        run_server(app, host="127.0.0.1", port=0, announce=print)


# Load, in small


def test_a_crowd_gets_its_answers(load):
    with served_here(load) as server:
        found = asyncio.run(load.crowd(server, clients=100))
        assert found["right answers"] == 100


def test_half_open_connections_are_closed(load):
    with served_here(load, header_timeout_s=0.5) as server:
        found = asyncio.run(load.half_open(server, 30, honest=3, asks=3, rounds=1))
        assert found["closed by the server"] == 30


def test_departures_are_noticed(load):
    with served_here(load) as server:
        found = asyncio.run(load.leave(server, leaving=20))
        assert found["noticed (499)"] == 20
        assert found["waiting afterwards"] == 0


@contextmanager
def served_here(load, **limits):
    """Serve echoes in a thread of this process."""
    with running(build_app(Echo(), limits=ServingLimits(**limits))) as url:
        expected = {"Ab": {"answers": {"upper": "Ab!", "lower": "ab"}}}
        yield load.Server(None, int(url.rpartition(":")[2]), expected)


def test_a_wrong_answer_under_load_is_an_error(load):
    with served_here(load) as server:
        server.expected["Ab"]["answers"]["lower"] = "Ab"
        with pytest.raises(RuntimeError, match="'Ab' must be answered"):
            asyncio.run(load.crowd(server, clients=1))
