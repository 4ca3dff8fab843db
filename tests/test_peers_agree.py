"""Ours against higher and TorchOpt where they are right: both agree with the dense answer."""

import copy

import pytest
import torch
import torch.nn.functional as F

import implicit_optim as iopt
from peers import (
    EXACT,
    MODELS,
    NEWTON,
    THEIR_CG,
    by_task,
    dense_meta_gradient,
    error_of,
    flat,
    higher,
    old_names,
    our_gradient,
    random,
    regression,
    torchopt,
    torchopt_gradient,
    written_out,
)
from problems import logistic, matrix_lam, ridge, vector_lam

pytestmark = pytest.mark.usefixtures("double")

# -- higher: long unrolls --------------------------------------------------------------------------


def unrolled_loss(model, lam, support, query, steps, lr=0.25):
    """Query loss of one task after gradient descent on the proximal objective, by higher."""
    (x, y), (xq, yq) = support, query
    sgd, anchor = torch.optim.SGD(model.parameters(), lr=lr), list(model.parameters())
    with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (net, inner):
        for _ in range(steps):
            far = sum((p - a).square().sum() for p, a in zip(net.parameters(), anchor, strict=True))
            inner.step(F.mse_loss(net(x), y) + lam / 2 * far)
        return F.mse_loss(net(xq), yq)


@pytest.mark.parametrize("name", MODELS)
def test_highers_unroll_converges_to_our_meta_gradient(name):
    build, lam = MODELS[name]
    support, query = regression()
    model, proximal = build(), iopt.Proximal(lam, learned=True)
    meta = iopt.MetaLearner(
        model, F.mse_loss, solver=NEWTON, lam=proximal, meta_gradient=iopt.Implicit(EXACT)
    )
    losses = meta(support, query)
    ours = flat(torch.autograd.grad(losses.mean(), [*model.parameters(), proximal.lam]))

    log_lam = torch.tensor(lam).log().requires_grad_()
    tasks = by_task(support, query)
    exact = [dense_meta_gradient(model, log_lam, *task) for task in tasks]
    assert error_of([losses], [torch.stack([loss for loss, _ in exact])]) <= 1e-12
    dense = torch.stack([gradient for _, gradient in exact]).mean(0)
    assert error_of([ours], [dense]) <= 1e-11

    errors = []
    for steps in (5, 20, 150):
        loss = torch.stack([unrolled_loss(model, log_lam.exp(), *t, steps) for t in tasks]).mean()
        theirs = flat(torch.autograd.grad(loss, [*model.parameters(), log_lam]))
        errors.append(error_of([theirs], [ours]))
    assert errors[0] > 1e-3 and errors[1] > 1e-7  # a short unroll is another gradient
    assert errors[2] <= 1e-10


# -- TorchOpt: where it is right -------------------------------------------------------------------

CLOSED = {
    "ridge kappa=1e2": lambda: ridge(1e2),
    "ridge kappa=1e4": lambda: ridge(1e4, n=40),
    "logistic": logistic,
    "vector_lam": vector_lam,
    "matrix_lam": matrix_lam,
}


@pytest.mark.parametrize("name", CLOSED)
def test_torchopts_custom_root_with_cg_agrees(name):
    problem = CLOSED[name]()
    v = random(problem.init.shape)
    args = (written_out(problem), problem.minimiser, problem.theta, v)
    exact = problem.meta_gradient(v)
    ours, theirs = our_gradient(*args), torchopt_gradient(*args)
    assert error_of(ours, exact) <= 1e-11
    assert error_of(theirs, exact) <= 1e-11
    assert error_of(ours, theirs) <= 1e-11


class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=THEIR_CG):
    """One task of proximally regularised regression, as TorchOpt would have it written."""

    def __init__(self, outer, log_lam):
        super().__init__()
        self.outer, self.log_lam = outer, log_lam  # meta-parameters, since they are arguments
        self.net = copy.deepcopy(outer)

    def objective(self, x, y):
        pairs = zip(self.net.parameters(), self.outer.parameters(), strict=True)
        far = sum((p - a).square().sum() for p, a in pairs)
        return F.mse_loss(self.net(x), y) + self.log_lam.exp() / 2 * far

    def solve(self, x, y):
        options = {"tolerance_grad": 1e-13, "tolerance_change": 0.0, "max_iter": 100}
        lbfgs = torch.optim.LBFGS(self.net.parameters(), line_search_fn="strong_wolfe", **options)

        def closure():
            lbfgs.zero_grad()
            loss = self.objective(x, y)
            loss.backward(inputs=list(self.net.parameters()))
            return loss

        with torch.enable_grad():
            lbfgs.step(closure)
        return self


@pytest.mark.parametrize("name", MODELS)
def test_torchopts_module_agrees_with_meta_learner(name):
    """Theirs task by task with L-BFGS, ours both at once with Newton-CG, and whole matrices."""
    build, lam = MODELS[name]
    support, query = regression()
    model, proximal = build(), iopt.Proximal(lam, learned=True)
    meta = iopt.MetaLearner(
        model, F.mse_loss, solver=NEWTON, lam=proximal, meta_gradient=iopt.Implicit(EXACT)
    )
    loss = meta(support, query).mean()
    ours = flat(torch.autograd.grad(loss, [*model.parameters(), proximal.lam]))

    log_lam = torch.tensor(lam).log().requires_grad_()
    tasks = by_task(support, query)
    dense = torch.stack([dense_meta_gradient(model, log_lam, *task)[1] for task in tasks]).mean(0)
    with old_names():
        losses = []
        for (x, y), (xq, yq) in tasks:
            inner = Inner(model, log_lam)
            inner.solve(x, y)
            losses.append(F.mse_loss(inner.net(xq), yq))
        theirs = torch.autograd.grad(torch.stack(losses).mean(), [*model.parameters(), log_lam])
    assert error_of([ours], [dense]) <= 1e-11
    assert error_of([flat(theirs)], [dense]) <= 1e-7  # what L-BFGS leaves
    assert error_of([flat(theirs)], [ours]) <= 1e-7
