"""The way from a dense BERT to a MoEBERT, and what it needs: neuron importance and token counts."""

import copy
import hashlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    default_data_collator,
)
from transformers.trainer_utils import RemoveColumnsCollator

from .functional import (
    infer_problem_type,
    neuron_importance,
    per_example_loss,
    span_loss,
    token_loss,
)
from .functional_routing import real_tokens
from .modeling_heads import (
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
)
from .modeling_moebert import MoEBertModel, MoEBertPreTrainedModel


FORMAT_VERSION = "1"
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def measure_importance(
    model: PreTrainedModel,
    dataset: Any,
    data_collator: Callable | None = None,
    *,
    batch_size: int = 32,
    max_examples: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Score every feed-forward neuron of a fine-tuned dense BERT by its effect on the task loss of each example.

    One forward and one backward per batch serve all layers; no weight gradient is computed. The model runs in eval
    mode and at least float32, whatever its dtype or autocast, and is left as it was. Under `accelerate launch` each
    process takes its share of the examples, each example exactly once.

    Args:
        model: A BERT with a head for sequence classification, token classification or question answering.
        dataset: Labelled examples, as given to a `Trainer`. Use the training set: scores that have seen the
            evaluation set leak it into the student.
        data_collator: Makes a batch of examples; by default they are stacked, so they must have one length.
        batch_size: Examples per forward; it does not change the result.
        max_examples: Use this many examples, drawn with `seed`; by default all. 2,048 are plenty.
        seed: Seed of the draw.

    Returns:
        Sum of the scores over the examples, in float32 (float64 for a float64 model). Shape `(layers, intermediate)`.

    Raises:
        ValueError: If the model is no dense BERT, the data set is empty or has no labels, or a score is not finite.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, eq. 4.
    """
    if model.config.model_type != "bert":
        raise ValueError(
            f'`model` must be a dense BERT (`model_type` "bert"), got {model.config.model_type!r}. Give the '
            "fine-tuned model, not its student."
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1, got {max_examples}. Leave it out to use all.")
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty. Give the labelled examples the model was trained on.")
    # as an `Accelerator` would, or the processes of `accelerate launch --cpu` never meet
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:max_examples]
    mine = order[state.process_index :: state.num_processes].tolist()
    if model.dtype not in (torch.float32, torch.float64):
        model = copy.deepcopy(model).float()
    scores = torch.zeros(
        model.config.num_hidden_layers, model.config.intermediate_size, dtype=torch.float64, device=model.device
    )
    batches = load_batches(model, Subset(dataset, mine), data_collator, batch_size)
    with scoring(model, scores), torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
        total = -(-len(mine) // batch_size)
        for batch in tqdm(batches, "Measuring importance", total, disable=not state.is_local_main_process):
            example_losses(model, batch).sum().backward()
    if state.num_processes > 1:
        scores = reduce(scores.to(state.device), reduction="sum")  # the model may still be elsewhere
    scores = scores.to("cpu", model.dtype)
    if not scores.isfinite().all():
        layers = (~scores.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"The importance of layers {layers} is not finite. Check the model's weights and the labels.")
    return scores


@contextmanager
def scoring(model: PreTrainedModel, scores: Tensor) -> Iterator[None]:
    """Add the importance of every batch that is run backward to `scores`, `(layers, intermediate)`."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    handles = []
    for index, layer in enumerate(model.base_model.encoder.layer):
        watch = watch_layer(scores[index], layer.intermediate.dense.bias, first=index == 0)
        handles.append(layer.intermediate.dense.register_forward_hook(watch["up"]))
        handles.append(layer.output.dense.register_forward_pre_hook(watch["down"]))
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)


def watch_layer(score: Tensor, bias: Tensor, *, first: bool) -> dict[str, Callable]:
    """Make the forward hooks of one feed-forward layer; what they keep of a batch is freed in its backward."""
    kept: dict[str, Tensor] = {}

    def up(module: Any, args: Any, z: Tensor) -> Tensor:  # z: (batch, seq, intermediate)
        if first:  # the graph starts here: nothing below needs a gradient
            z = z.detach().requires_grad_()
        kept["z"] = z.detach()
        z.register_hook(add_score)
        return z

    def down(module: Any, args: tuple[Tensor]) -> None:  # h: (batch, seq, intermediate)
        kept["h"] = args[0].detach()
        args[0].register_hook(lambda grad: kept.update(grad_h=grad))

    def add_score(grad_z: Tensor) -> None:  # runs after the gradient of `h` is known
        score.add_(neuron_importance(kept.pop("z"), grad_z, kept.pop("h"), kept.pop("grad_h"), bias))

    return {"up": up, "down": down}


def example_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Task loss of each example as if it were alone, `(batch,)`: padding has no part in it."""
    batch = dict(batch)
    targets = {name: batch.pop(name) for name in LABELS if name in batch}
    if not targets:
        raise ValueError(
            f"`dataset` must have labels, got the columns {sorted(batch)}. Importance needs the task loss."
        )
    outputs = model(**batch)
    if "start_logits" in outputs:
        real = real_tokens(batch.get("attention_mask"), outputs.start_logits.shape).to(outputs.start_logits.device)
        lowest = torch.finfo(outputs.start_logits.dtype).min
        start, end = (x.masked_fill(~real, lowest) for x in (outputs.start_logits, outputs.end_logits))
        return span_loss(start, end, targets["start_positions"], targets["end_positions"])
    labels = next(iter(targets.values()))
    if outputs.logits.dim() == 3:
        count = (labels != -100).sum(dim=1).clamp(min=1)
        return token_loss(outputs.logits, labels).sum(dim=1) / count
    kind = model.config.problem_type or infer_problem_type(model.config.num_labels, labels)
    return per_example_loss(outputs.logits, labels, kind)


def load_batches(
    model: PreTrainedModel, dataset: Any, data_collator: Callable | None, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Yield batches on the model's device, without the columns that its forward does not know."""
    known = [*inspect.signature(model.forward).parameters, "label", "label_ids"]
    collator = RemoveColumnsCollator(data_collator or default_data_collator, known)
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
        yield {name: value.to(model.device) for name, value in batch.items()}


def count_tokens(dataset: Any, vocab_size: int) -> Tensor:
    """Count how often each token id occurs in a tokenised, unpadded data set, for `hash-balanced` routing.

    Args:
        dataset: Has a column `input_ids`.
        vocab_size: Size of the vocabulary.

    Returns:
        Shape `(vocab_size,)`, int64.

    Raises:
        ValueError: If an id is outside the vocabulary.
    """
    ids = torch.as_tensor(list(itertools.chain.from_iterable(dataset["input_ids"])), dtype=torch.long)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise ValueError(f"`input_ids` must be in [0, {vocab_size}), got {int(wrong[0])}. Use the model's tokenizer.")
    return ids.bincount(minlength=vocab_size)


@torch.no_grad()
def measure_expert_load(
    model: PreTrainedModel, dataset: Any, data_collator: Callable | None = None, *, batch_size: int = 32
) -> Tensor:
    """Count the real tokens of a data set that each expert of a MoEBERT processes.

    Args:
        model: Any MoEBERT.
        dataset: Tokenised examples.
        data_collator: Makes a batch of examples.
        batch_size: Examples per forward.

    Returns:
        Shape `(converted layers, experts)`, int64.
    """
    training = model.training
    model.eval()
    loads = []
    for batch in load_batches(model, dataset, data_collator, batch_size):
        inputs = {name: value for name, value in batch.items() if name not in LABELS}
        loads.append(torch.stack(model(**inputs, output_expert_load=True).expert_load))  # (layers, experts)
    model.train(training)
    return torch.stack(loads).sum(dim=0).cpu()


def fingerprint(model: PreTrainedModel) -> str:
    """Hash all weights of a model with their names, shapes and dtypes (SHA-256)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_importance(path: str | Path, importance: Tensor, model: PreTrainedModel, **metadata: str) -> None:
    """Save scores as safetensors, with the fingerprint of the model they were measured on.

    Args:
        path: File to write, ending in `.safetensors`; it appears complete or not at all.
        importance: Shape `(layers, intermediate)`.
        model: The dense model.
        **metadata: Further facts to keep, e.g. data set, number of examples, seed.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    header = {**metadata, "format_version": FORMAT_VERSION, "model": fingerprint(model)}
    save_file({"importance": importance.contiguous()}, partial, metadata=header)
    os.replace(partial, path)


def load_importance(path: str | Path, model: PreTrainedModel) -> Tensor:
    """Load scores that were measured on exactly this model.

    Args:
        path: File from `save_importance`.
        model: The dense model.

    Returns:
        Shape `(layers, intermediate)`.

    Raises:
        ValueError: If the file is no importance file, damaged, of a newer version or of another model.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be an importance file, got {str(path)!r}, which does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            header, names = file.metadata() or {}, list(file.keys())
            importance = file.get_tensor("importance") if names == ["importance"] else None
    except SafetensorError as error:
        raise ValueError(
            f"`path` must be a complete safetensors file, got {str(path)!r}: {error}. Pickles and other formats are "
            "not read; measure the importance again with `measure_importance`."
        ) from error
    if importance is None or "model" not in header:
        raise ValueError(f"{str(path)!r} must hold the tensor 'importance' and a fingerprint, got {names}, {header}.")
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {header['format_version']}, this release reads {FORMAT_VERSION}. "
            "Update hf_moebert."
        )
    if header["model"] != (own := fingerprint(model)):
        raise ValueError(
            f"{str(path)!r} was measured on another model: its fingerprint is {header['model']}, this model's is "
            f"{own}. Measure it again, or give the model it belongs to."
        )
    return importance


# The MoEBERT of each dense class
MOEBERTS: dict[type[PreTrainedModel], type[MoEBertPreTrainedModel]] = {
    BertModel: MoEBertModel,
    BertForSequenceClassification: MoEBertForSequenceClassification,
    BertForTokenClassification: MoEBertForTokenClassification,
    BertForQuestionAnswering: MoEBertForQuestionAnswering,
}


def from_dense(model: PreTrainedModel, importance: Tensor, **options: Any) -> MoEBertPreTrainedModel:
    """Convert a fine-tuned dense BERT to the MoEBERT with the same head.

    Args:
        model: The dense BERT. It is not changed.
        importance: Score of each neuron, from `measure_importance`. Shape `(layers, intermediate)`.
        **options: See `MoEBertModel.from_dense`: `num_experts`, `expert_size`, `num_shared_neurons`, `routing`,
            `token_counts`, `seed`, and further fields of `MoEBertConfig`.

    Returns:
        The student in eval mode, with the dense model's dtype and device.

    Raises:
        ValueError: If no MoEBERT has the model's head, or the importance or an option does not fit.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.2.
    """
    for dense_class, moebert_class in MOEBERTS.items():
        if isinstance(model, dense_class):
            return moebert_class.from_dense(model, importance, **options)
    names = ", ".join(dense_class.__name__ for dense_class in MOEBERTS)
    raise ValueError(f"`model` must be one of {names}, got {type(model).__name__}. Other heads have no MoEBERT.")
