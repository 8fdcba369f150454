"""A frozen trunk, and branches that take its states in place of embeddings."""

import copy
import inspect
from collections.abc import Collection
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.paths import Architecture
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.surgery import get_part


class Trunk(nn.Module):
    """The embeddings and the first layers of a model: frozen, and always without dropout.

    The layers run in a body of transformers that takes states in place of embeddings, so that masks, rotations and
    relative positions are its own.

    Args:
        config: Configuration of a model of the family; `num_hidden_layers` is the depth of the trunk.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        row = ARCHITECTURES[config.dense_class.model_type]
        body = MODEL_MAPPING[config.dense_class](config)
        self._path = row.stacks[0].path
        self._words = (body.get_input_embeddings(),)  # in tuples, so that they are no submodules
        self.embeddings, self.layer = body.embeddings, get_part(body, self._path)
        shared = {path.rpartition(".")[2]: get_part(body, path) for path in row.trunk or ()}
        if shared := {name: module for name, module in shared.items() if module is not None}:
            self.embeddings.shared = nn.ModuleDict(shared)
        body.embeddings = TrunkStates(self.layer)
        self.rotations = nn.ModuleList()  # they have no weights, but move with the model
        for name, child in list(body.named_children()):
            if child is body.embeddings or name == self._path.partition(".")[0]:
                continue
            if any(True for _ in child.parameters()):  # a pooler or the norm at the end
                setattr(body, name, None if name == "pooler" else nn.Identity())
            else:
                self.rotations.append(child)
        self._body = (body,)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self.words.weight.device

    @property
    def words(self) -> nn.Embedding:
        """Word embeddings."""
        return self._words[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return count_positions(self) or self.config.max_position_embeddings

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
            if tensor is not None and tensor.device != self.device:
                raise ValueError(
                    f"`{name}` must be on the model's device {self.device}, got {tensor.device}. Move it with `.to`."
                )
        if kinds := getattr(self.config, "type_vocab_size", 0):
            _check_range("token_type_ids", token_type_ids, kinds)
        _check_range("position_ids", position_ids, self.config.max_position_embeddings)
        given = optional | {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "mask": attention_mask}
        known = inspect.signature(self.embeddings.forward).parameters
        states = self.embeddings(**{name: x for name, x in given.items() if x is not None and name in known})
        return states, attention_mask

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
        found |= self._run_layers(states, mask, position_ids, depth=max(depths))
        return {depth: found[depth] for depth in sorted(depths)}

    def _run_layers(
        self, states: Tensor, mask: Tensor | None, position_ids: Tensor | None, *, depth: int
    ) -> dict[int, Tensor]:
        """Return the states after each of the first layers."""
        found: dict[int, Tensor] = {}
        if depth:
            taps = nn.ModuleList(LayerTap(layer, number, found) for number, layer in enumerate(self.layer[:depth], 1))
            optional = {"attention_mask": mask, "position_ids": position_ids}
            body = _with_part(self._body[0], self._path, taps)
            body(inputs_embeds=states, **{name: x for name, x in optional.items() if x is not None})
        return found

    def _check_inputs(
        self, input_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        """Refuse inputs that would fail later without a reason, or abort the process on a GPU."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        device, limit = self.device, self.longest
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
        _check_range("input_ids", input_ids, self.words.num_embeddings)


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


class BertTrunk(Trunk):
    """The embeddings and the first layers of a BERT, which share one mask.

    Args:
        config: Configuration of a BERT; `num_hidden_layers` is the depth of the trunk.
    """

    def __init__(self, config: BertConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))
        self.requires_grad_(False).eval()

    @property
    def words(self) -> nn.Embedding:
        """Word embeddings."""
        return self.embeddings.word_embeddings

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.config.max_position_embeddings

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings, `(batch, seq, hidden)`, and the ready attention mask of all layers."""
        states, _ = super().embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=attention_mask)
        return states, mask

    def _run_layers(
        self, states: Tensor, mask: Tensor | None, position_ids: Tensor | None, *, depth: int
    ) -> dict[int, Tensor]:
        found = {}
        for number, layer in enumerate(self.layer[:depth], start=1):
            states = found[number] = layer(states, mask, position_ids=position_ids)  # (batch, seq, hidden)
        return found


def new_trunk(config: Any) -> Trunk:
    """Build the trunk of a family: that of BERT needs no body."""
    return BertTrunk(config) if isinstance(config, BertConfig) else Trunk(config)


class LayerTap(nn.Module):
    """A layer whose states are noted.

    Args:
        layer: The layer.
        number: Its number, from 1.
        found: Where the states are put.
    """

    def __init__(self, layer: nn.Module, number: int, found: dict[int, Tensor]) -> None:
        super().__init__()
        self.layer, self.number, self.found = layer, number, found

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer, such as the type of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        output = self.layer(*args, **kwargs)
        self.found[self.number] = output[0] if isinstance(output, tuple) else output
        return output


def _with_part(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Return a shallow copy of a module with another part at a path; what runs elsewhere is not changed."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    name, _, rest = path.partition(".")
    copied.__dict__["_modules"][name] = _with_part(getattr(module, name), rest, part) if rest else part
    return copied


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

    tok_embeddings = word_embeddings  # its name in ModernBERT

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return `inputs_embeds`, `(batch, seq, hidden)`."""
        if inputs_embeds is None:
            raise ValueError(
                "A branch must get the trunk's states as `inputs_embeds`, got `input_ids`. Run `BertTrunk` first, or "
                "`join` both to one model."
            )
        return inputs_embeds.to(next(self._layers[0].parameters()).dtype)


def new_branch(head: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Build a single-task model without embeddings.

    Args:
        head: Class of the single-task model.
        config: Configuration of the branch, of its own layers alone; the model keeps it.
    """
    sizes = ["vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"]
    sizes = sizes if isinstance(config, BertConfig) else []  # others compute with them
    kept = {name: getattr(config, name) for name in sizes}
    for name in sizes:  # so that no table is initialised only to be discarded
        setattr(config, name, None if name == "pad_token_id" else 1)
    own, frozen = config.num_hidden_layers, getattr(config, "frozen_layers", 0)
    config.num_hidden_layers = own + frozen  # layers may differ by their index
    branch = head(config)
    config.num_hidden_layers = own
    for name, value in kept.items():
        setattr(config, name, value)
    layers = layers_of(branch)
    set_layers(branch, layers[frozen:])
    branch.base_model.embeddings = TrunkStates(layers_of(branch))
    branch.main_input_name = "inputs_embeds"
    return branch


def find_dense(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """Return the configuration of transformers of a single-task model's family; a CRF is a head of its own type."""
    return BertConfig if isinstance(config, BertConfig) else type(config)


def row_of(model: PreTrainedModel) -> Architecture:
    """Return the row of a single-task model's family."""
    return ARCHITECTURES[find_dense(model.config).model_type]


def layers_of(model: PreTrainedModel) -> Any:
    """Return the list of layers of a model."""
    return get_part(model.base_model, row_of(model).stacks[0].path)


def set_layers(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Give a model another list of layers."""
    model.base_model.set_submodule(row_of(model).stacks[0].path, layers)
