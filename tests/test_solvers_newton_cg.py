"""Newton-CG as an inner solver: one step on a quadratic, SciPy's answers, and where it falls back."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import (
    CG,
    Armijo,
    FixedStep,
    GaussNewton,
    LinearSolver,
    Solution,
    Status,
    minimize,
    newton_cg,
)
from inner_solvers import EXACT, F64, SEEDS, gradients, run
from problems import BATCHES, CONVEX, indefinite, logistic, quadratic, tanh_mlp, vector_lam


@given(SEEDS, st.floats(0, 3), st.sampled_from(BATCHES), st.sampled_from([Armijo(), FixedStep()]))
def test_newton_cg_needs_one_step_on_a_quadratic(seed, log_kappa, batch, line_search):
    problem = quadratic(10**log_kappa, batch, seed=seed)
    solver = newton_cg(linear_solver=EXACT, line_search=line_search, tol=1e-6)
    value, status, stats = run(problem, solver)
    assert torch.equal(status, torch.zeros_like(status))
    assert torch.equal(stats["steps"], torch.ones_like(stats["steps"]))
    assert torch.allclose(value, problem.minimiser, rtol=1e-6, atol=1e-6 * 10**log_kappa)


@pytest.mark.parametrize("curvature", ["Hessian", "GaussNewton"])
@pytest.mark.parametrize("name", ["ridge kappa=1e2", "least_squares", "vector_lam", "matrix_lam"])
def test_newton_cg_needs_one_step_on_least_squares(name, curvature):
    problem = CONVEX[name]((3,))
    settings = {"curvature": GaussNewton} if curvature == "GaussNewton" else {}
    value, status, stats = run(problem, newton_cg(linear_solver=EXACT, tol=1e-8, **settings))
    assert status.tolist() == [0, 0, 0]
    assert stats["steps"].tolist() == [1, 1, 1]
    assert torch.allclose(
        problem.flat(value), problem.flat(problem.minimiser), rtol=1e-6, atol=1e-7
    )


def test_newton_cg_on_logistic_regression_is_scipys_answer():
    problem = logistic()
    x, y = (t.numpy() for t in problem.data)
    anchor, lam = problem.theta[0].numpy(), problem.theta[1].item()

    def objective(phi):
        z = x @ phi
        fit = (np.logaddexp(0, z) - y * z).mean() + lam / 2 * ((phi - anchor) ** 2).sum()
        return fit, x.T @ (1 / (1 + np.exp(-z)) - y) / len(y) + lam * (phi - anchor)

    theirs = scipy.optimize.minimize(
        objective, problem.init.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10}
    ).x
    ours = run(problem, newton_cg(linear_solver=EXACT, tol=1e-11)).value
    assert np.allclose(ours.numpy(), theirs, atol=1e-8)
    assert np.allclose(ours.numpy(), problem.minimiser.numpy(), atol=1e-10)


def test_newton_cg_converges_quadratically():
    problem = logistic(lam=0.05)
    errors = [
        (run(problem, newton_cg(linear_solver=EXACT, max_steps=k)).value - problem.minimiser).norm()
        for k in range(6)
    ]
    for before, after in zip(errors[1:], errors[2:], strict=False):
        assert after <= 5 * before**2 + 1e-13
    assert errors[-1] < 1e-10


@pytest.mark.parametrize("curvature", ["Hessian", "GaussNewton"])
def test_newton_cg_reaches_a_stationary_point_of_a_network(curvature):
    problem = tanh_mlp((3,), lam=0.5)
    settings = {"curvature": GaussNewton} if curvature == "GaussNewton" else {}
    solver = newton_cg(linear_solver=CG(rtol=1e-6), max_steps=100, tol=1e-8, **settings)
    value, status, _ = run(problem, solver)
    assert status.tolist() == [0, 0, 0]
    assert gradients(problem, value).norm(dim=-1).max() <= 1.01e-8


@given(SEEDS)
def test_newton_cg_descends_where_the_curvature_is_negative(seed):
    problem = indefinite((4,), seed=seed)
    bound = problem.bind()
    value, status, _ = run(problem, newton_cg(max_steps=1))
    assert status.tolist() == [0] * 4
    assert torch.all(bound.values(value) < bound.values(problem.init))


@dataclass(frozen=True)
class Misleading(LinearSolver):
    """Hands back a multiple of what it was given, or NaN."""

    factor: float
    stats_names = ()

    def solve(self, operator, b):
        return Solution(self.factor * b, torch.zeros(b.shape[:-1], dtype=torch.int8), {})


@pytest.mark.parametrize("factor", [-1.0, math.nan])
def test_newton_cg_falls_back_to_the_preconditioned_gradient(factor):
    """Where the solver's direction climbs or is none: `-grad / lam`."""
    problem = vector_lam((3,))
    solver = newton_cg(linear_solver=Misleading(factor), line_search=FixedStep(0.1), max_steps=1)
    got = run(problem, solver).value
    gradient = gradients(problem, problem.init)
    assert torch.allclose(got, problem.init - 0.1 * gradient / problem.theta[1], rtol=1e-9)


def test_newton_cg_uses_the_solvers_direction_where_it_descends():
    problem = vector_lam((3,))
    solver = newton_cg(linear_solver=Misleading(2.0), line_search=FixedStep(0.1), max_steps=1)
    expected = problem.init - 0.2 * gradients(problem, problem.init)
    assert torch.allclose(run(problem, solver).value, expected, rtol=1e-9)


def test_newton_cg_with_gauss_newton_wants_structure():
    with pytest.raises(TypeError, match="GaussNewton needs the structure"):
        run(quadratic(), newton_cg(curvature=GaussNewton))


def test_a_line_search_that_fails_is_reported_and_keeps_the_iterate():
    """Ten Newton steps at once overshoot a parabola, and not an eighth power."""

    def powers(phi, theta, p):
        return ((phi**2) ** (p / 2)).sum()

    init = torch.ones(3, 1, dtype=F64)
    exponents = torch.tensor([2.0, 8.0, 2.0], dtype=F64)
    solver = newton_cg(line_search=Armijo(lr=10.0, max_trials=1), max_steps=1)
    value, status, stats = minimize(powers, init, (), exponents, solver=solver, batch_ndim=1)
    assert status.tolist() == [Status.NO_DESCENT, Status.SUCCESS, Status.NO_DESCENT]
    assert value[:, 0].tolist() == pytest.approx([1.0, 1 - 10 / 7, 1.0])
    assert value[0].item() == 1.0
    assert stats["steps"].tolist() == [0, 1, 0]


def test_newton_cg_takes_five_cg_steps_by_default_as_in_the_paper():
    assert newton_cg().linear_solver == CG(max_steps=5)
