"""Which predictor answers for which kind of model."""

from pathlib import Path

from hf_moebert.architectures.embedding_form import POOLINGS, EmbeddingForm

from .engines import Engine
from .predictors import Classifier, Embedder, TextPredictor
from .span_predictors import QuestionAnswerer, Tagger


PREDICTORS: dict[str, type[TextPredictor]] = {
    **dict.fromkeys(("classification", "multi-label", "regression", "reranking"), Classifier),
    "tagging": Tagger,
    "question-answering": QuestionAnswerer,
}


def check_pooling(pooling: str | None) -> None:
    """Refuse a pooling that does not exist.

    Raises:
        ValueError: If it does not.
    """
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}. Most embedders use mean.")


def check_kind(folder: Path, kind: str, name: str, form: EmbeddingForm | None, pooling: str | None) -> None:
    """Refuse a model of another task, and an embedder that nobody said the pooling of.

    Args:
        folder: Its folder, for the message.
        kind: What it answers.
        name: Its class.
        form: How it makes embeddings, if the folder says so.
        pooling: What the user says of it.

    Raises:
        ValueError: If it is one.
    """
    if kind not in (*PREDICTORS, "embedding"):
        raise ValueError(
            f"`model` must be one for {', '.join(PREDICTORS)}, embedding or multi-task, got {name} in "
            f"{str(folder)!r}. Serve models of other tasks by `transformers serve` or a pipeline."
        )
    if kind == "embedding" and form is None and pooling is None:
        raise ValueError(
            f"{str(folder)!r} holds a {name} without head, and no modules.json that says how it makes embeddings. "
            "Give `--pooling mean`, or save it by `save_embedder`."
        )
    if pooling is not None and (kind != "embedding" or (form is not None and form.pooling != pooling)):
        has = f"a {name}, which has a head" if form is None else f"an embedder of the pooling {form.pooling!r}"
        raise ValueError(f"`pooling` must be left out for {str(folder)!r}: it holds {has}.")


def make_predictor(engine: Engine, form: EmbeddingForm | None, pooling: str | None) -> TextPredictor:
    """Return the predictor of a model whose kind was checked."""
    if engine.kind == "embedding":
        return Embedder(engine, form or EmbeddingForm(pooling=pooling or "mean"))
    return PREDICTORS[engine.kind](engine)
