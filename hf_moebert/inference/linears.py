"""Linear layers for inference: packed for oneDNN, in float32, bfloat16 or int8.

Each is built once from a weight and a bias, and changes neither. Layers of one class that read the same input share
its preparation: `linear(linear.prepare(x))`, where a prepared input can be narrowed to some of its rows (`narrow`).

oneDNN's operators are not part of torch's public interface. So each is tried on small tensors before it is used
(`unsupported_reason`), and never relied on.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS = ("float32", "bfloat16", "int8")
Activation = Callable[[Tensor], Tensor]

# Any of these is needed, by the names of `torch.cpu.get_capabilities`: emulation would take longer than float32
REQUIRED_CAPABILITIES = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8"},
}
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# Activations that oneDNN fuses into the product: operation and algorithm, by the class that transformers has for them
FUSIBLE = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", "none"),
}


class Quantized(NamedTuple):
    """Activations in uint8 that stand for `scale * (values - zero_point)`.

    Attributes:
        values: Shape `(..., in)`.
        scale: Step of the grid.
        zero_point: Place of zero on the grid.
    """

    values: Tensor
    scale: float
    zero_point: int

    def narrow(self, dim: int, start: int, length: int) -> "Quantized":
        """Take consecutive rows as `Tensor.narrow` does; they stay on the grid of all rows."""
        return self._replace(values=self.values.narrow(dim, start, length))


def quantize(x: Tensor) -> Quantized:
    """Quantise activations to a grid of 255 steps that spans all of them and contains zero."""
    low, high = (float(bound) for bound in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    if not math.isfinite(high - low):  # the product is then NaN everywhere, as it would be without quantisation
        return Quantized(torch.zeros_like(x, dtype=torch.uint8), math.nan, 0)
    # 254 steps: zero is rounded to the grid, by which either end moves half a step
    scale = max((high - low) / 254, SMALLEST_NORMAL)
    zero_point = round(-low / scale)
    steps = torch.add(torch.tensor(zero_point - 128.0), x, alpha=1 / scale).round_()
    # To int8, and a flip of the sign bit: several times faster than torch's way from floats to uint8
    values = steps.to(torch.int8).view(torch.uint8).bitwise_xor_(128)
    return Quantized(values, scale, zero_point)


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
    """A linear layer in int8: weights with one scale per output, activations quantised dynamically."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        self.scale = (weight.abs().amax(dim=1) / 127).clamp(min=SMALLEST_NORMAL)  # (out,)
        self.zero_point = torch.zeros(len(weight), dtype=torch.long)  # (out,)
        values = (weight / self.scale.unsqueeze(1)).round().to(torch.int8)  # (out, in)
        self.weight = torch.ops.onednn.qlinear_prepack(values, [32, weight.shape[1]])  # tokens of a short text
        self.bias = bias
        self.fused, self.algorithm, self.activation = fuse_activation(activation)

    def prepare(self, x: Tensor) -> Quantized:
        """Quantise all rows to one grid."""
        return quantize(x)

    def __call__(self, prepared: Quantized) -> Tensor:
        """Map, to float32."""
        y = torch.ops.onednn.qlinear_pointwise(
            *prepared, self.weight, self.scale, self.zero_point, self.bias, 1.0, 0, torch.float32, self.fused, [],
            self.algorithm,
        )  # fmt: skip
        return y if self.activation is None else self.activation(y)


def fuse_activation(activation: Activation | None) -> tuple[str, str, Activation | None]:
    """Return the operation and algorithm that oneDNN fuses into a product, and the activation left to apply."""
    if activation is None or type(activation).__name__ not in FUSIBLE:
        return "none", "none", activation
    return *FUSIBLE[type(activation).__name__], None


def make_linear(
    weight: Tensor, bias: Tensor | None, activation: Activation | None = None, *, precision: Precision, packed: bool
) -> InferenceLinear:
    """Build a linear layer for inference.

    Args:
        weight: Shape `(out, in)`.
        bias: Shape `(out,)`.
        activation: Applied to the product, fused where oneDNN can.
        precision: Precision of the product.
        packed: Whether oneDNN computes it.
    """
    weight = weight.detach().contiguous()  # oneDNN ignores strides
    bias = None if bias is None else bias.detach().contiguous()
    if precision == "int8":
        return Int8Linear(weight, bias, activation)
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
