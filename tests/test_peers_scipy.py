"""Ours against SciPy: linear systems, and the meta-gradient at its minimisers."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg
import torch
from torch.autograd.functional import hessian, jacobian

import implicit_optim as iopt
from peers import EXACT, NEWTON, error_of, fresh, random
from problems import logistic, matrix_lam, ridge, spd

pytestmark = pytest.mark.usefixtures("double")

# -- SciPy: linear systems -------------------------------------------------------------------------

SYSTEMS = [(1, 1.0), (4, 10.0), (12, 1e2), (40, 1e3), (80, 1e4), (25, 1e6)]


@pytest.mark.parametrize(("n", "kappa"), SYSTEMS)
def test_linear_solve_is_scipys_dense_solve_and_its_cg(n, kappa):
    matrix, b = spd(n, n, kappa)
    dense = scipy.linalg.solve(matrix.numpy(), b.numpy(), assume_a="pos")
    theirs, info = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-10, maxiter=50 * n)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(rtol=1e-10, max_steps=50 * n))
    assert info == 0 and ours.status == iopt.Status.SUCCESS
    for x in (theirs, ours.value.numpy()):  # a residual of 1e-10 allows an error of kappa * 1e-10
        assert np.linalg.norm(x - dense) <= 1.01e-10 * kappa * np.linalg.norm(dense)


def test_a_residual_out_of_reach_is_a_success_to_scipys_cg_and_not_to_ours():
    """1e-12 at a condition number of 1e6: SciPy believes the recurrence, we look at `b - A x`."""
    matrix, b = spd(25, 25, 1e6)
    A, rhs = matrix.numpy(), b.numpy()
    theirs, info = scipy.sparse.linalg.cg(A, rhs, rtol=1e-12, maxiter=1250)
    ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(rtol=1e-12, max_steps=1250))
    for x in (theirs, ours.value.numpy()):
        assert np.linalg.norm(rhs - A @ x) > 5e-12 * np.linalg.norm(rhs)
    assert info == 0
    assert ours.status == iopt.Status.MAX_STEPS


@pytest.mark.parametrize(("n", "kappa"), SYSTEMS)
def test_each_early_iterate_is_scipys(n, kappa):
    matrix, b = spd(n, n, kappa)
    before = np.zeros(n)
    for k in range(1, min(n, 8) + 1):
        theirs, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=0, atol=0, maxiter=k)
        ours = iopt.linear_solve(iopt.Dense(matrix), b, iopt.CG(max_steps=k)).value.numpy()
        assert np.linalg.norm(ours - theirs) <= 1e-11 * np.linalg.norm(theirs), k
        assert np.linalg.norm(ours - before) > 1e-3 * np.linalg.norm(ours), k  # it did move
        before = ours


def test_iterates_on_a_proximal_hessian_are_scipys_without_a_preconditioner():
    """A scalar lam preconditions our CG, and must change no iterate."""
    problem = ridge(1e3, n=20)
    x, b = problem.data[0].numpy(), random(20)
    matrix = x.T @ x / len(x) + problem.theta[1].item() * np.eye(20)
    operator = iopt.Hessian(problem.bind(), problem.minimiser)
    for k in range(1, 9):
        theirs, _ = scipy.sparse.linalg.cg(matrix, b.numpy(), rtol=0, atol=0, maxiter=k)
        ours = iopt.linear_solve(operator, b, iopt.CG(max_steps=k)).value.numpy()
        assert np.linalg.norm(ours - theirs) <= 1e-12 * np.linalg.norm(theirs), k
    dense = scipy.linalg.solve(matrix, b.numpy(), assume_a="pos")
    ours = iopt.linear_solve(operator, b, EXACT).value.numpy()
    assert np.linalg.norm(ours - dense) <= 1e-11 * np.linalg.norm(dense)


# -- SciPy: inner solvers --------------------------------------------------------------------------

SCIPY = {
    "BFGS": {"gtol": 1e-8},
    "L-BFGS-B": {"gtol": 1e-11, "ftol": 0.0},
    "Newton-CG": {"xtol": 1e-12},
    "trust-ncg": {"gtol": 1e-7},
}

BATCHED = {
    "ridge": lambda: ridge(1e2, (3,)),
    "logistic": lambda: logistic((3,)),
    "matrix_lam": lambda: matrix_lam((3,)),
}


def scipy_minimiser(task, method):
    def value(phi):
        return task.objective(phi, task.theta, *task.data)

    known = {"jac": lambda z: jacobian(value, torch.from_numpy(z)).numpy()}
    if method in ("Newton-CG", "trust-ncg"):
        known["hess"] = lambda z: hessian(value, torch.from_numpy(z)).numpy()
    found = scipy.optimize.minimize(
        lambda z: value(torch.from_numpy(z)).item(),
        task.init.numpy(),
        method=method,
        options=SCIPY[method],
        **known,
    )
    assert np.linalg.norm(known["jac"](found.x)) <= 1e-7, found.message
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("method", SCIPY)
@pytest.mark.parametrize("name", BATCHED)
def test_scipys_minimisers_get_our_meta_gradient(name, method):
    """SciPy task by task, ours all tasks at once; the exact one from NumPy."""
    problem = BATCHED[name]()
    v = random(tuple(problem.init.shape))
    each = torch.stack([scipy_minimiser(problem.task(i), method) for i in problem.indices()])
    ours = iopt.minimize(problem.objective, *problem.args, solver=NEWTON, batch_ndim=1).value
    gradients = []
    for phi, accuracy in ((each, 1e-5), (ours, 1e-11)):  # as good as the minimiser
        assert error_of([phi], [problem.minimiser]) <= accuracy
        theta = fresh(problem.theta)
        phi = iopt.attach(
            phi, problem.objective, theta, *problem.data, linear_solver=EXACT, batch_ndim=1
        )
        gradients.append(torch.autograd.grad((phi * v).sum(), theta))
        assert error_of(gradients[-1], problem.meta_gradient(v)) <= accuracy
    assert error_of(*gradients) <= 1e-5
