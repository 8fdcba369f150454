"""Decomposition: golden values, identities, a trusted library, and matrices that are hard to decompose."""

import math
from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import assume, given, settings, strategies as st
from tensorly.decomposition import tensor_train_matrix

from hf_moebert.methods.mpo.functional import contract, merge
from hf_moebert.methods.mpo.functional_bonds import error_bound
from hf_moebert.methods.mpo.functional_decomposition import GAUGES, decompose
from hf_moebert.methods.mpo.functional_shapes import factor_matrix, full_bonds


TWOS = (2, 2, 2)
DIGITS = np.arange(8)
GOLDEN = torch.from_numpy(
    ((7 * DIGITS[:, None] + 3 * DIGITS + DIGITS[:, None] * DIGITS) % 11) / 11 - 0.5
)  # of the specification: its values below were computed there, with numpy


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(cores, matrix):
    """Relative to the matrix, in float64."""
    return float((contract([core.double() for core in cores], *matrix.shape) - matrix.double()).norm() / matrix.norm())


def environments(cores):
    """Squares of what lies left and right of each bond."""
    left, right = [torch.eye(1).double()], [torch.eye(1).double()]
    for core, mirrored in zip(cores[:-1], reversed(cores[1:]), strict=True):
        left.append(torch.einsum("ab,aijc,bijd->cd", left[-1], core, core))
        right.append(torch.einsum("cd,aijc,bijd->ab", right[-1], mirrored, mirrored))
    return left[1:], right[:0:-1]


@st.composite
def chains(draw):
    """Factors and a matrix that may need padding, of any odd number of cores."""
    count = draw(st.sampled_from([3, 5, 7, 9]))
    factors = st.lists(st.integers(1, 3 if count < 7 else 2), min_size=count, max_size=count).map(tuple)
    rows, columns = draw(factors), draw(factors)
    size = [draw(st.integers(max(1, math.prod(side) * 2 // 3), math.prod(side))) for side in (rows, columns)]
    assume(math.prod(size) < 3000)
    return normal(*size, seed=draw(st.integers(0, 1000))), rows, columns


def test_golden_example():
    cores, values = decompose(GOLDEN, TWOS, TWOS)
    assert float(GOLDEN.norm()) == pytest.approx(2.3741027013)
    expected = [[1.4843565579, 1.3689282372, 1.0195222235, 0.7208738882]]
    expected += [[1.6189478127, 1.1856572730, 1.0277567492, 0.7438444135]]
    torch.testing.assert_close(torch.stack(values), torch.tensor(expected).double(), rtol=1e-7, atol=1e-9)
    assert distance(cores, GOLDEN) < 1e-12


@pytest.mark.parametrize(
    ("bond", "sequential", "simultaneous", "bound"),
    [
        (3, 0.9969090207, 0.9972313988, 1.0358395987),
        (2, 1.5231091072, 1.6103895146, 1.7800767326),
        (1, 2.1155631025, 2.1847863329, 2.5393741082),
    ],
)
@pytest.mark.parametrize("gauge", GAUGES)
def test_golden_errors(bond, sequential, simultaneous, bound, gauge):
    values = decompose(GOLDEN, TWOS, TWOS)[1]
    assert error_bound(values, (bond, bond)) == pytest.approx(bound)
    for truncation, error in (("sequential", sequential), ("simultaneous", simultaneous)):
        cores, _ = decompose(GOLDEN, TWOS, TWOS, bonds=(bond, bond), truncation=truncation, gauge=gauge)
        assert [core.shape[-1] for core in cores] == [bond, bond, 1]
        assert float((contract(cores) - GOLDEN).norm()) == pytest.approx(error)


def test_golden_truncation_of_a_large_matrix():
    """Errors of a Gaussian 768 x 768 hardly depend on the draw: those of the specification's, to 1 in 200."""
    matrix, shape = normal(768, 768), factor_matrix(768, 768, 5)
    bonds = tuple(min(150, bond) for bond in full_bonds(*shape))
    values = decompose(matrix, *shape)[1]
    errors = [
        float((contract(decompose(matrix, *shape, bonds=bonds, truncation=truncation)[0]) - matrix).norm())
        for truncation in ("sequential", "simultaneous")
    ]
    lower = max(float(spectrum[bond:].norm()) for spectrum, bond in zip(values, bonds, strict=True))
    assert [*errors, error_bound(values, bonds), lower] == pytest.approx([397.22, 399.76, 418.20, 295.89], rel=5e-3)


SQUARES = [(768, 768, num_cores) for num_cores in (3, 5, 7, 9)]
OTHERS = [(768, 3072, 5), (3072, 768, 5), (30000, 128, 5), (1000, 130, 5)]


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [(size, torch.float64, 1e-12) for size in SQUARES] + [(size, torch.float32, 1e-5) for size in SQUARES + OTHERS],
)
def test_published_shapes_come_back(size, dtype, tolerance):
    rows, columns, num_cores = size
    matrix, shape = normal(rows, columns, dtype=dtype), factor_matrix(rows, columns, num_cores)
    cores, values = decompose(matrix, *shape)
    assert all(core.dtype == dtype for core in cores)
    assert tuple(len(spectrum) for spectrum in values) == full_bonds(*shape)
    assert distance(cores, matrix) < tolerance


def test_gauges():
    """Blocks on either side are orthogonal, the norm is where the gauge says, the product is the same."""
    matrix, shape = normal(96, 96), ((3, 2, 4, 2, 2), (2, 2, 4, 2, 3))
    symmetric, left, centre, even = (decompose(matrix, *shape, gauge=gauge)[0] for gauge in GAUGES)
    head, tail = merge(left[:2]).flatten(0, 2), merge(centre[3:]).flatten(1)
    torch.testing.assert_close(head.T @ head, torch.eye(24).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(tail @ tail.T, torch.eye(24).double(), rtol=0, atol=1e-12)
    assert float(left[-1].norm()) == pytest.approx(float(matrix.norm()))
    assert float(centre[2].norm()) == pytest.approx(float(matrix.norm()))
    sizes = [float(core.square().mean()) for core in even]
    assert sizes == pytest.approx(sizes[:1] * 5)
    for core, other in zip(even, symmetric, strict=True):
        torch.testing.assert_close(core / core.norm(), other / other.norm())
    for cores in (left, centre, symmetric, even):
        assert distance(cores, matrix) < 1e-13


@pytest.mark.parametrize("bonds", [None, (3, 7, 5, 2)])
@pytest.mark.parametrize("truncation", ["sequential", "simultaneous"])
def test_symmetric_gauge_shares_the_schmidt_values(bonds, truncation):
    """Also of a truncated chain: then those of the matrix it stands for."""
    shape = ((2, 2, 3, 2, 2), (2, 3, 2, 2, 1))
    cores, _ = decompose(normal(48, 24), *shape, bonds=bonds, truncation=truncation)
    values = decompose(contract(cores), *shape)[1]
    for left, right, spectrum in zip(*environments(cores), values, strict=True):
        expected = spectrum[: len(left)].diag()
        torch.testing.assert_close(left, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(right, expected, rtol=0, atol=1e-12)


def test_kronecker_products_need_one_direction():
    """A wrong order of the digits fails here."""
    parts = [normal(i, j, seed=k) for k, (i, j) in enumerate([(2, 3), (3, 2), (4, 2), (1, 2), (2, 2)])]
    matrix = parts[0]
    for part in parts[1:]:
        matrix = torch.kron(matrix, part)
    cores, _ = decompose(matrix, (2, 3, 4, 1, 2), (3, 2, 2, 2, 2))
    assert [core.shape[-1] for core in cores] == [1] * 5
    assert distance(cores, matrix) < 1e-13


HARD = {
    "zero": torch.zeros(12, 12).double(),
    "rank 1": torch.outer(normal(12), normal(12)),
    "rank 3": normal(12, 3) @ normal(3, 12),
    "zero rows": torch.cat([normal(6, 12), torch.zeros(6, 12)]),  # a whole digit without weight
    "padded": normal(7, 9),
    "one entry": torch.eye(12).double()[:, :1] @ torch.eye(12).double()[:1],
    "tiny": 1e-200 * normal(12, 12),
}


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("kind", HARD)
def test_directions_without_weight_are_dropped(kind, gauge):
    matrix = HARD[kind]
    cores, values = decompose(matrix, (2, 3, 2), (2, 3, 2), gauge=gauge)
    assert all(core.isfinite().all() for core in cores)
    ranks = [max(int((spectrum > 1e-12 * spectrum[0]).sum()), 1) for spectrum in values]
    assert [core.shape[-1] for core in cores[:-1]] == ranks
    assert float((contract(cores, *matrix.shape) - matrix).norm()) <= 1e-13 * float(matrix.norm())


@pytest.mark.parametrize("matrix", [normal(36, 64), normal(64, 36), normal(48, 3) @ normal(3, 48)])
def test_fallback_where_the_decomposition_does_not_converge(matrix, monkeypatch):
    shape = factor_matrix(*matrix.shape, 5)
    expected = decompose(matrix, *shape)[1]

    def diverge(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    cores, values = decompose(matrix, *shape)
    assert distance(cores, matrix) < 1e-7
    for mine, theirs in zip(values, expected, strict=True):
        count = min(len(mine), len(theirs))  # half the digits: a bond may keep more noise, or less
        torch.testing.assert_close(mine[:count], theirs[:count], rtol=0, atol=1e-7 * float(matrix.norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float64(dtype):
    matrix = normal(24, 36).to(dtype)
    cores, values = decompose(matrix, (2, 3, 4), (4, 3, 3))
    assert {core.dtype for core in cores} == {dtype}
    assert {spectrum.dtype for spectrum in values} == {torch.float64}
    assert distance(cores, matrix) < 2 * torch.finfo(dtype).eps


def test_same_matrix_same_bytes():
    """Whatever was drawn before, and however the matrix lies in memory; the input stays as it was."""
    matrix = normal(24, 36, dtype=torch.float32).requires_grad_()
    before = matrix.detach().clone()
    first = decompose(matrix, (2, 3, 4), (4, 3, 3))[0]
    torch.rand(3)
    again = decompose(before.T.contiguous().T, (2, 3, 4), (4, 3, 3))[0]
    assert all(torch.equal(*pair) and not pair[0].requires_grad for pair in zip(first, again, strict=True))
    assert torch.equal(matrix, before)


@given(chains())
@settings(max_examples=50, deadline=None)
def test_full_rank_comes_back(chain):
    matrix, rows, columns = chain
    for gauge in GAUGES:
        assert distance(decompose(matrix, rows, columns, gauge=gauge)[0], matrix) < 1e-12


@given(chains(), st.data())
@settings(max_examples=50, deadline=None)
def test_truncation_errors(chain, data):
    """Sequential: exactly what was left out. Both: between the largest tail and the bound."""
    matrix, rows, columns = chain
    full = full_bonds(rows, columns)
    bonds = [data.draw(st.integers(1, bond)) for bond in full]
    values = decompose(matrix, rows, columns)[1]
    tails = [float(spectrum[bond:].norm()) for spectrum, bond in zip(values, bonds, strict=True)]
    slack = 1e-12 * float(matrix.norm())
    padded = torch.zeros(math.prod(rows), math.prod(columns)).double()
    padded[: len(matrix), : matrix.shape[1]] = matrix
    for truncation in ("sequential", "simultaneous"):
        cores, found = decompose(matrix, rows, columns, bonds=bonds, truncation=truncation)
        error = float((contract(cores) - padded).norm())
        assert max(tails) - slack <= error <= error_bound(values, bonds) + slack
        if truncation == "sequential":
            assert error == pytest.approx(error_bound(found, bonds), rel=1e-6, abs=slack)
        assert float((contract(cores, *matrix.shape) - matrix).norm()) <= error + slack


def test_error_falls_with_every_bond():
    matrix, shape = normal(16, 24), ((2, 2, 2, 2, 1), (2, 3, 2, 1, 2))
    start = (2, 5, 4, 1)
    for place, most in enumerate(full_bonds(*shape)):
        errors = [
            distance(decompose(matrix, *shape, bonds=(*start[:place], bond, *start[place + 1 :]))[0], matrix)
            for bond in range(1, most + 1)
        ]
        assert all(more <= less + 1e-12 for less, more in pairwise(errors))


@pytest.mark.parametrize("num_cores", [3, 5])
def test_tensorly_finds_the_same_bonds_and_errors(num_cores):
    matrix, shape = normal(36, 36), {3: ((3, 4, 3), (2, 6, 3)), 5: ((2, 3, 2, 3, 1), (1, 2, 3, 2, 3))}[num_cores]
    full = full_bonds(*shape)
    for cap in (1, 2, 5, 100):
        bonds = [min(cap, bond) for bond in full]
        theirs = tensor_train_matrix(matrix.numpy().reshape(*shape[0], *shape[1]), (1, *bonds, 1))
        dense = torch.from_numpy(np.asarray(tensorly.tt_matrix_to_tensor(theirs))).reshape(36, 36)
        ours, _ = decompose(matrix, *shape, bonds=bonds)
        assert [core.shape for core in ours] == [factor.shape for factor in theirs]
        torch.testing.assert_close(contract(ours), dense, rtol=0, atol=1e-11)
