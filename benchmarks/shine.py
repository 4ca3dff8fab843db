"""SHINE: the inverse that the inner L-BFGS solve already holds, as the inverse of the meta-gradient.

Ramzi et al. 2022, "SHINE: sharing the inverse estimate from the forward pass for bi-level optimization
and implicit models". A rule of one's own over public parts: the pairs are those in the state of
`iopt.lbfgs`, and the products of a refinement are spent by `iopt.CG`.
"""

from dataclasses import dataclass

import torch

import implicit_optim as iopt


def through(problem, phi, inverse):
    """phi as a function of theta: its backward pass takes v to `lam inverse(v)`."""
    anchor, lam = problem.theta
    theta = problem.layout.ravel(anchor).expand_as(phi)
    moved = theta - theta.detach()
    if moved.requires_grad:
        moved.register_hook(lambda v: lam.detach() * inverse(v))
    return phi + moved


def refined(A, x, v, products):
    """A x = v from a guess: one product for its residual, each other one a step of CG."""
    cg = iopt.CG(max_steps=products - 1)
    correction, _, stats = cg.solve(iopt.Linearized(A.mv, lambda r: r), v - A.mv(x))
    return torch.where(stats["steps"].unsqueeze(-1) > 0, x + correction, x)


@dataclass(frozen=True)
class Shine(iopt.MetaGradient):
    """``lam B v`` with the inverse B of the inner solver's pairs, for a lam that is a number.

    Args:
        products: Hessian-vector products that refine it, from the guess ``B v``. Default: none.
        preconditioner: spend them on CG from zero with B as its preconditioner instead.
    """

    products: int = 0
    preconditioner: bool = False

    def adapt(self, problem, start, solver, on_solve):
        fixed = problem.detach()
        each = fixed.parts(lambda part, tasks: pairs(part, start[tasks], solver), len(start))
        phi, histories = torch.cat([phi for phi, _ in each]), [history for _, history in each]

        def inverse(v):
            own = iter(histories)
            solve = lambda part, tasks: self.solve(part, phi[tasks], next(own), v[tasks])  # noqa: E731
            return torch.cat(fixed.parts(solve, len(v)))

        return through(problem, phi, inverse)

    @torch.no_grad()
    def solve(self, problem, phi, history, v):
        B = lambda r: -history.direction(r, history.rho.shape[-1])  # noqa: E731
        if self.products == 0:
            return B(v)
        A = iopt.Hessian(problem, phi).linearize()
        if self.preconditioner:
            cg = iopt.CG(max_steps=self.products, min_curvature=0.0)
            return cg.solve(iopt.Linearized(A.mv, B), v).value
        return refined(A, B(v), v, self.products)


@torch.no_grad()
def pairs(problem, phi, solver):
    """The last iterate of `lbfgs`, and its pairs, that of the last step too."""
    state = solver.init(problem, phi)
    for _ in range(solver.max_steps):
        at = solver.known(state) or solver.evaluate(problem, phi)
        phi, state, _ = solver.step(problem, phi, at, state)
    (before, slope), history, *_ = state
    at = solver.known(state) or solver.evaluate(problem, phi)
    return phi, history.add(phi - before, at.grad - slope)
