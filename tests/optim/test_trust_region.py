"""TrustRegion: the steps of the rule, and what its state says."""

import pytest
import torch

from implicit_optim import GaussNewton, Hessian, Objective, Status, minimize, trust_region
from implicit_optim.optim import TrustRegion

F64 = torch.float64
X = torch.linspace(-1, 1, 12, dtype=F64).reshape(6, 2).sin()
Y = torch.arange(6) % 2


def predict(phi, x):
    return torch.tanh(x @ phi[:4].reshape(2, 2)) @ phi[4:].reshape(2, 2)


LOSS = torch.nn.functional.cross_entropy


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_equals_the_rule_step_by_step(curvature):
    torch.manual_seed(0)
    init = torch.randn(8, dtype=F64)
    a, b = (t.clone().requires_grad_() for t in init.split([3, 5]))  # cut anywhere
    settings = {"radius": 2.0, "max_radius": 3.0, "eta": 0.1, "cg_steps": 5, "curvature": curvature}
    opt = TrustRegion([a, b], **settings)

    def closure():
        output = predict(torch.cat([a, b]), X)
        loss = LOSS(output, Y)
        return (loss, output) if curvature is GaussNewton else loss

    for k in range(1, 9):
        opt.step(closure)
        rule = trust_region(**settings, max_steps=k)
        expected = minimize(Objective(predict, LOSS), init, (), X, Y, solver=rule)
        here = torch.cat([a, b]).detach()
        torch.testing.assert_close(here, expected.value, rtol=1e-9, atol=1e-11)
    assert opt.state[a]["n_iter"] == 8
    assert opt.state[a]["radius"] != 2.0


def test_the_state_tells_of_a_rejected_step():
    x = torch.zeros(1, dtype=F64, requires_grad=True)
    opt = TrustRegion([x], radius=6.0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return x.sin().sum()

    assert opt.status is None
    opt.step(closure)
    assert (x.item(), opt.status, calls) == (0.0, Status.SUCCESS, [True, False])
    state = opt.state[x]
    assert state.keys() == {"n_iter", "grad_norm", "step_length", "radius", "status"}
    assert (state["step_length"], state["grad_norm"]) == (0.0, 1.0)
    assert state["radius"] == pytest.approx(1.5)
    opt.step(closure)
    assert x.item() == pytest.approx(-1.5)
    assert state["step_length"] == pytest.approx(1.5)
    assert x.grad is None


def test_the_radius_is_in_the_state_dict():
    x = torch.zeros(1, dtype=F64, requires_grad=True)
    opt = TrustRegion([x], radius=6.0)
    opt.step(lambda: x.sin().sum())
    y = torch.zeros(1, dtype=F64, requires_grad=True)
    fresh = TrustRegion([y])
    fresh.load_state_dict(opt.state_dict())
    fresh.step(lambda: y.sin().sum())
    assert y.item() == pytest.approx(-1.5)


def test_rosenbrock():
    x = torch.tensor([-1.2, 1.0], dtype=F64, requires_grad=True)
    opt = TrustRegion([x])
    losses = [
        opt.step(lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2).item() for _ in range(40)
    ]
    assert (x - 1).abs().max() < 1e-8
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))


def test_a_collapsed_radius_and_a_loss_that_is_not_finite():
    x = torch.tensor([3.0], dtype=F64, requires_grad=True)
    opt = TrustRegion([x])
    for _ in range(40):  # the gradient has the wrong sign
        opt.step(lambda: 2 * x.detach().square().sum() - x.square().sum())
    assert (x.item(), opt.status) == (3.0, Status.NO_DESCENT)
    opt.step(lambda: x.sum() * torch.nan)
    assert (x.item(), opt.status) == (3.0, Status.NONFINITE)
    z = torch.zeros(1, dtype=F64, requires_grad=True)
    opt = TrustRegion([z])
    opt.step(lambda: z.abs().pow(1.5).sum() + z.sum())  # the Hessian is not finite
    assert (z.item(), opt.status, opt.state[z]["radius"]) == (0.0, Status.NONFINITE, 1.0)


def test_where_the_closure_raises_nothing_moved():
    x = torch.zeros(1, dtype=F64, requires_grad=True)
    opt = TrustRegion([x])

    def closure():
        if not torch.is_grad_enabled():
            raise KeyError("the second call")
        return x.sin().sum()

    with pytest.raises(KeyError):
        opt.step(closure)
    assert (x.item(), len(opt.state)) == (0.0, 0)
