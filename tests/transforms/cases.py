"""`attach` and `linear_solve` as functions of plain tensors, each beside an oracle without transforms.

An oracle is for one task, in plain autograd, with dense matrices and normalisations written out: no
vmap, no implicit differentiation. Tests put a transform around `Case.fn` and hold it to derivatives
of `Case.plain`, task by task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.utils import _pytree as pytree

import implicit_optim as iopt
import problems

BATCHES = problems.BATCHES
NORMS = tuple(problems.NORMS)


@dataclass(frozen=True, eq=False)
class Case:
    """One function of several tensors, for a batch of tasks.

    Attributes:
        fn: the library's, `(*args, batch_ndim=0, fixed=False) -> [*batch, n]`; `fixed`: a fixed
            number of CG steps.
        plain: the oracle's, of one task, `(*args) -> [n]`: right to its second derivative.
        args: the tensors.
        mapped: which of them carry the batch dimensions.
        argnums: which of them have a derivative.
        batch: the batch shape.
        n: length of the value.
        settle: of one task's arguments: phi made stationary again, to third order in the change.
    """

    fn: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    mapped: tuple[bool, ...]
    argnums: tuple[int, ...]
    batch: tuple[int, ...]
    n: int
    settle: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda args: args

    @property
    def dims(self) -> tuple[int | None, ...]:
        """`in_dims` of a vmap over the tasks."""
        return tuple(0 if mapped else None for mapped in self.mapped)

    @property
    def tasks(self) -> list[tuple[int, ...]]:
        """Index of every task."""
        return [tuple(i) for i in torch.ones(self.batch).nonzero().tolist()]

    @property
    def moving(self) -> tuple[Tensor, ...]:
        """The arguments that have a derivative."""
        return self.pick(self.args)

    def pick(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Those of `args` that have a derivative."""
        return tuple(args[i] for i in self.argnums)

    def put(self, args: Sequence[Tensor], moving: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`args` with these in their place."""
        new = dict(zip(self.argnums, moving, strict=True))
        return tuple(new.get(i, arg) for i, arg in enumerate(args))

    def whole(self, *moving: Tensor) -> Tensor:
        """The value for all tasks as a function of the arguments that have a derivative."""
        return self.fn(*self.put(self.args, moving), batch_ndim=len(self.batch))

    def task(self, index: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The arguments of one task."""
        both = zip(self.args, self.mapped, strict=True)
        return tuple(arg[index] if mapped else arg for arg, mapped in both)

    def oracle(self, index: tuple[int, ...]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """One task's plain function of the arguments that have a derivative, and these."""
        args = self.task(index)
        return lambda *moving: self.plain(*self.put(args, moving)), self.pick(args)

    @functools.cached_property
    def loop(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The oracle's value of every task and the leaves of its graph."""
        rows = []
        for i in self.tasks:
            plain, moving = self.oracle(i)
            leaves = [m.detach().requires_grad_() for m in moving]
            rows.append((plain(*leaves), leaves))
        return rows

    @property
    def value(self) -> Tensor:
        """The oracle's value for all tasks."""
        return self.stack([value.detach() for value, _ in self.loop])

    @property
    def cotangent(self) -> Tensor:
        """A fixed weight of every number of the value, `[*batch, n]`."""
        return normal(*self.batch, self.n, seed=7)

    @property
    def tangents(self) -> tuple[Tensor, ...]:
        """A fixed direction for every argument that has a derivative."""
        return tuple(normal(*m.shape, seed=k) for k, m in enumerate(self.moving))

    @functools.cached_property
    def each(self) -> list[Tensor]:
        """`d <cotangent, value> / d argument` of every task, `[*batch, *shape]`, in a loop."""
        rows = [
            _pull(value, leaves, self.cotangent[i])
            for i, (value, leaves) in zip(self.tasks, self.loop, strict=True)
        ]
        return [self.stack(column) for column in zip(*rows, strict=True)]

    @property
    def pulled(self) -> list[Tensor]:
        """The same for the whole batch: added up where the tasks share the argument."""
        pairs = zip(self.argnums, self.each, strict=True)
        return [g if self.mapped[i] else g.sum_to_size(self.args[i].shape) for i, g in pairs]

    @functools.cached_property
    def pushed(self) -> Tensor:
        """The change of every task's value along the tangents, `[*batch, n]`, in a loop.

        Without forward mode: a pull-back is linear in v, and its own pull-back is the push-forward.
        """
        rows = []
        for i, (value, leaves) in zip(self.tasks, self.loop, strict=True):
            pairs = zip(self.argnums, self.tangents, strict=True)
            own = [t[i] if self.mapped[k] else t for k, t in pairs]
            v = torch.zeros_like(value, requires_grad=True)
            pulled = _pull(value, leaves, v, create_graph=True)
            total = sum((g * t).sum() for g, t in zip(pulled, own, strict=True))
            rows.append(torch.autograd.grad(total, v)[0])
        return self.stack(rows)

    def jacobians(self, index: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Jacobian of one task in every argument that has a derivative, `[n, *shape]`."""
        return jacobian(*self.oracle(index))

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        """One tensor for all tasks, `[*batch, *shape]`, from one for each."""
        stacked = torch.stack(list(rows))
        return stacked.reshape((*self.batch, *stacked.shape[1:]))

    def unshared(self, along: tuple[int, ...]) -> Case:
        """The same with a copy of every argument for every task, which differ along these dimensions."""
        rows = []
        for index in self.tasks:
            place = sum((d + 1) * i for d, i in enumerate(index) if d in along)
            args = list(self.task(index))
            for k in self.argnums:
                if not self.mapped[k]:
                    args[k] = args[k] * (1 + 0.01 * place)
            for _ in range(3 if place else 0):
                args = self.settle(args)
            rows.append(args)
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        args = tuple(c.reshape((*self.batch, *c.shape[1:])) for c in columns)
        return replace(self, args=args, mapped=(True,) * len(args))

    @functools.cached_property
    def plane(self) -> Plane:
        """The value of the only task, in part, on a random plane through all arguments."""
        axes = [normal(*m.shape, 2, seed=k) / 10 for k, m in enumerate(self.moving)]
        for k, m in enumerate(self.moving):
            if m.shape == (self.n, self.n):  # lam or a matrix: it stays symmetric
                axes[k] = (axes[k] + axes[k].transpose(0, 1)) / 2
        return Plane(self, tuple(axes), normal(2, self.n, seed=99))


@dataclass(frozen=True, eq=False)
class Plane:
    """A case on a plane through all its arguments, where derivatives are small enough to be dense.

    Attributes:
        case: of one task.
        axes: two directions of every argument, `[*shape, 2]`.
        weights: of two combinations of the value, `[2, n]`.
    """

    case: Case
    axes: tuple[Tensor, ...]
    weights: Tensor

    @property
    def origin(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def at(self, s: Tensor) -> list[Tensor]:
        return [m + axis @ s for m, axis in zip(self.case.moving, self.axes, strict=True)]

    def fn(self, s: Tensor) -> Tensor:
        """By the library."""
        return self.weights @ self.case.whole(*self.at(s))

    def solved(self, s: Tensor) -> Tensor:
        """By the library, and true away from the origin too, for finite differences."""
        there = self.case.settle(self.case.put(self.case.args, self.at(s.detach())))
        return self.weights @ self.case.fn(*self.case.put(there, self.at(s)), fixed=True)

    def plain(self, s: Tensor) -> Tensor:
        """By the oracle."""
        return self.weights @ self.case.oracle(())[0](*self.at(s))

    @functools.cached_property
    def jacobian(self) -> Tensor:
        """The oracle's first derivatives at the origin, `[2, 2]`."""
        return jacobian(self.plain, self.origin)

    @functools.cached_property
    def hessian(self) -> Tensor:
        """The oracle's second derivatives at the origin, `[2, 2, 2]`."""
        return jacobian(lambda s: jacobian(self.plain, s, create_graph=True), self.origin)


def _pull(value, leaves, v, create_graph=False):
    return torch.autograd.grad(
        value, leaves, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Reproducible normal numbers."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, tol: float = 1e-9) -> None:
    """Assert that two tensors agree to `tol` of the larger one's size."""
    assert ours.shape == theirs.shape
    scale = max(theirs.abs().max().item(), 1e-3)
    error = (ours - theirs).abs().max().item()
    assert error <= tol * scale, f"off by {error / scale:.2e} of {scale:.2e}"


def exact(n: int, fixed: bool) -> iopt.CG:
    """CG to the last digit. Under vmap it cannot stop early: no more steps than the zoo needs."""
    steps = min(n + 4, 24)
    return iopt.CG(steps, rtol=None if fixed else 1e-14, min_curvature=0.0)


# -- problems of the zoo ---------------------------------------------------------------------------


def convex(name):
    return lambda batch: (problems.CONVEX[name](batch),) * 2


def network(make):
    """The problem at a minimiser, by Newton's method: it needs no closed form, only to be one."""

    @functools.cache
    def solved(batch):
        zoo = make(batch)
        solver = iopt.newton_cg(tol=1e-12, max_steps=200)
        solution = iopt.minimize(zoo.objective, *zoo.args, solver=solver, batch_ndim=zoo.batch_ndim)
        assert (solution.status == iopt.Status.SUCCESS).all()
        return replace(zoo, minimiser=solution.value)

    return solved


TANH_MLP = network(problems.tanh_mlp)
BY_HAND = {n: network(functools.partial(problems.conv, n, by_hand=True)) for n in NORMS}


def tanh_mlp(batch):
    return (TANH_MLP(batch),) * 2


def by_hand(norm):
    return lambda batch: (BY_HAND[norm](batch),) * 2


def conv(norm):
    """The normalisation of torch, and for the oracle that written out."""

    def make(batch):
        written_out = BY_HAND[norm](batch)
        return replace(written_out, objective=problems.conv(norm, batch).objective), written_out

    return make


SMOOTH = {  # what has third derivatives: torch's batch, layer and instance norm have not
    **{
        name: convex(name)
        for name in ("quadratic", "ridge kappa=1e2", "vector_lam", "matrix_lam", "least_squares")
    },
    "logistic": convex("logistic"),
    "tanh_mlp": tanh_mlp,
    "conv group norm": conv("group"),
    **{f"conv {n} norm by hand": by_hand(n) for n in ("batch", "layer")},
}
ALL = {
    **{name: make for name, make in SMOOTH.items() if "by hand" not in name},
    **{f"conv {n} norm": conv(n) for n in NORMS},
}


# -- attach ----------------------------------------------------------------------------------------


def chord(value: Callable[[Tensor], Tensor], phi: Tensor, steps: int = 2) -> Tensor:
    """The minimiser near phi, by Newton steps with the dense Hessian at phi held constant.

    From a stationary point k such steps have the k-th derivatives of the minimiser: each gains one
    order. After the first the derivative is `-A^-1 B`, stationary or not.
    """
    A = hessian(value, phi.detach())
    phi = phi.detach().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(value(phi), phi, create_graph=True)
        phi = phi - torch.linalg.solve(A, gradient)
    return phi


def attach(zoos, batch: tuple[int, ...]) -> Case:
    """`(phi, *theta and data) -> attach(phi, ...)`, phi stationary and without a derivative."""
    zoo, written_out = zoos(batch)
    phi = zoo.flat(zoo.minimiser)
    n = phi.shape[-1]
    leaves, spec = pytree.tree_flatten((zoo.theta, zoo.data))
    count = len(pytree.tree_leaves(zoo.theta))

    def fn(phi, *leaves, batch_ndim=0, fixed=False):
        theta, data = pytree.tree_unflatten(leaves, spec)
        attached = iopt.attach(
            tree(phi, zoo),
            zoo.objective,
            theta,
            *data,
            linear_solver=exact(n, fixed),
            batch_ndim=batch_ndim,
        )
        return flat(attached, phi.shape)

    def plain(phi, *leaves):
        theta, data = pytree.tree_unflatten(leaves, spec)
        return chord(lambda p: written_out.objective(tree(p, zoo), theta, *data), phi)

    def settle(args):
        phi, *leaves = args
        return plain(phi, *leaves).detach(), *leaves

    mapped = (True, *(False,) * count, *(True,) * (len(leaves) - count))
    argnums = [i for i, leaf in enumerate(leaves, 1) if leaf.is_floating_point()]
    return Case(fn, plain, (phi, *leaves), mapped, tuple(argnums), batch, n, settle)


def tree(vector: Tensor, zoo: problems.Problem):
    """The vector `[*batch, n]` as the parameters of the problem."""
    leaves, spec = pytree.tree_flatten(zoo.init)
    shapes = [leaf.shape[zoo.batch_ndim :] for leaf in leaves]
    pieces = vector.split([math.prod(shape) for shape in shapes], -1)
    views = [p.reshape(*vector.shape[:-1], *s) for p, s in zip(pieces, shapes, strict=True)]
    return pytree.tree_unflatten(views, spec)


def flat(phi, shape: tuple[int, ...]) -> Tensor:
    """Parameters end to end, `[*batch, n]`."""
    return torch.cat([leaf.reshape(*shape[:-1], -1) for leaf in pytree.tree_leaves(phi)], -1)


# -- linear_solve ----------------------------------------------------------------------------------


def matrices(damped: bool):
    """`(b, matrix) -> matrix^-1 b`, or `(b, matrix, damping)`, by the operators that are matrices."""

    def make(batch):
        n = 4
        matrix, b = problems.spd(0, n, 10.0, batch)
        damping = torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def fn(b, matrix, damping=None, batch_ndim=0, fixed=False):
            operator = iopt.Dense((matrix + matrix.mT) / 2)
            operator = iopt.Damped(operator, damping) if damped else operator
            return iopt.linear_solve(operator, b, exact(n, fixed)).value

        def plain(b, matrix, damping=0.0):
            A = (matrix + matrix.mT) / 2 + damping * torch.eye(n, dtype=torch.float64)
            return torch.linalg.solve(A, b)

        args = (b, matrix, damping) if damped else (b, matrix)
        count = len(args)
        return Case(fn, plain, args, (True,) * count, tuple(range(count)), batch, n)

    return make


def curvature(kind, zoos, of_all=True):
    """`(b, phi, *theta and data) -> A^-1 b` with the curvature of the problem at phi.

    Without `of_all` only b and theta have a derivative.
    """

    def make(batch):
        zoo, written_out = zoos(batch)
        phi = zoo.flat(zoo.minimiser)
        b = normal(*phi.shape, seed=17)
        n = phi.shape[-1]
        leaves, spec = pytree.tree_flatten((zoo.theta, zoo.data))
        count = len(pytree.tree_leaves(zoo.theta))

        def fn(b, phi, *leaves, batch_ndim=0, fixed=False):
            theta, data = pytree.tree_unflatten(leaves, spec)
            problem = iopt.InnerProblem.bind(
                zoo.objective, tree(phi, zoo), theta, *data, batch_ndim=batch_ndim
            )
            return iopt.linear_solve(kind(problem, phi), b, exact(n, fixed)).value

        def plain(b, phi, *leaves):
            theta, data = pytree.tree_unflatten(leaves, spec)
            dense = dense_hessian if kind is iopt.Hessian else dense_gauss_newton
            return torch.linalg.solve(dense(written_out.objective, zoo, phi, theta, data), b)

        mapped = (True, True, *(False,) * count, *(True,) * (len(leaves) - count))
        args = (b, phi, *leaves)
        argnums = tuple(i for i, arg in enumerate(args) if arg.is_floating_point())
        argnums = argnums if of_all else (0, *range(2, 2 + count))
        return Case(fn, plain, args, mapped, argnums, batch, n)

    return make


def dense_hessian(objective, zoo, phi, theta, data):
    return hessian(lambda p: objective(tree(p, zoo), theta, *data), phi, create_graph=True)


def dense_gauss_newton(objective, zoo, phi, theta, data):
    *inputs, target = data

    def outputs(p):
        return objective.predict(tree(p, zoo), *inputs)

    J = jacobian(outputs, phi, create_graph=True).flatten(0, -2)
    output = outputs(phi)
    of_loss = hessian(lambda o: objective.loss(o, target), output, create_graph=True)
    of_loss = of_loss.reshape(output.numel(), output.numel())
    prox = hessian(lambda p: objective.proximal(tree(p, zoo), theta), phi, create_graph=True)
    return J.mT @ of_loss @ J + prox


SMOOTH_SOLVES = {
    "Dense": matrices(damped=False),
    "Damped": matrices(damped=True),
    "Hessian of least_squares": curvature(iopt.Hessian, convex("least_squares")),
    "Hessian of logistic": curvature(iopt.Hessian, convex("logistic")),
    "Hessian of tanh_mlp": curvature(iopt.Hessian, tanh_mlp),
    "GaussNewton of logistic": curvature(iopt.GaussNewton, convex("logistic")),
    "GaussNewton of tanh_mlp": curvature(iopt.GaussNewton, tanh_mlp),
    "GaussNewton of conv group norm": curvature(iopt.GaussNewton, conv("group")),
}
SOLVES = {  # in phi and the data the derivative of this one would be a third one
    **SMOOTH_SOLVES,
    "GaussNewton of conv batch norm": curvature(iopt.GaussNewton, conv("batch"), of_all=False),
}


FIRST = [*(f"attach {name}" for name in ALL), *SOLVES]
SECOND = [*(f"attach {name}" for name in SMOOTH), *SMOOTH_SOLVES]


@functools.cache
def case(name: str, batch: tuple[int, ...] = (), own: tuple[int, ...] | None = None) -> Case:
    """A case of `FIRST` or `SECOND`; `own`: dimensions along which tasks have a theta of their own."""
    if own is not None:
        return case(name, batch).unshared(own)
    if name in SOLVES:
        return SOLVES[name](batch)
    return attach({**ALL, **SMOOTH}[name.removeprefix("attach ")], batch)
