"""What a user is told: Ritz values against dense eigenvalues, the report, the policies."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import implicit_optim as iopt
from problems import spd

F64 = torch.float64


def dense(matrix, b, cg):
    return iopt.linear_solve(iopt.Dense(matrix), b, cg)


# -- Ritz values -----------------------------------------------------------------------------------


@given(
    st.integers(1, 9), st.integers(0, 999), st.integers(1, 9), st.sampled_from([(), (3,), (2, 2)])
)
def test_ritz_values_are_those_of_the_krylov_space(n, seed, steps, batch):
    """By NumPy: the extreme eigenvalues of `Q^T A Q`, Q an orthonormal basis of the Krylov space."""
    matrix, b = spd(seed, n, 20.0, batch)
    steps = min(steps, n)
    smallest, largest = dense(matrix, b, iopt.CG(max_steps=steps)).ritz_values()
    for index in np.ndindex(*batch):
        A, v = matrix[index].numpy(), b[index].numpy()
        basis = np.zeros((n, 0))
        for _ in range(steps):
            v = v - basis @ (basis.T @ v)
            v = v - basis @ (basis.T @ v)
            basis = np.column_stack([basis, v / np.linalg.norm(v)])
            v = A @ basis[:, -1]
        expected = np.linalg.eigvalsh(basis.T @ A @ basis)
        np.testing.assert_allclose(smallest[index], expected[0], rtol=1e-6)
        np.testing.assert_allclose(largest[index], expected[-1], rtol=1e-6)


@pytest.mark.parametrize("lam", [0.01, 1.0, 300.0])
def test_ritz_values_are_in_the_units_of_the_matrix_whatever_lam_preconditions(lam):
    matrix, b = spd(0, 6, 50.0)
    operator = iopt.Damped(iopt.Dense(matrix), lam)
    smallest, largest = iopt.linear_solve(operator, b, iopt.CG(rtol=1e-13)).ritz_values()
    expected = torch.linalg.eigvalsh(matrix) + lam
    torch.testing.assert_close(
        torch.stack([smallest, largest]), expected[[0, -1]], rtol=1e-4, atol=0
    )


def test_a_negative_ritz_value_shows_negative_curvature():
    """Two steps see all of a 2 x 2 matrix: the second direction is the one that stops CG."""
    matrix = torch.tensor([[3.0, 0.0], [0.0, -1.0]], dtype=F64)
    solution = dense(matrix, torch.tensor([2.0, 1.0], dtype=F64), iopt.CG(max_steps=5))
    assert solution.status == iopt.Status.NEGATIVE_CURVATURE and solution.stats["steps"] == 1
    smallest, largest = solution.ritz_values()
    assert math.isclose(smallest, -1, rel_tol=1e-12) and math.isclose(largest, 3, rel_tol=1e-12)


def test_ritz_values_of_tasks_that_stop_at_different_steps():
    """An isotropic matrix is done in one step; a zero right-hand side takes none."""
    hard, b = spd(3, 5, 100.0)
    matrix = torch.stack([hard, 2 * torch.eye(5, dtype=F64), hard])
    rhs = torch.stack([b, b, torch.zeros(5, dtype=F64)])
    smallest, largest = dense(matrix, rhs, iopt.CG(rtol=1e-12)).ritz_values()
    expected = torch.linalg.eigvalsh(hard)
    assert torch.allclose(smallest[0], expected[0]) and torch.allclose(largest[0], expected[-1])
    assert smallest[1] == largest[1] == 2
    assert smallest[2].isnan() and largest[2].isnan()


def test_ritz_values_where_there_are_none():
    nothing = dense(torch.eye(2), torch.ones(2), iopt.CG(max_steps=0))
    assert all(value.isnan() for value in nothing.ritz_values())
    with pytest.raises(ValueError, match="only a solution of linear_solve with CG"):
        iopt.Solution(None, torch.tensor(0), {}).ritz_values()


# -- MetaLearner.report ----------------------------------------------------------------------------


def regression(tasks=4):
    torch.manual_seed(1)
    return torch.randn(tasks, 6, 3, dtype=F64), torch.randn(tasks, 6, 1, dtype=F64)


def learner(**settings):
    model = nn.Linear(3, 1, bias=False, dtype=F64)
    return iopt.MetaLearner(model, F.mse_loss, lam=2.0, **settings)


def test_report_has_the_numbers_of_ridge_regression():
    batch = regression()
    meta = learner(
        solver=iopt.gd(lr=0.1, max_steps=7), meta_gradient=iopt.Implicit(iopt.CG(max_steps=3))
    )
    assert str(meta.report()) == "No solve so far."
    meta(batch, batch).sum().backward()
    numbers = meta.report().numbers()

    x, y = batch
    A = 2 * x.mT @ x / 6 + 2 * torch.eye(3, dtype=F64)
    anchor = meta.model.weight.detach()[0].expand(4, 3).unsqueeze(-1)
    offset = 2 * x.mT @ y / 6 + 2 * anchor
    gradients, phi = [], anchor
    for _ in range(8):
        gradients.append((A @ phi - offset).norm(dim=(1, 2)))
        phi = phi - 0.1 * (A @ phi - offset)
    eigenvalues = torch.linalg.eigvalsh(A)
    expected = {
        "minimize/success": 1.0,
        "minimize/steps": 7.0,
        "minimize/reduction": (gradients[6] / gradients[0]).median(),
        "linear_solve/success": 1.0,
        "linear_solve/steps": 3.0,
        "linear_solve/stationarity": gradients[7].median(),
        "linear_solve/smallest": eigenvalues[:, 0].min(),
        "linear_solve/largest": eigenvalues[:, -1].max(),
        "linear_solve/condition": (eigenvalues[:, -1] / eigenvalues[:, 0]).median(),
    }
    for name, value in expected.items():
        # the median of four numbers is torch's lower one, in both
        assert math.isclose(numbers[name], float(value), rel_tol=1e-6), name
    assert numbers["linear_solve/residual"] < 1e-10
    assert "4 of 4 success" in str(meta.report())


def test_report_says_what_to_change():
    batch = regression()

    def advice(**settings):
        meta = learner(on_solve=iopt.Ignore(), **settings)
        meta(batch, batch).sum().backward()
        return meta.report().advice()

    exact = iopt.newton_cg(linear_solver=iopt.CG(rtol=1e-10), max_steps=2)
    assert advice(solver=exact) == "Nothing to change."
    assert "more inner steps" in advice(solver=iopt.gd(lr=1e-3, max_steps=2))
    assert "more CG steps" in advice(
        solver=exact, meta_gradient=iopt.Implicit(iopt.CG(max_steps=1))
    )
    short = iopt.Implicit(iopt.CG(max_steps=1, rtol=1e-9))
    assert "linear_solve: the tolerance was not met" in advice(solver=exact, meta_gradient=short)
    assert "lower the inner lr" in advice(solver=iopt.gd(lr=1e200, max_steps=9))


def saddle(**settings):
    """One parameter per task whose data term curves down by 6, against lam = 2."""
    model = nn.Linear(1, 1, bias=False, dtype=F64)
    nn.init.constant_(model.weight, 0.1)
    meta = iopt.MetaLearner(
        model, lambda z, y: (-3 * z.square() + y).mean(), lam=2.0,
        solver=iopt.gd(lr=0.01, max_steps=1), **settings,
    )  # fmt: skip
    batch = torch.ones(3, 2, 1, dtype=F64), torch.zeros(3, 2, 1, dtype=F64)
    return meta, batch


def test_report_of_a_saddle():
    meta, batch = saddle(on_solve=iopt.Ignore())
    meta(batch, batch).sum().backward()
    numbers = meta.report().numbers()
    assert numbers["linear_solve/negative_curvature"] == 1
    assert math.isclose(numbers["linear_solve/smallest"], -4, rel_tol=1e-9)
    assert numbers["linear_solve/condition"] == math.inf
    assert "GaussNewton" in meta.report().advice() and "smaller lam" in meta.report().advice()
    assert "3 negative_curvature" in str(meta.report())


def test_a_task_without_a_solve_does_not_hide_the_eigenvalues_of_the_others():
    """The second right-hand side is zero: no step, no Ritz value, and no infinite condition number."""
    matrix = torch.diag(torch.tensor([1.0, 4.0], dtype=F64)).expand(3, 2, 2)
    b = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 2.0]], dtype=F64)
    numbers = iopt.Report({"linear_solve": dense(matrix, b, iopt.CG(rtol=1e-12))}).numbers()
    expected = {"smallest": 1.0, "largest": 4.0, "condition": 4.0}
    for name, value in expected.items():
        assert math.isclose(numbers[f"linear_solve/{name}"], value, rel_tol=1e-9)
    nothing = iopt.Report({"linear_solve": dense(matrix, 0 * b, iopt.CG(max_steps=0))}).numbers()
    assert all(math.isnan(nothing[f"linear_solve/{name}"]) for name in expected)


def test_report_is_of_the_last_call_and_keeps_no_graph_and_no_values():
    meta, batch = saddle(on_solve=iopt.Ignore())
    for x in (batch, tuple(t[:2] for t in batch)):
        meta(x, x).sum().backward()
    for solution in meta.report().solves.values():
        assert solution.value is None and solution.status.shape == (2,)
        assert not any(t.requires_grad for t in solution.stats.values())


def test_report_under_torch_func_grad():
    """What a transform wraps is unwrapped, so that the report outlives it."""
    batch = regression()
    meta = learner(solver=iopt.gd(lr=0.1, max_steps=3))
    parameters = {k: p.detach() for k, p in meta.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(meta, parameters, (batch, batch)).sum()

    torch.func.grad(loss)(parameters)
    assert meta.report().numbers()["minimize/steps"] == 3
    assert meta.report().numbers()["linear_solve/success"] == 1


# -- policies --------------------------------------------------------------------------------------


def test_the_default_warns_once():
    meta, batch = saddle()
    with pytest.warns(
        iopt.SolveWarning, match="linear_solve: 0 of 3 success, 3 negative_curvature"
    ) as told:
        for _ in range(9):
            meta(batch, batch).sum().backward()
    assert len(told) == 1


def test_warn_looks_at_the_powers_of_two_and_lets_a_share_fail():
    one_of_ten = iopt.Solution(None, torch.tensor([1, *[0] * 9]), {})
    two_of_ten = iopt.Solution(None, torch.tensor([1, 1, *[0] * 8]), {})
    policy = iopt.Warn(share=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            policy("minimize", one_of_ten)
        for _ in range(7):  # the solves 9 to 15 are not looked at
            policy("minimize", two_of_ten)
    with pytest.warns(iopt.SolveWarning, match="minimize: 8 of 10 success, 2 max_steps"):
        policy("minimize", two_of_ten)


def test_raise_stops_forward_and_backward():
    meta, batch = saddle(on_solve=iopt.Raise())
    losses = meta(batch, batch)
    with pytest.raises(iopt.SolveError, match="linear_solve: 0 of 3 success, .*GaussNewton"):
        losses.sum().backward()
    batch[0][1, 0] = math.nan
    with pytest.raises(iopt.SolveError, match="minimize: 2 of 3 success, 1 nonfinite"):
        meta(batch, batch)
    iopt.Raise(share=1 / 3)("minimize", iopt.Solution(None, torch.tensor([0, 0, 1]), {}))


def test_policies_say_nothing_where_numbers_are_hidden():
    """On the meta device and under vmap there is no status to look at."""
    failed = torch.ones(2, dtype=torch.int8)
    for policy in (iopt.Raise(), iopt.Warn()):
        policy("minimize", iopt.Solution(None, failed.to("meta"), {}))

        def told(status, policy=policy):
            policy("minimize", iopt.Solution(None, status, {}))
            return status

        torch.func.vmap(told)(failed)


def test_a_logger_of_ones_own_hears_everything():
    heard = []
    meta, batch = saddle(on_solve=lambda name, solution: heard.append((name, solution.value.shape)))
    meta(batch, batch).sum().backward()
    assert heard == [("minimize", (3, 1)), ("linear_solve", (3, 1))]


# -- solvers that take no steps, statuses that no iteration gives ---------------------------------


def meta_learner(linear_solver):
    torch.manual_seed(0)
    return iopt.MetaLearner(
        nn.Linear(2, 1).double(),
        F.mse_loss,
        solver=iopt.gd(lr=0.2, max_steps=60),
        meta_gradient=iopt.Implicit(linear_solver, curvature=iopt.GaussNewton),
    )


@pytest.mark.parametrize("solver", [iopt.Cholesky(), iopt.QR(), iopt.Auto(), iopt.Woodbury()])
def test_a_factorisation_is_reported_and_bounded_without_steps(solver):
    heard = {}
    meta = meta_learner(solver)
    meta.on_solve = heard.__setitem__
    batch = torch.randn(3, 5, 2, dtype=F64), torch.randn(3, 5, 1, dtype=F64)
    meta(batch, batch).mean().backward()
    text, numbers = str(meta.report()), meta.report().numbers()
    assert "linear_solve   3 of 3 success\n               residual " in text
    assert "linear_solve/steps" not in numbers and numbers["linear_solve/residual"] < 1e-14
    constants = {"lam": 1.0, "smoothness": 2.0, "strong_convexity": 1.0}
    bound = iopt.error_bound(heard["linear_solve"], **constants)
    residual, stationarity = (
        heard["linear_solve"].stats[k] for k in ("residual_norm", "stationarity")
    )
    torch.testing.assert_close(bound, residual + 2.0 * stationarity)


@pytest.mark.parametrize("status", set(iopt.Status) - {iopt.Status.SUCCESS})
def test_every_failure_has_an_advice(status):
    numbers = {"steps": torch.ones(4), "residual_norm": torch.zeros(4), "rhs_norm": torch.ones(4)}
    failed = torch.full((4,), status, dtype=torch.int8)
    report = iopt.Report({"linear_solve": iopt.Solution(None, failed, numbers)})
    assert report.advice() == f"linear_solve: {status.message}."
