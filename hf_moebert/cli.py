"""The command line `hf-moebert`: parse, call a public function, print."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


# What only one command needs is imported inside it, so that `--help` answers at once.


class OneLineErrors(TyperGroup):
    """Answer bad use with one line on stderr and exit code 2, never with a stack trace."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command, as typer does, but for the errors."""
        standalone = extra.pop("standalone_mode", True)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a locale may lack a path's letters
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except (typer.TyperException, ValueError, OSError) as error:
            message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
            typer.echo(f"hf-moebert: {' '.join(message.split())}", err=True)
            code = 2
        if not standalone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineErrors,
    help="Measure compressed transformers against the model they come from, pack, publish and serve them.",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of sequence classifiers.")],
    baseline: Annotated[str, typer.Option("--baseline", help="Folder or Hub id of the model to compare with.")],
    validation_file: Annotated[
        Path | None,
        typer.Option(
            "--validation_file", exists=True, dir_okay=False, help="A .json, .jsonl, .csv, .tsv or .parquet file."
        ),
    ] = None,
    dataset_name: Annotated[str | None, typer.Option("--dataset_name", help="A data set on the Hub.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option("--dataset_config_name", help="Its part.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the data set on the Hub.")] = "validation",
    text_column: Annotated[str, typer.Option("--text_column")] = "text",
    text_pair_column: Annotated[str | None, typer.Option("--text_pair_column")] = None,
    label_column: Annotated[str, typer.Option("--label_column")] = "label",
    max_length: Annotated[int, typer.Option("--max_length", help="Tokens of a text that count.")] = 128,
    optimized: Annotated[
        list[str] | None,
        typer.Option(
            "--optimized",
            help="Measure all models once more, optimised for inference in float32, bfloat16 or int8; repeatable.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Repeat for several; by default what suits the problem.")
    ] = None,
    max_examples: Annotated[int | None, typer.Option("--max_examples", help="Score this many, drawn.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Examples at a time while scoring.")] = 32,
    latency_batch: Annotated[int, typer.Option("--latency_batch", help="Sequences of a timed pass.")] = 1,
    latency_seq: Annotated[int, typer.Option("--latency_seq", help="Tokens of each of them.")] = 128,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads that torch computes with.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Timed passes of every model.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw, the bootstrap and the timed ids.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="JSON file for everything measured.")] = None,
) -> None:
    """Compare the quality, size and speed of classifiers with a baseline, in one table."""
    if (validation_file is None) == (dataset_name is None):
        raise typer.BadParameter("give exactly one of --validation_file and --dataset_name.")
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"the folder of --output must exist, got {str(output)!r}.")
    from hf_moebert.measuring.comparison import Latency, TextColumns
    from hf_moebert.measuring.comparison import measure as measure_models
    from hf_moebert.reporting.tables import measurement_rows, rich_table

    if not sys.stderr.isatty():
        _hide_progress()
    names = _name_models([baseline, *models])
    result = measure_models(
        names,
        _load_examples(validation_file, dataset_name, dataset_config_name, split),
        baseline=next(name for name, source in names.items() if source == baseline),
        optimized=optimized or (),
        metrics=metric,
        columns=TextColumns(text_column, text_pair_column, label_column, max_length),
        latency=Latency(latency_batch, latency_seq, rounds),
        batch_size=batch_size,
        max_examples=max_examples,
        threads=threads,
        seed=seed,
    )
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print_table(rich_table(measurement_rows(result), title="Compared with the baseline, 95 % intervals"))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A finished checkpoint: config.json, model.safetensors, README.md.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: name or owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Show it to nobody else.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to upload to.")] = None,
) -> None:
    """Upload a checkpoint folder to the Hub and print the address of the commit."""
    from hf_moebert.reporting import hub

    typer.echo(hub.publish(folder, repo_id, private=private, revision=revision))


@app.command()
def footprint(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, dense or packed.")],
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads that torch computes with.")] = None,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of each sequence of a timed pass.")] = 128,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of a timed pass.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", help="Timed passes of every form.")] = 20,
) -> None:
    """Say how many parameters a model has, how many are zero, and in which form that pays on this machine."""
    import torch

    from hf_moebert.checkpoints.loading import load_model
    from hf_moebert.measuring.footprint import measure_footprint
    from hf_moebert.measuring.sparse_forms import compare_sparse_forms, sparse_form_rows
    from hf_moebert.reporting.tables import rich_table

    if not sys.stderr.isatty():
        _hide_progress()
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(folder)
    size = measure_footprint(model, seq_len=seq, folder=folder)
    forms = compare_sparse_forms(model, batch=batch, seq=seq, rounds=rounds)
    assert size.nonzero is not None
    typer.echo(f"parameters      {size.total:,}")
    typer.echo(f"active          {size.active:,} of them meet one token")
    typer.echo(f"not zero        {size.nonzero:,}: {1 - size.nonzero / size.total:.1%} sparsity")
    typer.echo(f"bytes on disk   {size.bytes_on_disk:,}")
    _print_table(rich_table(sparse_form_rows(forms), title="Pruned matrices in each form, speed against dense"))


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A checkpoint of a pruned model.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the packed copy.")],
) -> None:
    """Write a copy that stores only what pruning left; `from_pretrained` loads it after `import hf_moebert`."""
    from hf_moebert.checkpoints.packing import pack_folder
    from hf_moebert.measuring.footprint import count_bytes

    if not sys.stderr.isatty():
        _hide_progress()
    pack_folder(folder, output)
    before, after = count_bytes(folder), count_bytes(output)
    typer.echo(f"{output}: {after:,} bytes of weights, {after / before:.0%} of {before:,}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a merged multi-task model.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on; by default no other machine's.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any that is free.")] = 8000,
    max_batch: Annotated[int, typer.Option("--max_batch", min=1, help="Inputs of a batch, and of a request.")] = 32,
    max_wait_ms: Annotated[float, typer.Option("--max_wait_ms", min=0, help="Wait of a request for company.")] = 5,
    queue_size: Annotated[int, typer.Option("--queue_size", min=1, help="Inputs that may wait.")] = 256,
    max_body_bytes: Annotated[int, typer.Option("--max_body_bytes", min=1, help="Of a request.")] = 1_000_000,
    max_characters: Annotated[int, typer.Option("--max_characters", min=1, help="Of an input.")] = 20_000,
    timeout_s: Annotated[float, typer.Option("--timeout_s", min=0.001, help="Until a request is given up.")] = 30,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads that torch computes with.")] = None,
    allow_updates: Annotated[
        Path | None,
        typer.Option(
            "--allow_updates",
            exists=True,
            file_okay=False,
            help="Let clients put tasks from folders in this directory.",
        ),
    ] = None,
) -> None:
    """Answer texts over HTTP with all tasks of a model, until Ctrl-C or SIGTERM."""
    try:
        from hf_moebert.serving.app import ServingLimits, build_app, run_server
    except ImportError as error:
        raise ValueError(f"`serve` needs more packages, {error}. Use `pip install hf_moebert[serve]`.") from error
    if not sys.stderr.isatty():
        _hide_progress()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    limits = ServingLimits(max_batch, max_wait_ms, queue_size, max_body_bytes, max_characters, timeout_s)
    predictor = _load_tasks(model)
    served = build_app(predictor, limits=limits, allow_updates=allow_updates)
    names = ", ".join(predictor.describe_tasks())
    run_server(served, host=host, port=port, announce=lambda url: typer.echo(f"Serving {names} of {model} on {url}"))


def _load_tasks(source: str) -> Any:
    from transformers import AutoConfig, pipeline

    from hf_moebert import MultiTaskBertModel

    config = AutoConfig.from_pretrained(source)
    if config.model_type != MultiTaskBertModel.config_class.model_type:
        raise ValueError(f"`model` must be a merged multi-task model, got {config.model_type!r} in {source!r}.")
    return pipeline("multitask", model=MultiTaskBertModel.from_pretrained(source), tokenizer=source)


def _load_examples(file: Path | None, name: str | None, config_name: str | None, split: str) -> Any:
    if file is None:
        from datasets import load_dataset

        return load_dataset(name, config_name, split=split)
    from hf_moebert.data.texts import load_splits

    return load_splits(train_file=file, validation_file=file)["validation"]


def _name_models(sources: list[str]) -> dict[str, str]:
    """Call each model by the last part of its path, or by the whole path where two would share a name."""
    sources = list(dict.fromkeys(sources))
    short = [Path(source).name or source for source in sources]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, sources, strict=True)}


def _print_table(table: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140  # a file or a log has room for whole rows
    Console(width=width).print(table)


def _hide_progress() -> None:
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
