"""A predictor without a model, and a server of it in a thread; as a program, it serves until a signal."""

import sys
import threading
import time
from contextlib import contextmanager

from hf_moebert.serving import ServingLimits, build_app, run_server
from hf_moebert.serving.server import LimitedServer
from hf_moebert.serving.workers import run_workers


class Echo:
    """Predictor that answers a text with the text in a format: `upper`, `lower`, or one that was put."""

    def __init__(self, seconds=0.0):
        self.formats = {"upper": "{}!".format, "lower": str.lower}
        self.seconds = seconds
        self.batches = []
        self.entered, self.open = threading.Event(), threading.Event()
        self.open.set()

    def describe(self):
        return {"kind": "multi-task", "tasks": self.describe_tasks()}

    def describe_tasks(self):
        return {name: {"kind": "echo"} for name in list(self.formats)}

    def check(self, inputs, options):
        if not isinstance(inputs, str):
            raise ValueError("An input must be a text.")  # noqa: TRY004

    def answer(self, requests):
        if threading.current_thread().name == "batcher":  # not the try before the server starts
            self.entered.set()
            self.open.wait(20)
            time.sleep(self.seconds)
            self.batches.append(len(requests))
        if any(text == "trap" for text, _ in requests):
            raise RuntimeError("secret /path")
        asked = [(text, options.tasks or list(self.formats)) for text, options in requests]
        return [{"answers": {name: self.formats[name](text) for name in tasks}} for text, tasks in asked]

    def load_task(self, folder):
        return (folder / "format.txt").read_text()

    def put_task(self, name, task):
        if "{}" not in task:
            raise ValueError("`format` must hold a place for the text.")
        self.formats[name] = task.format

    def remove_task(self, name):
        del self.formats[name]


@contextmanager
def running(app):
    """Serve in a thread on a free port, and yield the URL."""
    server = LimitedServer(app, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


if __name__ == "__main__":
    seconds, grace_s, workers = map(float, [*sys.argv[1:], *("0.5", "20", "1")[len(sys.argv) - 1 :]])
    place = {"host": "127.0.0.1", "port": 0, "announce": lambda url: print(url, flush=True)}
    limits = ServingLimits(max_batch=2, grace_s=grace_s)
    if workers > 1:
        run_workers(build_app(Echo(seconds), limits=limits), workers=int(workers), **place)
    else:
        run_server(build_app(Echo(seconds), limits=limits), **place)
