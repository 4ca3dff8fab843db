"""Inner problems whose solution is attached: the paper's quadratic, and logistic regression."""

import torch
import torch.nn.functional as F

import implicit_optim as iopt

EXACT = iopt.CG(rtol=1e-13, max_steps=500)


def logistic(phi, theta, x, y):
    """Smooth, strongly convex, with a Hessian that changes from point to point."""
    anchor, lam = theta
    return F.softplus(-y * (x @ phi)).mean() + iopt.proximal(phi, (anchor, lam))


def solved(theta, lam, x, y, objective=logistic, batch_ndim=0, **kwargs):
    init = torch.zeros(*x.shape[:batch_ndim], theta.shape[-1])
    # Under vmap a loop cannot stop early, so the limits are close to what n = 4 needs.
    few = iopt.CG(rtol=1e-13, max_steps=12)
    solver = iopt.newton_cg(linear_solver=few, tol=1e-12, max_steps=12)
    solution = iopt.minimize(
        objective, init, (theta, lam), x, y, solver=solver, batch_ndim=batch_ndim
    )
    return iopt.attach(
        solution.value, objective, (theta, lam), x, y,
        linear_solver=EXACT, batch_ndim=batch_ndim, **kwargs,
    )  # fmt: skip


def logistic_inputs(batch=(), n=4, examples=6):
    theta = torch.randn(n, requires_grad=True)
    lam = torch.tensor(0.7, requires_grad=True)
    x = torch.randn(*batch, examples, n, requires_grad=True)
    y = torch.randn(*batch, examples).sign()
    return theta, lam, x, y
