"""Decoding beside an exported model: this file and `functional_numpy.py` need numpy and safetensors only."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .functional_numpy import EMISSION_LIMIT, digest, viterbi


SCORES = ("transitions", "start", "end")


def load_decoder(folder: str | PathLike[str]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Load the CRF of an exported tagger as a function that decodes like `MaskedCRF.decode`.

    Args:
        folder: Folder that `export_crf` wrote.

    Returns:
        A function of the emissions `(batch, seq, tags)` and a mask, true at words, `(batch, seq)`. It returns tags,
        -100 off words, `(batch, seq)`, int64.

    Raises:
        ValueError: If the folder holds no CRF, a damaged one, or one that does not fit its config.json.
    """
    scores = _read_scores(Path(folder) / "crf.safetensors")
    tags = len(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["id2label"])
    wanted = {"transitions": (tags, tags), "start": (tags,), "end": (tags,)}
    found = {name: value.shape for name, value in scores.items()}
    if found != wanted:
        raise ValueError(f"`folder` must hold scores of the shapes {wanted}, got {found}. Export the model again.")
    transitions, start, end = (scores[name] for name in SCORES)

    def decode(emissions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        words, lengths, positions = _pack_words(_make_finite(emissions, tags), mask)
        result = np.full(lengths.shape + emissions.shape[1:2], -100, np.int64)  # (batch, seq)
        if not words.size:
            return result
        found = viterbi(words, lengths, transitions, start=start, end=end).T  # (batch, words)
        real = np.arange(found.shape[1]) < lengths[:, None]  # (batch, words)
        rows = np.broadcast_to(np.arange(len(found))[:, None], found.shape)
        result[rows[real], positions[real]] = found[real]
        return result

    return decode


def _read_scores(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"`folder` must hold crf.safetensors, got {str(path.parent)!r}. Write it with `export_crf`.")
    try:
        with safe_open(path, framework="np") as file:
            scores = {name: file.get_tensor(name) for name in list(file.keys())}
            expected = (file.metadata() or {}).get("sha256")  # 0.1.0 wrote none
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} must be a complete file: {error}. Export the model again.") from error
    if expected not in (None, found := digest(scores)):
        raise ValueError(
            f"{str(path)!r} must have the SHA-256 {expected}, but has {found}: it is damaged. Export the model again."
        )
    return scores


def _make_finite(emissions: np.ndarray, tags: int) -> np.ndarray:
    if emissions.ndim != 3 or emissions.shape[2] != tags:
        raise ValueError(f"`emissions` must have the shape (batch, seq, {tags}), got {emissions.shape}.")
    raised = np.nan_to_num(np.asarray(emissions, np.float32), nan=-EMISSION_LIMIT)
    return np.clip(raised, -EMISSION_LIMIT, EMISSION_LIMIT)


def _pack_words(emissions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move the words of each row to its front, relative to their best tag; return also their number and positions."""
    if mask.shape != emissions.shape[:2]:
        raise ValueError(f"`mask` must have the shape {emissions.shape[:2]} of the emissions, got {mask.shape}.")
    mask = mask.astype(bool)
    lengths = mask.sum(1)  # (batch,)
    positions = np.argsort(~mask, axis=1, kind="stable")[:, : lengths.max(initial=0)]  # (batch, words)
    words = np.take_along_axis(emissions, positions[..., None], axis=1).swapaxes(0, 1)  # (words, batch, tags)
    return words - words.max(2, keepdims=True), lengths, positions
