"""The paper's synthetic problem (F.1): linear regressions whose Hessian has a prescribed spectrum.

`Lhat_i(phi) = phi.A_i phi / 2 - b_i.phi` with `A_i = x^T x / n`. The query set of a task has other
inputs and the same line.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import implicit_optim as iopt


def half_mse(output, target):
    return (output - target).square().mean() / 2


@dataclass(frozen=True, eq=False)
class Quadratics:
    """T tasks; x is `[T, n, n]` and y `[T, n, 1]`, in float64."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    theta: Tensor
    lam: float
    bounds: tuple[float, float]  # least and greatest eigenvalue of A + lam I

    @classmethod
    def make(cls, tasks, spectrum, lam=5.0, seed=0):
        """Tasks whose A has the eigenvalues `spectrum [n]`, ascending, in random directions."""
        rng, n = torch.Generator().manual_seed(seed), len(spectrum)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        left, right = (torch.linalg.qr(normal(tasks, n, n))[0] for _ in range(2))
        x = n**0.5 * left * spectrum.sqrt() @ right.mT  # x^T x / n = right diag(spectrum) right^T
        asked, lines = normal(tasks, n, n), normal(tasks, n, 1)
        bounds = lam + spectrum[0].item(), lam + spectrum[-1].item()
        return cls((x, x @ lines), (asked, asked @ lines), normal(n), lam, bounds)

    @classmethod
    def conditioned(cls, tasks, n, kappa, lam, seed=0):
        """Tasks whose inner objective has the eigenvalues lam ... lam kappa, evenly on a log scale."""
        spectrum = lam * torch.logspace(0, math.log10(kappa), n, dtype=torch.float64) - lam
        return cls.make(tasks, spectrum.clamp(min=0), lam, seed)

    def task(self, i):
        """One task alone."""
        pick = lambda pair: tuple(t[i : i + 1] for t in pair)  # noqa: E731
        return Quadratics(pick(self.support), pick(self.query), self.theta, self.lam, self.bounds)

    def gd(self, steps):
        """Gradient descent with the step `1 / L`."""
        return iopt.gd(lr=1 / self.bounds[1], max_steps=steps)

    def agd(self, steps):
        mu, smoothness = self.bounds
        return iopt.agd(strong_convexity=mu, smoothness=smoothness, max_steps=steps)

    def meta_gradient(self, solver, rule):
        """The library's meta-gradient of the mean of the tasks' losses, `[n]`."""
        model = nn.Linear(len(self.theta), 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(self.theta)
        meta = iopt.MetaLearner(
            model,
            half_mse,
            solver=solver,
            lam=self.lam,
            meta_gradient=rule,
            on_solve=iopt.Ignore(),
        )
        loss = meta(self.support, self.query).mean()
        (gradient,) = torch.autograd.grad(loss, model.weight)
        return gradient[0]

    def exact(self):
        """`mean_i lam (A_i + lam I)^-1 grad L_i(phi_i*)`, by dense algebra, `[n]`."""
        (x, y), (asked, target) = self.support, self.query
        n = x.shape[-1]
        G = x.mT @ x / n + self.lam * torch.eye(n, dtype=x.dtype)
        phi = torch.linalg.solve(G, x.mT @ y / n + self.lam * self.theta[:, None])
        v = asked.mT @ (asked @ phi - target) / n
        return self.lam * torch.linalg.solve(G, v).mean(0)[:, 0]

    def error(self, solver, rule):
        """Relative error of the library's meta-gradient."""
        exact = self.exact()
        return ((self.meta_gradient(solver, rule) - exact).norm() / exact.norm()).item()
