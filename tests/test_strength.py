"""The strength lam of every kind, fixed and learned: against dense algebra, differences, unrolling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import implicit_optim as iopt

N = 4  # parameters of Linear(3, 1)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)


def definite():
    a = torch.randn(N, N)
    return a @ a.mT / N + 0.5 * torch.eye(N)


KINDS = {
    "scalar": lambda learned: iopt.Proximal(0.7, learned=learned),
    "by name": lambda learned: iopt.Proximal(
        {"weight": torch.rand(1, 3) + 0.3, "bias": 0.4}, learned=learned
    ),
    "vector": lambda learned: iopt.Proximal(torch.rand(N) + 0.3, learned=learned),
    "matrix": lambda learned: iopt.Proximal(definite(), learned=learned),
    "scalar and low rank": lambda learned: iopt.Proximal(
        0.6, factor=torch.randn(N, 2), learned=learned
    ),
    "vector and low rank": lambda learned: iopt.Proximal(
        torch.rand(N) + 0.3, factor=torch.randn(N, 1), learned=learned
    ),
}
EXACT = iopt.Implicit(iopt.CG(rtol=1e-13))


def dense(prox):
    """The matrix that a strength stands for."""
    lam = prox()
    if isinstance(lam, dict):  # in the order of the parameters: weight, bias
        return torch.diag(
            torch.cat(
                [lam[k].expand(s).reshape(-1) for k, s in (("weight", (1, 3)), ("bias", (1,)))]
            )
        )
    if isinstance(lam, tuple):
        return lam[0] * torch.eye(N) + lam[1] @ lam[1].mT
    return lam if lam.ndim == 2 else lam * torch.eye(N)


def setting(kind, learned):
    model = nn.Linear(3, 1)
    support, query = ((torch.randn(3, 5, 3), torch.randn(3, 5, 1)) for _ in range(2))
    return model, KINDS[kind](learned), support, query


def learner(model, prox, rule=EXACT, solver=None):
    solver = solver or iopt.newton_cg(linear_solver=iopt.CG(rtol=1e-13), tol=1e-12, max_steps=5)
    return iopt.MetaLearner(
        model, F.mse_loss, solver=solver, lam=prox, meta_gradient=rule, on_solve=iopt.Ignore()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_solution_and_gradient_are_those_of_the_dense_matrix(kind):
    model, prox, support, query = setting(kind, learned=False)
    M = dense(prox).numpy()
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    meta = learner(model, prox)
    phi = meta.adapt(support)
    flat = torch.cat([phi["weight"].reshape(3, -1), phi["bias"]], 1)
    v = torch.randn(3, N)
    grads = torch.autograd.grad((flat * v).sum(), list(model.parameters()))
    total = 0
    for i in range(3):
        X = np.concatenate([support[0][i].numpy(), np.ones((5, 1))], 1)
        A = 2 / 5 * X.T @ X + M
        exact = np.linalg.solve(A, 2 / 5 * X.T @ support[1][i, :, 0].numpy() + M @ theta)
        np.testing.assert_allclose(flat[i].detach().numpy(), exact, rtol=1e-9, atol=1e-11)
        total = total + M @ np.linalg.solve(A, v[i].numpy())
    ours = torch.cat([g.reshape(-1) for g in grads]).numpy()
    np.testing.assert_allclose(ours, total, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_strength_against_differences_and_a_long_unroll(kind):
    model, prox, support, query = setting(kind, learned=True)
    wrt = list(prox.parameters())
    ours = torch.autograd.grad(learner(model, prox)(support, query).mean(), wrt)
    long = learner(model, prox, iopt.Unrolled(), iopt.gd(lr=0.15, max_steps=500))
    unrolled = torch.autograd.grad(long(support, query).mean(), wrt)
    for g, u, p in zip(ours, unrolled, wrt, strict=True):
        torch.testing.assert_close(g, u, rtol=1e-8, atol=1e-10)
        direction = torch.randn_like(p)
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(h * direction)
                values.append(learner(model, prox)(support, query).mean())
                p.sub_(h * direction)
        difference = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((g * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_stays_definite_whatever_is_learned(kind):
    """Positive by construction: any values of its parameters give a definite matrix."""
    prox = KINDS[kind](True)
    for _ in range(20):
        with torch.no_grad():
            for p in prox.parameters():
                p.normal_(0, 1.5)
            eigenvalues = torch.linalg.eigvalsh(dense(prox))
        assert eigenvalues.min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_is_what_was_given_and_survives_a_checkpoint(kind):
    torch.manual_seed(3)
    fixed = KINDS[kind](False)
    torch.manual_seed(3)
    learned = KINDS[kind](True)
    torch.testing.assert_close(dense(learned), dense(fixed), rtol=1e-12, atol=1e-12)
    other = KINDS[kind](True)
    other.load_state_dict(learned.state_dict())
    torch.testing.assert_close(dense(other), dense(learned), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("diagonal", ["scalar", "vector"])
def test_low_rank_inverse_is_the_dense_one(batch, diagonal):
    lam = torch.tensor(0.3) if diagonal == "scalar" else torch.rand(N) + 0.2
    factor, r = torch.randn(N, 2), torch.randn(*batch, N)
    M = lam * torch.eye(N) + factor @ factor.mT
    solve = lambda r: iopt.inverse_proximal(r, (torch.zeros(N), (lam, factor)))  # noqa: E731
    for _ in batch:
        solve = torch.func.vmap(solve)
    expected = torch.linalg.solve(M, r.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solve(r), expected, rtol=1e-12, atol=1e-12)


def test_the_inverse_of_an_indefinite_matrix_is_nan():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert iopt.inverse_proximal(torch.ones(2), (torch.zeros(2), matrix)).isnan().all()


def test_strengths_that_are_none():
    with pytest.raises(ValueError, match="symmetric and positive definite"):
        iopt.Proximal(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="symmetric and positive definite"):
        iopt.Proximal(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), learned=True)
    with pytest.raises(ValueError, match=r"must be \[n, n\], got \(2, 3\)"):
        iopt.Proximal(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"factor must be \[n, r\], beside a scalar or vector"):
        iopt.Proximal(torch.eye(3), factor=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"factor \[4, rank\].* got a factor \(3, 1\)"):
        learner(nn.Linear(3, 1), iopt.Proximal(1.0, factor=torch.ones(3, 1)))
