"""Conjugate gradients against dense solves, NumPy, SciPy, and what theory promises."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import CG, Dense, Linearized, Status, linear_solve
from problems import BATCHES, solve, spd
from systems import BATCH, F64, SEEDS, SIZES, counted, norm, product, with_diagonal


def energy(matrix, error):
    """`||error||_A`."""
    return np.sqrt(np.einsum("...i,...ij,...j->...", error, matrix, error))


# -- definite systems ------------------------------------------------------------------------------


@given(
    st.integers(0, 30),
    SEEDS,
    st.floats(0, 3),
    BATCH,
    st.sampled_from(["f32", "f64"]),
    st.booleans(),
)
def test_equals_a_dense_solve(n, seed, log_kappa, batch, precision, preconditioned):
    single = precision == "f32"
    dtype, rtol = (torch.float32, 1e-4) if single else (F64, 1e-10)
    kappa = 10 ** (log_kappa / 2 if single else log_kappa)
    matrix, b = spd(seed, n, kappa, batch, dtype)
    precondition = lambda r: r  # noqa: E731
    if preconditioned:
        matrix, precondition = with_diagonal(matrix, seed)
        kappa = float(torch.linalg.cond(matrix).max()) if n else 1.0
    solver = CG(max_steps=50 * n, rtol=rtol, min_curvature=0.0)
    x, status, stats = solver.solve(Linearized(Dense(matrix).mv, precondition), b)
    exact = torch.linalg.solve(matrix.double(), b.double().unsqueeze(-1)).squeeze(-1)
    error = torch.linalg.vector_norm(x.double() - exact, dim=-1)
    scale = torch.linalg.vector_norm(exact, dim=-1)
    eps = torch.finfo(dtype).eps
    assert x.dtype == dtype
    assert x.shape == b.shape
    assert status.dtype == torch.int8
    assert status.shape == stats["steps"].shape == stats["residual_norm"].shape == batch
    assert torch.equal(status, torch.zeros_like(status))
    assert torch.all(error <= kappa * (1.01 * rtol + 50 * eps) * scale)


@given(st.integers(1, 15), SEEDS, BATCH, st.booleans())
def test_energy_error_never_grows(n, seed, batch, preconditioned):
    matrix, b = spd(seed, n, 1e3, batch)
    precondition = lambda r: r  # noqa: E731
    if preconditioned:
        matrix, precondition = with_diagonal(matrix, seed)
    A, exact = matrix.numpy(), solve(matrix.numpy(), b.numpy())
    before = start = energy(A, exact)
    for k in range(1, n + 1):
        solver = CG(max_steps=k, min_curvature=0.0)
        x = solver.solve(Linearized(Dense(matrix).mv, precondition), b).value.numpy()
        now = energy(A, x - exact)
        assert np.all(now <= before * (1 + 1e-9) + 1e-12 * start)
        before = now


@given(st.integers(2, 20), SEEDS, st.floats(0.1, 3))
def test_energy_error_within_the_chebyshev_bound(n, seed, log_kappa):
    kappa = 10**log_kappa
    matrix, b = spd(seed, n, kappa)
    A, exact = matrix.numpy(), solve(matrix.numpy(), b.numpy())
    root = math.sqrt(kappa)
    for k in (1, 2, 5, 9):
        x = linear_solve(Dense(matrix), b, CG(max_steps=k)).value.numpy()
        bound = 2 * ((root - 1) / (root + 1)) ** k * energy(A, exact)
        assert energy(A, x - exact) <= bound * (1 + 1e-9) + 1e-10 * energy(A, exact)


@given(st.integers(1, 12), SEEDS, BATCH)
def test_exact_in_n_steps_and_in_no_fewer(n, seed, batch):
    matrix, b = spd(seed, n, 50.0, batch)
    exact = solve(matrix.numpy(), b.numpy())

    def error(steps):
        x = linear_solve(Dense(matrix), b, CG(max_steps=steps)).value.numpy()
        return norm(x - exact) / norm(exact)

    assert np.all(error(n) < 1e-8)
    if 1 < n <= 6:
        assert np.all(error(n - 1) > 1e-8)


@given(st.integers(1, 5), st.integers(0, 20), SEEDS)
def test_as_many_steps_as_distinct_eigenvalues(distinct, more, seed):
    rng = np.random.default_rng(seed)
    values = np.linspace(1, 5, distinct)
    eigenvalues = np.concatenate([values, rng.choice(values, more)])
    matrix, b = spd(seed, distinct + more, eigenvalues=eigenvalues)
    solution = linear_solve(Dense(matrix), b, CG(rtol=1e-10))
    assert solution.status == Status.SUCCESS
    assert solution.stats["steps"] <= distinct
    assert norm(product(matrix.numpy(), solution.value.numpy()) - b.numpy()) <= 1.01e-10 * norm(b)


@given(st.integers(1, 10), SEEDS, st.integers(0, 12))
def test_every_iterate_is_scipys(n, seed, steps):
    matrix, b = spd(seed, n, 20.0)
    steps, iterates = min(steps, n), []
    scipy.sparse.linalg.cg(
        matrix.numpy(),
        b.numpy(),
        rtol=0,
        atol=0,
        maxiter=n,
        callback=lambda x: iterates.append(x.copy()),
    )
    assert len(iterates) >= steps
    for k in range(1, steps + 1):
        x = linear_solve(Dense(matrix), b, CG(max_steps=k)).value.numpy()
        assert np.allclose(x, iterates[k - 1], rtol=0, atol=1e-8 * norm(b) * 20)


@given(st.integers(1, 10), SEEDS, st.integers(1, 10))
def test_every_preconditioned_iterate_is_scipys(n, seed, steps):
    matrix, precondition = with_diagonal(spd(seed, n, 5.0)[0], seed)
    b, steps = torch.from_numpy(np.random.default_rng(seed).standard_normal(n)), min(steps, n)
    wrapped = scipy.sparse.linalg.LinearOperator(
        (n, n),
        matvec=lambda r: precondition(torch.from_numpy(r.reshape(-1))).numpy(),
        dtype=np.float64,
    )
    theirs = scipy.sparse.linalg.cg(
        matrix.numpy(), b.numpy(), rtol=0, atol=0, maxiter=steps, M=wrapped
    )[0]
    solver = CG(max_steps=steps, min_curvature=0.0)
    ours = solver.solve(Linearized(Dense(matrix).mv, precondition), b).value.numpy()
    exact = solve(matrix.numpy(), b.numpy())
    A = matrix.numpy()
    assert energy(A, ours - theirs) <= 1e-7 * energy(A, exact)


@pytest.mark.parametrize("batch", BATCHES)
def test_exact_preconditioner_needs_one_step(batch):
    matrix, b = spd(0, 8, 1e4, batch)
    inverse = torch.linalg.inv(matrix)
    operator, calls = counted(matrix, Dense(inverse).mv)
    solution = CG(rtol=1e-8).solve(operator, b)
    assert torch.equal(solution.stats["steps"], torch.ones(batch, dtype=torch.int32))
    assert len(calls) <= 2  # one may confirm the residual
    assert np.allclose(solution.value.numpy(), solve(matrix.numpy(), b.numpy()), rtol=1e-9)


@given(SIZES, SEEDS, st.integers(-20, 20), st.sampled_from([torch.float32, F64]), st.booleans())
def test_scaling_the_system_or_the_right_hand_side(n, seed, exponent, dtype, preconditioned):
    """By powers of two, which round nothing: equal to the last bit."""
    c = 2.0**exponent
    matrix, b = spd(seed, n, 100.0, dtype=dtype)
    precondition = lambda r: r  # noqa: E731
    if preconditioned:
        matrix, precondition = with_diagonal(matrix, seed)

    def solved(matrix, b, max_steps, rtol):
        operator = Linearized(Dense(matrix).mv, precondition)
        return CG(max_steps=max_steps, rtol=rtol, min_curvature=0.0).solve(operator, b)

    for max_steps, rtol in [(7, None), (100, 1e-3)]:
        x = solved(matrix, b, max_steps, rtol)
        both, rhs = (
            solved(c * matrix, c * b, max_steps, rtol),
            solved(matrix, c * b, max_steps, rtol),
        )
        assert torch.equal(both.value, x.value)
        assert torch.equal(rhs.value, c * x.value)
        for other in (both, rhs):
            assert torch.equal(other.status, x.status)
            assert torch.equal(other.stats["steps"], x.stats["steps"])
            assert torch.equal(other.stats["residual_norm"], c * x.stats["residual_norm"])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-16, 1e16, 1e30])
def test_tiny_and_huge_right_hand_sides_in_single_precision(scale):
    """Their squares leave the range of float32; they themselves do not."""
    matrix, b = spd(0, 6, 10.0, dtype=torch.float32)
    exact = solve(matrix.double().numpy(), b.double().numpy())
    x, status, stats = linear_solve(Dense(matrix), b * scale, CG(rtol=1e-5))
    assert status == Status.SUCCESS
    assert norm(x.double().numpy() / scale - exact) <= 1e-3 * norm(exact)
    assert stats["rhs_norm"].item() / scale == pytest.approx(norm(b.numpy()), rel=1e-4)


@given(st.integers(1, 12), SEEDS, st.integers(1, 12))
def test_order_of_the_unknowns_does_not_matter(n, seed, steps):
    matrix, b = spd(seed, n, 30.0)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    solver = CG(max_steps=min(steps, n))
    x = linear_solve(Dense(matrix), b, solver).value
    moved = linear_solve(Dense(matrix[order][:, order]), b[order], solver).value
    assert norm((moved - x[order]).numpy()) <= 1e-8 * norm(b.numpy()) * 30


# -- special right-hand sides and matrices ---------------------------------------------------------


@given(st.integers(0, 20), SEEDS, BATCH, st.sampled_from([CG(), CG(max_steps=3), CG(max_steps=0)]))
def test_zero_right_hand_side_gives_exactly_zero(n, seed, batch, solver):
    matrix, b = spd(seed, n, batch=batch)
    x, status, stats = linear_solve(Dense(matrix), torch.zeros_like(b), solver)
    for zero in (x, status, stats["steps"], stats["residual_norm"], stats["rhs_norm"]):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", [CG(), CG(max_steps=2), CG(max_steps=0), CG(rtol=0.5)])
def test_nonfinite_right_hand_side(bad, solver):
    matrix, b = spd(0, 4, batch=(3,))
    b[1, 2] = bad
    x, status, stats = linear_solve(Dense(matrix), b, solver)
    assert torch.isnan(x).all(-1).tolist() == [False, True, False]
    assert torch.isfinite(x).all(-1).tolist() == [True, False, True]
    assert status[1] == Status.NONFINITE
    assert Status.NONFINITE not in (status[0], status[2])
    assert stats["steps"][1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [CG(), CG(max_steps=2)])
def test_nonfinite_preconditioner(bad, solver):
    matrix, b = spd(0, 4, batch=(2,))
    factor = torch.tensor([[1.0], [bad]], dtype=F64)
    x, status, _ = solver.solve(Linearized(Dense(matrix).mv, lambda r: r * factor), b)
    assert torch.isnan(x).all(-1).tolist() == [False, True]
    assert status.tolist() == [0, Status.NONFINITE]


@pytest.mark.parametrize("solver", [CG(max_steps=1), CG(max_steps=3), CG(rtol=1e-3)])
@pytest.mark.parametrize("corner", [0.0, 1e-310])
def test_overflow_is_nonfinite_and_not_success(solver, corner):
    """A step length beyond the range of the dtype."""
    matrix = torch.diag(torch.tensor([1e-310, corner], dtype=F64))
    x, status, _ = linear_solve(Dense(matrix), torch.tensor([1.0, 0.0], dtype=F64), solver)
    assert status == Status.NONFINITE
    assert torch.isnan(x).all()


@given(st.integers(2, 12), SEEDS, st.integers(1, 4))
def test_singular_but_consistent(n, seed, nullity):
    """The minimum-norm solution, for a right-hand side in the range."""
    nullity = min(nullity, n - 1)
    eigenvalues = np.concatenate([np.zeros(nullity), np.geomspace(0.1, 1, n - nullity)])
    matrix, y = spd(seed, n, eigenvalues=eigenvalues)
    A = matrix.numpy()
    b = A @ y.numpy()
    x, status, _ = linear_solve(Dense(matrix), torch.from_numpy(b), CG(rtol=1e-8))
    assert status == Status.SUCCESS
    expected = np.linalg.pinv(A, rcond=1e-8, hermitian=True) @ b
    assert norm(x.numpy() - expected) <= 1e-6 * norm(y.numpy())


@pytest.mark.parametrize("solver", [CG(rtol=1e-6), CG(max_steps=5), CG(max_steps=50)])
def test_singular_and_inconsistent(solver):
    """Two steps are sound; the third direction has no curvature but for rounding."""
    matrix, b = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64)), torch.ones(3, dtype=F64)
    x, status, _ = linear_solve(Dense(matrix), b, solver)
    assert status == Status.NEGATIVE_CURVATURE
    assert np.allclose(x.numpy(), [3.0, 0.0, 6.0], atol=1e-9)
