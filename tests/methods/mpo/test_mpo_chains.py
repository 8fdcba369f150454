"""The algebra of chains: every way to multiply agrees with the definition, entry by entry; trained chains are cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hf_moebert.methods.mpo.functional import contract, contract_activation, gather_rows, merge
from hf_moebert.methods.mpo.functional_bonds import error_bound
from hf_moebert.methods.mpo.functional_decomposition import GAUGES, decompose, project_centre, round_cores
from hf_moebert.methods.mpo.functional_shapes import full_bonds


ROWS, COLUMNS, BONDS = (2, 3, 2, 1, 2), (3, 1, 2, 2, 2), (4, 5, 6, 3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entry_by_entry(cores):
    """The definition: the product of the slices at the digits of a row and of a column."""
    rows, columns = ([core.shape[side] for core in cores] for side in (1, 2))
    matrix = torch.empty(math.prod(rows), math.prod(columns), dtype=cores[0].dtype)
    for a in range(len(matrix)):
        for b in range(matrix.shape[1]):
            digits = zip(cores, np.unravel_index(a, rows), np.unravel_index(b, columns), strict=True)
            matrix[a, b] = torch.linalg.multi_dot([torch.eye(1).double(), *(core[:, i, j] for core, i, j in digits)])
    return matrix


def random_cores(rows, columns, bonds, *leading, seed=0):
    ends = (1, *bonds, 1)
    sizes = zip(ends, rows, columns, ends[1:], strict=False)
    return [normal(*leading, *size, seed=seed + k) for k, size in enumerate(sizes)]


@st.composite
def chains(draw):
    """Any bonds, also larger ones than the matrix needs."""
    count = draw(st.sampled_from([3, 5, 7]))
    most = 3 if count < 7 else 2
    rows, columns = (draw(st.lists(st.integers(1, most), min_size=count, max_size=count)) for _ in range(2))
    bonds = draw(st.lists(st.integers(1, 6), min_size=count - 1, max_size=count - 1))
    return random_cores(rows, columns, bonds, seed=draw(st.integers(0, 1000)))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@given(chains(), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_every_way_to_multiply_agrees_with_the_definition(cores, tokens):
    matrix = entry_by_entry(cores)
    close(contract(cores), matrix)
    close(merge(cores)[0, ..., 0], matrix)
    x = normal(2, tokens, matrix.shape[1])
    torch.testing.assert_close(contract_activation(x, cores), x @ matrix.T, rtol=1e-10, atol=1e-9)
    ids = torch.arange(len(matrix)).repeat(2)[: tokens + 1].flip(0)
    close(gather_rows(cores, ids), matrix[ids])


def test_padding_is_cut_off():
    cores = random_cores(ROWS, COLUMNS, BONDS)
    matrix = contract(cores)
    assert torch.equal(contract(cores, 20, 17), matrix[:20, :17])
    close(gather_rows(cores, torch.tensor([3, 0]), 17), matrix[[3, 0], :17])


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
def test_activations_pass_in_parts(tokens):
    """No token, the only token of a batch or of its last part, and more than a part."""
    cores = random_cores(ROWS, COLUMNS, BONDS)
    x = normal(tokens, 24)
    assert contract_activation(x, cores).shape == (tokens, 24)
    torch.testing.assert_close(contract_activation(x, cores), x @ contract(cores).T)


@pytest.mark.parametrize("bonds", [(4, 5, 6, 3), (2, 6, 2, 2), (2, 2, 6, 2)])  # either order of the two products
@pytest.mark.parametrize("stacked", ["sides", "centre", "all"])
def test_stacked_cores_are_broadcast(bonds, stacked):
    """Experts that share their central tensor are rebuilt at once."""
    several = random_cores(ROWS, COLUMNS, bonds, 2, 3)
    single = random_cores(ROWS, COLUMNS, bonds, seed=50)
    takes = {"sides": lambda k: k != 2, "centre": lambda k: k == 2, "all": lambda k: True}[stacked]
    cores = [more if takes(k) else one for k, (more, one) in enumerate(zip(several, single, strict=True))]
    whole = contract(cores, 23, 22)
    assert whole.shape == (2, 3, 23, 22)
    for a in range(2):
        for b in range(3):
            alone = [core[a, b] if takes(k) else core for k, core in enumerate(cores)]
            close(whole[a, b], contract(alone, 23, 22))


@pytest.mark.parametrize("bonds", [(2, 3, 3, 2), (3, 3, 2, 2)])
def test_gradients(bonds):
    cores = [core.requires_grad_() for core in random_cores((2, 1, 2, 2, 1), (1, 2, 2, 1, 2), bonds)]
    x, ids = normal(3, 8).requires_grad_(), torch.tensor([0, 7, 7])
    assert torch.autograd.gradcheck(lambda *cores: contract(cores, 7, 6), cores)
    assert torch.autograd.gradcheck(lambda x, *cores: contract_activation(x, cores), (x, *cores))
    assert torch.autograd.gradcheck(lambda *cores: gather_rows(cores, ids, 6), cores)


def test_gradients_are_those_of_the_dense_matrix():
    """The chain rule through the matrix, for a loss on activations."""
    cores = [core.requires_grad_() for core in random_cores(ROWS, COLUMNS, BONDS)]
    x, dense = normal(5, 24), contract(cores).detach().requires_grad_()
    (x @ dense.T).square().sum().backward()
    expected = torch.autograd.grad(contract(cores), cores, dense.grad)
    found = torch.autograd.grad(contract_activation(x, cores).square().sum(), cores)
    for pair in zip(found, expected, strict=True):
        close(*pair)


@given(chains(), st.data())
@settings(max_examples=40, deadline=None)
def test_rounding_is_as_good_as_decomposing_afresh(cores, data):
    """TT-rounding: the error is exactly what was left out."""
    matrix, gauge = contract(cores), data.draw(st.sampled_from(GAUGES))
    bonds = [data.draw(st.integers(1, core.shape[-1])) for core in cores[:-1]]
    rounded, values = round_cores(cores, bonds, gauge=gauge)
    kept = [core.shape[-1] for core in rounded[:-1]]
    error, slack = float((contract(rounded) - matrix).norm()), 1e-12 * float(matrix.norm())
    assert all(size <= bond for size, bond in zip(kept, bonds, strict=True))
    assert error == pytest.approx(error_bound(values, bonds), rel=1e-6, abs=slack)
    factors = [[core.shape[side] for core in cores] for side in (1, 2)]
    limits = [min(pair) for pair in zip(bonds, full_bonds(*factors), strict=True)]
    fresh, _ = decompose(matrix, *factors, bonds=limits, gauge=gauge)
    assert [core.shape for core in fresh] == [core.shape for core in rounded]
    assert error == pytest.approx(float((contract(fresh) - matrix).norm()), rel=1e-6, abs=slack)


@pytest.mark.parametrize("gauge", GAUGES)
def test_rounding_without_a_limit_renews_the_gauge(gauge):
    """A trained chain gets the cores of a decomposition of its matrix, up to signs; directions in vain are dropped."""
    cores = random_cores(ROWS, COLUMNS, (7, 9, 9, 5))  # more than its factors can have
    rounded, values = round_cores(cores, gauge=gauge)
    fresh, spectra = decompose(contract(cores), ROWS, COLUMNS, gauge=gauge)
    close(contract(rounded), contract(cores))
    for mine, theirs in zip(rounded, fresh, strict=True):
        close(mine.abs(), theirs.abs())
    for mine, theirs in zip(values, spectra, strict=True):
        close(mine[: len(theirs)], theirs[: len(mine)])


def test_rounding_leaves_its_input_and_its_dtype():
    cores = [core.float().requires_grad_() for core in random_cores(ROWS, COLUMNS, BONDS)]
    before = [core.detach().clone() for core in cores]
    rounded, _ = round_cores(cores, (2, 2, 2, 2))
    assert {core.dtype for core in rounded} == {torch.float32}
    assert all(torch.equal(core, old) for core, old in zip(cores, before, strict=True))
    with pytest.raises(ValueError, match="`cores` must hold finite values, got NaN or infinity"):
        round_cores([*cores[:-1], cores[-1] * math.nan])
    with pytest.raises(ValueError, match="`gauge` must be one of symmetric, left, centre, even, got 'center'"):
        round_cores(cores, gauge="center")
    with pytest.raises(ValueError, match="`bonds` must name 4 sizes, one between every two cores, got 3"):
        round_cores(cores, (2, 2, 2))
    with pytest.raises(ValueError, match=r"`bonds\[1\]` must be at least 1, got 0"):
        round_cores(cores, (2, 0, 2, 2))


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("bonds", [None, (6, 5, 4, 4)])  # the outer bonds are whole
@pytest.mark.parametrize("size", [(24, 24), (21, 20)])
def test_projection_finds_the_centre(gauge, bonds, size):
    """Of the decomposition; and with flipped signs of the auxiliary tensors the same matrix."""
    matrix = normal(*size)
    cores, _ = decompose(matrix, ROWS, COLUMNS, bonds=bonds, gauge=gauge)
    digits = (ROWS[2], COLUMNS[2])
    close(project_centre(matrix, cores[:2], cores[3:], digits), cores[2])
    flips = [normal(core.shape[-1], seed=k).sign() for k, core in enumerate(cores[:-1])]
    sides = [cores[0] * flips[0], flips[0][:, None, None, None] * cores[1] * flips[1]]
    sides += [flips[2][:, None, None, None] * cores[3] * flips[3], flips[3][:, None, None, None] * cores[4]]
    found = project_centre(matrix, sides[:2], sides[2:], digits)
    close(contract([*sides[:2], found, *sides[2:]]), contract(cores))
    close(found.abs(), cores[2].abs())


def test_projection_ignores_directions_without_weight():
    """Bonds padded with zeros, so that all layers of a model have the same, take nothing of the matrix."""
    matrix = normal(24, 3) @ normal(3, 24)
    cores, _ = decompose(matrix, ROWS, COLUMNS)
    ends = (1, *full_bonds(ROWS, COLUMNS), 1)
    padded = [
        torch.nn.functional.pad(core, (0, after - core.shape[-1], 0, 0, 0, 0, 0, before - len(core)))
        for core, before, after in zip(cores, ends, ends[1:], strict=False)
    ]
    found = project_centre(matrix, padded[:2], padded[3:], (ROWS[2], COLUMNS[2]))
    close(found, padded[2])
    close(contract([*padded[:2], found, *padded[3:]]), matrix)


def test_projection_is_the_closest():
    """No other central tensor comes closer: not that of `decompose`, and none between trained auxiliary tensors."""
    matrix = normal(24, 24)
    cores, _ = decompose(matrix, ROWS, COLUMNS, bonds=(3, 5, 4, 2))
    centre = project_centre(matrix, cores[:2], cores[3:], (ROWS[2], COLUMNS[2]))
    assert (contract([*cores[:2], centre, *cores[3:]]) - matrix).norm() < (contract(cores) - matrix).norm()
    cores = random_cores(ROWS, COLUMNS, BONDS)
    centre = project_centre(matrix, cores[:2], cores[3:], (ROWS[2], COLUMNS[2])).requires_grad_()
    (contract([*cores[:2], centre, *cores[3:]]) - matrix).square().sum().backward()
    assert float(centre.grad.abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"matrix": torch.ones(8)},
            r"`matrix` must be a floating point matrix .* of shape \(8,\)",
        ),
        ({"matrix": torch.ones(8, 8, dtype=torch.long)}, "`matrix` must be a floating point matrix .* torch.int64"),
        ({"matrix": torch.ones(0, 8)}, "that is not empty"),
        ({"matrix": torch.full((8, 8), math.nan)}, "`matrix` must hold finite values, got NaN or infinity"),
        ({"matrix": torch.full((8, 8), math.inf)}, "Repair the checkpoint first"),
        ({"row_factors": (2, 2)}, "`row_factors` and `column_factors` must be as many, got 2 and 3"),
        ({"row_factors": (2, 2, 1)}, r"`row_factors` must be positive and multiply to 8 or more, got \(2, 2, 1\)"),
        ({"column_factors": (-2, -2, 2)}, r"`column_factors` must be positive .* `factor_shape\(8, 3\)`"),
        ({"bonds": (4,)}, "`bonds` must name 2 sizes, one between every two cores, got 1"),
        ({"bonds": (4, 0)}, r"`bonds\[1\]` must be from 1 to 4, got 0"),
        ({"bonds": (5, 4)}, r"`bonds\[0\]` must be from 1 to 4, got 5"),
        ({"gauge": "center"}, "`gauge` must be one of symmetric, left, centre, even, got 'center'"),
        ({"truncation": "none"}, "`truncation` must be one of sequential, simultaneous, got 'none'"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(change, message):
    given_values = {"matrix": normal(8, 8), "row_factors": (2, 2, 2), "column_factors": (2, 2, 2)} | change
    matrix, rows, columns = (given_values.pop(name) for name in ("matrix", "row_factors", "column_factors"))
    with pytest.raises(ValueError, match=message):
        decompose(matrix, rows, columns, **given_values)
