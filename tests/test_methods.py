"""Methods since the paper at equal time: rules with a memory against dense algebra, and the command."""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

import implicit_optim as iopt  # noqa: E402
from benchmarks.paper import few_shot, methods  # noqa: E402
from benchmarks.paper.quadratics import Quadratics  # noqa: E402
from few_shot_runs import SMALL, SPLIT, network  # noqa: E402
from implicit_optim.tasks import ConvNet, Episodes  # noqa: E402

# ------------------------------------------------------------------ AmIGO and SOBA by dense algebra


def quadratics():
    return Quadratics.make(3, torch.linspace(0.5, 6, 5, dtype=torch.float64), 2.0, seed=0)


def dense(q):
    """Per task A, the right-hand side of A phi = b, and v as a function of phi."""
    (x, y), (asked, target) = q.support, q.query
    A = x.mT @ x / 5 + q.lam * torch.eye(5, dtype=x.dtype)
    b = (x.mT @ y)[..., 0] / 5 + q.lam * q.theta
    v = lambda phi: (asked.mT @ (asked @ phi[..., None] - target))[..., 0] / 5  # noqa: E731
    return A, b, v


def times(A, x):
    return (A @ x[..., None])[..., 0]


def visit(q, rule, solver, pool):
    """The meta-gradient of the tasks that the pool draws, and which these are."""
    support, query = pool.sample()
    drawn = dataclasses.replace(q, support=support, query=query)
    return drawn.meta_gradient(solver, rule), pool.chosen


def test_amigo_and_soba_come_to_the_implicit_gradient_of_tasks_that_come_back():
    """Two of three tasks at a time, at a theta that stays where it is."""
    q = quadratics()
    A, b, v = dense(q)
    exact = q.lam * torch.linalg.solve(A, v(torch.linalg.solve(A, b)))
    few = iopt.gd(lr=1 / q.bounds[1], max_steps=4)
    for rule in (methods.Amigo, methods.Soba):
        pool = methods.Pool(q.support, q.query, tasks=2, seed=0)
        rule = rule(pool, 2) if rule is methods.Amigo else rule(pool)
        first = visit(q, rule, few, pool)
        for _ in range(75):
            gradient, chosen = visit(q, rule, few, pool)
        expected = exact[chosen].mean(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
        assert (first[0] - exact[first[1]].mean(0)).norm() > 0.01 * expected.norm()


def test_the_first_visits_of_amigo_and_soba_step_by_step():
    q = quadratics()
    A, b, v = dense(q)
    s = 1 / q.bounds[1]
    few = iopt.gd(lr=s, max_steps=4)

    pool = methods.Pool(q.support, q.query, tasks=3, seed=0)
    phi, w = q.theta.expand(3, -1), None
    for _ in range(2):
        gradient, chosen = visit(q, methods.Amigo(pool, 2), few, pool)
        for _ in range(4):
            phi = phi - s * (times(A, phi) - b)
        right = v(phi) / 3  # of the mean over the tasks
        w = right / q.lam if w is None else w
        r = right - times(A, w)
        w = w + (r * r).sum(1, keepdim=True) / (r * times(A, r)).sum(1, keepdim=True) * r
        torch.testing.assert_close(gradient, q.lam * w.sum(0))
        assert sorted(chosen) == [0, 1, 2]

    pool = methods.Pool(q.support, q.query, tasks=3, seed=0)
    phi, w = q.theta.expand(3, -1), None
    for _ in range(3):
        gradient, _ = visit(q, methods.Soba(pool), few, pool)
        right = v(phi) / 3
        w = right / q.lam if w is None else w
        torch.testing.assert_close(gradient, q.lam * w.sum(0))
        phi, w = phi - s * (times(A, phi) - b), w - s * (times(A, w) - right)


# ------------------------------------------------------------------------------------- the command


class Clock:
    """Every look at it is a second later than the last one: a meta-step takes one."""

    def __init__(self):
        self.now = 0.0

    def process_time(self):
        self.now += 1
        return self.now


@pytest.fixture
def seconds(monkeypatch):
    """Of such a clock; validation and test take four tasks."""
    accuracy = few_shot.accuracy
    monkeypatch.setattr(methods, "time", Clock())
    monkeypatch.setattr(
        methods, "accuracy", lambda m, s, images, tasks, *more: accuracy(m, s, images, 4, *more)
    )


class Lost(iopt.MetaGradient):
    def adapt(self, problem, start, solver, on_solve):
        return problem.layout.ravel(problem.theta[0]) * start * float("nan")


def timed(name, folder, seconds=1):
    s = dataclasses.replace(SMALL, cycles=0, steps=None, inner_steps=8, test_tasks=4)
    return methods.Timed(name, s, SPLIT, network(), folder, seconds, pool_size=6)


def slopes(meta, episode):
    loss = meta(*episode).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(meta.parameters()))])


@pytest.mark.parametrize(
    "name, factor, steps, rule",
    [
        ("soba", 1.0, 0, iopt.FirstOrder()),  # on a first visit phi is theta, w is v / lam
        ("truncated-1", 0.1 * 0.5, 8, iopt.FirstOrder()),
        ("neumann-5", 1.0, 8, iopt.Implicit(iopt.Neumann(max_steps=5, step=0.05))),
        ("cg-5-pool", 1.0, 8, iopt.Implicit()),
        ("first-order", 1.0, 8, iopt.Implicit(iopt.CG(max_steps=0))),
        ("shine", 1.0, None, methods.Shine()),
    ],
)
def test_a_method_takes_the_gradient_of_the_library_s_rule(name, factor, steps, rule, tmp_path):
    run = timed(name, tmp_path)
    episode = run.tasks.sample()
    run.meta.solver, run.meta.meta_gradient = run.plan(0)
    meta = few_shot.learner(network(), SMALL)
    lbfgs = iopt.lbfgs(max_steps=4, memory=5)
    meta.solver = lbfgs if steps is None else iopt.gd(lr=0.1, max_steps=steps)
    meta.meta_gradient = rule
    torch.testing.assert_close(
        slopes(run.meta, episode), factor * slopes(meta, episode), rtol=1e-4, atol=1e-6
    )
    pooled = name in methods.POOLED
    assert isinstance(run.tasks, methods.Pool if pooled else Episodes)


def test_a_run_takes_meta_steps_until_its_seconds_are_spent(seconds, tmp_path):
    results = timed("first-order", tmp_path, seconds=3).finish()
    model, losses = network(), []
    gd = iopt.gd(lr=0.1, max_steps=8)
    meta = iopt.MetaLearner(
        model,
        torch.nn.functional.cross_entropy,
        solver=gd,
        lam=0.5,
        meta_gradient=iopt.FirstOrder(),
    )
    opt = torch.optim.Adam(model.parameters(), lr=SMALL.meta_lr)
    for support, query in Episodes(
        SPLIT.train, ways=2, shots=1, queries=3, tasks=4, steps=3, seed=0
    ):
        loss = meta(support, query).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert results["loss"] == pytest.approx(losses, abs=1e-5)
    assert [at for at, *_ in results["validation"]] == [1, 2, 3]


def test_tolerances_of_hoag_tighten_together(tmp_path):
    plan = timed("hoag", tmp_path).plan
    levels = [(plan(k)[0].tol, plan(k)[1].linear_solver.rtol) for k in (0, 10, 500)]
    expected = [(0.5, 0.5), (0.5 * 0.98**10,) * 2, (0.05, 0.05)]
    assert levels == [pytest.approx(pair) for pair in expected]


def test_methods_are_compared_and_nothing_is_run_twice(
    omniglot_zips, seconds, tmp_path, monkeypatch, capsys
):
    settings, plan = methods.settings, methods.plan
    small = {"queries": 2, "way": 2, "inner_steps": 8}
    monkeypatch.setattr(
        methods, "settings", lambda args: dataclasses.replace(settings(args), **small)
    )
    monkeypatch.setattr(few_shot, "TEST_QUERIES", 2)
    monkeypatch.setattr(methods, "ConvNet", functools.partial(ConvNet, filters=8))
    lost = lambda name, s, pool: lambda step: (plan("moreau", s, pool)(step)[0], Lost())  # noqa: E731
    monkeypatch.setattr(
        methods, "plan", lambda name, *a: (lost if name == "moreau" else plan)(name, *a)
    )
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    methods.arguments(parser)
    words = f"--data {omniglot_zips} --out runs --seconds 1 --tasks 2 --pool 3 --test-tasks 4"
    words = [*words.split(), "--methods", "moreau", "amigo", "shine-refined"]
    methods.main(parser.parse_args(words))
    kept = json.loads(Path("runs/methods.json").read_text())
    rows = {row["method"]: row for row in kept["rows"]}
    assert kept["settings"]["seconds"] == 1 and list(rows) == words[-3:]
    assert rows["moreau"]["diverged"].startswith("meta-step 0: the loss of 2 of 2 tasks")
    for name, row in rows.items():
        if name != "moreau":
            assert (row["meta_steps"], row["cpu_seconds"], row["diverged"]) == (1, 1, None)
        assert (row["own_solver"] is None) == (name == "moreau")
    assert Path("runs/methods.png").stat().st_size > 5_000
    monkeypatch.setattr(methods, "Timed", None)  # would raise if it were called
    methods.main(parser.parse_args(words))
    assert "| Moreau envelope |" in capsys.readouterr().out
