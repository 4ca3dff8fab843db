"""`torch.compile(fullgraph=True)` of a batched meta-step: the numbers of eager and of dense algebra.

The step is one graph: the inner steps and the solves are unrolled into it, so every count here is
small. `aot_eager` traces as `inductor` does, backward pass included, but generates no code.
"""

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

import implicit_optim as iopt
import problems
from implicit_optim.tasks import MLP, ConvNet

GD, AGD = iopt.gd(lr=0.1, max_steps=2), iopt.agd(lr=0.1, max_steps=2)
ONE_STEP = iopt.FixedStep(1.0)


def newton(curvature, steps=2):
    cg = iopt.CG(max_steps=steps)
    return iopt.newton_cg(linear_solver=cg, line_search=ONE_STEP, curvature=curvature, max_steps=1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


@torch._inductor.config.patch(compile_threads=1)  # no pool of processes for two small graphs
def test_minimize_and_attach_give_the_dense_solution_and_meta_gradient():
    problem = problems.ridge(kappa=10.0, batch=(3,), n=2)
    theta = tuple(t.clone().requires_grad_() for t in problem.theta)
    solver, cg = newton(iopt.Hessian), iopt.CG(max_steps=2)  # n steps: exact
    v = torch.randn(3, 2, dtype=torch.float64)

    def step(theta, init, x, y):
        phi = iopt.minimize(problem.objective, init, theta, x, y, solver=solver, batch_ndim=1).value
        phi = iopt.attach(phi, problem.objective, theta, x, y, linear_solver=cg, batch_ndim=1)
        return phi, (v * phi).sum()

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    for fn in (step, compiled):
        phi, value = fn(theta, problem.init, *problem.data)
        gradients = torch.autograd.grad(value, theta)
        torch.testing.assert_close(phi, problem.minimiser, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients, problem.meta_gradient(v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "network, solver, curvature",
    [
        ("mlp", GD, iopt.Hessian),
        ("mlp", newton(iopt.GaussNewton), iopt.GaussNewton),
        ("conv", AGD, iopt.Hessian),
    ],
    ids=["mlp-gd-hessian", "mlp-newton-gauss-newton", "conv-agd-hessian"],
)
def test_a_meta_learner_agrees_with_eager(double, network, solver, curvature):
    if network == "mlp":
        model, loss = MLP(2, (4,), 1), F.mse_loss
        support, query = ((torch.randn(3, 5, 2), torch.randn(3, 5, 1)) for _ in range(2))
    else:
        model, loss = (
            ConvNet(2, image_size=4, filters=2, blocks=1, zero_head=False),
            F.cross_entropy,
        )
        y = torch.tensor([0, 1, 0, 1]).expand(3, 4)
        support, query = ((torch.rand(3, 4, 1, 4, 4), y) for _ in range(2))
    meta = iopt.MetaLearner(
        model, loss, solver=solver, lam=iopt.Proximal(2.0, learned=True),
        meta_gradient=iopt.Implicit(iopt.CG(max_steps=2), curvature),
    )  # fmt: skip
    results = []
    for fn in (meta, torch.compile(meta, fullgraph=True, backend="aot_eager")):
        meta.zero_grad()
        losses = fn(support, query)
        losses.mean().backward()
        results.append((losses, [p.grad for p in meta.parameters()]))
    eager, compiled = results
    assert sum(g.abs().sum() for g in eager[1]) > 0.1
    torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)


def test_adapting_and_predicting_without_a_graph(double):
    meta = iopt.MetaLearner(MLP(2, (4,), 1), F.mse_loss, solver=GD)
    support = (torch.randn(3, 5, 2), torch.randn(3, 5, 1))

    def predict(support):
        return meta.predict(meta.adapt(support), support[0])

    with torch.no_grad():
        output = torch.compile(predict, fullgraph=True, backend="aot_eager")(support)
        torch.testing.assert_close(output, predict(support), rtol=1e-10, atol=1e-12)
