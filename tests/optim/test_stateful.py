"""Whatever a training script does to an optimizer, in any order, it stays with a NumPy model.

A machine of hypothesis plays the script. It holds some copies of one run (resumed from a file, deep
copied, unpickled), which must stay equal to the bit, and a model of the run that shares no code with
the library, which says where the parameters are.
"""

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch.optim import lr_scheduler

from implicit_optim import CG, Armijo, GaussNewton, Hessian, Status
from implicit_optim.optim import GD, NesterovAGD, NewtonCG

F64 = torch.float64
COPIES = 3  # runs that a machine holds at a time
SHAPES = st.lists(st.sampled_from([(), (1,), (0,), (3,), (2, 2), (0, 3)]), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32 - 1)
WHICH = st.integers(0, 11)  # of the parameters or the groups, modulo their number
LRS = st.one_of(st.just(0.0), st.floats(0.01, 0.2))
LENGTHS = st.sampled_from([1.0, 2.5, 0.7, 4.0, 0.0])  # lr of Newton's method
SEARCHES = [Armijo(), Armijo(2.0, 0.3, 0.3, 3), Armijo(1.0, 0.9, 0.5, 2)]  # the last gives up often
SELDOM = st.sampled_from([False, False, False, True])
SCHEDULES = {
    "step": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9),
}


def same(a, b):
    """Equal to the bit, with tensors of any kind inside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@dataclass
class Run:
    """What a training script holds."""

    params: list[torch.Tensor]
    opt: torch.optim.Optimizer
    schedule: Any = None

    def snapshot(self):
        """Everything that a copy must agree in."""
        state = self.opt.state_dict()
        for group in state["param_groups"]:
            group.pop("initial_lr", None)  # the scheduler's
            group.pop("differentiable", None)  # torch gives it to the defaults of every copy
        return {
            "params": [p.detach() for p in self.params],
            "grads": [p.grad for p in self.params],
            "trained": [p.requires_grad for p in self.params],
            "opt": state,
        }


class Entry:
    """The model of a parameter: its numbers, its gradient, and Nesterov's other point."""

    def __init__(self, numbers, single):
        self.y, self.x, self.grad, self.frozen = numbers, None, None, False
        self.single = single


class Machine(RuleBasedStateMachine):
    """What both kinds of optimizers go through; a subclass knows the rule and its model."""

    def __init__(self):
        super().__init__()
        self.runs, self.entries, self.options = [], [], []
        self.kind, self.ticks, self.moved = None, 0, False

    def begin(self, entries, options):
        """The first run: `options` of each group, `entries` of the parameters of each group."""
        self.options = options
        self.entries = entries
        self.runs = [self.fresh()]

    def fresh(self, **other):
        """A new run where the model stands, with all groups given to the constructor."""
        params = [self.tensor(entry) for entry in self.entries]
        groups = [
            {"params": [params[i] for i in group["members"]], **self.given(group), **other}
            for group in self.options
        ]
        return Run(params, self.construct(groups))

    def tensor(self, entry):
        dtype = torch.float32 if entry.single else F64
        return torch.from_numpy(np.array(entry.y)).to(dtype).requires_grad_()

    def given(self, group):
        """Options of a group as the optimizer is given them; each run has its own tensors."""
        names = ("momentum", "maximize", "foreach", "damping")
        return {"lr": self.lr(group), **{k: group[k] for k in names if k in group}}

    def lr(self, group):
        return torch.tensor(group["lr"], dtype=F64) if group["tensor"] else group["lr"]

    # -- what a script does ------------------------------------------------------------------------

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        for run in self.runs:
            run.opt.zero_grad(set_to_none=to_none)
        for entry in self.entries:
            if entry.grad is not None:
                entry.grad = None if to_none else np.zeros_like(entry.grad)

    @rule(which=WHICH, keep_grad=st.booleans())
    def freeze(self, which, keep_grad):
        entry = self.entries[which % len(self.entries)]
        entry.frozen = True
        entry.grad = entry.grad if keep_grad else None
        for run in self.runs:
            p = run.params[which % len(run.params)].requires_grad_(False)
            p.grad = p.grad if keep_grad else None

    @rule(which=WHICH)
    def thaw(self, which):
        self.entries[which % len(self.entries)].frozen = False
        for run in self.runs:
            run.params[which % len(run.params)].requires_grad_()

    @rule(which=WHICH, seed=SEEDS)
    def write_into_a_parameter(self, which, seed):
        entry = self.entries[which % len(self.entries)]
        entry.y = 2 * np.random.default_rng(seed).standard_normal(entry.y.shape)
        with torch.no_grad():
            for run in self.runs:
                p = run.params[which % len(run.params)]
                p.copy_(torch.from_numpy(np.array(entry.y)))
        entry.y = entry.y.astype(np.float32).astype(float) if entry.single else entry.y

    def set_options(self, which, **new):
        group = self.options[which % len(self.options)]
        group.update(new)
        for run in self.runs:
            target = run.opt.param_groups[which % len(self.options)]
            target.update(self.given(group))

    # -- schedules ---------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(sorted(SCHEDULES)))
    def new_schedule(self, kind):
        self.kind, self.ticks, self.moved = kind, 0, False
        for run in self.runs:
            run.schedule = SCHEDULES[kind](run.opt)

    @precondition(lambda self: self.kind is not None and self.moved)
    @rule()
    def schedule_step(self):
        self.ticks += 1
        for run in self.runs:
            run.schedule.step()
        for group in self.options:
            if self.kind == "exponential":
                group["lr"] *= 0.9
            elif self.ticks % 2 == 0:
                group["lr"] *= 0.5

    # -- copies: a schedule that never stepped looks for a step of the very optimizer it was given ---

    def add(self, run):
        self.runs = [*self.runs, run][-COPIES:]

    def can_copy(self):
        return self.kind is None or self.ticks > 0

    @precondition(can_copy)
    @rule()
    def resume_from_a_file(self):
        old = self.runs[-1]
        state = {
            "params": [p.detach() for p in old.params],
            "opt": old.opt.state_dict(),
            "schedule": old.schedule and old.schedule.state_dict(),
        }
        state = through_a_file(state)
        run = self.fresh(lr=0.77, maximize=not self.options[0]["maximize"])  # to be overwritten
        with torch.no_grad():
            for p, saved, before in zip(run.params, state["params"], old.params, strict=True):
                p.copy_(saved)
                p.grad = None if before.grad is None else before.grad.clone()
        for p, before in zip(run.params, old.params, strict=True):
            p.requires_grad_(before.requires_grad)
        if self.kind is not None:
            run.schedule = SCHEDULES[self.kind](run.opt)
            run.schedule.load_state_dict(state["schedule"])
        run.opt.load_state_dict(state["opt"])
        self.add(run)

    @precondition(can_copy)
    @rule()
    def deep_copy(self):
        self.add(copy.deepcopy(self.runs[-1]))

    @precondition(can_copy)
    @rule()
    def pickle_and_unpickle(self):
        old = self.runs[-1]
        run = Run(*pickle.loads(pickle.dumps((old.params, old.opt, old.schedule))))
        for p, before in zip(run.params, old.params, strict=True):
            p.grad = None if before.grad is None else before.grad.clone()  # not pickled by torch
        self.add(run)

    @precondition(lambda self: len(self.runs) > 1)
    @rule()
    def drop_the_oldest(self):
        del self.runs[0]

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def the_copies_are_equal_to_the_bit(self):
        if self.runs:
            first = self.runs[0].snapshot()
            for run in self.runs[1:]:
                assert same(run.snapshot(), first)
                assert not {id(p) for p in run.params} & {id(p) for p in self.runs[0].params}

    @invariant()
    def the_run_is_where_the_model_says(self):
        if not self.runs:
            return
        (run, *_) = self.runs
        for i, (p, entry) in enumerate(zip(run.params, self.entries, strict=True)):
            close(p, entry.y, entry.single, f"parameter {i}")
            assert (p.grad is None) == (entry.grad is None)
            if p.grad is not None:
                close(p.grad, entry.grad, entry.single, f"gradient {i}")
        assert len(run.opt.param_groups) == len(self.options)
        for ours, group in zip(run.opt.param_groups, self.options, strict=True):
            assert float(ours["lr"]) == pytest.approx(group["lr"], rel=1e-13)
            assert ours["maximize"] == group["maximize"]
        self.check_state(run)


def close(tensor, expected, single=False, what=""):
    tolerance = 10_000 * np.finfo(np.float32 if single else float).eps
    got = tensor.detach().numpy()
    assert got.shape == np.shape(expected)
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale, err_msg=what)


# -- gradient descent ------------------------------------------------------------------------------


def first_order_loss(params):
    """Smooth, convex, slopes bounded, coupled through the sum of all float64 parameters."""
    total = sum(p.sum() for p in params if p.dtype == F64)
    value = (1 + total**2).sqrt() / 4 if torch.is_tensor(total) else 0.0
    for k, p in enumerate(params):
        value = value + (1 + (p - k / 2) ** 2).sqrt().sum()
    return value


def first_order_model(entries):
    """Its value and its gradients, in NumPy."""
    total = sum(e.y.sum() for e in entries if not e.single)
    value = np.sqrt(1 + total**2) / 4 if any(not e.single for e in entries) else 0.0
    gradients = []
    for k, e in enumerate(entries):
        u = e.y - k / 2
        value = value + np.sqrt(1 + u**2).sum()
        coupling = 0.0 if e.single else total / np.sqrt(1 + total**2) / 4
        gradients.append(u / np.sqrt(1 + u**2) + coupling)
    return value, gradients


class FirstOrderMachine(Machine):
    """A rule that moves each parameter along its own gradient."""

    cls: Any = None

    def construct(self, groups):
        if self.named:
            for g, group in enumerate(groups):
                group["params"] = [(f"{g}.{i}", p) for i, p in enumerate(group["params"])]
        return self.cls(groups, lr=0.5)

    @initialize(shapes=SHAPES, seed=SEEDS, lr=LRS, named=st.booleans(), single=st.booleans())
    def start(self, shapes, seed, lr, named, single):
        self.named = named
        entries = self.draw_entries(shapes, seed, single)
        members = list(range(len(shapes)))
        self.begin(entries, [self.group(members, lr or 0.1, False, None, 0.9, False)])

    def draw_entries(self, shapes, seed, single):
        """Float64 parameters, or single and double ones by turns."""
        rng, entries = np.random.default_rng(seed), []
        for k, shape in enumerate(shapes):
            of_single = single and k % 2 == 0
            numbers = np.asarray(rng.standard_normal(shape))
            numbers = numbers.astype(np.float32).astype(float) if of_single else numbers
            entries.append(Entry(numbers, of_single))
        return entries

    def group(self, members, lr, tensor, foreach, momentum, maximize):
        group = {"members": members, "lr": lr, "tensor": tensor, "foreach": foreach}
        momentum = {"momentum": momentum} if self.cls is NesterovAGD else {}
        return {**group, **momentum, "maximize": maximize}

    @precondition(lambda self: len(self.options) < 4)
    @rule(
        shapes=SHAPES, seed=SEEDS, lr=LRS, tensor=st.booleans(), single=st.booleans(),
        foreach=st.sampled_from([True, False, None]), momentum=st.sampled_from([0.0, 0.5, 0.9]),
        maximize=SELDOM,
    )  # fmt: skip
    def add_param_group(self, shapes, seed, lr, tensor, single, foreach, momentum, maximize):
        first = len(self.entries)
        members = list(range(first, first + len(shapes)))
        group = self.group(members, lr or 0.1, tensor, foreach, momentum, maximize)
        self.options.append(group)
        self.entries += self.draw_entries(shapes, seed, single)
        for run in self.runs:
            params = [self.tensor(self.entries[i]) for i in members]
            run.params += params
            named = [(f"{len(self.options) - 1}.{i}", p) for i, p in enumerate(params)]
            run.opt.add_param_group(
                {"params": named if self.named else params, **self.given(group)}
            )

    @rule(which=WHICH, lr=LRS, tensor=st.booleans(), maximize=SELDOM)
    def set(self, which, lr, tensor, maximize):
        self.set_options(which, lr=lr, tensor=tensor, maximize=maximize)

    @rule()
    def a_bad_group_leaves_no_trace(self):
        params = [("bad", torch.ones(2))] if self.named else [torch.ones(2)]
        for run in self.runs:
            with pytest.raises(ValueError, match="Invalid lr: -1.0"):
                run.opt.add_param_group({"params": params, "lr": -1.0})

    def trained(self):
        return any(not entry.frozen for entry in self.entries)

    @precondition(trained)
    @rule()
    def backward(self):
        for run in self.runs:
            first_order_loss(run.params).backward()
        self.model_backward()

    def model_backward(self):
        for entry, gradient in zip(self.entries, first_order_model(self.entries)[1], strict=True):
            if not entry.frozen:
                entry.grad = gradient if entry.grad is None else entry.grad + gradient

    @rule()
    def step(self):
        for run in self.runs:
            assert run.opt.step() is None
        self.model_step()

    @precondition(trained)
    @rule(to_none=st.booleans(), times=st.integers(1, 4))
    def steps_with_a_closure(self, to_none, times):
        for _ in range(times):
            self.step_with_a_closure(to_none)

    @precondition(trained)
    @rule(which=WHICH, lr=LRS, times=st.integers(1, 4))
    def steps_at_another_lr(self, which, lr, times):
        self.set_options(which, lr=lr)
        self.steps_with_a_closure(True, times)

    def step_with_a_closure(self, to_none):
        value = first_order_model(self.entries)[0]
        self.zero_grad_of_the_model(to_none)
        self.model_backward()
        for run in self.runs:

            def closure(run=run):
                run.opt.zero_grad(set_to_none=to_none)
                loss = first_order_loss(run.params)
                loss.backward()
                return loss

            close(run.opt.step(closure), value, any(e.single for e in self.entries), "loss")
        self.model_step()

    def zero_grad_of_the_model(self, to_none):
        for entry in self.entries:
            if entry.grad is not None:
                entry.grad = None if to_none else np.zeros_like(entry.grad)

    @rule()
    def a_closure_that_raises(self):
        def closure():
            raise ZeroDivisionError

        for run in self.runs:
            with pytest.raises(ZeroDivisionError):
                run.opt.step(closure)

    def model_step(self):
        """`x' = y - lr grad`, `y' = x' + momentum (x' - x)`; without momentum `y' = x'`."""
        self.moved = True
        for group in self.options:
            for entry in (self.entries[i] for i in group["members"]):
                if entry.grad is None:
                    continue
                slope = -entry.grad if group["maximize"] else entry.grad
                last = entry.y if entry.x is None else entry.x
                entry.x = entry.y - group["lr"] * slope
                entry.y = entry.x + group.get("momentum", 0.0) * (entry.x - last)

    def check_state(self, run):
        for p, entry in zip(run.params, self.entries, strict=True):
            if self.cls is GD or entry.x is None:
                assert p not in run.opt.state
            else:
                assert run.opt.state[p].keys() == {"x"}
                close(run.opt.state[p]["x"], entry.x, entry.single, "x")


class GDMachine(FirstOrderMachine):
    cls = GD


class NesterovAGDMachine(FirstOrderMachine):
    cls = NesterovAGD

    @rule(which=WHICH, momentum=st.sampled_from([0.0, 0.3, 0.95]))
    def set_momentum(self, which, momentum):
        self.set_options(which, momentum=momentum)


# -- Newton-CG -------------------------------------------------------------------------------------


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
        given_up = [Status.LINE_SEARCH] if 0.0 in lengths else []
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


def case(machine):
    case = machine.TestCase
    case.settings = settings(stateful_step_count=40, max_examples=2 * settings().max_examples)
    return case


TestGD = case(GDMachine)
TestNesterovAGD = case(NesterovAGDMachine)
TestNewtonCG = case(NewtonCGMachine)
