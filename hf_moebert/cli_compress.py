"""The commands of the door, and `engine`. `cli.py` loads this file alone; they import the package when they run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


UNSUPPORTED, NOT_EXPORTED = 5, 6  # exit codes: the task is not known here; the result is there, but not its export
SIZES = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
TIMES = {"s": 1, "m": 60, "h": 3600}


def add_commands(app: typer.Typer, *, read: Callable[..., Any], quiet: Callable[[], None]) -> None:
    """Add the commands to the command line.

    Args:
        app: The command line.
        read: Reads the rows of a file.
        quiet: Keeps the progress of libraries to terminals.
    """

    @app.command()
    def compress(
        model: Annotated[
            str, typer.Argument(help="Folder or Hub id of a fine-tuned model, an embedder or a small LLM.")
        ],
        output: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run.")],
        data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Texts to learn from, labelled or not.")],
        recipe: Annotated[str, typer.Option(help="A name (`hf-moebert recipes`), a .yaml file, or auto.")] = "auto",
        eval: Annotated[  # the option's name
            Path | None,
            typer.Option(exists=True, dir_okay=False, help="Texts for the verdict; else a fifth of --data."),
        ] = None,
        set: Annotated[list[str] | None, typer.Option(help="Change an option: prune.keep_ratio=0.3. Repeat.")] = None,
        speedup: Annotated[float | None, typer.Option(min=1, help="Times as fast as the given model.")] = None,
        max_size: Annotated[str | None, typer.Option(help="Largest size on disk, such as 60MB.")] = None,
        max_drop: Annotated[float | None, typer.Option(min=0, help="Largest drop of the score, such as 0.01.")] = None,
        metric: Annotated[
            str | None, typer.Option(help="Score that counts; by default the first of the task.")
        ] = None,
        batch: Annotated[int | None, typer.Option(min=1, help="Texts in a timed forward pass.")] = None,
        tokens: Annotated[
            str | None, typer.Option(help="Tokens of each of them; or real: the texts of the verdict.")
        ] = None,
        text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
        text_pair_column: Annotated[str | None, typer.Option(help="Column with the second text of a pair.")] = None,
        label_column: Annotated[str, typer.Option(help="Column that holds the label, if there is one.")] = "label",
        group_column: Annotated[
            str | None, typer.Option(help="Column that says which rows belong to one query, for rerankers.")
        ] = None,
        max_length: Annotated[int, typer.Option(min=1, help="Tokens after which a text is truncated.")] = 128,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads torch computes with.")] = None,
        budget: Annotated[str | None, typer.Option(help="Time for auto to search in, such as 30m or 2h.")] = None,
        export: Annotated[
            list[str] | None, typer.Option(help="Write it for ONNX Runtime, too: onnx or onnx-int8. Repeat for both.")
        ] = None,
        seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything.")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Only print the recipe, all options resolved, and what to expect.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    ) -> None:
        """Make a model smaller and faster within an allowed loss of quality, and measure that it is.

        Ends with 0 if all targets are met, 3 if the quality is not kept for sure, 4 if speed or size is missed, 5 if
        the kind of model is not known, and 6 if it cannot be exported.
        """
        import yaml

        from hf_moebert.architectures.processes import find_processes
        from hf_moebert.compress.door import ExportError, compress as run
        from hf_moebert.compress.recipe_file import read_recipe
        from hf_moebert.compress.tasks import UnsupportedModelError
        from hf_moebert.measuring.comparison import TextColumns

        quiet()
        target = {"speedup": speedup, "max_drop": max_drop, "metric": metric, "batch": batch}
        target["tokens"] = int(tokens) if tokens is not None and tokens.isdecimal() else tokens
        target["max_size"] = None if max_size is None else parse_amount(max_size, SIZES, "--max-size", "60MB")
        changes = [*(set or ()), *([] if seed is None else [f"seed={seed}"])]
        if export:
            changes.append(f"export={json.dumps(export)}")
        if budget is not None:
            changes.append(f"search.budget={parse_amount(budget, TIMES, '--budget', '30m')}")
        wanted = read_recipe(recipe, changes=changes, **target)
        try:
            if dry_run:
                typer.echo(yaml.safe_dump(wanted.as_dict(), sort_keys=False).rstrip())
                for line in foretell(model, wanted, len(read(data, argument="--data")), threads):
                    typer.echo(f"# {line}")
                return
            result = run(
                model,
                wanted,
                data=read(data, argument="--data"),
                eval_data=None if eval is None else read(eval, argument="--eval"),
                output_dir=output,
                columns=TextColumns(text_column, text_pair_column, label_column, max_length, group_column),
                resume=resume,
                threads=threads,
                tell=lambda line: typer.echo(line, err=True),
            )
        except (UnsupportedModelError, ExportError) as error:
            typer.echo(f"hf-moebert: {error}", err=True)
            raise typer.Exit(NOT_EXPORTED if isinstance(error, ExportError) else UNSUPPORTED) from error
        if not find_processes().is_main_process:
            raise typer.Exit(result.verdict.exit_code)
        if as_json:
            typer.echo(json.dumps(result.verdict.as_dict()))
        else:
            typer.echo(f"{result.verdict.outcome}: " + "\n  ".join(["", *result.verdict.reasons]).strip())
            typer.echo(f"Report: {output / 'report.html'}")
        raise typer.Exit(result.verdict.exit_code)

    @app.command()
    def recipes() -> None:
        """List the recipes that `compress` knows by name."""
        from hf_moebert.compress.recipe_file import shipped_recipes

        for name, purpose in shipped_recipes().items():
            typer.echo(f"{name:<12}{purpose}")

    @app.command()
    def verify(
        folder: Annotated[Path, typer.Argument(help="Folder of a run of `compress` or of an export.")],
    ) -> None:
        """Check that this machine computes what the one did on which a model was compressed."""
        from hf_moebert.compress.verifying import verify as check

        quiet()
        for form, difference in check(folder).items():
            typer.echo(f"{form:<10}{difference:.2g} of the outputs' spread")

    @app.command()
    def inspect(
        folder: Annotated[Path, typer.Argument(help="A checkpoint.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    ) -> None:
        """Show where the parameters of a model are, and which stages of `compress` it can go through."""
        from hf_moebert.checkpoints.loading import load_model
        from hf_moebert.compress.inspecting import inspect_model

        quiet()
        found = inspect_model(load_model(folder))
        if as_json:
            typer.echo(json.dumps(found))
            return
        typer.echo(f"{found['class']} ({found['family']}), {found['parameters']:,} parameters")
        for part, count in found["parts"].items():
            typer.echo(f"  {part:<22}{count:>14,}{count / found['parameters']:>8.1%}")
        for stage, reason in found["stages"].items():
            typer.echo(f"  {stage:<22}{'no: ' + reason if reason else 'yes'}")

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


def foretell(model: str, recipe: Any, examples: int, threads: int | None) -> list[str]:
    """Return one line for everything that a recipe would make: size, speed and training time."""
    import torch

    from hf_moebert.checkpoints.hub import find_folder
    from hf_moebert.checkpoints.loading import load_model
    from hf_moebert.compress.predicting import predict
    from hf_moebert.compress.tasks import check_task

    if threads is not None:
        torch.set_num_threads(threads)
    given, lines = load_model(find_folder(model)).eval(), []
    check_task(given)
    for found in predict(given, recipe, examples=examples):
        trained = found.training_seconds and f", about {found.training_seconds / 60:.1f} minutes of training"
        size = f"{found.parameters:,} of {given.num_parameters():,} parameters"
        lines.append(f"{found.name}: {size}, about {found.speedup:.1f} times as fast{trained or ''}")
    return lines


def parse_amount(text: str, units: dict[str, int], option: str, example: str) -> int:
    """Read a number with its unit.

    Raises:
        BadParameter: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2] not in units or not float(found[1]):
        known = ", ".join(filter(None, units))
        raise typer.BadParameter(
            f"{option} must be a number above 0 with one of {known}, got {text!r}. Use {example}."
        )
    return round(float(found[1]) * units[found[2]])
