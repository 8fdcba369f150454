"""Run models over data sets, and read off what they predict of each example."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_moebert.architectures.functional_pooling import POOLINGS, pool, unit_length


Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Batch = dict[str, Tensor]
MAX_ANSWER_TOKENS = 30
ANSWERED_BY = ("input_ids", "attention_mask", "token_type_ids", "context_tokens")
IGNORED = -100  # label of a token that is no word


def predict_logits(model: nn.Module, dataset: Dataset, *, data_collator: Collator, batch_size: int = 32) -> np.ndarray:
    """Run a sequence classifier over a data set without gradients, and restore its training mode.

    Texts of similar length share a batch, so that little is padded; the logits come in the order of the data set.

    Args:
        model: Returns `logits`, one row per example; runs on the device of its parameters.
        dataset: Encoded examples with `input_ids`; labels are not passed to the model.
        data_collator: Pads a list of examples to tensors.
        batch_size: Examples per forward pass.

    Returns:
        The logits in float32. Shape `(examples, labels)`.

    Raises:
        ValueError: If the data set is empty or not encoded, or the logits are not one row per example.
    """

    def read(outputs: Any, batch: Batch) -> np.ndarray:
        logits = outputs.logits.float().cpu().numpy()
        if logits.ndim != 2 or len(logits) != len(batch["input_ids"]):
            raise ValueError(f"`model` must return logits of shape (batch, labels), got {logits.shape}.")
        return logits

    return np.stack(_predict(model, dataset, read, data_collator, batch_size))


def predict_embeddings(
    model: nn.Module, dataset: Dataset, *, data_collator: Collator, pooling: str, batch_size: int = 32
) -> np.ndarray:
    """Embed the texts of a data set, as `predict_logits` predicts them.

    Args:
        model: Returns `last_hidden_state`; a model without head.
        dataset: Encoded examples with `input_ids`; labels are not passed to the model.
        data_collator: Pads a list of examples to tensors.
        pooling: `mean`, `cls` or `last`.
        batch_size: Examples per forward pass.

    Returns:
        Vectors of the length 1 in float32, zeros for a text without tokens. Shape `(examples, hidden)`.

    Raises:
        ValueError: If there is no such pooling, or the data set is empty or not encoded.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}.")

    def embed(outputs: Any, batch: Batch) -> np.ndarray:
        pooled = pool(outputs.last_hidden_state, batch.get("attention_mask"), pooling)  # (batch, hidden)
        return unit_length(pooled).float().cpu().numpy()

    return np.stack(_predict(model, dataset, embed, data_collator, batch_size))


def predict_tags(
    model: nn.Module, dataset: Dataset, *, data_collator: Collator, batch_size: int = 32
) -> list[np.ndarray]:
    """Tag the words of a data set: by the best sequence if the model has a CRF, otherwise each word on its own.

    Args:
        model: A token classifier.
        dataset: Examples as `encode_tokens` returns them; their labels only say where words begin.
        data_collator: Pads a list of examples to tensors, labels too.
        batch_size: Examples per forward pass.

    Returns:
        Indices of the tags of each example's words. Shapes `(words,)`.

    Raises:
        ValueError: If the data set is empty or not encoded.
    """

    def read(outputs: Any, batch: Batch) -> list[np.ndarray]:
        decoded = getattr(outputs, "predictions", None)  # of a CRF
        tags = (outputs.logits.argmax(-1) if decoded is None else decoded).cpu().numpy()  # (batch, seq)
        words = batch["word_mask"].cpu().numpy()
        return [row[mask] for row, mask in zip(tags, words, strict=True)]

    return _predict(model, dataset, read, data_collator, batch_size, finds_words=True)


def predict_answers(model: nn.Module, dataset: Dataset, *, data_collator: Collator, batch_size: int = 32) -> list[str]:
    """Extract the answers to questions from their contexts.

    Args:
        model: Returns `start_logits` and `end_logits`.
        dataset: Examples as `encode_questions` returns them, with their `context`.
        data_collator: Pads a list of examples to tensors.
        batch_size: Examples per forward pass.

    Returns:
        The text of each answer, of at most 30 tokens.

    Raises:
        ValueError: If the data set is empty or not encoded.
    """

    def read(outputs: Any, batch: Batch) -> np.ndarray:
        scores = outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()
        return best_spans(*scores, batch["context_tokens"].cpu(), max_tokens=MAX_ANSWER_TOKENS).numpy()

    inputs = dataset.select_columns([name for name in dataset.column_names if name in ANSWERED_BY])
    spans = _predict(model, inputs, read, data_collator, batch_size)
    rows = zip(dataset["context"], dataset["offset_mapping"], spans, strict=True)
    return [context[offsets[first][0] : offsets[last][1]] for context, offsets, (first, last) in rows]


def predict_next_tokens(
    model: nn.Module, dataset: Dataset, *, data_collator: Collator, batch_size: int = 32
) -> np.ndarray:
    """Let a causal language model predict each token of a text from those before it.

    Args:
        model: Returns `logits` of the next token.
        dataset: Encoded texts with `input_ids`.
        data_collator: Pads a list of examples to tensors.
        batch_size: Texts per forward pass.

    Returns:
        Of each text, the sum of minus the natural logarithm of the probability of its tokens, how many of them were
        the likeliest, and how many there are. Shape `(examples, 3)`.

    Raises:
        ValueError: If the data set is empty or not encoded.
    """

    def read(outputs: Any, batch: Batch) -> np.ndarray:
        logits, wanted = outputs.logits[:, :-1].float(), batch["input_ids"][:, 1:]  # (batch, seq - 1, vocab), ...
        real = batch["attention_mask"][:, 1:].bool()
        surprise = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")  # (batch, seq - 1)
        right = logits.argmax(-1) == wanted
        rows = [(part * real).sum(-1).double() for part in (surprise, right, torch.ones_like(surprise))]
        return torch.stack(rows, dim=1).cpu().numpy()

    return np.stack(_predict(model, dataset, read, data_collator, batch_size))


def best_spans(start: Tensor, end: Tensor, context: Tensor, *, max_tokens: int) -> Tensor:
    """Choose the span of largest summed logits among those that do not end before they start, or leave the context.

    Args:
        start: Logits of each token to be the first of the answer. Shape `(batch, seq)`.
        end: Logits of each token to be the last one. Shape `(batch, seq)`.
        context: First and last token of the context. Shape `(batch, 2)`.
        max_tokens: Longest span.

    Returns:
        First and last token of the answers. Shape `(batch, 2)`.
    """
    place = torch.arange(start.shape[1])
    outside = (place < context[:, :1]) | (place > context[:, 1:])  # (batch, seq)
    length = place - place[:, None] + 1  # (seq, seq): of the span from row to column
    scores = start[:, :, None] + end[:, None, :]  # (batch, seq, seq)
    illegal = outside[:, :, None] | outside[:, None, :] | (length < 1) | (length > max_tokens)
    best = scores.masked_fill(illegal, -torch.inf).flatten(1).argmax(1)  # (batch,)
    return torch.stack([best // len(place), best % len(place)], dim=1)


def _predict(
    model: nn.Module,
    dataset: Dataset,
    read: Callable[[Any, Batch], Iterable[Any]],
    data_collator: Collator,
    batch_size: int,
    *,
    finds_words: bool = False,
) -> list[Any]:
    """Run a model over a data set, and read one item per example off its outputs and the batch."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not len(dataset) or "input_ids" not in dataset.column_names:
        raise ValueError(
            f"`dataset` must hold encoded examples with 'input_ids', got {len(dataset)} with the columns "
            f"{dataset.column_names}. Use `encode_text` first."
        )
    unread = ("label",) if finds_words else ("label", "labels")
    inputs = dataset.remove_columns([name for name in unread if name in dataset.column_names])
    longest_first = np.argsort([-len(ids) for ids in inputs["input_ids"]], kind="stable")
    batches = np.split(longest_first, range(batch_size, len(inputs), batch_size))
    device = next(model.parameters(), torch.empty(0)).device  # an export has none, and runs on the CPU
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    takes_words = "word_mask" in inspect.signature(model.forward).parameters  # a CRF decodes words alone
    found: list[Any] = [None] * len(inputs)
    try:
        with torch.no_grad():
            for rows in tqdm(batches, desc="Predicting", leave=False, disable=None):
                batch = {n: t.to(device) for n, t in data_collator([inputs[int(row)] for row in rows]).items()}
                beside = {"context_tokens": batch.pop("context_tokens")} if "context_tokens" in batch else {}
                if finds_words:
                    beside["word_mask"] = batch.pop("labels") != IGNORED  # (batch, seq)
                outputs = model(**batch, **(beside if takes_words and finds_words else {}))
                for row, item in zip(rows, read(outputs, batch | beside), strict=True):
                    found[row] = item
    finally:
        for module, training in modes:
            module.training = training
    return found
