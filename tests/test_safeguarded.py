"""The Hessian, and Gauss-Newton where it is indefinite: task by task what dense algebra says."""

import pytest
import torch
import torch.nn.functional as F

import implicit_optim as iopt
from implicit_optim import CG, GaussNewton, Hessian, SafeguardedHessian, Status

F64 = torch.float64
T, N, M = 6, 3, 4
LAM = 0.5


def predict(phi, x):
    return (x @ phi) ** 2


FIT = iopt.Objective(predict, F.mse_loss, iopt.proximal)


def tasks():
    """Targets that the model overshoots (definite) and undershoots (indefinite), in turn."""
    generator = torch.Generator().manual_seed(0)
    phi, x, b = (
        torch.randn(s, generator=generator, dtype=F64) for s in [(T, N), (T, M, N), (T, N)]
    )
    sign = torch.tensor([-1.0, 1.0], dtype=F64).repeat(T // 2)
    y = predict(phi.unsqueeze(-1), x).squeeze(-1) + 6 * sign[:, None]
    return phi, x, y, b


def theta(lam=LAM):
    return torch.zeros(N, dtype=F64), torch.tensor(lam, dtype=F64)


def bind(phi, x, y):
    return iopt.InnerProblem.bind(FIT, phi, theta(), x, y, batch_ndim=1)


def dense(phi, x, y):
    """Hessian and Gauss-Newton matrix of one task, written down: the outputs are h^2, h = x phi."""
    h, eye = x @ phi, torch.eye(N, dtype=F64)
    gauss_newton = 2 / M * (x.T * (2 * h) ** 2) @ x + LAM * eye
    return gauss_newton + 2 / M * (x.T * (2 * (h**2 - y))) @ x, gauss_newton


def chosen(phi, x, y):
    """The matrices of all tasks, and which of them are Gauss-Newton's."""
    pairs = [dense(*task) for task in zip(phi, x, y, strict=True)]
    bad = torch.tensor([torch.linalg.eigvalsh(H.detach())[0] < 0 for H, _ in pairs])
    return torch.stack([G if b else H for (H, G), b in zip(pairs, bad, strict=True)]), bad


def solve(A, b, **settings):
    return iopt.linear_solve(A, b, CG(rtol=1e-12), **settings)


def test_the_tasks_are_of_both_kinds():
    phi, x, y, _ = tasks()
    hessians, bad = chosen(phi, x, y)
    assert bad.tolist() == [False, True] * 3
    assert torch.allclose(Hessian(bind(phi, x, y), phi).as_matrix()[~bad], hessians[~bad])
    assert torch.allclose(GaussNewton(bind(phi, x, y), phi).as_matrix()[bad], hessians[bad])


def test_each_task_is_solved_with_its_matrix():
    phi, x, y, b = tasks()
    matrices, bad = chosen(phi, x, y)
    solution = solve(SafeguardedHessian(bind(phi, x, y), phi), b)
    assert torch.equal(solution.stats["fallback"], bad)
    assert torch.allclose(solution.value, torch.linalg.solve(matrices, b), rtol=1e-9)
    assert solution.status.tolist() == [Status.SUCCESS] * T
    # The residual is that of the matrix that was solved with; the coefficients are the Hessian's.
    assert (solution.stats["residual_norm"] <= 1e-11 * solution.stats["rhs_norm"]).all()
    plain = solve(Hessian(bind(phi, x, y), phi), b)
    assert torch.equal(solution.stats["lanczos"].nan_to_num(), plain.stats["lanczos"].nan_to_num())


def test_no_second_solve_without_need():
    phi, x, y, b = (t[::2] for t in tasks())
    calls = []

    class Counted(SafeguardedHessian):
        def fallback(self):
            return CountedGaussNewton(self.problem, self.phi)

    class CountedGaussNewton(GaussNewton):
        def linearize(self):
            calls.append(1)
            return super().linearize()

    A = Counted(bind(phi, x, y), phi)
    first, plain = solve(A, b), solve(Hessian(bind(phi, x, y), phi), b)
    assert torch.equal(first.value, plain.value)
    assert not first.stats["fallback"].any()
    assert calls == []
    phi, x, y, b = tasks()
    solve(Counted(bind(phi, x, y), phi), b)
    assert calls == [1]


def test_damping_goes_with_it():
    phi, x, y, b = tasks()
    matrices, _ = chosen(phi, x, y)
    eye = torch.eye(N, dtype=F64)
    A = 2 * SafeguardedHessian(bind(phi, x, y), phi) + 0.25
    expected = torch.linalg.solve(2 * matrices + 0.25 * eye, b)
    assert torch.allclose(solve(A, b).value, expected, rtol=1e-9)
    B = SafeguardedHessian(bind(phi, x, y), phi) + iopt.Dense(eye.expand(T, N, N))
    assert torch.allclose(solve(B, b).value, torch.linalg.solve(matrices + eye, b), rtol=1e-9)


def test_derivatives_are_those_of_what_was_solved():
    """In the targets and in b, first and second, against autograd through the dense solve."""
    phi, x, y, b = tasks()
    w = torch.randn(T, N, generator=torch.Generator().manual_seed(1), dtype=F64)

    def ours(y, b):
        return solve(SafeguardedHessian(bind(phi, x, y), phi), b).value

    def oracle(y, b):
        return torch.linalg.solve(chosen(phi, x, y)[0], b)

    found = []
    for function in (ours, oracle):
        y_, b_ = y.clone().requires_grad_(), b.clone().requires_grad_()
        first = torch.autograd.grad((w * function(y_, b_)).sum(), (y_, b_), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (y_, b_))
        found.append([*first, *second])
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-8, atol=1e-10)


def test_under_vmap_as_in_a_loop():
    phi, x, y, b = tasks()

    def one(phi, x, y, b):
        problem = iopt.InnerProblem.bind(FIT, phi, theta(), x, y)
        return solve(SafeguardedHessian(problem, phi), b).value

    loop = torch.stack([one(*task) for task in zip(phi, x, y, b, strict=True)])
    assert torch.allclose(torch.func.vmap(one)(phi, x, y, b), loop, rtol=1e-10)


def test_meta_gradient_by_attach():
    """``g = lam A^-1 v`` with each task's matrix (Rajeswaran et al. 2019, Lemma 1), summed."""
    phi, x, y, v = tasks()
    anchor = torch.zeros(N, dtype=F64, requires_grad=True)
    attached = iopt.attach(
        phi,
        FIT,
        (anchor, theta()[1]),
        x,
        y,
        linear_solver=CG(rtol=1e-12),
        curvature=SafeguardedHessian,
        batch_ndim=1,
    )
    (got,) = torch.autograd.grad((v * attached).sum(), anchor)
    expected = LAM * torch.linalg.solve(chosen(phi, x, y)[0], v).sum(0)
    assert torch.allclose(got, expected, rtol=1e-9)


def test_newton_takes_its_directions():
    """One full step from phi: ``phi - A^-1 grad`` with each task's matrix."""
    phi, x, y, _ = tasks()
    solver = iopt.newton_cg(
        max_steps=1,
        linear_solver=CG(rtol=1e-12),
        curvature=SafeguardedHessian,
        line_search=iopt.FixedStep(1.0),
    )
    found = iopt.minimize(FIT, phi, theta(), x, y, solver=solver, batch_ndim=1).value
    h = (x @ phi.unsqueeze(-1)).squeeze(-1)
    slope = 4 / M * ((h**2 - y) * h).unsqueeze(-2) @ x + LAM * phi.unsqueeze(-2)
    expected = phi - torch.linalg.solve(chosen(phi, x, y)[0], slope.squeeze(-2))
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.filterwarnings("error")
def test_meta_learner_reports_the_share_and_does_not_warn():
    _, x, y, _ = tasks()

    class Squared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.phi = torch.nn.Parameter(0.3 * torch.ones(N, dtype=F64))

        def forward(self, x):
            return (x @ self.phi) ** 2

    meta = iopt.MetaLearner(
        Squared(),
        F.mse_loss,
        solver=iopt.gd(lr=1e-4, max_steps=1),
        lam=LAM,
        meta_gradient=iopt.Implicit(CG(max_steps=N), curvature=SafeguardedHessian),
    )
    meta((x, y), (x, y)).mean().backward()
    share = meta.report().numbers()["linear_solve/fallback"]
    phi = meta.adapt((x, y))["phi"].detach()
    _, bad = chosen(phi, x, y)
    assert 0 < share < 1
    assert share == pytest.approx(bad.double().mean().item())
    assert f"{100 * share:.0f} % of the tasks indefinite, solved with the fallback" in str(
        meta.report()
    )


def test_a_function_as_curvature():
    """Damping in the solve alone: ``lam (H + c)^-1 v``; and what returns no operator is refused."""
    phi, x, y, v = (t[::2] for t in tasks())
    anchor = torch.zeros(N, dtype=F64, requires_grad=True)

    def gradient(curvature):
        settings = {"linear_solver": CG(rtol=1e-12), "curvature": curvature, "batch_ndim": 1}
        attached = iopt.attach(phi, FIT, (anchor, theta()[1]), x, y, **settings)
        return torch.autograd.grad((v * attached).sum(), anchor)[0]

    matrices = chosen(phi, x, y)[0] + 2 * torch.eye(N, dtype=F64)
    expected = LAM * torch.linalg.solve(matrices, v).sum(0)
    damped = gradient(lambda problem, phi: Hessian(problem, phi) + 2)
    assert torch.allclose(damped, expected, rtol=1e-9)
    with pytest.raises(TypeError, match="curvature must return an Operator"):
        gradient(lambda problem, phi: None)


def test_wants_structure():
    phi = torch.ones(2, dtype=F64)
    with pytest.raises(TypeError, match="GaussNewton needs the structure"):
        iopt.attach(phi, lambda phi, theta: phi @ phi, (), curvature=SafeguardedHessian)
