"""The commands that reproduce the paper's synthetic results: their figures against NumPy."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from benchmarks.paper import fig2a, fig2b, table1  # noqa: E402
from benchmarks.paper.points import Points  # noqa: E402


class Dense:
    """One task of `Quadratics` in NumPy: nothing of the library, nothing of torch's algebra."""

    def __init__(self, problem, i):
        (x, y), (asked, target) = (
            [t[i].numpy() for t in pair] for pair in (problem.support, problem.query)
        )
        n = x.shape[1]
        self.theta, self.lam, self.eye = problem.theta.numpy(), problem.lam, np.eye(n)
        self.G = x.T @ x / n + self.lam * self.eye
        self.right = x.T @ y[:, 0] / n + self.lam * self.theta
        self.query = lambda phi: asked.T @ (asked @ phi - target[:, 0]) / n

    def exact(self):
        return self.lam * np.linalg.solve(self.G, self.query(np.linalg.solve(self.G, self.right)))

    def descent(self, steps):
        """Iterate and its Jacobian in theta, the product of the steps' matrices."""
        lr = 1 / np.linalg.eigvalsh(self.G)[-1]
        phi, jacobian = self.theta, self.eye
        for _ in range(steps):
            phi = phi - lr * (self.G @ phi - self.right)
            jacobian = (self.eye - lr * self.G) @ jacobian + lr * self.lam * self.eye
        return phi, jacobian

    def accelerated(self, steps):
        """The same of Nesterov's method, which hands back its look-ahead point."""
        mu, smooth = np.linalg.eigvalsh(self.G)[[0, -1]]
        momentum = (smooth**0.5 - mu**0.5) / (smooth**0.5 + mu**0.5)
        ahead = point = self.theta
        j_ahead = j_point = self.eye
        for _ in range(steps):
            new = ahead - (self.G @ ahead - self.right) / smooth
            j_new = j_ahead - (self.G @ j_ahead - self.lam * self.eye) / smooth
            ahead, point = new + momentum * (new - point), new
            j_ahead, j_point = j_new + momentum * (j_new - j_point), j_new
        return ahead, j_ahead

    def implicit(self, phi, cg_steps):
        """`lam G^-1 v` by so many steps of the recurrence of conjugate gradients."""
        r = self.query(phi)
        x, p = np.zeros_like(r), r
        for _ in range(cg_steps):
            a = r @ r / (p @ self.G @ p)
            x, new = x + a * p, r - a * self.G @ p
            p, r = new + (new @ new) / (r @ r) * p, new
        return self.lam * x

    def unrolled(self, phi, jacobian):
        return jacobian.T @ self.query(phi)

    def error(self, gradient):
        return np.linalg.norm(gradient - self.exact()) / np.linalg.norm(self.exact())


def test_fig2a_is_what_dense_algebra_says():
    problem = fig2a.problem(tasks=2, seed=3)
    seen = {name: [] for name in fig2a.RULES}
    for steps in fig2a.STEPS:
        found = {n: fig2a.errors(problem, steps, rule) for n, rule in fig2a.RULES.items()}
        for i in range(2):
            dense = Dense(problem, i)
            phi, jacobian = dense.descent(steps)
            expected = {"MAML": dense.error(dense.unrolled(phi, jacobian))} | {
                f"iMAML, {c} CG steps": dense.error(dense.implicit(phi, c)) for c in (2, 5, 20)
            }
            for name, value in expected.items():
                assert found[name][i] == pytest.approx(value, abs=1e-8), (name, steps)
        for name, values in found.items():
            seen[name].append(np.mean(values))
    maml, two, five, twenty = (dict(zip(fig2a.STEPS, v, strict=True)) for v in seen.values())
    assert all(five[k] < maml[k] for k in (4, 8, 16))  # what the paper says of its figure
    assert two[256] > 0.1 and two[256] > 0.9 * two[64]
    assert twenty[256] < 1e-6


@pytest.mark.parametrize("method", table1.METHODS)
def test_table1_counts_no_step_too_many_nor_too_few(method):
    kappa, accuracy = 20, 1e-3
    row = table1.measure(method, kappa, accuracy, seed=1)
    steps, products = row["inner steps"], row["products"]
    assert row["gradients"] == steps + 2 * products
    problem = table1.problem(kappa, seed=1)
    tasks = [Dense(problem, i) for i in range(table1.TASKS)]

    def error(steps, products):
        """Of the mean over the tasks."""
        exact = np.mean([t.exact() for t in tasks], 0)
        if method == "iMAML, AGD":
            found = [t.implicit(t.accelerated(steps)[0], products) for t in tasks]
        elif method == "truncated, GD":
            found = [truncated(t, steps, products) for t in tasks]
        else:
            run = Dense.descent if method == "MAML, GD" else Dense.accelerated
            found = [t.unrolled(*run(t, steps)) for t in tasks]
        return np.linalg.norm(np.mean(found, 0) - exact) / np.linalg.norm(exact)

    assert error(steps, products) <= accuracy
    fewer = 0.93  # counts are found to two per cent
    if method == "truncated, GD":
        assert error(steps, int(fewer * products)) > accuracy
    elif method == "iMAML, AGD":
        assert error(int(fewer * steps) - 1, products) > accuracy
        assert error(10 * steps, int(fewer * products) - 1) > accuracy / 2
    else:
        assert error(int(fewer * steps) - 1, 0) > accuracy


def truncated(task, steps, kept):
    """The graph of the last `kept` steps alone."""
    phi, _ = task.descent(steps)
    lr, jacobian = 1 / np.linalg.eigvalsh(task.G)[-1], 0 * task.eye
    assert kept < steps  # else theta's own step, the start, counts too
    for _ in range(kept):
        jacobian = (task.eye - lr * task.G) @ jacobian + lr * task.lam * task.eye
    return jacobian.T @ task.query(phi)


def test_fig2b_memory_is_flat_for_implicit_and_linear_for_maml():
    torch.manual_seed(0)
    work = fig2b.omniglot(1, 3, 2)
    one, four, seven = (fig2b.peaks(work, k) for k in (1, 4, 7))
    assert seven["iMAML"] < 1.03 * one["iMAML"]
    assert seven["first-order MAML"] < 1.03 * one["first-order MAML"]
    assert seven["MAML"] - four["MAML"] == pytest.approx(four["MAML"] - one["MAML"], rel=0.02)
    assert seven["MAML"] > 2 * one["MAML"]


def test_points_are_computed_once_and_belong_to_their_settings(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [0.1]

    first = Points(tmp_path, {"seed": 0}, ["a", "b"])
    assert first("a", make) == [0.1]
    again = Points(tmp_path, {"seed": 0}, ["a", "b"])  # as after a kill
    assert again.bar.n == 1
    assert again("a", make) == [0.1] and len(calls) == 1
    assert again("b", make) == [0.1] and len(calls) == 2
    with pytest.raises(SystemExit, match="choose another --out"):
        Points(tmp_path, {"seed": 1}, ["a"])
