"""Scores of embeddings, and of the order in which a reranker puts documents."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from sklearn.metrics import ndcg_score

from hf_moebert.data.splits import check_column

from .metrics.pearson_spearman.pearson_spearman import spearman
from .scores import Score


DEPTH = 10  # of a ranking that counts


def _mean_of(column: int) -> Score:
    return lambda predictions, references: float(predictions[:, column].mean())


# Of predictions `(pairs, 2)`: the cosine of each pair, and that of its texts to the baseline's
EMBEDDING_SCORES: dict[str, dict[str, Score]] = {
    "spearman_cosine": {"spearman_cosine": lambda predictions, references: spearman(predictions[:, 0], references)},
    "cosine_to_baseline": {"cosine_to_baseline": _mean_of(1)},
}
# Of predictions `(queries, 3)`: those of `score_retrieval`, and the cosine of the texts to the baseline's
RETRIEVAL_SCORES: dict[str, dict[str, Score]] = {
    "ndcg": {f"ndcg@{DEPTH}": _mean_of(0)},
    "recall": {f"recall@{DEPTH}": _mean_of(1)},
    "cosine_to_baseline": {"cosine_to_baseline": _mean_of(2)},
}
# Of predictions `(groups, 2)`, from `score_groups`
RANKING_SCORES: dict[str, dict[str, Score]] = {
    "ndcg": {f"ndcg@{DEPTH}": _mean_of(0)},
    "mrr": {f"mrr@{DEPTH}": _mean_of(1)},
}


def find_groups(dataset: Dataset, column: str) -> list[np.ndarray]:
    """Return the rows of each group, in the order of their first rows.

    Raises:
        ValueError: If there is no such column, or a group has one row, which nothing can be ranked in.
    """
    check_column(dataset, column)
    values = dataset[column][:]
    places: dict = {}
    for row, value in enumerate(values):
        places.setdefault(value, []).append(row)
    if alone := [value for value, rows in places.items() if len(rows) < 2]:
        raise ValueError(
            f"The column {column!r} must put at least two documents in every group, {alone[0]!r} has one: there is "
            "nothing to rank. Drop such rows, or leave `group_column` out."
        )
    return [np.asarray(rows) for rows in places.values()]


def score_groups(scores: np.ndarray, relevance: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Score the order of the documents of each group.

    Args:
        scores: By which documents are ordered, the largest first. Shape `(rows,)`.
        relevance: 0 for a document that is not relevant, more for one that is. Shape `(rows,)`.
        groups: Rows of each group.

    Returns:
        nDCG and reciprocal rank of the first relevant document, 0 if it is not among the first ten. Shape
        `(groups, 2)`.

    Raises:
        ValueError: If a relevance is negative, or a group has no relevant document.

    Source: Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418, by scikit-learn; equal scores share
    their gains.
    """
    rows = []
    for members in groups:
        mine, wanted = scores[members], relevance[members]
        if wanted.min() < 0 or not wanted.any():
            raise ValueError(
                "The labels of every group must be at least 0, and above 0 for a relevant document, got "
                f"{wanted.tolist()[:DEPTH]}. Drop groups without a relevant document."
            )
        first = int(np.flatnonzero(wanted[np.argsort(-mine, kind="stable")])[0])
        rows.append([ndcg_score([wanted], [mine], k=DEPTH), 1 / (first + 1) if first < DEPTH else 0.0])
    return np.asarray(rows)


def score_retrieval(queries: np.ndarray, documents: np.ndarray, texts: Sequence[str]) -> list[np.ndarray]:
    """Score where each query's document stands among all documents, by cosine; equal ones are asked about once.

    Args:
        queries: Vectors of the length 1. Shape `(pairs, hidden)`.
        documents: Those of the document of each query. Shape `(pairs, hidden)`.
        texts: Text of each document.

    Returns:
        nDCG@10 and recall@10 of each query, with one relevant document. Shapes `(pairs,)`.

    Source: Järvelin and Kekäläinen 2002, https://doi.org/10.1145/582415.582418.
    """
    _, first, place = np.unique(np.asarray(texts), return_index=True, return_inverse=True)
    ranks = []
    for start in range(0, len(queries), 256):  # not all cosines at once
        cosines = queries[start : start + 256] @ documents[first].T  # (queries, documents)
        own = np.take_along_axis(cosines, place[start : start + 256, None], axis=1)  # (queries, 1)
        ranks.append((cosines > own).sum(1) + ((cosines == own).sum(1) - 1) / 2)  # equal ones share their ranks
    rank = np.concatenate(ranks)  # from 0 on
    found = rank < DEPTH
    return [np.where(found, 1 / np.log2(rank + 2), 0.0), found.astype(float)]
