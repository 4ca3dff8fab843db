"""One differentiable, batchable primitive: ``x = A^-1 b``."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._evaluation import autograd, full_precision
from implicit_optim._linear_solver import CG, LinearSolver, safeguarded
from implicit_optim._operator import Operator
from implicit_optim._outcome import OnSolve, Solution, add_task_dim, concatenate
from implicit_optim._vectors import norm

_DEFAULT = CG()


def linear_solve(
    operator: Operator,
    b: Float[Tensor, "*batch n"],
    linear_solver: LinearSolver = _DEFAULT,
    *,
    on_solve: OnSolve | None = None,
) -> Solution:
    r"""Solve ``A x = b`` for every task, differentiably.

    The derivative is the implicit one and costs one more solve, whatever the solver did:
    ``dx = A^-1 (db - dA x)`` forward, ``d<w, x> = <A^-T w, db - dA x>`` in reverse. It composes with
    ``grad``, ``jvp``, ``vmap`` and itself.

    Args:
        operator: A with vectors ``[*batch, n]``; its tensors receive gradients.
        b: right-hand side ``[*batch, n]``.
        linear_solver: a [`LinearSolver`][implicit_optim.LinearSolver]. Default: ``CG()``.
        on_solve: called as ``on_solve("linear_solve", solution)`` after this solve and after those of
            its derivatives, which return nothing that could be looked at.

    Returns:
        A [`Solution`][implicit_optim.Solution] with value ``[*batch, n]``, the solver's ``stats``
        and ``stationarity``, the norm of the objective's gradient where the operator is the curvature
        of one (else NaN). Only the value is differentiable.

    Raises:
        ValueError: b's shape is not the operator's.
        TypeError: the operator or the solver is of another kind, b of another dtype, or the solver
            needs a symmetric operator and has none.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> b = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = iopt.linear_solve(iopt.Dense(2.0 * torch.eye(2)), b).value
        >>> x.sum().backward()
        >>> b.grad.tolist()
        [0.5, 0.5]

    Source: Rajeswaran et al. 2019, algorithm 2; Blondel et al. 2022, section 2.
    """
    if not isinstance(operator, Operator):
        raise TypeError(f"operator must be an Operator such as Dense(matrix), got {operator!r}")
    if not isinstance(linear_solver, LinearSolver):
        raise TypeError(f"linear_solver must be a LinearSolver such as CG(), got {linear_solver!r}")
    if linear_solver.needs_symmetry and not operator.symmetric:
        raise TypeError(
            f"{type(linear_solver).__name__} needs a symmetric operator, {type(operator).__name__} is "
            "none: use GMRES()"
        )
    if tuple(b.shape) != operator.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, the operator takes {operator.shape}")
    dtype = operator.like().dtype
    if b.dtype != dtype:
        raise TypeError(
            f"b has dtype {b.dtype} but the operator has {dtype}: bring them to one dtype"
        )
    template, tensors = autograd.Template.of(operator)
    rule = _Rule(template, linear_solver, on_solve)
    x, status, *numbers = autograd.apply(_LinearSolve, _ReverseLinearSolve, rule, b, *tensors)
    names = (*linear_solver.stats_names, "stationarity")
    solution = Solution(x, status, dict(zip(names, numbers, strict=True)))
    other = operator.fallback()
    if other is not None:
        # Two solves and a choice between them: so the derivatives are those of what was solved.
        solution = safeguarded(solution, lambda: linear_solve(other, b, linear_solver))
    if on_solve is not None:
        on_solve("linear_solve", solution)
    return solution


@dataclass(frozen=True, eq=False)
class _Rule:
    """What is solved with what, and who is told."""

    operator: autograd.Template
    linear_solver: LinearSolver
    on_solve: OnSolve | None

    def solve(self, operator: Operator, b: Tensor) -> Tensor:
        """``A^-1 b``, for a derivative, itself differentiable."""
        return linear_solve(operator, b, self.linear_solver, on_solve=self.on_solve).value


class _ReverseLinearSolve(torch.autograd.Function):
    """``(rule, b, *own, *common) -> (x, status, *stats)``."""

    @staticmethod
    def forward(rule: _Rule, b: Tensor, *tensors: Any) -> tuple[Any, ...]:
        def solve(part: Operator, tasks: slice | int) -> Solution:
            linearized, rhs = part.linearize(), b[tasks]
            value, status, stats = rule.linear_solver.solve(linearized, rhs)
            gradient = linearized.gradient
            if gradient is None:
                gradient = torch.full_like(rhs, math.nan)
            return add_task_dim(
                Solution(value, status, stats | {"stationarity": norm(gradient)}), tasks
            )

        with full_precision(b.device):
            value, status, stats = concatenate(rule.operator.bind(list(tensors)).parts(solve))
        return (value, status, *stats.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.rule, _, *tensors = inputs
        x, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.outputs = len(others)
        autograd.save(ctx, x, tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, tensors = autograd.saved(ctx)
        if grads[0] is None:
            return (None,) * (2 + len(tensors))
        bind = ctx.rule.operator.bind
        w = ctx.rule.solve(bind(tensors).transpose(), grads[0])
        needed = ctx.needs_input_grad[2:]
        with full_precision(x.device):
            pulled = autograd.split_grads(lambda leaves: bind(leaves).mv(x), tensors, needed, -w)
        return (None, w, *pulled)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        rule, b, *tensors = args
        _, b_dim, *dims = in_dims
        template, tensors = rule.operator.add_batch(tensors, dims, info.batch_size)
        (b,) = autograd.lead([b], [b_dim], info.batch_size)
        out = _LinearSolve.apply(replace(rule, operator=template), b, *tensors)
        return out, (0,) * len(out)


class _LinearSolve(_ReverseLinearSolve):
    """The same in forward mode too, which torch.compile does not take."""

    @staticmethod
    @autograd.forward_mode
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        x, tensors = autograd.saved(ctx, forward=True)
        bind = ctx.rule.operator.bind
        db = torch.zeros_like(x) if tangents[1] is None else tangents[1]
        with full_precision(x.device):
            dA_x = autograd.push_forward(lambda leaves: bind(leaves).mv(x), tensors, tangents[2:])
        dx = ctx.rule.solve(bind(tensors), db if dA_x is None else db - dA_x)
        return (dx, *(None,) * ctx.outputs)
