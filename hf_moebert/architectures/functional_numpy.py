"""A CRF in numpy alone, for exported models, and because it decodes a few tags on a CPU the fastest."""

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

    Source: Viterbi 1967; `hf_moebert.methods.masked_crf.functional_decoding.viterbi` is the same on tensors.
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


def marginals(
    emissions: np.ndarray, lengths: np.ndarray, transitions: np.ndarray, *, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Compute the probability of each tag of each word, in logarithms and float64.

    Args:
        emissions: Shape `(words, batch, tags)`.
        lengths: Number of words of each row, which come first. Shape `(batch,)`.
        transitions: Shape `(tags, tags)`.
        start: Shape `(tags,)`.
        end: Shape `(tags,)`.

    Returns:
        Probabilities, undefined where a row has no more words. Shape `(words, batch, tags)`, float64.

    Source: the passes forwards and backwards, Rabiner 1989, section III;
    `hf_moebert.methods.masked_crf.functional.marginals` is the same on tensors.
    """
    emissions, rows = emissions.astype(np.float64), np.arange(emissions.shape[1])
    share = emissions - emissions.max(2, keepdims=True)  # (words, batch, tags): of each tag, given the words up to it
    inflow = np.zeros_like(share)  # of what reaches each tag from the word before
    share[0] += start
    for word in range(1, len(share)):
        inflow[word] = np.logaddexp.reduce(share[word - 1][:, :, None] + transitions, axis=1)
        share[word] += inflow[word]
        share[word] -= share[word].max(1, keepdims=True)
    last = np.maximum(lengths, 1) - 1  # (batch,)
    found = np.zeros_like(share)
    found[last, rows] = _softmax(share[last, rows] + end, axis=1)
    for word in range(len(share) - 1, 0, -1):  # each tag receives its part of the probability of the next
        reached = np.isfinite(inflow[word])[:, None, :]  # (batch, 1, tags)
        origin = _softmax(np.where(reached, share[word - 1][:, :, None] + transitions, 0), axis=1)
        found[word - 1] += np.where(reached, origin * found[word][:, None, :], 0).sum(2)
    return found


def _softmax(scores: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)
