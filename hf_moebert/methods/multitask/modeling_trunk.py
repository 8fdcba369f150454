"""A frozen trunk, branches that read its states, and the way from single-task models to both and back."""

import copy
from collections.abc import Collection, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
)

from hf_moebert.methods.masked_crf.modeling_masked_crf import BertCrfForTokenClassification


HEADS: dict[str, type[PreTrainedModel]] = {
    head.__name__: head
    for head in (
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
        BertCrfForTokenClassification,
    )
}


class BertTrunk(nn.Module):
    """The embeddings and the first layers of a BERT: frozen, and always without dropout.

    Args:
        config: Of a BERT; `num_hidden_layers` is the depth of the trunk.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: what tasks share is the same in training as in serving."""
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
        """Run to the deepest of some depths.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: 1 or True at real tokens, shape `(batch, seq)`; or a ready mask `(batch, 1, seq, seq)`.
            token_type_ids: Shape `(batch, seq)`.
            position_ids: Shape `(batch, seq)`.
            inputs_embeds: Word embeddings in place of ids. Shape `(batch, seq, hidden)`.
            depths: Numbers of layers; 0 is the embeddings.

        Returns:
            The states after that many layers, `(batch, seq, hidden)` each.

        Raises:
            ValueError: If a depth, an id or a length does not exist, or the batch is empty, which the host's BERT
                cannot read.
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
        """Return the embeddings, `(batch, seq, hidden)`, and the mask that all layers of a request share."""
        self._check_inputs(input_ids, position_ids, inputs_embeds)
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        for name, tensor in others.items():
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
        """Run layers over what `embed` returns; see `forward`."""
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
        """Refuse what would fail later without saying why, or on a GPU take the whole process down."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        given = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        device, limit = self.embeddings.position_ids.device, self.config.max_position_embeddings
        if given.device != device:
            raise ValueError(
                f"Inputs must be on the model's device {device}, got {given.device}. Move them with `.to`."
            )
        if given.dim() != (form := 3 if input_ids is None else 2):
            raise ValueError(
                f"Inputs must have {form} dimensions, (batch, seq) of ids or (batch, seq, hidden) of embeddings, got "
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
    """In place of a branch's embeddings: the trunk's states come in as `inputs_embeds` and go on as they are.

    Args:
        layers: Of the branch. States of another precision, such as cached ones, are cast to theirs.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self._layers = (layers,)  # looked at, not owned

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
        head: One of `HEADS`.
        config: Of the branch; the model keeps it.
    """
    sizes = ("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")
    kept = {name: getattr(config, name) for name in sizes}
    for name in sizes:  # so that no table is drawn only to be thrown away
        setattr(config, name, None if name == "pad_token_id" else 1)
    branch = head(config)
    for name, value in kept.items():
        setattr(config, name, value)
    branch.base_model.embeddings = TrunkStates(branch.base_model.encoder)
    branch.main_input_name = "inputs_embeds"
    return branch


def take_trunk(model: PreTrainedModel, num_layers: int) -> BertTrunk:
    """Copy the embeddings and the first layers of a single-task model.

    Args:
        model: One of `HEADS`. It is not changed.
        num_layers: How many.

    Raises:
        ValueError: If the model is of another class, or has fewer layers.
    """
    check_single_task(model)
    if not 0 <= num_layers <= model.config.num_hidden_layers:
        raise ValueError(
            f"`num_layers` must be in [0, {model.config.num_hidden_layers}], got {num_layers}. Use "
            "`model.config.frozen_layers`."
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    with no_init_weights():
        trunk = BertTrunk(config)
    fill(trunk, trunk_state(model, num_layers))
    return trunk.to(model.device)


def take_branch(model: PreTrainedModel, frozen_layers: int, num_layers: int | None = None) -> PreTrainedModel:
    """Copy the layers of a single-task model after the first ones, and its head.

    Args:
        model: One of `HEADS`. It is not changed.
        frozen_layers: Layers that are left to the trunk, with the embeddings.
        num_layers: How many of the next layers are taken; `None` takes all.

    Returns:
        A model of the same class, in eval mode, that reads the trunk's states as `inputs_embeds`.

    Raises:
        ValueError: If the model is of another class, or has fewer layers.
    """
    check_single_task(model)
    depth = model.config.num_hidden_layers
    if not 0 <= frozen_layers < depth:
        raise ValueError(f"`frozen_layers` must be in [0, {depth}), got {frozen_layers}. Leave a layer to the task.")
    count = depth - frozen_layers if num_layers is None else num_layers
    if not 0 < count <= depth - frozen_layers:
        raise ValueError(
            f"`num_layers` must be in [1, {depth - frozen_layers}] after {frozen_layers} of {depth} layers, got "
            f"{count}. Leave it out to take all."
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.frozen_layers = count, frozen_layers
    with no_init_weights():
        branch = new_branch(type(model), config)
    state = model.state_dict()
    layers = f"{model.base_model_prefix}.encoder.layer."
    for name in branch.state_dict():
        if name.startswith(layers):
            index, _, rest = name.removeprefix(layers).partition(".")
            state[name] = model.get_parameter(f"{layers}{int(index) + frozen_layers}.{rest}").detach()
    fill(branch, {name: state[name] for name in branch.state_dict()})
    return branch.to(model.device).eval()


def join(trunk: BertTrunk, branch: PreTrainedModel) -> PreTrainedModel:
    """Put a trunk and a branch together to the plain single-task model.

    Args:
        trunk: With at least the branch's `config.frozen_layers`. It is not changed.
        branch: From `take_branch`. It is not changed.

    Returns:
        A model of the branch's class, in eval mode; its `config.frozen_layers` says where it was split.

    Raises:
        ValueError: If the trunk is not deep enough.
    """
    frozen, own = branch.config.frozen_layers, branch.config.num_hidden_layers
    if frozen > len(trunk.layer):
        raise ValueError(f"`trunk` must have at least {frozen} layers, got {len(trunk.layer)}. Take a deeper one.")
    config = copy.deepcopy(branch.config)
    config.num_hidden_layers = frozen + own
    with no_init_weights():
        model = type(branch)(config)
    prefix = f"{branch.base_model_prefix}."
    layers, shared = f"{prefix}encoder.layer.", trunk.state_dict()
    state = {f"{prefix}{name}": tensor for name, tensor in shared.items() if name.startswith("embeddings.")}
    for name, tensor in shared.items():
        if name.startswith("layer.") and int(name.split(".")[1]) < frozen:
            state[f"{prefix}encoder.{name}"] = tensor
    for name, tensor in branch.state_dict().items():
        if name.startswith(layers):
            index, _, rest = name.removeprefix(layers).partition(".")
            name = f"{layers}{int(index) + frozen}.{rest}"
        state[name] = tensor
    fill(model, state)
    return model.to(branch.device).eval()


def trunk_state(model: PreTrainedModel, num_layers: int) -> dict[str, Tensor]:
    """Return the tensors of a single-task model's embeddings and first layers, named as in a trunk."""
    base: Any = model.base_model
    parts = {"embeddings": base.embeddings} | {f"layer.{i}": base.encoder.layer[i] for i in range(num_layers)}
    return {f"{path}.{name}": x for path, part in parts.items() for name, x in part.state_dict().items()}


def check_single_task(model: PreTrainedModel) -> None:
    """Refuse what is no plain single-task BERT with all its weights."""
    if type(model) not in HEADS.values():
        raise ValueError(
            f"`model` must be one of {', '.join(HEADS)}, got {type(model).__name__}. Merge adapters, and load the "
            "checkpoint with one of these classes."
        )
    if has_adapters(model):
        raise ValueError("`model` must be without adapters, which would be left behind. Merge them into it first.")
    if (form := getattr(model, "quantization_method", None)) is not None:
        raise ValueError(f"`model` must be dense, but its form is {form!r}. Call `to_dense(model)` first.")
    if model.main_input_name == "inputs_embeds":
        raise ValueError("`model` must have embeddings, got a branch. `join` it with its trunk first.")
    if model.config.is_decoder or model.config.add_cross_attention:
        raise ValueError(
            "`model` must be an encoder, but `config.is_decoder` is set. Load it with `is_decoder=False`."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are not. Load it without offloading.")


def has_adapters(model: PreTrainedModel) -> bool:
    """Say whether PEFT keeps weights beside those of the model's class."""
    wrappers = ("base_layer", "modules_to_save")  # what PEFT's layers hold, whatever their method
    wrapped = any(hasattr(part, wrapper) for part in model.modules() for wrapper in wrappers)
    return wrapped or getattr(model, "_hf_peft_config_loaded", False)


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module copies of all its weights, in their own dtypes."""
    module.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)


__all__ = ["BertTrunk", "join", "take_branch", "take_trunk"]
