"""The inputs of a model's matrices on data of its use: their second moments, and the uses of the rows of tables."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.functional_routing import real_tokens
from hf_moebert.architectures.importance import check_ids, frozen, load_batches
from hf_moebert.architectures.positions import count_positions


FEW = 32  # examples on which layers are disturbed
NOISE = 0.3  # of the size of a layer's outputs: about the error at half size
LEAST = 1e-3  # of the largest sensitivity: of what these outputs do not show
LONGEST = 512  # tokens of a text, where neither model nor tokenizer says


@dataclass
class Statistics:
    """Sums over the inputs of each matrix, by the path of the first module that holds it.

    Attributes:
        moments: Second moments of the inputs of linear layers, `(inputs, inputs)`, in float64.
        counts: Uses of each row of tables, `(rows,)`.
        seen: Inputs that the moments are the sums over.
        sensitivities: Of the model's outputs: the square of their relative error over that of the layer's outputs.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)

    def of(self, path: str) -> tuple[Tensor | None, Tensor | None, float | None]:
        """Return moments, counts and sensitivity of a matrix, as far as they are known."""
        return self.moments.get(path), self.counts.get(path), self.sensitivities.get(path)


def measure_inputs(
    model: PreTrainedModel,
    groups: Sequence[Sequence[str]],
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 32,
    sensitivities: bool = False,
) -> Statistics:
    """Run a model on calibration data, and sum up the inputs of its matrices; no activation is kept.

    Padding has no part in it. The model runs in eval mode and is left as it was.

    Args:
        model: Dense.
        groups: For each matrix the paths of the modules that share it.
        calibration: Texts, which the tokenizer encodes, or batches as the model's forward takes them, each a mapping
            of tensors; labels are ignored.
        tokenizer: Of the model; needed for texts only.
        batch_size: Texts in a batch; it does not change the moments.
        sensitivities: Whether to measure how much the model's outputs depend on each matrix: on a few texts, one more
            run for each.

    Raises:
        ValueError: If there is no text, batch or tokenizer, if texts or ids do not fit the model, if there are fewer
            tokens than the widest matrix has inputs, or if an activation is not finite.
    """
    batches, total = _make_batches(model, calibration, tokenizer, batch_size)
    statistics = Statistics()
    hooks = _Hooks(statistics)
    first: list[dict[str, Tensor]] = []
    with frozen(model), torch.no_grad(), ExitStack() as stack:
        for paths in groups:
            for module in {model.get_submodule(path) for path in paths}:
                handle = module.register_forward_pre_hook(hooks.watch(paths[0]), with_kwargs=True)
                stack.callback(handle.remove)
        for batch in tqdm(batches, "Calibrating", total, disable=None):
            hooks.masks = _read_masks(model, batch)
            _forward(model, batch)
            if sum(map(_count_examples, first)) < FEW:
                first.append(batch)
    _check_enough(statistics)
    if sensitivities:
        statistics.sensitivities = _measure_sensitivities(model, groups, first)
    return statistics


def _make_batches(
    model: PreTrainedModel, calibration: Any, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
) -> tuple[Iterable[dict[str, Tensor]], int | None]:
    """Check the form of the data, and return batches on the model's device, and how many there are, if known."""
    is_one = isinstance(calibration, str | bytes | Mapping)
    if is_one or not isinstance(calibration, Iterable):
        raise ValueError(
            f"`calibration` must be a list of texts, or batches such as a DataLoader yields, got "
            f"{type(calibration).__name__}. Put a single text or batch into a list."
        )
    items = iter(calibration)
    if (first := next(items, None)) is None:
        raise ValueError("`calibration` must hold texts or batches, got none. Give some hundreds of the model's use.")
    if isinstance(first, str):
        return _encode(model, [first, *items], tokenizer, batch_size)
    return _move(model, chain([first], items)), len(calibration) if isinstance(calibration, Sized) else None


def _encode(
    model: PreTrainedModel, texts: list[str], tokenizer: PreTrainedTokenizerBase | None, batch_size: int
) -> tuple[Iterable[dict[str, Tensor]], int]:
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}. Use 32.")
    if strange := next((text for text in texts if not isinstance(text, str)), None):
        raise ValueError(f"`calibration` must hold texts alone, got {type(strange).__name__} among them. Drop it.")
    is_tokenizer = isinstance(tokenizer, PreTrainedTokenizerBase)
    if not is_tokenizer or tokenizer is None:
        raise ValueError(
            f"`tokenizer` must be that of the model for texts, got {type(tokenizer).__name__}. Load it with "
            "`AutoTokenizer.from_pretrained`, or give batches of ids."
        )
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", len(tokenizer))
    if not vocabulary / 2 <= len(tokenizer) <= vocabulary:
        raise ValueError(
            f"`tokenizer` must be that of the model, but it knows {len(tokenizer)} tokens, and the model "
            f"{vocabulary}. Load both from the same place."
        )
    longest = min(count_positions(model) or LONGEST, tokenizer.model_max_length, LONGEST)
    rows = [tokenizer(text, truncation=True, max_length=longest) for text in texts]
    return load_batches(model, rows, DataCollatorWithPadding(tokenizer), batch_size), -(-len(rows) // batch_size)


def _move(model: PreTrainedModel, batches: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise ValueError(
                f"`calibration` must hold texts alone, or batches, each a mapping of tensors as the model takes it, "
                f"got {type(batch).__name__}. Use a DataLoader with a collator."
            )
        yield {name: value.to(model.device) for name, value in batch.items() if name not in ("labels", "label")}


def _forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Run the model, and return the first of its outputs, such as logits or hidden states."""
    if model.config.is_encoder_decoder and "decoder_input_ids" not in batch and model.can_generate():
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["input_ids"])
    check_ids(model, batch)
    try:
        outputs = model.forward(**batch)  # not what `model.compile()` made of it, which calls no hooks
    except (TypeError, ValueError) as error:
        raise ValueError(f"`calibration` must hold what the model takes, got {sorted(batch)}. {error}") from error
    first: Tensor = outputs[0]
    return first


def _count_examples(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


@torch.no_grad()
def _measure_sensitivities(
    model: PreTrainedModel, groups: Sequence[Sequence[str]], batches: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Disturb the outputs of each matrix alone by noise, and compare what the model puts out."""
    found: dict[str, float] = {}
    with frozen(model):
        expected = _answers(model, batches)
        norm = float(expected.square().sum()) or 1.0
        for paths in tqdm(groups, "Disturbing", disable=None):
            generator = torch.Generator(model.device).manual_seed(0)
            with ExitStack() as stack:
                for module in {model.get_submodule(path) for path in paths}:
                    stack.callback(module.register_forward_hook(_disturb(generator)).remove)
                lost = _answers(model, batches) - expected
            found[paths[0]] = float(lost.square().sum()) / norm / NOISE**2
    least = LEAST * max(found.values(), default=0.0) or 1.0
    return {path: max(value, least) for path, value in found.items()}


def _disturb(generator: torch.Generator) -> Callable:
    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float32, device=y.device)
        return y + (NOISE * y.float().square().mean().sqrt() * noise).to(y.dtype)

    return hook


def _answers(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return what a model puts out at the real tokens of all batches, in one row."""
    rows = []
    for batch in batches:
        outputs = _forward(model, batch)
        mask = _read_masks(model, batch).get(tuple(outputs.shape[:2]))
        rows.append((outputs if mask is None else outputs[mask]).double().flatten())
    return torch.cat(rows)


def _read_masks(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[tuple[int, ...], Tensor]:
    """Return which tokens of a batch are real, by the shapes `(batch, seq)` that there are."""
    masks = {}
    for ids, mask in (("decoder_input_ids", "decoder_attention_mask"), ("input_ids", "attention_mask")):
        if ids in batch and batch[ids].dim() == 2:
            real = real_tokens(batch.get(mask), batch[ids].shape)
            masks[tuple(batch[ids].shape)] = real.to(model.device)
    return masks


class _Hooks:
    """Hooks that sum up the inputs of modules at the real tokens of a batch."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.masks: dict[tuple[int, ...], Tensor] = {}  # by shape `(batch, seq)`

    def watch(self, path: str) -> Callable:
        """Return the hook for the modules of one matrix."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = (*args, *kwargs.values())[0].detach()
            if isinstance(module, nn.Embedding):
                self._count(path, x, module.num_embeddings)
            else:
                self._add(path, x)

        return hook

    def _count(self, path: str, ids: Tensor, rows: int) -> None:
        mask = self.masks.get(tuple(ids.shape))
        uses = (ids if mask is None else ids[mask]).flatten().bincount(minlength=rows)
        counts = self.statistics.counts
        counts[path] = counts[path] + uses if path in counts else uses

    def _add(self, path: str, x: Tensor) -> None:
        mask = self.masks.get(tuple(x.shape[:-1]))
        x = (x if mask is None else x[mask]).flatten(0, -2)  # (tokens, inputs)
        x = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            moments = (x.T @ x).double()
        if not bool(moments.isfinite().all()):
            raise ValueError(
                f"`calibration` must lead to finite activations, got NaN or infinity at the input of {path}. Check "
                "the inputs, or load the model in float32."
            )
        seen = self.statistics.seen
        seen[path] = seen.get(path, 0) + len(x)
        known = self.statistics.moments
        known[path] = known[path].add_(moments) if path in known else moments


def _check_enough(statistics: Statistics) -> None:
    widest = max((len(moments) for moments in statistics.moments.values()), default=0)
    if (most := max(statistics.seen.values(), default=0)) < widest:
        raise ValueError(
            f"`calibration` must hold at least {widest} tokens, as many as the widest matrix has inputs, got {most}. "
            "Give more texts: some hundreds of the model's use."
        )
