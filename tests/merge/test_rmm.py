"""The shared form: optimality, exactness, determinism, and every grouping."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmmformat.errors import NonFiniteError, ShapeError
from rmmformat.merge import rmm
from rmmformat.merge.rmm import (
    Shared,
    factor_storage_fraction,
    max_components,
    merge,
    pad_rank,
    reconstruct,
    storage_fraction,
)

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Case:
    x: F32
    components: int
    grouping: rmm.Grouping
    center: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, r, length = (draw(st.integers(1, top)) for top in (6, 5, 11))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, r, length)) * 10.0 ** rng.integers(-3, 4, (n, 1, 1))
    if draw(st.booleans()):  # some tasks alike, some rows or positions empty
        x[rng.integers(n)] = x[0]
        x[:, rng.integers(r)] = 0
        x[:, :, rng.integers(length)] = 0
    group = draw(st.integers(1, length))
    grouping = draw(st.sampled_from(["position", "factor", "row", group]))
    return Case(x.astype(np.float32), draw(st.integers(0, 8)), grouping, draw(st.booleans()))


def rebuild(shared: Shared, coefs: F32) -> F32:
    return np.stack([reconstruct(shared, c) for c in coefs])


def groups_of(x: F64, case: Case) -> list[F64]:
    """Points (N, D) of every group, cut the slow way."""
    n, r, length = x.shape
    if case.grouping == "row":
        return [x.reshape(n * r, length)]
    m = {"position": 1, "factor": length}.get(str(case.grouping), case.grouping)
    assert isinstance(m, int)
    return [x[:, :, i : i + m].reshape(n, -1) for i in range(0, length, m)]


@given(cases())
@settings(max_examples=150, deadline=None)
def test_error_is_the_optimum_of_each_group(case: Case) -> None:
    shared, coefs = merge(case.x, case.components, case.grouping, case.center)
    rebuilt = rebuild(shared, coefs).astype(np.float64)
    x = case.x.astype(np.float64)
    mean = x.mean(axis=0) if case.center else np.zeros_like(x[0])
    pairs = zip(
        groups_of(x - mean, case), groups_of(rebuilt - x, case), groups_of(x, case), strict=True
    )
    for centred, left, raw in pairs:
        s = np.linalg.svd(centred, compute_uv=False)
        best = np.sqrt((s[case.components :] ** 2).sum())
        assert abs(np.linalg.norm(left) - best) <= 1e-6 * np.linalg.norm(raw)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_enough_components_reproduce_every_task(case: Case) -> None:
    n, r, length = case.x.shape
    rows = case.grouping == "row"
    m = {"position": 1, "factor": length, "row": length}.get(str(case.grouping), case.grouping)
    assert isinstance(m, int)
    p = max_components(n, length if rows else r * m, case.center, rows=r if rows else 1)
    rebuilt = rebuild(*merge(case.x, p, case.grouping, case.center))
    for got, want in zip(
        groups_of(rebuilt.astype(np.float64), case),
        groups_of(case.x.astype(np.float64), case),
        strict=True,
    ):
        assert np.linalg.norm(got - want) <= 5e-7 * np.linalg.norm(want)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_basis_is_orthonormal_sorted_and_of_fixed_sign(case: Case) -> None:
    shared, coefs = merge(case.x, case.components, case.grouping, case.center)
    assert np.isfinite(shared.basis).all()
    assert np.isfinite(coefs).all()
    basis = shared.basis.astype(np.float64)
    if shared.components == 0:
        return
    for v in [basis[:, 0]] if shared.row_mixing else groups_of(basis, case):
        gram = v @ v.T
        alive = np.diag(gram) > 0
        np.testing.assert_allclose(gram, np.diag(alive.astype(float)), atol=1e-6)
        for direction in v[alive]:
            top = np.abs(direction).max()
            assert direction[np.abs(direction) >= top].max() == top


@given(cases())
@settings(max_examples=60, deadline=None)
def test_error_falls_with_p(case: Case) -> None:
    x = case.x.astype(np.float64)
    errors = [
        np.linalg.norm(rebuild(*merge(case.x, p, case.grouping, case.center)) - x) for p in range(7)
    ]
    slack = 1e-6 * np.linalg.norm(x)
    assert all(b <= a + slack for a, b in itertools.pairwise(errors))


@given(cases(), st.booleans(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_reconstruct_equals_the_scalar_loop_bit_for_bit(
    case: Case, with_residual: bool, rank: int
) -> None:
    shared, coefs = merge(case.x, case.components, case.grouping, case.center)
    _, r, length = case.x.shape
    rank = min(rank, r)
    residual = case.x[0, :rank] * np.float32(0.37) if with_residual else None
    got = reconstruct(shared, coefs[-1], rank, residual)
    want = np.zeros((rank, length), np.float32)
    for k in range(rank):
        for col in range(length):
            acc = None if shared.mean is None else shared.mean[k, col]
            for j in range(shared.components):
                kb, kc = (0, k) if shared.row_mixing else (k, 0)
                product = coefs[-1, j, kc, col // shared.group] * shared.basis[j, kb, col]
                acc = product if acc is None else acc + product
            if residual is not None:
                acc = residual[k, col] if acc is None else acc + residual[k, col]
            want[k, col] = np.float32(0) if acc is None else acc
    assert got.dtype == np.float32
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("grouping", ["position", "factor", "row", 3, 8])
def test_shapes(grouping: rmm.Grouping) -> None:
    x = np.random.default_rng(1).standard_normal((4, 5, 8)).astype(np.float16)
    shared, coefs = merge(x, 2, grouping)
    group = {"position": 1, "factor": 8, "row": 8}.get(str(grouping), grouping)
    assert isinstance(group, int)
    assert shared.group == group
    assert shared.n_groups == -(-8 // group)
    assert shared.components == 2
    assert shared.length == 8
    rows = grouping == "row"
    assert shared.row_mixing == rows
    assert shared.basis.shape == (2, 1 if rows else 5, 8)
    assert coefs.shape == (4, 2, 5 if rows else 1, shared.n_groups)
    assert shared.mean is not None
    assert shared.mean.shape == (5, 8)
    assert {a.dtype for a in (shared.mean, shared.basis, coefs)} == {np.dtype(np.float32)}


def test_row_grouping_finds_a_shared_row_space() -> None:
    rng = np.random.default_rng(2)
    space = rng.standard_normal((3, 40))
    x = (rng.standard_normal((6, 4, 3)) @ space).astype(np.float32)
    shared, coefs = merge(x, 3, "row", center=False)
    assert shared.mean is None
    np.testing.assert_allclose(rebuild(shared, coefs), x, atol=2e-6)
    assert np.linalg.norm(rebuild(*merge(x, 2, "row", center=False)) - x) > 0.1


def test_equal_group_lengths_agree_with_the_named_groupings() -> None:
    x = np.random.default_rng(3).standard_normal((5, 4, 9)).astype(np.float32)
    for name, length in (("position", 1), ("factor", 9)):
        by_name, by_length = merge(x, 2, name), merge(x, 2, length)  # type: ignore[arg-type]
        assert by_name[0].basis.tobytes() == by_length[0].basis.tobytes()
        assert by_name[1].tobytes() == by_length[1].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("grouping", ["position", "factor", "row", 4])
def test_identical_tasks_need_only_the_mean(
    grouping: rmm.Grouping, dtype: type[np.floating[npt.NBitBase]]
) -> None:
    one = np.random.default_rng(4).standard_normal((3, 10)).astype(dtype) / 3
    shared, coefs = merge(np.repeat(one[None], 7, axis=0), 4, grouping)
    assert not shared.basis.any()
    assert not coefs.any()
    assert shared.mean is not None
    np.testing.assert_array_equal(shared.mean, one.astype(np.float32))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("grouping", ["position", "factor", "row", 4])
def test_zero_factors(grouping: rmm.Grouping, center: bool) -> None:
    shared, coefs = merge(np.zeros((3, 2, 10), np.float32), 2, grouping, center)
    assert not shared.basis.any()
    assert not coefs.any()
    assert not rebuild(shared, coefs).any()


def test_small_differences_on_a_large_common_part_survive() -> None:
    rng = np.random.default_rng(5)
    common = rng.standard_normal((4, 12))
    apart = rng.standard_normal((6, 4, 12)) * 1e-9
    shared, coefs = merge(common + apart, 5, "position")
    assert shared.mean is not None
    rebuilt = shared.mean + np.einsum(
        "jkl,njl->nkl", shared.basis.astype(float), coefs[:, :, 0].astype(float)
    )
    got = rebuilt - rebuilt.mean(axis=0)
    np.testing.assert_allclose(got, apart - apart.mean(axis=0), atol=4e-15)


def test_directions_far_apart_in_size_are_all_found() -> None:
    # Singular values 1 and 1e-10: the Gram matrix alone cannot see the second.
    x = np.zeros((3, 2, 1))
    x[0, 0, 0], x[1, 1, 0] = 1.0, 1e-10
    shared, coefs = merge(x, 2, "position", center=False)
    assert np.count_nonzero(np.linalg.norm(shared.basis[:, :, 0], axis=1)) == 2
    assert reconstruct(shared, coefs[1])[1, 0] == pytest.approx(1e-10, rel=1e-6)


def test_extreme_magnitudes() -> None:
    rng = np.random.default_rng(6)
    for size in (1e-38, 1e30):
        x = (rng.standard_normal((4, 3, 5)) * size).astype(np.float32)
        got = rebuild(*merge(x, 3, "position"))
        assert np.linalg.norm(got / size - x / size) <= 2e-6 * np.linalg.norm(x / size)


def test_coefficients_are_fitted_to_the_stored_values() -> None:
    # A mean that float32 cannot hold: the part of its rounding within the basis is made good.
    x = 1000.1 + np.random.default_rng(7).standard_normal((6, 4, 50)) * 1e-3
    shared, coefs = merge(x, 5, "position")
    assert shared.mean is not None
    for g in range(50):
        basis = shared.basis[:, :, g].T.astype(np.float64)
        target = (x[:, :, g] - shared.mean[:, g]).T
        best = np.linalg.lstsq(basis[:, basis.any(axis=0)], target, rcond=None)[0]
        kept = coefs[:, basis.any(axis=0), 0, g].T
        np.testing.assert_allclose(kept, best, rtol=1e-6, atol=1e-9)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(8).standard_normal((4, 3, 101)).astype(np.float32)
    whole = [merge(x, 2, g) for g in (1, 4)]
    monkeypatch.setattr(rmm, "_BLOCK_VALUES", 100)
    for (shared, coefs), g in zip(whole, (1, 4), strict=True):
        again, coefs_again = merge(x, 2, g)
        assert shared.basis.tobytes() == again.basis.tobytes()
        assert coefs.tobytes() == coefs_again.tobytes()


def test_same_input_same_bytes() -> None:
    x = np.random.default_rng(9).standard_normal((8, 4, 33)).astype(np.float32)
    digests = set()
    for copy in (x, x.copy(order="F"), np.ascontiguousarray(x.transpose(2, 1, 0)).T):
        shared, coefs = merge(copy, 3)
        digests.add(hashlib.sha256(shared.basis.tobytes() + coefs.tobytes()).digest())
    assert len(digests) == 1


def test_ragged_ranks_pad_and_crop() -> None:
    rng = np.random.default_rng(10)
    factors = [rng.standard_normal((r, 7)).astype(np.float32) for r in (2, 5, 3, 1)]
    stacked = pad_rank(factors)
    assert stacked.shape == (4, 5, 7)
    assert not stacked[3, 1:].any()
    shared, coefs = merge(stacked, 3)
    for x, c in zip(factors, coefs, strict=True):
        np.testing.assert_allclose(reconstruct(shared, c, len(x)), x, atol=1e-5)  # type: ignore[arg-type]


def test_published_storage() -> None:
    assert storage_fraction(8, 16, 3) == 0.6875
    assert [storage_fraction(8, 16, p) for p in (1, 2, 5)] == [0.3125, 0.5, 1.0625]
    assert factor_storage_fraction(8, 16, 384, 3) == pytest.approx(0.5, abs=1e-3)
    x = np.zeros((8, 16, 384), np.float32)
    for grouping, fraction in (
        ("position", storage_fraction(8, 16, 3)),
        ("factor", factor_storage_fraction(8, 16, 384, 3)),
    ):
        shared, coefs = merge(x, 3, grouping)  # type: ignore[arg-type]
        assert shared.mean is not None
        assert (shared.mean.size + shared.basis.size + coefs.size) / x.size == fraction


def test_max_components() -> None:
    assert max_components(8, 16) == 7
    assert max_components(100, 16) == 16
    assert max_components(8, 16, center=False) == 8
    assert max_components(8, 384, rows=16) == 112
    assert max_components(1, 16) == 0


def test_nothing_shared_is_zero() -> None:
    shared, coefs = merge(np.ones((2, 3, 4), np.float32), 0, center=False)
    assert coefs.shape == (2, 0, 1, 4)
    assert not reconstruct(shared, coefs[0]).any()
    residual = np.full((3, 4), -0.0, np.float32)
    assert reconstruct(shared, coefs[0], None, residual).tobytes() == residual.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("center", [True, False])
def test_values_that_cannot_be_stored_are_refused(bad: float, center: bool) -> None:
    x = np.zeros((3, 2, 4))
    x[1, 1, 2] = bad
    with pytest.raises(NonFiniteError):
        merge(x, 1, "position", center)


@pytest.mark.parametrize(
    ("shape", "components", "grouping"),
    [
        ((2, 3), 1, "position"),
        ((0, 3, 4), 1, "position"),
        ((2, 3, 4), -1, "position"),
        ((2, 3, 4), 1, "column"),
        ((2, 3, 4), 1, 0),
        ((2, 3, 4), 1, 5),
    ],
)
def test_merge_refuses(shape: tuple[int, ...], components: int, grouping: rmm.Grouping) -> None:
    with pytest.raises(ShapeError):
        merge(np.zeros(shape, np.float32), components, grouping)


def test_reconstruct_refuses() -> None:
    shared, coefs = merge(np.ones((2, 3, 4), np.float32), 1)
    for arguments in (
        (coefs[0].astype(np.float64),),
        (coefs[0, :, :, :2],),
        (coefs[0], 4),
        (coefs[0], 2, np.zeros((3, 4), np.float32)),
    ):
        with pytest.raises(ShapeError):
            reconstruct(shared, *arguments)  # type: ignore[arg-type]
    mixed, row_coefs = merge(np.ones((2, 3, 4), np.float32), 1, "row")
    with pytest.raises(ShapeError, match="rows"):
        reconstruct(mixed, row_coefs[0, :, :2])


def test_shared_and_pad_rank_refuse() -> None:
    basis = np.zeros((1, 3, 4), np.float32)
    for mean, b, group, rows in (
        (np.zeros((2, 4), np.float32), basis, 1, False),
        (np.zeros((3, 4)), basis, 1, False),
        (None, basis.astype(np.float64), 1, False),
        (None, basis, 0, False),
        (None, basis, 4, True),
    ):
        with pytest.raises(ShapeError):
            Shared(mean, b, group, rows)  # type: ignore[arg-type]
    for factors in (
        [],
        [np.zeros((2, 3)), np.zeros((2, 4))],
        [np.zeros((2, 3)), np.zeros((2, 3), np.float32)],
        [np.zeros(3)],
    ):
        with pytest.raises(ShapeError):
            pad_rank(factors)  # type: ignore[arg-type]


def whole_numbers(n: int, r: int, length: int) -> F64:
    """Bell-shaped numbers that no library can round in its own way."""
    state, out = 1, []
    for _ in range(n * r * length):
        total = 0
        for _ in range(3):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            total += state >> 54
        out.append((total - 1534) / 256)
    return np.array(out).reshape(n, r, length)


@pytest.mark.parametrize("group", [1, 3, 7, 61])
@pytest.mark.parametrize("shape", [(8, 16, 61), (16, 4, 61), (5, 5, 61), (2, 1, 61)])
def test_small_groups_come_out_as_by_lapack(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], group: int
) -> None:
    x = np.random.default_rng(3).standard_normal(shape)
    x[:, :, 5] = 0
    x[1] = x[0]
    assert rmm._native.principal_possible(shape[0], shape[1] * group)
    native, own = merge(x, 3, group)
    monkeypatch.setattr(rmm._native, "principal_possible", lambda *_: False)
    other, same = merge(x, 3, group)
    np.testing.assert_array_equal(native.mean, other.mean)
    for ours, theirs in zip(rebuild(native, own), rebuild(other, same), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert (native.basis != 0).any(axis=(1, 2)).tolist() == (other.basis != 0).any(
        axis=(1, 2)
    ).tolist()
    np.testing.assert_allclose(np.abs(own), np.abs(same), atol=1e-5)


def test_small_groups_have_the_same_bits_everywhere() -> None:
    x = whole_numbers(6, 5, 1100)
    for group, expected in ((1, "78cc8fd88122c487"), (4, "23f1bb961dfcccbc")):
        found = [rmm._native.find_principal(x, group, 3, True, threads) for threads in (1, 2, 5)]
        digests = {
            hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]
            for arrays in found
            if arrays is not None
        }
        assert digests == {expected}


def test_what_is_too_large_for_small_groups() -> None:
    assert not rmm._native.principal_possible(65, 65)
    assert not rmm._native.principal_possible(2, 2**14)
    assert not rmm._native.principal_possible(2**40, 2**40)
    with pytest.raises(ValueError, match="not for this"):
        rmm._native.find_principal(np.zeros((65, 65, 2)), 1, 1, True)
    x = np.random.default_rng(4).standard_normal((70, 70, 2))
    assert rebuild(*merge(x, 69)).shape == x.shape
