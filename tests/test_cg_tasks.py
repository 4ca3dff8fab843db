"""Conjugate gradients of a batch: each task is what it is alone, whatever its neighbours are."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import CG, Dense, Linearized, Status, linear_solve
from problems import solve, spd
from systems import F64, SEEDS, norm


def unblocked(matrix):
    """The matrix with a product that rounds alike for one task and for many."""
    return Linearized(lambda x: (matrix * x.unsqueeze(-2)).sum(-1), lambda r: r)


NEIGHBOURS = {
    "nan matrix": Status.NONFINITE,
    "inf matrix": Status.NONFINITE,
    "nan rhs": Status.NONFINITE,
    "inf rhs": Status.NONFINITE,
    "negative definite": Status.NEGATIVE_CURVATURE,
    "zero matrix": Status.NEGATIVE_CURVATURE,
    "identity": Status.SUCCESS,
    "zero rhs": Status.SUCCESS,
}


def make(kind, n):
    matrix, b = torch.eye(n, dtype=F64), torch.ones(n, dtype=F64)
    if kind.endswith("matrix"):
        value = {"nan": math.nan, "inf": math.inf, "zero": 0.0}[kind.split()[0]]
        matrix = torch.full_like(matrix, value)
    elif kind.endswith("rhs"):
        b[n // 2] = {"nan": math.nan, "inf": math.inf, "zero": 0.0}[kind.split()[0]]
        b = b if kind != "zero rhs" else torch.zeros_like(b)
    elif kind == "negative definite":
        matrix = -matrix
    return matrix, b


def same_numbers(batched, alone, place):
    """Bit for bit; the batch goes on for longer, so that its coefficients end in padding."""
    for name, expected in alone.items():
        got = batched[name][place]
        if name == "lanczos":
            steps = expected.shape[-2]
            assert got[..., steps:, 0].isnan().all()
            got = got[..., :steps, :]
        if not torch.equal(got.nan_to_num(), expected.nan_to_num()):
            return False
    return True


@given(
    st.integers(1, 10),
    SEEDS,
    st.lists(st.sampled_from(sorted(NEIGHBOURS)), min_size=1, max_size=4),
    st.sampled_from([CG(), CG(rtol=1e-9), CG(max_steps=5), CG(max_steps=2, rtol=1e-6)]),
    st.booleans(),
)
def test_a_task_does_not_notice_its_neighbours(n, seed, kinds, solver, front):
    own = spd(seed, n, 50.0)
    others = [make(kind, n) for kind in kinds]
    systems = [own, *others] if front else [*others, own]
    matrices, rhs = (torch.stack(part) for part in zip(*systems, strict=True))
    together = solver.solve(unblocked(matrices), rhs)
    alone = solver.solve(unblocked(own[0][None]), own[1][None])
    mine = slice(0, 1) if front else slice(-1, None)
    assert torch.equal(together.value[mine], alone.value)
    assert torch.equal(together.status[mine], alone.status)
    assert same_numbers(together.stats, alone.stats, mine)
    places = range(1, len(systems)) if front else range(len(others))
    for place, kind in zip(places, kinds, strict=True):
        value, b = together.value[place], rhs[place]
        assert together.status[place] == NEIGHBOURS[kind]
        if NEIGHBOURS[kind] == Status.NONFINITE:
            assert torch.all(torch.isnan(value))
        else:  # b solves the identity; for the others it is the first-order direction
            assert torch.equal(value, b)


@given(st.integers(1, 8), SEEDS, st.sampled_from([(3,), (2, 3), (2, 1, 2)]))
def test_a_batch_is_its_tasks(n, seed, batch):
    matrix, b = spd(seed, n, 10.0, batch)
    kappas = torch.logspace(0, 3, math.prod(batch), dtype=F64).reshape(*batch, 1, 1)
    matrix = matrix + torch.eye(n, dtype=F64) / kappas
    solution = CG(rtol=1e-8).solve(unblocked(matrix), b)
    exact = solve(matrix.numpy(), b.numpy())
    assert np.all(norm(solution.value.numpy() - exact) <= 1e-6 * norm(exact))
    for index in np.ndindex(*batch):
        alone = CG(rtol=1e-8).solve(unblocked(matrix[index][None]), b[index][None])
        assert torch.equal(solution.value[index], alone.value[0])
        assert torch.equal(solution.status[index], alone.status[0])
        first = {name: number[0] for name, number in alone.stats.items()}
        assert same_numbers(solution.stats, first, index)


def test_easy_tasks_stop_while_hard_ones_go_on():
    matrix = torch.stack([torch.eye(12, dtype=F64), spd(0, 12, 1e4)[0]])
    b = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 12)))
    _, status, stats = linear_solve(Dense(matrix), b, CG(rtol=1e-10))
    assert status.tolist() == [0, 0]
    assert stats["steps"][0] == 1
    assert stats["steps"][1] >= 12


@pytest.mark.parametrize("solver", [CG(rtol=1e-9), CG(max_steps=4)])
def test_under_vmap(solver):
    matrix, b = spd(0, 6, 30.0, (2, 3))
    matrix[0, 1] = -torch.eye(6, dtype=F64)
    matrix[1, 2] = math.nan
    expected = solver.solve(Dense(matrix).linearize(), b)

    def one(matrix, b):
        return solver.solve(Dense(matrix).linearize(), b)

    for got in (
        torch.func.vmap(one)(matrix, b),
        torch.func.vmap(torch.func.vmap(one))(matrix, b),
    ):
        assert torch.allclose(got.value, expected.value, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert torch.equal(got.status, expected.status)
        assert torch.equal(got.stats["steps"], expected.stats["steps"])
