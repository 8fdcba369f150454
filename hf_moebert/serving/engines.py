"""The engine of a model of one task: arrays to arrays, whichever library computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_moebert.runtime.chains import Chain
from hf_moebert.runtime.texts import TextReader


@dataclass(frozen=True, eq=False)
class Engine:
    """A model with its tokenizer.

    Args:
        kind: What it answers, as `hf_moebert.runtime.TextModel.kind`.
        labels: Names of the labels, in the order of their numbers; none of an embedder.
        reader: From texts to its inputs.
        run: From its inputs, `(batch, seq)`, to its outputs in float32, `(batch, ...)`: logits, those of starts and
            ends, or hidden states.
        model: What computes.
        chain: The CRF of a tagger.
        shortest: Shortest row of those that are run together, as a share of the longest.
    """

    kind: str
    labels: list[str]
    reader: TextReader
    run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]
    model: Any
    chain: Chain | None = None
    shortest: float = 0.75
