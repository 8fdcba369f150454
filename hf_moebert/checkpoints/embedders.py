"""Save an embedding model as a folder of sentence-transformers."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.functional_pooling import POOLINGS
from hf_moebert.architectures.heads import has_head
from hf_moebert.architectures.pooling import (
    LENGTH_FILE,
    MODULES_FILE,
    POOLING_FLAGS,
    PROMPTS_FILE,
    EmbeddingForm,
    read_embedding_form,
)

from .drafts import replacing


MODULE_PATHS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


def save_embedder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | PathLike[str],
    form: EmbeddingForm | str | PathLike[str] | None = None,
) -> None:
    """Save a model without head and its tokenizer so that `SentenceTransformer(folder)` loads them.

    A model of a form of this package needs `import hf_moebert` before, or `trust_remote_code=True` where its code
    travels. A reranker needs no such folder: `CrossEncoder` loads what `save_pretrained` writes.

    Args:
        model: An encoder, dense or compressed.
        tokenizer: Its tokenizer.
        folder: Where it is written.
        form: Pooling, normalisation, prompts and length; or the folder or Hub id of a model whose they are. By default
            those of the folder that the model, or the one it was made of, was loaded from.

    Raises:
        ValueError: If the model has a head, or the form is not known.
        OSError: If the folder cannot be written.
    """
    if has_head(model):
        raise ValueError(
            f"`model` must have no head to give embeddings, got {type(model).__name__}. Use its body, or "
            "`save_pretrained` for a `CrossEncoder`."
        )
    form = _find_form(model, form)
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_form(folder, form, model.config.hidden_size)


def write_form(folder: Path, form: EmbeddingForm, width: int) -> None:
    """Write how a model makes embeddings, as sentence-transformers and `read_embedding_form` read it.

    Args:
        folder: Folder of the model.
        form: Pooling, normalisation, prompts and length.
        width: Size of the hidden states.
    """
    kinds = [kind for kind in MODULE_PATHS if kind != "Normalize" or form.normalize]
    _write(folder / LENGTH_FILE, {"max_seq_length": form.max_length, "do_lower_case": False})
    flags = {f"pooling_mode_{POOLING_FLAGS[name]}": name == form.pooling for name in POOLINGS}
    _write(folder / MODULE_PATHS["Pooling"] / "config.json", {"word_embedding_dimension": width} | flags)
    if form.normalize:
        (folder / MODULE_PATHS["Normalize"]).mkdir(exist_ok=True)
    _write(folder / PROMPTS_FILE, {"prompts": form.prompts, "default_prompt_name": form.default_prompt})
    modules = [
        {"idx": index, "name": str(index), "path": MODULE_PATHS[kind], "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    _write(folder / MODULES_FILE, modules)  # last: what makes the folder one of sentence-transformers


def _find_form(model: PreTrainedModel, form: Any) -> EmbeddingForm:
    if isinstance(form, EmbeddingForm):
        if form.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {form.pooling!r}.")
        return form
    source = form or model.name_or_path
    found = read_embedding_form(source) if source else None
    if found is None:
        raise ValueError(
            f"`form` must be given: {str(source)!r} has no {MODULES_FILE} to read it from. Use "
            '`EmbeddingForm(pooling="mean", normalize=True)` if texts are compared by cosines.'
        )
    return found


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as draft:
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
