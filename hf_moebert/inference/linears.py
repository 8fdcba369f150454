"""Linear layers for inference: packed for oneDNN, in float32, bfloat16 or int8.

Each is built once from a weight and a bias, and changes neither. Layers of one class that read the same input share
its preparation: `linear(linear.prepare(x))`, where a prepared input can be narrowed to some of its rows (`narrow`).

oneDNN's operators are not part of torch's public interface. So each is tried on small tensors before it is used
(`unsupported_reason`), and never relied on.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
Activation = Callable[[Tensor], Tensor]

# Any of these is needed, by the names of `torch.cpu.get_capabilities`: emulation would take longer than float32
REQUIRED_CAPABILITIES = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8"},
}
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
CACHED = 1 << 19  # values in float32 that one pass takes, while those of another are still in a core's cache of 2 MB
BLOCK = 1 << 17  # of more values: so many at a time, which the next pass finds in the cache
ROUNDING = 1.5 * 2.0**23  # added to a float32, it leaves a whole number in the lowest bits
# Activations that oneDNN fuses into the product: operation and algorithm, by the class that transformers has for them
FUSIBLE = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", "none"),
}


class Grid(NamedTuple):
    """A grid of uint8 for the values of a row.

    Attributes:
        steps: Steps above zero, of which the row's largest value is the last.
        zero_point: Steps below zero.
        smallest: What stands for the largest value of a row if that is less.
    """

    steps: Tensor
    zero_point: int
    smallest: float


SYMMETRIC = Grid(torch.tensor(127.0, device="cpu"), 128, SMALLEST_NORMAL * 256)
# Behind an activation that is never less than -0.171, as GELU and ReLU are, 32 steps below zero are enough: ours
ONE_SIDED = Grid(torch.tensor(223.0, device="cpu"), 32, 0.171 * 223 / 32)


class Quantized(NamedTuple):
    """Activations in uint8, each row on a scale of its own: `largest / steps * (values - zero_point)`, by its grid.

    Attributes:
        values: Shape `(..., in)`.
        largest: Value of the last step of each row. Shape `(..., 1)`.
    """

    values: Tensor
    largest: Tensor

    def narrow(self, dim: int, start: int, length: int) -> "Quantized":
        """Take consecutive rows as `Tensor.narrow` does."""
        return Quantized(self.values.narrow(dim, start, length), self.largest.narrow(dim, start, length))


def quantize(x: Tensor, grid: Grid = SYMMETRIC) -> Quantized:
    """Round each row to the grid that its own largest value spans.

    A row's values do not depend on the other rows. A row that is not finite keeps that in `largest`.
    """
    x = x.contiguous()  # oneDNN ignores strides
    if x.numel() <= CACHED:
        return Quantized(*quantize_block(x, grid))
    blocks = [quantize_block(block, grid) for block in split_rows(x)]
    values, largest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Quantized(values.view(x.shape), largest.view(*x.shape[:-1], 1))


def quantize_block(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Quantise rows that stay in the cache; return values and the largest of each row."""
    sized = x.abs() if grid is SYMMETRIC else x
    largest = sized.amax(dim=-1, keepdim=True).clamp_min_(grid.smallest)
    steps = torch.mul(x, torch.div(grid.steps, largest)).add_(ROUNDING + grid.zero_point)
    # The lowest byte of each sum is its step: faster than torch's rounding, and its way from floats to uint8
    return steps.view(torch.int32).to(torch.int8).view(torch.uint8), largest


def split_rows(x: Tensor) -> tuple[Tensor, ...]:
    """Split into parts of about as many rows, each of which stays in the cache, `(..., n)` to several `(rows, n)`."""
    rows = x.view(-1, x.shape[-1])
    parts = -(-rows.numel() // BLOCK)
    return rows.split(max(-(-len(rows) // parts), 1))


class InferenceLinear(Protocol):
    """A linear layer and the activation after it, ready for inference."""

    def prepare(self, x: Tensor) -> Any:
        """Convert an input, `(..., in)`, as all layers of this class do."""

    def __call__(self, prepared: Any) -> Tensor:
        """Map a prepared input, `(..., in)` to `(..., out)`."""


class PlainLinear:
    """A linear layer computed by torch's own product, in float32 or bfloat16, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.activation = activation

    def prepare(self, x: Tensor) -> Tensor:
        """Round to the weights' dtype."""
        return x.to(self.weight.dtype)

    def __call__(self, prepared: Tensor) -> Tensor:
        """Map, in the weights' dtype."""
        y = F.linear(prepared, self.weight, self.bias)
        return y if self.activation is None else self.activation(y)


class PackedLinear:
    """A linear layer computed by oneDNN: the weight in its memory layout, the activation fused where it can be."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None, dtype: torch.dtype) -> None:
        self.dtype, self.bias = dtype, None if bias is None else bias.to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
        self.fused, self.algorithm, self.activation = fuse_activation(activation)

    def prepare(self, x: Tensor) -> Tensor:
        """Round to the weights' dtype."""
        return x.to(self.dtype)

    def __call__(self, prepared: Tensor) -> Tensor:
        """Map, in the weights' dtype."""
        y = torch.ops.mkldnn._linear_pointwise(prepared, self.weight, self.bias, self.fused, [], self.algorithm)
        return y if self.activation is None else self.activation(y)


class Int8Linear:
    """A linear layer in int8: weights with one scale per output, activations quantised dynamically, one scale per row.

    The scale of a row stands outside of the product, which is exact in integers: so a row's result is the same to the
    last bit, whatever rows are multiplied with it. oneDNN knows no scale by row, and computes on one grid for all; row
    scale, bias and activation follow, block by block of rows in the cache. That order is ours.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None, grid: Grid, factors: Tensor | None
    ) -> None:
        self.grid, self.factors = grid, factors
        if factors is not None:
            weight = weight / factors
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=SMALLEST_NORMAL)  # (out,)
        self.scale = scale / grid.steps  # for activations that are divided by their row's largest
        self.zero_point = torch.zeros(len(weight), dtype=torch.long)  # (out,)
        values = (weight / scale.unsqueeze(1)).round().to(torch.int8)  # (out, in)
        self.weight = torch.ops.onednn.qlinear_prepack(values, [32, weight.shape[1]])  # tokens of a short text
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.multiply = torch.ops.onednn.qlinear_pointwise.default
        self.activate_ = in_place(activation)

    def prepare(self, x: Tensor) -> Quantized:
        """Quantise each row on its own scale; layers with the same factors, behind the same activation, share this."""
        return quantize(x if self.factors is None else x * self.factors, self.grid)

    def __call__(self, prepared: Quantized) -> Tensor:
        """Map, to float32."""
        y = self.multiply(
            prepared.values, 1.0, self.grid.zero_point, self.weight, self.scale, self.zero_point, None, 1.0, 0,
            torch.float32, "none", [], "none",
        )  # fmt: skip
        if y.numel() <= CACHED:
            self.finish_(y, prepared.largest)
            return y
        blocks = split_rows(y)
        for block, largest in zip(blocks, prepared.largest.view(-1, 1).split(len(blocks[0])), strict=True):
            self.finish_(block, largest)
        return y

    def finish_(self, y: Tensor, largest: Tensor) -> None:
        """Scale the rows of a product, and apply bias and activation, in place."""
        torch.addcmul(self.bias, y, largest, out=y)
        if self.activate_ is not None:
            self.activate_(y)


def in_place(activation: Activation | None) -> Callable[[Tensor], object] | None:
    """Return what applies an activation to a tensor in place."""
    operation, algorithm, _ = fuse_activation(activation)
    if operation == "gelu":
        return partial(torch.ops.aten.gelu_.default, approximate=algorithm)
    if operation == "relu":
        return torch.relu_
    return None if activation is None else (lambda x: x.copy_(activation(x)))


def fuse_activation(activation: Activation | None) -> tuple[str, str, Activation | None]:
    """Return the operation and algorithm that oneDNN fuses into a product, and the activation left to apply."""
    if activation is None or type(activation).__name__ not in FUSIBLE:
        return "none", "none", activation
    return *FUSIBLE[type(activation).__name__], None


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None = None,
    *,
    follows: Activation | None = None,
    factors: Tensor | None = None,
    precision: Precision,
    packed: bool,
) -> InferenceLinear:
    """Build a linear layer for inference.

    Args:
        weight: Shape `(out, in)`.
        bias: Shape `(out,)`.
        activation: Applied to the product, fused where oneDNN can.
        follows: The activation whose outputs the layer reads, if it is known, for a finer grid in int8.
        factors: What int8 multiplies inputs by and divides the columns of the weight by. Shape `(in,)`.
        precision: Precision of the product.
        packed: Whether oneDNN computes it.
    """
    weight = weight.detach().contiguous()  # oneDNN ignores strides
    bias = None if bias is None else bias.detach().contiguous()
    if precision == "int8":
        grid = ONE_SIDED if type(follows).__name__ in FUSIBLE else SYMMETRIC
        return Int8Linear(weight, bias, activation, grid, factors)
    linear = PackedLinear if packed else PlainLinear
    return linear(weight, bias, activation, getattr(torch, precision))


@cache
def unsupported_reason(precision: Precision, packed: bool) -> str | None:
    """Return why this processor and this torch cannot compute in a precision, or None where they can."""
    needs = REQUIRED_CAPABILITIES.get(precision, set())
    available = {name for name, present in torch.cpu.get_capabilities().items() if present is True}
    if needs and not needs & available:
        return f"the processor has none of {sorted(needs)}"
    weight = torch.linspace(-1, 1, 64 * 48).view(48, 64).roll(7, dims=0)  # (out, in)
    x = torch.cat([torch.ones(1, 64), torch.linspace(-1, 1, 7 * 64).view(7, 64).flip(0)])  # (tokens, in)
    try:
        linear = make_linear(weight, weight[:, 0], precision=precision, packed=packed)
        found = linear(linear.prepare(x)).float()
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} lacks the operator ({str(error).splitlines()[0]})"
    expected = F.linear(x, weight, weight[:, 0])
    allowed = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.02}[precision] * expected.abs().max()
    return None if (found - expected).abs().max() <= allowed else "the operator gives wrong numbers here"


def check_precision(precision: Precision) -> None:
    """Refuse a precision that this machine cannot compute in, where no other may take its place.

    Raises:
        ValueError: If it does not exist or does not work here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}, got {precision!r}.")
    if reason := unsupported_reason(precision, True):
        raise ValueError(f"`precision` must work on this machine, {precision!r} does not: {reason}. Leave it out.")
