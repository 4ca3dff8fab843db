"""attach where something is wrong: negative curvature, NaN, arguments."""

import pytest
import torch
import torch.nn.functional as F

import implicit_optim as iopt
from attached import logistic, logistic_inputs, solved

pytestmark = pytest.mark.usefixtures("double")

# -- negative curvature, NaN --------------------------------------------------------------------------


def test_negative_curvature_of_one_task_spares_the_others_and_gives_no_nan():
    eigenvalues = torch.tensor([[1.0, 2.0, 3.0], [-9.0, -9.0, -9.0], [30.0, 2.0, -4.0]])
    lam, anchor = torch.tensor(2.0), torch.zeros(3, requires_grad=True)
    objective = iopt.Objective(lambda phi, e: e * phi**2 / 2, lambda z, _: z.sum(), iopt.proximal)
    data = (eigenvalues, torch.zeros(3))
    heard = []
    phi = iopt.attach(
        torch.zeros(3, 3), objective, (anchor, lam), *data,
        linear_solver=iopt.CG(max_steps=5), batch_ndim=1, on_solve=lambda _, s: heard.append(s),
    )  # fmt: skip
    v = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 0.1, 1.0]])
    gradients = [torch.autograd.grad(phi[i] @ v[i], anchor, retain_graph=True)[0] for i in range(3)]
    torch.testing.assert_close(gradients[0], 2 * v[0] / (2 + eigenvalues[0]))
    torch.testing.assert_close(gradients[1], v[1])  # stopped at once: first order, never zero
    # A numpy-free account of task 2: step 1 is steepest descent, step 2 meets p.Ap < 0.
    a = eigenvalues[2] + 2
    step = (v[2] @ v[2]) / (v[2] @ (a * v[2]))
    torch.testing.assert_close(gradients[2], 2 * step * v[2])
    assert heard[0].status.tolist() == [0, 0, 0]  # its own right-hand side was zero elsewhere
    assert heard[1].status.tolist() == [0, 2, 0]
    assert heard[2].status.tolist() == [0, 0, 2]
    assert "GaussNewton" in heard[2].summary()


def test_nan_in_one_task_is_flagged_and_the_others_are_right():
    theta, lam, x, y = logistic_inputs((3,))
    x = x.detach().clone()
    objective = iopt.Objective(
        lambda phi, x: x @ phi, lambda z, y: F.softplus(-y * z).mean(), iopt.proximal
    )
    clean = solved(theta, lam, x[:2], y[:2], objective, batch_ndim=1)
    (expected,) = torch.autograd.grad(clean.sum(), theta)
    x[2, 0, 0] = torch.nan
    heard = []
    phi = solved(theta, lam, x, y, objective, batch_ndim=1, on_solve=lambda _, s: heard.append(s))
    (g,) = torch.autograd.grad(phi[:2].sum(), theta, retain_graph=True)
    torch.testing.assert_close(phi[:2], clean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)
    (g,) = torch.autograd.grad(phi[2].sum(), theta)
    assert torch.isnan(g).all() and heard[-1].status.tolist() == [0, 0, 4]


# -- errors -------------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_the_remedy():
    theta, lam, x, y = logistic_inputs((3,))
    phi = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"data\[1\] has shape .* must lead with phi's batch"):
        iopt.attach(phi, logistic, (theta, lam), x, y[:2], batch_ndim=1)
    with pytest.raises(TypeError, match=r"GaussNewton needs the structure .* Objective\(predict"):
        iopt.attach(phi, logistic, (theta, lam), x, y, batch_ndim=1, curvature=iopt.GaussNewton)
    with pytest.raises(TypeError, match="phi must be a floating-point tensor, got torch.int64"):
        iopt.attach(phi.long(), logistic, (theta, lam), x, y, batch_ndim=1)
    with pytest.raises(TypeError, match="objective must be callable"):
        iopt.attach(phi, "loss", (theta, lam), x, y, batch_ndim=1)
    with pytest.raises(ValueError, match="are empty: give at least one task"):
        iopt.attach(phi[:0], logistic, (theta, lam), x[:0], y[:0], batch_ndim=1)
    with pytest.raises(ValueError, match="one scalar per task, .* set batch_ndim"):
        iopt.minimize(lambda p, t: p, phi, theta, solver=iopt.gd(lr=0.1))
    with pytest.raises(TypeError, match="solver must be gd"):
        iopt.minimize(logistic, phi[0], (theta, lam), x[0], y[0], solver="gd")
    with pytest.raises(ValueError, match="is on meta but phi is on cpu"):
        iopt.attach(phi, logistic, (theta, lam), x, y.to("meta"), batch_ndim=1)


def test_lam_of_another_dtype():
    """A vector or matrix that would fail deep inside CG is refused; a scalar promotes."""
    anchor, phi = torch.ones(3, dtype=torch.float32), torch.zeros(3, dtype=torch.float32)
    for lam in (torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match="lam has dtype torch.float64 but the anchor has torch.float32"
        ):
            iopt.proximal(phi, (anchor, lam))
    scalar = torch.tensor(2.0, dtype=torch.float64)
    assert iopt.proximal(phi, (anchor, scalar)).item() == 3


def test_torchs_older_vmap_with_a_tolerance():
    """`is_grads_batched` uses it: nobody may look whether all tasks are done."""
    theta = torch.ones(2, requires_grad=True)
    phi = iopt.attach(
        theta.detach() * 2 / 3, lambda p, t: p @ p / 2 + (p - t) @ (p - t), theta,
        linear_solver=iopt.CG(rtol=1e-6),
    )  # fmt: skip
    (jacobian,) = torch.autograd.grad(phi, theta, torch.eye(2), is_grads_batched=True)
    torch.testing.assert_close(jacobian, torch.eye(2) * 2 / 3)
