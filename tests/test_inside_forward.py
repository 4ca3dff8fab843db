"""Derivatives inside `forward`, and derivatives of the meta-gradient: a third and a fourth one.

Forces, scores and Laplacians differentiate a network where it is called. The oracles write the
normalisations and the convolution out, so that nothing but sums and products is differentiated.
Then operations whose derivatives torch has wrong or not at all.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import implicit_optim as iopt
from per_task import flat, minimiser
from plainly import BATCH, LOOP, VMAP, Kind, check, every_rule, over

EPS = 0.3  # gentle curvature

pytestmark = pytest.mark.usefixtures("double")


# -- an energy, and its derivatives in x -------------------------------------------------------------


class Energy(nn.Module):
    """Layers over sequences `[N, 2, 3]`, one number an example; a norm between them."""

    def __init__(self, norm, convolve):
        super().__init__()
        self.first = nn.Conv1d(2, 2, 3, padding=1) if convolve else nn.Linear(3, 3)
        self.norm, self.last = norm, nn.Linear(3, 1)
        with torch.no_grad():
            for p in self.norm.parameters():
                p += 0.3 * torch.randn_like(p)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh()).mean((-2, -1))


class ByHand(nn.Module):
    """A norm over these dimensions, with weights of this shape, in sums and products."""

    def __init__(self, over, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape)) if shape else None
        self.bias = nn.Parameter(torch.zeros(shape)) if shape else None
        self.over = over

    def forward(self, x):
        h = x - x.mean(self.over, keepdim=True)
        h = h / ((h * h).mean(self.over, keepdim=True) + EPS).sqrt()
        return h if self.weight is None else h * self.weight + self.bias


class ConvByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(2, 2, 3)), nn.Parameter(torch.empty(2))

    def forward(self, x):
        beside = x.new_zeros(*x.shape[:-1], 1)
        windows = torch.cat([beside, x, beside], -1).unfold(-1, 3, 1)
        return torch.einsum("ncik,ock->noi", windows, self.weight) + self.bias[:, None]


def norm(kind, *args, **settings):
    return lambda: kind(*args, eps=EPS, **settings)


# torch's layer, by hand, whether a convolution comes first
NORMS = {
    "none": (nn.Identity, nn.Identity, False),
    "conv": (nn.Identity, nn.Identity, True),
    "batch": (norm(nn.BatchNorm1d, 2), lambda: ByHand((0, 2), 2, 1), True),
    "untracked": (
        norm(nn.BatchNorm1d, 2, track_running_stats=False),
        lambda: ByHand((0, 2), 2, 1),
        False,
    ),
    "layer": (norm(nn.LayerNorm, 3), lambda: ByHand(2, 3), True),
    "plain layer": (norm(nn.LayerNorm, 3, elementwise_affine=False), lambda: ByHand(2), False),
    "group": (norm(nn.GroupNorm, 1, 2), lambda: ByHand((1, 2), 2, 1), True),
    "instance": (norm(nn.InstanceNorm1d, 2, affine=True), lambda: ByHand(2, 2, 1), True),
    "tracked instance": (
        norm(nn.InstanceNorm1d, 2, affine=True, track_running_stats=True),
        lambda: ByHand(2, 2, 1),
        True,
    ),
}


# inside a transform torch counts no batches
TRANSFORMED = [name for name in NORMS if name not in ("batch", "tracked instance")]


def force_by_autograd(energy, x):
    """As most code has it; `enable_grad` for predictions without a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]


def force_at_features(energy, x):
    """Of something that wants a gradient anyway, with a graph where one is kept."""
    with torch.enable_grad():
        h = x * (1 + 0 * energy.last.bias)
        h = h if h.requires_grad else h.requires_grad_()
        return torch.autograd.grad(energy(h).sum(), h, create_graph=True)[0]


def force_by_transform(energy, x):
    return torch.func.grad(lambda x: energy(x).sum())(x)


def laplacian(energy, x):
    """The sum of the second derivatives along every coordinate of an example."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        columns = slope.flatten(1).sum(0)
        second = [torch.autograd.grad(c, x, create_graph=True)[0].flatten(1) for c in columns]
        return torch.stack([s[:, i] for i, s in enumerate(second)], 1).sum(1, keepdim=True)


def laplacian_by_transform(energy, x):
    one = lambda x: energy(x[None])[0]  # noqa: E731
    return torch.stack([torch.func.hessian(one)(e).reshape(6, 6).trace()[None] for e in x])


class Derivative(nn.Module):
    def __init__(self, energy, derivative):
        super().__init__()
        self.energy, self.derivative = energy, derivative

    def forward(self, x):
        return self.derivative(self.energy, x).flatten(1)


def derivative(name, rule, oracle=None, loops=True):
    """A kind: the derivative of the energy with this norm; by hand `oracle`, or the same."""
    layer, by_hand, convolve = NORMS[name]

    def by_torch():
        return Derivative(Energy(layer(), convolve), rule)

    def plain():
        model = Derivative(Energy(by_hand(), convolve), oracle or rule)
        if convolve:
            model.energy.first = ConvByHand()
        return model

    def data():
        width = 1 if "laplacian" in rule.__name__ else 6
        return [(torch.randn(2, n, 2, 3), torch.randn(2, n, width)) for n in (2, 2)]

    return Kind(by_torch, plain, data=data, loops=loops)


def settings(name):
    return {"running_stats": BATCH} if name in ("batch", "tracked instance") else {}


@every_rule
@pytest.mark.parametrize("name", NORMS)
def test_a_force(name, rule):
    check(derivative(name, force_by_autograd), rule, lam=4.0, **settings(name))


@pytest.mark.parametrize("name", NORMS)
def test_a_force_one_by_one(name):
    kind = derivative(name, force_by_autograd)
    check(kind, lam=4.0, batching=LOOP, **settings(name))


@every_rule
@pytest.mark.parametrize("name", ["conv", "batch"])
def test_a_force_at_what_wants_a_gradient_anyway(name, rule):
    kind = derivative(name, force_at_features, force_by_autograd)
    check(kind, rule, lam=4.0, **settings(name))


@pytest.mark.parametrize("rule", ["implicit", "unrolled"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_force_by_a_transform(name, rule):
    kind = derivative(name, force_by_transform, force_by_autograd, loops=False)
    check(kind, rule, lam=4.0, batching=VMAP)


@pytest.mark.parametrize("name", ["conv", "layer"])
def test_a_force_by_a_transform_one_by_one(name):
    kind = derivative(name, force_by_transform, force_by_autograd, loops=False)
    check(kind, lam=4.0, batching=LOOP)


@pytest.mark.parametrize("name, batching", [("layer", None), ("group", LOOP)])
def test_a_laplacian(name, batching):
    check(derivative(name, laplacian), lam=9.0, batching=batching)


@pytest.mark.parametrize("name, batching", [("conv", VMAP), ("none", LOOP)])
def test_a_laplacian_by_a_transform(name, batching):
    kind = derivative(name, laplacian_by_transform, laplacian, loops=False)
    check(kind, lam=9.0, batching=batching)


# -- derivatives of the meta-gradient ----------------------------------------------------------------

OUTER = {
    "batch": norm(nn.BatchNorm1d, 2, track_running_stats=False),
    "layer": norm(nn.LayerNorm, 2),
    "instance": norm(nn.InstanceNorm1d, 2, affine=True),
    "group": norm(nn.GroupNorm, 1, 2),
}


@pytest.mark.parametrize("name", OUTER)
def test_attach_has_a_first_and_a_second_derivative(name):
    """By finite differences, in theta and in the data, with torch's own layers."""
    rows = name in ("batch", "layer")
    first = nn.Linear(1, 2, bias=False) if rows else nn.Conv1d(1, 2, 1, bias=False)
    net = nn.Sequential(first, OUTER[name](), nn.Tanh())
    theta, by_name = flat(net)

    def objective(phi, theta, x, y):
        fit = F.mse_loss(functional_call(net, by_name(phi), (x,)), y)
        return fit + 2 * ((phi - theta) ** 2).sum()

    def minimum(start, *now):
        return minimiser(lambda phi: objective(phi, *now), start)

    def solution(theta, x):
        phi = minimum(near, theta.detach(), x.detach(), y)
        exact = iopt.CG(rtol=1e-13, max_steps=50)
        return iopt.attach(phi, objective, theta, x, y, linear_solver=exact)

    theta = theta + 0.2 * torch.randn_like(theta)
    x, y = (
        (torch.randn(4, 1), torch.randn(4, 2))
        if rows
        else (torch.randn(2, 1, 3), torch.randn(2, 2, 3))
    )
    near = minimum(theta, theta, x, y)
    inputs = theta.requires_grad_(), x.requires_grad_()
    assert gradcheck(solution, inputs, eps=1e-5, atol=1e-7, rtol=1e-5)
    assert gradgradcheck(solution, inputs, eps=1e-5, atol=1e-7, rtol=1e-5)


# -- operations whose derivatives torch has wrong or not at all --------------------------------------


class Wide(nn.Module):
    """Inputs to an activation that reach all of its pieces."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(3, 4), nn.Linear(4, 1), activation

    def forward(self, x):
        return self.last(self.activation(3 * self.first(x)))


def hardsigmoid(x):
    return (x + 3).clamp(0, 6) / 6


def hardswish(x):
    return x * (x + 3).clamp(0, 6) / 6


def wide(activation, by_hand):
    return Kind(lambda: Wide(activation), lambda: Wide(by_hand))


ACTIVATIONS = {
    "hardsigmoid": wide(nn.Hardsigmoid(), hardsigmoid),
    "hardsigmoid in place": wide(nn.Hardsigmoid(inplace=True), hardsigmoid),
    "functional hardsigmoid": wide(F.hardsigmoid, hardsigmoid),
    "hardswish": wide(nn.Hardswish(), hardswish),
    "hardswish in place": wide(lambda x: F.hardswish(x, inplace=True), hardswish),
}


class Scaled(nn.Module):
    """`weight_norm` written out; the parameters in torch's order."""

    def __init__(self, dim=0):
        super().__init__()
        self.bias, self.g = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4, 1))
        self.v, self.dim = nn.Parameter(torch.empty(4, 3)), dim
        if dim is None:
            self.g = nn.Parameter(torch.empty(()))

    def forward(self, x):
        size = self.v.norm() if self.dim is None else self.v.norm(dim=1, keepdim=True)
        return x @ (self.v * self.g / size).T + self.bias


def normed(norm, **settings):
    def make():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated")
            return nn.Sequential(norm(nn.Linear(3, 4), **settings), nn.Tanh(), nn.Linear(4, 1))

    plain = lambda: nn.Sequential(Scaled(**settings), nn.Tanh(), nn.Linear(4, 1))  # noqa: E731
    return Kind(make, plain, sets=("weight",))


WEIGHT_NORMS = {
    "weight norm": normed(nn.utils.parametrizations.weight_norm),
    "weight norm of all": normed(nn.utils.parametrizations.weight_norm, dim=None),
    "old weight norm": normed(nn.utils.weight_norm),
    "old weight norm of all": normed(nn.utils.weight_norm, dim=None),
}


class Texts(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.last = table, nn.Linear(2, 1)

    def forward(self, words):
        return self.last(self.table(words).tanh().reshape(len(words), -1, 2).mean(1))


class Table(nn.Module):
    """An embedding by indexing, without a gradient for the padding row; `reduce` over a bag."""

    def __init__(self, reduce=lambda h: h, padding=True):
        super().__init__()
        self.weight, self.reduce = nn.Parameter(torch.empty(5, 2)), reduce
        self.padding = padding

    def forward(self, words):
        w = self.weight
        w = torch.cat([w[:1].detach(), w[1:]]) if self.padding else w
        return self.reduce(w[words])


class Offsets(nn.EmbeddingBag):
    """The other way to call it: all words in a row and where each bag begins."""

    def forward(self, words):
        return super().forward(words.reshape(-1), torch.arange(0, words.numel(), words.shape[-1]))


def words():
    return [(torch.randint(0, 5, (3, n, 4)), torch.randn(3, n, 1)) for n in (5, 4)]


def bag(mode, reduce, kind=nn.EmbeddingBag):
    plain = lambda: Texts(Table(reduce, padding=False))  # noqa: E731
    return Kind(lambda: Texts(kind(5, 2, mode=mode)), plain, data=words)


TABLES = {
    "padding": Kind(
        lambda: Texts(nn.Embedding(5, 2, padding_idx=0)), lambda: Texts(Table()), data=words
    ),
    "mean of a bag": bag("mean", lambda h: h.mean(1)),
    "sum of a bag": bag("sum", lambda h: h.sum(1)),
    "offsets": bag("mean", lambda h: h.mean(1), Offsets),
}
OPERATIONS = ACTIVATIONS | WEIGHT_NORMS | TABLES


@every_rule
@over(OPERATIONS)
def test_operations(kind, rule):
    check(kind, rule, lam=6.0)


@over(OPERATIONS)
def test_operations_one_by_one(kind):
    check(kind, lam=6.0, batching=LOOP)


def test_the_padding_row_stays_in_every_task():
    kind = TABLES["padding"]
    meta, (support, _), _ = check(kind)
    with torch.no_grad():
        table = meta.adapt(support)["table.weight"]
    assert torch.equal(table[:, 0], meta.model.table.weight[0].expand(3, -1))
