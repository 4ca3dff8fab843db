"""NewtonCG stays with a model in NumPy, whatever a training script does (machine.py)."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from implicit_optim import CG, Armijo, GaussNewton, Hessian, Status
from implicit_optim.optim import NewtonCG
from machine import F64, SEEDS, SELDOM, SHAPES, Entry, Machine, case

LENGTHS = st.sampled_from([1.0, 2.5, 0.7, 4.0, 0.0])  # lr of Newton's method
SEARCHES = [Armijo(), Armijo(2.0, 0.3, 0.3, 3), Armijo(1.0, 0.9, 0.5, 2)]  # the last gives up often


class Unclear(Exception):
    """Rounding decides where the method goes: the model makes no claim."""


class Bowl:
    """`o.o / 2 - b.z + const` with the output `o = R z`; the Hessian is `R^T R` everywhere."""

    def __init__(self, n):
        rng = np.random.default_rng(n)
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        self.root = np.linspace(1, 3, n)[:, None] * q
        self.b = rng.standard_normal(n)

    def torch(self, z):
        output = torch.from_numpy(self.root) @ z
        return output @ output / 2 - torch.from_numpy(self.b) @ z + 50, output

    def numpy(self, z, gauss_newton):
        output, matrix = self.root @ z, self.root.T @ self.root
        return output @ output / 2 - self.b @ z + 50, self.root.T @ output - self.b, matrix


class Valley:
    """Curved and coupled: `sum sqrt(1 + o^2) + o.o / 10 + (sum o)^2 / 16` of `o = u + u^3 / 24`."""

    def __init__(self, n):
        self.centre = np.linspace(-1, 1, n)

    def torch(self, z):
        u = z - torch.from_numpy(self.centre)
        output = u + u**3 / 24
        return (1 + output**2).sqrt().sum() + output @ output / 10 + output.sum() ** 2 / 16, output

    def numpy(self, z, gauss_newton):
        u = z - self.centre
        o, jacobian = u + u**3 / 24, 1 + u**2 / 8
        value = np.sqrt(1 + o**2).sum() + o @ o / 10 + o.sum() ** 2 / 16
        slope = o / np.sqrt(1 + o**2) + o / 5 + o.sum() / 8
        bend = np.diag((1 + o**2) ** -1.5 + 1 / 5) + 1 / 8
        matrix = jacobian[:, None] * bend * jacobian
        return value, jacobian * slope, matrix if gauss_newton else matrix + np.diag(slope * u / 4)


def conjugate_gradients(A, b, steps):
    """`steps` of them on `A x = b` from zero, as the documentation says; the status."""
    x, r, p = np.zeros_like(b), b, b
    for k in range(steps):
        if np.linalg.norm(r) <= 1e-13 * np.linalg.norm(b):
            break
        Ap = A @ p
        curvature = p @ Ap
        if abs(curvature) <= 1e-4 * np.linalg.norm(Ap) * np.linalg.norm(p):
            raise Unclear
        if curvature < 0:
            return (b if k == 0 else x), Status.NEGATIVE_CURVATURE
        x = x + (r @ r) / curvature * p
        r_next = r - (r @ r) / curvature * Ap
        r, p = r_next, r_next + (r_next @ r_next) / (r @ r) * p
    return x, Status.SUCCESS


def armijo(search, along, value, slope):
    """The steps that the rule may choose: one, but for ties within rounding; 0 if it gives up."""
    t, steps, rounding = search.lr, [], np.finfo(float).eps * abs(value)
    for _ in range(search.max_trials):
        excess = along(t) - value - search.c1 * t * slope
        if excess <= 15 * rounding:
            steps.append(t)
        if excess <= 5 * rounding:
            return steps
        t *= search.shrink
    return [*steps, 0.0]


class NewtonCGMachine(Machine):
    """One group, one flat vector; the parameters are all that a step depends on."""

    @initialize(
        shapes=SHAPES, seed=SEEDS, landscape=st.sampled_from([Bowl, Valley]),
        curvature=st.sampled_from([Hessian, GaussNewton]), steps=st.sampled_from([1, 2, 5, 40]),
        search=st.sampled_from(SEARCHES),
        damping=st.sampled_from([0.0, 0.5]), lr=LENGTHS.filter(bool), maximize=SELDOM,
    )  # fmt: skip
    def start(self, shapes, seed, landscape, curvature, steps, search, damping, lr, maximize):
        self.many, self.count, self.last = steps, 0, None
        self.settings = {"linear_solver": CG(max_steps=steps), "line_search": search}
        self.settings["curvature"] = self.curvature = curvature
        self.search = search
        rng = np.random.default_rng(seed)
        entries = [Entry(np.asarray(2 * rng.standard_normal(shape)), False) for shape in shapes]
        self.landscape = landscape(sum(entry.y.size for entry in entries))
        group = {"members": list(range(len(shapes))), "lr": lr, "tensor": False}
        self.begin(entries, [{**group, "damping": damping, "maximize": maximize}])

    def construct(self, groups):
        (group,) = groups
        params = group.pop("params")
        return NewtonCG(params, **group, **self.settings)

    @rule(
        lr=LENGTHS, tensor=st.booleans(), damping=st.sampled_from([0.0, 0.1, 2.0]), maximize=SELDOM
    )
    def set(self, lr, tensor, damping, maximize):
        self.set_options(0, lr=lr, tensor=tensor, damping=damping, maximize=maximize)

    @rule()
    def it_takes_no_second_group(self):
        for run in self.runs:
            with pytest.raises(ValueError, match="takes one parameter group"):
                run.opt.add_param_group({"params": [torch.ones(2, dtype=F64)]})

    @rule(seed=SEEDS)
    def put_something_into_grad(self, seed):
        rng = np.random.default_rng(seed)
        for i, entry in enumerate(self.entries):
            entry.grad = np.asarray(rng.standard_normal(entry.y.shape))
            for run in self.runs:
                run.params[i].grad = torch.from_numpy(entry.grad.copy())

    def closure(self, run, fault=None):
        """What the optimizer is given; with a `fault` that value at every call, or an error."""
        calls = []

        def closure():
            calls.append(1)
            loss, output = self.landscape.torch(torch.cat([p.reshape(-1) for p in run.params]))
            if fault == "nan":
                loss = loss * torch.nan
            elif fault is not None and len(calls) == fault:
                raise ZeroDivisionError
            return loss if self.curvature is Hessian else (loss, output)

        return closure

    def flat(self):
        return np.concatenate([entry.y.reshape(-1) for entry in self.entries])

    def free(self):
        """Which scalars are trained."""
        return np.concatenate([np.full(entry.y.size, not entry.frozen) for entry in self.entries])

    def put(self, z):
        at = 0
        for entry in self.entries:
            entry.y = z[at : at + entry.y.size].reshape(entry.y.shape)
            at += entry.y.size

    def objective(self, z):
        """What is minimised: value, gradient and matrix of the trained scalars, damping included."""
        value, gradient, matrix = self.landscape.numpy(z, self.curvature is GaussNewton)
        sign, free = (-1 if self.options[0]["maximize"] else 1), self.free()
        damping = self.options[0]["damping"] * np.eye(free.sum())
        return sign * value, sign * gradient[free], sign * matrix[free][:, free] + damping

    def trained(self):
        return any(not entry.frozen for entry in self.entries)

    def sane(self):
        """Uphill there is no end: not so far that numbers lose their meaning."""
        return self.trained() and np.abs(self.flat()).max(initial=0.0) < 12

    @rule(times=st.integers(1, 3))
    def steps(self, times):
        for _ in range(times):
            if self.sane():
                self.step()

    @rule(seed=SEEDS, times=st.integers(1, 3))
    def steps_from_elsewhere(self, seed, times):
        for k in range(len(self.entries)):
            self.write_into_a_parameter(k, seed + k)
        self.steps(times)

    @rule(maximize=st.booleans(), lr=LENGTHS, times=st.integers(1, 3))
    def steps_otherwise(self, maximize, lr, times):
        self.set_options(0, maximize=maximize, lr=lr)
        self.steps(times)

    def step(self):
        start, free, lr = self.flat(), self.free(), self.options[0]["lr"]
        value, gradient, matrix = self.objective(start)
        try:
            direction, status = conjugate_gradients(matrix, -gradient, self.many)
        except Unclear:
            return
        low, high = np.linalg.eigvalsh(matrix)[[0, -1]] if len(gradient) else (1.0, 1.0)
        convex = low > 0
        if self.many > 2 * len(gradient) and convex:
            direction = -np.linalg.solve(matrix, gradient)

        def moved(t):
            end = start.copy()
            end[free] += t * lr * direction
            return end

        lengths = armijo(
            self.search, lambda t: self.objective(moved(t))[0], value, lr * gradient @ direction
        )
        sign = -1 if self.options[0]["maximize"] else 1
        for run in self.runs:
            loss = run.opt.step(self.closure(run))
            assert loss.item() == pytest.approx(sign * value, rel=1e-13, abs=1e-13)
        state = self.runs[0].opt.state[self.runs[0].params[0]]
        t = min(lengths, key=lambda t: abs(lr * t - state["step_length"]))
        assert state["step_length"] == pytest.approx(lr * t, rel=1e-13)
        got = np.concatenate([p.detach().numpy().reshape(-1) for p in self.runs[0].params])
        scale = max(1.0, np.abs(start).max(initial=0.0), lr * np.abs(direction).max(initial=0.0))
        atol = 1e-12 * scale * min(max(1.0, abs(high / low)), 1e3)
        np.testing.assert_allclose(got, moved(t), rtol=0, atol=atol)
        end = self.objective(got)[0]
        assert end <= value + 30 * np.finfo(float).eps * abs(value)  # it never goes up
        if type(self.landscape) is Bowl and convex and self.many > 2 * len(gradient):
            self.check_minimiser(got, lr * t)

        known = [status] if convex or status is not Status.SUCCESS else [*Status]
        given_up = [Status.NO_DESCENT] if 0.0 in lengths else []
        self.last = given_up if lengths == [0.0] else [*known, *given_up]
        assert state["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-11, abs=1e-11)
        self.put(got)  # the next step starts where the library stands
        self.count, self.moved = self.count + 1, True

    def check_minimiser(self, got, length):
        """At length 1 and without damping the step ends where NumPy finds the gradient zero."""
        group, free = self.options[0], self.free()
        if length != 1 or group["damping"] or group["maximize"]:
            return
        A = self.landscape.root.T @ self.landscape.root
        rest = self.landscape.b - A[:, ~free] @ got[~free]
        expected = np.linalg.solve(A[free][:, free], rest[free])
        np.testing.assert_allclose(got[free], expected, rtol=0, atol=1e-11)

    @precondition(sane)
    @rule()
    def nan(self):
        for run in self.runs:
            assert run.opt.step(self.closure(run, "nan")).isnan()
            assert run.opt.state[run.params[0]]["step_length"] == 0.0
        self.count, self.moved, self.last = self.count + 1, True, [Status.NONFINITE]

    @precondition(sane)
    @rule(call=st.integers(1, 2))
    def a_closure_that_raises(self, call):
        for run in self.runs:
            with pytest.raises(ZeroDivisionError):
                run.opt.step(self.closure(run, call))

    @precondition(lambda self: not self.trained())
    @rule()
    def all_frozen(self):
        for run in self.runs:
            with pytest.raises(RuntimeError, match="all parameters are frozen"):
                run.opt.step(self.closure(run))

    def check_state(self, run):
        for p in run.params[1:]:
            assert p not in run.opt.state
        state = run.opt.state.get(run.params[0], {})
        assert state.get("n_iter", 0) == self.count
        assert run.opt.status is None if self.last is None else run.opt.status in self.last
        group = run.opt.param_groups[0]
        assert group["damping"] == self.options[0]["damping"]


TestNewtonCG = case(NewtonCGMachine)
