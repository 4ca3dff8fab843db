"""What conjugate gradients say, cost and refuse: status, tolerances, products, settings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_optim import CG, Dense, Status, linear_solve
from implicit_optim._vectors import masks
from problems import spd
from systems import BATCH, F64, SEEDS, SIZES, counted, norm, product

# -- an honest status ------------------------------------------------------------------------------


@given(SIZES, SEEDS, st.floats(0, 3), st.integers(1, 30), st.floats(-10, -1), BATCH)
def test_the_status_is_what_the_true_residual_says(n, seed, log_kappa, steps, log_rtol, batch):
    rtol = 10**log_rtol
    matrix, b = spd(seed, n, 10**log_kappa, batch)
    x, status, stats = linear_solve(Dense(matrix), b, CG(max_steps=steps, rtol=rtol))
    true = norm(b.numpy() - product(matrix.numpy(), x.numpy()))
    size = norm(b.numpy())
    assert np.allclose(stats["residual_norm"].numpy(), true, rtol=1e-6, atol=1e-12 * size.max())
    assert np.allclose(stats["rhs_norm"].numpy(), size, rtol=1e-14)
    slack = 1e-12 * size
    for code, residual, target in np.nditer([status.numpy(), true, rtol * size]):
        if code == Status.SUCCESS:
            assert residual <= target + slack.max()
        else:
            assert code == Status.MAX_STEPS
            assert residual >= target - slack.max()
    at_most = stats["steps"].numpy() == steps
    assert np.all((status.numpy() == Status.SUCCESS) | at_most)


@given(SIZES, SEEDS, st.floats(-8, 0))
def test_absolute_tolerance(n, seed, log_atol):
    atol = 10**log_atol
    matrix, b = spd(seed, n, 10.0, (3,))
    b = b * torch.tensor([[1e-3], [1.0], [1e3]], dtype=F64)
    x, status, stats = linear_solve(Dense(matrix), b, CG(atol=atol, rtol=0.0))
    assert status.tolist() == [0, 0, 0]
    true = norm(b.numpy() - product(matrix.numpy(), x.numpy()))
    assert np.all(true <= atol * (1 + 1e-6) + 1e-12 * norm(b.numpy()))
    small = norm(b.numpy()) <= atol
    assert np.array_equal(stats["steps"].numpy() == 0, small)
    assert torch.equal(x[small], torch.zeros_like(x[small]))


def test_the_looser_of_the_tolerances_counts():
    matrix, b = spd(0, 20, 1e3)
    steps = {
        settings: linear_solve(Dense(matrix), b, CG(rtol=settings[0], atol=settings[1])).stats[
            "steps"
        ]
        for settings in [(1e-10, 0.0), (1e-2, 0.0), (1e-10, 0.3), (1e-2, 1e-8)]
    }
    assert steps[1e-2, 0.0] == steps[1e-2, 1e-8] < steps[1e-10, 0.0]
    assert steps[1e-10, 0.3] < steps[1e-10, 0.0]


@given(SEEDS, st.sampled_from([1e-2, 1e-3, 1e-6]), st.sampled_from([1e4, 1e6, 1e8]))
def test_single_precision_does_not_claim_what_it_cannot_do(seed, rtol, kappa):
    """The recurrence meets a tolerance that `b - A x` misses by a factor of hundreds."""
    matrix, b = spd(seed, 20, kappa, (4,), torch.float32)
    x, status, _ = linear_solve(Dense(matrix), b, CG(rtol=rtol))
    A, x, b = (t.double().numpy() for t in (matrix, x, b))
    meets = norm(b - product(A, x)) <= 2 * rtol * norm(b)
    claims = status.numpy() == Status.SUCCESS
    assert np.all(meets | ~claims)
    assert np.all(np.isfinite(x))


def test_kappa_1e8_in_single_precision_is_not_success():
    matrix, b = spd(0, 30, 1e8, dtype=torch.float32)
    assert linear_solve(Dense(matrix), b, CG(rtol=1e-6)).status == Status.MAX_STEPS


def test_a_fixed_number_of_steps_that_was_asked_for_is_success():
    matrix, b = spd(0, 30, 1e3)
    _, status, stats = linear_solve(Dense(matrix), b, CG(max_steps=4))
    assert status == Status.SUCCESS
    assert stats["steps"] == 4
    assert stats["residual_norm"] > 1e-3 * stats["rhs_norm"]


# -- settings, cost, devices -----------------------------------------------------------------------


def test_defaults():
    """`min(10 n, 1000)` steps to a relative residual of 1e-6."""
    loose, b = spd(0, 40, 100.0)
    _, status, stats = linear_solve(Dense(loose), b)
    assert status == Status.SUCCESS
    assert 1e-9 < stats["residual_norm"] / stats["rhs_norm"] <= 1e-6


@pytest.mark.parametrize(("n", "most"), [(3, 30), (150, 1000)])
def test_default_max_steps(n, most):
    matrix, b = spd(0, n)
    operator, calls = counted(matrix)
    CG(check_every=10_000).solve(operator, b)  # never looks whether it is done
    assert len(calls) in (most, most + 1)  # one may confirm the residual


@pytest.mark.parametrize("check_every", [1, 3, 7])
def test_check_every_changes_the_cost_and_not_the_result(check_every):
    matrix, b = spd(0, 20, 100.0, (3,))
    reference, calls = counted(matrix)
    expected = CG(rtol=1e-6).solve(reference, b)
    most = int(expected.stats["steps"].max())
    confirming = len(calls) - most
    assert confirming in (0, 1)
    operator, calls = counted(matrix)
    got = CG(rtol=1e-6, check_every=check_every).solve(operator, b)
    assert torch.equal(got.value, expected.value)
    assert torch.equal(got.stats["steps"], expected.stats["steps"])
    assert len(calls) - confirming == math.ceil(most / check_every) * check_every


@pytest.mark.parametrize("max_steps", [0, 1, 5])
def test_fixed_steps_cost_one_product_each(max_steps):
    matrix, b = spd(0, 8)
    operator, calls = counted(matrix)
    CG(max_steps=max_steps).solve(operator, b)
    assert len(calls) == max_steps


def test_fixed_steps_never_ask_the_device(monkeypatch):
    """A tensor read by Python is a synchronisation, which is dear on all devices but the CPU."""
    matrix, b = spd(0, 6, 10.0, (3,))
    monkeypatch.setattr(masks, "is_free_to_read", lambda mask: False)

    def refuse(*args):
        raise AssertionError("a host synchronisation")

    for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    solution = linear_solve(Dense(matrix), b, CG(max_steps=4))
    with pytest.raises(AssertionError, match="a host synchronisation"):
        linear_solve(Dense(matrix), b, CG(rtol=1e-3))
    monkeypatch.undo()
    assert solution.status.tolist() == [0, 0, 0]


@pytest.mark.parametrize("solver", [CG(max_steps=3), CG(max_steps=3, rtol=1e-3), CG(max_steps=0)])
def test_on_the_meta_device(solver):
    matrix = torch.empty(2, 5, 5, device="meta")
    x, status, stats = linear_solve(Dense(matrix), torch.empty(2, 5, device="meta"), solver)
    assert (x.shape, x.device.type) == ((2, 5), "meta")
    assert (status.shape, status.dtype) == ((2,), torch.int8)
    assert stats["steps"].dtype == torch.int32


def test_leaves_its_inputs_alone_and_keeps_no_graph():
    matrix, b = spd(0, 5)
    copies = matrix.clone(), b.clone()
    b.requires_grad_()
    x = CG(max_steps=3).solve(Dense(matrix).linearize(), b).value
    assert not x.requires_grad
    assert torch.equal(matrix, copies[0])
    assert torch.equal(b, copies[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "Invalid max_steps: -1: it must be >= 0"),
        ({"rtol": -1e-9}, "Invalid rtol: -1e-09: it must lie in"),
        ({"rtol": 1.0}, "Invalid rtol: 1.0"),
        ({"rtol": math.nan}, "Invalid rtol: nan"),
        ({"atol": -1.0}, "Invalid atol: -1.0"),
        ({"atol": math.inf}, "Invalid atol: inf: it must be finite"),
        ({"atol": math.nan}, "Invalid atol: nan"),
        ({"check_every": 0}, "Invalid check_every: 0: it must be >= 1"),
        ({"min_curvature": -0.1}, r"Invalid min_curvature: -0.1: it must lie in \[0, 1\)"),
        ({"min_curvature": 1.0}, "Invalid min_curvature: 1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        CG(**settings)
