"""Choose what runs a model the fastest on this machine: torch or ONNX Runtime, in float32 or in less."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

from hf_moebert.architectures.positions import count_positions
from hf_moebert.checkpoints.json_files import read_json, save_json
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.manifests import describe_files
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.inference.linears import PRECISIONS, Precision, unsupported_reason
from hf_moebert.inference.onnx_export import export_onnx
from hf_moebert.inference.onnx_runtime import load_onnx
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.runtime.folders import ENGINE_FILE, GRAPHS

from .latency import environment, time_rounds


REFERENCE = "torch float32"
REMEDY = "Delete it: it is measured again."
PACKAGES = ("hf_moebert", "torch", "transformers", "onnxruntime")


@dataclass(frozen=True)
class EngineChoice:
    """The engine that runs a model, and why.

    Attributes:
        engine: "torch", by `optimize_for_inference`, or "onnx", by `load_onnx`.
        precision: Its precision.
        reason: One line that says what was chosen, and why.
        speed_ups: Of each that was measured over torch in float32: median over the rounds.
        differences: Of each, 1 less its worst cosine to plain torch among the texts.
        left_out: What could not be measured, with the reason.
    """

    engine: str
    precision: str
    reason: str
    speed_ups: dict[str, float]
    differences: dict[str, float]
    left_out: dict[str, str]


def load_fastest(folder: str | PathLike[str], texts: Sequence[str], **options: Any) -> Any:
    """Load a model in what `choose_engine` chooses.

    Args:
        folder: As for `choose_engine`.
        texts: As for `choose_engine`.
        **options: As for `choose_engine`.

    Raises:
        ValueError: As for `choose_engine`.
    """
    choice = choose_engine(folder, texts, **options)
    if choice.engine == "onnx":
        return load_onnx(Path(folder) / GRAPHS, precision=choice.precision, threads=options.get("threads"))
    return optimize_for_inference(load_model(Path(folder)), precision=cast(Precision, choice.precision))


def choose_engine(
    folder: str | PathLike[str],
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    allowed_difference: float = 0.01,
    threads: int | None = None,
    rounds: int = 7,
) -> EngineChoice:
    """Measure what runs a model the fastest on this machine, of what gives the same answers.

    The texts are run in batches, in turns, by torch and by ONNX Runtime in every precision that works on this
    processor. The choice is kept in `engine.json` beside the weights, and holds as long as processor, threads,
    versions, weights and texts are the same; the graphs are written to `onnx/`, unless they are there.

    Args:
        folder: A checkpoint with its tokenizer, dense or in a form of this package.
        texts: Some dozens of the texts that will be run.
        batch_size: How many are run together.
        allowed_difference: 1 less the worst cosine between the outputs for a text and those of plain torch.
        threads: Threads to compute with, by default those of torch.
        rounds: How often all are timed.

    Returns:
        The choice; `load_fastest` loads it.

    Raises:
        ValueError: If an argument is refused or the folder holds no model of texts.
        OSError: If the folder cannot be read or written.
    """
    if not texts or isinstance(texts, str) or batch_size < 1 or not 0 <= allowed_difference < 1:
        raise ValueError(
            "`texts` must be a list of texts, `batch_size` at least 1 and `allowed_difference` in [0, 1), got "
            f"{texts!r:.50}, {batch_size} and {allowed_difference}."
        )
    folder, before = Path(folder), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        conditions = describe(folder, texts, batch_size, allowed_difference)
        if (known := read_choice(folder, conditions)) is not None:
            return known
        choice = measure_engines(folder, texts, batch_size, allowed_difference, rounds)
        save_json(folder / ENGINE_FILE, {"conditions": conditions, "choice": asdict(choice)})
        return choice
    finally:
        torch.set_num_threads(before)


def describe(folder: Path, texts: Sequence[str], batch_size: int, allowed_difference: float) -> dict[str, Any]:
    """Return what a choice depends on."""
    facts = environment()
    return {
        "cpu": facts["cpu"],
        "threads": facts["threads"],
        "versions": {name: version_of(name) for name in PACKAGES},
        "weights": describe_files(folder, pattern="*.safetensors"),
        "texts": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
        "batch_size": batch_size,
        "allowed_difference": allowed_difference,
    }


def version_of(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_choice(folder: Path, conditions: Mapping[str, Any]) -> EngineChoice | None:
    """Return the choice that was kept, if it was measured under the same conditions."""
    if not (folder / ENGINE_FILE).is_file():
        return None
    kept = read_json(folder / ENGINE_FILE, remedy=REMEDY)
    return EngineChoice(**kept["choice"]) if kept["conditions"] == conditions else None


@torch.no_grad()
def measure_engines(
    folder: Path, texts: Sequence[str], batch_size: int, allowed_difference: float, rounds: int
) -> EngineChoice:
    """Measure every engine on the texts, and choose."""
    model = load_model(folder).eval()
    with refuse_code(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    batches = make_batches(model, tokenizer, texts, batch_size)
    engines, left_out = make_engines(model, folder, tokenizer)
    wanted = rows_of(model, batches)
    differences = {name: 1 - worst_cosine(rows_of(engine, batches), wanted) for name, engine in engines.items()}
    calls: dict[str, Callable[[], object]] = {
        name: partial(run_all, engine, batches) for name, engine in engines.items()
    }
    threads = torch.get_num_threads()
    times = time_rounds(calls, rounds=rounds, clock="cpu" if threads == 1 else "wall")
    speed_ups = {name: float(np.median(times[REFERENCE] / times[name])) for name in times}
    fit = [name for name in speed_ups if name == REFERENCE or differences[name] <= allowed_difference]
    best = max(fit, key=speed_ups.__getitem__)
    engine, _, precision = best.partition(" ")
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(1)]
    shapes = (
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {batch_size} at once, {threads} thread(s)"
    )
    found = [f"{name} {speed_ups[name]:.2f}x ({differences[name]:.1g})" for name in sorted(speed_ups)]
    found += [f"{name} left out, {why}" for name, why in left_out.items()]
    reason = f"{best} is the fastest on {shapes}, within a difference of {allowed_difference:g}: {'; '.join(found)}."
    return EngineChoice(engine, precision, reason, speed_ups, differences, left_out)


def make_engines(model: PreTrainedModel, folder: Path, tokenizer: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the model in every engine and precision that works here, and why others do not."""
    engines: dict[str, Any] = {}
    left_out = {}
    shared = {id(parameter): parameter for parameter in model.parameters()}
    for precision in PRECISIONS:
        if reason := None if precision == "float32" else unsupported_reason(precision, precision == "int8"):
            left_out[f"torch {precision}"] = reason
        else:
            copied = copy.deepcopy(model, dict(shared))
            engines[f"torch {precision}"] = optimize_for_inference(copied, precision=precision)
    rough = [] if "torch int8" in left_out else ["int8"]
    try:
        if not (folder / GRAPHS).exists():
            export_onnx(model, folder / GRAPHS, precisions=["float32", *rough], tokenizer=tokenizer)
    except ValueError as error:
        return engines, left_out | {"onnx": str(error)}
    for form in ("float32", "int8"):
        try:
            engines[f"onnx {form}"] = load_onnx(folder / GRAPHS, precision=form)
        except ValueError as error:
            left_out[f"onnx {form}"] = str(error)
    return engines, left_out


def make_batches(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], batch_size: int
) -> list[dict[str, Tensor]]:
    """Tokenize texts in batches, padded to the longest of each."""
    longest = min(count_positions(model) or 512, tokenizer.model_max_length, 512)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    batches = [dict(tokenizer(part, **options)) for part in parts]
    marks = hasattr(model, "crf")  # a CRF has to know the words: here every token is one
    return [batch | ({"word_mask": batch["attention_mask"] == 1} if marks else {}) for batch in batches]


def run_all(model: Any, batches: list[dict[str, Tensor]]) -> list[Any]:
    """Run a model on batches."""
    return [model(**batch) for batch in batches]


def rows_of(model: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the logits, or the hidden states of the real tokens, of each text in one row."""
    rows = []
    for batch, outputs in zip(batches, run_all(model, batches), strict=True):
        found = outputs["logits"] if "logits" in outputs else outputs[0]
        masks = batch["attention_mask"].bool()
        rows += [(one[mask] if one.dim() == 2 else one).flatten() for one, mask in zip(found, masks, strict=True)]
    return rows


def worst_cosine(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the lowest cosine between two outputs for a text."""
    pairs = zip(found, wanted, strict=True)
    return min(float(F.cosine_similarity(one.double(), other.double(), dim=0)) for one, other in pairs)
