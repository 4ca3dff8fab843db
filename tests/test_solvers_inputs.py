"""What goes into minimize and comes out: memory, dtypes, scalars, settings out of range."""

import math

import pytest
import torch

from implicit_optim import agd, from_torch, gd, lbfgs, minimize, newton_cg, nonlinear_cg
from inner_solvers import F64, RULES, parabolas, run
from problems import CONVEX, quadratic


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
