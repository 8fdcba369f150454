"""The command line `hf-moebert`: parse, call a public function, print.

The package is not imported here, not even for a constant: that would import all models, and `--help` has to answer at
once. Each command imports what it needs.
"""

import json
import logging
import os
import sys
import traceback
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_moebert_main import load_alone


LIBRARIES = ("datasets", "transformers")  # DATASETS_VERBOSITY and TRANSFORMERS_VERBOSITY show their logs
LONGEST_MESSAGE = 2000  # characters; transformers lists hundreds of tensors where weights do not fit
Threads = Annotated[int | None, typer.Option(min=1, help="Threads torch computes with.")]
Rounds = Annotated[int, typer.Option(min=2, help="Timed passes of each model or form.")]


class OneLineErrors(TyperGroup):
    """A group of commands that answers every error with one line on stderr and exit code 2, without a stack trace."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command as typer does, except for errors."""
        standalone = extra.pop("standalone_mode", True)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed
            stream.reconfigure(errors="replace")  # a locale may lack letters of a path
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except typer.TyperException as error:
            typer.echo(f"hf-moebert: {_shorten(error.format_message())}", err=True)
            code = 2
        if not standalone:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and turn what it raises into a message; typer itself answers Ctrl-C and a closed pipe."""
        levels = {name: logging.getLogger(name).level for name in LIBRARIES}
        try:
            result = super().invoke(ctx)
            typer.echo(nl=False)  # flushes: a closed pipe shows here, not while Python exits
        except (typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise typer.TyperException(_describe(error)) from error
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        return result


def _describe(error: Exception) -> str:
    """Return the message of an error that was foreseen, or the kind of another one and how to see where it was."""
    message = str(error).strip()
    if message and isinstance(error, (ValueError, OSError)):
        return message
    found = ": ".join(filter(None, (type(error).__name__, message.rstrip("."))))
    return f"{_shorten(found)}. Use `hf-moebert --debug` to see where."


def _shorten(message: str) -> str:
    """Write a message on one line, without control characters."""
    letters = message.encode(errors="replace").decode()  # the bytes of a file's name may be no letters
    line = " ".join("".join(char if char.isprintable() else " " for char in letters).split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]} …"


app = typer.Typer(
    cls=OneLineErrors,
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},  # --max_batch is --max-batch
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_moebert {metadata.version('hf_moebert')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="HF_MOEBERT_DEBUG", help="Show where an error was raised.")
    ] = False,
) -> None:
    """Compress fine-tuned transformers, measure them against what they come from, and pack, publish and serve them."""


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of classifiers, rerankers or embedders.")],
    baseline: Annotated[str, typer.Option(help="Folder or Hub id of the model to compare with.")],
    validation_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A .json, .jsonl, .csv, .tsv or .parquet file.")
    ] = None,
    dataset_name: Annotated[str | None, typer.Option(help="A data set on the Hub, instead of a file.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "validation",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    text_pair_column: Annotated[str | None, typer.Option(help="Column that holds the second text of a pair.")] = None,
    label_column: Annotated[str, typer.Option(help="Column that holds the label.")] = "label",
    group_column: Annotated[
        str | None, typer.Option(help="Column that says which rows belong to one query, for rerankers.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls or last, for embedders whose folders do not say it.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens after which a text is truncated.")] = 128,
    optimized: Annotated[
        list[str] | None,
        typer.Option(help="Also measure each model optimised in float32, bfloat16 or int8. Repeat for several."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Load all models in float32, bfloat16 or float16; by default as they are stored."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Score to compute; by default what suits the problem. Repeat for several."),
    ] = None,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Score a random sample of this size only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch while scoring.")] = 32,
    latency_batch: Annotated[int, typer.Option(min=1, help="Sequences per timed pass.")] = 1,
    latency_seq: Annotated[int, typer.Option(min=1, help="Tokens per sequence of a timed pass.")] = 128,
    real_texts: Annotated[bool, typer.Option("--real-texts", help="Time the texts themselves instead.")] = False,
    threads: Threads = None,
    rounds: Rounds = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample, the bootstrap and the timed inputs.")] = 0,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, writable=True, help="JSON file to write all results to.")
    ] = None,
) -> None:
    """Compare the quality, size and speed of models with a baseline, in one table.

    Classifiers and regressions by their labels, rerankers (--group-column) by the order of documents, and models
    without head by the cosines of pairs of texts.
    """
    if (validation_file is None) == (dataset_name is None):
        raise typer.BadParameter("give exactly one of --validation-file and --dataset-name.")
    if output is not None and not os.access(output.parent, os.W_OK):
        raise typer.BadParameter(f"the folder of --output must exist and be writable, got {str(output)!r}.")
    from hf_moebert.measuring.comparison import Latency, TextColumns, measure as measure_models
    from hf_moebert.reporting.tables import measurement_rows, rich_table

    _quiet_libraries()
    names = _name_models([baseline, *models])
    result = measure_models(
        names,
        _load_examples(validation_file, dataset_name, dataset_config_name, split),
        baseline=next(name for name, source in names.items() if source == baseline),
        optimized=optimized or (),
        dtype=dtype,
        metrics=metric,
        columns=TextColumns(text_column, text_pair_column, label_column, max_length, group_column),
        pooling=pooling,
        latency=Latency(latency_batch, None if real_texts else latency_seq, rounds),
        batch_size=batch_size,
        max_examples=max_examples,
        threads=threads,
        seed=seed,
    )
    _print_table(rich_table(measurement_rows(result), title="Compared with the baseline, 95 % intervals"))
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A finished checkpoint: config.json, model.safetensors, README.md.")],
    repo_id: Annotated[str, typer.Argument(help="Repository to upload to: name or owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
) -> None:
    """Upload a checkpoint folder to the Hub and print the address of the commit."""
    from hf_moebert.reporting import hub

    _quiet_libraries()
    typer.echo(hub.publish(folder, repo_id, private=private, revision=revision))


@app.command()
def footprint(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, dense or packed.")],
    threads: Threads = None,
    seq: Annotated[int, typer.Option(min=1, help="Tokens per sequence of a timed pass.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per timed pass.")] = 1,
    rounds: Rounds = 20,
) -> None:
    """Count parameters and zeros, and measure which sparse form pays on this machine."""
    from dataclasses import asdict

    import torch

    from hf_moebert.checkpoints.loading import load_model
    from hf_moebert.measuring.footprint import describe_origin, find_widths, measure_footprint, width_rows
    from hf_moebert.measuring.sparse_forms import compare_sparse_forms, sparse_form_rows
    from hf_moebert.reporting.tables import describe_sparsity, rich_table

    _quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(folder)
    size = measure_footprint(model, seq_len=seq, folder=folder)
    forms = compare_sparse_forms(model, batch=batch, seq=seq, rounds=rounds)
    typer.echo(f"parameters      {size.total:,}")
    typer.echo(f"active          {size.active:,} of them per token")
    typer.echo(f"not zero        {size.nonzero:,}; sparsity: {describe_sparsity(asdict(size))}")
    typer.echo(f"bytes on disk   {size.bytes_on_disk:,}")
    if widths := find_widths(model):
        typer.echo(f"dense origin    {describe_origin(widths, size.total)}")
        _print_table(rich_table(width_rows(widths), title="Units of each layer, beside its dense origin"))
    _print_table(rich_table(sparse_form_rows(forms), title="Pruned matrices in each form, speed against dense"))


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A checkpoint of a pruned model.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the packed copy.")],
) -> None:
    """Write a copy that stores only the weights pruning left, and all other files but the state of a training run.

    `from_pretrained` loads it after `import hf_moebert`.
    """
    from hf_moebert.checkpoints.packing import pack_folder
    from hf_moebert.measuring.footprint import count_bytes

    _quiet_libraries()
    pack_folder(folder, output)
    before, after = count_bytes(folder), count_bytes(output)
    typer.echo(f"{output}: {after:,} bytes of weights, {after / before:.0%} of {before:,}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, dense or in a form of this package.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the graphs.")],
    precision: Annotated[list[str] | None, typer.Option(help="float32 (the default), int8. Repeat for both.")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A file of texts on which int8 is compared with float32."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    max_texts: Annotated[int, typer.Option(min=1, help="Compare on the first texts only.")] = 200,
) -> None:
    """Write a model for ONNX Runtime, checked against torch; `hf_moebert.runtime` runs it without torch."""
    from transformers import AutoTokenizer

    from hf_moebert.checkpoints.loading import load_model
    from hf_moebert.checkpoints.remote_code import refuse_code
    from hf_moebert.inference.onnx_export import export_onnx

    _quiet_libraries()
    model, tokenizer = load_model(folder), None
    if (folder / "tokenizer_config.json").is_file():
        with refuse_code(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows = () if texts is None else list(_read_file(texts, argument="--texts")[text_column][:max_texts])
    manifest = export_onnx(model, output, precisions=precision or ["float32"], tokenizer=tokenizer, texts=rows)
    for name, found in manifest["precisions"].items():
        typer.echo(f"{output / name}: {json.dumps(found)}")


def _load_examples(file: Path | None, name: str | None, config_name: str | None, split: str) -> Any:
    if file is None:
        from datasets import load_dataset

        return load_dataset(name, config_name, split=split)
    return _read_file(file, argument="--validation-file")


def _read_file(file: Path, *, argument: str) -> Any:
    from hf_moebert.data import read_file

    return read_file(file, argument=argument)


def _name_models(sources: list[str]) -> dict[str, str]:
    """Name each model by the last part of its path, or by the whole path where two would share a name."""
    sources = list(dict.fromkeys(sources))
    short = [Path(source).name or source for source in sources]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, sources, strict=True)}


def _print_table(table: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160  # a file or a log has room for whole rows
    Console(width=width).print(table)


def _quiet_libraries() -> None:
    """Keep the progress of libraries to terminals, and to them what they report before they raise it as an error."""
    if find_spec("torch") is None:  # nor are they there: exports are served without them
        return
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bars()
        disable_progress_bar()
    for name in LIBRARIES:
        if f"{name.upper()}_VERBOSITY" not in os.environ:
            logging.getLogger(name).setLevel(logging.CRITICAL)


load_alone("cli_compress.py").add_commands(app, read=_read_file, quiet=_quiet_libraries)
load_alone("cli_serve.py").add_command(app, quiet=_quiet_libraries)
