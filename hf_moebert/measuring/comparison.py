"""Compare classifiers in quality, size and speed, on the same examples and the same machine."""

import copy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.architectures.positions import count_positions
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.data import encode_text
from hf_moebert.inference.linears import Precision, check_precision
from hf_moebert.inference.optimize import optimize_for_inference

from .footprint import measure_footprint
from .latency import compare_latency, environment
from .metrics import metrics_for_task
from .scores import CLASSIFICATION_SCORES, REGRESSION_SCORES, paired_bootstrap, predict_logits, score


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextColumns:
    """The columns of a data set that hold texts and labels, and the length texts are truncated to."""

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    max_length: int = 128


@dataclass(frozen=True)
class Latency:
    """The timed forward passes: their shape, number and clock. Inputs are random ids without padding."""

    batch: int = 1
    seq: int = 128
    rounds: int = 20
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {self.batch}. Use 1 for the latency of one request.")


@dataclass(frozen=True)
class _Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: str


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
    seed: int = 0,
) -> dict[str, Any]:
    """Compare sequence classifiers with one of them.

    All score the same examples, labels are matched by name, and their forward passes are timed in turns.

    Args:
        models: Local folder or Hub id of each model, by a name of your choice.
        dataset: Texts and labels, not yet tokenized.
        baseline: The name in `models` that the others are compared with.
        optimized: Precisions in which every model is measured once more, after `optimize_for_inference`, under the
            name `model, precision`.
        dtype: "float32", "bfloat16" or "float16", to which all models are loaded; None leaves each as it was saved.
        metrics: Names known to `hf_moebert.measuring.scores.score`; by default those usual for the problem.
        columns: Columns of texts and labels; by default "text" and "label".
        latency: Timed forward passes; by default of one sequence of 128 tokens.
        batch_size: Examples per batch while scoring.
        max_examples: Size of the random sample that is scored; None scores all.
        threads: Threads torch computes with; None leaves their number as it is.
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
        loaded = {name: _load(source, columns.max_length, dtype) for name, source in models.items()}
        footprints = {
            name: measure_footprint(entry.model, seq_len=latency.seq, folder=entry.folder)
            for name, entry in loaded.items()
        }
        for name, (original, precision) in variants.items():
            if precision is not None:
                loaded[name] = _optimize(loaded[original], precision)
        calls = _forward_passes(loaded, latency, seed)  # before the scores: they take longer and refuse less
        speed_ups = compare_latency(calls, baseline=baseline, rounds=latency.rounds, clock=latency.clock, seed=seed)
        if max_examples is not None and max_examples < len(dataset):
            dataset = dataset.shuffle(seed=seed).select(range(max_examples))
        quality = _measure_quality(
            loaded, dataset, baseline, metrics, columns=columns, batch_size=batch_size, seed=seed
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
    for name in models:
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


def _load(source: str, max_length: int, dtype: str | None) -> _Loaded:
    try:
        with refuse_code(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, report = AutoModelForSequenceClassification.from_pretrained(
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
    if report["missing_keys"]:
        raise ValueError(
            f"`models` must be fine-tuned classifiers, {source!r} lacks {sorted(report['missing_keys'])}. "
            f"Fine-tune it first: random weights measure nothing."
        )
    _check_tokenizer(source, tokenizer, model.get_input_embeddings().num_embeddings)
    positions = count_positions(model)
    if positions is not None and max_length > positions:
        raise ValueError(f"`max_length` must be at most the {positions} positions of {source!r}, got {max_length}.")
    folder = source if Path(source).is_dir() else snapshot_download(source, allow_patterns="*.safetensors")
    return _Loaded(model.eval(), tokenizer, folder)


def _check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse the stub that transformers makes of the special tokens where a folder holds no tokenizer."""
    if 2 * len(tokenizer) < vocabulary:
        raise ValueError(
            f"`models` must hold the tokenizers that they were trained with, that of {source!r} knows "
            f"{len(tokenizer)} tokens, and the model {vocabulary}. Save it in the folder: `tokenizer.save_pretrained`."
        )


def _optimize(loaded: _Loaded, precision: Any) -> _Loaded:
    return replace(loaded, model=optimize_for_inference(copy.deepcopy(loaded.model), precision=precision))


def _measure_quality(
    loaded: Mapping[str, _Loaded],
    dataset: Dataset,
    baseline: str,
    metrics: Sequence[str] | None,
    *,
    columns: TextColumns,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    config = loaded[baseline].model.config
    regression = config.num_labels == 1
    table = REGRESSION_SCORES if regression else CLASSIFICATION_SCORES
    metrics = metrics or metrics_for_task("regression" if regression else config.problem_type or "")
    label_names = _label_names(config, dataset, columns.label_column)
    orders = {name: _label_order(name, entry.model.config, config) for name, entry in loaded.items()}
    logits, references = {}, np.empty(0)
    for name, entry in loaded.items():
        encoded = encode_text(dataset, entry.tokenizer, label_names=label_names, **asdict(columns))
        collate = DataCollatorWithPadding(entry.tokenizer)
        raw = predict_logits(entry.model, encoded, data_collator=collate, batch_size=batch_size)  # (examples, labels)
        logits[name], references = raw[:, orders[name]], np.asarray(encoded["labels"])
    quality: dict[str, dict[str, Any]] = {}
    for name in loaded:
        scores = score(metrics, logits[name], references, seed=seed)
        quality[name] = {"scores": {key: asdict(interval) for key, interval in scores.items()}, "differences": None}
    predictions = {name: raw[:, 0] if regression else raw.argmax(-1) for name, raw in logits.items()}  # (examples,)
    for name in loaded.keys() - {baseline}:
        quality[name]["differences"] = {
            key: asdict(paired_bootstrap(function, predictions[name], predictions[baseline], references, seed=seed))
            for metric in metrics
            for key, function in table[metric].items()
        }
    return quality


def _label_names(config: PretrainedConfig, dataset: Dataset, label_column: str) -> list[str] | None:
    if config.num_labels == 1:
        return None
    names = [config.id2label[index] for index in range(config.num_labels)]
    named_by_data = isinstance(dataset.features.get(label_column), ClassLabel)
    # A model that was never told the names of its labels still has their order.
    return None if named_by_data and not _has_names(config) else names


def _has_names(config: PretrainedConfig) -> bool:
    return any(name != f"LABEL_{index}" for index, name in config.id2label.items())


def _label_order(name: str, config: PretrainedConfig, baseline: PretrainedConfig) -> list[int]:
    """Return for each label of the baseline the column of the same label in the logits of another model."""
    if _has_names(config) and _has_names(baseline):
        if config.label2id.keys() == baseline.label2id.keys():
            return [config.label2id[baseline.id2label[index]] for index in range(baseline.num_labels)]
    elif config.num_labels == baseline.num_labels:
        return list(range(baseline.num_labels))
    raise ValueError(
        f"`models` must all have the baseline's labels {list(baseline.label2id)}, {name!r} has "
        f"{list(config.label2id)}. Compare models of one task."
    )


def _forward_passes(loaded: Mapping[str, _Loaded], latency: Latency, seed: int) -> dict[str, Callable[[], object]]:
    vocabulary = min(entry.model.get_input_embeddings().num_embeddings for entry in loaded.values())
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocabulary, (latency.batch, latency.seq), generator=generator)  # (batch, seq)
    mask = torch.ones_like(input_ids)  # (batch, seq)

    def forward_pass(model: PreTrainedModel) -> Callable[[], object]:
        inputs = complete_inputs(model, input_ids)
        return torch.no_grad()(lambda: model(**inputs, attention_mask=mask))

    return {name: forward_pass(entry.model) for name, entry in loaded.items()}
