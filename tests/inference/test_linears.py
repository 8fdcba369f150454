"""Linear layers for inference: against torch's own product, and against exact integers."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_moebert.inference import linears
from hf_moebert.inference.linears import (
    ONE_SIDED,
    SYMMETRIC,
    check_precision,
    make_linear,
    quantize,
    unsupported_reason,
)


needs_int8 = pytest.mark.skipif(
    unsupported_reason("int8", True) is not None, reason="the processor lacks int8 products"
)
needs_bfloat16 = pytest.mark.skipif(
    unsupported_reason("bfloat16", True) is not None, reason="the processor lacks bfloat16"
)
needs_packing = pytest.mark.skipif(
    unsupported_reason("float32", True) is not None, reason="torch lacks oneDNN's operator"
)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(48, 40).requires_grad_(False)


def apply(linear, x):
    return linear(linear.prepare(x))


@needs_packing
@pytest.mark.parametrize("name", [None, "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48)])
def test_a_packed_layer_is_the_layer(layer, name, shape):
    act = None if name is None else ACT2FN[name]
    x = torch.randn(shape)
    linear = make_linear(layer.weight, layer.bias, act, precision="float32", packed=True)
    expected = layer(x) if act is None else act(layer(x))
    torch.testing.assert_close(apply(linear, x), expected, atol=1e-5, rtol=1e-5)
    assert (linear.activation is None) == (name != "silu")  # what oneDNN knows is fused


@pytest.mark.parametrize("packed", [pytest.param(True, marks=needs_packing), False])
def test_a_layer_without_bias_and_with_strides(packed):
    weight, bias = torch.randn(48, 40).T, torch.randn(40, 2)[:, 0]  # oneDNN's operator would ignore the strides
    x = torch.randn(9, 48)
    for b in (None, bias):
        linear = make_linear(weight, b, precision="float32", packed=packed)
        torch.testing.assert_close(apply(linear, x), F.linear(x, weight, b), atol=1e-5, rtol=1e-5)


@needs_bfloat16
@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_is_torchs_bfloat16(layer, packed):
    x = torch.randn(7, 48)
    linear = make_linear(layer.weight, layer.bias, ACT2FN["gelu"], precision="bfloat16", packed=packed)
    expected = F.gelu(F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))
    assert apply(linear, x).dtype == torch.bfloat16
    torch.testing.assert_close(apply(linear, x), expected, atol=0.02, rtol=0.02)


def dequantize(q, grid=SYMMETRIC):
    return (q.values.double() - grid.zero_point) * q.largest.double() / grid.steps.double()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_activations_are_rounded_to_the_nearest_step(values):
    x = torch.tensor(values).view(1, -1)
    q = quantize(x)
    assert q.values.dtype == torch.uint8
    assert (dequantize(q) - x.double()).abs().max() <= q.largest / 127 * 0.501 + 1e-12
    assert (q.values[x == 0] == 128).all()  # zero has a step of its own


@needs_int8
def test_what_is_not_finite_is_not_hidden(layer):
    linear = make_linear(layer.weight, layer.bias, precision="int8", packed=True)
    for value in (float("nan"), float("inf")):
        x = torch.randn(3, 48)
        x[1, 2] = value
        assert not apply(linear, x)[1].isfinite().any()
        assert apply(linear, x)[[0, 2]].isfinite().all()
    assert apply(linear, torch.full((3, 48), 1e-42)).isfinite().all()


def test_a_precision_that_must_work_is_refused_where_it_does_not(monkeypatch):
    monkeypatch.setattr(linears, "unsupported_reason", lambda precision, packed: "no VNNI")
    with pytest.raises(ValueError, match="`precision` must work on this machine, 'int8' does not: no VNNI"):
        check_precision("int8")


@needs_int8
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_a_layer_behind_an_activation_has_a_finer_grid(layer, name):
    x = ACT2FN[name](torch.linspace(-8, 8, 48 * 9).view(9, 48)[:, torch.randperm(48)])  # from all negative on
    linear = make_linear(layer.weight, layer.bias, follows=ACT2FN[name], precision="int8", packed=True)
    q = linear.prepare(x)
    assert linear.grid is ONE_SIDED
    assert ((dequantize(q, ONE_SIDED) - x).abs() <= q.largest / 223 * 0.501).all()
    torch.testing.assert_close(linear(q), layer(x), atol=0.05, rtol=0.05)
    assert make_linear(layer.weight, None, follows=ACT2FN["silu"], precision="int8", packed=True).grid is SYMMETRIC


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.full((2, 3), 5.0), torch.full((2, 3), -5.0)])
def test_constant_activations_keep_their_value(x):
    torch.testing.assert_close(dequantize(quantize(x)).float(), x, atol=1e-6, rtol=0)


@needs_int8
@pytest.mark.parametrize("name", [None, "gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("width", [48, 37])
def test_an_int8_row_is_the_same_to_the_last_bit_whatever_its_neighbours(name, width, monkeypatch):
    torch.manual_seed(0)
    for name_of_size in ("CACHED", "BLOCK"):
        monkeypatch.setattr(linears, name_of_size, 2000)  # so that most are split, into blocks of some forty rows
    weight, x = torch.randn(width, 48), torch.randn(150, 48)
    x[::7] *= 1000
    linear = make_linear(weight, weight[:, 0], None if name is None else ACT2FN[name], precision="int8", packed=True)
    together = apply(linear, x)
    for rows in (slice(3, 4), slice(10, 47), slice(60, 131)):
        alone = apply(linear, x[rows])
        assert torch.equal(alone, together[rows]) or name in ("gelu_new", "silu")  # which torch rounds by place
        torch.testing.assert_close(alone, together[rows], atol=1e-6, rtol=1e-6)
        assert torch.equal(linear(linear.prepare(x).narrow(0, rows.start, len(alone))), alone)
    shaped = apply(linear, x.view(3, 50, 48))
    assert torch.equal(shaped.flatten(0, 1), together)


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_the_exact_product_of_the_rounded_values(layer, bias):
    x, weight = torch.randn(5, 48), layer.weight.clone()
    weight[3] = 0  # a dead output has no scale of its own
    linear = make_linear(weight, layer.bias if bias else None, precision="int8", packed=True)
    q = linear.prepare(x)
    scale = 127 * linear.scale.unsqueeze(1)
    expected = F.linear(dequantize(q).float(), (weight / scale).round() * scale, layer.bias if bias else None)
    torch.testing.assert_close(linear(q), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear(q), F.linear(x, weight, layer.bias if bias else None), atol=0.05, rtol=0.05)


@needs_int8
def test_int8_fuses_the_activation(layer):
    x = torch.randn(5, 48)
    plain = make_linear(layer.weight, layer.bias, precision="int8", packed=True)
    fused = make_linear(layer.weight, layer.bias, ACT2FN["gelu"], precision="int8", packed=True)
    torch.testing.assert_close(apply(fused, x), F.gelu(apply(plain, x)), atol=1e-5, rtol=1e-5)


def test_a_form_shares_no_gradient_with_the_weights():
    layer = nn.Linear(8, 8)
    linear = make_linear(layer.weight, layer.bias, precision="float32", packed=False)
    assert not apply(linear, torch.randn(2, 8)).requires_grad


def test_plain_float32_is_always_possible():
    assert unsupported_reason("float32", False) is None


def test_a_processor_that_would_emulate_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    assert "avx512_vnni" in unsupported_reason.__wrapped__("int8", True)
    assert "avx512_bf16" in unsupported_reason.__wrapped__("bfloat16", False)
    assert unsupported_reason.__wrapped__("float32", False) is None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_an_operator_that_torch_lacks_is_refused(monkeypatch, error):
    def lacking(*args):
        raise error("no such operator\nand a long story")

    monkeypatch.setattr(linears, "PackedLinear", lacking)
    reason = unsupported_reason.__wrapped__("float32", True)
    assert "lacks the operator (no such operator)" in reason
    assert "story" not in reason


def test_an_operator_that_is_wrong_here_is_refused(monkeypatch):
    monkeypatch.setattr(linears.PackedLinear, "__call__", lambda self, x: x.new_zeros(len(x), 48))
    assert "wrong numbers" in unsupported_reason.__wrapped__("float32", True)
