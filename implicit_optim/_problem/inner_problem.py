"""The inner problem: one task's objective, summed over a batch of tasks.

``vmap`` is applied to the *value* only, because torch's second derivatives of ``vmap(grad(F))`` are
silently wrong; everything else differentiates the *sum* over the tasks, whose Hessian is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_optim._checks import check
from implicit_optim._evaluation import (
    Batching,
    ByDefault,
    Evaluator,
    Expansion,
    as_returned,
    gradient,
    only_tensors,
    pick,
    second_order,
)
from implicit_optim._problem.objective import Equations, InnerObjective, Objective
from implicit_optim._problem.proximal import Quadratic, inverse_proximal, proximal
from implicit_optim._torch import pytree
from implicit_optim._vectors import Layout, keystr


@dataclass(frozen=True, eq=False)
class InnerProblem:
    """An objective bound to its hyper-parameters and data, as a function of flat ``phi [*batch, n]``.

    Attributes:
        objective: ``F(phi, theta, *data) -> scalar`` of one task.
        layout: how phi's pytree lies in the flat vector.
        theta: pytree of hyper-parameters.
        data: tuple of pytrees; every tensor carries the batch dimensions.
        shared: one flag per batch dimension, outermost first: whether theta is the same for all its
            elements (no such dimension in theta's tensors) or carries the dimension too.
        evaluator: how every evaluation is made for all tasks: batching, precision, random numbers.
        term: the proximal term on flat vectors, where it need not be made anew for every evaluation.
        closed: whether a tensor that wants a gradient and is in neither phi, theta nor data is an error.

    Examples:
        >>> import torch, implicit_optim as iopt
        >>> F = lambda phi, theta, a: (a * phi**2).sum() / 2 - theta * phi.sum()
        >>> phi, a = torch.ones(4, 3), torch.arange(4.0)
        >>> problem = iopt.InnerProblem.bind(F, phi, torch.tensor(1.0), a, batch_ndim=1)
        >>> problem.grad(phi)[:, 0].tolist()
        [-1.0, 0.0, 1.0, 2.0]
    """

    objective: InnerObjective
    layout: Layout
    theta: Any
    data: tuple[Any, ...]
    shared: tuple[bool, ...]
    evaluator: Evaluator
    term: Quadratic | None = None
    closed: bool = False

    @classmethod
    def bind(
        cls,
        objective: InnerObjective,
        phi: Any,
        theta: Any,
        *data: Any,
        batch_ndim: int = 0,
        seed: int | None = None,
        batching: Batching | None = None,
    ) -> InnerProblem:
        """Bind and check; ``phi`` and ``data`` carry ``batch_ndim`` leading dimensions, theta none.

        Autocast is remembered, and in force whenever the problem is evaluated.

        Raises:
            TypeError: the objective cannot be called, or phi has a leaf that is no float tensor.
            ValueError: batch dimensions are empty or differ between phi and data.
        """
        if not callable(objective) and not isinstance(objective, Equations):
            raise TypeError(f"objective must be callable, got {type(objective).__name__}")
        check("batch_ndim", batch_ndim, "be >= 0")
        layout = Layout.of(phi, batch_ndim)
        first = pytree.tree_leaves(phi)[0]
        batch = tuple(first.shape[:batch_ndim])
        if 0 in batch:
            raise ValueError(f"the batch dimensions {batch} are empty: give at least one task")
        for name, tree in (("data", data), ("theta", theta)):
            for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
                if not isinstance(leaf, Tensor):
                    continue
                what = f"{name}{keystr(path)}"
                if name == "data" and tuple(leaf.shape[:batch_ndim]) != batch:
                    raise ValueError(
                        f"{what} has shape {tuple(leaf.shape)}: with batch_ndim={batch_ndim} it must "
                        f"lead with phi's batch dimensions {batch}"
                    )
                if leaf.device != first.device and (name == "data" or leaf.ndim > 0):
                    raise ValueError(
                        f"{what} is on {leaf.device} but phi is on {first.device}: move one of them"
                    )
        evaluator = Evaluator.now(first.device, seed, batching or ByDefault())
        return cls(objective, layout, theta, data, (True,) * batch_ndim, evaluator)

    def values(self, phi: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
        """The objective of every task."""
        term = self.quadratic
        return self.rest(phi) if term is None else self.rest(phi) + term.values(phi)

    def rest(self, phi: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
        """The objective of every task without its `quadratic` term."""
        if self._knows_proximal:
            return self.fits(phi)
        objective = cast(Callable[..., Any], self.objective)
        return self.map(lambda *args: _scalar(objective(*args)), phi, self.theta, self.data)

    @property
    def quadratic(self) -> Quadratic | None:
        """The proximal term, if it is [`proximal`][implicit_optim.proximal]."""
        if not self._knows_proximal:
            return None
        return self.term or Quadratic.of(self.theta, self.layout, self.shared)

    @property
    def _knows_proximal(self) -> bool:
        return getattr(self.objective, "proximal", None) is proximal

    def map(self, one: Callable[..., Any], phi: Any, theta: Any = None, data: Any = ()) -> Any:
        """``one(phi, theta, *data)`` of every task ``[*batch, ...]``, evaluated as the objective is.

        Args:
            one: to a pytree of tensors, of one task's phi as a pytree, theta and data.
            phi: vectors ``[*batch, n]``.
            theta: what ``one`` gets as theta.
            data: the data, or a part of them.
        """
        unravel = self.layout.unravel
        return self._vmap(lambda p, *rest: one(unravel(p), *rest), phi, theta, data)

    def _vmap(self, one: Callable[..., Any], first: Any, theta: Any, data: Any) -> Any:
        return self.evaluator.map(one, first, theta, data, self.shared)

    def predictions(self, phi: Float[Tensor, "*batch n"]) -> Any:
        """The structured objective's predictions for every task."""
        predict = self.structured.predict
        return self.map(lambda p, _, *x: only_tensors(predict(p, *x)), phi, None, self.data[:-1])

    def losses(self, output: Any) -> Float[Tensor, "*batch"]:
        """The structured objective's loss of every task, given its predictions."""

        def one(output: Any, _: Any, target: Any) -> Tensor:
            return _scalar(loss(as_returned(output), target))

        loss = self.structured.loss
        return self._vmap(one, output, None, self.data[-1:])

    def fits(self, phi: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
        """The structured objective's data term of every task."""
        fit = self.structured.fit
        return self.map(lambda p, _, *data: _scalar(fit(p, *data)), phi, None, self.data)

    def proximal_at(self, phi: Float[Tensor, "*batch n"]) -> Expansion:
        """Gradient, Hessian product and values of the structured objective's proximal term."""
        quadratic, term = self.quadratic, self.structured.proximal
        if quadratic is not None:
            return quadratic.at(phi)
        if term is None:
            return torch.zeros_like(phi), torch.zeros_like, phi.new_zeros(phi.shape[:-1])

        def values(phi: Tensor) -> Tensor:
            return cast(Tensor, self.map(lambda *args: _scalar(term(*args)), phi, self.theta))

        return second_order(values, phi)

    def grad(self, phi: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Gradient of every task's objective, from one backward pass through the sum."""
        slope, term = gradient(self.rest, phi, ends=self.ends)[0], self.quadratic
        return slope if term is None else term.add_slope(slope, phi)

    def stationarity(self, phi: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """What is zero at a solution: the gradient of an objective, the residual of equations."""
        if not isinstance(self.objective, Equations):
            return self.grad(phi)
        residual, ravel = self.objective.residual, self.layout.ravel
        return cast(Tensor, self.map(lambda *a: ravel(residual(*a)), phi, self.theta, self.data))

    @property
    def ends(self) -> list[Any] | None:
        """Tensors at which the objective's graph may end; ``None`` if any others may be there too."""
        return pytree.tree_leaves((self.theta, self.data)) if self.closed else None

    def grad_and_value(
        self, phi: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch"]]:
        """Gradient and value of every task's objective."""
        (slope, values), term = gradient(self.rest, phi, ends=self.ends), self.quadratic
        if term is None:
            return slope, values
        more, _, penalties = term.at(phi)
        return slope + more, values + penalties

    def precondition(self, r: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """``r / lam`` where the objective knows its proximal term, else ``r``."""
        solve = getattr(self.objective, "inverse_proximal", None)
        if solve is None:
            return r
        term = self.quadratic
        if solve is inverse_proximal and term is not None:
            return term.inverse(r)
        ravel = self.layout.ravel
        return cast(Tensor, self.map(lambda r, theta: ravel(solve(r, theta)), r, self.theta))

    @property
    def structured(self) -> Objective:
        """The objective, see `check_structure`."""
        self.check_structure()
        return cast(Objective, self.objective)

    def check_structure(self) -> None:
        """Raise ``TypeError`` where the objective lacks the structure that Gauss-Newton needs."""
        if not isinstance(self.objective, Objective):
            raise TypeError(
                "GaussNewton needs the structure of the objective: pass "
                "Objective(predict, loss, proximal), or use curvature=Hessian with a plain function"
            )

    def tensors(self) -> tuple[list[Any], list[Any]]:
        """Leaves of data (which carry the batch dimensions) and of theta."""
        return pytree.tree_leaves(self.data), pytree.tree_leaves(self.theta)

    def with_tensors(self, data: list[Any], theta: list[Any]) -> InnerProblem:
        """The same problem over other tensors."""
        return replace(
            self,
            data=pytree.tree_unflatten(data, pytree.tree_structure(self.data)),
            theta=pytree.tree_unflatten(theta, pytree.tree_structure(self.theta)),
            term=None,
        )

    def detach(self) -> InnerProblem:
        """The same problem over tensors without a graph."""
        data, theta = pytree.tree_map_only(Tensor, Tensor.detach, self.tensors())
        return self.with_tensors(data, theta).prepared()

    def prepared(self) -> InnerProblem:
        """The same problem with its proximal term made once, for many evaluations."""
        return replace(self, term=self.quadratic)

    def parts(self, solve: Callable[[InnerProblem, slice | int], Any], tasks: int) -> list[Any]:
        """Call ``solve`` for each chunk of tasks, with its problem and its place.

        That is a slice of the outermost dimension, or the index of one task, whose problem lacks it.
        """
        if not self.shared:
            return [solve(self, slice(None))]

        def of(chunk: slice) -> Any:
            place = chunk.start if chunk.stop - chunk.start == 1 else chunk
            return solve(self._part(place), place)

        return self.evaluator.batching.run(of, tasks)

    def _part(self, place: slice | int) -> InnerProblem:
        """The problem of a chunk, see `parts`."""
        alone = isinstance(place, int)
        return replace(
            self,
            data=pick(self.data, place),
            theta=self.theta if self.shared[0] else pick(self.theta, place),
            shared=self.shared[1:] if alone else self.shared,
            evaluator=self.evaluator.part(place),
            term=self.term if all(self.shared) else None,
        )

    def select(self, index: tuple[int, ...]) -> InnerProblem:
        """The problem of one task, without batch dimensions."""
        if not all(self.shared):
            raise ValueError("one task can be selected only where all tasks share theta")
        return replace(self, data=pick(self.data, index), shared=(), term=None)

    def add_batch(self, data: list[Any], theta: list[Any], *, shared: bool) -> InnerProblem:
        """The same problem with one more batch dimension in front, carried by these tensors."""
        return replace(self.with_tensors(data, theta), shared=(shared, *self.shared))


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"objective must return one scalar per task, got {what}: reduce the loss over the examples, "
            "and set batch_ndim to the number of leading task dimensions of phi and data"
        )
    return value
