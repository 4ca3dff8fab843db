"""Functions that are replaced one by one, each with leaves, indices and values to derive."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from implicit_optim._evaluation.replaced import TABLE as ALL

SMALL = (".formulas", ".embedding")
TABLE = {function: own for function, own in ALL.items() if own.__module__.endswith(SMALL)}

TASKS = 4


class Replacing(TorchFunctionMode):
    """The table in force; ``used`` lists the functions that were replaced."""

    def __init__(self):
        super().__init__()
        self.used = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TABLE:
            result = TABLE[func](*args, **(kwargs or {}))
            if result is not NotImplemented:
                self.used.append(func)
                return result
        return func(*args, **(kwargs or {}))


@dataclass
class Case:
    """A function of some leaves, which are derived by, and of indices, other ones in each task.

    Attributes:
        call: ``(leaves, indices) -> output``, in torch's words.
        shapes: of the leaves.
        indices: of a task.
        fixed: ``leaves -> leaves`` with zeros for the numbers that the function takes as constant.
        draw: a leaf of this shape.
        radius: how far the function is smooth.
    """

    call: Callable
    shapes: list
    indices: Callable = lambda task: []
    fixed: Callable = lambda leaves: leaves
    draw: Callable = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    radius: float = 0.2

    @property
    def size(self):
        return sum(torch.Size(s).numel() for s in self.shapes)

    def point(self):
        return torch.cat([self.draw(*s).flatten() for s in self.shapes])

    def leaves(self, x):
        parts = x.split([torch.Size(s).numel() for s in self.shapes])
        return [part.reshape(s) for part, s in zip(parts, self.shapes, strict=True)]

    def torch(self, x, *indices):
        """A number that depends on all outputs, by torch alone."""
        out = self.call(self.leaves(x), indices).flatten()
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=x.dtype)
        return (weights * (out + 0.3 * out.square())).sum()

    def ours(self, x, *indices):
        with Replacing() as mode:
            number = self.torch(x, *indices)
        assert mode.used
        return number

    def held(self, x):
        """A direction without the numbers that are constant."""
        return torch.cat([t.flatten() for t in self.fixed(self.leaves(x.clone()))])


def batches(*rows):
    """Indices of each task: these rows, moved on by a place a task."""
    return lambda task: [torch.tensor(row).roll(task, -1) for row in rows]


def bags(offsets, last=False):
    """Six indices of five rows, and where their bags start; the middle one moves with the task."""

    def indices(task):
        start = torch.tensor([0, offsets[1] + task % 2, *offsets[2:], *([6] if last else [])])
        return [torch.tensor([1, 4, 0, 1, 3, 0]).roll(task), start]

    return indices


def row(index):
    """Weights with this row constant."""

    def fixed(leaves):
        leaves[0][index] = 0
        return leaves

    return fixed


def away_from_kinks(*shape):
    """Numbers whose differences are no closer than 0.11 to 1, in random order."""
    n = torch.Size(shape).numel()
    return (0.37 * torch.randperm(n).double() - 0.37 * n / 2).reshape(shape)


def in_place(function, view):
    def call(leaves, _):
        base = leaves[0] * 2
        function(base[:2] if view else base, inplace=True)
        return base

    return call


IDS = batches([[0, 3, 1], [2, 0, 4]])

BAGS = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "default": {},
    "sum, padding": {"mode": "sum", "padding_idx": 0},
    "mean, padding": {"mode": "mean", "padding_idx": -5},
}

SMOOTH_PIECES = {"draw": away_from_kinks, "radius": 0.02}

CASES = {
    **{
        f"weight_norm {dim}": Case(
            lambda leaves, _, dim=dim: torch._weight_norm(*leaves, dim=dim),
            [(2, 3, 2), shape],
        )
        for dim, shape in {0: (2, 1, 1), 1: (1, 3, 1), 2: (1, 1, 2), -1: (1,)}.items()
    },
    "hardsigmoid": Case(
        lambda leaves, _: F.hardsigmoid(8 * leaves[0]),
        [(3, 4)],
        **SMOOTH_PIECES | {"radius": 0.002},
    ),
    "hardsigmoid in place": Case(in_place(F.hardsigmoid, view=False), [(3, 2)], radius=0.02),
    "hardsigmoid in place on a view": Case(
        in_place(F.hardsigmoid, view=True), [(3, 2)], radius=0.02
    ),
    "mish": Case(lambda leaves, _: F.mish(3 * leaves[0]), [(3, 4)], radius=0.1),
    "mish in place": Case(in_place(F.mish, view=True), [(3, 2)], radius=0.1),
    "logaddexp": Case(
        lambda leaves, _: torch.logaddexp(leaves[0], leaves[1].sin()), [(3, 2), (2,)]
    ),
    "logaddexp, a method": Case(
        lambda leaves, _: leaves[0].logaddexp(other=3 * leaves[1]), [(3, 1), (3, 2)]
    ),
    "normalize": Case(lambda leaves, _: F.normalize(leaves[0]), [(2, 4)]),
    "normalize, p = 3": Case(lambda leaves, _: F.normalize(leaves[0].sin(), 3, -2), [(4, 2)]),
    "cosine_similarity": Case(
        lambda leaves, _: F.cosine_similarity(leaves[0], leaves[1], 1), [(2, 4), (4,)]
    ),
    "embedding": Case(
        lambda leaves, ids: F.embedding(ids[0], leaves[0], padding_idx=0), [(5, 2)], IDS, row(0)
    ),
    "embedding, negative padding": Case(
        lambda leaves, ids: F.embedding(ids[0], leaves[0], -2), [(5, 2)], IDS, row(3)
    ),
    "torch.embedding": Case(
        lambda leaves, ids: torch.embedding(leaves[0], ids[0], 0), [(5, 2)], IDS, row(0)
    ),
    **{
        f"embedding_bag {name}": Case(
            lambda leaves, ids, s=s: F.embedding_bag(ids[0], leaves[0], **s), [(5, 2)], IDS
        )
        for name, s in BAGS.items()
    },
    **{
        f"embedding_bag {name} of offsets": Case(
            lambda leaves, ids, s=s: F.embedding_bag(ids[0], leaves[0], ids[1], **s),
            [(5, 2)],
            bags([0, 2, 4, 4]),
        )
        for name, s in BAGS.items()
    },
    "embedding_bag last offset": Case(
        lambda leaves, ids: F.embedding_bag(
            ids[0], leaves[0], ids[1], mode="mean", include_last_offset=True
        ),
        [(5, 2)],
        bags([0, 2, 4], last=True),
    ),
    "embedding_bag weights": Case(
        lambda leaves, ids: F.embedding_bag(
            ids[0], leaves[0], mode="sum", per_sample_weights=leaves[1], padding_idx=1
        ),
        [(5, 2), (2, 3)],
        IDS,
    ),
    "embedding_bag weights of offsets": Case(
        lambda leaves, ids: F.embedding_bag(
            ids[0], leaves[0], ids[1], mode="sum", per_sample_weights=leaves[1]
        ),
        [(5, 2), (6,)],
        bags([0, 1, 5]),
    ),
    "select_scatter": Case(
        lambda leaves, _: torch.select_scatter(leaves[0], leaves[1], 0, 1), [(3, 2), (2,)]
    ),
    "select_scatter, a method": Case(
        lambda leaves, _: leaves[0].sin().select_scatter(leaves[1], dim=-1, index=-1),
        [(3, 2), (3,)],
    ),
}


def directions(n, size):
    """Unit vectors."""
    v = torch.randn(n, size, dtype=torch.float64)
    return list(v / v.norm(dim=1, keepdim=True))


def derivative(fn, x, along):
    """Derivative of ``fn`` at ``x`` along these directions, one after the other."""
    x = x.clone().requires_grad_()
    value = fn(x)
    for v in along:
        (gradient,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        value = (gradient * v).sum()
    return value.detach()


def from_values(fn, x, along, radius):
    """The same from values of ``fn``: polarisation of derivatives along lines."""
    n = len(along)
    if n == 0:
        return fn(x)
    total = 0.0
    for signs in itertools.product((1, -1), repeat=n - 1):
        v = along[0] + sum((s * w for s, w in zip(signs, along[1:], strict=True)), 0 * x)
        t = radius * np.cos(np.pi * np.arange(12) / 11)
        values = [float(fn(x + s * v)) for s in t]
        line = np.polynomial.Chebyshev.fit(t, values, 9)
        total += np.prod(signs) * float(line.deriv(n)(0.0))
    return torch.tensor(total / (2 ** (n - 1) * float(np.prod(np.arange(1, n + 1))))).double()


def close(got, expected, tol):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)
