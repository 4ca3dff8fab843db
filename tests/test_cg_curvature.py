"""Conjugate gradients that meet negative curvature, or too little: what is kept, and what is said."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import CG, Damped, Dense, Hessian, Linearized, Status, linear_solve
from problems import BATCHES, indefinite, solve, spd, vector_lam
from systems import BATCH, F64, SEEDS, norm, with_diagonal


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


def test_negative_curvature_is_told_where_the_residual_is_within_rounding_of_the_target():
    """One step leaves 0.202 of b; the second meets negative curvature, at a target 0.5 % below."""
    A, b = torch.diag(torch.tensor([1.0, -1.0], dtype=F64)), torch.tensor([1.0, 0.1], dtype=F64)
    alpha = (b @ b) / (b @ A @ b)
    left = float((b - alpha * A @ b).norm() / b.norm())
    solution = linear_solve(Dense(A), b, CG(rtol=left / 1.005))
    torch.testing.assert_close(solution.value, alpha * b)
    assert Status(solution.status.item()) is Status.NEGATIVE_CURVATURE
