"""Tasks do not disturb each other: failures of one, batches, vmap."""

import functools
import math

import pytest
import torch
from torch.func import vmap

from implicit_optim import (
    CG,
    FixedStep,
    Status,
    agd,
    from_torch,
    gd,
    lbfgs,
    minimize,
    newton_cg,
    nonlinear_cg,
)
from inner_solvers import F64, RULES, STEEPNESS, parabola_args, parabolas, run
from problems import CONVEX, logistic, vector_lam

# -- failures of one task --------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [0.0, 1e-6])
@pytest.mark.parametrize("rule", ["gd", "agd", "SGD"])
def test_divergence_is_flagged_and_stays_with_its_task(rule, tol):
    """lr = 1 is twice too much for the steepness 4 and 10."""
    make = {
        "gd": gd(lr=1.0, max_steps=800, tol=tol),
        "agd": agd(lr=1.0, momentum=0.1, max_steps=800, tol=tol),
        "SGD": from_torch(torch.optim.SGD, lr=1.0, max_steps=800, tol=tol),
    }
    value, status, stats = minimize(parabolas, *parabola_args(), solver=make[rule], batch_ndim=1)
    assert status.tolist() == [0, 0, Status.NONFINITE, Status.NONFINITE]
    assert torch.isfinite(value).all()
    assert torch.all(value[2:].abs() > 1e100)  # the last finite iterate, not the start
    assert stats["steps"][2] < 800
    good = parabola_args(STEEPNESS[:2])
    alone = minimize(parabolas, *good, solver=make[rule], batch_ndim=1)
    assert torch.equal(value[:2], alone.value)
    assert torch.equal(stats["steps"][:2], alone.stats["steps"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "solver",
    [
        gd(lr=0.1, max_steps=5),
        agd(lr=0.1, max_steps=5, tol=1e-9),
        newton_cg(max_steps=2),
        newton_cg(max_steps=2, line_search=FixedStep(), linear_solver=CG(rtol=1e-8)),
        lbfgs(max_steps=4),
        lbfgs(max_steps=20, tol=1e-6),
        nonlinear_cg(max_steps=4),
        nonlinear_cg(max_steps=20, tol=1e-4),
        from_torch(torch.optim.Adam, lr=0.1, max_steps=5),
        from_torch(torch.optim.LBFGS, max_steps=2),
        from_torch(torch.optim.LBFGS, max_steps=2, line_search_fn="strong_wolfe"),
    ],
    ids=str,
)
def test_bad_data_of_one_task_stays_there(solver, bad):
    problem = logistic((3,))
    x, y = problem.data
    x = x.clone()
    x[1, 0, 0] = bad
    args = (problem.objective, problem.init, problem.theta, x, y)
    value, status, stats = minimize(*args, solver=solver, batch_ndim=1)
    clean = run(problem, solver)
    assert status[1] == Status.NONFINITE
    assert stats["steps"][1] == 0
    assert torch.equal(value[1], problem.init[1])
    for task in (0, 2):
        assert torch.allclose(value[task], clean.value[task], rtol=1e-12)
        assert status[task] == clean.status[task]
        assert stats["steps"][task] == clean.stats["steps"][task]


@pytest.mark.parametrize("rule", [gd, functools.partial(agd, momentum=0.5)])
def test_a_last_step_beyond_the_range_is_not_taken(rule):
    """The gradient is finite there; the step is not."""
    init, theta, steepness = parabola_args(torch.tensor([1e-100, 1e10], dtype=F64))
    solver = rule(lr=1e300, max_steps=1)
    value, status, stats = minimize(parabolas, init, theta, steepness, solver=solver, batch_ndim=1)
    assert status.tolist() == [Status.SUCCESS, Status.NONFINITE]
    assert stats["steps"].tolist() == [1, 0]
    assert torch.isfinite(value).all()
    assert torch.equal(value[1], init[1])


@pytest.mark.parametrize("rule", [gd, functools.partial(agd, momentum=0.1)])
def test_an_objective_that_refuses_nan_is_never_shown_one(rule):
    """The loop that looks at its last iterate only must not fail where the careful one would not."""

    def choosy(phi, theta, a):
        if not math.isfinite(phi.detach().sum()):
            raise ValueError("not a number")
        return parabolas(phi, theta, a)

    init, theta, steepness = parabola_args()
    value, status, stats = minimize(
        choosy, init[3], theta, steepness[3], solver=rule(lr=1.0, max_steps=800)
    )
    batched = minimize(
        parabolas, *parabola_args(), solver=rule(lr=1.0, max_steps=800), batch_ndim=1
    )
    assert status == Status.NONFINITE
    assert torch.equal(value, batched.value[3])
    assert stats["steps"] == batched.stats["steps"][3]

    def broken(phi, theta, a):
        raise ValueError("always")

    with pytest.raises(ValueError, match="always"):
        minimize(broken, init[3], theta, steepness[3], solver=rule(lr=1.0))


@pytest.mark.parametrize(
    "solver", [gd(lr=0.1, max_steps=0, tol=1e-3), newton_cg(max_steps=0, tol=1)]
)
def test_a_gradient_that_is_nan_is_nonfinite_and_not_max_steps(solver):
    steepness = STEEPNESS.clone()
    steepness[1] = math.nan
    status = minimize(parabolas, *parabola_args(steepness), solver=solver, batch_ndim=1).status
    assert status[1] == Status.NONFINITE
    assert Status.NONFINITE not in status[[0, 2, 3]].tolist()


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logistic", "least_squares", "quadratic"])
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_its_tasks(rule, name):
    problem = CONVEX[name]((2, 3))
    value, status, stats = run(problem, RULES[rule])
    flat = problem.flat(value)
    for index in problem.indices():
        task = problem.task(index)
        alone = run(task, RULES[rule])
        # Near the end the cubic of a line search sees differences of F that are mostly rounding.
        atol = 1e-8 if rule.startswith("nonlinear_cg") else 1e-10
        assert torch.allclose(flat[index], task.flat(alone.value), rtol=1e-9, atol=atol)
        assert status[index] == alone.status
        assert stats["steps"][index] == alone.stats["steps"]


@pytest.mark.parametrize("rule", RULES)
def test_under_vmap(rule):
    problem = logistic((2, 3))
    expected = run(problem, RULES[rule])

    def one(init, *data):
        return minimize(problem.objective, init, problem.theta, *data, solver=RULES[rule])

    got = vmap(vmap(one))(problem.init, *problem.data)
    assert torch.allclose(got.value, expected.value, rtol=1e-9, atol=1e-12)
    assert torch.equal(got.status, expected.status)
    assert torch.equal(got.stats["steps"], expected.stats["steps"])


@pytest.mark.parametrize("rule", RULES)
def test_under_vmap_over_a_batch(rule):
    problem = logistic((2, 3))
    expected = run(problem, RULES[rule])

    def row(init, *data):
        theta = problem.theta
        return minimize(problem.objective, init, theta, *data, solver=RULES[rule], batch_ndim=1)

    got = vmap(row)(problem.init, *problem.data)
    assert torch.allclose(got.value, expected.value, rtol=1e-9, atol=1e-12)
    assert torch.equal(got.stats["steps"], expected.stats["steps"])


@pytest.mark.parametrize("rule", ["gd", "agd", "newton_cg", "lbfgs", "nonlinear_cg"])
def test_under_vmap_over_theta(rule):
    problem = vector_lam()
    anchor, lam = problem.theta
    lams = lam * torch.tensor([[1.0], [2.0]], dtype=F64)

    def solved(lam):
        theta = (anchor, lam)
        args = (problem.objective, problem.init, theta, *problem.data)
        return minimize(*args, solver=RULES[rule]).value

    assert torch.allclose(vmap(solved)(lams), torch.stack([solved(lam) for lam in lams]), rtol=1e-9)
