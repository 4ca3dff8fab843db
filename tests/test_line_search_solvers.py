"""L-BFGS and nonlinear CG against SciPy and dense algebra."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_optim import (
    CG,
    Armijo,
    InnerProblem,
    Status,
    StrongWolfe,
    attach,
    lbfgs,
    minimize,
    newton_cg,
    nonlinear_cg,
)
from implicit_optim._solver.lbfgs import History
from inner_solvers import F64, SEEDS, run
from problems import BATCHES, logistic, quadratic, ridge, tanh_mlp

SOLVERS = [lbfgs, nonlinear_cg]
each = pytest.mark.parametrize("make", SOLVERS)


@settings(max_examples=10)
@given(SEEDS, st.floats(0, 2), st.sampled_from(BATCHES), st.integers(1, 6))
def test_nonlinear_cg_takes_the_steps_of_linear_cg(seed, log_kappa, batch, steps):
    """Of conjugate gradients written in NumPy, with an almost exact line search."""
    problem = quadratic(10**log_kappa, batch, seed=seed)
    solver = nonlinear_cg(
        line_search=StrongWolfe(c1=1e-12, c2=1e-9, max_trials=30), max_steps=steps
    )
    value, status, _ = run(problem, solver)
    assert torch.equal(status, torch.zeros_like(status))
    A, b = problem.data[0].numpy(), (problem.data[1] + problem.theta).numpy()
    for i in problem.indices():
        x = problem.init[i].numpy().copy()
        r = b[i] - A[i] @ x
        d = r.copy()
        for _ in range(steps):
            if r @ r == 0:  # solved to the last digit
                break
            t = (r @ r) / (d @ A[i] @ d)
            x, new = x + t * d, r - t * A[i] @ d
            d, r = new + (new @ new) / (r @ r) * d, new
        scale = 1 + np.abs(problem.minimiser[i].numpy()).max()
        assert np.abs(value[i].numpy() - x).max() <= 1e-5 * scale * 10**log_kappa**0.5
    if steps == 6:
        assert torch.allclose(value, problem.minimiser, atol=1e-4 * 10**log_kappa)


@each
@pytest.mark.parametrize("kappa", [1.0, 10.0])
def test_steps_beyond_the_solution_do_no_harm(make, kappa):
    """Of 60 steps most are taken where rounding alone is left: the solution stays, and no task fails."""
    problem = quadratic(kappa, (40,), seed=1)
    value, status, stats = run(problem, make(max_steps=60))
    assert status.tolist() == [0] * 40 and stats["steps"].tolist() == [60] * 40
    scale = 1 + problem.minimiser.norm(dim=-1)
    assert ((value - problem.minimiser).norm(dim=-1) <= 1e-6 * scale).all()


@settings(max_examples=10)
@given(SEEDS, st.floats(0, 2), st.sampled_from(BATCHES), st.sampled_from([3, 10]))
def test_lbfgs_reaches_the_dense_solution(seed, log_kappa, batch, memory):
    problem = quadratic(10**log_kappa, batch, seed=seed)
    value, status, _ = run(problem, lbfgs(memory=memory, max_steps=200, tol=1e-8))
    assert torch.equal(status, torch.zeros_like(status))
    error = (value - problem.minimiser).norm(dim=-1)
    assert (error <= 1.01e-8 * 10**log_kappa).all()


@given(SEEDS, st.integers(1, 5), st.sampled_from(BATCHES))
def test_two_loops_are_the_dense_formula(seed, pairs, batch):
    """``H' = V^T H V + rho s s^T``, ``V = I - rho y s^T``, from gamma I; a bad pair changes nothing."""
    rng = np.random.default_rng(seed)
    n, memory = 4, 3
    matrix = quadratic(10.0, batch, n=n, seed=seed).data[0]
    history = History.empty(torch.zeros(*batch, n, dtype=F64), memory)
    kept = []
    for _ in range(pairs):
        s = torch.from_numpy(rng.standard_normal((*batch, n)))
        y = (matrix @ s[..., None])[..., 0]
        good = torch.from_numpy(np.asarray(rng.uniform(size=batch) < 0.7))
        y = torch.where(good[..., None], y, -y)
        history = history.add(s, y)
        kept.append((s.numpy(), y.numpy(), good.numpy()))
    grad = torch.from_numpy(rng.standard_normal((*batch, n)))
    got = history.direction(grad, memory).numpy()
    for i in np.ndindex(*batch):
        mine = [(s[i], y[i]) for s, y, good in kept if good[i]][-memory:]
        norm = np.linalg.norm(grad[i].numpy())
        H = np.eye(n) * min(1, 1 / norm)
        if mine:
            s, y = mine[-1]
            H = np.eye(n) * (s @ y) / (y @ y)
        for s, y in mine:
            V = np.eye(n) - np.outer(y, s) / (s @ y)
            H = V.T @ H @ V + np.outer(s, s) / (s @ y)
        assert np.allclose(got[i], -H @ grad[i].numpy(), rtol=1e-9, atol=1e-11)


@each
def test_a_network_comes_to_scipys_minimum(make):
    problem = tanh_mlp()
    bound = problem.bind()
    start = problem.flat()

    def objective(x):
        grad, value = bound.grad_and_value(torch.from_numpy(x))
        return value.item(), grad.numpy()

    theirs = scipy.optimize.minimize(
        objective, start.numpy(), jac=True, method="L-BFGS-B", options={"gtol": 1e-11, "ftol": 0.0}
    )
    value, status, _ = run(problem, make(max_steps=200, tol=1e-10))
    assert status == Status.SUCCESS
    assert np.abs(problem.flat(value).numpy() - theirs.x).max() <= 1e-8
    assert bound.values(problem.flat(value)).item() <= theirs.fun + 1e-12


@each
@pytest.mark.parametrize("problem", [logistic, tanh_mlp], ids=["logistic", "tanh_mlp"])
def test_a_batch_is_its_tasks(make, problem):
    problem = problem((2, 3))
    value, status, stats = run(problem, make(max_steps=5))
    flat = problem.flat(value)
    for i in problem.indices():
        task = problem.task(i)
        alone = run(task, make(max_steps=5))
        torch.testing.assert_close(flat[i], task.flat(alone.value), rtol=1e-12, atol=1e-12)
        assert status[i] == alone.status == Status.SUCCESS
        assert stats["steps"][i] == alone.stats["steps"]


@each
def test_the_gradient_behind_it_is_that_behind_newton_cg(make):
    problem = logistic((3,))
    anchor, lam = (t.clone().requires_grad_() for t in problem.theta)
    v = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for solver in (
        make(max_steps=200, tol=1e-11),
        newton_cg(linear_solver=CG(rtol=1e-12), tol=1e-11),
    ):
        phi = run(problem, solver).value
        phi = attach(
            phi, problem.objective, (anchor, lam), *problem.data,
            linear_solver=CG(rtol=1e-13), batch_ndim=1,
        )  # fmt: skip
        gradients.append(torch.autograd.grad((v * phi).sum(), (anchor, lam)))
    for ours, newton, exact in zip(*gradients, problem.meta_gradient(v), strict=True):
        torch.testing.assert_close(ours, newton, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)


@each
def test_the_status_is_honest(make):
    """In turn: solved, lower for ever, NaN from the start, a gradient that lies, solved at the start."""

    def objective(phi, theta, kind, factor):
        lies = phi.detach().abs().sum() - 2 * phi.sum() + 2 * phi.detach().sum()
        cases = [
            (phi - theta).cosh().sum(),
            -phi.exp().sum(),
            phi.sum(),
            lies,
            phi.sum() * 0,
        ]
        return sum(torch.where(kind == i, factor * case, 0.0) for i, case in enumerate(cases))

    init = torch.ones(5, 2, dtype=F64)
    factor = torch.tensor([1.0, 1.0, math.nan, 1.0, 1.0], dtype=F64)
    args = (objective, init, torch.zeros(2, dtype=F64), torch.arange(5), factor)
    value, status, stats = minimize(*args, solver=make(max_steps=40, tol=1e-9), batch_ndim=1)
    assert status[[0, 4]].tolist() == [Status.SUCCESS, Status.SUCCESS]
    assert status[2:4].tolist() == [Status.NONFINITE, Status.NO_DESCENT]
    assert status[1] != Status.SUCCESS
    assert torch.equal(value[2:], init[2:]) and stats["steps"][2:].tolist() == [0, 0, 0]
    assert value[0].abs().max() <= 1e-9 and value.isfinite().all()
    few = minimize(*args, solver=make(max_steps=1, tol=1e-9), batch_ndim=1).status
    assert few[0] == Status.MAX_STEPS
    fixed = minimize(*args, solver=make(max_steps=1), batch_ndim=1)
    assert fixed.status[[0, 4]].tolist() == [0, 0] and torch.equal(fixed.value[4], init[4])


@each
def test_a_task_that_has_stopped_costs_no_trials(make, monkeypatch):
    """A hopeless task beside a slow one: the evaluations are those of the slow one alone."""
    calls = []
    evaluate = InnerProblem.grad_and_value
    monkeypatch.setattr(
        InnerProblem, "grad_and_value", lambda self, phi: (calls.append(1), evaluate(self, phi))[1]
    )
    slow = ridge(1e2, (2,))
    x, y = slow.data
    run(slow, make(max_steps=12))
    together = len(calls)
    y = y.clone()
    y[1, 0] = math.nan
    calls.clear()
    args = (slow.objective, slow.init, slow.theta, x, y)
    assert minimize(*args, solver=make(max_steps=12), batch_ndim=1).status.tolist() == [0, 4]
    assert len(calls) <= together + 12


def test_a_quasi_newton_step_costs_one_gradient(monkeypatch):
    """The loop takes the gradient at the iterate from the last trial."""
    calls = []
    evaluate = InnerProblem.grad_and_value
    monkeypatch.setattr(
        InnerProblem, "grad_and_value", lambda self, phi: (calls.append(1), evaluate(self, phi))[1]
    )
    _, status, stats = run(ridge(1e2), lbfgs(tol=1e-6))
    assert status == Status.SUCCESS
    assert len(calls) <= stats["steps"] + 3


@pytest.mark.parametrize(
    "solver",
    [
        lbfgs(line_search=Armijo(), tol=1e-8),
        lbfgs(line_search=StrongWolfe(c2=0.1), tol=1e-8),
        nonlinear_cg(line_search=StrongWolfe(c2=0.4), tol=1e-8),
    ],
    ids=str,
)
def test_other_searches(solver):
    problem = logistic((3,))
    value, status, _ = run(problem, solver)
    assert status.tolist() == [0, 0, 0]
    assert (value - problem.minimiser).abs().max() < 1e-7


def test_newton_cg_with_strong_wolfe():
    problem = logistic((2, 3))
    solver = newton_cg(linear_solver=CG(rtol=1e-12), line_search=StrongWolfe(), tol=1e-10)
    value, status, _ = run(problem, solver)
    assert torch.equal(status, torch.zeros_like(status))
    assert (value - problem.minimiser).abs().max() < 1e-9
