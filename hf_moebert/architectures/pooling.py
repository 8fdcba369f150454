"""The form of embeddings: what the folder of a sentence-transformers model says of them."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from .embedding_form import POOLINGS, EmbeddingForm


MODULES_FILE, PROMPTS_FILE = "modules.json", "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
# The names of sentence-transformers: those of a field of 6.0, and the flags of older folders
POOLING_MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
POOLING_FLAGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


def read_embedding_form(source: str | PathLike[str]) -> EmbeddingForm | None:
    """Read how the model of a folder, or of the Hub, makes embeddings.

    Args:
        source: Folder or Hub id.

    Returns:
        The form, or None for a source without `modules.json`.

    Raises:
        ValueError: If it has modules other than a transformer, a pooling of one known kind and a normalisation, or
            its files do not hold what they should.
    """
    modules = _read(source, MODULES_FILE)
    if modules is None:
        return None
    remedy = "Use a model of a transformer, one pooling of all its tokens, and perhaps a normalisation."
    try:
        kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{MODULES_FILE} of {str(source)!r} must list modules by type and path. {remedy}") from error
    known = kinds.keys() - {"Normalize"} == {"Transformer", "Pooling"} and not kinds["Transformer"]
    if not known or len(kinds) != len(modules):
        raise ValueError(
            f"{MODULES_FILE} of {str(source)!r} must name a Transformer in the folder itself, a Pooling and perhaps a "
            f"Normalize, got {[str(module['type']) for module in modules]}. {remedy}"
        )
    prompts = _read(source, PROMPTS_FILE) or {}
    return EmbeddingForm(
        pooling=_find_pooling(source, _read(source, f"{kinds['Pooling']}/config.json") or {}),
        normalize="Normalize" in kinds,
        prompts=dict(prompts.get("prompts") or {}),
        default_prompt=prompts.get("default_prompt_name"),
        max_length=(_read(source, LENGTH_FILE) or {}).get("max_seq_length"),
    )


def find_pooling(model: PreTrainedModel, pooling: str | None = None) -> str:
    """Return the pooling that was asked for, or that of the folder a model was loaded from.

    Raises:
        ValueError: If there is no such pooling, or none is known.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}. Most embedders use mean.")
    source = getattr(model, "name_or_path", "")
    form = read_embedding_form(source) if pooling is None and source else None
    if pooling is None and form is None:
        raise ValueError(
            f"`pooling` must be given for a {type(model).__name__} without head, one of {', '.join(POOLINGS)}: it was "
            f"loaded from {source!r}, which has no {MODULES_FILE}. Most embedders use mean."
        )
    return pooling or form.pooling  # type: ignore[union-attr]


def _find_pooling(source: Any, config: dict[str, Any]) -> str:
    flags = {name for name, on in config.items() if name.startswith("pooling_mode_") and on is True}
    modes = config.get("pooling_mode") or sorted(flag.removeprefix("pooling_mode_") for flag in flags)
    modes = [modes] if isinstance(modes, str) else list(modes)
    known = {name: pooling for table in (POOLING_MODES, POOLING_FLAGS) for pooling, name in table.items()}
    if len(modes) != 1 or modes[0] not in known or not config.get("include_prompt", True):
        raise ValueError(
            f"The pooling of {str(source)!r} must be one of {', '.join(POOLINGS)} over all tokens, got "
            f"{modes or 'none'}{'' if config.get('include_prompt', True) else ' without the prompt'}. "
            "Use another model: others are not known here."
        )
    return known[modes[0]]


def _read(source: str | PathLike[str], name: str) -> Any:
    file = cached_file(str(source), name, **_MAY_LACK)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} of {str(source)!r} must be JSON: {error}. Save the model again.") from error


_MAY_LACK: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
