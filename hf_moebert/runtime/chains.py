"""The CRF of an exported tagger, whose graph gives emissions: decoding and probabilities, in numpy."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from hf_moebert.architectures.functional_numpy import EMISSION_LIMIT, digest, marginals, viterbi


CHAIN_FILE = "crf.safetensors"
SCORES = ("transitions", "start", "end")
AGAIN = "Export the model again."


@dataclass(frozen=True, eq=False)
class Chain:
    """Scores of a linear-chain CRF; forbidden moves are -inf.

    Args:
        transitions: Score of each next tag (column) after each tag (row). Shape `(tags, tags)`.
        start: Score of each first tag. Shape `(tags,)`.
        end: Score of each last tag. Shape `(tags,)`.
        scheme: Scheme of the tags, such as "IOB2", if the file names it.
    """

    transitions: np.ndarray
    start: np.ndarray
    end: np.ndarray
    scheme: str = "none"

    def decode(self, emissions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Find the best tag sequence of each row, like `MaskedCRF.decode`.

        Args:
            emissions: Shape `(batch, seq, tags)`.
            mask: True at words. Shape `(batch, seq)`.

        Returns:
            Tags, -100 off words. Shape `(batch, seq)`, int64.

        Raises:
            ValueError: If shapes disagree.
        """
        words, lengths, positions = self._pack(emissions, mask)
        if not words.size:
            return np.full(mask.shape, -100, np.int64)
        found = viterbi(words, lengths, self.transitions, start=self.start, end=self.end)  # (words, batch)
        return _unpack(found, lengths, positions, np.full(mask.shape, -100, np.int64))

    def marginals(self, emissions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Compute the probability of each tag of each word, like `MaskedCRF.marginals`.

        Args:
            emissions: Shape `(batch, seq, tags)`.
            mask: True at words. Shape `(batch, seq)`.

        Returns:
            Probabilities, zero off words. Shape `(batch, seq, tags)`, float32.

        Raises:
            ValueError: If shapes disagree.
        """
        words, lengths, positions = self._pack(emissions, mask)
        if not words.size:
            return np.zeros(emissions.shape, np.float32)
        found = marginals(words, lengths, self.transitions, start=self.start, end=self.end)  # (words, batch, tags)
        return _unpack(found, lengths, positions, np.zeros(emissions.shape, np.float32))

    def _pack(self, emissions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Move the words of each row to its front, relative to their best tag; return also their number and places."""
        if emissions.ndim != 3 or emissions.shape[2] != len(self.start):
            raise ValueError(
                f"`emissions` must have the shape (batch, seq, {len(self.start)}), got {emissions.shape}."
            )
        if mask.shape != emissions.shape[:2]:
            raise ValueError(f"`mask` must have the shape {emissions.shape[:2]} of the emissions, got {mask.shape}.")
        raised = np.nan_to_num(np.asarray(emissions, np.float32), nan=-EMISSION_LIMIT)
        finite, mask = np.clip(raised, -EMISSION_LIMIT, EMISSION_LIMIT), mask.astype(bool)
        lengths = mask.sum(1)  # (batch,)
        positions = np.argsort(~mask, axis=1, kind="stable")[:, : lengths.max(initial=0)]  # (batch, words)
        words = np.take_along_axis(finite, positions[..., None], axis=1).swapaxes(0, 1)  # (words, batch, tags)
        return words - words.max(2, keepdims=True), lengths, positions


def _unpack(found: np.ndarray, lengths: np.ndarray, positions: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Put the entries of words, `(words, batch, ...)`, back into rows, `(batch, seq, ...)`."""
    real = np.arange(len(found)) < lengths[:, None]  # (batch, words)
    rows = np.broadcast_to(np.arange(len(lengths))[:, None], real.shape)
    result[rows[real], positions[real]] = found.swapaxes(0, 1)[real]
    return result


def load_chain(folder: str | PathLike[str]) -> Chain:
    """Load the CRF of an exported tagger.

    Args:
        folder: Folder that `export_onnx` wrote.

    Raises:
        ValueError: If the folder holds no CRF, a damaged one, or one that does not fit its config.json.
    """
    scores, texts = _read_scores(Path(folder) / CHAIN_FILE)
    names = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("id2label")
    tags = len(scores["start"] if names is None and "start" in scores else names or ())  # default names are not saved
    wanted = {"transitions": (tags, tags), "start": (tags,), "end": (tags,)}
    found = {name: value.shape for name, value in scores.items()}
    if found != wanted:
        raise ValueError(f"`folder` must hold scores of the shapes {wanted}, got {found}. {AGAIN}")
    return Chain(**scores, scheme=texts.get("scheme", "none"))


def _read_scores(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"`folder` must hold {path.name}, got {str(path.parent)!r}. Write it with `export_onnx`.")
    try:
        with safe_open(path, framework="np") as file:
            scores = {name: file.get_tensor(name) for name in list(file.keys())}
            texts = dict(file.metadata() or {})  # 0.1.0 wrote none
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} must be a complete file: {error}. {AGAIN}") from error
    if texts.get("sha256", found := digest(scores)) != found:
        raise ValueError(
            f"{str(path)!r} must have the SHA-256 {texts['sha256']}, but has {found}: it is damaged. {AGAIN}"
        )
    return scores, texts
