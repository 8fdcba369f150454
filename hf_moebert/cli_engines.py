"""The command that chooses an engine. `cli.py` loads this file alone, and it imports the package when it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def add_commands(app: typer.Typer, *, read: Callable[..., Any], quiet: Callable[[], None]) -> None:
    """Add the command to the command line.

    Args:
        app: The command line.
        read: Reads the rows of a file.
        quiet: Keeps the progress of libraries to terminals.
    """

    @app.command()
    def engine(
        folder: Annotated[Path, typer.Argument(help="A checkpoint with its tokenizer.")],
        texts: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A file of texts as they will come.")],
        text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
        max_texts: Annotated[int, typer.Option(min=1, help="Measure on the first texts only.")] = 64,
        batch: Annotated[int, typer.Option(min=1, help="Texts that are run together.")] = 8,
        allowed_difference: Annotated[
            float, typer.Option(min=0, max=0.99, help="1 less the worst cosine to plain torch.")
        ] = 0.01,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads, by default those of torch.")] = None,
    ) -> None:
        """Measure whether torch or ONNX Runtime, and which precision, is the fastest here, and keep the choice."""
        from hf_moebert.measuring.engines import choose_engine

        quiet()
        rows = list(read(texts, argument="--texts")[text_column][:max_texts])
        options: dict[str, Any] = {"batch_size": batch, "allowed_difference": allowed_difference, "threads": threads}
        typer.echo(choose_engine(folder, rows, **options).reason)
