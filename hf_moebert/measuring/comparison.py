"""Compare models of one task in quality, size and speed, on the same examples and the same machine."""

import copy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moebert.architectures.functional_pooling import POOLINGS
from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.architectures.pooling import MODULES_FILE, EmbeddingForm, read_embedding_form
from hf_moebert.architectures.positions import count_positions
from hf_moebert.checkpoints.hub import find_folder
from hf_moebert.checkpoints.loading import find_class
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.inference.linears import Precision, check_precision
from hf_moebert.inference.onnx_runtime import OnnxModel, load_onnx
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.runtime.folders import MANIFEST

from .answers import LoadedModel, TextColumns, encode_rows
from .footprint import measure_footprint
from .latency import compare_latency, environment
from .quality import draw_examples, measure_quality


__all__ = ["DTYPES", "Latency", "TextColumns", "measure"]

DTYPES = ("float32", "bfloat16", "float16")
TIMED_BATCHES = 16  # of real texts in a timed pass
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Latency:
    """The timed forward passes: their shape, number and clock.

    Inputs are random ids without padding; with `seq=None` the first texts of the data set, each batch of them padded
    to its longest one.
    """

    batch: int = 1
    seq: int | None = 128
    rounds: int = 20
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {self.batch}. Use 1 for the latency of one request.")


def measure(
    models: Mapping[str, str],
    dataset: Dataset,
    *,
    baseline: str,
    optimized: Sequence[str] = (),
    dtype: str | None = None,
    metrics: Sequence[str] | None = None,
    columns: TextColumns | None = None,
    latency: Latency | None = None,
    batch_size: int = 32,
    max_examples: int | None = None,
    threads: int | None = None,
    pooling: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare models of one task with one of them.

    All score the same examples, labels are matched by name, and their forward passes are timed in turns. The task is
    that of the head: classes, sets of labels, numbers, tags of words, answers to questions, the next token, or the
    order of documents where models of one label are given a group column. Models without head are embedders,
    measured by the cosines of pairs of texts, or, where these have no numbers, by which documents queries find.

    Args:
        models: Local folder or Hub id of each model, by a name of your choice; or the folder of an export.
        dataset: Texts and labels, not yet tokenized.
        baseline: The name in `models` that the others are compared with.
        optimized: Precisions in which every model is measured once more, after `optimize_for_inference`, under the
            name `model, precision`.
        dtype: "float32", "bfloat16" or "float16", to which all models are loaded; None leaves each as it was saved.
        metrics: Names from the table in `hf_moebert/measuring/README.md`; by default those usual for the problem.
        columns: Columns of texts, labels and groups; by default "text" and "label".
        latency: Timed forward passes; by default of one sequence of 128 tokens.
        batch_size: Examples per batch while scoring.
        max_examples: Size of the random sample that is scored, of whole groups; None scores all.
        threads: Threads torch computes with; None leaves their number as it is.
        pooling: How hidden states of embedders become embeddings; by default as their folders say.
        seed: Seed of the sample, the bootstrap and the timed ids.

    Returns:
        A JSON-able mapping: "models" holds "source", "optimized", "footprint", "scores", "differences" and "speed_up"
        of each, by name; "baseline", "command", "seed", "settings" and "environment" describe the measurement.

    Raises:
        ValueError: If the baseline is not among the models, if a checkpoint lacks weights or needs code of its own, if
            its tokenizer is not that of the model, if models differ in their labels, if a length does not fit a
            model, or if data, optimisation, metrics or latency refuse their part.
    """
    columns, latency = columns or TextColumns(), latency or Latency()
    if baseline not in models:
        raise ValueError(f"`baseline` must be one of {list(models)}, got {baseline!r}.")
    for name, value in (("max_examples", max_examples), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for the default.")
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}. Leave it out for that of the files."
        )
    variants = _list_variants(models, optimized)
    with _threads(threads):
        loaded = {name: _load(source, columns.max_length, dtype, pooling) for name, source in models.items()}
        footprints = {
            name: measure_footprint(entry.model, seq_len=latency.seq or columns.max_length, folder=entry.folder)
            for name, entry in loaded.items()
        }
        for name, (original, precision) in variants.items():
            if precision is not None:
                loaded[name] = _optimize(loaded[original], precision)
        passes = (
            _passes_of_ids(loaded, latency, seed)
            if latency.seq
            else _passes_of_texts(loaded, dataset, columns, latency)
        )
        calls = {
            name: _forward(loaded[name].model, batches) for name, batches in passes.items()
        }  # before the scores: they take longer and refuse less
        speed_ups = compare_latency(calls, baseline=baseline, rounds=latency.rounds, clock=latency.clock, seed=seed)
        dataset = draw_examples(dataset, columns.group_column, max_examples, seed)
        quality = measure_quality(
            loaded,
            dataset,
            baseline,
            metrics,
            columns=columns,
            batch_size=batch_size,
            seed=seed,
        )
        measured_on = environment()
    results = {}
    for name, (original, precision) in variants.items():
        results[name] = {
            "source": models[original],
            "optimized": precision,
            "footprint": asdict(footprints[original]),
            **quality[name],
            "speed_up": asdict(speed_ups[name]) if name in speed_ups else None,
        }
    return {
        "baseline": baseline,
        "models": results,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "settings": {
            "examples": len(dataset),
            "batch_size": batch_size,
            "dtype": dtype,
            **asdict(columns),
            **{f"latency_{key}": value for key, value in asdict(latency).items()},
        },
        "environment": measured_on,
    }


def _list_variants(models: Mapping[str, str], optimized: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Return the model and the precision of everything that is measured, by name; None is the model as it is."""
    variants: dict[str, tuple[str, str | None]] = {name: (name, None) for name in models}
    for precision in optimized:
        check_precision(cast(Precision, precision))
    for name, source in models.items():
        if not (Path(source) / MANIFEST).is_file():  # an export has the precision that it was made with
            variants |= {f"{name}, {precision}": (name, precision) for precision in optimized}
    if clash := sorted(name for name in models if variants[name] != (name, None)):
        raise ValueError(f"`models` must not have the names of optimised ones, got {clash}. Name them differently.")
    return variants


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(source: str, max_length: int, dtype: str | None, pooling: str | None) -> LoadedModel:
    if (Path(source) / MANIFEST).is_file():
        return _load_export(source, max_length, pooling)
    try:
        with refuse_code(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            form = _find_form(source, config, pooling)
            cls = find_class(config, source) if form is None else AutoModel
            model, report = cls.from_pretrained(
                source,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **({} if dtype is None else {"dtype": dtype}),
            )
    except OSError as error:
        raise ValueError(
            f"`models` must be folders or Hub ids that hold config.json, model.safetensors and a tokenizer, "
            f"{source!r} cannot be loaded: {error}"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if form is None or not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"`models` must be fine-tuned, {source!r} lacks {missing}. Fine-tune it first: random weights measure "
            "nothing."
        )
    _check_tokenizer(source, tokenizer, count_ids(model))
    positions = count_positions(model)
    if positions is not None and max_length > positions:
        raise ValueError(f"`max_length` must be at most the {positions} positions of {source!r}, got {max_length}.")
    return LoadedModel(model.eval(), tokenizer, str(find_folder(source)), form)


def _load_export(source: str, max_length: int, pooling: str | None) -> LoadedModel:
    """Load what `export_onnx` wrote, in the first precision of the folder."""
    model: Any = load_onnx(source)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    _check_tokenizer(source, tokenizer, count_ids(model))
    if model.max_length is not None and max_length > model.max_length:
        raise ValueError(f"`max_length` must be at most {model.max_length} for {source!r}, got {max_length}.")
    return LoadedModel(model, tokenizer, source, _choose_form(source, pooling) if model.kind == "embedding" else None)


def _find_form(source: str, config: PretrainedConfig, pooling: str | None) -> EmbeddingForm | None:
    """Return how a model without head makes embeddings; None for one with a head."""
    bodies = MODEL_MAPPING.get(type(config), ())
    names = {body.__name__ for body in (bodies if isinstance(bodies, tuple) else (bodies,))}
    return _choose_form(source, pooling) if names & set(config.architectures or ()) else None


def _choose_form(source: str, pooling: str | None) -> EmbeddingForm:
    form = read_embedding_form(source)
    if pooling not in (None, *POOLINGS) or (pooling is None and form is None):
        raise ValueError(
            f"`pooling` must be one of {', '.join(POOLINGS)} for {source!r}, which has no head and no {MODULES_FILE}, "
            f"got {pooling!r}. Most embedders use mean; a classifier has to be fine-tuned first."
        )
    form = form or EmbeddingForm()
    return form if pooling is None else replace(form, pooling=pooling)


def count_ids(model: Any) -> int:
    """Return how many ids a model knows."""
    return model.sizes["vocabulary"] if isinstance(model, OnnxModel) else model.get_input_embeddings().num_embeddings


def _check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse the stub that transformers makes of the special tokens where a folder holds no tokenizer."""
    if 2 * len(tokenizer) < vocabulary:
        raise ValueError(
            f"`models` must hold the tokenizers that they were trained with, that of {source!r} knows "
            f"{len(tokenizer)} tokens, and the model {vocabulary}. Save it in the folder: `tokenizer.save_pretrained`."
        )


def _optimize(loaded: LoadedModel, precision: Any) -> LoadedModel:
    return replace(loaded, model=optimize_for_inference(copy.deepcopy(loaded.model), precision=precision))


def _forward_passes(
    loaded: Mapping[str, LoadedModel], dataset: Dataset, columns: TextColumns, latency: Latency, seed: int
) -> dict[str, Callable[[], object]]:
    """Return what is timed of every model."""
    if latency.seq is None:
        passes = _passes_of_texts(loaded, dataset, columns, latency)
    else:
        passes = _passes_of_ids(loaded, latency, seed)
    return {name: _forward(loaded[name].model, batches) for name, batches in passes.items()}


def _passes_of_ids(loaded: Mapping[str, LoadedModel], latency: Latency, seed: int) -> dict[str, list[Batch]]:
    """Draw one batch of ids for all models."""
    vocabulary = min(count_ids(entry.model) for entry in loaded.values())
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocabulary, (latency.batch, latency.seq or 1), generator=generator)  # (batch, seq)
    mask = torch.ones_like(input_ids)  # (batch, seq)
    return {
        name: [complete_inputs(entry.model, input_ids) | {"attention_mask": mask}] for name, entry in loaded.items()
    }


def _passes_of_texts(
    loaded: Mapping[str, LoadedModel], dataset: Dataset, columns: TextColumns, latency: Latency
) -> dict[str, list[Batch]]:
    """Encode the first texts of the data set, in their order."""
    rows = dataset.select(range(min(len(dataset), TIMED_BATCHES * latency.batch)))
    return {
        name: [
            dict(encode_rows(entry.tokenizer, rows[start : start + latency.batch], columns))
            for start in range(0, len(rows), latency.batch)
        ]
        for name, entry in loaded.items()
    }


def _forward(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], object]:
    return torch.no_grad()(lambda: [model(**batch) for batch in batches])
