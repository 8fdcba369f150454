"""Multiply only what pruning left: sparse linear layers for inference, and what each form of a pruned model brings."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .benchmark import SpeedUp, compare_latency
from .packing import packed_bytes


Layout = Literal["csr", "2:4"]
LAYOUTS: tuple[Layout, ...] = ("csr", "2:4")


class CsrLinear(nn.Module):
    """A linear layer whose weight is kept as compressed sparse rows: fast where most of it is zero, forward only.

    Args:
        dense: The layer to compute, in float32 or float64 on the CPU. Its bias is shared.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_buffer("weight", _to_csr(dense.weight.detach()))  # (out, in)
        self.bias = dense.bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Compute `x @ weight.T + bias`, for `x` of shape `(..., in)`."""
        tokens = x.reshape(-1, self.in_features)  # (tokens, in)
        if len(tokens) <= 2:  # twice as fast for so few, several times slower for many
            y = linear(tokens, self.weight, self.bias)  # (tokens, out)
        elif self.bias is None:
            y = torch.sparse.mm(self.weight, tokens.T).T
        else:
            y = torch.addmm(self.bias.unsqueeze(1).expand(-1, len(tokens)), self.weight, tokens.T).T
        return y.contiguous().view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say the sizes, as the dense layer does."""
        nonzero = self.weight.values().numel()
        return f"in_features={self.in_features}, out_features={self.out_features}, nonzero={nonzero}"


def _to_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = weight.to_sparse_csr()
        # MKL counts in 32 bits: with torch's usual 64 it would convert the indices in every call
        rows, columns = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape, check_invariants=True)


def to_sparse_linears(model: nn.Module, layout: Layout, *, max_kept: float = 0.5) -> dict[str, float]:
    """Give the pruned linear layers of a model a sparse weight, in place, for inference.

    The model is frozen and can no longer be saved: save it before, dense or packed. Only `nn.Linear` is replaced; a
    layer with more weights left than `max_kept` stays dense.

    Args:
        model: A pruned model, dense in memory.
        layout: "csr" for any pattern of zeros, in float32 or float64 on the CPU; "2:4" for at most two weights kept
            in every four of a row, in float16 or bfloat16 on a CUDA device.
        max_kept: Largest share of a weight that is not zero, in (0, 1]. Which share pays depends on the machine and
            the number of tokens: `compare_sparse_forms` measures it.

    Returns:
        The share kept of every layer that was replaced, by name.

    Raises:
        ValueError: If no layer is sparse enough, or one of these does not fit the layout; nothing is replaced then.
    """
    shares = find_sparse_linears(model, layout, max_kept=max_kept)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name in shares or module in replaced:
            if module not in replaced:
                replaced[module] = _make_sparse(module, layout)
            model.set_submodule(name, replaced[module])
    model.eval().requires_grad_(False)
    return shares


def find_sparse_linears(model: nn.Module, layout: Layout, *, max_kept: float = 0.5) -> dict[str, float]:
    """Find what `to_sparse_linears` would replace, with the same arguments, result and refusals."""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {list(LAYOUTS)}, got {layout!r}.")
    if not 0 < max_kept <= 1:
        raise ValueError(f"`max_kept` must be in (0, 1], got {max_kept}. Use 0.5 for layers with half their weights.")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    shares = {name: int(linear.weight.count_nonzero()) / linear.weight.numel() for name, linear in linears.items()}
    sparse = {name: share for name, share in shares.items() if share <= max_kept}
    if not sparse:
        least = f"{min(shares.values()):.2f}" if shares else "no such layer"
        raise ValueError(
            f"`model` must have an nn.Linear of which at most {max_kept} is kept, got {least}. Prune the model first."
        )
    refuse = {"csr": _refuse_csr, "2:4": _refuse_semi_structured}[layout]
    for name in sparse:
        refuse(name, linears[name].weight)
    return sparse


def _refuse_csr(name: str, weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(f"'csr' needs the CPU, got {name!r} on {weight.device}. Use `model.to('cpu')`.")
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"'csr' needs float32 or float64, got {name!r} in {weight.dtype}. Use `model.float()`.")


def _refuse_semi_structured(name: str, weight: Tensor) -> None:
    if weight.device.type != "cuda":
        raise ValueError(f"'2:4' needs CUDA, got {name!r} on {weight.device}. Use `model.to('cuda')`, or 'csr'.")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"'2:4' needs float16 or bfloat16, got {name!r} in {weight.dtype}. Use `model.half()`.")
    rows, columns = weight.shape
    if rows % 32 or columns % 64:  # what the strictest of torch's kernels for it asks for
        raise ValueError(
            f"'2:4' needs rows in multiples of 32 and columns of 64, got {name!r} of {rows} x {columns}. Leave it "
            "dense by a smaller `max_kept`, or use 'csr'."
        )
    fullest = int(weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1).max())
    if fullest > 2:
        raise ValueError(
            f"'2:4' needs at most 2 of every 4 weights in a row, got {fullest} in {name!r}. Prune in that pattern, or "
            "use 'csr'."
        )


def _make_sparse(dense: nn.Linear, layout: Layout) -> nn.Module:
    if layout == "csr":
        module: nn.Module = CsrLinear(dense)
    else:
        module = nn.Linear(dense.in_features, dense.out_features, bias=False, device="meta")
        weight = torch.sparse.to_sparse_semi_structured(dense.weight.detach())
        module.weight, module.bias = nn.Parameter(weight, requires_grad=False), dense.bias
    module.register_state_dict_pre_hook(_refuse_to_save)
    return module


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(
        f"{prefix.rstrip('.')!r} is sparse in memory only and cannot be saved. Save the model before "
        "`to_sparse_linears`; `save_packed` makes small files."
    )


@dataclass(frozen=True)
class SparseForm:
    """What one form of a pruned model brings.

    Attributes:
        form: "dense", "packed", "csr" or "2:4".
        bytes: What the pruned matrices take in it: on disk if packed, else in memory; None if it cannot be had here.
        speed_up: Of the forward pass, against dense; None where nothing was timed.
        meaning: The same in words.
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
    """Measure in which form a pruned model is smaller, and in which it is faster, on the device it is on.

    A model whose neurons or heads were cut out is narrower by itself, so that is no form of its own.

    Args:
        model: A pruned model that runs on ids; it is left as it is.
        batch: Sequences of a timed pass.
        seq: Tokens of each of them.
        rounds: Timed passes of every form, in turns.
        max_kept: As for `to_sparse_linears`.
        seed: Of the timed ids and the intervals.

    Returns:
        Dense, packed, csr and 2:4, in this order.

    Raises:
        ValueError: If the model does not run on ids, or if a number does not fit it.
    """
    inputs = _draw_inputs(model, batch, seq, seed)
    pruned = [weight for weight in model.parameters() if weight.dim() > 1 and packed_bytes(weight) < weight.nbytes]
    dense = sum(weight.nbytes for weight in pruned)
    packed = sum(packed_bytes(weight) for weight in pruned)
    shadows, shares, refusals = {"dense": _shadow(model)}, {}, {}
    for layout in LAYOUTS:
        try:
            shares[layout] = find_sparse_linears(model, layout, max_kept=max_kept)
        except ValueError as error:
            refusals[layout] = str(error)
        else:
            shadows[layout] = _shadow(model)
            to_sparse_linears(shadows[layout], layout, max_kept=max_kept)
    passes = {form: _forward_pass(shadow, inputs) for form, shadow in shadows.items()}
    speed_ups = compare_latency(passes, baseline="dense", rounds=rounds, seed=seed)
    forms = [
        SparseForm("dense", dense, None, "as `from_pretrained` gives it"),
        SparseForm("packed", packed, None, _say_size(packed, dense)),
    ]
    for layout in LAYOUTS:
        if layout in refusals:
            forms.append(SparseForm(layout, None, None, refusals[layout]))
        else:
            saved = _count_saved(model, shares[layout], layout)
            meaning = _say_speed(speed_ups[layout], model, shares[layout])
            forms.append(SparseForm(layout, dense - saved, speed_ups[layout], meaning))
    return forms


def _draw_inputs(model: PreTrainedModel, batch: int, seq: int, seed: int) -> dict[str, Tensor]:
    positions = getattr(model.config, "max_position_embeddings", None) or seq
    if batch < 1 or not 1 <= seq <= positions:
        raise ValueError(
            f"`batch` and `seq` must be at least 1 and `seq` at most {positions}, got {batch} and {seq}. Use those "
            "of a usual input."
        )
    if model.main_input_name != "input_ids":
        raise ValueError(f"`model` must run on `input_ids`, got {type(model).__name__} on {model.main_input_name!r}.")
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, seq), generator=torch.Generator().manual_seed(seed))  # (batch, seq)
    names = ["input_ids", "decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids"]
    return dict.fromkeys(names, ids.to(model.device))


def _shadow(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model but not its weights: what becomes of the copy does not touch the model."""
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
    """Count the bytes that the replaced layers take less than dense ones; negative if they take more."""
    saved = 0
    for name, share in shares.items():
        weight = model.get_parameter(f"{name}.weight")
        if layout == "csr":
            kept, index = round(share * weight.numel()), torch.int32.itemsize
            saved += weight.nbytes - kept * (weight.element_size() + index) - (len(weight) + 1) * index
        else:  # half the values, and two bits for the place of each
            saved += weight.nbytes - weight.nbytes // 2 - weight.numel() // 8
    return saved


def _say_size(packed: int, dense: int) -> str:
    if not dense:
        return "nothing to gain: no matrix has zeros enough"
    return f"file {packed / dense:.0%} of dense; same speed, because it is dense in memory"


def _say_speed(speed_up: SpeedUp, model: nn.Module, shares: Mapping[str, float]) -> str:
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
