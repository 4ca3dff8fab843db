"""The profiles: exact meta-gradients of the zoo, what is counted, the shares of Dolan and More."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import implicit_optim as iopt  # noqa: E402
from benchmarks import profiles  # noqa: E402
from benchmarks.zoo import zoo  # noqa: E402

PROBLEMS = dict(zoo(0))


def solved(problem, anchor):
    """The minimiser for another anchor, by Newton with backtracking, from the anchor."""
    problem, phi = replace(problem, anchor=anchor), anchor
    for _ in range(200):
        H = torch.func.hessian(problem.value)(phi)
        g = torch.func.grad(problem.value)(phi)
        values, vectors = torch.linalg.eigh(H)
        step = vectors @ ((vectors.T @ g) / values.abs().clamp(min=1e-3))
        while problem.value(phi - step) > problem.value(phi) + 1e-14:
            step = step / 2
        phi = phi - step
        if g.norm() < 1e-12:
            break
    return phi


@pytest.mark.parametrize(
    "name", ["ridge, kappa 100", "softmax, lam 0.01", "network, lam 0.5, noise 0.1"]
)
def test_the_reference_is_the_slope_of_the_solution(name):
    """`v . d phi*/d anchor` along a direction, by central differences of the solution."""
    problem = PROBLEMS[name]
    direction = torch.randn(
        len(problem.anchor), generator=torch.Generator().manual_seed(1)
    ).double()
    ends = [solved(problem, problem.anchor + sign * 1e-5 * direction) for sign in (1, -1)]
    slope = problem.v @ (ends[0] - ends[1]) / 2e-5
    reference = problem.reference(solved(problem, problem.anchor))
    assert reference @ direction == pytest.approx(slope.item(), rel=1e-5)


def test_what_is_counted():
    """Gradient descent: one a step and one at the end; CG: so many products, each twice a gradient."""
    problem = PROBLEMS["logistic, lam 1"]
    count = profiles.Count()
    data = (problem.anchor, torch.tensor(problem.lam).double()), problem.x, problem.y
    solver = profiles.inner_solvers(1e-3, count, profiles.smoothness(problem))["gd"]()
    objective = profiles.counting(problem, count)
    solution = iopt.minimize(objective, problem.anchor, *data, solver=solver)
    assert solution.status == iopt.Status.SUCCESS
    assert count.gradients == solution.stats["steps"] + 1 > 2
    assert count.values == count.products == 0

    seen = []
    solver = profiles.Counted(iopt.CG(max_steps=4), count)
    anchor = problem.anchor.clone().requires_grad_()
    theta = anchor, data[0][1]
    phi = iopt.attach(
        solution.value,
        objective,
        theta,
        *data[1:],
        linear_solver=solver,
        on_solve=lambda name, s: seen.append(s),
    )
    phi.sum().backward()
    assert count.products == seen[0].stats["steps"] == 4
    assert count.total == count.gradients + 8


def test_a_budget_ends_a_hopeless_attempt(monkeypatch):
    monkeypatch.setattr(profiles, "BUDGET", 20)
    found = list(profiles.attempts(PROBLEMS["ridge, kappa 10000"], "gd", 1.0))
    assert found == []


def test_costs_of_a_problem_are_those_of_right_gradients(monkeypatch):
    """Where the model is linear Gauss-Newton is exact; on a network with noise it is not."""
    monkeypatch.setattr(profiles, "TOLERANCES", (1e-2, 1e-9))
    monkeypatch.setattr(profiles, "inner_solvers", lambda tol, count, L: {
        "newton": lambda: iopt.newton_cg(tol=tol, linear_solver=iopt.CG(max_steps=50)),
    })  # fmt: skip
    linear = profiles.costs(PROBLEMS["logistic, lam 1"])
    assert {"newton | CG | Hessian", "newton | CG | GaussNewton"} <= set(linear[1e-6])
    network = profiles.costs(PROBLEMS["network, lam 0.05, noise 1"])
    assert "newton | CG | Hessian" in network[1e-6]
    assert "newton | CG | GaussNewton" not in network[1e-2]


def test_profiles_are_dolan_and_mores():
    results = [{"a": 1.0, "b": 2.0}, {"a": 6.0, "b": 2.0}, {"b": 5.0}, {}]
    ratios = profiles.ratios(results, ["a", "b"])
    assert ratios == {"a": [1, 3, math.inf, math.inf], "b": [2, 1, 1, math.inf]}
    assert [profiles.share(ratios["a"], tau) for tau in (1, 3)] == [0.25, 0.5]
    assert [profiles.share(ratios["b"], tau) for tau in (1, 2)] == [0.5, 0.75]
    merged = profiles.best_by_choice([{"a | x": 3.0, "a | y": 1.0, "b | x": 2.0}], 0)
    assert merged == [{"a": 1.0, "b": 2.0}]
