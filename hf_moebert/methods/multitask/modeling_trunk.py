"""A frozen trunk, and branches that take its states in place of embeddings."""

from collections.abc import Collection
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer


class BertTrunk(nn.Module):
    """The embeddings and the first layers of a BERT: frozen, and always without dropout.

    Args:
        config: Configuration of a BERT; `num_hidden_layers` is the depth of the trunk.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: the states are the same in training as in serving."""
        return super().train(False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        depths: Collection[int],
    ) -> dict[int, Tensor]:
        """Compute the states after some numbers of layers.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: 1 or True at real tokens, shape `(batch, seq)`; or a ready mask `(batch, 1, seq, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Word embeddings in place of ids. Shape `(batch, seq, hidden)`.
            depths: Numbers of layers; 0 is the embeddings.

        Returns:
            The states after each number of layers, `(batch, seq, hidden)` each.

        Raises:
            ValueError: If a depth or an id is out of range, the sequence is too long, or the batch is empty, which the
                BERT of transformers cannot take.
        """
        states, mask = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(states, mask, position_ids, depths=depths)

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings, `(batch, seq, hidden)`, and the attention mask of all layers."""
        self._check_inputs(input_ids, position_ids, inputs_embeds)
        optional = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        for name, tensor in optional.items():
            if tensor is not None and tensor.device != self.embeddings.position_ids.device:
                raise ValueError(
                    f"`{name}` must be on the model's device {self.embeddings.position_ids.device}, got "
                    f"{tensor.device}. Move it with `.to`."
                )
        _check_range("token_type_ids", token_type_ids, self.config.type_vocab_size)
        _check_range("position_ids", position_ids, self.config.max_position_embeddings)
        states = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=attention_mask)
        return states, mask

    def run(
        self, states: Tensor, mask: Tensor | None, position_ids: Tensor | None = None, *, depths: Collection[int]
    ) -> dict[int, Tensor]:
        """Run the layers on the results of `embed`; see `forward`."""
        known = len(self.layer)
        if not depths or not all(0 <= depth <= known for depth in depths):
            raise ValueError(
                f"`depths` must name numbers of layers in [0, {known}], got {sorted(depths)}. Use the tasks' "
                "`config.frozen_layers`."
            )
        found = {0: states} if 0 in depths else {}
        for depth, layer in enumerate(self.layer[: max(depths)], start=1):
            states = layer(states, mask, position_ids=position_ids)  # (batch, seq, hidden)
            if depth in depths:
                found[depth] = states
        return found

    def _check_inputs(
        self, input_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        """Refuse inputs that would fail later without a reason, or abort the process on a GPU."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        device, limit = self.embeddings.position_ids.device, self.config.max_position_embeddings
        if given.device != device:
            raise ValueError(
                f"Inputs must be on the model's device {device}, got {given.device}. Move them with `.to`."
            )
        if given.dim() != (dims := 3 if input_ids is None else 2):
            raise ValueError(
                f"Inputs must have {dims} dimensions, (batch, seq) of ids or (batch, seq, hidden) of embeddings, got "
                f"the shape {tuple(given.shape)}. Add the batch with `[None]`."
            )
        if not given.shape[0]:
            raise ValueError(f"A batch must have one row or more, got the shape {tuple(given.shape)}. Leave it out.")
        if given.shape[1] == 0 or (position_ids is None and given.shape[1] > limit):
            raise ValueError(f"Sequences must have 1 to {limit} tokens, got {given.shape[1]}. Truncate longer ones.")
        if input_ids is not None and input_ids.is_floating_point():
            raise ValueError(
                f"`input_ids` must be integers, got {input_ids.dtype}. Give embeddings as `inputs_embeds`."
            )
        _check_range("input_ids", input_ids, self.embeddings.word_embeddings.num_embeddings)


def _check_range(name: str, ids: Tensor | None, limit: int) -> None:
    if ids is None or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= limit)  # (batch, seq)
    if wrong.any():
        row, column = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"`{name}` must be in [0, {limit}), got {int(ids[row, column])} at row {row}, position {column}. Use the "
            "tokenizer that the tasks were trained with."
        )


class TrunkStates(nn.Module):
    """Embeddings of a branch, which return the trunk's states, given as `inputs_embeds`.

    Args:
        layers: Layers of the branch, to whose precision the states, which may be cached, are cast.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self._layers = (layers,)  # in a tuple, so that it is no submodule

    @property
    def word_embeddings(self) -> Self:
        """The module whose outputs are the embedded inputs, as `get_input_embeddings` of the branch returns it."""
        return self

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return `inputs_embeds`, `(batch, seq, hidden)`."""
        if inputs_embeds is None:
            raise ValueError(
                "A branch must get the trunk's states as `inputs_embeds`, got `input_ids`. Run `BertTrunk` first, or "
                "`join` both to one model."
            )
        return inputs_embeds.to(next(self._layers[0].parameters()).dtype)


def new_branch(head: type[PreTrainedModel], config: BertConfig) -> PreTrainedModel:
    """Build a single-task model without embeddings.

    Args:
        head: Class of the single-task model.
        config: Configuration of the branch; the model keeps it.
    """
    sizes = ("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")
    kept = {name: getattr(config, name) for name in sizes}
    for name in sizes:  # so that no table is initialised only to be discarded
        setattr(config, name, None if name == "pad_token_id" else 1)
    branch = head(config)
    for name, value in kept.items():
        setattr(config, name, value)
    branch.base_model.embeddings = TrunkStates(branch.base_model.encoder)
    branch.main_input_name = "inputs_embeds"
    return branch
