"""Strong Wolfe steps by their definition; L-BFGS and nonlinear CG against SciPy and dense algebra."""

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
    FixedStep,
    InnerProblem,
    Line,
    NewtonCG,
    NonlinearCG,
    Status,
    StrongWolfe,
    attach,
    lbfgs,
    minimize,
    newton_cg,
    nonlinear_cg,
)
from implicit_optim._solver._lbfgs import History
from problems import BATCHES, logistic, quadratic, ridge, tanh_mlp

F64 = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
SOLVERS = [lbfgs, nonlinear_cg]
each = pytest.mark.parametrize("make", SOLVERS)


def run(problem, solver):
    return minimize(problem.objective, *problem.args, solver=solver, batch_ndim=problem.batch_ndim)


# -- the line search -------------------------------------------------------------------------------


def waves(seed, tasks):
    """Sums of sines over a slowly rising bowl: smooth, bounded below, with many minima."""
    rng = np.random.default_rng(seed)
    height, phase = rng.standard_normal((2, tasks, 4))
    speed, bowl = 5 * rng.uniform(size=(tasks, 4)), 10 ** rng.uniform(-3, 1, tasks)
    height, phase, speed, bowl = map(torch.from_numpy, (height, phase, speed, bowl))

    def value(x):
        return (height * torch.sin(speed * x[..., None] + phase)).sum(-1) + bowl * x**2

    def slope(x):
        return (height * speed * torch.cos(speed * x[..., None] + phase)).sum(-1) + 2 * bowl * x

    down = -torch.sign(slope(torch.zeros(tasks, dtype=F64)))
    return lambda t: value(down * t), lambda t: down * slope(down * t)


def line(value, slope, calls=None):
    """A line in one dimension with direction 1."""

    def both(t):
        if calls is not None:
            calls.append(t)
        return slope(t).unsqueeze(-1), value(t)

    one = torch.ones_like(both(torch.zeros((), dtype=F64))[0])
    if calls is not None:
        calls.clear()
    return Line(one, value, both)


@given(
    SEEDS,
    st.floats(-4, 4),
    st.sampled_from([(1e-4, 0.9), (1e-4, 0.1), (0.1, 0.5), (1e-9, 1e-6), (0.3, 0.31)]),
)
def test_the_strong_wolfe_conditions_hold(seed, log_lr, constants):
    c1, c2 = constants
    value, slope = waves(seed, 8)
    zero = torch.zeros(8, dtype=F64)
    search = StrongWolfe(lr=10**log_lr, c1=c1, c2=c2, max_trials=80)
    calls = []
    at, start = value(zero), slope(zero)
    t, found = search.search(line(value, slope, calls), at, start)
    assert found.all() and (t > 0).all() and len(calls) <= 40
    assert (value(t) <= at + c1 * t * start + 1e-14 * (1 + at.abs())).all()
    assert (slope(t).abs() <= c2 * start.abs() * (1 + 1e-9)).all()
    for i in (0, 5):  # a task alone
        mine = lambda f, i=i: lambda t: f(t.expand(8))[i]  # noqa: E731
        alone = search.search(line(mine(value), mine(slope)), at[i], start[i])[0]
        torch.testing.assert_close(alone, t[i], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("c2", [0.9, 0.1])
def test_wherever_scipy_finds_a_step_so_does_this(c2):
    """And each accepts the other's step: the conditions mean the same."""
    ours = StrongWolfe(c2=c2)
    agreed = 0
    for seed in range(40):
        value, slope = waves(seed, 1)
        f, g = (
            lambda t, h=h: h(torch.tensor([float(t)], dtype=F64)).numpy() for h in (value, slope)
        )
        theirs = scipy.optimize.line_search(
            lambda x, f=f: f(x[0])[0],
            lambda x, g=g: g(x[0]),
            np.zeros(1),
            np.ones(1),
            c1=1e-4,
            c2=c2,
        )[0]
        zero = torch.zeros(1, dtype=F64)
        t, found = ours.search(line(value, slope), value(zero), slope(zero))
        assert found.all()
        for step in (t.item(), *([] if theirs is None else [theirs])):
            assert f(step)[0] <= f(0)[0] + 1e-4 * step * g(0)[0] + 1e-14
            assert abs(g(step)[0]) <= c2 * abs(g(0)[0])
        agreed += theirs is not None
    assert agreed > 20


@given(st.floats(-6, 6), st.floats(-3, 3))
def test_two_trials_find_the_minimum_of_a_parabola(log_curvature, log_slope):
    """The cubic through two points of a parabola is the parabola, where no bound is in its way."""
    curvature, start = 10**log_curvature, -(10**log_slope)
    best = -start / curvature
    for lr in (0.3 * best, 3 * best):
        calls = []
        along = line(
            lambda t: start * t + curvature * t**2 / 2, lambda t: start + curvature * t, calls
        )
        zero = torch.zeros((), dtype=F64)
        t, found = StrongWolfe(lr=lr, c2=1e-3).search(along, zero, zero + start)
        assert found and t.item() == pytest.approx(best, rel=1e-3) and len(calls) == 2


def test_values_that_are_not_finite_are_backed_out_of():
    for bad in (math.nan, math.inf, -math.inf):
        value = lambda t, b=bad: torch.where(t >= 0.3, b, (t - 0.2) ** 2)  # noqa: E731
        slope = lambda t, b=bad: torch.where(t >= 0.3, math.nan, 2 * (t - 0.2))  # noqa: E731
        zero = torch.zeros(2, dtype=F64)
        t, found = StrongWolfe(lr=4.0).search(line(value, slope), value(zero), slope(zero))
        assert found.all() and (t < 0.3).all() and (slope(t).abs() <= 0.9 * 0.4).all()


def test_tasks_without_a_step():
    """In turn: descent, ascent, level ground, NaN, a value that contradicts its slope, no end."""
    inf, nan = math.inf, math.nan
    start = torch.tensor([-1.0, 1.0, 0.0, nan, -1.0, -1.0], dtype=F64)
    value = lambda t: torch.stack([  # noqa: E731
        (t[0] - 1) ** 2 / 2, t[1], t[2] * 0, t[3] * nan, t[4], -t[5]
    ])  # fmt: skip
    slope = lambda t: torch.stack([  # noqa: E731
        t[0] - 1, t[1] * 0 + 1, t[2] * 0, t[3] * nan, t[4] * 0 - 1, t[5] * 0 - 1
    ])  # fmt: skip
    zero = torch.zeros(6, dtype=F64)
    calls = []
    along = Line(zero.unsqueeze(-1) + 1, value, lambda t: (calls.append(t), slope(t)[:, None])[1:] + (value(t),))  # fmt: skip  # noqa: E501
    t, found = StrongWolfe(max_trials=6).search(along, value(zero), start)
    assert found.tolist() == [True, False, True, False, False, True]
    assert t.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1e5]  # the last one: the lowest of six trials
    assert len(calls) == 6 and inf not in t.tolist()


def test_where_only_rounding_is_to_be_gained_a_search_has_not_failed():
    """Five floors where no trial meets both conditions, and F = 1 up to its rounding or a little more.

    In turn: a gradient whose rounding shows no curvature before the second trial, at t = 10; the same
    with a slope that promises more than rounding, and one that does on the way to t = 10 only; a value
    that rises by some roundings, with hardly any slope; the same with a slope that promises more.
    """
    slopes = torch.tensor([-1e-20, -1e-3, -1.5e-15, -1e-20, -1e-3], dtype=F64)
    bend = torch.tensor([True, True, True, False, False])
    rises = torch.tensor([0, 0, 0, 1e-13, 1e-13], dtype=F64)
    value = lambda t: 1 + torch.where(t > 0, rises, 0.0)  # noqa: E731
    slope = lambda t: torch.where(bend & (t > 1), -slopes, slopes)  # noqa: E731
    zero = torch.zeros(5, dtype=F64)
    t, found = StrongWolfe().search(line(value, slope), value(zero), slopes)
    assert found.tolist() == [True, False, False, True, False]
    assert 1 <= t[0] <= 10 and t[1:].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_the_gradient_of_the_last_trial_is_known():
    problem = logistic((3,))
    bound = problem.bind()
    grad, value = bound.grad_and_value(problem.init)
    along = Line.of(bound, problem.init, -grad)
    slope = -grad.square().sum(-1)
    t, found = StrongWolfe().search(along, value, slope)
    known = along.known(t)
    assert found.all() and known is not None
    there = bound.grad_and_value(problem.init - t[:, None] * grad)
    assert torch.equal(known[1], there[0]) and torch.equal(known[0], there[1])
    assert along.known(t.clone()) is None
    t, _ = Armijo().search(along, value, slope)
    assert along.known(t) is None


def test_it_works_under_vmap_and_over_several_batch_dimensions():
    problem = logistic((2, 3))
    solver = lbfgs(line_search=StrongWolfe(max_trials=4), max_steps=2)
    expected = run(problem, solver)
    assert expected.status.tolist() == [[0] * 3] * 2

    def one(init, *data):
        return minimize(problem.objective, init, problem.theta, *data, solver=solver).value

    got = torch.func.vmap(torch.func.vmap(one))(problem.init, *problem.data)
    torch.testing.assert_close(got, expected.value, rtol=1e-12, atol=1e-12)


def test_a_plain_function_has_no_slopes():
    zero = torch.zeros(2)
    with pytest.raises(TypeError, match="StrongWolfe needs the slopes along the line"):
        StrongWolfe().search(lambda t: t, zero, zero - 1)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"lr": 0.0}, "Invalid lr: 0.0: it must be finite and > 0"),
        ({"c1": 0.0}, "Invalid c1, c2: 0.0, 0.9: they must satisfy 0 < c1 < c2 < 1"),
        ({"c2": 1e-5}, "Invalid c1, c2"),
        ({"c2": 1.0}, "Invalid c1, c2"),
        ({"max_trials": 0}, "Invalid max_trials: 0: it must be >= 1"),
    ],
)
def test_settings_out_of_range(given_, message):
    with pytest.raises(ValueError, match=message):
        StrongWolfe(**given_)


@each
def test_a_search_must_be_one(make):
    with pytest.raises(TypeError, match=r"line_search must be StrongWolfe\(...\) or Armijo"):
        make(line_search="strong_wolfe")


# -- the rules -------------------------------------------------------------------------------------


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
    assert status[2:4].tolist() == [Status.NONFINITE, Status.LINE_SEARCH]
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


# -- the torch.optim classes -----------------------------------------------------------------------


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def closure(opt, loss, x, calls=None):
    def evaluate():
        opt.zero_grad()
        value = loss(x)
        value.backward()
        if calls is not None:
            calls.append(1)
        return value

    return evaluate


def test_newton_cg_of_torch_with_strong_wolfe():
    x = torch.tensor([-1.2, 1.0], dtype=F64, requires_grad=True)
    x.grad = torch.full_like(x, 7.0)
    opt = NewtonCG([x], line_search=StrongWolfe(), linear_solver=CG(rtol=1e-10))
    for _ in range(40):
        opt.step(lambda: rosenbrock(x))
    assert (x - 1).abs().max() < 1e-8
    assert x.grad.tolist() == [7.0, 7.0]


def test_the_class_takes_the_steps_of_the_rule():
    problem = tanh_mlp()
    params = {name: torch.nn.Parameter(t.clone()) for name, t in problem.init.items()}
    opt = NonlinearCG(params.values())
    for steps in range(1, 8):
        opt.step(closure(opt, lambda p: problem.objective(p, problem.theta, *problem.data), params))
        ours = run(problem, nonlinear_cg(max_steps=steps))
        torch.testing.assert_close(
            problem.flat(params).detach(), problem.flat(ours.value), rtol=1e-9, atol=1e-11
        )
        assert opt.status is Status.SUCCESS
        norm = opt.state[params["b1"]]["grad_norm"]
        assert norm == pytest.approx(ours.stats["grad_norm"].item(), rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_class_solves_rosenbrocks(sign):
    x = torch.tensor([-1.2, 1.0], dtype=F64, requires_grad=True)
    opt = NonlinearCG([x], maximize=sign < 0)
    calls = []
    for _ in range(60):
        opt.step(closure(opt, lambda x: sign * rosenbrock(x), x, calls))
        if opt.state[x]["grad_norm"] < 1e-9:
            break
    assert (x - 1).abs().max() < 1e-8
    assert len(calls) <= 200
    assert scipy.optimize.minimize(
        scipy.optimize.rosen, [-1.2, 1.0], jac=scipy.optimize.rosen_der, method="CG"
    ).x == pytest.approx(x.tolist(), abs=1e-4)


def test_where_no_step_is_possible_the_parameters_stay():
    x = torch.ones(2, dtype=F64, requires_grad=True)
    opt = NonlinearCG([x])
    for loss, status in (
        (lambda x: x.detach().abs().sum() - (x - x.detach()).sum(), Status.LINE_SEARCH),
        (lambda x: x.sum() * math.nan, Status.NONFINITE),
    ):
        opt.step(closure(opt, loss, x))
        assert x.tolist() == [1.0, 1.0]
        assert opt.status is status and opt.state[x]["step_length"] == 0.0
        assert "direction" not in opt.state[x]
    opt.step(closure(opt, lambda x: x.square().sum(), x))
    assert opt.status is Status.SUCCESS and opt.state[x]["n_iter"] == 3
    before = x.detach().clone()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert torch.equal(x, before)


def test_lr_is_a_factor_on_the_first_trial():
    for lr, search in ((0.25, FixedStep(1.0)), (0.25, FixedStep(0.5))):
        x = torch.full((4,), 3.0, dtype=F64, requires_grad=True)
        opt = NonlinearCG([x], lr=lr, line_search=search)
        opt.step(closure(opt, lambda x: x.square().sum() / 2, x))
        moved = (3 - x.detach()).norm().item()
        assert moved == pytest.approx(lr * search.lr)  # of length 1 where lr = 1
    opt.param_groups[0]["lr"] = 0.0
    before = x.detach().clone()
    opt.step(closure(opt, lambda x: x.square().sum() / 2, x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (None, RuntimeError, r"needs a closure that calls backward\(\)"),
        (lambda x: x.square().sum(), RuntimeError, r"left no gradients: call loss.backward\(\)"),
        (lambda x: x.sum().backward(), TypeError, "a scalar tensor, got NoneType"),
        (lambda x: x, TypeError, r"a scalar tensor, got shape \(2,\)"),
    ],
)
def test_closures(call, error, match):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=match):
        NonlinearCG([x]).step(call and (lambda: call(x)))
    assert x.tolist() == [1.0, 1.0]


def test_a_parameter_thawed_meanwhile_starts_again():
    x, y = (torch.ones(2, dtype=F64, requires_grad=grad) for grad in (True, False))
    opt = NonlinearCG([x, y])
    loss = lambda _: (x.cosh() + (y - 2).cosh()).sum()  # noqa: E731
    for _ in range(3):
        opt.step(closure(opt, loss, x))
    y.requires_grad_()
    for _ in range(12):
        opt.step(closure(opt, loss, x))
    assert x.abs().max() < 1e-6 and (y - 2).abs().max() < 1e-6
