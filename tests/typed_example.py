"""How a user's own code is typed: `mypy --strict` runs over this file, Python never does.

`tests/test_typed.py` checks what is inferred.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

import implicit_optim as iopt

Pair = tuple[Tensor, Tensor]


def episode() -> tuple[Pair, Pair]:
    return (torch.zeros(4, 5, 3), torch.zeros(4, 5, 1)), (
        torch.zeros(4, 6, 3),
        torch.zeros(4, 6, 1),
    )


def meta_learning() -> None:
    meta = iopt.MetaLearner(
        nn.Linear(3, 1),
        F.mse_loss,
        solver=iopt.newton_cg(max_steps=3, curvature=iopt.GaussNewton),
        lam={"weight": 1.0, "bias": torch.ones(1)},
        meta_gradient=iopt.Implicit(iopt.CG(max_steps=5), curvature=iopt.GaussNewton),
        batching=iopt.Batching(chunk_size=2),
    )
    support, query = episode()
    assert_type(meta(support, query), Tensor)
    phi = assert_type(meta.adapt(support), dict[str, Tensor])
    meta.predict(phi, query[0])  # what the model returns: Any
    assert_type(meta.report(), iopt.Report)
    assert_type(meta.anchor(), dict[str, Tensor])
    meta.meta_gradient = iopt.FirstOrder()
    meta.meta_gradient = iopt.Unrolled()


def ridge(phi: Tensor, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(x @ phi, y) + theta.exp() * phi @ phi


def by_name(phi: dict[str, Tensor], theta: Tensor) -> Tensor:
    return (phi["a"] - theta).square().sum()


def solving() -> None:
    x, y, theta = torch.zeros(20, 3), torch.zeros(20), torch.tensor(0.0)
    solution = iopt.minimize(ridge, torch.zeros(3), theta, x, y, solver=iopt.gd(lr=0.1))
    assert_type(solution, iopt.Solution)
    for solver in (iopt.lbfgs(tol=1e-6), iopt.nonlinear_cg(line_search=iopt.StrongWolfe(c2=0.1))):
        iopt.minimize(ridge, torch.zeros(3), theta, x, y, solver=solver)
    assert_type(solution.status, Tensor)
    assert_type(solution.stats, dict[str, Tensor])
    assert_type(solution.summary(), str)
    iopt.minimize(ridge, torch.zeros(3), theta, x, y, solver=iopt.trust_region(radius=0.5))
    lasso = iopt.L1(ridge, strength=lambda theta: theta)
    fista = iopt.proximal_gradient(lr=0.1, accelerated=True)
    sparse = iopt.minimize(lasso, torch.zeros(3), theta, x, y, solver=fista)
    assert_type(iopt.attach(torch.zeros(3), lasso, theta, x, y), Tensor)
    assert_type(sparse, iopt.Solution)
    assert_type(iopt.attach(torch.zeros(3), ridge, theta, x, y), Tensor)
    assert_type(iopt.attach({"a": torch.zeros(3)}, by_name, theta), dict[str, Tensor])


def linear_algebra() -> None:
    operator = iopt.Damped(iopt.Dense(torch.eye(3)), 0.1)
    solution = iopt.linear_solve(operator, torch.ones(3), iopt.CG(max_steps=3))
    assert_type(solution, iopt.Solution)
    assert_type(operator.mv(torch.ones(3)), Tensor)


def optimizers() -> None:
    net = nn.Linear(3, 2)
    optimizer: torch.optim.Optimizer = iopt.NesterovAGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.zero_grad()
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    iopt.GD(net.parameters(), lr=0.1).step()
    iopt.NonlinearCG(net.parameters(), line_search=iopt.StrongWolfe(c2=0.1))
    iopt.ProximalGradient([{"params": net.weight, "l1": 0.1}], lr=0.1, l1=0.0).step()
    assert_type(iopt.TrustRegion(net.parameters()).step(lambda: net(torch.ones(3)).sum()), Tensor)
