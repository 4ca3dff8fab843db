"""minimize and its rules: closed forms, rates, other libraries, and what they report per task."""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from implicit_optim import (
    CG,
    Armijo,
    FixedStep,
    GaussNewton,
    LinearSolver,
    Solution,
    Status,
    StrongWolfe,
    agd,
    from_torch,
    gd,
    lbfgs,
    minimize,
    newton_cg,
    nonlinear_cg,
)
from problems import BATCHES, CONVEX, indefinite, logistic, quadratic, ridge, tanh_mlp, vector_lam

F64 = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
EXACT = CG(rtol=1e-12)
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
FEW = StrongWolfe(c2=0.5, max_trials=5)  # under vmap every trial is made
RULES = {
    "gd": gd(lr=0.1, max_steps=7),
    "agd": agd(lr=0.1, momentum=0.7, max_steps=7),
    "newton_cg": newton_cg(linear_solver=CG(max_steps=2), max_steps=3),
    "newton_cg, tol": newton_cg(linear_solver=CG(rtol=1e-8), tol=1e-6),
    "gd, tol": gd(lr=0.3, max_steps=100, tol=1e-2),
    "lbfgs": lbfgs(memory=2, max_steps=5),
    "lbfgs, tol": lbfgs(line_search=FEW, max_steps=15, tol=1e-6),
    "nonlinear_cg": nonlinear_cg(max_steps=3),
    "nonlinear_cg, tol": nonlinear_cg(line_search=FEW, max_steps=15, tol=1e-4),
}


def run(problem, solver):
    return minimize(problem.objective, *problem.args, solver=solver, batch_ndim=problem.batch_ndim)


def gradients(problem, value):
    """Of every task at `value`, by plain autograd, `[*batch, n]`."""
    flat = problem.flat(value)
    rows = [
        torch.autograd.functional.jacobian(problem.plain(i), flat[i]) for i in problem.indices()
    ]
    return torch.stack(rows).reshape(flat.shape)


def parabolas(phi, theta, a):
    """Tasks of different steepness, with the minimiser theta."""
    return (a * (phi - theta) ** 2).sum() / 2


STEEPNESS = torch.tensor([0.5, 1.0, 4.0, 10.0], dtype=F64)


def parabola_args(steepness=STEEPNESS):
    return torch.zeros(len(steepness), 2, dtype=F64), torch.ones(2, dtype=F64), steepness


# -- gradient descent ------------------------------------------------------------------------------


@given(SEEDS, st.floats(0, 4), st.integers(0, 30), st.floats(0.01, 2.5), st.sampled_from(BATCHES))
def test_gd_is_its_closed_form(seed, log_kappa, steps, lr, batch):
    """`phi* + (I - lr A)^k (phi_0 - phi*)`, diverging for lr > 2 too."""
    problem = quadratic(10**log_kappa, batch, seed=seed)
    got = run(problem, gd(lr=lr, max_steps=steps)).value.numpy()
    power = np.linalg.matrix_power(np.eye(6) - lr * problem.data[0].numpy(), steps)
    exact = problem.minimiser.numpy()
    expected = exact + (power @ (problem.init.numpy() - exact)[..., None])[..., 0]
    assert np.allclose(got, expected, rtol=1e-7, atol=1e-9 * abs(expected).max())


@given(SEEDS, st.floats(0, 3), st.integers(1, 40))
def test_gd_contracts_at_the_rate_of_theory(seed, log_kappa, steps):
    kappa = 10**log_kappa
    problem = quadratic(kappa, (3,), seed=seed)
    distance = lambda phi: (phi - problem.minimiser).norm(dim=-1)  # noqa: E731
    start = distance(problem.init)
    slow = distance(run(problem, gd(lr=1.0, max_steps=steps)).value)
    assert torch.all(slow <= (1 - 1 / kappa) ** steps * start * (1 + 1e-9) + 1e-10 * start * kappa)
    best = distance(run(problem, gd(lr=2 / (1 + 1 / kappa), max_steps=steps)).value)
    rate = ((kappa - 1) / (kappa + 1)) ** steps
    assert torch.all(best <= rate * start * (1 + 1e-9) + 1e-10 * start * kappa)


# -- accelerated gradient descent ------------------------------------------------------------------


@given(SEEDS, st.floats(0, 4), st.integers(0, 30), st.floats(0.0, 0.99), st.sampled_from(BATCHES))
def test_agd_is_its_closed_form(seed, log_kappa, steps, momentum, batch):
    """Powers of the matrix that takes `(y, x)` to the next pair."""
    problem, lr = quadratic(10**log_kappa, batch, seed=seed), 0.9
    got = run(problem, agd(lr=lr, momentum=momentum, max_steps=steps)).value.numpy()
    descend = np.eye(6) - lr * problem.data[0].numpy()
    top = np.concatenate(
        [(1 + momentum) * descend, np.zeros_like(descend) - momentum * np.eye(6)], -1
    )
    matrix = np.concatenate([top, np.concatenate([descend, np.zeros_like(descend)], -1)], -2)
    exact = problem.minimiser.numpy()
    offset = problem.init.numpy() - exact
    pair = np.linalg.matrix_power(matrix, steps) @ np.concatenate([offset, offset], -1)[..., None]
    expected = exact + pair[..., :6, 0]
    assert np.allclose(got, expected, rtol=1e-7, atol=1e-9 * abs(expected).max())


@given(SEEDS, st.floats(0, 4), st.integers(1, 60))
def test_agd_stays_within_the_bound_of_theory(seed, log_kappa, steps):
    """`F(x_k) - F* <= (1 - sqrt(mu/L))^k (F(x_0) - F* + mu/2 |x_0 - x*|^2)`, carried over to y."""
    kappa = 10**log_kappa
    problem = quadratic(kappa, seed=seed)
    solver = agd(strong_convexity=1 / kappa, smoothness=1.0, max_steps=steps)
    start = (problem.init - problem.minimiser).numpy()
    gap = start @ problem.data[0].numpy() @ start / 2 + start @ start / (2 * kappa)
    distance = lambda k: math.sqrt(2 * kappa * gap * (1 - kappa**-0.5) ** k)  # noqa: E731
    momentum = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    bound = (1 + momentum) * distance(steps) + momentum * distance(steps - 1)
    error = (run(problem, solver).value - problem.minimiser).norm().item()
    assert error <= bound * (1 + 1e-9) + 1e-11 * kappa


def test_agd_is_faster_than_gd_where_the_condition_is_bad():
    problem = quadratic(1e4)
    error = lambda s: (run(problem, s).value - problem.minimiser).norm().item()  # noqa: E731
    slow = error(gd(lr=1.0, max_steps=500))
    fast = error(agd(strong_convexity=1e-4, smoothness=1.0, max_steps=500))
    assert fast < 0.1 * slow


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_agd_is_sgd_with_nesterov(momentum):
    problem = tanh_mlp()
    parameters = {name: torch.nn.Parameter(t.clone()) for name, t in problem.init.items()}
    settings = {"momentum": momentum, "nesterov": True} if momentum else {}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.2, **settings)
    for steps in range(8):
        ours = run(problem, agd(lr=0.2, momentum=momentum, max_steps=steps)).value
        for name, parameter in parameters.items():
            assert torch.allclose(ours[name], parameter, rtol=1e-11, atol=1e-13)
        optimizer.zero_grad()
        problem.objective(parameters, problem.theta, *problem.data).backward()
        optimizer.step()


def test_agd_constants_are_those_of_the_pair():
    assert agd(strong_convexity=1.0, smoothness=9.0).constants == pytest.approx((1 / 9, 0.5))
    assert agd(strong_convexity=2.0, smoothness=2.0).constants == pytest.approx((0.5, 0.0))
    assert agd(lr=0.3).constants == (0.3, 0.9)
    assert agd(lr=0.3, momentum=0.0).constants == (0.3, 0.0)


# -- Newton-CG -------------------------------------------------------------------------------------


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
    assert status.tolist() == [Status.LINE_SEARCH, Status.SUCCESS, Status.LINE_SEARCH]
    assert value[:, 0].tolist() == pytest.approx([1.0, 1 - 10 / 7, 1.0])
    assert value[0].item() == 1.0
    assert stats["steps"].tolist() == [0, 1, 0]


# -- all together ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("mapped", ["init", "data", "theta"])
def test_from_torch_does_not_run_under_vmap(optimizer, mapped):
    solver = from_torch(optimizer, lr=0.1, max_steps=2)
    args = {
        "init": torch.zeros(2, dtype=F64),
        "theta": torch.ones(2, dtype=F64),
        "data": torch.tensor(3.0, dtype=F64),
    }

    def one(value):
        given = {**args, mapped: value}
        return minimize(
            parabolas, given["init"], given["theta"], given["data"], solver=solver
        ).value

    with pytest.raises(ValueError, match="from_torch cannot run under vmap.*batch_ndim=1"):
        vmap(one)(torch.stack([args[mapped]] * 3))


# -- optimizers of torch ---------------------------------------------------------------------------

ELEMENTWISE = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.NAdam, {"lr": 0.1}),
    (torch.optim.RAdam, {"lr": 0.1}),
    (torch.optim.Adamax, {"lr": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.05, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.3}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.Rprop, {"lr": 0.05}),
    (torch.optim.ASGD, {"lr": 0.1}),
]


@pytest.mark.parametrize(("optimizer", "settings"), ELEMENTWISE)
def test_one_elementwise_optimizer_is_one_per_task(optimizer, settings):
    problem = CONVEX["least_squares"]((2, 3))
    make = functools.partial(from_torch, optimizer, max_steps=9, **settings)
    together = problem.flat(run(problem, make()).value)
    assert make().elementwise
    assert torch.allclose(
        together, problem.flat(run(problem, make(elementwise=False)).value), rtol=1e-10
    )
    for index in problem.indices():
        assert torch.allclose(together[index], by_hand(problem, index, optimizer, settings, 9))


def by_hand(problem, index, optimizer, settings, steps):
    """An ordinary training loop on one task."""
    task = problem.task(index)
    parameters = {name: torch.nn.Parameter(t.clone()) for name, t in task.init.items()}
    opt = optimizer(parameters.values(), **settings)

    def closure():
        opt.zero_grad()
        loss = task.objective(parameters, task.theta, *task.data)
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
    return task.flat(parameters).detach()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 3}),
        (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe", "max_iter": 4}),
        (torch.optim.Adafactor, {"lr": 0.1}),
        (functools.partial(torch.optim.SGD, momentum=0.5), {"lr": 0.1}),
    ],
)
def test_other_optimizers_run_one_per_task(optimizer, settings):
    problem = CONVEX["least_squares"]((2, 3))
    solver = from_torch(optimizer, max_steps=4, **settings)
    assert not solver.elementwise
    value, status, stats = run(problem, solver)
    flat = problem.flat(value)
    assert torch.equal(status, torch.zeros_like(status))
    assert torch.equal(stats["steps"], torch.full((2, 3), 4, dtype=torch.int32))
    for index in problem.indices():
        assert torch.allclose(flat[index], by_hand(problem, index, optimizer, settings, 4))


def test_lbfgs_without_a_batch():
    problem = CONVEX["least_squares"]()
    settings = {"lr": 0.5, "max_iter": 3}
    value = run(problem, from_torch(torch.optim.LBFGS, max_steps=4, **settings)).value
    assert torch.allclose(problem.flat(value), by_hand(problem, (), torch.optim.LBFGS, settings, 4))


def test_sgd_of_torch_is_gd_and_its_nesterov_is_agd():
    problem = logistic((3,))
    sgd = functools.partial(from_torch, torch.optim.SGD, lr=0.2, max_steps=9)
    pairs = [
        (sgd(), gd(lr=0.2, max_steps=9)),
        (sgd(momentum=0.6, nesterov=True), agd(lr=0.2, momentum=0.6, max_steps=9)),
    ]
    for theirs, ours in pairs:
        assert torch.allclose(run(problem, theirs).value, run(problem, ours).value, rtol=1e-11)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.LBFGS])
def test_tol_freezes_tasks_of_a_torch_optimizer(optimizer):
    make = functools.partial(from_torch, optimizer, lr=0.3)
    args = parabola_args()
    value, status, stats = minimize(
        parabolas, *args, solver=make(max_steps=400, tol=1e-4), batch_ndim=1
    )
    assert status.tolist() == [0, 0, 0, 0]
    assert torch.all((STEEPNESS[:, None] * (value - 1)).norm(dim=-1) <= 1e-4)
    for task, steps in enumerate(stats["steps"].tolist()):
        there = minimize(parabolas, *args, solver=make(max_steps=steps), batch_ndim=1)
        assert torch.equal(value[task], there.value[task])


def test_an_unknown_setting_of_a_torch_optimizer():
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        run(quadratic(), from_torch(torch.optim.SGD, lr=0.1, momentun=0.9, max_steps=1))


def test_a_torch_optimizer_starts_afresh_in_every_run():
    problem = quadratic()
    solver = from_torch(torch.optim.Adam, lr=0.1, max_steps=5)
    assert torch.equal(run(problem, solver).value, run(problem, solver).value)


# -- inputs and outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        *RULES.values(),
        from_torch(torch.optim.Adam, max_steps=2),
        from_torch(torch.optim.LBFGS, max_steps=2),
    ],
    ids=str,
)
def test_the_value_has_no_graph_and_the_inputs_are_left_alone(solver):
    problem = CONVEX["least_squares"]((3,))
    anchor, lam = problem.theta
    theta = (
        {k: t.clone().requires_grad_() for k, t in anchor.items()},
        lam.clone().requires_grad_(),
    )
    init = {k: t.clone().requires_grad_() for k, t in problem.init.items()}
    value, status, stats = minimize(
        problem.objective, init, theta, *problem.data, solver=solver, batch_ndim=1
    )
    for name in init:
        assert value[name].shape == init[name].shape
        assert not value[name].requires_grad
        assert torch.equal(init[name], problem.init[name])
        assert torch.equal(theta[0][name], anchor[name])
        assert init[name].grad is None
    assert not any(t.requires_grad for t in (status, *stats.values()))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("solver", [gd(lr=0.1, max_steps=0), gd(lr=0.1, max_steps=9, tol=1e9)])
def test_the_value_does_not_share_memory_with_the_start(solver):
    """The start is often a live parameter, which the next optimizer step changes in place."""
    problem = quadratic()
    value = run(problem, solver).value
    assert value.untyped_storage().data_ptr() != problem.init.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "solver", [gd(lr=0.5, max_steps=60), newton_cg(max_steps=2), lbfgs(), nonlinear_cg()]
)
def test_scalar_parameters(solver):
    def objective(phi, theta):
        return (phi["a"] - theta) ** 2 + (phi["b"] + 1).square().sum()

    init = {"a": torch.tensor(0.0, dtype=F64), "b": torch.zeros(2, dtype=F64)}
    value = minimize(objective, init, torch.tensor(3.0, dtype=F64), solver=solver).value
    assert value["a"].shape == ()
    assert value["a"].item() == pytest.approx(3.0)
    assert value["b"].tolist() == pytest.approx([-1.0, -1.0])
    bare = minimize(
        lambda phi, theta: (phi - theta) ** 2, init["a"], torch.tensor(3.0), solver=solver
    )
    assert bare.value.item() == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_keeps_the_dtype(dtype):
    init, theta = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    ours = gd(lr=0.5), newton_cg(max_steps=2), lbfgs(max_steps=2), nonlinear_cg(max_steps=2)
    for solver in (*ours, from_torch(torch.optim.Adam, max_steps=2)):
        value, _, stats = minimize(parabolas, init, theta, 2.0, solver=solver)
        assert value.dtype == stats["grad_norm"].dtype == dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gd(lr=0.0), "Invalid lr: 0.0: it must be finite and > 0"),
        (lambda: gd(lr=math.inf), "Invalid lr: inf"),
        (lambda: gd(lr=0.1, max_steps=-1), "Invalid max_steps: -1: it must be >= 0"),
        (lambda: gd(lr=0.1, tol=-1.0), "Invalid tol: -1.0: it must be finite and >= 0"),
        (lambda: gd(lr=0.1, tol=math.nan), "Invalid tol: nan"),
        (lambda: agd(), r"give lr \(and momentum\), or strong_convexity and smoothness"),
        (lambda: agd(lr=math.nan), "Invalid lr: nan"),
        (lambda: agd(lr=0.1, momentum=1.0), r"Invalid momentum: 1.0: it must lie in \[0, 1\)"),
        (lambda: agd(lr=0.1, momentum=-0.1), "Invalid momentum: -0.1"),
        (lambda: agd(strong_convexity=1.0), "belong together: give both"),
        (lambda: agd(smoothness=1.0), "belong together: give both"),
        (lambda: agd(lr=1.0, strong_convexity=1.0, smoothness=2.0), "not both"),
        (lambda: agd(momentum=0.5, strong_convexity=1.0, smoothness=2.0), "not both"),
        (lambda: agd(strong_convexity=2.0, smoothness=1.0), "0 < strong_convexity <= smoothness"),
        (lambda: agd(strong_convexity=0.0, smoothness=1.0), "0 < strong_convexity <= smoothness"),
        (lambda: agd(lr=0.1, tol=-1.0), "Invalid tol: -1.0"),
        (lambda: newton_cg(max_steps=-2), "Invalid max_steps: -2"),
        (lambda: newton_cg(tol=math.inf), "Invalid tol: inf"),
        (lambda: lbfgs(memory=0), "Invalid memory: 0: it must be >= 1"),
        (lambda: lbfgs(max_steps=-2), "Invalid max_steps: -2"),
        (lambda: nonlinear_cg(tol=math.inf), "Invalid tol: inf"),
        (lambda: from_torch(torch.optim.SGD, max_steps=-1, lr=0.1), "Invalid max_steps: -1"),
        (lambda: from_torch(torch.optim.SGD, max_steps=1, tol=-1.0), "Invalid tol: -1.0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [gd, agd, newton_cg, lbfgs, nonlinear_cg])
def test_settings_have_names(make):
    with pytest.raises(TypeError, match="positional argument"):
        make(0.1)


def test_solver_must_be_one():
    with pytest.raises(
        TypeError, match=r"solver must be gd\(...\), agd\(...\), nonlinear_cg\(...\), lbfgs\(...\)"
    ):
        run(quadratic(), torch.optim.SGD)


def test_objective_must_be_callable():
    with pytest.raises(TypeError, match="objective must be callable, got float"):
        minimize(1.0, torch.zeros(2), (), solver=newton_cg())


@pytest.mark.parametrize("value", [lambda phi, theta: phi, lambda phi, theta: 1.0])
def test_objective_must_return_a_scalar(value):
    with pytest.raises(ValueError, match="objective must return one scalar per task, got"):
        minimize(value, torch.zeros(2), (), solver=newton_cg())


def test_data_must_carry_the_batch():
    with pytest.raises(ValueError, match=r"data\[0\] has shape \(4,\): with batch_ndim=1 it must"):
        minimize(
            parabolas,
            torch.zeros(3, 2),
            torch.ones(2),
            torch.ones(4),
            solver=gd(lr=1.0),
            batch_ndim=1,
        )


def test_an_empty_batch():
    with pytest.raises(ValueError, match=r"the batch dimensions \(0,\) are empty"):
        minimize(
            parabolas,
            torch.zeros(0, 2),
            torch.ones(2),
            torch.ones(0),
            solver=gd(lr=1.0),
            batch_ndim=1,
        )


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4])
def test_the_last_step_counts_towards_the_tolerance(max_steps):
    """phi = 2^-k after k steps: the tolerance is met by the last one, and missed with one less."""
    for allowed, status in ((max_steps, Status.SUCCESS), (max_steps - 1, Status.MAX_STEPS)):
        solver = gd(lr=0.5, max_steps=allowed, tol=1.01 * 0.5**max_steps)
        solution = minimize(lambda p, _: p @ p / 2, torch.ones(1), (), solver=solver)
        assert solution.status == status and solution.stats["steps"] == allowed
        assert solution.value == solution.stats["grad_norm"] == 0.5**allowed


def test_newton_cg_takes_five_cg_steps_by_default_as_in_the_paper():
    assert newton_cg().linear_solver == CG(max_steps=5)


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

    monkeypatch.setattr("implicit_optim._minimize.none_left", counted)
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
