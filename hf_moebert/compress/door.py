"""The door: one call from a given model to a compressed one, with the proof."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_moebert.architectures.processes import find_processes
from hf_moebert.checkpoints.hub import find_folder
from hf_moebert.checkpoints.json_files import save_json
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.locks import lock_folder
from hf_moebert.checkpoints.manifests import describe_files
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.inference.onnx_export import export_onnx
from hf_moebert.measuring.answers import TextColumns, encode_rows
from hf_moebert.measuring.comparison import measure
from hf_moebert.reporting.compression import write_compression_report

from .card import write_card
from .inspecting import count_layers
from .recipe import EXPORTS, Distil, Recipe, Search
from .recipe_file import read_recipe
from .result import COMPRESSED, GIVEN, REPORT_FILE, CompressionResult, read_result, result_name
from .running import Workshop
from .searching import search, timing
from .tasks import TextData, check_lengths, check_task, find_metrics, prepare
from .verdict import judge
from .verifying import EXAMPLES, write_golden


PACKAGES = ("hf_moebert", "torch", "transformers")
EXPORTED_TEXTS = 200  # on which int8 is compared with float32
ROUTED_TEXTS = 64  # on which tokens are counted by expert
LONGEST = timedelta(days=7)  # that processes wait for the one that measures


class ExportError(ValueError):
    """The result is there, but not its form for another engine."""


def compress(
    model: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe = "auto",
    *,
    data: Dataset,
    output_dir: str | os.PathLike[str],
    eval_data: Dataset | None = None,
    columns: TextColumns | None = None,
    resume: bool = False,
    threads: int | None = None,
    rounds: int = 20,
    training: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> CompressionResult:
    """Compress a fine-tuned model by a recipe, and measure what it is worth beside what was given.

    The given model is the teacher of all training. Without labels its predictions are what the verdict compares with.
    Each stage leaves its model in `stages`; a run that was interrupted goes on with `resume` where it stopped, also
    within a training run, and ends with the same bytes. Under a launcher of torch or accelerate all processes train
    together, each a part of every batch, and the first one writes.

    Args:
        model: Folder or Hub id of a classifier of texts or of their words, a regression or reranker, or an embedder in
            a folder of sentence-transformers, of a family that the stages know.
        recipe: Name or file of a recipe, or what `read_recipe` returned; by default the best one is searched for.
        data: Texts to learn from, with labels or without.
        output_dir: Folder of the run, which gets `model`, `report.json` and `recipe.lock.yaml` once they are whole.
        eval_data: Texts for the verdict, with labels or without; by default a fifth of `data` is held out.
        columns: Names of the columns; by default "text" and "label".
        resume: Whether to go on with what is in `output_dir`.
        threads: Threads torch computes with; `None` leaves their number as it is.
        rounds: Timed passes of each model.
        training: Further fields of `TrainingArguments`.
        callbacks: Further callbacks of every training run.
        tell: Called with one line before and after each stage.

    Returns:
        The result, whether or not the targets are met.

    Raises:
        UnsupportedModelError: If the model's task is not known here.
        ExportError: If the result, which is there, cannot be exported as the recipe says.
        ValueError: If recipe, model, data and processes do not fit each other, or the folder holds another run.
        OSError: If the folder cannot be written to, or the model cannot be read.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    columns, output, processes = columns or TextColumns(), Path(output_dir), find_processes(timeout=LONGEST)
    refuse_uneven_parts(recipe, processes.num_processes)
    is_first = processes.is_main_process  # it alone writes, judges and reports
    if is_first:
        refuse_other_run(output, resume=resume)
    given = str(find_folder(model))
    tokenizer, teacher = load_given(given, recipe, columns)
    with lock_folder(output) if is_first else nullcontext():
        if threads is not None:
            torch.set_num_threads(threads)
        selects = isinstance(recipe.stages[0], Search)
        prepared = prepare(teacher, tokenizer, data, eval_data, columns=columns, selects=selects, seed=recipe.seed)
        tell = tell if is_first else lambda line: None
        run = Workshop(teacher, tokenizer, prepared, recipe, output / "stages", training or {}, tuple(callbacks), tell)
        mark = fingerprint(given, prepared)
        candidates: list[dict[str, str]] = []
        if selects:
            run, candidates = search(run, given, mark, threads=threads, rounds=rounds)
        last, stages = run.run(given, mark)
        if is_first:
            publish(last, output / "model")
            conclude(run, str(model), given, stages, candidates, threads=threads, rounds=rounds)
        processes.wait_for_everyone()
        return read_result(output)


def load_given(given: str, recipe: Recipe, columns: TextColumns) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and the given model, which the recipe and the columns must fit.

    Raises:
        UnsupportedModelError: If the model's task is not known here.
        ValueError: If the recipe or the columns do not fit it.
    """
    with refuse_code(given):
        tokenizer = AutoTokenizer.from_pretrained(given, trust_remote_code=False)
    teacher = load_model(given).eval()
    check_task(teacher)
    tokens = recipe.target.tokens if isinstance(recipe.target.tokens, int) else 1
    check_lengths(teacher, tokens=tokens, max_length=columns.max_length)
    find_metrics(teacher, recipe.target.metric, columns)
    return tokenizer, teacher


def conclude(
    run: Workshop,
    model: str,
    given: str,
    stages: list[dict[str, Any]],
    candidates: list[dict[str, str]],
    *,
    threads: int | None,
    rounds: int,
) -> None:
    """Measure and judge a published model, and write all that proves what it is worth; then export it.

    Args:
        run: What was run.
        model: The given model as it was named.
        given: Its folder.
        stages: What each stage was told and took.
        candidates: What a search tried.
        threads: Threads that are timed.
        rounds: Timed passes.

    Raises:
        ExportError: If the result cannot be exported as the recipe says.
    """
    output, recipe = run.folder.parent, run.recipe
    run.tell("measuring")
    write_golden(output, output / "model", first_texts(run.data, output / "model", EXAMPLES), recipe.precision)
    measurement = measure_result(run, given, output / "model", threads=threads, rounds=rounds)
    verdict = judge(measurement, result_name(recipe), recipe.target)
    result = CompressionResult(output, recipe, stages, measurement, verdict, candidates)
    write_card(result, model, given, run.data)
    write_lock(result, given, run.data)
    report = describe(result, run)
    write_compression_report(output, report)
    save_json(output / REPORT_FILE, report)
    if recipe.export:
        run.tell("exporting")
        export(result, run.data)


def refuse_uneven_parts(recipe: Recipe, num_processes: int) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        ValueError: If a batch cannot be divided among them, or the recipe chooses by what it measures.
    """
    if num_processes == 1:
        return
    if isinstance(recipe.stages[0], Search):
        raise ValueError(  # noqa: TRY004
            f"`search` must run in one process, got {num_processes}. Search there, and train what it chose, in "
            "recipe.lock.yaml, with them."
        )
    for stage in recipe.stages:
        if isinstance(stage, Distil) and stage.batch_size % num_processes:
            raise ValueError(
                f"`batch_size` must be a multiple of the {num_processes} processes, got {stage.batch_size}. Use "
                f"{num_processes * math.ceil(stage.batch_size / num_processes)}."
            )


def refuse_other_run(output: Path, *, resume: bool) -> None:
    """Refuse to write where something is already.

    Raises:
        ValueError: If the folder is not empty and the run is not to go on there.
    """
    held = [path.name for path in output.iterdir() if not path.name.startswith("_")] if output.is_dir() else []
    if held and not resume:
        raise ValueError(
            f"`output_dir` must be an empty folder, {str(output)!r} holds {min(held)!r}. Resume the run, or choose "
            "another folder."
        )


def fingerprint(given: str, data: TextData) -> str:
    """Fingerprint what stages begin with: the given model and the texts to learn from."""
    facts = {name: entry["sha256"] for name, entry in describe_files(given, pattern="*").items()}
    facts |= {"train": data.train.to_dict()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def publish(stage: Path, folder: Path) -> None:
    """Copy the last model to its final name, whole or not at all."""
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(stage, draft, ignore=shutil.ignore_patterns("stage.json", "checkpoint_manifest.json"))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def measure_result(run: Workshop, given: str, folder: Path, *, threads: int | None, rounds: int) -> dict[str, Any]:
    """Measure the given model and the result, as they are and in the precision of the recipe."""
    recipe = run.recipe
    return measure(
        {GIVEN: given, COMPRESSED: str(folder)},
        run.data.evaluation,
        baseline=GIVEN,
        optimized=() if recipe.precision is None else (recipe.precision,),
        metrics=find_metrics(run.teacher, recipe.target.metric, run.data.columns),
        columns=run.data.columns,
        latency=timing(recipe.target, rounds),
        threads=threads,
        seed=recipe.seed,
    )


def export(result: CompressionResult, data: TextData) -> None:
    """Write the result for ONNX Runtime, too, and how far its int8 is from float32 on some of the texts.

    Raises:
        ExportError: If a graph cannot be made, or gives something else.
    """
    folder = result.folder / "onnx"
    shutil.rmtree(folder, ignore_errors=True)
    precisions = [EXPORTS[form] for form in result.recipe.export]
    texts = data.texts_read[:EXPORTED_TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(result.model_folder, trust_remote_code=False)
    try:
        export_onnx(result.load(), folder, precisions=precisions, tokenizer=tokenizer, texts=texts)
    except ValueError as error:
        raise ExportError(f"The result is in {str(result.folder)!r}, but was not exported: {error}") from error


def first_texts(data: TextData, folder: Path, count: int) -> dict[str, Tensor]:
    """Encode the first texts of the verdict as the result reads them, `(batch, seq)`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return dict(encode_rows(tokenizer, data.evaluation[:count], data.columns))


@torch.no_grad()
def share_tokens(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[list[float]]:
    """Return the share of the tokens that each expert of each layer processes; nothing of a model without experts."""
    if not hasattr(model.config, "output_expert_load"):
        return []
    counts = torch.stack(model.eval()(**batch, output_expert_load=True).expert_load).double()  # (layers, experts)
    return (counts / counts.sum(1, keepdim=True)).tolist()


def write_lock(result: CompressionResult, given: str, data: TextData) -> None:
    """Write the resolved recipe, with versions and hashes of all it depends on."""
    lock = result.recipe.as_dict() | {
        "model": {name: entry["sha256"] for name, entry in describe_files(given, pattern="*").items()},
        "data": {"train": len(data.train), "evaluation": len(data.evaluation), "labelled": data.labelled},
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    text = yaml.safe_dump(lock, sort_keys=False)
    (result.folder / "recipe.lock.yaml").write_text(text, encoding="utf-8")


def describe(result: CompressionResult, run: Workshop) -> dict[str, Any]:
    """Return all of a result in a form that JSON knows."""
    model = result.load()
    return {
        "verdict": result.verdict.as_dict(),
        "labelled": run.data.labelled,
        "layers": {"given": count_layers(run.teacher), "chosen": count_layers(model)},
        "experts": share_tokens(model, first_texts(run.data, result.model_folder, ROUTED_TEXTS)),
        "chosen": result.name,
        "recipe": result.recipe.as_dict(),
        "stages": result.stages,
        "candidates": result.candidates,
        "measurement": result.measurement,
    }
