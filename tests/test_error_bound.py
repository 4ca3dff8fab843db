"""error_bound: never violated over ten thousand random strongly convex problems, and how tight."""

import math

import pytest
import torch
import torch.nn.functional as F

import implicit_optim as iopt

LAMS = (0.05, 0.3, 1.0, 5.0)
CG_STEPS = (0, 1, 2, 4, 8)
TASKS, N, DIM = 250, 12, 4  # a batch; 10,000 problems in 4 lams x 5 CG budgets x 2 families
SIGMOID_3 = 1 / (6 * math.sqrt(3))  # the largest third derivative of softplus

pytestmark = pytest.mark.usefixtures("double")


def logistic(phi, x, y):
    return F.softplus(-y * (x @ phi)).mean()


def squares(phi, x, y):
    return ((x @ phi - y) ** 2).mean() / 2


def batch(seed):
    """Examples of different lengths, so that problems differ in conditioning."""
    torch.manual_seed(seed)
    scale = torch.rand(TASKS, 1, DIM) * 3
    return torch.randn(TASKS, N, DIM) * scale, torch.randn(TASKS, N).sign()


def largest(x):
    return torch.linalg.matrix_norm(x, 2).square() / N


# The convex loss, the smoothness of its gradient, a Lipschitz constant of its Hessian.
FAMILIES = {
    "quadratic": (squares, lambda x: largest(x), lambda x: torch.zeros(TASKS)),
    "logistic": (
        logistic,
        lambda x: largest(x) / 4,
        lambda x: SIGMOID_3 * x.norm(dim=-1).pow(3).mean(-1),
    ),
}


def gradients(loss, lam, phi, support, query, cg, structured=True):
    """Meta-gradient `lam w` of every task at phi, and the linear solution."""
    heard = []
    theta = (torch.zeros(DIM, requires_grad=True), torch.tensor(lam))
    inner = iopt.Objective(
        lambda p, x: (x, p), lambda output, y: loss(output[1], output[0], y), iopt.proximal
    )
    if not structured:  # nothing to precondition with: the first-order direction is v itself
        inner = inner.__call__
    phi = iopt.attach(phi, inner, theta, *support, linear_solver=cg, batch_ndim=1,
                      on_solve=lambda _, solution: heard.append(solution))  # fmt: skip
    torch.func.vmap(loss)(phi, *query).sum().backward()
    g = lam * heard[0].value
    torch.testing.assert_close(theta[0].grad, g.sum(0))
    return g, heard[0]


def cases(family, lam):
    """Yields the true error and the bound's ingredients, for every CG budget."""
    loss, smooth, lipschitz = FAMILIES[family]
    seed = LAMS.index(lam)
    support, query = batch(2 * seed), batch(2 * seed + 1)

    def inner(phi, theta, x, y):
        return loss(phi, x, y) + lam / 2 * ((phi - theta) ** 2).sum()

    solve = iopt.newton_cg(tol=1e-12, linear_solver=iopt.CG(rtol=1e-12, max_steps=50), max_steps=50)
    start = torch.zeros(TASKS, DIM)
    exact_phi = iopt.minimize(inner, start, start[0], *support, solver=solve, batch_ndim=1).value
    assert (exact_phi.abs() > 1e-6).any(-1).all()
    exact, _ = gradients(loss, lam, exact_phi, support, query, iopt.CG(rtol=1e-13, max_steps=99))
    for k, budget in enumerate(CG_STEPS):
        # From far away to almost there, the same in every direction.
        distance = 10.0 ** torch.linspace(-6, 0, TASKS).unsqueeze(-1)
        phi = exact_phi + distance * F.normalize(torch.randn(TASKS, DIM), dim=-1)
        g, solution = gradients(
            loss, lam, phi, support, query, iopt.CG(max_steps=budget), k % 2 == 0
        )
        constants = {"smoothness": smooth(query[0]), "hessian_lipschitz": lipschitz(support[0])}
        yield (g - exact).norm(dim=-1), solution, constants, support


@pytest.mark.parametrize("family", FAMILIES)
def test_never_violated_in_ten_thousand_problems(family):
    tightness = []
    for lam in LAMS:
        for error, solution, constants, _ in cases(family, lam):
            bound = iopt.error_bound(solution, lam=lam, strong_convexity=lam, **constants)
            assert (error <= bound * (1 + 1e-9) + 1e-11).all()
            tightness.append(bound / error)
    tightness = torch.cat(tightness)
    assert len(tightness) == 5_000 and torch.isfinite(tightness).all()
    print(f"{family}: median bound / error {tightness.median():.3g}")
    assert tightness.median() < 200  # a bound of a thousand times the error helps nobody


def test_the_true_strong_convexity_makes_it_tighter_and_holds():
    """Quadratics, where mu is known: the smallest eigenvalue."""
    for lam in LAMS:
        for error, solution, constants, (x, _) in cases("quadratic", lam):
            eigenvalues = torch.linalg.eigvalsh(x.mT @ x / N)
            mu = eigenvalues[:, 0] + lam
            bound = iopt.error_bound(solution, lam=lam, strong_convexity=mu, **constants)
            loose = iopt.error_bound(solution, lam=lam, strong_convexity=lam, **constants)
            assert (error <= bound * (1 + 1e-9) + 1e-11).all()
            assert (bound <= loose).all()


def test_an_estimated_mu_lies_between_the_extremes_and_gives_a_smaller_number():
    for _, solution, constants, (x, _) in cases("quadratic", 0.3):
        if solution.stats["lanczos"].shape[-2] == 0:
            continue
        mu = solution.ritz_values()[0]
        eigenvalues = torch.linalg.eigvalsh(x.mT @ x / N) + 0.3
        assert (mu >= eigenvalues[:, 0] * (1 - 1e-9)).all()
        assert (mu <= eigenvalues[:, -1] * (1 + 1e-9)).all()
        estimate = iopt.error_bound(solution, lam=0.3, **constants)
        bound = iopt.error_bound(solution, lam=0.3, strong_convexity=eigenvalues[:, 0], **constants)
        assert (estimate <= bound * (1 + 1e-9)).all()


def test_a_hand_computed_case():
    """One dimension: A = 3, lam = 2, v = 1, phi off by 0.1 from phi*, no CG step, rho = 0, L_s = 5."""

    def objective(phi, theta):
        return phi @ phi / 2 + (phi - theta) @ (phi - theta)

    theta, heard = torch.ones(1, requires_grad=True), []
    phi = iopt.attach(torch.tensor([2 / 3 + 0.1]), objective, theta,
                      linear_solver=iopt.CG(rtol=1e-12),
                      on_solve=lambda _, solution: heard.append(solution))  # fmt: skip
    phi.sum().backward()
    bound = iopt.error_bound(heard[0], lam=2.0, smoothness=5.0, strong_convexity=3.0)
    assert math.isclose(bound.item(), 2 / 3 * (0 + 0.1 * 5), rel_tol=1e-9)
    bound = iopt.error_bound(
        heard[0], lam=2.0, smoothness=5.0, hessian_lipschitz=6.0, strong_convexity=3.0
    )
    assert math.isclose(bound.item(), 2 / 3 * 0.1 * (5 + 6 / 3), rel_tol=1e-9)


def test_negative_curvature_has_no_bound():
    heard, theta = [], torch.ones(2, requires_grad=True)
    phi = iopt.attach(torch.zeros(2), lambda p, t: (torch.tensor([1.0, -1.0]) * p * p).sum() - p @ t,
                      theta, on_solve=lambda _, s: heard.append(s))  # fmt: skip
    phi.sum().backward()
    constants = {"lam": 1.0, "smoothness": 1.0}
    assert iopt.error_bound(heard[0], **constants) == math.inf
    assert iopt.error_bound(heard[0], strong_convexity=1.0, **constants) == math.inf


def test_errors_name_the_argument_and_the_remedy():
    done = iopt.linear_solve(iopt.Dense(torch.eye(2)), torch.ones(2))
    good = {"lam": 1.0, "smoothness": 0.0}
    for name, value in (("lam", 0.0), ("lam", -1.0), ("lam", math.nan), ("smoothness", -1.0),
                        ("hessian_lipschitz", math.inf), ("strong_convexity", 0.0)):  # fmt: skip
        with pytest.raises(ValueError, match=f"Invalid {name}: .* finite and >"):
            iopt.error_bound(done, **(good | {name: value}))
    with pytest.raises(ValueError, match="as on_solve hears it"):
        iopt.error_bound(iopt.Solution(torch.ones(2), torch.tensor(0), {}), **good)
    assert math.isnan(iopt.error_bound(done, **good).item())  # no objective, no stationarity
