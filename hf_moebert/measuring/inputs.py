"""Inputs made up for a model that is measured without data."""

import inspect

from torch import Tensor
from transformers import PreTrainedModel


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
