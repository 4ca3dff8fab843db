"""One meta-gradient of implicit MAML, as other libraries compute it: a loop over tasks.

Every contender takes the same `Workload` and returns the mean query loss's gradient. TorchOpt and
higher are the packages; hypertorch's and the authors' methods are written down here from their
papers and sources, since neither installs: same algorithm, same number of products. The packages are
imported where they are used: a machine may lack them.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import implicit_optim as iopt

LAM = 50.0  # the Hessian is definite then, and all who compute the same gradient agree


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        name: for the table.
        model: its parameters are theta.
        loss: of support and query.
        support, query: `(x [T, N, ...], y [T, N, ...])`.
        lr, steps, cg: of the inner gradient descent, and CG steps.
    """

    name: str
    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    lr: float = 0.01
    steps: int = 16
    cg: int = 5

    @property
    def theta(self):
        return list(self.model.parameters())

    def tasks(self):
        return zip(*self.support, *self.query, strict=True)

    def inner(self, phi, theta, x, y):
        """One task's inner objective; phi and theta are lists of tensors."""
        names = [name for name, _ in self.model.named_parameters()]
        output = functional_call(self.model, dict(zip(names, phi, strict=True)), (x,))
        far = sum((p - t).square().sum() for p, t in zip(phi, theta, strict=True))
        return self.loss(output, y) + LAM / 2 * far

    def outer(self, phi, x, y):
        names = [name for name, _ in self.model.named_parameters()]
        return self.loss(functional_call(self.model, dict(zip(names, phi, strict=True)), (x,)), y)

    def solve(self, x, y):
        """Gradient descent on one task, in plain torch, without a graph."""
        theta = [t.detach() for t in self.theta]
        phi = [t.clone() for t in theta]
        for _ in range(self.steps):
            phi = [p.requires_grad_() for p in phi]
            grads = torch.autograd.grad(self.inner(phi, theta, x, y), phi)
            with torch.no_grad():
                phi = [p - self.lr * g for p, g in zip(phi, grads, strict=True)]
        return [p.requires_grad_() for p in phi]


def learner(w, rule=None, **settings):
    return iopt.MetaLearner(
        w.model, w.loss, lam=LAM, solver=iopt.gd(lr=w.lr, max_steps=w.steps),
        meta_gradient=rule or iopt.Implicit(iopt.CG(max_steps=w.cg, min_curvature=0.0)),
        on_solve=iopt.Ignore(), **settings,
    )  # fmt: skip


def ours(w, rule=None, **settings):
    """The meta-step of this library; a fresh learner costs nothing."""
    meta = learner(w, rule, **settings)
    return torch.autograd.grad(meta(w.support, w.query).mean(), w.theta)


def first_order(w):
    return ours(w, iopt.FirstOrder())


def compiled(w):
    """The same step, compiled once; for one small problem, for one thread: nothing waits for another."""
    options = {"cpp.threads": 1} if len(w.support[0]) == 1 else None
    meta = torch.compile(learner(w), fullgraph=True, options=options)

    def run():
        return torch.autograd.grad(meta(w.support, w.query).mean(), w.theta)

    for ours_, its in zip(ours(w), run(), strict=True):
        torch.testing.assert_close(its, ours_, rtol=1e-3, atol=1e-5)
    return run


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def cg(product, b, steps):
    """Plain CG on lists of tensors, as all of them write it; coefficients stay on the device."""
    x, r, p = [torch.zeros_like(t) for t in b], list(b), list(b)
    rr = dot(r, r)
    for _ in range(steps):
        Ap = product(p)
        alpha = rr / dot(p, Ap)
        x = [a + alpha * c for a, c in zip(x, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, Ap, strict=True)]
        rr, before = dot(r, r), rr
        p = [a + rr / before * c for a, c in zip(r, p, strict=True)]
    return x


def _mean_over_tasks(w, of_task):
    total = [torch.zeros_like(t) for t in w.theta]
    for x, y, xq, yq in w.tasks():
        total = [a + g for a, g in zip(total, of_task(x, y, xq, yq), strict=True)]
    return [t / len(w.support[0]) for t in total]


def hypertorch(w):
    """Grazzi et al. 2020: the graph of the fixed-point map is kept, `x - J^T x` is the product."""

    def of_task(x, y, xq, yq):
        phi = w.solve(x, y)
        v = torch.autograd.grad(w.outer(phi, xq, yq), phi)
        slope = torch.autograd.grad(w.inner(phi, w.theta, x, y), phi, create_graph=True)
        mapped = [p - g for p, g in zip(phi, slope, strict=True)]

        def product(xs):
            pulled = torch.autograd.grad(mapped, phi, xs, retain_graph=True)
            return [a - b for a, b in zip(xs, pulled, strict=True)]

        return torch.autograd.grad(mapped, w.theta, cg(product, v, w.cg))

    return _mean_over_tasks(w, of_task)


def authors(w):
    """The paper's code: each product rebuilds the gradient's graph, CG on `I + H / lam`."""

    def of_task(x, y, xq, yq):
        phi = w.solve(x, y)
        v = torch.autograd.grad(w.outer(phi, xq, yq), phi)

        def product(xs):
            slope = torch.autograd.grad(w.outer(phi, x, y), phi, create_graph=True)
            pulled = torch.autograd.grad(slope, phi, xs)
            return [a + h / LAM for a, h in zip(xs, pulled, strict=True)]

        return cg(product, v, w.cg)

    return _mean_over_tasks(w, of_task)


def torchopt_cg(w, solve=None):
    """TorchOpt's implicit gradient with its CG."""
    import torchopt
    from torchopt.diff.implicit import custom_root

    solve = solve or torchopt.linear_solve.solve_cg(maxiter=w.cg, atol=0.0, rtol=0.0)
    count = len(w.theta)

    def of_task(x, y, xq, yq):
        phi = tuple(w.solve(x, y))

        def slope(phi, *theta):
            return torch.func.grad(lambda p: w.inner(p, theta, x, y))(phi)

        @custom_root(slope, argnums=tuple(range(1, count + 1)), solve=solve)
        def solver(init, *theta):
            return phi

        attached = solver(phi, *w.theta)
        return torch.autograd.grad(w.outer(attached, xq, yq), w.theta)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*functorch", category=FutureWarning)
        return _mean_over_tasks(w, of_task)


def torchopt_default(w):
    """TorchOpt's default: CG on the normal equations, two products an iteration."""
    import torchopt

    return torchopt_cg(w, torchopt.linear_solve.solve_normal_cg(maxiter=w.cg, atol=0.0, rtol=0.0))


def higher_maml(w):
    """Unrolled MAML: another gradient, of the iterate, and the memory of every step."""
    import higher

    def of_task(x, y, xq, yq):
        sgd = torch.optim.SGD(w.model.parameters(), lr=w.lr)
        with higher.innerloop_ctx(w.model, sgd, copy_initial_weights=False) as (net, inner):
            for _ in range(w.steps):
                far = dot(*[[p - t for p, t in zip(net.parameters(), w.theta, strict=True)]] * 2)
                inner.step(w.loss(net(x), y) + LAM / 2 * far)
            return torch.autograd.grad(w.loss(net(xq), yq), w.theta)

    return _mean_over_tasks(w, of_task)


CONTENDERS = {
    "ours": ours,
    "ours, first order": first_order,
    "hypertorch's method": hypertorch,
    "the authors' method": authors,
    "TorchOpt, CG": torchopt_cg,
    "TorchOpt, default": torchopt_default,
    "higher, MAML": higher_maml,
}
SAME_GRADIENT = ("hypertorch's method", "the authors' method", "TorchOpt, CG")
