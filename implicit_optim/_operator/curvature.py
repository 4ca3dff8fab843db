"""Curvature matrices of an inner problem: the exact Hessian, Gauss-Newton, and one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicit_optim._evaluation import Expansion, gradient, second_order, vjp
from implicit_optim._operator.algebra import Operator, Vector
from implicit_optim._operator.base import Linearized, LowRank
from implicit_optim._operator.fields import Leaves
from implicit_optim._problem import InnerProblem
from implicit_optim._torch import pytree
from implicit_optim._vectors import Layout

CurvatureChoice = Callable[[InnerProblem, Tensor], Operator]  # such as Hessian


@dataclass(frozen=True, eq=False)
class Curvature(Operator):
    """What Hessian and Gauss-Newton share: a matrix that belongs to an inner problem at a point."""

    problem: InnerProblem
    phi: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, n)``."""
        return tuple(self.phi.shape)

    def mv(self, x: Vector) -> Vector:
        """The product with x, of a linearisation of its own."""
        return self.linearize().mv(x)

    def precondition(self, r: Vector) -> Vector:
        """``r / lam`` where the objective knows its proximal term."""
        return self.problem.precondition(r)

    def parts(self, solve: Callable[[Operator, slice | int], Any]) -> list[Any]:
        """The chunks of the problem's [`Batching`][implicit_optim.Batching]."""

        def part(problem: InnerProblem, tasks: slice | int) -> Any:
            return solve(replace(self, problem=problem, phi=self.phi[tasks]), tasks)

        return self.problem.parts(part, self.phi.shape[0])

    def _linearized(
        self, problem: InnerProblem, data: Expansion, term: Expansion | None
    ) -> Linearized:
        """The sums of gradients, products and values of the data term and of the other one."""
        slope, mv, values = data
        if term is None:
            return Linearized(mv, problem.precondition, slope, values)
        more, mv_of_term, penalties = term

        def product(x: Tensor) -> Tensor:
            return mv(x) + mv_of_term(x)

        return Linearized(product, problem.precondition, slope + more, values + penalties)

    def tensors(self) -> tuple[Leaves, Leaves]:
        """The point and the data; theta."""
        data, theta = self.problem.tensors()
        return [self.phi, *data], theta

    def with_tensors(self, own: Leaves, common: Leaves) -> Curvature:
        """The same curvature of the same problem over other tensors."""
        return replace(self, phi=own[0], problem=self.problem.with_tensors(own[1:], common))

    def add_batch(self, own: Leaves, common: Leaves, *, shared: bool) -> Curvature:
        """One more batch dimension in front."""
        problem = self.problem.add_batch(own[1:], common, shared=shared)
        return replace(self, phi=own[0], problem=problem)


@dataclass(frozen=True, eq=False)
class Hessian(Curvature):
    """Exact Hessian of the inner objective, ``d^2 F / d phi^2``: the default curvature.

    With the proximal term in F this is the paper's ``H + lam I``. On networks it can be indefinite.

    Args:
        problem: the inner problem.
        phi: the point, flat ``[*batch, n]``.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> phi = torch.tensor([1.0, 2.0])
        >>> problem = iopt.InnerProblem.bind(lambda phi, theta: (phi**4).sum() / 12, phi, ())
        >>> iopt.Hessian(problem, phi).as_matrix().tolist()
        [[1.0, 0.0], [0.0, 4.0]]

    Source: Pearlmutter 1994; Rajeswaran et al. 2019, Lemma 1.
    """

    def linearize(self) -> Linearized:
        """Keep the graph of one gradient; each product is one pull-back through it."""
        problem, phi = self.problem.prepared(), self.phi
        rest, term = second_order(problem.rest, phi, ends=problem.ends), problem.quadratic
        return self._linearized(problem, rest, None if term is None else term.at(phi))


@dataclass(frozen=True, eq=False)
class GaussNewton(Curvature):
    """Generalised Gauss-Newton matrix ``J^T H_out J`` of the data term, plus the proximal Hessian.

    J is the Jacobian of ``predict`` in phi, H_out the Hessian of the loss in the output. For a loss
    that is convex in the output it is positive definite for every lam > 0, and it equals the Hessian
    where the model is linear in its parameters or the residual is zero.

    Args:
        problem: the inner problem; its objective must be an [`Objective`][implicit_optim.Objective].
        phi: the point, flat ``[*batch, n]``.

    Raises:
        TypeError: the objective is a plain function, which has no outputs to split at.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = iopt.Objective(lambda phi, x: (x @ phi) ** 2, torch.nn.functional.mse_loss)
        >>> phi, x, y = torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0]]), torch.tensor([9.0])
        >>> problem = iopt.InnerProblem.bind(fit, phi, (), x, y)
        >>> iopt.GaussNewton(problem, phi).as_matrix().tolist()  # the Hessian has -24 in the corner
        [[8.0, 0.0], [0.0, 0.0]]

    Source: Schraudolph 2002, "Fast curvature matrix-vector products", section 3.
    """

    def linearize(self) -> Linearized:
        """Keep the graphs of predict, of its transpose, and of the loss gradient."""
        problem, phi = self.problem.prepared(), self.phi
        output, pull = vjp(problem.predictions, phi, ends=problem.ends)
        zero = pytree.tree_map(torch.zeros_like, output)
        _, push = vjp(pull, zero, transpose=True)  # J x: the transpose of J^T
        slope, out_hessian, losses = second_order(problem.losses, output, ends=problem.ends)

        def mv(x: Tensor) -> Tensor:
            return pull(out_hessian(push(x)))

        whole = self._linearized(problem, (pull(slope), mv, losses), problem.proximal_at(phi))

        low_rank = partial(_low_rank, output, phi.ndim - 1, pull, push, out_hessian)
        return replace(whole, low_rank=low_rank)


@dataclass(frozen=True, eq=False)
class EmpiricalFisher(Curvature):
    """Empirical Fisher matrix ``1/N sum_i g_i g_i^T`` of the data term, plus the proximal Hessian.

    g_i is the gradient of example i's loss. Positive definite for every lam > 0, but its size is that
    of squared gradients, not of curvature: it vanishes as the examples are fitted. For comparisons;
    Gauss-Newton costs the same.

    Args:
        problem: the inner problem; its objective must be an [`Objective`][implicit_optim.Objective],
            its predictions one tensor ``[N, ...]`` of N examples, its loss their *mean*.
        phi: the point, flat ``[*batch, n]``.

    Raises:
        TypeError: the objective is a plain function, or the predictions are no tensor.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = iopt.Objective(lambda phi, x: x @ phi, torch.nn.functional.mse_loss)
        >>> phi, x, y = torch.ones(1), torch.tensor([[1.0], [2.0]]), torch.zeros(2)
        >>> problem = iopt.InnerProblem.bind(fit, phi, (), x, y)
        >>> iopt.EmpiricalFisher(problem, phi).as_matrix().item()  # (2^2 + 8^2) / 2
        34.0

    Source: Kunstner, Balles & Hennig 2019, "Limitations of the empirical Fisher approximation for
    natural gradient descent", section 1.
    """

    def linearize(self) -> Linearized:
        """Keep the graphs of predict and of its transpose, and the slopes of the losses."""
        problem, phi = self.problem.prepared(), self.phi
        output, pull = vjp(problem.predictions, phi, ends=problem.ends)
        if not isinstance(output, Tensor) or output.ndim < phi.ndim:
            raise TypeError("EmpiricalFisher needs predictions that are one tensor [N, ...]")
        _, push = vjp(pull, torch.zeros_like(output), transpose=True)
        slope, values = gradient(problem.losses, output, ends=problem.ends)
        each = slope.flatten(phi.ndim - 1, -1).unflatten(-1, (output.shape[phi.ndim - 1], -1))

        def mv(x: Tensor) -> Tensor:
            along = (each * push(x).reshape(each.shape)).sum(-1, keepdim=True)
            return pull((each.shape[-2] * along * each).reshape(output.shape))

        return self._linearized(problem, (pull(slope), mv, values), problem.proximal_at(phi))


class SafeguardedHessian(Hessian):
    """The exact Hessian, and Gauss-Newton in the tasks where CG meets negative curvature.

    The solve is done twice only if there are such tasks: on a CPU that is looked at, on other devices
    it is always done. ``stats["fallback"]`` says which tasks these are; their status is that of the
    second solve. Derivatives of the result are those of what was solved.

    Args:
        problem: the inner problem; its objective must be an [`Objective`][implicit_optim.Objective].
        phi: the point, flat ``[*batch, n]``.

    Raises:
        TypeError: the objective is a plain function, which has no outputs to split at.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> fit = iopt.Objective(lambda phi, x: (x @ phi) ** 2, torch.nn.functional.mse_loss)
        >>> phi, x = torch.ones(2, 1), torch.ones(2, 1, 1)
        >>> y = torch.tensor([[0.0], [9.0]])  # the Hessians are 12 and -24, Gauss-Newton is 8
        >>> problem = iopt.InnerProblem.bind(fit, phi, (), x, y, batch_ndim=1)
        >>> A = iopt.SafeguardedHessian(problem, phi)
        >>> solution = iopt.linear_solve(A, torch.ones(2, 1))
        >>> (1 / solution.value).flatten().tolist(), solution.stats["fallback"].tolist()
        ([12.0, 8.0], [False, True])

    Source: safeguarded Newton directions, Nocedal & Wright 2006, section 3.4; Schraudolph 2002,
    section 3.
    """

    def fallback(self) -> GaussNewton:
        """Gauss-Newton at the same point."""
        self.problem.check_structure()
        return GaussNewton(self.problem, self.phi)

    def linearize(self) -> Linearized:
        """Linearise the Hessian; Gauss-Newton where it is asked for."""
        return replace(super().linearize(), fallback=lambda: self.fallback().linearize())


def _low_rank(output: Any, batch_ndim: int, *products: Callable[[Any], Any]) -> LowRank:
    """The parts of ``J^T H J`` as functions of flat outputs ``[*batch, m]``."""
    flat, (pull, push, hessian) = Layout.of(output, batch_ndim, "output"), products
    return LowRank(
        lambda u: pull(flat.unravel(u)),
        lambda x: flat.ravel(push(x)),
        lambda u: flat.ravel(hessian(flat.unravel(u))),
        flat.n,
    )
