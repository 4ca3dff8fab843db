"""Conjugate gradients against dense solves, NumPy, SciPy, and what theory promises."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import CG, Damped, Dense, Hessian, Linearized, Status, _masks, linear_solve
from problems import BATCHES, indefinite, solve, spd, vector_lam

F64 = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 30)
BATCH = st.sampled_from(BATCHES)


def norm(x):
    return np.linalg.norm(x, axis=-1)


def product(matrix, x):
    return np.einsum("...ij,...j->...i", matrix, x)


def energy(matrix, error):
    """`||error||_A`."""
    return np.sqrt(np.einsum("...i,...ij,...j->...", error, matrix, error))


def counted(matrix, precondition=lambda r: r):
    """The matrix as an operator that counts its products."""
    calls = []

    def mv(x):
        calls.append(x)
        return Dense(matrix).mv(x)

    return Linearized(mv, precondition), calls


def unblocked(matrix):
    """The matrix with a product that rounds alike for one task and for many."""
    return Linearized(lambda x: (matrix * x.unsqueeze(-2)).sum(-1), lambda r: r)


def with_diagonal(matrix, seed):
    """A badly scaled `D A D` and its preconditioner `D^-2`, which is not its proximal term."""
    scale = torch.from_numpy(10 ** np.random.default_rng(seed).uniform(-1, 1, matrix.shape[-1]))
    scale = scale.to(matrix.dtype)
    return scale[:, None] * matrix * scale, lambda r: r / scale**2


def numpy_cg(matrix, b, steps, M=None, floor=0.0):
    """Plain textbook CG of one system, which stops before a direction with `p.Ap <= floor p.Mp`."""
    M = np.eye(len(b)) if M is None else M
    x, r = np.zeros_like(b), b.copy()
    z = np.linalg.solve(M, r)
    p = z.copy()
    for k in range(steps):
        Ap = matrix @ p
        if p @ Ap <= floor * (p @ M @ p):
            return x, k, True
        rz = r @ z
        x, r = x + rz / (p @ Ap) * p, r - rz / (p @ Ap) * Ap
        z = np.linalg.solve(M, r)
        p = z + (r @ z) / rz * p
    return x, steps, False


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


# -- one task and its neighbours -------------------------------------------------------------------

NEIGHBOURS = {
    "nan matrix": Status.NONFINITE,
    "inf matrix": Status.NONFINITE,
    "nan rhs": Status.NONFINITE,
    "inf rhs": Status.NONFINITE,
    "negative definite": Status.NEGATIVE_CURVATURE,
    "zero matrix": Status.NEGATIVE_CURVATURE,
    "identity": Status.SUCCESS,
    "zero rhs": Status.SUCCESS,
}


def make(kind, n):
    matrix, b = torch.eye(n, dtype=F64), torch.ones(n, dtype=F64)
    if kind.endswith("matrix"):
        value = {"nan": math.nan, "inf": math.inf, "zero": 0.0}[kind.split()[0]]
        matrix = torch.full_like(matrix, value)
    elif kind.endswith("rhs"):
        b[n // 2] = {"nan": math.nan, "inf": math.inf, "zero": 0.0}[kind.split()[0]]
        b = b if kind != "zero rhs" else torch.zeros_like(b)
    elif kind == "negative definite":
        matrix = -matrix
    return matrix, b


def same_numbers(batched, alone, place):
    """Bit for bit; the batch goes on for longer, so that its coefficients end in padding."""
    for name, expected in alone.items():
        got = batched[name][place]
        if name == "lanczos":
            steps = expected.shape[-2]
            assert got[..., steps:, 0].isnan().all()
            got = got[..., :steps, :]
        if not torch.equal(got.nan_to_num(), expected.nan_to_num()):
            return False
    return True


@given(
    st.integers(1, 10),
    SEEDS,
    st.lists(st.sampled_from(sorted(NEIGHBOURS)), min_size=1, max_size=4),
    st.sampled_from([CG(), CG(rtol=1e-9), CG(max_steps=5), CG(max_steps=2, rtol=1e-6)]),
    st.booleans(),
)
def test_a_task_does_not_notice_its_neighbours(n, seed, kinds, solver, front):
    own = spd(seed, n, 50.0)
    others = [make(kind, n) for kind in kinds]
    systems = [own, *others] if front else [*others, own]
    matrices, rhs = (torch.stack(part) for part in zip(*systems, strict=True))
    together = solver.solve(unblocked(matrices), rhs)
    alone = solver.solve(unblocked(own[0][None]), own[1][None])
    mine = slice(0, 1) if front else slice(-1, None)
    assert torch.equal(together.value[mine], alone.value)
    assert torch.equal(together.status[mine], alone.status)
    assert same_numbers(together.stats, alone.stats, mine)
    places = range(1, len(systems)) if front else range(len(others))
    for place, kind in zip(places, kinds, strict=True):
        value, b = together.value[place], rhs[place]
        assert together.status[place] == NEIGHBOURS[kind]
        if NEIGHBOURS[kind] == Status.NONFINITE:
            assert torch.all(torch.isnan(value))
        else:  # b solves the identity; for the others it is the first-order direction
            assert torch.equal(value, b)


@given(st.integers(1, 8), SEEDS, st.sampled_from([(3,), (2, 3), (2, 1, 2)]))
def test_a_batch_is_its_tasks(n, seed, batch):
    matrix, b = spd(seed, n, 10.0, batch)
    kappas = torch.logspace(0, 3, math.prod(batch), dtype=F64).reshape(*batch, 1, 1)
    matrix = matrix + torch.eye(n, dtype=F64) / kappas
    solution = CG(rtol=1e-8).solve(unblocked(matrix), b)
    exact = solve(matrix.numpy(), b.numpy())
    assert np.all(norm(solution.value.numpy() - exact) <= 1e-6 * norm(exact))
    for index in np.ndindex(*batch):
        alone = CG(rtol=1e-8).solve(unblocked(matrix[index][None]), b[index][None])
        assert torch.equal(solution.value[index], alone.value[0])
        assert torch.equal(solution.status[index], alone.status[0])
        first = {name: number[0] for name, number in alone.stats.items()}
        assert same_numbers(solution.stats, first, index)


def test_easy_tasks_stop_while_hard_ones_go_on():
    matrix = torch.stack([torch.eye(12, dtype=F64), spd(0, 12, 1e4)[0]])
    b = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 12)))
    _, status, stats = linear_solve(Dense(matrix), b, CG(rtol=1e-10))
    assert status.tolist() == [0, 0]
    assert stats["steps"][0] == 1
    assert stats["steps"][1] >= 12


@pytest.mark.parametrize("solver", [CG(rtol=1e-9), CG(max_steps=4)])
def test_under_vmap(solver):
    matrix, b = spd(0, 6, 30.0, (2, 3))
    matrix[0, 1] = -torch.eye(6, dtype=F64)
    matrix[1, 2] = math.nan
    expected = solver.solve(Dense(matrix).linearize(), b)

    def one(matrix, b):
        return solver.solve(Dense(matrix).linearize(), b)

    for got in (
        torch.func.vmap(one)(matrix, b),
        torch.func.vmap(torch.func.vmap(one))(matrix, b),
    ):
        assert torch.allclose(got.value, expected.value, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert torch.equal(got.status, expected.status)
        assert torch.equal(got.stats["steps"], expected.stats["steps"])


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


# -- negative curvature ----------------------------------------------------------------------------


@given(st.integers(2, 10), SEEDS, st.integers(1, 3), st.booleans(), st.sampled_from([None, 1e-10]))
def test_negative_curvature_keeps_the_iterate_of_plain_cg(n, seed, negative, preconditioned, rtol):
    rng = np.random.default_rng(seed)
    eigenvalues = np.concatenate([-rng.uniform(0.1, 1, min(negative, n - 1)), rng.uniform(1, 3, n)])
    matrix, b = spd(seed, n, eigenvalues=eigenvalues[:n])
    M, precondition = np.eye(n), lambda r: r
    if preconditioned:
        matrix, precondition = with_diagonal(matrix, seed)
        M = np.linalg.inv(precondition(torch.eye(n, dtype=F64)).numpy())
    expected, steps, met = numpy_cg(matrix.numpy(), b.numpy(), n, M)
    if steps == 0:
        expected = np.linalg.solve(M, b.numpy())
    solver = CG(max_steps=n, rtol=rtol, min_curvature=0.0)
    x, status, stats = solver.solve(Linearized(Dense(matrix).mv, precondition), b)
    true = norm(b.numpy() - matrix.numpy() @ x.numpy())
    solved = rtol is None or true <= rtol * norm(b.numpy()) * (1 + 1e-6)
    otherwise = Status.SUCCESS if solved else Status.MAX_STEPS
    assert status == (Status.NEGATIVE_CURVATURE if met else otherwise)
    if met:
        assert stats["steps"] == steps
        assert norm(x.numpy() - expected) <= 1e-6 * norm(expected)
    assert torch.isfinite(x).all()


@given(st.integers(2, 8), SEEDS, st.floats(0.01, 0.99), st.integers(1, 8))
def test_min_curvature_is_measured_against_the_proximal_term(n, seed, floor, steps):
    """Plain CG which forms `p.Mp` stops at the same step with the same iterate."""
    rng = np.random.default_rng(seed)
    prox = spd(seed + 1, n, 4.0)[0].numpy()
    data, b = spd(seed, n, eigenvalues=rng.uniform(-0.3, 1, n))
    matrix = data + torch.from_numpy(prox)
    inverse = torch.from_numpy(np.linalg.inv(prox))
    steps = min(n, steps)
    expected, done, met = numpy_cg(matrix.numpy(), b.numpy(), steps, prox, floor)
    solver = CG(max_steps=steps, min_curvature=floor)
    x, status, stats = solver.solve(Linearized(Dense(matrix).mv, Dense(inverse).mv), b)
    assert status == (Status.NEGATIVE_CURVATURE if met else Status.SUCCESS)
    assert stats["steps"] == done
    if done == 0:
        expected = inverse.numpy() @ b.numpy()
    assert norm(x.numpy() - expected) <= 1e-7 * norm(expected)


@pytest.mark.parametrize("lam", [0.5, 4.0])
@pytest.mark.parametrize(("share", "floor"), [(0.09, 0.1), (0.11, 0.1), (0.01, 0.0), (0.5, 0.6)])
def test_min_curvature_is_a_share_of_lam(share, floor, lam):
    """Along an eigenvector with eigenvalue `share lam`: too little, or a solve `1 / share` long."""
    matrix = torch.diag(torch.tensor([share * lam - lam, 1.0], dtype=F64))
    b = torch.tensor([1.0, 0.0], dtype=F64)
    operator = Linearized(Dense(matrix + lam * torch.eye(2, dtype=F64)).mv, lambda r: r / lam)
    x, status, _ = CG(rtol=1e-8, min_curvature=floor).solve(operator, b)
    if share <= floor:
        assert status == Status.NEGATIVE_CURVATURE
        assert x.tolist() == pytest.approx([1 / lam, 0.0])
    else:
        assert status == Status.SUCCESS
        assert x.tolist() == pytest.approx([1 / (share * lam), 0.0])


@pytest.mark.parametrize(("settings", "floor"), [({"max_steps": 3}, 0.1), ({"rtol": 1e-8}, 0.0)])
def test_min_curvature_by_default_is_for_few_steps_and_not_for_a_tolerance(settings, floor):
    """One step to either side of a tenth of M = 1; with a tolerance even a thousandth is solved."""
    for share in (0.099, 0.101, 0.001):
        operator = Linearized(lambda r: share * r, lambda r: r.clone())  # noqa: B023
        x, status, _ = CG(**settings).solve(operator, torch.ones(1, dtype=F64))
        assert x.item() == pytest.approx(1.0 if share < floor else 1 / share)
        expected = Status.NEGATIVE_CURVATURE if share < floor else Status.SUCCESS
        assert status == expected


@given(st.integers(1, 12), SEEDS, st.sampled_from([0.0, 0.1, 0.99]))
def test_min_curvature_changes_nothing_where_the_data_term_is_convex(n, seed, floor):
    data, b = spd(seed, n, 100.0, (2,))
    x, status, _ = linear_solve(Damped(Dense(data), 0.3), b, CG(rtol=1e-9, min_curvature=floor))
    assert status.tolist() == [0, 0]
    exact = solve(data.numpy() + 0.3 * np.eye(n), b.numpy())
    assert np.all(norm(x.numpy() - exact) <= 1e-8 * norm(exact))


@given(st.integers(2, 12), SEEDS)
def test_min_curvature_does_not_count_for_a_bare_matrix(n, seed):
    matrix, b = spd(seed, n, 1e3)
    plain, strict = (linear_solve(Dense(matrix), b, CG(min_curvature=c)) for c in (0.0, 0.9))
    assert torch.equal(plain.value, strict.value)
    assert strict.status == Status.SUCCESS


def test_the_kept_iterate_is_neither_zero_nor_the_first_order_direction():
    """The directions of positive curvature seen before are used."""
    matrix = torch.diag(torch.tensor([4.0, 2.0, -0.1], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.3], dtype=F64)
    expected, steps, met = numpy_cg(matrix.numpy(), b.numpy(), 3)
    assert met
    assert steps == 2
    x, status, stats = linear_solve(Dense(matrix), b, CG(rtol=1e-8))
    assert status == Status.NEGATIVE_CURVATURE
    assert stats["steps"] == 2
    assert np.allclose(x.numpy(), expected, rtol=1e-10)


@given(st.integers(1, 10), SEEDS, BATCH, st.sampled_from([CG(), CG(max_steps=3), CG(rtol=1e-3)]))
def test_failure_at_the_first_iteration_gives_b(n, seed, batch, solver):
    matrix, b = spd(seed, n, batch=batch)
    x, status, stats = linear_solve(Dense(-matrix), b, solver)
    assert torch.equal(x, b)
    assert torch.equal(status, torch.full_like(status, Status.NEGATIVE_CURVATURE))
    assert torch.equal(stats["steps"], torch.zeros_like(stats["steps"]))


@given(st.integers(1, 10), SEEDS, BATCH)
def test_no_steps_give_the_first_order_direction(n, seed, batch):
    matrix, b = spd(seed, n, batch=batch)
    fixed = linear_solve(Dense(matrix), b, CG(max_steps=0))
    assert torch.equal(fixed.value, b)
    assert torch.equal(fixed.status, torch.zeros_like(fixed.status))
    asked = linear_solve(Dense(matrix), b, CG(max_steps=0, rtol=1e-3))
    assert torch.equal(asked.value, b)
    assert torch.equal(asked.status, torch.full_like(asked.status, Status.MAX_STEPS))
    damped = linear_solve(Damped(Dense(matrix), 4.0), b, CG(max_steps=0))
    assert torch.equal(damped.value, b / 4)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_first_order_direction_of_a_proximal_objective_is_b_over_lam(batch):
    lam = 0.25
    problem = indefinite(batch, lam=lam)
    phi = problem.flat()
    negative = np.linalg.eigh(problem.data[0][0].numpy())[1][..., 0]  # of negative curvature
    b = torch.from_numpy(negative * 3)
    x, status, _ = linear_solve(Hessian(problem.bind(), phi), b, CG(rtol=1e-6))
    assert torch.equal(status, torch.full_like(status, Status.NEGATIVE_CURVATURE))
    assert torch.equal(x, b / lam)
    assert torch.equal(
        linear_solve(Hessian(problem.bind(), phi), b, CG(max_steps=0)).value, b / lam
    )


def test_the_first_order_direction_of_a_vector_lam():
    problem = vector_lam((3,))
    b = problem.flat()
    x = linear_solve(Hessian(problem.bind(), b), b, CG(max_steps=0)).value
    assert torch.equal(x, b / problem.theta[1])


# -- an honest status ------------------------------------------------------------------------------


@given(SIZES, SEEDS, st.floats(0, 3), st.integers(1, 30), st.floats(-10, -1), BATCH)
def test_the_status_is_what_the_true_residual_says(n, seed, log_kappa, steps, log_rtol, batch):
    rtol = 10**log_rtol
    matrix, b = spd(seed, n, 10**log_kappa, batch)
    x, status, stats = linear_solve(Dense(matrix), b, CG(max_steps=steps, rtol=rtol))
    true = norm(b.numpy() - product(matrix.numpy(), x.numpy()))
    size = norm(b.numpy())
    assert np.allclose(stats["residual_norm"].numpy(), true, rtol=1e-6, atol=1e-12 * size.max())
    assert np.allclose(stats["rhs_norm"].numpy(), size, rtol=1e-14)
    slack = 1e-12 * size
    for code, residual, target in np.nditer([status.numpy(), true, rtol * size]):
        if code == Status.SUCCESS:
            assert residual <= target + slack.max()
        else:
            assert code == Status.MAX_STEPS
            assert residual >= target - slack.max()
    at_most = stats["steps"].numpy() == steps
    assert np.all((status.numpy() == Status.SUCCESS) | at_most)


@given(SIZES, SEEDS, st.floats(-8, 0))
def test_absolute_tolerance(n, seed, log_atol):
    atol = 10**log_atol
    matrix, b = spd(seed, n, 10.0, (3,))
    b = b * torch.tensor([[1e-3], [1.0], [1e3]], dtype=F64)
    x, status, stats = linear_solve(Dense(matrix), b, CG(atol=atol, rtol=0.0))
    assert status.tolist() == [0, 0, 0]
    true = norm(b.numpy() - product(matrix.numpy(), x.numpy()))
    assert np.all(true <= atol * (1 + 1e-6) + 1e-12 * norm(b.numpy()))
    small = norm(b.numpy()) <= atol
    assert np.array_equal(stats["steps"].numpy() == 0, small)
    assert torch.equal(x[small], torch.zeros_like(x[small]))


def test_the_looser_of_the_tolerances_counts():
    matrix, b = spd(0, 20, 1e3)
    steps = {
        settings: linear_solve(Dense(matrix), b, CG(rtol=settings[0], atol=settings[1])).stats[
            "steps"
        ]
        for settings in [(1e-10, 0.0), (1e-2, 0.0), (1e-10, 0.3), (1e-2, 1e-8)]
    }
    assert steps[1e-2, 0.0] == steps[1e-2, 1e-8] < steps[1e-10, 0.0]
    assert steps[1e-10, 0.3] < steps[1e-10, 0.0]


@given(SEEDS, st.sampled_from([1e-2, 1e-3, 1e-6]), st.sampled_from([1e4, 1e6, 1e8]))
def test_single_precision_does_not_claim_what_it_cannot_do(seed, rtol, kappa):
    """The recurrence meets a tolerance that `b - A x` misses by a factor of hundreds."""
    matrix, b = spd(seed, 20, kappa, (4,), torch.float32)
    x, status, _ = linear_solve(Dense(matrix), b, CG(rtol=rtol))
    A, x, b = (t.double().numpy() for t in (matrix, x, b))
    meets = norm(b - product(A, x)) <= 2 * rtol * norm(b)
    claims = status.numpy() == Status.SUCCESS
    assert np.all(meets | ~claims)
    assert np.all(np.isfinite(x))


def test_kappa_1e8_in_single_precision_is_not_success():
    matrix, b = spd(0, 30, 1e8, dtype=torch.float32)
    assert linear_solve(Dense(matrix), b, CG(rtol=1e-6)).status == Status.MAX_STEPS


def test_a_fixed_number_of_steps_that_was_asked_for_is_success():
    matrix, b = spd(0, 30, 1e3)
    _, status, stats = linear_solve(Dense(matrix), b, CG(max_steps=4))
    assert status == Status.SUCCESS
    assert stats["steps"] == 4
    assert stats["residual_norm"] > 1e-3 * stats["rhs_norm"]


# -- settings, cost, devices -----------------------------------------------------------------------


def test_defaults():
    """`min(10 n, 1000)` steps to a relative residual of 1e-6."""
    loose, b = spd(0, 40, 100.0)
    _, status, stats = linear_solve(Dense(loose), b)
    assert status == Status.SUCCESS
    assert 1e-9 < stats["residual_norm"] / stats["rhs_norm"] <= 1e-6


@pytest.mark.parametrize(("n", "most"), [(3, 30), (150, 1000)])
def test_default_max_steps(n, most):
    matrix, b = spd(0, n)
    operator, calls = counted(matrix)
    CG(check_every=10_000).solve(operator, b)  # never looks whether it is done
    assert len(calls) in (most, most + 1)  # one may confirm the residual


@pytest.mark.parametrize("check_every", [1, 3, 7])
def test_check_every_changes_the_cost_and_not_the_result(check_every):
    matrix, b = spd(0, 20, 100.0, (3,))
    reference, calls = counted(matrix)
    expected = CG(rtol=1e-6).solve(reference, b)
    most = int(expected.stats["steps"].max())
    confirming = len(calls) - most
    assert confirming in (0, 1)
    operator, calls = counted(matrix)
    got = CG(rtol=1e-6, check_every=check_every).solve(operator, b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.stats["steps"], expected.stats["steps"])
    assert len(calls) - confirming == math.ceil(most / check_every) * check_every


@pytest.mark.parametrize("max_steps", [0, 1, 5])
def test_fixed_steps_cost_one_product_each(max_steps):
    matrix, b = spd(0, 8)
    operator, calls = counted(matrix)
    CG(max_steps=max_steps).solve(operator, b)
    assert len(calls) == max_steps


def test_fixed_steps_never_ask_the_device(monkeypatch):
    """A tensor read by Python is a synchronisation, which is dear on all devices but the CPU."""
    matrix, b = spd(0, 6, 10.0, (3,))
    monkeypatch.setattr(_masks, "_looking_is_free", lambda mask: False)

    def refuse(*args):
        raise AssertionError("a host synchronisation")

    for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    solution = linear_solve(Dense(matrix), b, CG(max_steps=4))
    with pytest.raises(AssertionError, match="a host synchronisation"):
        linear_solve(Dense(matrix), b, CG(rtol=1e-3))
    monkeypatch.undo()
    assert solution.status.tolist() == [0, 0, 0]


@pytest.mark.parametrize("solver", [CG(max_steps=3), CG(max_steps=3, rtol=1e-3), CG(max_steps=0)])
def test_on_the_meta_device(solver):
    matrix = torch.empty(2, 5, 5, device="meta")
    x, status, stats = linear_solve(Dense(matrix), torch.empty(2, 5, device="meta"), solver)
    assert (x.shape, x.device.type) == ((2, 5), "meta")
    assert (status.shape, status.dtype) == ((2,), torch.int8)
    assert stats["steps"].dtype == torch.int32


def test_leaves_its_inputs_alone_and_keeps_no_graph():
    matrix, b = spd(0, 5)
    copies = matrix.clone(), b.clone()
    b.requires_grad_()
    x = CG(max_steps=3).solve(Dense(matrix).linearize(), b).value
    assert not x.requires_grad
    assert torch.equal(matrix, copies[0])
    assert torch.equal(b, copies[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "Invalid max_steps: -1: it must be >= 0"),
        ({"rtol": -1e-9}, "Invalid rtol: -1e-09: it must lie in"),
        ({"rtol": 1.0}, "Invalid rtol: 1.0"),
        ({"rtol": math.nan}, "Invalid rtol: nan"),
        ({"atol": -1.0}, "Invalid atol: -1.0"),
        ({"atol": math.inf}, "Invalid atol: inf: it must be finite"),
        ({"atol": math.nan}, "Invalid atol: nan"),
        ({"check_every": 0}, "Invalid check_every: 0: it must be >= 1"),
        ({"min_curvature": -0.1}, r"Invalid min_curvature: -0.1: it must lie in \[0, 1\)"),
        ({"min_curvature": 1.0}, "Invalid min_curvature: 1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        CG(**settings)
