"""minimize with every rule: the minimiser, when it stops, and what it reports per task."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from implicit_optim import (
    CG,
    Status,
    agd,
    from_torch,
    gd,
    lbfgs,
    minimize,
    newton_cg,
    nonlinear_cg,
)
from inner_solvers import EXACT, FEW, RULES, STEEPNESS, gradients, parabola_args, parabolas, run
from problems import CONVEX, logistic, quadratic, ridge

CONVERGING = {
    "gd": lambda mu, L: gd(lr=2 / (mu + L), max_steps=3000, tol=1e-9),
    "agd": lambda mu, L: agd(strong_convexity=mu, smoothness=L, max_steps=600, tol=1e-9),
    "newton_cg": lambda mu, L: newton_cg(linear_solver=EXACT, tol=1e-9),
    "newton_cg, 2 CG steps": lambda mu, L: newton_cg(
        linear_solver=CG(max_steps=2), max_steps=500, tol=1e-9
    ),
    "lbfgs": lambda mu, L: lbfgs(tol=1e-9),
    "nonlinear_cg": lambda mu, L: nonlinear_cg(max_steps=500, tol=1e-9),
    "LBFGS": lambda mu, L: from_torch(
        torch.optim.LBFGS,
        max_steps=50,
        tol=1e-6,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=0.0,
    ),
    "SGD": lambda mu, L: from_torch(
        torch.optim.SGD, lr=1 / L, momentum=0.8, max_steps=3000, tol=1e-9
    ),
    "Adam": lambda mu, L: from_torch(torch.optim.Adam, lr=0.02, max_steps=4000, tol=1e-7),
}


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "solver", ["gd", "agd", "newton_cg", "newton_cg, 2 CG steps", "lbfgs", "nonlinear_cg"]
)
@pytest.mark.parametrize("name", CONVEX)
def test_every_rule_reaches_the_minimiser(name, solver, batch):
    problem = CONVEX[name](batch)
    mu, _ = problem.bounds
    rule = CONVERGING[solver](*problem.bounds)
    value, status, stats = run(problem, rule)
    assert torch.equal(status, torch.zeros_like(status))
    error = (problem.flat(value) - problem.flat(problem.minimiser)).norm(dim=-1)
    assert torch.all(error <= 1.01e-9 / mu)  # |phi - phi*| <= |grad| / mu
    assert torch.all(stats["grad_norm"] <= 1e-9)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("solver", ["LBFGS", "SGD", "Adam"])
@pytest.mark.parametrize("name", ["quadratic", "logistic", "least_squares", "vector_lam"])
def test_optimizers_of_torch_reach_the_same_minimiser(name, solver, batch):
    problem = CONVEX[name](batch)
    mu, _ = problem.bounds
    rule = CONVERGING[solver](*problem.bounds)
    value, status, _ = run(problem, rule)
    assert torch.equal(status, torch.zeros_like(status))
    error = (problem.flat(value) - problem.flat(problem.minimiser)).norm(dim=-1)
    assert torch.all(error <= 1.01 * rule.tol / mu)


@pytest.mark.parametrize(
    ("kappa", "make"),
    [
        (1e4, CONVERGING["agd"]),
        (1e6, lambda mu, L: newton_cg(linear_solver=CG(rtol=1e-14, max_steps=500), tol=1e-9)),
    ],
)
def test_a_bad_condition(kappa, make):
    problem = ridge(kappa)
    mu, _ = problem.bounds
    value, status, _ = run(problem, replace(make(*problem.bounds), max_steps=5000))
    assert status == Status.SUCCESS
    assert (value - problem.minimiser).norm() <= 1.01e-9 / mu


@pytest.mark.parametrize("solver", ["gd", "agd", "newton_cg", "lbfgs", "nonlinear_cg"])
def test_tol_stops_every_task_at_its_own_step(solver):
    tol = 1e-3
    problem = logistic((4,), lam=0.3)
    make = {
        "gd": lambda **s: gd(lr=0.5, **s),
        "agd": lambda **s: agd(lr=0.5, momentum=0.3, **s),
        "newton_cg": lambda **s: newton_cg(linear_solver=CG(max_steps=1), **s),
        "lbfgs": lbfgs,
        "nonlinear_cg": functools.partial(nonlinear_cg, line_search=FEW),
    }[solver]
    value, status, stats = run(problem, make(max_steps=200, tol=tol))
    steps = stats["steps"].tolist()
    assert status.tolist() == [0, 0, 0, 0]
    assert len(set(steps)) > 1
    norms = gradients(problem, value).norm(dim=-1)
    assert torch.all(norms <= tol * (1 + 1e-9))
    assert torch.allclose(stats["grad_norm"], norms, rtol=1e-6)
    for task, count in enumerate(steps):
        there = run(problem, make(max_steps=count))
        assert torch.equal(value[task], there.value[task])  # frozen to the last bit
        before = run(problem, make(max_steps=count - 1))
        assert gradients(problem, before.value).norm(dim=-1)[task] > tol


def test_a_converged_start_takes_no_step():
    problem = quadratic(10.0, (3,))
    init = problem.minimiser.clone()
    init[1] += 1
    args = (problem.objective, init, problem.theta, *problem.data)
    value, status, stats = minimize(*args, solver=gd(lr=1.0, max_steps=500, tol=1e-8), batch_ndim=1)
    assert status.tolist() == [0, 0, 0]
    assert (stats["steps"] == 0).tolist() == [True, False, True]
    assert torch.equal(value[[0, 2]], init[[0, 2]])


@pytest.mark.parametrize("name", ["gd", "agd", "newton_cg", "lbfgs", "nonlinear_cg"])
def test_a_fixed_number_of_steps_is_success(name):
    problem = logistic((3,))
    value, status, stats = run(problem, RULES[name])
    assert status.tolist() == [0, 0, 0]
    assert status.dtype == torch.int8
    assert stats["steps"].tolist() == [RULES[name].max_steps] * 3
    assert stats["steps"].dtype == torch.int32
    assert (
        gradients(problem, value).norm(dim=-1).max() > 1e-5
    )  # it stopped long before the solution


def test_grad_norm_of_fixed_steps_is_of_one_step_before():
    problem = logistic((3,))
    stats = run(problem, gd(lr=0.1, max_steps=4)).stats
    before = run(problem, gd(lr=0.1, max_steps=3)).value
    assert torch.allclose(stats["grad_norm"], gradients(problem, before).norm(dim=-1), rtol=1e-9)


def test_max_steps_is_reported_per_task():
    solver = gd(lr=0.1, max_steps=40, tol=1e-6)
    value, status, stats = minimize(parabolas, *parabola_args(), solver=solver, batch_ndim=1)
    norms = (STEEPNESS[:, None] * (value - 1)).norm(dim=-1)
    expected = [0 if norm <= 1e-6 else Status.MAX_STEPS for norm in norms.tolist()]
    assert status.tolist() == expected
    assert set(expected) == {0, Status.MAX_STEPS}
    assert [s == 40 for s in stats["steps"].tolist()] == [e == Status.MAX_STEPS for e in expected]
    assert torch.allclose(stats["grad_norm"], norms, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("solver", [gd(lr=0.1, max_steps=0), newton_cg(max_steps=0)])
def test_no_steps(solver):
    problem = quadratic(10.0, (3,))
    value, status, stats = run(problem, solver)
    assert torch.equal(value, problem.init)
    assert status.tolist() == [0, 0, 0]
    assert stats["steps"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [lambda **s: gd(lr=0.1, **s), newton_cg, lbfgs, nonlinear_cg])
def test_no_steps_with_a_tolerance(make):
    problem = quadratic(10.0, (3,))
    init = problem.init.clone()
    init[1] = problem.minimiser[1]
    args = (problem.objective, init, problem.theta, *problem.data)
    value, status, stats = minimize(*args, solver=make(max_steps=0, tol=1e-8), batch_ndim=1)
    assert torch.equal(value, init)
    assert status.tolist() == [Status.MAX_STEPS, Status.SUCCESS, Status.MAX_STEPS]
    expected = gradients(problem, init).norm(dim=-1)
    assert torch.allclose(stats["grad_norm"], expected, atol=1e-12)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4])
def test_the_last_step_counts_towards_the_tolerance(max_steps):
    """phi = 2^-k after k steps: the tolerance is met by the last one, and missed with one less."""
    for allowed, status in ((max_steps, Status.SUCCESS), (max_steps - 1, Status.MAX_STEPS)):
        solver = gd(lr=0.5, max_steps=allowed, tol=1.01 * 0.5**max_steps)
        solution = minimize(lambda p, _: p @ p / 2, torch.ones(1), (), solver=solver)
        assert solution.status == status and solution.stats["steps"] == allowed
        assert solution.value == solution.stats["grad_norm"] == 0.5**allowed


@pytest.mark.parametrize(
    "solver",
    [
        gd(lr=0.5, max_steps=200, tol=1e-6),
        newton_cg(linear_solver=EXACT, tol=1e-6),
        from_torch(torch.optim.SGD, lr=0.5, max_steps=200, tol=1e-6),
        lbfgs(tol=1e-6),
        nonlinear_cg(tol=1e-6),
    ],
    ids=["gd", "newton_cg", "from_torch", "lbfgs", "nonlinear_cg"],
)
def test_looking_less_often_changes_nothing_but_the_looks(solver, monkeypatch):
    problem = logistic(batch=(3,))
    looks = []

    def counted(running):
        looks.append(1)
        return not bool(running.any())

    monkeypatch.setattr("implicit_optim._minimize.none_running", counted)
    value, status, stats = run(problem, solver)
    often = len(looks)
    looks.clear()
    rare_value, rare_status, rare_stats = run(problem, replace(solver, check_every=4))
    assert often == int(stats["steps"].max()) + 1
    assert len(looks) == math.ceil((often - 1) / 4) + 1
    assert torch.equal(rare_value, value) and torch.equal(rare_status, status)
    assert all(torch.equal(rare_stats[name], stats[name]) for name in stats)
    with pytest.raises(ValueError, match="Invalid check_every: 0"):
        replace(solver, check_every=0)
