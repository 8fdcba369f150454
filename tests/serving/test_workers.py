"""Several workers: what they share, and that they end together, in order or not."""

import asyncio
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from test_app import metric
from test_server import load as serving_load, process


pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the processes of Linux"),
]
load = serving_load  # a fixture


@contextmanager
def workers(load, tmp_path, count=2):
    """Serve echoes by several processes, and yield the server and the ids of the workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        with process(load, "0.02", "5", str(count)) as server:
            found = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            assert len(found) == count
            yield server, [int(one) for one in found]


def is_running(process_id):
    return Path(f"/proc/{process_id}").exists()


def test_workers_lose_no_request_at_the_end(load, tmp_path):
    with workers(load, tmp_path) as (server, children):
        outcomes = asyncio.run(load.stop(server, honest=10, delay=0.5))
        assert server.process.wait(10) == 0
        assert not any(is_running(child) for child in children)
    assert outcomes[200] > 0
    assert outcomes["lost"] == 0
    assert set(outcomes) <= {200, 429, 503, "refused", "closed"}


@pytest.mark.parametrize("killed", ["a worker", "the parent"])
def test_workers_end_together(load, tmp_path, killed):
    with workers(load, tmp_path) as (server, children):
        url = f"http://127.0.0.1:{server.port}"
        for number in range(20):
            assert httpx.post(f"{url}/predict", json={"inputs": f"Text {number}"}).status_code == 200
        assert metric(httpx, "batch_inputs_sum", url) == 20  # of both, whichever answers
        assert metric(httpx, r'http_answers_total\{status="200"\}', url) >= 21
        os.kill(children[0] if killed == "a worker" else server.process.pid, signal.SIGKILL)
        assert server.process.wait(10) != 0
        deadline = time.monotonic() + 10
        while any(is_running(child) for child in children) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(is_running(child) for child in children)
