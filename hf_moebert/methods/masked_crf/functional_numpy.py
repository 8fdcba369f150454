"""Viterbi decoding in numpy alone: what serves an exported model, and the fastest way for a few tags on a CPU."""

import numpy as np


HIGHEST = 1e30  # stands for infinity among emissions: as decisive, and differences to it are numbers


def viterbi(
    emissions: np.ndarray, lengths: np.ndarray, transitions: np.ndarray, *, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Find the best tag sequence of every row; forbidden moves have the score -inf.

    Args:
        emissions: Scores of the tags of every word. Shape `(words, batch, tags)`.
        lengths: Words of each row, the first ones. Shape `(batch,)`.
        transitions: Score of each next tag (column) after each tag (row). Shape `(tags, tags)`.
        start: Score of each first tag. Shape `(tags,)`.
        end: Score of each last tag. Shape `(tags,)`.

    Returns:
        Tags, anything where a row has no more words. Shape `(words, batch)`, int64.

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
