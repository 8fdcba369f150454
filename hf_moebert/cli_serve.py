"""The command `serve`. `cli.py` loads this file alone; the command imports the package when it runs."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moebert_main import load_alone


LIMITS: Any = load_alone("serving/limits.py").ServingLimits
LIMIT_HELP = {field.name: field.metadata["help"] for field in fields(LIMITS)}


def add_command(app: typer.Typer, *, quiet: Callable[[], None]) -> None:
    """Add the command to the command line.

    Args:
        app: The command line.
        quiet: Keeps the progress of libraries to terminals.
    """

    @app.command()
    def serve(
        context: typer.Context,
        models: Annotated[
            list[str],
            typer.Argument(help="Folders or Hub ids of models of any task, or of ONNX exports; or NAME=FOLDER."),
        ],
        host: Annotated[str, typer.Option(help="Address to listen on; the default accepts this machine only.")] = (
            "127.0.0.1"
        ),
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
        engine: Annotated[str | None, typer.Option(help="torch or onnx; by default what the folder is for.")] = None,
        precision: Annotated[
            str | None, typer.Option(help="float32 (the default), int8 or bfloat16, of all models.")
        ] = None,
        pooling: Annotated[
            str | None, typer.Option(help="mean, cls or last, for embedders whose folders do not say it.")
        ] = None,
        api_key_file: Annotated[
            Path | None,
            typer.Option(exists=True, dir_okay=False, help="A file of keys, one a line: clients must send one."),
        ] = None,
        max_batch: Annotated[int, typer.Option(min=1, help=LIMIT_HELP["max_batch"])] = LIMITS.max_batch,
        max_wait_ms: Annotated[float, typer.Option(min=0, help=LIMIT_HELP["max_wait_ms"])] = LIMITS.max_wait_ms,
        queue_size: Annotated[int | None, typer.Option(min=1, help=LIMIT_HELP["queue_size"])] = LIMITS.queue_size,
        max_body_bytes: Annotated[int, typer.Option(min=1, help=LIMIT_HELP["max_body_bytes"])] = LIMITS.max_body_bytes,
        max_characters: Annotated[int, typer.Option(min=1, help=LIMIT_HELP["max_characters"])] = LIMITS.max_characters,
        timeout_s: Annotated[float, typer.Option(min=0.001, help=LIMIT_HELP["timeout_s"])] = LIMITS.timeout_s,
        max_header_bytes: Annotated[
            int, typer.Option(min=1, help=LIMIT_HELP["max_header_bytes"])
        ] = LIMITS.max_header_bytes,
        header_timeout_s: Annotated[
            float, typer.Option(min=0.001, help=LIMIT_HELP["header_timeout_s"])
        ] = LIMITS.header_timeout_s,
        keep_alive_s: Annotated[float, typer.Option(min=0.001, help=LIMIT_HELP["keep_alive_s"])] = LIMITS.keep_alive_s,
        max_connections: Annotated[
            int, typer.Option(min=1, help=LIMIT_HELP["max_connections"])
        ] = LIMITS.max_connections,
        grace_s: Annotated[float, typer.Option(min=0.001, help=LIMIT_HELP["grace_s"])] = LIMITS.grace_s,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads that a worker computes with.")] = None,
        workers: Annotated[
            int, typer.Option(min=1, help="Processes that answer; they share the memory of the weights.")
        ] = 1,
        allow_updates: Annotated[
            Path | None,
            typer.Option(
                exists=True, file_okay=False, help="Let clients add tasks of a multi-task model from this directory."
            ),
        ] = None,
    ) -> None:
        """Answer texts over HTTP with models of any task, until Ctrl-C or SIGTERM."""
        if workers > 1 and allow_updates is not None:
            raise ValueError("`--workers` must be 1 with `--allow-updates`: an update would reach one worker alone.")
        with sharing_metrics(workers):
            try:
                from hf_moebert.serving.app import build_app
                from hf_moebert.serving.keys import read_keys
                from hf_moebert.serving.limits import ServingLimits
                from hf_moebert.serving.loading import load_predictor
                from hf_moebert.serving.server import run_server
                from hf_moebert.serving.workers import run_workers
            except ImportError as error:
                raise ValueError(
                    f"`serve` needs more packages, {error}. Use `pip install hf_moebert[serve]`."
                ) from error
            quiet()
            before = 1 if workers > 1 else threads  # forks have no threads of their parent
            set_threads(before)
            limits = ServingLimits(**{name: context.params[name] for name in LIMIT_HELP})
            keys = [] if api_key_file is None else read_keys(api_key_file)
            options: dict[str, Any] = {
                "engine": engine,
                "precision": precision,
                "pooling": pooling,
                "threads": before or 0,
            }
            loaded = {name: load_predictor(source, **options) for name, source in name_models(models).items()}

            def announce(url: str) -> None:
                kinds = [f"{name} ({predictor.describe()['kind']})" for name, predictor in loaded.items()]
                typer.echo(f"Serving {', '.join(kinds)} on {url}")

            def begin() -> None:
                set_threads(threads or max(1, (os.cpu_count() or 1) // workers))

            app = build_app(loaded, limits=limits, allow_updates=allow_updates, keys=keys)
            place: dict[str, Any] = {"host": host, "port": port, "announce": announce}
            if workers > 1:
                run_workers(app, workers=workers, begin=begin, **place)
            else:
                run_server(app, **place)
        gc.freeze()  # the process ends: a last search of all that torch holds for cycles takes a second


def set_threads(count: int | None) -> None:
    """Set the threads that torch computes with, if it is there."""
    if count is not None and find_spec("torch"):
        import torch

        torch.set_num_threads(count)


@contextmanager
def sharing_metrics(workers: int) -> Iterator[None]:
    """Let prometheus_client, which is imported inside, keep the metrics of several workers in files."""
    if workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hf_moebert-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        yield


def name_models(models: list[str]) -> dict[str, str]:
    """Return the source of each model by its name: the one given, or the last part of its path.

    Raises:
        ValueError: If two have one name.
    """
    pairs = [one.split("=", 1) if is_named(one) else ["", one] for one in models]
    named = [(label or Path(source).name or source, source) for label, source in pairs]
    labels = [label for label, _ in named]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"Models must have different names, got {twice} twice. Name them: `NAME=FOLDER`.")
    return dict(named)


def is_named(argument: str) -> bool:
    """Check whether an argument has a name before its folder, and is no folder with such a name."""
    return "=" in argument and not Path(argument).exists() and "/" not in argument.partition("=")[0]
