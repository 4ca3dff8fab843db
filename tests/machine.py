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
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch.optim import lr_scheduler

F64 = torch.float64
COPIES = 3  # runs that a machine holds at a time
SHAPES = st.lists(st.sampled_from([(), (1,), (0,), (3,), (2, 2), (0, 3)]), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32 - 1)
WHICH = st.integers(0, 11)  # of the parameters or the groups, modulo their number
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


def case(machine):
    case = machine.TestCase
    case.settings = settings(stateful_step_count=40, max_examples=2 * settings().max_examples)
    return case
