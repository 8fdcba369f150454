"""Layers whose matrix is a chain of cores: the dense layer's values, by whatever way is cheapest, and never stale."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_moebert.methods.mpo import modeling_mpo
from hf_moebert.methods.mpo.functional import contract
from hf_moebert.methods.mpo.modeling_mpo import (
    MPOConv1D,
    MPOLinear,
    decompose_layer,
    make_layer,
    restore_layer,
    tie_layer,
)


def linear(rows=30, columns=50, **options):
    torch.manual_seed(0)
    return nn.Linear(columns, rows, **options)


def conv(rows=50, columns=30):
    torch.manual_seed(0)
    layer = Conv1D(columns, rows)
    nn.init.normal_(layer.bias)
    return layer


def batch(width=50, tokens=5, **options):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("gauge", ["symmetric", "left", "centre"])
@pytest.mark.parametrize("num_cores", [3, 5, 7, 9])
@pytest.mark.parametrize("dense", [linear(), linear(67, 50), linear(bias=False), conv()])
def test_with_full_bonds_a_layer_is_the_dense_one(dense, num_cores, gauge):
    layer = decompose_layer(dense, num_cores=num_cores, gauge=gauge)
    torch.testing.assert_close(layer.weight, dense.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(batch()), dense(batch()), atol=1e-5, rtol=1e-5)
    assert isinstance(layer, MPOConv1D if isinstance(dense, Conv1D) else MPOLinear)


@pytest.mark.parametrize("learns", [True, False])
def test_with_full_bonds_a_table_is_the_dense_one(learns):
    dense = nn.Embedding(60, 12, padding_idx=0)
    layer = decompose_layer(dense).train(learns)
    ids = torch.tensor([[0, 59, 3], [3, 3, 17]])
    with torch.set_grad_enabled(learns):
        torch.testing.assert_close(layer(ids), dense(ids), atol=1e-6, rtol=1e-5)


def test_rows_or_the_whole_table_whatever_is_cheaper(monkeypatch):
    """A few ids rebuild their rows only, and the gradients are the same."""
    table = decompose_layer(nn.Embedding(600, 48))
    calls = []
    gather = modeling_mpo.gather_rows
    monkeypatch.setattr(modeling_mpo, "gather_rows", lambda *a, **k: calls.append(1) or gather(*a, **k))
    few, many = torch.tensor([1, 7, 7, 599]), torch.arange(600)
    table(few).sum().backward()
    assert calls == [1]
    few_gradients = [core.grad.clone() for core in table.cores]
    table.zero_grad()
    nn.functional.embedding(few, table.weight).sum().backward()
    for core, expected in zip(table.cores, few_gradients, strict=True):
        torch.testing.assert_close(core.grad, expected, atol=1e-5, rtol=1e-4)
    table(many)
    assert calls == [1]


def test_bonds_of_few_directions_pass_the_chain_and_give_the_same():
    for dense in (linear(768, 3072), conv(3072, 768)):
        layer = decompose_layer(dense, bonds=[2, 2, 2, 2]).eval()
        x = batch(3072, 3)
        with torch.no_grad():
            expected = layer(batch(3072, 100))  # too many tokens for the chain
            assert layer._links.value is None
            assert layer._matrix.value is not None
            through_chain = layer(batch(3072, 100)[:3])
            assert layer._links.value is not None
        torch.testing.assert_close(through_chain, expected[:3], atol=1e-5, rtol=1e-4)
        matrix = layer.weight if isinstance(layer, MPOConv1D) else layer.weight.T
        torch.testing.assert_close(layer(x), x @ matrix + layer.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dense", "bond"), [(linear(768, 3072), None), (linear(64, 64), 2)])
def test_full_bonds_and_small_matrices_never_pass_the_chain(dense, bond):
    layer = decompose_layer(dense, bonds=bond and [bond] * 4).eval()
    with torch.no_grad():
        layer(batch(dense.in_features, 1))
    assert layer._links.value is None


def kept(layer):
    with torch.no_grad():
        return layer(batch())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.cores[1].data.mul_(2),
        lambda layer: torch.no_grad()(layer.cores[3].mul_)(2),
        lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
        lambda layer: layer.set_cores([core * 1.5 for core in layer.chain()]),
        lambda layer: setattr(layer.cores[2], "data", layer.cores[2] * 2),
        lambda layer: layer.train().cores[0].data.zero_() or layer.eval(),
        lambda layer: torch.optim.SGD(layer.parameters(), lr=1.0).step(
            lambda: layer(batch()).square().sum().backward() or 0.0
        ),
    ],
)
def test_what_is_kept_follows_every_change(change):
    layer = decompose_layer(linear()).eval()
    kept(layer)
    change(layer)
    matrix = contract(layer.chain(), layer.rows, layer.columns).detach()
    torch.testing.assert_close(kept(layer), batch() @ matrix.T + layer.bias, atol=1e-5, rtol=1e-4)


def test_the_matrix_is_kept_in_evaluation_only():
    layer = decompose_layer(linear()).eval()
    with torch.no_grad():
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight  # gradients are wanted
    assert layer.train()._matrix.value is None
    for core in layer.cores:
        core.requires_grad_(False)
    assert layer.weight is layer.weight  # nothing learns


def test_inference_mode_leaves_nothing_that_gradients_cannot_pass():
    layer = decompose_layer(linear()).requires_grad_(False).eval()
    with torch.inference_mode():
        layer(batch())
    x = batch().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], linear().weight.sum(0), atol=1e-5, rtol=1e-5)


def test_copies_keep_nothing():
    layer = decompose_layer(linear()).eval()
    expected = kept(layer)
    twin = copy.deepcopy(layer)
    assert twin._matrix.value is None
    torch.testing.assert_close(kept(twin), expected, rtol=0, atol=0)


def test_gradients_equal_those_through_the_dense_matrix():
    torch.manual_seed(0)
    layer = decompose_layer(nn.Linear(8, 6).double(), num_cores=3)
    x = batch(8, dtype=torch.float64)
    layer(x).square().sum().backward()
    dense = restore_layer(layer, nn.Parameter(layer.weight.detach().clone()))
    dense(x).square().sum().backward()
    surrogate = (contract(layer.chain()) * dense.weight.grad).sum()
    for core, gradient in zip(layer.cores, torch.autograd.grad(surrogate, list(layer.cores)), strict=True):
        torch.testing.assert_close(core.grad, gradient)
    assert torch.autograd.gradcheck(lambda *cores: contract(cores), [c.detach().requires_grad_() for c in layer.cores])


def test_autocast_rebuilds_in_the_precision_of_the_cores():
    layer = decompose_layer(linear()).train()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.weight, linear().weight, atol=1e-6, rtol=1e-5)
        assert layer(batch()).dtype == torch.bfloat16


@pytest.mark.process
@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_break_it_gives_the_same(training):
    layer = decompose_layer(linear()).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch()), layer(batch()), atol=1e-6, rtol=1e-5)


def test_a_tied_layer_shares_the_matrix_and_has_no_cores():
    table = decompose_layer(nn.Embedding(60, 12))
    head, second = tie_layer(nn.Linear(12, 60, bias=True), table), tie_layer(nn.Embedding(60, 12), table)
    x, ids = batch(12), torch.tensor([3, 4])
    torch.testing.assert_close(head(x), x @ table.weight.T + head.bias)
    torch.testing.assert_close(second(ids), table.weight[ids])
    assert [name for name, _ in head.named_parameters()] == ["bias"]
    assert not list(second.parameters())
    assert copy.deepcopy(nn.ModuleList([table, head]))[1]._source[0] is not table


def test_a_checkpoint_of_other_bonds_is_taken_over():
    layer, squeezed = decompose_layer(linear(), num_cores=3), decompose_layer(linear(), num_cores=3, bonds=[2, 3])
    layer.load_state_dict(squeezed.state_dict())
    assert layer.bonds == squeezed.bonds
    torch.testing.assert_close(layer.weight, squeezed.weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"row_factors": [2, 2, 2], "column_factors": [5, 5, 2], "bonds": [4, 4]}, "must multiply to 30 or more"),
        ({"row_factors": [5, 3, 2], "column_factors": [5, 5, 2], "bonds": [4]}, "must name 2 sizes"),
        ({"row_factors": [5, 3, 2], "column_factors": [5, 5, 2], "bonds": [4, 0]}, "must be from 1 to 4, got 0"),
        ({"row_factors": [5, 3, 2], "column_factors": [5, 5, 2], "bonds": [4, 5]}, "must be from 1 to 4, got 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_layer(linear(), **shape)
