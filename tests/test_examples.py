"""The examples run and say what they promise."""

import functools
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL.Image")

from implicit_optim.tasks import ConvNet  # noqa: E402
from scripts import assert_is_a_picture, example, run_main  # noqa: E402

# ------------------------------------------------------------------------------------- the demo


@pytest.fixture
def demo():
    small = {"TASKS": 8, "TEST_WAVES": 40, "TEST_STEPS": 6, "SCRATCH_STEPS": 6}
    with example("demo", **small) as module:
        yield module


def table(text):
    """Each method's four numbers: error before, its half-width, error after, its half-width."""
    row = r"^(from scratch|first-order MAML|implicit MAML) +(\S+) \+- (\S+) +(\S+) \+- (\S+) +\d+ +\S+$"
    return {name: [float(v) for v in values] for name, *values in re.findall(row, text, re.M)}


def test_demo_prints_a_table_and_saves_a_picture(demo, monkeypatch, capsys, tmp_path):
    said = run_main(demo, monkeypatch, capsys, tmp_path / "new" / "folder", "--steps", "30")

    rows = table(said.out)
    assert set(rows) == {"from scratch", "first-order MAML", "implicit MAML"}
    for before, before_half, after, after_half in rows.values():
        assert 0 < after < before < 25  # an amplitude is at most 5; NaN fails every comparison
        assert 0 < before_half < before and 0 < after_half < 3
    assert "30/30" in said.err  # the progress bar

    path = tmp_path / "new" / "folder" / "demo.png"
    assert f"Picture: {path}" in said.out
    assert_is_a_picture(path)


def test_demo_is_deterministic_for_a_seed(demo, monkeypatch, capsys, tmp_path):
    demo.TASKS, demo.TEST_WAVES = 2, 5
    said = [
        run_main(demo, monkeypatch, capsys, tmp_path, "--steps", "3", "--seed", seed).out
        for seed in ("1", "1", "2")
    ]
    assert said[0] == said[1] != said[2]


# ------------------------------------------------------------------------------- the learned lam


@pytest.fixture
def learned_lam():
    with example("learned_lam", CURVES=500) as module:
        yield module


def test_the_optimal_lam_gives_the_posterior_mean_and_the_bayes_risk(learned_lam):
    """The example's oracle against the textbook: Bayes' rule in dense algebra."""
    (x, y), _, truth = learned_lam.sample(500, torch.Generator().manual_seed(0))
    meta = learned_lam.learner(learned_lam.MEAN, learned_lam.BEST_LAM)
    phi = meta.adapt((x, y))["weight"].detach().numpy()
    mean, spread = learned_lam.MEAN.numpy(), learned_lam.SPREAD.numpy()
    basis = np.cos(np.pi / 2 * np.multiply.outer(x.numpy() + 1, np.arange(12)))
    at = np.cos(np.pi / 2 * np.multiply.outer(np.linspace(-1, 1, 101) + 1, np.arange(12)))
    risks = []
    for i in range(500):
        precision = basis[i].T @ basis[i] / 0.2**2 + np.diag(spread**-2)
        right = basis[i].T @ y[i].numpy() / 0.2**2 + mean / spread**2
        # One Newton step by 12 CG steps: float64 loses what the condition number of up to 1e4 takes.
        np.testing.assert_allclose(phi[i], np.linalg.solve(precision, right), rtol=1e-6, atol=1e-6)
        risks.append(np.einsum("gi,ij,gj->", at, np.linalg.inv(precision), at) / 101)
    error = learned_lam.errors(meta, (x, y), truth)
    # Given the points the expected error is the posterior variance: 500 draws of it, 4 standard errors.
    difference = error.numpy() - np.array(risks)
    assert abs(difference.mean()) < 4 * difference.std() / 500**0.5


def test_a_learned_vector_reaches_the_optimum_and_a_number_cannot(
    learned_lam, monkeypatch, capsys, tmp_path
):
    said = run_main(learned_lam, monkeypatch, capsys, tmp_path / "new" / "folder", "--steps", "100")
    names = r"^(best fixed number|learned number|learned vector|optimal)"
    rows = dict(re.findall(names + r" +(\S+) \+- \S+$", said.out, re.M))
    error = {name: float(value) for name, value in rows.items()}
    lines = re.findall(r"^ +((?:\d+\.\d+ *){12})$", said.out, re.M)  # one below each error
    lam = {name: np.array(v.split(), float) for name, v in zip(rows, lines, strict=True)}
    assert len(error) == len(lam) == 4

    # On the same curves, so the ratios have little noise. In expectation the best number's risk is 4.8
    # times the least; the vector was 5 % above the least after 100 steps, 0.1 % after 300.
    assert error["learned vector"] < 0.3 * error["best fixed number"]
    assert error["optimal"] < error["learned vector"] < 1.1 * error["optimal"]
    assert error["learned number"] < 1.05 * error["best fixed number"]

    # The best lam goes over three powers of ten. Those of the three fastest cosines, of which a curve
    # has next to nothing, matter least and are learned last. The grid of numbers has a factor 1.8.
    ratio = lam["learned vector"] / lam["optimal"]
    assert np.abs(np.log(ratio[:9])).max() < np.log(1.7) and np.abs(np.log(ratio)).max() < np.log(3)
    ratio = lam["learned number"] / lam["best fixed number"]
    assert np.abs(np.log(ratio)).max() < np.log(1.8)

    assert "100/100" in said.err

    path = tmp_path / "new" / "folder" / "learned_lam.png"
    assert f"Picture: {path}" in said.out
    assert_is_a_picture(path, width=1250, height=400)


def test_learned_lam_is_deterministic_for_a_seed(learned_lam, monkeypatch, capsys, tmp_path):
    learned_lam.CURVES, learned_lam.TASKS = 20, 4
    said = [
        run_main(learned_lam, monkeypatch, capsys, tmp_path, "--steps", "2", "--seed", seed).out
        for seed in ("1", "1", "2")
    ]
    assert said[0] == said[1] != said[2]


# ------------------------------------------------------------------------------------- Omniglot


def test_omniglot_learns_from_characters_and_judges_by_others(omniglot_zips, monkeypatch, capsys):
    small = functools.partial(ConvNet, filters=8)
    words = ["--data", omniglot_zips, "--steps", 20, "--test-tasks", 40, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["omniglot.py", *map(str, words)])
    with example("omniglot", ConvNet=small, WAYS=2, QUERIES=2, TASKS=4) as module:
        module.main()
    said = capsys.readouterr()
    found = re.search(r"2-way 1-shot, 40 tasks of unseen characters: (\S+) \+- (\S+) %", said.out)
    mean, half = map(float, found.groups())
    assert 60 < mean <= 100 and half < 15  # guessing is 50
    assert "linear_solve" in said.out  # the report
    assert "20/20" in said.err
