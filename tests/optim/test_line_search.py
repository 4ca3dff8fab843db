"""The classes of torch.optim that search along a line: their rules, Rosenbrock, closures."""

import math

import pytest
import scipy.optimize
import torch

from implicit_optim import CG, FixedStep, NewtonCG, NonlinearCG, Status, StrongWolfe, nonlinear_cg
from inner_solvers import F64, run
from problems import tanh_mlp


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
        (lambda x: x.detach().abs().sum() - (x - x.detach()).sum(), Status.NO_DESCENT),
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
