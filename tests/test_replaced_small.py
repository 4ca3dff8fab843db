"""Replacements of single functions: values and three derivatives, and that torch still needs them.

The expected derivatives come from values of torch's own function alone: a polynomial through its values
along a line, and polarisation for mixed directions.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from implicit_optim._replaced import (
    _activations,
    _embedding,
    _normalize,
    _select_scatter,
    _weight_norm,
)

TABLE = {
    **_activations.ENTRIES,
    **_embedding.ENTRIES,
    **_normalize.ENTRIES,
    **_select_scatter.ENTRIES,
    **_weight_norm.ENTRIES,
}
TASKS = 4
NEEDLESS = "torch's own {} is right now: remove the entry"


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
REDUCTIONS = ("mean", "sum", "none")
LABELS = batches([[2, 0, -1, 1, -1], [4, -1, 0, 0, 3], [1, 1, 3, -1, 2]])
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
every_case = pytest.mark.parametrize("name", CASES)


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


# ------------------------------------------------------------------------------------ they are right


@every_case
def test_values_and_three_derivatives(name):
    case = CASES[name]
    x, along, indices = case.point(), directions(3, case.size), case.indices(0)
    for n in range(4):
        held = [case.held(v) for v in along[:n]]
        expected = from_values(lambda x: case.torch(x, *indices), x, held, case.radius)
        got = derivative(lambda x: case.ours(x, *indices), x, along[:n])
        close(got, expected, (1e-12, 1e-8, 1e-6, 1e-5)[n])


@every_case
@pytest.mark.parametrize("shared", [False, True])
def test_under_vmap(name, shared):
    """Alone, twice over and with derivatives inside, as in a loop."""
    case = CASES[name]
    xs = torch.stack([case.point() for _ in range(TASKS)])
    tasks = [case.indices(0 if shared else task) for task in range(TASKS)]
    stacked = tasks[0] if shared else [torch.stack(t) for t in zip(*tasks, strict=True)]
    dims = (0, *(None if shared else 0 for _ in stacked))
    square = [t if shared else t.unflatten(0, (2, 2)) for t in stacked]
    ways = {
        "vmap": lambda x: torch.vmap(case.ours, dims)(x, *stacked),
        "nested": lambda x: torch.vmap(torch.vmap(case.ours, dims), dims)(
            x.unflatten(0, (2, 2)), *square
        ),
        "loop": lambda x: torch.stack([case.ours(x, *t) for x, t in zip(x, tasks, strict=True)]),
    }
    along = [v.reshape(xs.shape) for v in directions(3, xs.numel())]
    for n in range(4):
        vmapped, nested, looped = (
            derivative(lambda x, way=way: way(x).sum(), xs, along[:n]) for way in ways.values()
        )
        close(vmapped, looped, 1e-11)
        close(nested, looped, 1e-11)
    gradients = torch.vmap(torch.func.grad(case.ours), dims)(xs, *stacked)
    close(
        (gradients * along[0]).sum(),
        derivative(lambda x: ways["loop"](x).sum(), xs, along[:1]),
        1e-11,
    )


@every_case
def test_torch_func(name):
    case = CASES[name]
    x, (u, v, _) = case.point(), directions(3, case.size)
    ours = lambda x: case.ours(x, *case.indices(1))  # noqa: E731
    first, second = (derivative(ours, x, along) for along in ([u], [u, v]))
    close(torch.func.jvp(ours, (x,), (u,))[1], first, 1e-11)
    close(torch.func.grad(ours)(x) @ u, first, 1e-11)
    close(torch.func.jvp(torch.func.grad(ours), (x,), (v,))[1] @ u, second, 1e-11)
    close(torch.func.grad(lambda x: torch.func.grad(ours)(x) @ u)(x) @ v, second, 1e-11)


@pytest.mark.parametrize("padding", [0, -1, 2])
def test_the_padding_row_stays_in_every_task(padding):
    ids = torch.tensor([[0, 4, 2, 1], [2, 0, 0, 4], [4, 4, 2, 0]])
    w = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    with Replacing():
        rows = torch.vmap(lambda w, i: F.embedding(i, w, padding))(w, ids)
    assert torch.equal(rows, torch.stack([w[t, ids[t]] for t in range(3)]))
    (gradient,) = torch.autograd.grad(rows.exp().sum(), w)
    counts = torch.stack([torch.bincount(i, minlength=5) for i in ids])
    counts[:, padding] = 0
    torch.testing.assert_close(gradient, counts.unsqueeze(-1) * w.detach().exp())


@pytest.mark.parametrize("module, function", [(nn.Hardsigmoid, F.hardsigmoid), (nn.Mish, F.mish)])
def test_in_place_is_in_place(module, function):
    x = torch.tensor([-4.0, 1.5, 7.0])
    expected = function(x)
    with Replacing() as mode:
        y = module(inplace=True)(x)
        assert y is x
        torch.testing.assert_close(y, expected)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            function(torch.ones(2, requires_grad=True), inplace=True)
    assert mode.used == [function]


# Of a function at a point where torch's second derivative is NaN the value and the derivatives along two
# directions, by hand.
NORMAL = torch.tensor([0.6, 0.8])
AT_EXTREMES = {
    "mish": (F.mish, 100.0 * torch.ones(2), [200.0, 5.0, 0.0]),
    "logaddexp": (lambda x: torch.logaddexp(*x), torch.tensor([-100.0, 20.0]), [20.0, 3.0, 0.0]),
    "logaddexp, back": (
        lambda x: torch.logaddexp(*x),
        torch.tensor([200.0, 20.0]),
        [200.0, 2.0, 0.0],
    ),
    "normalize": (lambda x: F.normalize(x, dim=0, eps=0.5), torch.zeros(2), [0.0, 10.0, 0.0]),
    "cosine_similarity": (
        lambda x: F.cosine_similarity(x, NORMAL, 0, eps=0.5),
        torch.zeros(2),
        [0.0, (2 * 0.6 + 3 * 0.8) / 0.5, 0.0],
    ),
    "cosine_similarity, both": (
        lambda x: F.cosine_similarity(x, x, 0, eps=0.5),
        torch.zeros(2),
        [0.0, 0.0, 2 * (2 * 5 + 3 * -7) / 0.25],
    ),
}


@pytest.mark.parametrize("name", AT_EXTREMES)
def test_where_torch_has_nan(name):
    fn, x, expected = AT_EXTREMES[name]
    along = [torch.tensor([2.0, 3.0]), torch.tensor([5.0, -7.0])]

    def number(x):
        return fn(x).sum()

    def ours(x):
        with Replacing():
            return number(x)

    for n in range(3):
        close(derivative(ours, x, along[:n]), torch.tensor(expected[n]), 1e-6)
    vmapped = derivative(lambda x: torch.vmap(ours)(x.view(1, -1)).sum(), x, along)
    close(vmapped, torch.tensor(expected[2]), 1e-6)
    close(derivative(number, x, along[:1]), torch.tensor(expected[1]), 1e-6)
    assert derivative(number, x, along).isnan(), NEEDLESS.format(name)


def test_dead_features_do_not_make_a_hessian_nan():
    """A row of zeros after a ReLU has no influence, as in the first derivative."""
    x, w = torch.randn(3, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    x[1] = -x[0].abs()
    ours = lambda x: F.normalize((x.abs() @ w * x.sign()).relu()).exp().sum()  # noqa: E731
    with Replacing():
        hessian = torch.func.hessian(ours)(x)
    alone = torch.func.hessian(ours)(x[2:])
    assert torch.equal(hessian[1], 0 * hessian[1])
    close(hessian[2, :, 2], alone[0, :, 0], 1e-12)


# ------------------------------------------------------------------------- they are reached, or refuse


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv1d(2, 3, 1), dim=1)


@pytest.mark.parametrize(
    "make, x",
    [
        (nn.Hardsigmoid, torch.randn(2)),
        (nn.Mish, torch.randn(2)),
        (nn.CosineSimilarity, (torch.randn(2, 3), torch.randn(2, 3))),
        (lambda: torch._C._nn.hardsigmoid, torch.randn(2)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=None),
            torch.randn(2, 4),
        ),
        (old_weight_norm, torch.randn(2, 2, 4)),
        (lambda: nn.Embedding(3, 2, padding_idx=1), torch.tensor([1, 2])),
        (lambda: nn.EmbeddingBag(3, 2, padding_idx=1), torch.tensor([[1, 2]])),
    ],
)
def test_modules_reach_them(make, x):
    module, xs = make(), x if isinstance(x, tuple) else (x,)
    expected = module(*xs)
    with Replacing() as mode:
        got = module(*xs)
    assert mode.used
    torch.testing.assert_close(got, expected)


IDS_OF_ONE = torch.tensor([[0, 1]])


def test_what_torch_does_right_is_left_to_torch():
    w, out = torch.randn(3, 2), torch.empty(3, 2)
    z = torch.randn(3, 2, dtype=torch.complex64)
    calls = [
        lambda: F.embedding(IDS_OF_ONE, w),
        lambda: torch.embedding(w, IDS_OF_ONE, -2),  # no row, unlike F.embedding's
        lambda: torch.logaddexp(z, z),
        lambda: torch.logaddexp(w, w, out=out),
        lambda: F.normalize(w, out=out),
    ]
    for call in calls:
        expected = call().clone()
        with Replacing() as mode:
            assert torch.equal(call(), expected)
        assert not mode.used


def test_short_vectors_are_not_lengthened():
    x = torch.tensor([[0.03, 0.04], [3.0, 4.0]])
    with Replacing():
        y = F.normalize(x, eps=0.5)
    close(y, torch.tensor([[0.06, 0.08], [0.6, 0.8]]), 1e-6)


@pytest.mark.parametrize("fn", [F.embedding, F.embedding_bag])
@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_norm": 1.0}, r"with max_norm=1\.0 .* in place: use max_norm=None"),
        ({"sparse": True}, r"no second derivative: use sparse=False"),
        ({"scale_grad_by_freq": True}, r"of no function, .* use scale_grad_by_freq=False"),
    ],
)
def test_what_has_no_derivative_is_refused(fn, setting, message):
    w = torch.full((3, 2), 4.0)
    with Replacing(), pytest.raises(ValueError, match=f"^{fn.__name__}: .*{message}"):
        fn(IDS_OF_ONE, w, **setting)
    assert torch.equal(w, torch.full((3, 2), 4.0))


def test_bags_of_maxima_are_refused():
    with Replacing(), pytest.raises(ValueError, match=r'"sum" or "mean", or F\.embedding .* amax'):
        nn.EmbeddingBag(3, 2, mode="max")(IDS_OF_ONE)


def test_torch_says_itself_what_is_wrong():
    """Arguments that torch refuses come back to torch."""
    w, y = torch.zeros(3, 2), torch.tensor([0, 1])
    wrong = [
        (lambda: F.embedding(IDS_OF_ONE, w, 3), AssertionError, "within num_embeddings"),
        (lambda: F.embedding_bag(IDS_OF_ONE, w, padding_idx=-4), RuntimeError, "-3 through 2"),
        (lambda: F.embedding_bag(y, w), ValueError, "offsets has to be a 1D Tensor but got None"),
        (lambda: F.embedding_bag(IDS_OF_ONE, w, y), ValueError, "offsets has to be None"),
        (lambda: F.embedding_bag(IDS_OF_ONE, w, mode="max "), ValueError, "has to be one of"),
        (
            lambda: F.embedding_bag(IDS_OF_ONE, w, per_sample_weights=torch.ones(1, 2)),
            NotImplementedError,
            "only supported for mode='sum'",
        ),
    ]
    for call, kind, message in wrong:
        with Replacing() as mode, pytest.raises(kind, match=message):
            call()
        assert not mode.used


# --------------------------------------------------------------------------------- they are still needed


@pytest.mark.parametrize(
    "name, message",
    [
        ("hardsigmoid", "hardsigmoid_backward is not implemented"),
        ("embedding_bag sum", "_embedding_bag_backward' is not implemented"),
        ("embedding_bag weights", r"_embedding_bag\w*_backward\S* is not implemented"),
    ],
)
def test_torch_still_lacks(name, message):
    case = CASES[name]
    x, along, indices = case.point(), directions(2, case.size), case.indices(0)
    try:
        derivative(lambda x: case.torch(x, *indices), x, along)
    except RuntimeError as error:
        assert re.search(message, str(error))
    else:
        pytest.fail(NEEDLESS.format(name))


@pytest.mark.parametrize(
    "name",
    ["weight_norm 0"],
)
def test_torch_is_still_wrong(name):
    case = CASES[name]
    x, along, indices = case.point(), directions(2, case.size), case.indices(0)
    torchs = lambda x: case.torch(x, *indices)  # noqa: E731
    error = derivative(torchs, x, along) - from_values(torchs, x, along, case.radius)
    assert error.abs() > 1e-3, NEEDLESS.format(name)


@pytest.mark.parametrize("name", ["embedding", "torch.embedding", "select_scatter"])
def test_torch_is_still_wrong_under_vmap(name):
    case = CASES[name]
    xs = torch.stack([case.point() for _ in range(TASKS)]).requires_grad_()
    tasks = [case.indices(task) for task in range(TASKS)]
    stacked = [torch.stack(t) for t in zip(*tasks, strict=True)]
    vmapped = torch.vmap(case.torch)(xs, *stacked)
    looped = torch.stack([case.torch(x, *t) for x, t in zip(xs, tasks, strict=True)])
    close(vmapped, looped, 1e-12)
    g, h = (torch.autograd.grad(values.sum(), xs)[0] for values in (vmapped, looped))
    assert (g - h).abs().max() > 1e-3, NEEDLESS.format(name)


def test_gradients_scaled_by_frequency_are_still_of_no_function():
    ids, w = torch.tensor([0, 0, 1]), torch.randn(3, 2, dtype=torch.float64)
    fn = lambda w: F.embedding(ids, w, scale_grad_by_freq=True).sum(0).pow(3).sum()  # noqa: E731
    u, v = directions(2, 6)
    u, v = u.view(3, 2), v.view(3, 2)
    forth, back = derivative(fn, w, [u, v]), derivative(fn, w, [v, u])
    assert (forth - back).abs() > 1e-3, NEEDLESS.format("scale_grad_by_freq")
