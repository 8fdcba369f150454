"""Inputs of a model: of texts without labels, and made up where there is no data."""

import inspect
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from .importance import load_batches, without_labels


Batch = dict[str, Tensor]
MIN_EXAMPLES = 32  # fewer say little about what a layer is given
MAX_LENGTH = 512  # tokens of a text, where the tokenizer sets no limit


def complete_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """Return ids with what else the model needs: ids for a decoder, and for a CRF that every token is a word.

    Args:
        model: A model that runs on ids.
        input_ids: Shape `(batch, seq)`.

    Returns:
        Arguments of `forward`, all of that shape.
    """
    inputs = {"input_ids": input_ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids
    if "word_mask" in inspect.signature(model.forward).parameters:
        inputs["word_mask"] = input_ids.new_ones(input_ids.shape)
    return inputs


def load_inputs(
    model: PreTrainedModel, dataset: Any, processing: Any, *, max_examples: int, batch_size: int
) -> list[Batch]:
    """Encode the first examples of a data set, in batches on the model's device, without their labels.

    Args:
        model: The model whose `forward` says which columns there are.
        dataset: Texts, or encoded examples.
        processing: A tokenizer, or the collator of encoded examples; `None` for that of transformers.
        max_examples: How many are used.
        batch_size: Examples of a batch.

    Raises:
        ValueError: If there are too few examples, or texts and no tokenizer.
    """
    examples = list(islice(dataset, max_examples))
    if len(examples) < MIN_EXAMPLES:
        raise ValueError(
            f"`dataset` and `max_examples` must give at least {MIN_EXAMPLES} examples, got {len(examples)}. Give some "
            "hundred texts of the kind that the model is used for; they need no labels."
        )
    is_tokenizer = isinstance(processing, PreTrainedTokenizerBase)
    if isinstance(examples[0], str):
        if not is_tokenizer:
            raise ValueError(
                f"`processing` must be the model's tokenizer for texts, got {type(processing).__name__}. Use "
                "`AutoTokenizer.from_pretrained`."
            )
        limit = min(processing.model_max_length, MAX_LENGTH)
        encoded = processing(sorted(examples, key=len), truncation=True, max_length=limit)  # little is padded
        examples = [{name: values[row] for name, values in encoded.items()} for row in range(len(examples))]
    collator = DataCollatorWithPadding(processing) if is_tokenizer else processing
    with torch.random.fork_rng(devices=[]):  # a `DataLoader` draws a seed, though nothing is drawn by it
        return [without_labels(model, batch) for batch in load_batches(model, examples, collator, batch_size)]
