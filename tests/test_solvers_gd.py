"""Gradient descent, plain and accelerated: closed forms, rates, torch's SGD."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import agd, gd
from inner_solvers import SEEDS, run
from problems import BATCHES, quadratic, tanh_mlp

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
