"""From a folder to a predictor: which engine runs a model, and in which precision.

Torch is imported where it computes alone: exports are served without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Literal, get_args

from hf_moebert.architectures.embedding_form import EmbeddingForm
from hf_moebert.architectures.protocols import Predictor
from hf_moebert.checkpoints.hub import find_folder
from hf_moebert.checkpoints.json_files import read_json
from hf_moebert.runtime import load
from hf_moebert.runtime.folders import ENGINE_FILE, GRAPHS, MANIFEST
from hf_moebert.runtime.model import SHORTEST

from .engines import Engine
from .kinds import check_kind, check_pooling, make_predictor


EngineName = Literal["torch", "onnx"]
Precision = Literal["float32", "bfloat16", "int8"]


def load_predictor(
    source: str,
    *,
    engine: EngineName | None = None,
    precision: Precision | None = None,
    pooling: str | None = None,
    threads: int = 0,
) -> Predictor:
    """Load a model of any task that is known here, to be served.

    Weights are copied from their files, those of an export to a temporary folder: one that changes afterwards changes
    no answer.

    Args:
        source: Folder or Hub id of a checkpoint of transformers or of this package, or folder of an ONNX export.
        engine: "torch" or "onnx"; by default what `hf-moebert engine` chose, or that of the folder.
        precision: "float32", "int8" or "bfloat16", as `optimize_for_inference` takes it; by default what was chosen
            with the engine, or float32. Of an ONNX export one that it holds.
        pooling: `mean`, `cls` or `last`, for an embedder whose folder does not say it.
        threads: Threads of an export, by default one for each core; those of torch are set for the whole process.

    Raises:
        ValueError: If the task of the model is not known here, an argument does not fit it, weights are not whole, the
            folder changed while it was loaded, or torch is missing.
        OSError: If it is no checkpoint.
    """
    engines, precisions = get_args(EngineName), get_args(Precision)
    for name, value, known in (("engine", engine, engines), ("precision", precision, precisions)):
        if value not in (None, *known):
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    check_pooling(pooling)
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
            return _load_export(graphs, precision, pooling, threads)
        if find_spec("torch") is None:
            raise ValueError(
                f"{source!r} holds a checkpoint, which needs torch, and there is none here. Serve what "
                "`hf-moebert export` makes of it, or `pip install hf_moebert`."
            )
        from .checkpoints import load_checkpoint

        return load_checkpoint(folder, precision, pooling)


def read_choice(folder: Path) -> tuple[EngineName | None, Precision | None]:
    """Return engine and precision that `hf-moebert engine` chose, if it did, and all but the texts is as it was.

    Without torch it is ONNX Runtime, if there are graphs.
    """
    if find_spec("torch") is None:
        return ("onnx" if (folder / GRAPHS / MANIFEST).is_file() else None), None
    if not (folder / ENGINE_FILE).is_file():
        return None, None
    from hf_moebert.measuring.engines import describe

    kept = read_json(folder / ENGINE_FILE, remedy="Run `hf-moebert engine` again, or delete it.")
    conditions = describe(folder, (), 0, 0)
    if any(kept["conditions"][name] != conditions[name] for name in ("cpu", "threads", "versions", "weights")):
        return None, None
    return kept["choice"]["engine"], kept["choice"]["precision"]


def _load_export(folder: Path, precision: Precision | None, pooling: str | None, threads: int) -> Predictor:
    with TemporaryDirectory(prefix="hf_moebert-") as private:  # its weights are mapped, even when it is gone
        copied = copytree(folder, Path(private) / "graphs")
        model = load(copied, precision=precision, threads=threads)
    form = EmbeddingForm(**model.form) if model.form else None
    check_kind(folder, model.kind, model.architecture, form, pooling)
    engine = Engine(
        model.kind,
        model.labels,
        model.reader,
        lambda inputs: model.run(**inputs),
        model,
        chain=model.chain,
        shortest=SHORTEST,
    )
    return make_predictor(engine, form, pooling)


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
