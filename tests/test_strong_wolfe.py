"""Strong Wolfe steps by their definition, and beside SciPy's."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import Armijo, Line, StrongWolfe, lbfgs, minimize, nonlinear_cg
from inner_solvers import F64, SEEDS, run
from problems import logistic

SOLVERS = [lbfgs, nonlinear_cg]
each = pytest.mark.parametrize("make", SOLVERS)


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
