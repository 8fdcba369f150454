"""Run an exported model on texts, without torch: ONNX Runtime, tokenizers and numpy."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from hf_moebert.data.buckets import run_by_length

from .answers import pool, rank_labels, score_labels, softmax, unit_length
from .chains import CHAIN_FILE, Chain, load_chain
from .folders import open_session, read_manifest
from .texts import Text, read_texts
from .verifying import check_golden, run_first


SHORTEST = 0.9  # of a batch, as a share of its longest text: less padding is worth more here than larger batches
CLASSIFIERS = ("classification", "multi-label", "regression", "reranking")
VERBS = {**dict.fromkeys(CLASSIFIERS, "classify"), "tagging": "tag", "embedding": "embed"}


def load(folder: str | PathLike[str], *, precision: str | None = None, threads: int = 1) -> "TextModel":
    """Load a model that `export_onnx` or `hf-moebert export` wrote with its tokenizer, without torch.

    Args:
        folder: The folder.
        precision: "float32" or "int8", by default float32 if it was exported.
        threads: Threads to compute with; one computes in the thread that calls.

    Raises:
        ValueError: If a file is not as it was exported, the precision was not exported or computes something else on
            this processor, there is no tokenizer, or ONNX Runtime is missing.
        FileNotFoundError: If the folder holds no export.
    """
    manifest, precision = read_manifest(folder, precision)
    session = open_session(folder, precision, threads=threads)
    if precision == "int8":
        check_golden(folder, precision, partial(run_first, session))
    return TextModel(session, Path(folder), manifest, precision)


class TextModel:
    """An exported model with its tokenizer: `classify`, `score`, `embed` or `tag`, by its kind.

    Batches hold texts of like length, and answers come in the order of the texts. A text's answer does not depend on
    the others in its batch, in int8 either.

    Args:
        session: Session of ONNX Runtime.
        folder: Folder of the export.
        manifest: What it says of itself.
        precision: That of the session.

    Attributes:
        kind: "classification", "multi-label", "regression", "reranking" (one score for a text or pair), "tagging",
            "embedding", or "other", which has `run` alone.
        labels: Names of the labels, in the order of their numbers; none of an embedder.
        max_length: Tokens after which a text is cut, or None.
    """

    def __init__(self, session: Any, folder: Path, manifest: dict[str, Any], precision: str) -> None:
        self.session, self.kind, self.form = session, manifest["kind"], manifest["embedding"] or {}
        self.precision, self.architecture = precision, manifest["architecture"]
        self.labels: list[str] = manifest["labels"]
        limits = [limit for limit in (manifest["max_length"], self.form.get("max_length")) if limit]
        self.reader = read_texts(folder, manifest["inputs"], min(limits, default=None))
        self.max_length = self.reader.max_length
        self.chain: Chain | None = load_chain(folder) if (folder / CHAIN_FILE).is_file() else None

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph on its inputs, each `(batch, seq)`, int64, and return its outputs in order."""
        return self.session.run(None, inputs)

    def classify(
        self, texts: Sequence[Text], *, top_k: int | None = None, batch_size: int = 32
    ) -> list[list[dict[str, Any]]]:
        """Score the labels of texts, or of pairs of texts, like `pipeline("text-classification", top_k=top_k)`.

        Args:
            texts: Texts, or tuples of two.
            top_k: How many labels to return, by default all.
            batch_size: Most texts that are run together.

        Returns:
            For each text, `{"label", "score"}` of its labels, the highest score first.

        Raises:
            ValueError: If the model is of another kind, or something is no text.
        """
        self._check("classify", *CLASSIFIERS)
        logits = self._run(self.reader.encode(texts), lambda found, mask, places: found, batch_size)
        return [rank_labels(score_labels(row, self.kind), self.labels)[:top_k] for row in logits]

    def score(self, texts: Sequence[Text], *, raw: bool = False, batch_size: int = 32) -> np.ndarray:
        """Score texts or pairs of texts by one number, like a `CrossEncoder` or a model of numbers.

        Args:
            texts: Texts, or tuples of two.
            raw: Whether to return logits where a sigmoid would follow.
            batch_size: Most texts that are run together.

        Returns:
            Shape `(texts,)`, float32.

        Raises:
            ValueError: If the model has more than one label, or something is no text.
        """
        self._check("score", "reranking", "regression")
        if len(self.labels) != 1:
            raise ValueError(f"`score` needs a model of one label, got {len(self.labels)}. Call `classify`.")
        found = self._run(self.reader.encode(texts), lambda logits, mask, places: logits[:, 0], batch_size)
        logits = np.array(found, np.float32)  # (texts,)
        return logits if raw else score_labels(logits, self.kind)

    def embed(self, texts: Sequence[str], *, prompt: str | None = None, batch_size: int = 32) -> np.ndarray:
        """Return the embeddings of texts, like `SentenceTransformer.encode`.

        Args:
            texts: Texts.
            prompt: Name of what is put before each text, by default that of texts of no stated kind.
            batch_size: Most texts that are run together.

        Returns:
            Shape `(texts, hidden)`, float32.

        Raises:
            ValueError: If the model is of another kind, there is no such prompt, or something is no text.
        """
        self._check("embed", "embedding")
        if not self.form:
            raise ValueError("`embed` needs to know the pooling, but the export does not say it. Export with `form`.")
        prompts, name = self.form["prompts"], prompt or self.form["default_prompt"]
        if name is not None and name not in prompts:
            raise ValueError(f"`prompt` must be one of {sorted(prompts)}, got {name!r}.")
        prefix = prompts[name] if name else ""
        rows = self.reader.encode([prefix + text if isinstance(text, str) else text for text in texts])
        found = self._run(rows, lambda states, mask, places: pool(states, mask, self.form["pooling"]), batch_size)
        vectors = np.array(found, np.float32).reshape(len(found), -1 if found else 0)
        return unit_length(vectors) if self.form["normalize"] else vectors

    def tag(self, texts: Sequence[str | list[str]], *, batch_size: int = 32) -> list[list[dict[str, Any]]]:
        """Tag the words of texts, each by its first piece; with a CRF, by the best legal sequence.

        Args:
            texts: Texts, whose words are what blanks separate and each Chinese character, or lists of words.
            batch_size: Most texts that are run together.

        Returns:
            For each text, `{"word", "tag", "score", "start", "end"}` of its words; the score is the probability of
            the tag, with a CRF its marginal one.

        Raises:
            ValueError: If the model is of another kind, or something is neither text nor list of words.
        """
        self._check("tag", "tagging")
        rows, found = self.reader.encode_words(texts)
        firsts = [_first_pieces(row.word_ids) for row in rows]

        def read(logits: np.ndarray, mask: np.ndarray, places: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
            shifts = [self.reader.places(rows[place], logits.shape[1]).start or 0 for place in places]
            words = zip(shifts, places, strict=True)
            return self._read_tags(logits, [[shift + one for one in firsts[place].values()] for shift, place in words])

        tagged = self._run(rows, read, batch_size)
        return [
            [
                {"word": words.words[word], "tag": self.labels[tag], "score": float(score)}
                | dict(zip(("start", "end"), words.places[word], strict=True))
                for word, tag, score in zip(pieces, tags, scores, strict=True)
            ]
            for words, pieces, (tags, scores) in zip(found, firsts, tagged, strict=True)
        ]

    def _read_tags(self, logits: np.ndarray, words: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the tags of the words of each row, and their probabilities.

        Args:
            logits: Shape `(batch, seq, tags)`.
            words: Positions of the first pieces of the words of each row.
        """
        if self.chain is None:
            shares, tags = softmax(logits), logits.argmax(-1)
        else:
            mask = np.zeros(logits.shape[:2], bool)  # (batch, seq)
            for row, positions in enumerate(words):
                mask[row, positions] = True
            shares, tags = self.chain.marginals(logits, mask), self.chain.decode(logits, mask)
        found = []
        for row, positions in enumerate(words):
            chosen = tags[row, positions]  # (words,)
            found.append((chosen, shares[row, positions, chosen]))
        return found

    def _run(
        self, rows: list[Encoding], read: Callable[[np.ndarray, np.ndarray, list[int]], Iterable[Any]], batch_size: int
    ) -> list[Any]:
        """Run rows of like length together, and read the first output, the mask and the places of each batch."""
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")

        def call(places: list[int]) -> Iterable[Any]:
            inputs = self.reader.batch([rows[place] for place in places])
            return read(self.run(**inputs)[0], inputs["attention_mask"], places)

        lengths = [len(row) for row in rows]
        return run_by_length(range(len(rows)), lengths, call, batch_size=batch_size, shortest=SHORTEST)

    def _check(self, verb: str, *kinds: str) -> None:
        if self.kind not in kinds:
            instead = f"Call `{VERBS[self.kind]}`" if self.kind in VERBS else "Call `run` on arrays"
            raise ValueError(f"`{verb}` needs a model of the kind {' or '.join(kinds)}, got {self.kind!r}. {instead}.")


def _first_pieces(words: Sequence[int | None]) -> dict[int, int]:
    """Return the position of the first piece of each word, by the number of the word."""
    found: dict[int, int] = {}
    for position, word in enumerate(words):
        if word is not None:
            found.setdefault(word, position)
    return found
