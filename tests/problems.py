"""A zoo of inner problems; where there is a closed form, the solution comes from NumPy alone.

Every factory takes a batch shape and returns a frozen `Problem` in float64. The tests hold the
library to the minimiser and the meta-gradient stored there, which share no code with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit_optim import InnerProblem, Objective, proximal

BATCHES = [(), (3,), (2, 3)]


@dataclass(frozen=True, eq=False)
class Problem:
    """One inner problem for every task of a batch.

    Attributes:
        objective: of one task.
        theta: what all tasks share.
        data: tensors `[*batch, ...]`.
        init: where a solver starts, `[*batch, ...]`.
        batch: the batch shape.
        minimiser: the exact solution, like `init` (the stationary point if there is no minimum).
        meta_gradient: `v -> d <v, minimiser> / d theta`, for v like `init`; exact, like `theta`.
        bounds: strong convexity and smoothness (mu, L), valid for every task.
    """

    objective: Any
    theta: Any
    data: tuple[Any, ...]
    init: Any
    batch: tuple[int, ...] = ()
    minimiser: Any = None
    meta_gradient: Callable[[Any], Any] | None = None
    bounds: tuple[float, float] | None = None

    @property
    def batch_ndim(self) -> int:
        return len(self.batch)

    @property
    def args(self) -> tuple[Any, ...]:
        """What follows the objective in `minimize`."""
        return (self.init, self.theta, *self.data)

    def bind(self) -> InnerProblem:
        return InnerProblem.bind(self.objective, *self.args, batch_ndim=self.batch_ndim)

    def flat(self, tree: Any = None) -> Tensor:
        """`init` (or another tree like it) laid end to end, `[*batch, n]`."""
        leaves = pytree.tree_leaves(self.init if tree is None else tree)
        return torch.cat([leaf.reshape(*self.batch, -1) for leaf in leaves], -1)

    def indices(self) -> list[tuple[int, ...]]:
        """Index of every task."""
        return list(itertools.product(*(range(size) for size in self.batch)))

    def task(self, index: tuple[int, ...]) -> Problem:
        """One task alone."""
        pick = lambda tree: pytree.tree_map(lambda t: t[index], tree)  # noqa: E731
        minimiser = None if self.minimiser is None else pick(self.minimiser)
        alone = replace(self, data=pick(self.data), init=pick(self.init), minimiser=minimiser)
        return replace(alone, batch=(), meta_gradient=None)

    def plain(self, index: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """One task's objective as a function of the flat vector: for autograd without vmap."""
        alone = self.task(index)
        leaves, spec = pytree.tree_flatten(alone.init)
        sizes = [leaf.numel() for leaf in leaves]

        def value(flat: Tensor) -> Tensor:
            views = [p.reshape(t.shape) for p, t in zip(flat.split(sizes), leaves, strict=True)]
            phi = pytree.tree_unflatten(views, spec)
            return alone.objective(phi, alone.theta, *alone.data)

        return value


def spd(seed, n, kappa=10.0, batch=(), dtype=torch.float64, eigenvalues=None):
    """Symmetric matrices with eigenvalues spread over [1/kappa, 1], and right-hand sides."""
    rng = np.random.default_rng(seed)
    if eigenvalues is None:
        eigenvalues = np.geomspace(1 / kappa, 1, n)
    q = np.linalg.qr(rng.standard_normal((*batch, n, n)))[0]
    matrix = (q * eigenvalues) @ np.swapaxes(q, -1, -2)
    matrix = (matrix + np.swapaxes(matrix, -1, -2)) / 2
    b = rng.standard_normal((*batch, n))
    return torch.from_numpy(matrix).to(dtype), torch.from_numpy(b).to(dtype)


def solve(matrix, b):
    """`matrix^-1 b` for stacks of matrices and vectors, by NumPy."""
    return np.linalg.solve(matrix, b[..., None])[..., 0]


# -- quadratics ------------------------------------------------------------------------------------


def _quadratic_objective(phi, theta, matrix, b):
    return phi @ matrix @ phi / 2 - (b + theta) @ phi


def quadratic(kappa=10.0, batch=(), n=6, seed=0) -> Problem:
    """`phi.A phi / 2 - (b + theta).phi`, a plain function."""
    matrix, b = spd(seed, n, kappa, batch)
    rng = np.random.default_rng(seed + 1)
    theta, init = rng.standard_normal(n), rng.standard_normal((*batch, n))
    A = matrix.numpy()

    def meta_gradient(v):
        return torch.from_numpy(solve(A, v.numpy()).reshape(-1, n).sum(0))

    return Problem(
        _quadratic_objective,
        torch.from_numpy(theta),
        (matrix, b),
        torch.from_numpy(init),
        batch,
        torch.from_numpy(solve(A, b.numpy() + theta)),
        meta_gradient,
        (1 / kappa, 1.0),
    )


def _form(phi):
    return phi


def _form_loss(output, target):
    matrix, slope = target
    return output @ matrix @ output / 2 + slope @ output


def indefinite(batch=(), n=6, seed=0, lam=1.0) -> Problem:
    """A structured objective whose Hessian has one negative eigenvalue in spite of lam."""
    rng = np.random.default_rng(seed + 2)
    matrix, slope = spd(seed, n, batch=batch, eigenvalues=np.linspace(-1.5, 3, n))
    anchor, init = rng.standard_normal(n), rng.standard_normal((*batch, n))
    A = matrix.numpy() + lam * np.eye(n)
    stationary = solve(A, lam * anchor - slope.numpy())
    return Problem(
        Objective(_form, _form_loss, proximal),
        (torch.from_numpy(anchor), torch.tensor(lam, dtype=torch.float64)),
        ((matrix, slope),),
        torch.from_numpy(init),
        batch,
        torch.from_numpy(stationary),
    )


# -- regressions with a proximal term --------------------------------------------------------------


def _linear(phi, x):
    return x @ phi


def half_mse(output, target):
    return ((output - target) ** 2).mean() / 2


def _proximal_meta_gradient(A, phi, anchor, lam):
    """Gradient in (anchor, lam) of `<v, phi>`, phi the minimiser with a proximal term."""

    def meta_gradient(v):
        w = solve(A, v)
        offset = phi - anchor
        n = v.shape[-1]
        if lam.ndim == 2:
            of_anchor = w @ lam
            outer = w[..., :, None] * offset[..., None, :]
            of_lam = -(outer + np.swapaxes(outer, -1, -2)).reshape(-1, n, n).sum(0) / 2
        else:
            of_anchor = lam * w
            of_lam = -(w * offset).reshape(-1, n).sum(0)
            of_lam = of_lam.sum() if lam.ndim == 0 else of_lam
        return of_anchor.reshape(-1, n).sum(0), np.asarray(of_lam)

    return meta_gradient


def _strength(lam, n):
    return lam if lam.ndim == 2 else np.diag(np.broadcast_to(lam, (n,)))


def _ridge(x, y, anchor, lam, batch, init) -> Problem:
    """`mean (x phi - y)^2 / 2 + 1/2 (phi - anchor) lam (phi - anchor)`."""
    count, n = x.shape[-2:]
    xt, prox = np.swapaxes(x, -1, -2) / count, _strength(lam, n)
    A = xt @ x + prox
    phi = solve(A, (xt @ y[..., None])[..., 0] + prox @ anchor)
    exact = _proximal_meta_gradient(A, phi, anchor, lam)
    eigenvalues = np.linalg.eigvalsh(A)
    return Problem(
        Objective(_linear, half_mse, proximal),
        (torch.from_numpy(anchor), torch.from_numpy(np.array(lam))),
        (torch.from_numpy(x), torch.from_numpy(y)),
        torch.from_numpy(init),
        batch,
        torch.from_numpy(phi),
        lambda v: tuple(torch.from_numpy(g) for g in exact(v.numpy())),
        (float(eigenvalues.min()), float(eigenvalues.max())),
    )


def ridge(kappa=100.0, batch=(), n=5, seed=0) -> Problem:
    """Ridge regression whose Hessian, lam included, has exactly the condition number kappa."""
    rng = np.random.default_rng(seed)
    count, lam = 2 * n, np.array(0.5 / kappa)
    singular = np.sqrt(count * (np.geomspace(1 / kappa, 1, n) - lam))
    left = np.linalg.qr(rng.standard_normal((*batch, count, n)))[0]
    right = np.linalg.qr(rng.standard_normal((*batch, n, n)))[0]
    x = (left * singular) @ right
    y, anchor = rng.standard_normal((*batch, count)), rng.standard_normal(n)
    return _ridge(x, y, anchor, lam, batch, rng.standard_normal((*batch, n)))


def vector_lam(batch=(), n=5, seed=0) -> Problem:
    """Ridge regression with one strength per parameter."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((*batch, 4, n)), rng.standard_normal((*batch, 4))
    anchor, lam = rng.standard_normal(n), rng.uniform(0.2, 2, n)
    return _ridge(x, y, anchor, lam, batch, rng.standard_normal((*batch, n)))


def matrix_lam(batch=(), n=5, seed=0) -> Problem:
    """Ridge regression with a symmetric positive definite matrix of strengths."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((*batch, 4, n)), rng.standard_normal((*batch, 4))
    lam = spd(seed + 1, n, 5.0)[0].numpy()
    return _ridge(x, y, rng.standard_normal(n), lam, batch, rng.standard_normal((*batch, n)))


def zero_rhs(batch=(), n=5, seed=0) -> Problem:
    """Ridge regression of zeros from a zero anchor: the solution is zero."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((*batch, 4, n)), np.zeros((*batch, 4))
    return _ridge(x, y, np.zeros(n), np.array(0.5), batch, rng.standard_normal((*batch, n)))


def _affine(phi, x):
    return x @ phi["weight"] + phi["bias"]


def least_squares(batch=(), inputs=3, outputs=2, count=8, seed=0, lam=0.3) -> Problem:
    """Several outputs, parameters by name; linear in them, so that Gauss-Newton is the Hessian."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*batch, count, inputs))
    y = rng.standard_normal((*batch, count, outputs))
    n = outputs + inputs * outputs
    anchor, init = rng.standard_normal(n), rng.standard_normal((*batch, n))
    ones = np.ones((*batch, count, 1))
    jacobian = np.kron(np.concatenate([ones, x], -1), np.eye(outputs))  # of the flat (bias, weight)
    flat = _ridge(jacobian, y.reshape(*batch, -1), anchor, np.array(lam), batch, init)

    def tree(t):
        bias, weight = t.split([outputs, inputs * outputs], -1)
        return {"bias": bias, "weight": weight.reshape(*t.shape[:-1], inputs, outputs)}

    def meta_gradient(v):
        v = torch.cat([v["bias"], v["weight"].reshape(*batch, -1)], -1)
        of_anchor, of_lam = flat.meta_gradient(v)
        return tree(of_anchor), of_lam

    return replace(
        flat,
        objective=Objective(_affine, half_mse, proximal),
        theta=(tree(flat.theta[0]), flat.theta[1]),
        data=(torch.from_numpy(x), torch.from_numpy(y)),
        init=tree(flat.init),
        minimiser=tree(flat.minimiser),
        meta_gradient=meta_gradient,
    )


def logistic(batch=(), n=4, count=12, seed=0, lam=0.2) -> Problem:
    """Logistic regression with a proximal term; the minimiser by Newton's method in NumPy."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*batch, count, n))
    y = (rng.uniform(size=(*batch, count)) < 0.5).astype(np.float64)
    anchor = rng.standard_normal(n)
    phi = np.broadcast_to(anchor, (*batch, n)).copy()
    xt = np.swapaxes(x, -1, -2) / count
    for _ in range(30):
        p = 1 / (1 + np.exp(-(x @ phi[..., None])[..., 0]))
        A = (xt * (p * (1 - p))[..., None, :]) @ x + lam * np.eye(n)
        phi = phi - solve(A, (xt @ (p - y)[..., None])[..., 0] + lam * (phi - anchor))
    exact = _proximal_meta_gradient(A, phi, anchor, np.array(lam))
    smoothness = float(np.linalg.eigvalsh(xt @ x).max()) / 4 + lam
    return Problem(
        Objective(_linear, F.binary_cross_entropy_with_logits, proximal),
        (torch.from_numpy(anchor), torch.tensor(lam, dtype=torch.float64)),
        (torch.from_numpy(x), torch.from_numpy(y)),
        torch.from_numpy(rng.standard_normal((*batch, n))),
        batch,
        torch.from_numpy(phi),
        lambda v: tuple(torch.from_numpy(g) for g in exact(v.numpy())),
        (lam, smoothness),
    )


# -- networks --------------------------------------------------------------------------------------


def _tensors(rng, shapes, batch=(), scale=1.0):
    return {
        name: torch.from_numpy(scale * rng.standard_normal((*batch, *shape)))
        for name, shape in shapes.items()
    }


def _network(predict, shapes, x, classes, batch, rng, lam) -> Problem:
    y = torch.from_numpy(rng.integers(classes, size=x.shape[: len(batch) + 1]))
    theta = (_tensors(rng, shapes, scale=0.7), torch.tensor(lam, dtype=torch.float64))
    init = _tensors(rng, shapes, batch, scale=0.7)
    return Problem(Objective(predict, F.cross_entropy, proximal), theta, (x, y), init, batch)


def _mlp(phi, x):
    return torch.tanh(x @ phi["w1"] + phi["b1"]) @ phi["w2"] + phi["b2"]


def tanh_mlp(batch=(), seed=0, lam=0.5) -> Problem:
    """A small network with tanh: no closed form, indefinite for a small lam."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((*batch, 6, 3)))
    shapes = {"b1": (3,), "b2": (2,), "w1": (3, 3), "w2": (3, 2)}
    return _network(_mlp, shapes, x, 2, batch, rng, lam)


EPS = 1e-3


def _batch_norm(h, weight, bias):
    return F.batch_norm(h, None, None, weight, bias, training=True, eps=EPS)


def _instance_norm(h, weight, bias):
    return F.instance_norm(h, weight=weight, bias=bias, eps=EPS)


def _group_norm(h, weight, bias):
    return F.group_norm(h, 2, weight, bias, eps=EPS)


def _layer_norm(h, weight, bias):
    return F.layer_norm(h, h.shape[1:], weight, bias, eps=EPS)


NORMS = {
    "batch": _batch_norm,
    "layer": _layer_norm,
    "instance": _instance_norm,
    "group": _group_norm,
}


def norm_by_hand(kind, h, weight, bias):
    """The same normalisations from their definition, on `h [images, channels, height, width]`."""
    shape = h.shape
    groups = {"batch": None, "instance": shape[1], "group": 2, "layer": 1}[kind]
    if groups is None:
        mean = h.mean((0, 2, 3), keepdim=True)
        normal = (h - mean) / (((h - mean) ** 2).mean((0, 2, 3), keepdim=True) + EPS).sqrt()
    else:
        g = h.reshape(shape[0], groups, -1)
        mean = g.mean(-1, keepdim=True)
        normal = (g - mean) / (((g - mean) ** 2).mean(-1, keepdim=True) + EPS).sqrt()
    normal = normal.reshape(shape)
    per_channel = (-1, 1, 1) if weight.ndim == 1 else weight.shape
    return normal * weight.reshape(per_channel) + bias.reshape(per_channel)


def conv(norm="batch", batch=(), seed=0, lam=0.5, by_hand=False) -> Problem:
    """Convolution, normalisation with weights, tanh, linear; the normalisation also by hand."""

    def predict(phi, x):
        h = F.conv2d(x, phi["conv"], padding=1)
        args = (h, phi["norm_weight"], phi["norm_bias"])
        h = norm_by_hand(norm, *args) if by_hand else NORMS[norm](*args)
        h = torch.tanh(h).mean((-2, -1)) + h[:, :, 0, 0]
        return h @ phi["head"]

    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((*batch, 4, 1, 3, 3)))
    affine = (2, 3, 3) if norm == "layer" else (2,)
    shapes = {"conv": (2, 1, 3, 3), "norm_weight": affine, "norm_bias": affine, "head": (2, 2)}
    return _network(predict, shapes, x, 2, batch, rng, lam)


# Strongly convex, with an exact minimiser.
CONVEX = {
    "quadratic": lambda batch=(): quadratic(10.0, batch),
    "ridge kappa=1": lambda batch=(): ridge(1.0, batch),
    "ridge kappa=1e2": lambda batch=(): ridge(1e2, batch),
    "logistic": logistic,
    "least_squares": least_squares,
    "vector_lam": vector_lam,
    "matrix_lam": matrix_lam,
    "zero_rhs": zero_rhs,
}

ZOO = {
    **CONVEX,
    "ridge kappa=1e6": lambda batch=(): ridge(1e6, batch),
    "indefinite": indefinite,
    "tanh_mlp": tanh_mlp,
    **{f"conv {norm} norm": lambda batch=(), norm=norm: conv(norm, batch) for norm in NORMS},
}
