"""Leave whole layers of a model out."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.families import find_architecture
from hf_moebert.architectures.heads import kinds_of_outputs
from hf_moebert.architectures.importance import frozen
from hf_moebert.architectures.inputs import Batch, complete_inputs, load_inputs
from hf_moebert.architectures.stacks import refuse_forms
from hf_moebert.architectures.surgery import Layer, find_layers

from .conversion_models import build_like, check_model, edit_config, fill
from .functional import move_outputs, spread_layers


LAYER_LISTS = ("layers", "mpoe_layers")  # fields that name the layers that were converted
STAGES = ("stage_names", "out_features", "out_indices")  # of backbones: by default the last layer


def drop_layers(
    model: PreTrainedModel,
    keep: int | Sequence[int],
    dataset: Any = None,
    processing: PreTrainedTokenizerBase | Callable | None = None,
    *,
    by: Literal["position", "importance"] = "position",
    max_examples: int = 128,
    batch_size: int = 32,
) -> PreTrainedModel:
    """Copy a model without some of its layers.

    Args:
        model: A model of a known family, of transformers or in a form of this package. It is not changed.
        keep: Indices of the layers that stay, ascending, counted from 0, those of a decoder behind those of an
            encoder; or how many layers stay, of each where there are both.
        dataset: See `choose_layers`.
        processing: See `choose_layers`.
        by: See `choose_layers`.
        max_examples: See `choose_layers`.
        batch_size: See `choose_layers`.

    Returns:
        A model of the same class with the same head, dtype, device and mode; of a class of transformers it loads
        without this package.

    Raises:
        ValueError: If the family is not known or its layers share their weights, the weights are in another form,
            `keep` is out of range, or a layer cannot go because it is not built like the others.
    """
    if isinstance(keep, int):
        options: dict[str, Any] = {"max_examples": max_examples, "batch_size": batch_size}
        keep = choose_layers(model, keep, dataset, processing, by=by, **options)
    places = _find_places(model)
    if not _is_choice(keep, len(places)):
        raise ValueError(
            f"`keep` must be indices in [0, {len(places)}), ascending and each once, got {list(keep)}. Use "
            f"{spread_layers(len(places), -(-len(places) // 2))} for every other layer."
        )
    if {place.stack for place in places} != {places[index].stack for index in keep}:
        raise ValueError(f"`keep` must hold a layer of encoder and decoder each, got {list(keep)}.")
    for place in places:
        if place.must_stay and place.index not in keep:
            raise ValueError(
                f"`keep` must hold layer {place.index}, which is not built like the others, got {list(keep)}. Add it."
            )
    return _cut(model, places, list(keep))


def choose_layers(
    model: PreTrainedModel,
    keep: int,
    dataset: Any = None,
    processing: PreTrainedTokenizerBase | Callable | None = None,
    *,
    by: Literal["position", "importance"] = "position",
    max_examples: int = 128,
    batch_size: int = 32,
) -> list[int]:
    """Choose the layers that stay: evenly spread ones, or those that the outputs need most.

    By importance, the layers whose loss moves the outputs of the model least go one after another, each measured
    together with those that are gone already: the divergence of what a head predicts, or the distance of the last
    hidden state, relative to its length. This greedy order is our own design.

    Args:
        model: As for `drop_layers`.
        keep: How many layers stay, in [1, those of the model]; of encoder and decoder each.
        dataset: For "importance": some hundred texts, or encoded examples. Labels are not read.
        processing: The tokenizer of the texts; or the collator of encoded examples, by default that of transformers.
        by: "position" or "importance".
        max_examples: How many of the first examples are used.
        batch_size: Examples in one forward pass.

    Returns:
        Indices, ascending. A student that is made of them may follow its teacher by
        `DistillationConfig(layer_map=[*kept[1:], depth])`: each of its layers aims at what the next one was given in
        the teacher. This choice is our own, too.

    Raises:
        ValueError: As for `drop_layers`, and if there are too few examples.
    """
    places = _find_places(model)
    stacks = {place.stack: [other for other in places if other.stack == place.stack] for place in places}
    deepest = max(map(len, stacks.values()))
    if isinstance(keep, bool) or not 1 <= keep <= deepest:
        raise ValueError(
            f"`keep` must be in [1, {deepest}], the number of layers, got {keep}. Use {-(-deepest // 2)}."
        )
    if by not in ("position", "importance"):
        raise ValueError(
            f'`by` must be "position" or "importance", got {by!r}. Use "position" where there are no texts.'
        )
    if by == "importance":
        if dataset is None:
            raise ValueError('`dataset` must be given for `by="importance"`, got None. Give some hundred texts.')
        batches = load_inputs(model, dataset, processing, max_examples=max_examples, batch_size=batch_size)
        return _choose_by_importance(model, places, keep, [_complete(model, batch) for batch in batches])
    kept = []
    for stack in stacks.values():
        kept += [stack[index].index for index in spread_layers(len(stack), min(keep, len(stack)))]
    return kept


class _Place:
    """Where a layer stands.

    Attributes:
        index: Its number in the model.
        path: Its path in the model.
        stack: Path of the list that holds it.
        depth: Field of the configuration with the number of layers of that list.
        must_stay: Whether it is not built like the others.
    """

    def __init__(self, index: int, layer: Layer, *, must_stay: bool) -> None:
        self.index, self.depth, self.must_stay = index, layer.stack.depth, must_stay
        self.path = layer.path
        self.stack = self.path.rpartition(".")[0]


def _find_places(model: PreTrainedModel) -> list[_Place]:
    """Find the layers of a model."""
    refuse_forms(model, "one task's model, before a CRF, to lose layers", "crf", "tasks")
    check_model(model)
    _check_layers(model)
    places = []
    layers = find_layers(model)
    for index, layer in enumerate(layers):
        behind = layers[index + 1] if index + 1 < len(layers) else layer
        is_first = layer.path.endswith(".0") and behind.stack is layer.stack
        lacks = is_first and behind.module.state_dict().keys() - layer.module.state_dict().keys()
        places.append(_Place(index, layer, must_stay=bool(lacks)))
    return places


def _check_layers(model: PreTrainedModel) -> None:
    config: Any = model.config
    stacks = find_architecture(model).stacks
    if any("*" in stack.path for stack in stacks):
        raise ValueError(
            f"`model` must have weights of its own in each layer, which those of {config.model_type!r} share. Set "
            "`config.num_hidden_layers` instead."
        )
    if len(stacks) > 1 and config.is_heterogeneous:
        raise ValueError(
            "`model` must have layers of one width where there are encoder and decoder. Drop layers before `shrink`."
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "`scale_attn_by_inverse_layer_idx` must be False: its layers depend on their number, got True."
        )


def _is_choice(keep: Iterable[Any], count: int) -> bool:
    kept = list(keep)
    is_index = all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < count for index in kept)
    return bool(kept) and is_index and kept == sorted(set(kept))


@torch.no_grad()
def _cut(model: PreTrainedModel, places: list[_Place], kept: list[int]) -> PreTrainedModel:
    """Copy a model with some layers; what only the first layer of a stack has goes to the new first one.

    That is T5's table of relative positions, which all layers read.
    """
    old, moved, counts = model.state_dict(), {}, dict.fromkeys((place.stack for place in places), 0)
    for place in places:
        moved[place.path] = None if place.index not in kept else f"{place.stack}.{counts[place.stack]}"
        counts[place.stack] += place.index in kept
    smaller = build_like(model, _cut_config(model, places, kept))
    state: dict[str, Tensor] = {}
    for name, tensor in old.items():
        path = next((path for path in moved if name.startswith(f"{path}.")), None)
        if path is None or moved[path] is not None:
            state[name if path is None else moved[path] + name.removeprefix(path)] = tensor
    wanted = smaller.state_dict()
    state |= {name: old[name] for name in wanted if name not in state and name in old}
    rows = _rows_of_tables(model, kept)
    for name, tensor in state.items():
        if name in wanted and tensor.shape != wanted[name].shape:  # a hash table, with a row for each layer of experts
            state[name] = tensor[rows]
    fill(smaller, state, model)
    return smaller


def _rows_of_tables(model: PreTrainedModel, kept: list[int]) -> list[int]:
    converted = getattr(model.config, "converted_layers", [])
    return [row for row, layer in enumerate(converted) if layer in kept]


def _cut_config(model: PreTrainedModel, places: list[_Place], kept: list[int]) -> PreTrainedConfig:
    def edit(fields: dict[str, Any]) -> None:
        for depth in {place.depth for place in places}:
            name = model.config.attribute_map.get(depth, depth)
            fields[name] = sum(place.index in kept for place in places if place.depth == depth)
        for name in LAYER_LISTS:
            if fields.get(name) is not None:
                fields[name] = [new for new, index in enumerate(kept) if index in fields[name]]
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][index] for index in kept]
        if fields.get("per_layer_config"):
            entries = {int(index): entry for index, entry in fields["per_layer_config"].items()}
            fields["per_layer_config"] = {new: entries[old] for new, old in enumerate(kept) if old in entries}
        for name in STAGES:
            fields.pop(name, None)

    return edit_config(model.config, edit)


def _complete(model: PreTrainedModel, batch: Batch) -> Batch:
    return complete_inputs(model, batch["input_ids"]) | batch if "input_ids" in batch else batch


def _choose_by_importance(
    model: PreTrainedModel, places: list[_Place], keep: int, batches: Sequence[Batch]
) -> list[int]:
    kept = [place.index for place in places]
    with frozen(model), torch.no_grad():
        wanted = [_answer(model, batch) for batch in batches]
        while candidates := _find_droppable(places, kept, keep):
            changes = {}
            for index in candidates:
                smaller = _cut(model, places, [other for other in kept if other != index])
                answers = (_answer(smaller, batch) for batch in batches)
                changes[index] = sum(map(_distance, wanted, answers, batches))
            kept.remove(min(changes, key=changes.__getitem__))
    return kept


def _find_droppable(places: list[_Place], kept: list[int], keep: int) -> list[int]:
    """Return the layers that may go next: those of stacks that still have more than so many."""
    left = [place for place in places if place.index in kept]
    depths = Counter(place.stack for place in left)
    return [place.index for place in left if depths[place.stack] > keep and not place.must_stay]


def _answer(model: PreTrainedModel, batch: Batch) -> dict[str, tuple[Tensor, Any]]:
    """Run a model, and return what it answers by name, with its kind; of a language model the last hidden state."""
    speaks = model.get_output_embeddings() is not None
    outputs = model(**batch, output_hidden_states=speaks, return_dict=True)
    if speaks:  # its logits would be as large as the vocabulary
        states = outputs.get("decoder_hidden_states") or outputs["hidden_states"]
        return {"hidden_states": (states[-1], "numbers")}
    return {name: (outputs[name], kind) for name, kind in kinds_of_outputs(model, outputs).items()}


def _distance(before: dict[str, tuple[Tensor, Any]], after: dict[str, tuple[Tensor, Any]], batch: Batch) -> float:
    """Sum over the examples, or real tokens, of a batch how far the outputs have moved."""
    mask, total = batch.get("attention_mask"), 0.0
    for name, (output, kind) in before.items():
        moved = after[name][0]
        if mask is not None and output.shape == mask.shape:  # of spans: the positions are the classes
            lowest = torch.finfo(output.dtype).min / 2
            output, moved = (x.masked_fill(mask == 0, lowest) for x in (output, moved))
        changes = move_outputs(output, moved, kind)
        if mask is not None and changes.shape == mask.shape:
            changes = changes[mask.bool()]
        total += float(changes.sum())
    return total
