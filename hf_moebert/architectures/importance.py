"""The importance of feed-forward neurons, measured on examples with labels or without."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils.generic import find_labels

from .functional_importance import neuron_importance, weights_times_gradients
from .functional_losses import infer_problem_type, per_example_loss, span_loss, token_loss
from .functional_routing import real_tokens
from .heads import has_head, warn_of_untrained_head
from .pooling import find_pooling
from .positions import count_learned_positions
from .processes import find_processes
from .stacks import refuse_forms
from .surgery import FeedForward, find_feed_forwards
from .unlabelled_losses import unlabelled_losses


LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def measure_importance(
    model: PreTrainedModel,
    dataset: Any,
    data_collator: Callable | None = None,
    *,
    batch_size: int = 32,
    max_examples: int | None = None,
    seed: int = 0,
    labels: bool = True,
    pooling: str | None = None,
) -> Tensor:
    """Score every feed-forward neuron of a fine-tuned dense model by its effect on the task loss of each example.

    Without labels, that is its effect on what the model itself says: with a head on the loss of labels drawn from its
    own predictions, without one on a random projection of its embedding. What is drawn for an example depends on the
    seed and its place in the data set alone.

    One forward and one backward per batch serve all layers; no weight gradient is computed. The model runs in eval
    mode and at least float32, whatever its dtype or autocast, and is left as it was. Under `accelerate launch` each
    process takes its share of the examples, each example exactly once.

    Args:
        model: A stock model of a known family, or its shrunk form, with a head for classification of sequences, tokens
            or images, question answering, or (causal, masked, sequence-to-sequence) language modelling; or an encoder
            without head, which never needs labels.
        dataset: Examples, as given to a `Trainer`. Use the training set: scores that have seen the evaluation set leak
            it into the compressed model.
        data_collator: Makes a batch of examples; by default they are stacked, so they must have one length.
        batch_size: Examples per forward; it does not change the result.
        max_examples: Use this many examples, drawn with `seed`; by default all. 2,048 are plenty.
        seed: Seed of the draw, and of what is drawn for each example without labels.
        labels: Whether the labels of the data set are used. Without them, a model of several labels must say so by
            `problem_type`, and a sequence-to-sequence model needs `decoder_input_ids`.
        pooling: For a model without head, how its hidden states become an embedding: `mean`, `cls` or `last`; by
            default as `modules.json` says in the folder it was loaded from.

    Returns:
        Sum of the scores over the examples, in float32 (float64 for a float64 model); the layers of an encoder before
        those of a decoder. Shape `(layers, intermediate)`; in a shrunk model the width of the widest layer, with zeros
        behind the neurons of the others.

    Raises:
        ValueError: If the model's family is not known, it is not dense, the data set is empty, endless or has no
            labels, ids or labels do not fit the model, the pooling is not known, or a score is not finite.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, eq. 4. That a gated neuron's score is over its gate, up-
    and down-projection, and that layers shared by name are scored once, is our own choice; and so is all that is
    measured without labels.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1, got {max_examples}. Leave it out to use all.")
    model = _check_model(model)
    if has_head(model):
        if pooling is not None:
            raise ValueError(f"`pooling` must be None for a model with a head, got {pooling!r}. Leave it out.")
        warn_of_untrained_head(model, "the importance")
    else:
        labels, pooling = False, find_pooling(model, pooling)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"`dataset` must have a length, got {type(dataset).__name__}: examples are drawn from all of it. Use "
            "`Dataset.from_list(list(dataset.take(2048)))`."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty. Give examples like those that the model was trained on.")
    if model.dtype not in (torch.float32, torch.float64):
        model = copy.deepcopy(model).float()
    networks = find_feed_forwards(model)
    state = find_processes()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_examples]
    mine = order[state.process_index :: state.num_processes].tolist()
    batches = load_batches(model, Subset(dataset, mine), data_collator, batch_size)
    widest = max(network.num_units for network in networks)
    scores = torch.zeros(len(networks), widest, dtype=torch.float64, device=model.device)
    with frozen(model), ImportanceHooks(networks) as hooks, torch.autocast(model.device.type, enabled=False):
        total = -(-len(mine) // batch_size)
        hidden = None if state.is_local_main_process else True  # None: unless stderr is a terminal
        for number, batch in enumerate(tqdm(batches, "Measuring importance", total, disable=hidden)):
            hooks.num_examples = len(next(iter(batch.values())))
            with torch.enable_grad():
                if labels:
                    losses = example_losses(model, batch)
                else:
                    rows = mine[number * batch_size : (number + 1) * batch_size]
                    generators = [np.random.default_rng((seed, row)) for row in rows]
                    losses = unlabelled_losses(model, without_labels(model, batch), generators, pooling)
                losses.sum().backward()
            scores += hooks.pop_scores().to(scores.device)
    if state.num_processes > 1:
        scores = reduce(scores.to(state.device), reduction="sum")  # the model may still be elsewhere
    scores = scores.to("cpu", model.dtype)
    if not scores.isfinite().all():
        layers = (~scores.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"The importance of layers {layers} is not finite. Check the model's weights and the labels.")
    if not scores.any():
        raise ValueError(
            "`dataset` must have labels that a loss can be computed of, but every score is zero: all labels are -100, "
            "or the head ignores the body. Check the labels of some examples."
            if labels
            else "`dataset` must change what the model says, but every score is zero. Check the model's weights."
        )
    return scores


def _check_model(model: Any) -> PreTrainedModel:
    """Refuse what has no task loss, and unwrap what `torch.compile` has wrapped: its hooks would not be called."""
    refuse_forms(
        model,
        "dense, or shrunk, so that its neurons can be scored",
        *("adapters", "chains", "crf", "masks", "shared_experts", "tasks"),
        experts="Measure the dense model, and call `moebert.from_dense` on it anew",
    )
    found: Any = extract_model_from_parallel(model, keep_torch_compile=False) if hasattr(model, "modules") else model
    is_model = isinstance(found, PreTrainedModel)
    if not is_model:
        raise ValueError(
            f"`model` must be a model of transformers, got {type(model).__name__}. Merge an adapter by "
            "`merge_and_unload`."
        )
    if any(parameter.is_meta for parameter in found.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")
    is_choice = type(found).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()
    is_known = bool(find_labels(type(found))) if has_head(found) else not found.config.is_encoder_decoder
    if is_choice or not is_known:
        raise ValueError(
            "`model` must be an encoder, or have a head for classification, question answering or language modelling, "
            f"got {type(found).__name__}. Importance needs the task loss, or an embedding."
        )
    return found


def without_labels(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the labels; a decoder is given those that it would be trained with."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    if model.config.is_encoder_decoder and model.can_generate() and "decoder_input_ids" not in batch:
        if "labels" not in batch:
            raise ValueError(
                f"`dataset` must have `decoder_input_ids` or `labels` for a {type(model).__name__}, got the columns "
                f"{sorted(batch)}. Give what the decoder reads."
            )
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        inputs.setdefault("decoder_attention_mask", (batch["labels"] != -100).long())
    check_ids(model, inputs)
    return inputs


def check_ids(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Refuse ids outside of the vocabulary, and texts that have more tokens than positions are learned for."""
    ids, words = batch.get("input_ids"), model.get_input_embeddings()
    if ids is None or type(words) is not nn.Embedding:
        return
    wrong = ids[(ids < 0) | (ids >= words.num_embeddings)]
    if wrong.numel():
        raise ValueError(
            f"`input_ids` must be in [0, {words.num_embeddings}), got {int(wrong[0])}. Use the model's tokenizer."
        )
    longest = count_learned_positions(model)
    if longest is not None and ids.shape[-1] > longest:
        raise ValueError(
            f"`input_ids` must have at most {longest} tokens, got {ids.shape[-1]}. Tokenize with `truncation=True`."
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse classes that do not exist, and labels of another task than the logits."""
    if logits.dim() == 3 and labels.shape != logits.shape[:2]:
        raise ValueError(
            f"Labels must have the shape {tuple(logits.shape[:2])} (batch, seq) of the tokens, got "
            f"{tuple(labels.shape)}. Use data of the task of the model's head."
        )
    if labels.is_floating_point() or logits.shape[-1] == 1:
        return
    wrong = labels[((labels < 0) & (labels != -100)) | (labels >= logits.shape[-1])]
    if wrong.numel():
        raise ValueError(
            f"Labels must be in [0, {logits.shape[-1]}), or -100, got {int(wrong[0])}. Check `num_labels`."
        )


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in eval mode without trainable parameters, and afterwards back as it was."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)


class ImportanceHooks:
    """Hooks on feed-forward networks that collect weights times gradients in every backward, as a context manager.

    Args:
        networks: The networks.

    Attributes:
        num_examples: Size of the batch; set it before each forward.
    """

    def __init__(self, networks: list[FeedForward]) -> None:
        self.networks, self.num_examples = networks, 0
        self.products: list[list[Tensor]] = [[] for _ in networks]  # (batch, blocks * intermediate) each

    def __enter__(self) -> Self:
        self.handles = []
        for network, products in zip(self.networks, self.products, strict=True):
            for part in network.paths.matrices:
                module = network.part(part)
                if part == "down":
                    self.handles.append(module.register_forward_pre_hook(self._watch_input(products)))
                else:
                    self.handles.append(module.register_forward_hook(self._watch_output(products)))
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self.handles:
            handle.remove()

    def pop_scores(self) -> Tensor:
        """Score the neurons on the last batch, and free what was kept of it. Shape `(layers, intermediate)`."""
        scores = []
        for network, products in zip(self.networks, self.products, strict=True):
            scores.append(neuron_importance(products, network.num_units))
            products.clear()
        return nn.utils.rnn.pad_sequence(scores, batch_first=True)

    def _watch_output(self, products: list[Tensor]) -> Callable:
        def hook(module: nn.Module, args: Any, z: Tensor) -> Tensor:  # z: (batch, seq, intermediate)
            if not z.requires_grad:  # the graph starts here: nothing below needs a gradient
                z = z.detach().requires_grad_()
            self._collect(z, module.bias, products)
            return z

        return hook

    def _watch_input(self, products: list[Tensor]) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:  # (batch, seq, intermediate)
            self._collect(args[0], None, products)

        return hook

    def _collect(self, tensor: Tensor, bias: Any, products: list[Tensor]) -> None:
        values, num_examples = tensor.detach(), self.num_examples

        def collect(gradient: Tensor) -> None:
            products.append(weights_times_gradients(values, gradient, bias, num_examples))

        tensor.register_hook(collect)


def example_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Compute the task loss of each example as if it were alone, `(batch,)`: padding has no part in it."""
    batch = dict(batch)
    targets = {name: batch.pop(name) for name in LABELS if name in batch}
    if not targets:
        raise ValueError(
            f"`dataset` must have labels, got the columns {sorted(batch)}. Importance needs the task loss; with "
            "`labels=False` it is measured on labels drawn from the model's own predictions."
        )
    labels = next(iter(targets.values()))
    generates: Any = model.can_generate()
    if generates and labels.dim() != 2:
        raise ValueError(
            f"Labels must have the shape (batch, seq) for {type(model).__name__}, got {tuple(labels.shape)}. Use data "
            "of the task of the model's head."
        )
    if generates and model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    check_ids(model, batch)
    outputs = model.forward(**batch)  # not what `model.compile()` made of it, which calls no hooks
    if "start_logits" in outputs:
        real = real_tokens(batch.get("attention_mask"), outputs.start_logits.shape).to(outputs.start_logits.device)
        lowest = torch.finfo(outputs.start_logits.dtype).min
        start, end = (x.masked_fill(~real, lowest) for x in (outputs.start_logits, outputs.end_logits))
        return span_loss(start, end, targets["start_positions"], targets["end_positions"])
    logits = outputs.logits
    _check_labels(labels, logits)
    if logits.dim() == 2:
        kind = model.config.problem_type or infer_problem_type(model.config.num_labels, labels)
        return per_example_loss(logits, labels, kind)
    if generates and not model.config.is_encoder_decoder:  # each token predicts the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    count = (labels != -100).sum(dim=1).clamp(min=1)
    return token_loss(logits, labels).sum(dim=1) / count


def load_batches(
    model: PreTrainedModel, dataset: Any, data_collator: Callable | None, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yield batches on the model's device, without the columns that its forward does not know."""
    known = [*inspect.signature(model.forward).parameters, "label", "label_ids"]
    collator = RemoveColumnsCollator(data_collator or default_data_collator, known)
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        yield {name: value.to(model.device) for name, value in batch.items()}
