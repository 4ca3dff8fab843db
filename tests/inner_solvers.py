"""Inner solvers for the tests of minimize, and problems that tell tasks apart."""

import torch
from hypothesis import strategies as st

from implicit_optim import CG, StrongWolfe, agd, gd, lbfgs, minimize, newton_cg, nonlinear_cg

F64 = torch.float64
SEEDS = st.integers(0, 2**32 - 1)
EXACT = CG(rtol=1e-12)
FEW = StrongWolfe(c2=0.5, max_trials=5)  # under vmap every trial is made

RULES = {
    "gd": gd(lr=0.1, max_steps=7),
    "agd": agd(lr=0.1, momentum=0.7, max_steps=7),
    "newton_cg": newton_cg(linear_solver=CG(max_steps=2), max_steps=3),
    "newton_cg, tol": newton_cg(linear_solver=CG(rtol=1e-8), tol=1e-6),
    "gd, tol": gd(lr=0.3, max_steps=100, tol=1e-2),
    "lbfgs": lbfgs(memory=2, max_steps=5),
    "lbfgs, tol": lbfgs(line_search=FEW, max_steps=15, tol=1e-6),
    "nonlinear_cg": nonlinear_cg(max_steps=3),
    "nonlinear_cg, tol": nonlinear_cg(line_search=FEW, max_steps=15, tol=1e-4),
}


def run(problem, solver):
    return minimize(problem.objective, *problem.args, solver=solver, batch_ndim=problem.batch_ndim)


def gradients(problem, value):
    """Of every task at `value`, by plain autograd, `[*batch, n]`."""
    flat = problem.flat(value)
    rows = [
        torch.autograd.functional.jacobian(problem.plain(i), flat[i]) for i in problem.indices()
    ]
    return torch.stack(rows).reshape(flat.shape)


def parabolas(phi, theta, a):
    """Tasks of different steepness, with the minimiser theta."""
    return (a * (phi - theta) ** 2).sum() / 2


STEEPNESS = torch.tensor([0.5, 1.0, 4.0, 10.0], dtype=F64)


def parabola_args(steepness=STEEPNESS):
    return torch.zeros(len(steepness), 2, dtype=F64), torch.ones(2, dtype=F64), steepness
