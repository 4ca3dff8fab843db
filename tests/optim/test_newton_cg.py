"""NewtonCG against closed forms and NumPy: directions, curvature, step lengths."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from implicit_optim import CG, Armijo, FixedStep, GaussNewton, Hessian, Status, minimize, newton_cg
from implicit_optim.optim import NewtonCG

F64 = torch.float64


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


@given(seed=st.integers(0, 999), n=st.integers(1, 12))
def test_one_step_solves_a_quadratic(seed, n):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, n))
    A, b = root @ root.T + np.eye(n), rng.standard_normal(n)
    At, bt = torch.tensor(A), torch.tensor(b)
    x = torch.tensor(rng.standard_normal(n), requires_grad=True)
    opt = NewtonCG([x], linear_solver=CG(max_steps=4 * n, rtol=1e-15))
    opt.step(lambda: x @ At @ x / 2 - bt @ x)
    np.testing.assert_allclose(x.detach().numpy(), np.linalg.solve(A, b), rtol=0, atol=1e-10)
    assert opt.state[x]["step_length"] == 1.0


def test_equals_damped_newton_in_numpy_on_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    y = (x @ [2.0, -1.0, 0.5] + rng.standard_normal(40) > 0.3).astype(float)
    inputs, decay = np.c_[x, np.ones(40)], 0.1

    def value(w):
        z = inputs @ w
        return np.mean(np.logaddexp(0, z) - y * z) + decay / 2 * w @ w

    weight, bias = torch.full((1, 3), 3.0, dtype=F64), torch.full((1,), -4.0, dtype=F64)
    params = [weight.requires_grad_(), bias.requires_grad_()]
    xt, yt = torch.tensor(x), torch.tensor(y)

    def closure():
        z = F.linear(xt, *params)[:, 0]
        squares = sum(p.square().sum() for p in params)
        return F.binary_cross_entropy_with_logits(z, yt) + decay / 2 * squares

    opt = NewtonCG(params, lr=2.0, linear_solver=CG(max_steps=20, rtol=1e-14))
    w, lengths = np.array([3.0, 3.0, 3.0, -4.0]), []
    for _ in range(6):
        p = 1 / (1 + np.exp(-inputs @ w))
        gradient = inputs.T @ (p - y) / 40 + decay * w
        hessian = inputs.T * (p * (1 - p)) @ inputs / 40 + decay * np.eye(4)
        d, t = -np.linalg.solve(hessian, gradient), 2.0
        while value(w + t * d) > value(w) + 1e-4 * t * gradient @ d + 1e-14:
            t /= 2
        loss = opt.step(closure)
        np.testing.assert_allclose(loss.item(), value(w), rtol=1e-12)
        state = opt.state[weight]
        assert state["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-6, abs=1e-12)
        w, lengths = w + t * d, [*lengths, t]
        np.testing.assert_allclose(flat(params).numpy(), w, rtol=1e-8, atol=1e-9)
        assert state["step_length"] == pytest.approx(t)
    assert len(set(lengths)) > 1  # the search had something to do


def curved_problem():
    """A tanh network with cross-entropy, its parameters, and its exact matrices by jacrev."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(F64)
    x, y = torch.randn(10, 3, dtype=F64), torch.arange(10) % 3
    params = list(net.parameters())
    shapes = [(n, p.shape, p.numel()) for n, p in net.named_parameters()]

    def predict(w):
        pieces = w.split([size for *_, size in shapes])
        values = {n: v.reshape(s) for (n, s, _), v in zip(shapes, pieces, strict=True)}
        return torch.func.functional_call(net, values, (x,))

    w = flat(params)
    loss = lambda w: F.cross_entropy(predict(w), y)  # noqa: E731
    jacobian = torch.func.jacrev(predict)(w).reshape(30, -1)
    p = predict(w).softmax(-1)
    blocks = [(torch.diag(q) - torch.outer(q, q)) / 10 for q in p]
    matrices = {
        Hessian: torch.func.jacrev(torch.func.jacrev(loss))(w),
        GaussNewton: jacobian.T @ torch.block_diag(*blocks) @ jacobian,
    }
    return net, x, y, params, w, torch.func.grad(loss)(w), matrices


@pytest.mark.parametrize("damping", [1.0, 5.0])
@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_step_with_the_exact_matrix(curvature, damping):
    net, x, y, params, w, gradient, matrices = curved_problem()

    def closure():
        output = net(x)
        loss = F.cross_entropy(output, y)
        return loss if curvature is Hessian else (loss, output)

    opt = NewtonCG(
        params,
        linear_solver=CG(max_steps=60, rtol=1e-14),
        line_search=FixedStep(1.0),
        curvature=curvature,
        damping=damping,
    )
    opt.step(closure)
    matrix = matrices[curvature]
    assert (matrices[Hessian] - matrices[GaussNewton]).norm() > 0.1 * matrix.norm()
    expected = w - torch.linalg.solve(matrix + damping * torch.eye(len(w)), gradient)
    torch.testing.assert_close(flat(params), expected, rtol=1e-10, atol=1e-11)


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    torch.manual_seed(0)
    x, y = torch.randn(30, 5, dtype=F64), torch.randn(30, 2, dtype=F64)
    solver = CG(max_steps=40, rtol=1e-14)
    results = []
    for curvature in (Hessian, GaussNewton):
        weight = torch.ones(2, 5, dtype=F64, requires_grad=True)

        def closure(weight=weight, curvature=curvature):
            output = F.linear(x, weight)
            loss = F.mse_loss(output, y)
            return loss if curvature is Hessian else (loss, output)

        NewtonCG([weight], curvature=curvature, linear_solver=solver).step(closure)
        results.append(weight.detach())
    exact = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(results[0].numpy(), exact, atol=1e-11)
    np.testing.assert_allclose(results[1].numpy(), exact, atol=1e-11)


@pytest.mark.parametrize("damping", [0.0, 0.6])
def test_a_term_outside_the_output_is_in_the_gradient_but_not_in_the_matrix(damping):
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=F64), torch.randn(30, 1, dtype=F64)
    weight = torch.ones(1, 4, dtype=F64, requires_grad=True)

    def closure():
        output = F.linear(x, weight)
        return F.mse_loss(output, y) + 0.3 * weight.square().sum(), output

    NewtonCG(
        [weight],
        curvature=GaussNewton,
        damping=damping,
        linear_solver=CG(max_steps=20, rtol=1e-14),
        line_search=FixedStep(1.0),
    ).step(closure)
    gram, ones = 2 * x.T @ x / 30, torch.ones(4, dtype=F64)
    gradient = gram @ ones - 2 * x.T @ y[:, 0] / 30 + 0.6 * ones
    expected = ones - torch.linalg.solve(gram + damping * torch.eye(4, dtype=F64), gradient)
    torch.testing.assert_close(weight.detach()[0], expected, rtol=1e-11, atol=1e-11)


def test_equals_the_solver_in_minimize():
    net, x, y, params, w, *_ = curved_problem()
    shapes = [p.shape for p in params]

    def objective(phi, theta):
        a, b, c, d = phi
        return F.cross_entropy(F.linear(F.linear(x, a, b).tanh(), c, d), y) + theta

    opt = NewtonCG(params)
    for _ in range(4):
        opt.step(lambda: F.cross_entropy(net(x), y))
    start = [
        v.reshape(s) for v, s in zip(w.split([s.numel() for s in shapes]), shapes, strict=True)
    ]
    solver = newton_cg(max_steps=4)
    solution = minimize(objective, start, torch.zeros((), dtype=F64), solver=solver)
    torch.testing.assert_close(flat(params), flat(solution.value), rtol=1e-9, atol=1e-9)


def test_armijo_holds_at_every_step_and_rosenbrock_is_solved():
    x = torch.tensor([-1.2, 1.0], dtype=F64, requires_grad=True)
    opt = NewtonCG([x], line_search=Armijo(c1=0.1, max_trials=30))
    lengths = []
    for _ in range(25):
        before = x.detach().clone()
        (gradient,) = torch.autograd.grad(rosenbrock(x), x)
        loss = opt.step(lambda: rosenbrock(x))
        assert loss.item() == rosenbrock(before).item()
        predicted = gradient @ (x.detach() - before)
        assert rosenbrock(x) <= loss + 0.1 * predicted + 1e-12
        lengths.append(opt.state[x]["step_length"])
    assert min(lengths) < 1.0 == lengths[-1]  # backtracked on the way, Newton's step at the end
    torch.testing.assert_close(x.detach(), torch.ones(2, dtype=F64), rtol=0, atol=1e-9)


def test_negative_curvature_is_passed_and_reported():
    x = torch.tensor([0.1, 1.0], dtype=F64, requires_grad=True)
    closure = lambda: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2 / 2  # noqa: E731
    opt = NewtonCG([x])
    values, statuses = [], []
    for _ in range(15):
        values.append(opt.step(closure).item())
        statuses.append(opt.status)
    assert all(b <= a for a, b in zip(values, values[1:], strict=False))
    assert Status.NEGATIVE_CURVATURE in statuses
    assert statuses[-1] is Status.SUCCESS
    assert closure().item() == pytest.approx(-0.25, abs=1e-12)


def test_at_negative_curvature_at_once_the_step_is_the_gradient():
    x = torch.tensor([0.5, -0.25], dtype=F64, requires_grad=True)
    opt = NewtonCG([x], line_search=FixedStep(1.0))
    opt.step(lambda: -x.square().sum())
    assert x.tolist() == [1.5, -0.75]  # x - grad = x + 2 x
    assert opt.state[x]["status"] == Status.NEGATIVE_CURVATURE == 2


def test_an_unfinished_linear_solve_is_reported():
    x = torch.tensor([3.0, 1.0, 1.0], dtype=F64, requires_grad=True)
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    opt = NewtonCG([x], linear_solver=CG(max_steps=1, rtol=1e-8))
    opt.step(lambda: (scale * x**2).sum() / 2)
    assert opt.status is Status.MAX_STEPS
    gradient = scale * torch.tensor([3.0, 1.0, 1.0], dtype=F64)
    cauchy = (gradient @ gradient) / (gradient @ (scale * gradient))
    expected = torch.tensor([3.0, 1.0, 1.0], dtype=F64) - cauchy * gradient
    torch.testing.assert_close(x.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["loss", "gradient", "inf"])
def test_nonfinite_leaves_the_parameters_alone(kind):
    x = torch.tensor([0.0, 2.0], dtype=F64, requires_grad=True)
    losses = {
        "loss": lambda: (x - 5).log().sum(),
        "gradient": lambda: x.sqrt().sum(),  # finite at 0, its slope is not
        "inf": lambda: (1 / x).sum(),
    }
    opt = NewtonCG([x])
    for calls in (1, 2):
        loss = opt.step(losses[kind])
        assert x.tolist() == [0.0, 2.0]
        assert opt.status is Status.NONFINITE
        assert (opt.state[x]["n_iter"], opt.state[x]["step_length"]) == (calls, 0.0)
    assert loss.isfinite().item() == (kind == "gradient")


def test_a_step_out_of_range_is_not_taken():
    x = torch.tensor([1.0], dtype=F64, requires_grad=True)
    opt = NewtonCG([x], lr=1e300, line_search=FixedStep(1e300))
    opt.step(lambda: (x**2).sum())
    assert x.item() == 1.0
    assert opt.status is Status.NONFINITE


def test_no_step_found_restores_the_parameters_to_the_bit():
    x = torch.rand(50, dtype=F64, requires_grad=True)
    before, calls = x.detach().clone(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return (x**2).sum() + len(calls)  # worse each time

    opt = NewtonCG([x], line_search=Armijo(max_trials=4, c1=0.5, shrink=0.9))
    opt.step(lambda: closure() * 1e3)
    assert calls == [True, False, False, False, False]
    assert torch.equal(x.detach(), before)
    assert (opt.status, opt.state[x]["step_length"]) == (Status.NO_DESCENT, 0.0)


def test_an_error_in_a_trial_restores_the_parameters():
    x = torch.rand(5, dtype=F64, requires_grad=True)
    before = x.detach().clone()

    def closure():
        if not torch.equal(x.detach(), before):
            raise KeyError("in a trial")
        return (x**2).sum()

    with pytest.raises(KeyError, match="in a trial"):
        NewtonCG([x]).step(closure)
    assert torch.equal(x.detach(), before)


def test_lr_scales_the_step():
    x = torch.tensor([8.0], dtype=F64, requires_grad=True)
    opt = NewtonCG([x], lr=torch.tensor(0.5, dtype=F64))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for expected in (4.0, 3.0, 2.625):  # half the way to 0, a quarter, an eighth
        opt.step(lambda: (x**2).sum())
        assert x.item() == expected
        assert opt.state[x]["step_length"] == opt.param_groups[0]["lr"].item()
        scheduler.step()


def test_lr_of_zero_stays():
    x = torch.tensor([8.0], dtype=F64, requires_grad=True)
    opt = NewtonCG([x])
    opt.param_groups[0]["lr"] = 0.0  # the end of a schedule
    opt.step(lambda: (x**2).sum())
    assert (x.item(), opt.status) == (8.0, Status.SUCCESS)


def test_maximize_is_minimising_minus_the_loss():
    a, b = (torch.tensor([0.3, 1.7], dtype=F64, requires_grad=True) for _ in range(2))
    up, down = NewtonCG([a], maximize=True), NewtonCG([b])
    for _ in range(3):
        gain = up.step(lambda: (a - a.cosh()).sum())
        loss = down.step(lambda: (b.cosh() - b).sum())
        assert gain.item() == -loss.item()
        assert torch.equal(a.detach(), b.detach())
    assert (a.detach().sinh() - 1).abs().max() < 1e-3


def test_frozen_unused_and_tied_parameters():
    w = torch.tensor([4.0, 2.0], dtype=F64, requires_grad=True)
    frozen = torch.tensor([3.0], dtype=F64)
    unused = torch.tensor([5.0, 6.0], dtype=F64, requires_grad=True)
    linear = torch.tensor(7.0, dtype=F64, requires_grad=True)  # a slope but no curvature
    opt = NewtonCG([frozen, unused, w, linear], line_search=FixedStep(1.0), damping=1.0)
    closure = lambda: (w * w).sum() + frozen.sum() * linear  # noqa: E731  w is used twice
    opt.step(closure)
    # (H + 1) d = -g: 3 d = -2 w for w, 1 d = -3 for the linear one
    torch.testing.assert_close(w.detach(), torch.tensor([4 / 3, 2 / 3], dtype=F64))
    assert linear.item() == pytest.approx(4.0)
    assert (frozen.tolist(), unused.tolist()) == ([3.0], [5.0, 6.0])
    frozen.requires_grad_()  # thawed: 9 (F - 3) has no curvature in it either
    opt.step(lambda: 9 * frozen.sum())
    assert frozen.item() == pytest.approx(-6.0)
    assert opt.state[frozen]["n_iter"] == 2


def test_a_parameter_listed_twice_counts_once():
    w = torch.tensor([4.0], dtype=F64, requires_grad=True)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = NewtonCG([w, w], line_search=FixedStep(1.0))
    opt.step(lambda: (w**2).sum())
    assert w.item() == pytest.approx(0.0, abs=1e-14)


def test_a_loss_linear_in_the_output_or_the_parameters():
    w = torch.tensor([4.0, 1.0], dtype=F64, requires_grad=True)
    settings = {"line_search": FixedStep(1.0), "damping": 2.0}

    def closure():
        output = 3 * w.sin()
        return output.sum(), output

    opt = NewtonCG([w], curvature=GaussNewton, **settings)  # H_out = 0: the step is -g / damping
    expected = w.detach() - 3 * w.detach().cos() / 2
    opt.step(closure)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=1e-14)
    NewtonCG([w], **settings).step(lambda: (6 * w).sum())
    torch.testing.assert_close(w.detach(), expected - 3, rtol=1e-14, atol=1e-14)


def test_grad_fields_are_the_users():
    a, b = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(2))
    mine = torch.tensor([7.0, 8.0], dtype=F64)
    a.grad = mine
    opt = NewtonCG([a, b])

    def closure():
        opt.zero_grad()  # harmless
        return (a**2 + b**2).sum()

    opt.step(closure)
    assert a.grad is mine
    assert mine.tolist() == [7.0, 8.0]
    assert b.grad is None
    assert a.tolist() == pytest.approx([0.0, 0.0], abs=1e-14)


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_a_closure_that_calls_backward_is_told(clears, retain):
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    mine = x.grad = torch.ones(2, dtype=F64)
    opt = NewtonCG([x])

    def closure():
        opt.zero_grad()
        loss = x.exp().sum()
        loss.backward(retain_graph=retain)
        if clears:
            opt.zero_grad()
        return loss

    with pytest.raises(RuntimeError, match=r"Return the loss without calling backward\(\)"):
        opt.step(closure)
    assert x.tolist() == [1.0, 2.0]
    assert x.grad is mine


def test_backward_is_noticed_though_the_closure_runs_but_once():
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)

    def closure():
        loss = x.square().sum()
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(RuntimeError, match=r"the closure called backward\(\)"):
        NewtonCG([x], line_search=FixedStep(1.0)).step(closure)
    assert x.tolist() == [1.0, 2.0]
    assert x.grad is None


def test_a_loss_with_derivatives_in_it():
    x = torch.tensor([2.0, -1.0], dtype=F64, requires_grad=True)
    z = torch.linspace(-1, 1, 9, dtype=F64, requires_grad=True)
    opt = NewtonCG([x])

    def residual():  # u(z) = x0 z + x1 z^2, whose derivative shall be 3 + 4 z
        (slope,) = torch.autograd.grad((x[0] * z + x[1] * z**2).sum(), z, create_graph=True)
        return (slope - 3 - 4 * z).square().sum()

    with pytest.raises(RuntimeError, match=r"under torch.enable_grad\(\)"):
        opt.step(residual)
    assert x.tolist() == [2.0, -1.0]
    opt.step(torch.enable_grad()(residual))
    assert x.tolist() == pytest.approx([3.0, 2.0], abs=1e-12)


def test_float32():
    torch.manual_seed(0)
    root = torch.randn(6, 6)
    A, b = root @ root.T + torch.eye(6), torch.randn(6)
    x = torch.zeros(6, requires_grad=True)
    opt = NewtonCG([x], linear_solver=CG(max_steps=20, rtol=1e-6))
    for _ in range(2):
        opt.step(lambda: x @ A @ x / 2 - b @ x)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.detach(), torch.linalg.solve(A, b), rtol=1e-4, atol=1e-4)


def test_trains_a_classifier():
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))

    def closure():
        output = net(x[:1500])
        decay = sum(p.square().sum() for p in net.parameters())
        return F.cross_entropy(output, y[:1500]) + 5e-4 * decay, output

    solver = CG(max_steps=15)
    opt = NewtonCG(net.parameters(), linear_solver=solver, curvature=GaussNewton, damping=1e-3)
    losses = [opt.step(closure).item() for _ in range(15)]
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False))
    accuracy = (net(x[1500:]).argmax(-1) == y[1500:]).float().mean().item()
    assert accuracy > 0.9
