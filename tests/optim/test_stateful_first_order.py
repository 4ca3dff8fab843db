"""GD and NesterovAGD stay with a model in NumPy, whatever a training script does (machine.py)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from implicit_optim.optim import GD, NesterovAGD
from machine import F64, SEEDS, SELDOM, SHAPES, WHICH, Entry, Machine, case, close

LRS = st.one_of(st.just(0.0), st.floats(0.01, 0.2))


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


TestGD = case(GDMachine)
TestNesterovAGD = case(NesterovAGDMachine)
