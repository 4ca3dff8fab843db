"""The implicit meta-gradient: a solution from anywhere, made a function of what defines it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from implicit_optim._evaluation import Batching, autograd, full_precision, gradient, vjp
from implicit_optim._linear_solve import linear_solve
from implicit_optim._linear_solver import CG, GMRES, LinearSolver
from implicit_optim._operator import (
    CurvatureChoice,
    GaussNewton,
    Hessian,
    Jacobian,
    OnSupport,
    Operator,
    SafeguardedHessian,
)
from implicit_optim._outcome import OnSolve
from implicit_optim._problem import L1, Equations, InnerObjective, InnerProblem, Objective, smooth

Tree = TypeVar("Tree")  # a tensor or a pytree of tensors


def attach(
    phi: Tree,
    objective: InnerObjective,
    theta: Any,
    *data: Any,
    linear_solver: LinearSolver | None = None,
    curvature: CurvatureChoice = Hessian,
    batch_ndim: int = 0,
    seed: int | None = None,
    batching: Batching | None = None,
    on_solve: OnSolve | None = None,
) -> Tree:
    r"""Make a minimiser ``phi`` a differentiable function of theta and of the data.

    The value is unchanged. Its derivative is that of ``phi*(theta) = argmin_phi F(phi, theta, *data)``
    by the implicit function theorem, ``d phi* = -(d^2F/dphi^2)^-1 d^2F/(dphi d.)``, at the cost of one
    linear solve per backward pass. phi may come from anywhere: the gradient does not depend on the
    path, only on phi being stationary; ``stats["stationarity"]`` of the solve, ``||grad F(phi)||``,
    says how stationary it is.

    phi may also solve equations, [`Root`][implicit_optim.Root] or
    [`FixedPoint`][implicit_optim.FixedPoint]: then ``d phi* = -(dR/dphi)^-1 dR/d.``.

    Of an [`L1`][implicit_optim.L1] objective the zeros of phi are held at zero, and the others are
    differentiated: on the support S, ``d phi_S = -H_SS^-1 d(grad_S F + s sign(phi_S))``.

    Args:
        phi: the minimiser, a tensor or pytree of tensors ``[*batch, *shape]``; gradients do not flow
            into it.
        objective: ``F(phi, theta, *data) -> scalar`` of one task, or its equations, or an
            [`L1`][implicit_optim.L1] of it. What requires grad must come in through theta or data.
        theta: tensor or pytree that all tasks share.
        *data: pytrees of tensors ``[*batch, ...]``.
        linear_solver: solves with the curvature. Default: ``CG()``, for equations ``GMRES()``; relative
            residual 1e-6.
        curvature: [`Hessian`][implicit_optim.Hessian] (exact),
            [`GaussNewton`][implicit_optim.GaussNewton] (positive definite, biased), or
            [`SafeguardedHessian`][implicit_optim.SafeguardedHessian], the second for the tasks in which
            the first is not positive definite; or a function that returns an operator, such as
            ``lambda problem, phi: Hessian(problem, phi) + 0.1``.
        batch_ndim: how many leading dimensions of phi and data count tasks.
        seed: for objectives that draw random numbers (dropout): every evaluation draws from this seed,
            the one that ``minimize`` was given. Default: drawing is an error.
        batching: how the tasks of a batch are evaluated, see [`Batching`][implicit_optim.Batching].
        on_solve: called as ``on_solve("linear_solve", solution)`` after every solve, in a backward
            pass, in forward mode, and in derivatives of these.

    Returns:
        A pytree like ``phi``.

    Raises:
        TypeError: a curvature that needs Gauss-Newton with an objective without structure or with
            equations, or a solver for symmetric matrices with equations.
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: the objective draws random numbers and there is no seed.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: phi @ phi / 2 + (phi - theta) @ (phi - theta)  # phi* = 2/3 theta
        >>> theta = torch.tensor([3.0], requires_grad=True)
        >>> phi = iopt.attach(torch.tensor([2.0]), F, theta)
        >>> phi.sum().backward()
        >>> round(theta.grad.item(), 4)
        0.6667

    Source: Rajeswaran et al. 2019, Lemma 1 and algorithm 2; Blondel et al. 2022, section 2.
    """
    problem = InnerProblem.bind(
        objective, phi, theta, *data, batch_ndim=batch_ndim, seed=seed, batching=batching
    )
    problem = replace(problem, closed=True)
    flat = problem.layout.ravel(phi)
    return problem.layout.unravel(attach_flat(flat, problem, linear_solver, curvature, on_solve))


def attach_flat(
    phi: Tensor,
    problem: InnerProblem,
    linear_solver: LinearSolver | None,
    curvature: CurvatureChoice,
    on_solve: OnSolve | None,
) -> Tensor:
    """[`attach`][implicit_optim.attach] on a flat ``phi [*batch, n]`` and a bound problem."""
    matrix = curvature
    if curvature in (GaussNewton, SafeguardedHessian):
        smooth(problem).check_structure()
    if isinstance(problem.objective, Equations):
        matrix = Jacobian
        if linear_solver is not None and linear_solver.needs_symmetry:
            raise TypeError(
                f"linear_solver={type(linear_solver).__name__} needs a symmetric matrix, and the "
                "Jacobian of equations need not be one: use GMRES()"
            )
    if isinstance(problem.objective, L1):
        matrix = partial(OnSupport, matrix=curvature)
    if linear_solver is None:
        linear_solver = GMRES() if matrix is Jacobian else CG()
    template, tensors = autograd.Template.of(problem)
    rule = ImplicitRule(template, linear_solver, matrix, on_solve)
    return autograd.apply(ImplicitMetaGradient, _ReverseImplicit, rule, phi.detach(), *tensors)


@dataclass(frozen=True, eq=False)
class ImplicitRule:
    """How [`ImplicitMetaGradient`][implicit_optim.ImplicitMetaGradient] differentiates.

    Attributes:
        problem: the inner problem without its tensors, which are the data's and theta's.
        linear_solver: solves with the curvature.
        curvature: the matrix.
        on_solve: told of every solve.
    """

    problem: autograd.Template
    linear_solver: LinearSolver
    curvature: CurvatureChoice
    on_solve: OnSolve | None

    def solve(
        self, phi: Tensor, tensors: list[Any], v: Tensor, *, transposed: bool = False
    ) -> Tensor:
        """``A^-1 v``, or ``A^-T v``, with the curvature at phi."""
        operator = self.curvature(self.problem.bind(tensors), phi)
        if isinstance(operator, OnSupport):
            v = torch.where(phi == 0, 0.0, v)
        if not isinstance(operator, Operator):
            raise TypeError(f"curvature must return an Operator, got {operator!r}")
        operator = operator.transpose() if transposed else operator
        return linear_solve(operator, v, self.linear_solver, on_solve=self.on_solve).value

    def mixed(self, phi: Tensor, tensors: list[Any], needed: list[bool], w: Tensor) -> list[Any]:
        """``d <w, grad_phi F> / d tensors``: of the data a gradient per task, of theta their sum."""
        problem, count = self.problem.bind(tensors), self.problem.count
        summed = [i >= count and problem.shared[:1] == (True,) for i in range(len(tensors))]

        def part(problem: InnerProblem, tasks: slice | int) -> list[Any]:
            grads = self._mixed(problem, phi[tasks], needed, w[tasks])
            if isinstance(tasks, slice):
                return grads
            each = zip(grads, summed, strict=True)
            return [g if g is None or is_summed else g[None] for g, is_summed in each]

        def join(pieces: tuple[Any, ...], is_summed: bool) -> Any:
            if len(pieces) == 1 or pieces[0] is None:
                return pieces[0]
            return sum(pieces[1:], pieces[0]) if is_summed else torch.cat(pieces)

        parts = problem.parts(part, phi.shape[0])
        return [join(*each) for each in zip(zip(*parts, strict=True), summed, strict=True)]

    def _mixed(
        self, problem: InnerProblem, phi: Tensor, needed: list[bool], w: Tensor
    ) -> list[Any]:
        template, leaves = autograd.Template.of(problem)

        def slope(leaves: list[Any]) -> Tensor:
            return cast(Tensor, template.bind(leaves).stationarity(phi))

        def fit(leaves: list[Any]) -> Tensor:
            return gradient(template.bind(leaves).fits, phi)[0]

        def term(leaves: list[Any]) -> Tensor:
            return template.bind(leaves).proximal_at(phi)[0]

        if not isinstance(problem.objective, Objective):
            return autograd.split_grads(slope, leaves, needed, w)
        # Of a structured F, only the part that each tensor is in. A formula needs no torch.func.
        count, pull = template.count, None if problem.quadratic is None else vjp
        of_data = [need and i < count for i, need in enumerate(needed)]
        of_theta = [need and i >= count for i, need in enumerate(needed)]
        data = autograd.split_grads(fit, leaves, of_data, w)
        theta = autograd.split_grads(term, leaves, of_theta, w, vjp=pull)
        return [*data[:count], *theta[count:]]


class _ReverseImplicit(torch.autograd.Function):
    """What torch.compile takes of `ImplicitMetaGradient`: all but forward mode."""

    @staticmethod
    def forward(rule: ImplicitRule, phi: Tensor, *tensors: Any) -> Tensor:
        """Return phi ``[*batch, n]``; the tensors are the data's and theta's leaves."""
        return phi.view_as(phi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the *output*: the second derivative must see phi as a function of theta."""
        ctx.rule, _, *tensors = inputs
        autograd.save(ctx, output, tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        """One linear solve, one mixed vector-Jacobian product."""
        phi, tensors = autograd.saved(ctx)
        w = ctx.rule.solve(phi, tensors, v, transposed=True)
        needed = list(ctx.needs_input_grad[2:])
        with full_precision(phi.device):
            return (None, None, *ctx.rule.mixed(phi, tensors, needed, -w))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """Add the new dimension to the batch."""
        rule, phi, *tensors = args
        _, phi_dim, *dims = in_dims
        template, tensors = rule.problem.add_batch(tensors, dims, info.batch_size)
        (phi,) = autograd.lead([phi], [phi_dim], info.batch_size)
        return ImplicitMetaGradient.apply(replace(rule, problem=template), phi, *tensors), 0


class ImplicitMetaGradient(_ReverseImplicit):
    r"""The ``autograd.Function`` behind [`attach`][implicit_optim.attach].

    Forward returns phi as it is. Backward takes ``v = dL/dphi``, solves ``A w = v`` with the curvature
    A at phi by CG over Hessian-vector products, and returns ``-w^T d^2F/(dphi d.)`` for every tensor
    of the data and of theta. With the proximal term that is the paper's
    ``g = lam (H + lam I)^-1 v = (I + H/lam)^-1 v``. Of equations R it is ``A^T w = v``, ``-w^T dR/d.``.

    It is static, so nothing is made per call, and it composes: its backward is differentiable, and
    under ``vmap`` it runs batch-native.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta: (phi**2).sum() / 2 - (theta * phi).sum()
        >>> theta = torch.tensor([3.0], requires_grad=True)
        >>> problem, tensors = autograd.Template.of(
        ...     iopt.InnerProblem.bind(F, torch.zeros(1), theta)
        ... )
        >>> rule = ImplicitRule(problem, iopt.CG(), iopt.Hessian, None)
        >>> ImplicitMetaGradient.apply(rule, torch.tensor([3.0]), *tensors).backward()
        >>> theta.grad.item()
        1.0

    Source: Rajeswaran et al. 2019, algorithm 2.
    """

    @staticmethod
    @autograd.forward_mode
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """One mixed Jacobian-vector product, one linear solve."""
        phi, tensors = autograd.saved(ctx, forward=True)
        with full_precision(phi.device):
            change = autograd.push_forward(
                lambda ts: ctx.rule.problem.bind(ts).stationarity(phi), tensors, tangents[2:]
            )
        if change is None:
            return torch.zeros_like(phi)
        return ctx.rule.solve(phi, tensors, -change)
