"""Viterbi decoding in numpy alone, for exported models, and because it is the fastest for a few tags on a CPU."""

import hashlib
from collections.abc import Mapping

import numpy as np


EMISSION_LIMIT = 1e30  # in place of infinity: as decisive, and differences to it are finite


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of arrays with their names, dtypes and shapes, in hexadecimal."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def viterbi(
    emissions: np.ndarray, lengths: np.ndarray, transitions: np.ndarray, *, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Find the best tag sequence of every row; forbidden moves have the score -inf.

    Args:
        emissions: Scores of the tags of every word. Shape `(words, batch, tags)`.
        lengths: Number of words of each row, which come first. Shape `(batch,)`.
        transitions: Score of each next tag (column) after each tag (row). Shape `(tags, tags)`.
        start: Score of each first tag. Shape `(tags,)`.
        end: Score of each last tag. Shape `(tags,)`.

    Returns:
        Tags, undefined where a row has no more words. Shape `(words, batch)`, int64.

    Source: Viterbi 1967; `hf_moebert.methods.masked_crf.functional.viterbi` is the same on tensors.
    """
    words, batch, _ = emissions.shape
    rows = np.arange(batch)
    into = np.ascontiguousarray(transitions.T)  # (tags, tags): next, previous
    best = [emissions[0] + start]  # (batch, tags): of the paths that end in each tag
    for emission in emissions[1:]:
        best.append((best[-1][:, None, :] + into).max(2) + emission)
    last = (np.stack(best)[np.maximum(lengths, 1) - 1, rows] + end).argmax(1)  # (batch,)
    ends = np.arange(1, words + 1)[:, None] == lengths  # (words, batch)
    tags = np.empty((words, batch), np.int64)
    tags[-1] = last
    for word in range(words - 2, -1, -1):
        before = (best[word] + into[tags[word + 1]]).argmax(1)  # (batch,)
        tags[word] = np.where(ends[word], last, before)
    return tags
