"""Drawn problems: shapes, trees, dtypes and strengths, with their gradients in NumPy.

The inner problem is a regression with outputs `h(X phi)`, mean squared error and a proximal term of
any kind. Its gradient, its Hessian, its Gauss-Newton matrix and its mixed derivatives are written out
in NumPy, for one task at a time: the oracle knows no autograd, no batch dimensions and no pytrees.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import implicit_optim as iopt

BATCHES = [(), (1,), (3,), (2, 3)]
SHAPES = [(), (2,), (1,), (2, 2), (3,), (0,), (1, 3), (0, 3)]
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float64, torch.float32])
KINDS = ["tensor", "list", "tuple", "dict", "named", "nested"]  # named: lam too is a dict
SOLVERS = {torch.float64: iopt.CG(rtol=1e-12, max_steps=500), torch.float32: iopt.CG()}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
NAMES = ["anchor", "lam", "x", "y"]

# The activation with its first two derivatives.
LINKS = {
    "linear": (lambda z: z, np.ones_like, np.zeros_like),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2, lambda z: -2 * np.tanh(z) / np.cosh(z) ** 2),
}

TORCH_LINKS = {"linear": lambda z: z, "tanh": torch.tanh}

# -- trees, written here once more so that the library's own do not check themselves ----------------


def build(kind, leaves):
    if kind == "tensor":
        return leaves[0]
    if kind == "dict":  # named so that sorting would change the order
        return {f"p{9 - i}": leaf for i, leaf in enumerate(leaves)}
    if kind == "nested":
        return {"z": leaves[0], "a": [tuple(leaves[1:]), {}]}
    return {"list": list, "tuple": tuple}[kind](leaves)


def leaves_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves_of(part)]


def flatten(tree):
    """One task's tree as a vector."""
    return torch.cat([leaf.reshape(-1) for leaf in leaves_of(tree)])


def split(flat, shapes, batch=()):
    """A flat array `[*batch, n]` as leaves."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [
        part.reshape((*batch, *shape))
        for part, shape in zip(np.split(flat, ends[:-1], -1), shapes, strict=True)
    ]


def sum_to(array, shape):
    """Undo broadcasting, as a gradient must."""
    array = array.sum(tuple(range(array.ndim - len(shape))))
    ones = tuple(i for i, size in enumerate(shape) if size == 1)
    return array.sum(ones, keepdims=True)


# -- a drawn problem -------------------------------------------------------------------------------


@dataclass
class Case:
    """Everything about a problem, in NumPy and float64 but with the digits of `dtype`."""

    batch: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    shapes: list[tuple[int, ...]]
    link: str
    lam_kind: str
    lam: Any  # an array, or one for each leaf
    anchor: np.ndarray
    x: np.ndarray
    y: np.ndarray
    phi: np.ndarray
    structured: bool
    curvature: Any
    shared: bool  # whether all tasks have the same x, by a view
    strided: bool
    seed: int

    @property
    def n(self):
        return len(self.anchor)

    @property
    def names(self):
        return [f"p{9 - i}" for i in range(len(self.shapes))]

    @property
    def strength(self):
        """Lam as a matrix."""
        if self.lam_kind == "named":
            full = [np.broadcast_to(a, s) for a, s in zip(self.lam, self.shapes, strict=True)]
            return np.diag(np.concatenate([a.reshape(-1) for a in full]))
        return self.lam if self.lam.ndim == 2 else np.diag(np.broadcast_to(self.lam, self.n))

    def lam_gradient(self, of_strength):
        """The gradient in lam from that in the matrix."""
        if self.lam_kind == "named":
            parts = split(np.diag(of_strength), self.shapes)
            return [sum_to(p, a.shape) for p, a in zip(parts, self.lam, strict=True)]
        if self.lam.ndim == 2:
            return [(of_strength + of_strength.T) / 2]
        return [np.diag(of_strength) if self.lam.ndim else np.trace(of_strength)]

    def tasks(self):
        return itertools.product(*(range(size) for size in self.batch))

    def task_x(self, index):
        return self.x if self.shared else self.x[index]

    def matrix(self, index, curvature=None):
        """The Hessian or the Gauss-Newton matrix of one task, the gradient's ingredients."""
        x, y, phi = self.task_x(index), self.y[index], self.phi[index]
        h, dh, ddh = LINKS[self.link]
        z, m = x @ phi, len(y)
        q = (h(z) - y) * dh(z)
        dq = dh(z) ** 2 + (h(z) - y) * ddh(z)
        bend = dh(z) ** 2 if (curvature or self.curvature) is iopt.GaussNewton else dq
        return x.T * bend @ x / m + self.strength, q / m, dq / m, dh(z) / m

    def clearly_convex(self):
        """So that CG does not stop at negative curvature, its floor of 0.1 of lam included."""
        return all(
            np.linalg.eigvals(np.linalg.solve(self.strength, self.matrix(i)[0])).real.min(initial=1)
            > 0.15
            for i in self.tasks()
        )

    def gradients(self, v, first_order=False):
        """`d <v, phi*>` in anchor, lam, x and y by the implicit function theorem, task by task.

        To first order the matrix is lam's alone, or for a plain function nothing is known of it.
        """
        anchor, strength = np.zeros(self.n), np.zeros((self.n, self.n))
        of_x, of_y = np.zeros(self.batch + self.x.shape[-2:]), np.zeros(self.y.shape)
        for i in self.tasks():
            matrix, q, dq, dh = self.matrix(i)
            if first_order:
                matrix = self.strength if self.structured else np.eye(self.n)
            w, x, phi = np.linalg.solve(matrix, v[i]), self.task_x(i), self.phi[i]
            anchor += self.strength @ w
            strength -= np.outer(w, phi - self.anchor)
            of_y[i] = dh * (x @ w)
            of_x[i] = -(np.outer(q, w) + np.outer(dq * (x @ w), phi))
        of_x = of_x.sum(tuple(range(len(self.batch)))) if self.shared else of_x
        anchors = split(anchor, self.shapes)
        return {"anchor": anchors, "lam": self.lam_gradient(strength), "x": [of_x], "y": [of_y]}

    # -- the same in torch ---------------------------------------------------------------------------

    def tensor(self, array):
        return torch.from_numpy(np.array(array)).to(self.dtype)

    def inputs(self):
        """Leaves of anchor, lam, x and y as a caller has them."""
        x = self.tensor(self.x)
        x = x.mT.contiguous().mT if self.strided else x
        lam = self.lam if self.lam_kind == "named" else [self.lam]
        return {
            "anchor": [self.tensor(a) for a in split(self.anchor, self.shapes)],
            "lam": [self.tensor(a) for a in lam],
            "x": [x],
            "y": [self.tensor(self.y)],
        }

    def theta(self, inputs):
        lam = inputs["lam"]
        if self.lam_kind == "named":  # in another order than phi's
            lam = dict(reversed(list(zip(self.names, lam, strict=True))))
        else:
            (lam,) = lam
        return build(self.kind, inputs["anchor"]), lam

    def data(self, inputs):
        (x,), (y,) = inputs["x"], inputs["y"]
        return x.expand(*self.batch, *x.shape) if self.shared else x, y

    def tree(self, flat):
        return build(self.kind, [self.tensor(a) for a in split(flat, self.shapes, self.batch)])

    def objective(self):
        link = TORCH_LINKS[self.link]
        objective = iopt.Objective(
            lambda phi, x: link(x @ flatten(phi)),
            lambda output, y: ((output - y) ** 2).mean() / 2,
            iopt.proximal,
        )
        return objective if self.structured else lambda *args: objective(*args)

    def attach(self, inputs, mapped=0, x_dim=0, **settings):
        """The attached solution; `mapped` of the batch dimensions are left to vmap.

        The first of them then stands at `x_dim` in x.
        """
        theta, objective = self.theta(inputs), self.objective()
        settings = {"linear_solver": SOLVERS[self.dtype], **settings}

        def one(phi, x, y):
            return iopt.attach(
                phi, objective, theta, x, y, batch_ndim=len(self.batch) - mapped,
                curvature=self.curvature, **settings,
            )  # fmt: skip

        x, y = self.data(inputs)
        for level in reversed(range(mapped)):
            one = torch.func.vmap(one, in_dims=(0, 0 if level else x_dim, 0))
        return one(self.tree(self.phi), x.movedim(0, x_dim) if mapped else x, y)

    def weighed(self, tree, v):
        """`<v, phi>` over all tasks."""
        parts = split(v, self.shapes, self.batch)
        pairs = zip(leaves_of(tree), parts, strict=True)
        return sum((leaf * self.tensor(part)).sum() for leaf, part in pairs)


@st.composite
def cases(draw, *, links=tuple(LINKS), dtypes=DTYPES, batches=BATCHES, kinds=KINDS, shapes=SHAPES):
    kind = draw(st.sampled_from(kinds))
    shapes = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4))
    shapes = shapes[:1] if kind == "tensor" else shapes
    batch, dtype = draw(st.sampled_from(batches)), draw(dtypes)
    lam_kinds = ["named"] if kind == "named" else ["scalar", "vector", "matrix"]
    lam_kind, m = draw(st.sampled_from(lam_kinds)), draw(st.integers(1, 4))
    kind, link = {"named": "dict"}.get(kind, kind), draw(st.sampled_from(links))
    structured = draw(st.sampled_from([True, False, True]))
    curvatures = [iopt.Hessian, iopt.GaussNewton] if structured else [iopt.Hessian]
    shared, strided, seed = draw(st.booleans()), draw(st.booleans()), draw(SEEDS)

    rng = np.random.default_rng(seed)
    digits = np.float32 if dtype == torch.float32 else np.float64
    normal = lambda *shape: rng.standard_normal(shape).astype(digits).astype(float)  # noqa: E731
    positive = lambda *shape: np.asarray(rng.uniform(0.5, 2, shape).astype(digits), float)  # noqa: E731
    n = sum(int(np.prod(shape)) for shape in shapes)
    if lam_kind == "named":
        ones = [draw(st.sampled_from(broadcastable(shape))) for shape in shapes]
        lam = [positive(*shape) for shape in ones]
    elif lam_kind == "matrix":
        root = rng.standard_normal((n, n))
        lam = ((root @ root.T + root.T @ root) / (4 * max(n, 1)) + np.eye(n)).astype(digits)
        lam = np.tril(lam) + np.tril(lam, -1).T.astype(float)
    else:
        lam = positive(*{"scalar": (), "vector": (n,)}[lam_kind])
    x = normal(*(() if shared else batch), m, n)
    phi = normal(*batch, n)
    outputs = LINKS[link][0]((x @ phi[..., None])[..., 0])
    y = (outputs + 0.1 * rng.standard_normal((*batch, m))).astype(digits).astype(float)
    return Case(
        batch, dtype, kind, shapes, link, lam_kind, lam, normal(n), x, y, phi, structured,
        draw(st.sampled_from(curvatures)), shared, strided, seed,
    )  # fmt: skip


def broadcastable(shape):
    """Shapes of lam that broadcast to a leaf: one number, one per last index, one per entry."""
    return [(), shape, *([shape[-1:], (*shape[:-1], 1)] if shape else [])]


def close(got, expected, case, what):
    """Each leaf, relative to the largest entry of all of them."""
    assert len(got) == len(expected), what
    largest = max([np.abs(e).max(initial=0.0) for e in expected] + [1e-2])
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == case.dtype
        assert tuple(ours.shape) == np.shape(theirs)
        np.testing.assert_allclose(
            ours.detach().double().numpy(), theirs, rtol=0,
            atol=TOLERANCE[case.dtype] * largest, err_msg=what,
        )  # fmt: skip


def differentiate(case, total, inputs, needed):
    tensors = [t for name in needed for t in inputs[name]]
    gradients = iter(torch.autograd.grad(total, tensors))
    return {name: [next(gradients) for _ in inputs[name]] for name in needed}


def wanting(inputs, needed):
    for name in needed:
        for t in inputs[name]:
            t.requires_grad_()
    return inputs
