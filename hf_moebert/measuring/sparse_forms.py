"""Compare the sparse forms of a pruned model by bytes and by speed."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.architectures.positions import count_positions
from hf_moebert.checkpoints.packing import packed_bytes
from hf_moebert.inference.sparse import LAYOUTS, Layout, find_sparse_linears, to_sparse_linears
from hf_moebert.measuring.footprint import find_pruned_matrices
from hf_moebert.measuring.latency import SpeedUp, compare_latency


NOTHING_TO_GAIN = "nothing to gain: no matrix has zeros enough; what was removed whole is gone already"


@dataclass(frozen=True)
class SparseForm:
    """The size and speed of a pruned model in one form.

    Attributes:
        form: "dense", "packed", "csr" or "2:4".
        bytes: Size of the pruned matrices, or of all if none is pruned, on disk if packed, else in memory; None if
            the form is unavailable here.
        speed_up: Speed-up of the forward pass over dense; None where nothing was timed.
        meaning: The result in words.
    """

    form: str
    bytes: int | None
    speed_up: SpeedUp | None
    meaning: str


def compare_sparse_forms(
    model: PreTrainedModel,
    *,
    batch: int = 1,
    seq: int = 128,
    rounds: int = 20,
    max_kept: float = 0.5,
    seed: int = 0,
) -> list[SparseForm]:
    """Measure which forms make a pruned model smaller, and which make it faster, on the device it is on.

    A model whose neurons or heads were removed is narrower by itself, so that is no form of its own.

    Args:
        model: A pruned model that runs on ids or on pictures; it is left as it is.
        batch: Sequences per timed pass.
        seq: Tokens per sequence; pictures have the size of the config.
        rounds: Timed passes of every form, in turns.
        max_kept: As in `to_sparse_linears`.
        seed: Seed of the timed ids and of the intervals.

    Returns:
        Dense, packed, csr and 2:4, in this order.

    Raises:
        ValueError: If the model runs on neither, or if a number does not fit it.
    """
    inputs = _draw_inputs(model, batch, seq, seed)
    pruned = find_pruned_matrices(model)
    matrices = pruned or [weight for weight in model.parameters() if weight.dim() > 1]
    dense = sum(weight.nbytes for weight in matrices)
    packed = sum(packed_bytes(weight) for weight in matrices)
    copies, shares, refusals = {"dense": _copy_modules(model)}, {}, {}
    for layout in LAYOUTS:
        try:
            shares[layout] = find_sparse_linears(model, layout, max_kept=max_kept)
        except ValueError as error:
            refusals[layout] = str(error)
        else:
            copies[layout] = _copy_modules(model)
            to_sparse_linears(copies[layout], layout, max_kept=max_kept)
    passes = {form: _forward_pass(copied, inputs) for form, copied in copies.items()}
    speed_ups = compare_latency(passes, baseline="dense", rounds=rounds, seed=seed)
    forms = [
        SparseForm("dense", dense, None, "as `from_pretrained` gives it"),
        SparseForm("packed", packed, None, _describe_size(packed, dense)),
    ]
    for layout in LAYOUTS:
        if layout in refusals:
            forms.append(SparseForm(layout, None, None, refusals[layout] if pruned else NOTHING_TO_GAIN))
        else:
            saved = _count_saved(model, shares[layout], layout)
            meaning = _describe_speed(speed_ups[layout], model, shares[layout])
            forms.append(SparseForm(layout, dense - saved, speed_ups[layout], meaning))
    return forms


def _draw_inputs(model: PreTrainedModel, batch: int, seq: int, seed: int) -> dict[str, Tensor]:
    positions = count_positions(model) or seq
    if batch < 1 or not 1 <= seq <= positions:
        raise ValueError(
            f"`batch` and `seq` must be at least 1 and `seq` at most {positions}, got {batch} and {seq}. Use those "
            "of a usual input."
        )
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values" and hasattr(model.config, "image_size"):
        size = model.config.image_size
        shape = (batch, model.config.num_channels, *((size, size) if isinstance(size, int) else size))
        pictures = torch.randn(shape, generator=generator)  # (batch, channels, height, width)
        return {"pixel_values": pictures.to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"`model` must run on `input_ids` or on `pixel_values` of one size, got {type(model).__name__} on "
            f"{model.main_input_name!r}. Count its parameters with `measure_footprint`."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, seq), generator=generator)  # (batch, seq)
    return complete_inputs(model, ids.to(model.device))


def _copy_modules(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model but share its weights, so that layers of the copy can be replaced."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, weights).eval()


def _forward_pass(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        model(**inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _count_saved(model: nn.Module, shares: Mapping[str, float], layout: Layout) -> int:
    """Count the bytes saved by replacing layers; negative if the replacements take more."""
    saved = 0
    for name, share in shares.items():
        weight = model.get_parameter(f"{name}.weight")
        if layout == "csr":
            kept, index = round(share * weight.numel()), torch.int32.itemsize
            saved += weight.nbytes - kept * (weight.element_size() + index) - (len(weight) + 1) * index
        else:  # half the values, and two bits for the place of each
            saved += weight.nbytes - weight.nbytes // 2 - weight.numel() // 8
    return saved


def _describe_size(packed: int, dense: int) -> str:
    if packed == dense:
        return NOTHING_TO_GAIN
    return f"file {packed / dense:.0%} of dense; same speed, because it is dense in memory"


def _describe_speed(speed_up: SpeedUp, model: nn.Module, shares: Mapping[str, float]) -> str:
    sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in shares}
    zeros = 1 - sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if speed_up.low > 1:
        verdict = "faster than dense"
    elif speed_up.high < 1:
        verdict = "slower than dense"
    else:
        verdict = "about as fast as dense"
    return f"{verdict} here at {zeros:.0%} sparsity of {len(shares)} layers; inference only, not saved"


def sparse_form_rows(forms: Iterable[SparseForm]) -> list[dict[str, str]]:
    """Turn what `compare_sparse_forms` returns into the rows of a table."""
    rows = []
    for form in forms:
        speed = form.speed_up
        size = "-" if form.bytes is None else f"{form.bytes:,}"
        times = "-" if speed is None else f"{speed.median:.2f}x [{speed.low:.2f}, {speed.high:.2f}]"
        rows.append({"form": form.form, "bytes": size, "speed-up": times, "meaning": form.meaning})
    return rows
