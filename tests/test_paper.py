"""The commands that reproduce the paper: their figures against NumPy, and a run that is killed."""

import argparse
import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

import implicit_optim as iopt  # noqa: E402
from benchmarks.paper import (  # noqa: E402
    curvatures,
    few_shot,
    fig2a,
    fig2b,
    summary,
    table1,
    table2,
    table3,
)
from benchmarks.paper.points import Points  # noqa: E402
from implicit_optim.tasks import ConvNet, Episodes, Splits  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------- the synthetic problem, by dense algebra


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


# ----------------------------------------------------------------------------- few-shot training

SMALL = few_shot.Settings(
    method="imaml-gd",
    way=2,
    shot=1,
    train_shot=1,
    queries=3,
    lam=0.5,
    inner_lr=0.1,
    inner_steps=4,
    cg_steps=3,
    curvature="gauss-newton",
    zero_head=True,
    tasks=4,
    steps=6,
    meta_lr=1e-2,
    cycles=1,
    validate_every=3,
    test_tasks=12,
    seed=0,
)


def noisy(classes, seed):
    """Random patterns of 8 x 8 with a tenth of their pixels flipped; 20 examples of each."""
    generator = torch.Generator().manual_seed(seed)
    patterns = (torch.rand(classes, 1, 1, 8, 8, generator=generator) < 0.5).byte()
    flips = (torch.rand(classes, 20, 1, 8, 8, generator=generator) < 0.1).byte()
    return 255 * (patterns ^ flips)


SPLIT = Splits(noisy(12, 0), noisy(8, 1), noisy(10, 2))


def network():
    torch.manual_seed(0)
    return ConvNet(2, image_size=8, filters=8, blocks=2)


@pytest.mark.parametrize("method", few_shot.METHODS)
def test_every_method_takes_its_own_meta_gradient(method, tmp_path):
    """The first meta-step is Adam's with the gradient that the method stands for."""
    s = dataclasses.replace(
        SMALL, method=method, train_shot=3 if method == "reptile" else 1, steps=1
    )
    results = few_shot.Run(s, SPLIT, network(), tmp_path).finish()
    model = network()
    support, query = Episodes(
        SPLIT.train, ways=2, shots=s.train_shot, queries=3, tasks=4, steps=1, seed=0
    ).sample()
    gd = iopt.gd(lr=0.1, max_steps=4)
    cg, gauss_newton = iopt.CG(max_steps=3), iopt.GaussNewton
    newton = iopt.newton_cg(max_steps=3, linear_solver=iopt.CG(max_steps=5), curvature=gauss_newton)
    solver, rule = {
        "imaml-gd": (gd, iopt.Implicit(cg, gauss_newton)),
        "imaml-hf": (newton, iopt.Implicit(cg, gauss_newton)),
        "maml": (gd, iopt.Unrolled()),
        "fomaml": (gd, iopt.FirstOrder()),
        "reptile": (gd, iopt.Reptile()),
    }[method]
    meta = iopt.MetaLearner(
        model, torch.nn.functional.cross_entropy, solver=solver, lam=0.5, meta_gradient=rule
    )
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = meta(support, query).mean()
    loss.backward()
    opt.step()
    assert results["loss"] == [pytest.approx(loss.item(), abs=1e-6)]
    assert len(results["truncated"]) == ("imaml" in method)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["meta"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(state[f"model.{name}"], p.detach(), rtol=0, atol=1e-6)


def test_training_helps_and_both_normalisations_are_judged(tmp_path):
    model = network()
    s = dataclasses.replace(SMALL, steps=30, validate_every=15, test_tasks=30)
    results = few_shot.Run(s, SPLIT, model, tmp_path).finish()
    assert [step for step, *_ in results["validation"]] == [15, 30]
    loss = results["loss"]
    assert sum(loss[20:]) < 0.85 * sum(loss[:10])
    assert results["transductive"]["accuracy"] > 60 < results["support only"]["accuracy"]
    assert results["transductive"] == dict(
        zip(
            ("accuracy", "interval_95"),
            few_shot.accuracy(model, s, SPLIT.test, s.test_tasks, s.seed + 2),
            strict=True,
        )
    )
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
    other = dataclasses.replace(s, lam=3.0)  # may not go on from there
    with pytest.raises(
        SystemExit, match=r"from a run with lam 0.5 \(now 3.0\): choose another --out"
    ):
        few_shot.Run(other, SPLIT, network(), tmp_path).finish()


@pytest.mark.parametrize("by_support", [True, False])
def test_without_query_statistics_a_query_image_is_judged_alone(by_support):
    model = network()
    torch.nn.init.normal_(model.head.weight)
    model = few_shot.normalised_by_support(model) if by_support else model
    meta = few_shot.learner(model, SMALL)
    support, (x, _) = Episodes(SPLIT.test, ways=2, shots=1, queries=5, tasks=3, seed=1).sample()
    with torch.no_grad():
        phi = meta.adapt(support)
        together, alone = meta.predict(phi, x), meta.predict(phi, x[:, :1])
    apart = (together[:, :1] - alone).abs().max()
    assert apart < 1e-5 if by_support else apart > 1e-2


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path):
    broken = Splits(SPLIT.train.float() * float("nan"), SPLIT.val, SPLIT.test)
    with pytest.raises(SystemExit, match="meta-step 0: the loss of 4 of 4 tasks is not finite"):
        few_shot.Run(SMALL, broken, network(), tmp_path).finish()


def test_a_task_that_diverges_counts_as_wrong_and_is_warned_of():
    images = SPLIT.test.float()
    images[4] = float("nan")
    shape = {"ways": 2, "shots": 1, "queries": few_shot.TEST_QUERIES, "tasks": 12}
    support, _ = Episodes(images, seed=1, **shape).sample()
    lost = support[0].flatten(1).isnan().any(1)
    assert 0 < lost.sum() < 12
    kept = Episodes(
        SPLIT.test.float(), seed=1, **shape
    ).sample()  # the same tasks, all of them whole
    model = network()
    meta = few_shot.learner(model, SMALL)
    with torch.no_grad():
        logits = meta.predict(meta.adapt(kept[0]), kept[1][0])
    hits = (logits.argmax(-1) == kept[1][1]).float().mean(-1) * ~lost
    with pytest.warns(
        UserWarning, match=f"{lost.sum()} tasks have predictions that are not finite"
    ):
        found, _ = few_shot.accuracy(model, SMALL, images, 12, 1)
    assert found == pytest.approx(100 * hits.mean().item(), abs=1e-3)


def test_the_summary_has_a_row_for_every_run_that_is_kept(tmp_path, capsys):
    rows = {}
    for method, steps in (("fomaml", 2), ("imaml-gd", 2), ("imaml-gd", 3)):
        name = f"omniglot-{method}-{steps}"
        s = dataclasses.replace(SMALL, method=method, steps=steps)
        rows[name] = few_shot.Run(s, SPLIT, network(), tmp_path / name).finish()
        if name != "omniglot-imaml-gd-3":  # which --keep puts there, without its losses
            (tmp_path / name / "results.json").rename(tmp_path / f"{name}.json")
    parser = argparse.ArgumentParser()
    summary.arguments(parser)
    capsys.readouterr()
    picture = tmp_path / "new" / "curves.png"
    keep = ["--keep", str(tmp_path / name / "results.json"), "imaml-gd-3"]
    summary.main(parser.parse_args(["--results", str(tmp_path), "--out", str(picture), *keep]))
    assert "loss" not in json.loads((tmp_path / f"{name}.json").read_text())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == 3 and picture.stat().st_size > 10_000
    order = ("omniglot-imaml-gd-2", "omniglot-fomaml-2", "omniglot-imaml-gd-3")
    for line, name in zip(lines, order, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = rows[name]["transductive"]
        assert cells[0] == few_shot.METHODS[rows[name]["settings"]["method"]]
        assert cells[3] == name[-1]
        assert cells[5] == f"{found['accuracy']:.2f} ± {found['interval_95']:.2f}"
    with pytest.raises(SystemExit, match="run table2"):
        summary.main(parser.parse_args(["--results", str(tmp_path / "new"), "--out", str(picture)]))


def test_curvatures_are_compared_and_nothing_is_run_twice(
    omniglot_zips, tmp_path, monkeypatch, capsys
):
    """A row for each pair with what its own run says."""
    settings, accuracy = curvatures.settings, few_shot.accuracy
    small = {"queries": 2, "way": 2, "inner_steps": 2}
    monkeypatch.setattr(
        curvatures, "settings", lambda args: dataclasses.replace(settings(args), **small)
    )
    monkeypatch.setattr(
        few_shot, "accuracy", lambda m, s, images, tasks, *rest: accuracy(m, s, images, 6, *rest)
    )
    monkeypatch.setattr(few_shot, "TEST_QUERIES", 2)
    monkeypatch.setattr(curvatures, "ConvNet", functools.partial(curvatures.ConvNet, filters=8))
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    curvatures.arguments(parser)
    words = ["--data", str(omniglot_zips), "--out", "runs", "--steps=3", "--tasks=2"]
    words += [
        "--test-tasks=20",
        "--lams",
        "0.5",
        "2",
        "--curvatures",
        "gauss-newton",
        "safeguarded",
    ]
    curvatures.main(parser.parse_args(words))
    rows = json.loads(Path("runs/curvatures.json").read_text())["rows"]
    assert [(r["lam"], r["curvature"]) for r in rows] == [
        (lam, kind) for lam in (0.5, 2.0) for kind in ("gauss-newton", "safeguarded")
    ]
    for r in rows:
        run = json.loads(Path(f"runs/{r['curvature']}-{r['lam']:g}/results.json").read_text())
        assert r["accuracy"] == run["transductive"]["accuracy"]
        assert r["negative"] == pytest.approx(sum(run["truncated"]) / 3)
        assert r["negative"] == 0 or r["curvature"] == "safeguarded"
        assert len(run["loss"]) == 3 and r["cpu_seconds"] > 0
    assert Path("runs/curvatures.png").stat().st_size > 1000
    monkeypatch.setattr(curvatures, "Run", None)  # would raise if it were called
    curvatures.main(parser.parse_args(words))
    assert "| 0.50 | gauss-newton |" in capsys.readouterr().out


# The command made small, run as it would be: a process of its own, warnings as errors.
STEPS = 10
COMMAND = """
import functools, runpy, sys
sys.modules["torchvision"] = None  # nothing here needs it, and its import takes a second
from benchmarks.paper import few_shot, table2
table2.ConvNet = functools.partial(table2.ConvNet, filters=8)
few_shot.CHECKPOINT_SECONDS, few_shot.TEST_QUERIES = 0, 2
runpy.run_module("benchmarks.paper", run_name="__main__")
"""


def words(out, **more):
    options = {
        "way": 2, "queries": 2, "tasks": 2, "steps": STEPS, "validate-every": 5, "test-tasks": 8,
        "inner-steps": 3,
        "device": "cpu", "out": out,
    }  # fmt: skip
    return ["table2", *(f"--{name}={value}" for name, value in (options | more).items())]


def start(out, log, **more):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", COMMAND, *words(out, **more)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        cwd=out.parent,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def finish(process, log):
    """Wait for the end of a run; return what it said."""
    try:
        ended = process.wait(timeout=300)
    finally:
        process.kill()
    text = Path(log.name).read_text()
    assert ended == 0, text
    return text


def undisturbed(out, data, monkeypatch, capsys):
    """The same run here, where all is imported already; return what it said."""
    monkeypatch.setattr(table2, "ConvNet", functools.partial(table2.ConvNet, filters=8))
    monkeypatch.setattr(few_shot, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(few_shot, "TEST_QUERIES", 2)
    monkeypatch.setattr(sys, "argv", ["paper", *words(out, data=data)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: another number would change the last bits
    try:
        runpy.run_module("benchmarks.paper", run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


def test_table2_killed_and_run_again_ends_as_if_nothing_had_happened(
    omniglot_zips, tmp_path, monkeypatch, capsys
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = functools.partial(start, data=omniglot_zips)
    said = undisturbed(whole, omniglot_zips, monkeypatch, capsys)
    assert "2-way 1-shot, iMAML, GD, 8 tasks of unseen classes" in said

    checkpoint = broken / "checkpoint.pt"
    with open(tmp_path / "first.log", "w") as log:
        process = run(broken, log)
        deadline = time.monotonic() + 300
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()  # SIGKILL: nothing can be tidied up
        process.wait()
    assert checkpoint.exists(), (tmp_path / "first.log").read_text()
    assert not (broken / "results.json").exists()  # it was killed on its way
    done = len(torch.load(checkpoint, weights_only=True)["history"]["loss"])
    assert 0 < done < STEPS

    with open(tmp_path / "second.log", "w") as log:
        said = finish(run(broken, log), log)
    assert f" {done}/{STEPS} " in said and f" 0/{STEPS} " not in said  # it resumed

    one, two = (json.loads((out / "results.json").read_text()) for out in (whole, broken))
    assert len(one["loss"]) == STEPS
    assert one.pop("minutes") > 0 < two.pop("minutes")
    assert one == two  # losses, validations, test accuracy: bit for bit


def test_table3_trains_on_the_tree_of_mini_imagenet(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    for part, classes in (("train", 4), ("val", 3), ("test", 3)):
        for c in range(classes):
            folder = tmp_path / "data" / part / f"n{part}{c}"
            folder.mkdir(parents=True)
            for i in range(5):
                color = tuple((60 * c + 7 * i + shift) % 256 for shift in (0, 80, 160))
                image.new("RGB", (40, 30), color).save(folder / f"{i}.png")
    monkeypatch.setattr(few_shot, "TEST_QUERIES", 2)
    words = "--way 2 --queries 2 --tasks 2 --steps 2 --test-tasks 4 --inner-steps 2 --device cpu"
    parser = argparse.ArgumentParser()
    table3.arguments(parser)
    out = tmp_path / "out"
    args = ["--data", tmp_path / "data", "--out", out, "--method", "fomaml", *words.split()]
    table3.main(parser.parse_args([str(word) for word in args]))
    said = capsys.readouterr()
    assert (
        "2-way 1-shot, first-order MAML, 4 tasks of unseen classes after 2 meta-steps" in said.out
    )
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["lam"] == 0.5 and len(results["loss"]) == 2
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["meta"]
    assert weights["model.head.weight"].shape == (2, 32 * 5 * 5)  # the paper's network at 84 x 84
