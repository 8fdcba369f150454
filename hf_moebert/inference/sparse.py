"""Sparse linear layers for the inference of pruned models."""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


Layout = Literal["csr", "2:4"]
LAYOUTS: tuple[Layout, ...] = ("csr", "2:4")


class CsrLinear(nn.Module):
    """A linear layer with its weight in compressed sparse rows: fast where most of it is zero, forward only.

    Args:
        dense: The layer to replace, in float32 or float64 on the CPU. Its bias is shared.
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
        """Return the sizes, as the dense layer does."""
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
    """Replace the pruned linear layers of a model by sparse ones, in place, for inference.

    The model is frozen and can no longer be saved: save it before, dense or packed. Only `nn.Linear` is replaced; a
    layer that keeps a larger share of its weights than `max_kept` stays dense.

    Args:
        model: A pruned model, dense in memory.
        layout: "csr" for any pattern of zeros, in float32 or float64 on the CPU; "2:4" for at most two weights kept
            in every four of a row, in float16 or bfloat16 on a CUDA device.
        max_kept: Largest share of nonzero weights in a layer that is replaced, in (0, 1]. Which share pays depends on
            the machine and the number of tokens: `compare_sparse_forms` measures it.

    Returns:
        The share of nonzero weights of every layer that was replaced, by name.

    Raises:
        ValueError: If no layer is sparse enough, or one of these does not fit the layout; then nothing is replaced.
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
    """Find the layers that `to_sparse_linears` would replace; arguments, result and refusals are the same."""
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
    if rows % 32 or columns % 64:  # asked for by the strictest of torch's kernels
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
