"""What the comparisons with other libraries share: our answer, TorchOpt's, and whole matrices."""

import contextlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian

import implicit_optim as iopt

try:
    import higher  # noqa: F401  the tests take it from here
    import torchopt
    from torchopt.diff.implicit import custom_root
except ImportError as error:
    raise ImportError(
        f"tests/peers.py compares with higher and torchopt, and {error}: "
        "pip install higher 'torchopt>=0.7.3', or let `make test` build the environment"
    ) from error

EXACT = iopt.CG(rtol=1e-13, max_steps=500)
NEWTON = iopt.newton_cg(linear_solver=EXACT, tol=1e-12, max_steps=50)
THEIR_CG = torchopt.linear_solve.solve_cg(rtol=1e-14)


def random(n, seed=5):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n))


def error_of(found, exact):
    """Largest relative error, tensor by tensor."""
    pairs = zip(found, exact, strict=True)
    errors = [torch.linalg.norm(a - b) / torch.linalg.norm(b) for a, b in pairs]
    return torch.stack(errors).max().item()  # NaN if any is


def fresh(tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def paired(a, b):
    """Inner product of two tensors, or of two tuples of tensors."""
    return flat(a) @ flat(b) if isinstance(a, tuple) else (a * b).sum()


def by_task(support, query):
    """The episodes of the tasks, one by one."""
    return [[tuple(t[i] for t in part) for part in (support, query)] for i in range(len(query[0]))]


def written_out(problem):
    """The problem's objective as `F(phi, anchor, lam)`."""
    return lambda phi, anchor, lam: problem.objective(phi, (anchor, lam), *problem.data)


def our_phi(objective, phi, theta, solver=EXACT):
    """The minimiser phi of `objective(phi, *theta)` as a function of theta."""
    return iopt.attach(phi, lambda p, t: objective(p, *t), theta, linear_solver=solver)


def our_gradient(objective, phi, theta, v, solver=EXACT):
    """`d <v, phi> / d theta`."""
    theta = fresh(theta)
    return torch.autograd.grad(paired(our_phi(objective, phi, theta, solver), v), theta)


@contextlib.contextmanager
def old_names():
    """TorchOpt 0.7.3 calls functorch by names that torch 2 has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "We've integrated functorch into PyTorch", FutureWarning)
        yield


def torchopt_phi(objective, phi, theta, solve=THEIR_CG):
    """`our_phi` by TorchOpt; phi may be a tuple of tensors."""

    def slope(phi, *theta):
        return torch.func.grad(objective)(phi, *theta)

    @custom_root(slope, argnums=tuple(range(1, len(theta) + 1)), solve=solve)
    def solver(init, *theta):
        return phi

    return solver(phi, *theta)


@old_names()
def torchopt_gradient(objective, phi, theta, v, solve=THEIR_CG):
    """`our_gradient` by TorchOpt."""
    theta = fresh(theta)
    return torch.autograd.grad(paired(torchopt_phi(objective, phi, theta, solve), v), theta)


def regression(tasks=2):
    def batch():
        return torch.randn(tasks, 6, 4) / 2, torch.randn(tasks, 6, 1)

    return batch(), batch()


def dense_meta_gradient(model, log_lam, support, query):
    """The query loss of one task and its gradient in (weights, log lam), from whole matrices.

    The minimiser is found by Newton's method; nothing of ours is used.
    """
    (x, y), (xq, yq) = support, query
    lam = log_lam.exp().item()
    shapes = [p.shape for p in model.parameters()]
    anchor = flat(model.parameters()).detach()

    def fit(phi, x, y):
        parts = phi.split([s.numel() for s in shapes])
        names = [name for name, _ in model.named_parameters()]
        weights = {k: p.reshape(s) for k, p, s in zip(names, parts, shapes, strict=True)}
        return F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)

    def inner(phi):
        return fit(phi, x, y) + lam / 2 * (phi - anchor).square().sum()

    phi = anchor
    for _ in range(12):
        phi = phi - torch.linalg.solve(hessian(inner, phi), jacobian(inner, phi))
    assert torch.linalg.norm(jacobian(inner, phi)) < 1e-14
    A = hessian(inner, phi)
    assert torch.linalg.eigvalsh(A).min() > 0
    w = torch.linalg.solve(A, jacobian(lambda p: fit(p, xq, yq), phi))
    of_log_lam = -lam * w @ (phi - anchor)
    return fit(phi, xq, yq).detach(), torch.cat([lam * w, of_log_lam.reshape(1)])


MODELS = {  # and lam
    "ridge": (lambda: nn.Linear(4, 1, bias=False), 0.8),
    "tanh": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), 2.0),
}
