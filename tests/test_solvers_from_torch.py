"""Optimizers of torch as inner solvers, one for all tasks or one each."""

import functools

import pytest
import torch
from torch.func import vmap

import implicit_optim as iopt
from implicit_optim import agd, from_torch, gd, minimize
from inner_solvers import F64, STEEPNESS, parabola_args, parabolas, run
from problems import CONVEX, logistic, quadratic


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


def test_one_optimizer_a_task_and_random_numbers():
    """What it minimises is what is differentiated: task by task, or refused with what to do."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(6, 1)).double()
    episode = torch.randn(3, 8, 6, dtype=F64), torch.randn(3, 8, 1, dtype=F64)

    def adapted(batching):
        meta = iopt.MetaLearner(
            model,
            torch.nn.functional.mse_loss,
            solver=iopt.from_torch(torch.optim.LBFGS, lr=0.5, max_steps=40),
            meta_gradient=iopt.Implicit(iopt.CG(rtol=1e-12, max_steps=50)),
            stochastic=True,
            batching=batching,
        )
        stationarity = []
        meta.on_solve = lambda name, s: stationarity.append(s.stats.get("stationarity"))
        meta(episode, episode).sum().backward()
        return stationarity[-1]

    assert float(adapted(iopt.Batching(chunk_size=1)).max()) < 1e-3
    for batching in (None, iopt.Batching(chunk_size=2)):
        with pytest.raises(ValueError, match=r"use batching=Batching\(chunk_size=1\)"):
            adapted(batching)
