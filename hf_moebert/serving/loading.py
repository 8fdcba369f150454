"""From a folder to a predictor: which task a model has, which engine runs it, and in which precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.functional_pooling import POOLINGS
from hf_moebert.architectures.heads import has_head
from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.architectures.protocols import Predictor
from hf_moebert.checkpoints.hub import find_folder
from hf_moebert.checkpoints.json_files import read_json
from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.remote_code import refuse_code
from hf_moebert.inference.linears import PRECISIONS, Precision
from hf_moebert.inference.onnx_runtime import load_onnx
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.measuring.engines import ENGINE_FILE, GRAPHS, describe
from hf_moebert.methods.multitask.pipeline import MultiTaskPipeline
from hf_moebert.runtime.folders import MANIFEST, read_manifest

from .many_tasks import ManyTasks
from .predictors import Classifier, Embedder, TextPredictor
from .span_predictors import QuestionAnswerer, Tagger


Engine = Literal["torch", "onnx"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
HEADS: dict[str, type[TextPredictor]] = {
    "SequenceClassification": Classifier,
    "TokenClassification": Tagger,
    "QuestionAnswering": QuestionAnswerer,
}


def load_predictor(
    source: str, *, engine: Engine | None = None, precision: Precision | None = None, pooling: str | None = None
) -> Predictor:
    """Load a model of any task that is known here, to be served.

    Weights are copied from their files: a folder that changes afterwards changes no answer.

    Args:
        source: Folder or Hub id of a checkpoint of transformers or of this package, or folder of an ONNX export.
        engine: "torch" or "onnx"; by default what `hf-moebert engine` chose, or that of the folder.
        precision: "float32", "int8" or "bfloat16", as `optimize_for_inference` takes it; by default what was chosen
            with the engine, or float32. Of an ONNX export one that it holds.
        pooling: `mean`, `cls` or `last`, for an embedder whose folder does not say it.

    Raises:
        ValueError: If the task of the model is not known here, an argument does not fit it, weights are not whole, or
            the folder changed while it was loaded.
        OSError: If it is no checkpoint.
    """
    if engine not in (None, *ENGINES):
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}. Most embedders use mean.")
    folder = find_folder(source, exports=True)
    with refusing_changes(folder):
        exported = (folder / MANIFEST).is_file()
        if not exported and engine is None and precision is None:
            engine, precision = read_choice(folder)
        graphs = folder if exported else folder / GRAPHS
        if (engine == "torch") if exported else (engine == "onnx" and not graphs.is_dir()):
            has = "an export. Leave `--engine` out" if exported else "no graphs. Use `hf-moebert export` or `engine`"
            raise ValueError(f"`engine` {engine!r} must fit the folder, but {source!r} holds {has}.")
        if exported or engine == "onnx":
            return _load_export(graphs, precision, pooling)
        return _load_checkpoint(folder, precision, pooling)


def read_choice(folder: Path) -> tuple[Engine | None, Precision | None]:
    """Return engine and precision that `hf-moebert engine` chose, if it did, and all but the texts is as it was."""
    if not (folder / ENGINE_FILE).is_file():
        return None, None
    kept = read_json(folder / ENGINE_FILE, remedy="Run `hf-moebert engine` again, or delete it.")
    conditions = describe(folder, (), 0, 0)
    if any(kept["conditions"][name] != conditions[name] for name in ("cpu", "threads", "versions", "weights")):
        return None, None
    return kept["choice"]["engine"], kept["choice"]["precision"]


def _load_checkpoint(folder: Path, precision: Precision | None, pooling: str | None) -> Predictor:
    loaded = load_model(folder)
    model = keep_in_memory(loaded if loaded.dtype == torch.float32 else loaded.float())
    tokenizer = load_tokenizer(folder)
    if model.config.model_type.startswith("multitask_"):
        pipeline = MultiTaskPipeline(model=model, tokenizer=tokenizer, task="multitask", device="cpu")
        return ManyTasks(pipeline, precision or "float32")
    name, form = type(model).__name__, None if has_head(model) else read_embedding_form(folder)
    check_kind(folder, name, form, pooling)
    optimize_for_inference(model, precision=precision or "float32")
    return _wrap(model, name, tokenizer, form, pooling)


def _load_export(folder: Path, precision: Precision | None, pooling: str | None) -> Predictor:
    manifest, chosen = read_manifest(folder, precision)
    said = manifest["embedding"]
    form = EmbeddingForm(**said) if said else None
    check_kind(folder, manifest["architecture"], form, pooling)
    model = load_onnx(folder, precision=precision)
    alone = chosen == "int8"  # whose activations have one scale for all rows of a batch
    return _wrap(model, manifest["architecture"], load_tokenizer(folder), form, pooling, alone=alone)


def check_kind(folder: Path, name: str, form: EmbeddingForm | None, pooling: str | None) -> None:
    """Refuse a model of another task, and an embedder that nobody said the pooling of.

    Args:
        folder: Its folder, for the message.
        name: Its class.
        form: How it makes embeddings, if the folder says so.
        pooling: What the user says of it.

    Raises:
        ValueError: If it is one.
    """
    head = name.partition("For")[2]
    if head and head not in HEADS:
        raise ValueError(
            f"`model` must be an embedder, a multi-task model, or one for {', '.join(HEADS)}, got {name} in "
            f"{str(folder)!r}. Serve models of other tasks by `transformers serve` or a pipeline."
        )
    if not head and form is None and pooling is None:
        raise ValueError(
            f"{str(folder)!r} holds a {name} without head, and no modules.json that says how it makes embeddings. "
            "Give `--pooling mean`, or save it by `save_embedder`."
        )
    if pooling is not None and (head or (form is not None and form.pooling != pooling)):
        has = f"a {name}, which has a head" if head or form is None else f"an embedder of the pooling {form.pooling!r}"
        raise ValueError(f"`pooling` must be left out for {str(folder)!r}: it holds {has}.")


def _wrap(
    model: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    form: EmbeddingForm | None,
    pooling: str | None,
    *,
    alone: bool = False,
) -> Predictor:
    if head := name.partition("For")[2]:
        return HEADS[head](model, tokenizer, alone=alone)
    return Embedder(model, tokenizer, form or EmbeddingForm(pooling=pooling or "mean"), alone=alone)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer, without code of the folder.

    Raises:
        ValueError: If there is none.
    """
    with refuse_code(folder):
        if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            raise ValueError(f"{str(folder)!r} must hold a tokenizer. Save it there by `save_pretrained`.")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def keep_in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Copy weights that are mapped from files: one that is written anew would change answers, or end the process."""
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in copies:  # tied weights stay one
            copies[tensor.data_ptr()] = tensor.data.clone()
        tensor.data = copies[tensor.data_ptr()]
    return model


@contextmanager
def refusing_changes(folder: Path) -> Iterator[None]:
    """Refuse a folder whose files change while they are read inside.

    Raises:
        ValueError: If they do.
    """
    before = state_of(folder)
    yield
    if state_of(folder) != before:
        raise ValueError(f"{str(folder)!r} changed while it was loaded. Start again when nothing writes into it.")


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, time of the last change and number of each file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}
