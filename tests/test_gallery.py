"""The examples of the gallery, made small: each shows what its page says, and its gradient is right."""

import re

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "tqdm", "PIL.Image", "sklearn"):
    pytest.importorskip(needed)

from scripts import assert_is_a_picture, example, run_main  # noqa: E402


def numbers(text, name):
    """The numbers of the last line of a table that begins with this name."""
    *_, line = re.findall(rf"^{re.escape(name)} +(.*)$", text, re.MULTILINE)
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", line)]


def assert_gradient(function, at, seed=0, eps=1e-4, rtol=1e-3):
    """A directional derivative by autograd equals the central difference."""
    at = at.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(at), at)
    step = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed)).to(at)
    with torch.no_grad():
        change = (function(at + eps * step) - function(at - eps * step)) / (2 * eps)
    np.testing.assert_allclose((grad * step).sum().item(), change.item(), rtol=rtol)
    assert change.abs() > 1e-6


def tight(module):
    """The example's inner solver, made as exact as finite differences need it."""
    cg = module.iopt.CG(rtol=1e-8, max_steps=300)
    return module.iopt.newton_cg(linear_solver=cg, tol=1e-9, max_steps=50)


def test_few_lines_learn(monkeypatch, capsys):
    with example("few_lines") as module:
        monkeypatch.setattr("sys.argv", ["few_lines.py", "--steps", "20"])
        module.main()
    said = capsys.readouterr()
    before, after = (numbers(said.out, f"{word} meta-training")[1] for word in ("before", "after"))
    assert 0 < after < 0.85 * before
    assert "20/20" in said.err and "minimize" in said.out


def test_newton_cg_overtakes_the_descents(monkeypatch, capsys, tmp_path):
    with example("newton_cg_inner", TASKS=3, NEWTON_STEPS=(2, 7), RATES=(0.1, 1.0)) as module:
        said = run_main(module, monkeypatch, capsys, tmp_path).out
    newton, accelerated, plain = (
        numbers(said, name) for name in ("Newton-CG", "accelerated descent", "gradient descent")
    )
    assert newton[0] == accelerated[0] == plain[0]  # gradient evaluations
    for column in (1, 2):  # the inner gradient; the error of the meta-gradient
        assert 0 <= newton[column] < 0.1 * accelerated[column] < accelerated[column] < plain[column]
    assert_is_a_picture(tmp_path / "newton_cg_inner.png", 900, 350)


def test_learned_decays_beat_a_search(monkeypatch, capsys, tmp_path):
    with example("hyperparameters") as module:
        said = run_main(module, monkeypatch, capsys, tmp_path, "--steps", "7").out
        generator = torch.Generator().manual_seed(0)
        module.SOLVER = tight(module)
        search = module.Search(*module.data(generator))
        assert_gradient(search, torch.full((module.GROUPS,), -4.0).double())
    learned = numbers(said, "implicit gradient, 17 decays")
    for name in ("grid, one decay", "random, 17 decays"):
        assert learned[0] < 0.97 * numbers(said, name)[0]
    assert_is_a_picture(tmp_path / "hyperparameters.png", 900, 350)


def test_learned_weights_find_wrong_labels(monkeypatch, capsys, tmp_path):
    with example("reweighting", TRAIN=400, CLEAN=50) as module:
        said = run_main(module, monkeypatch, capsys, tmp_path, "--steps", "15").out
        train, (x, y), *_ = module.data(0)
        module.SOLVER, start = tight(module), torch.zeros(65, 10).double()
        weight = torch.full((400,), 0.5).double()
        assert_gradient(
            lambda weight: module.F.cross_entropy(x @ module.fit(weight, *train, start), y), weight
        )
    (learned,), (unweighted,) = (
        numbers(said, name) for name in ("learned weights", "all training examples")
    )
    assert learned > unweighted + 5
    (auc,) = numbers(said, "AUC of the weights as a test for them:")
    assert 0.7 < auc <= 1
    assert_is_a_picture(tmp_path / "reweighting.png", 600, 350)


def test_learned_images_beat_the_class_means(monkeypatch, capsys, tmp_path):
    with example("distillation", DRAWS=2) as module:
        said = run_main(module, monkeypatch, capsys, tmp_path, "--steps", "25").out
        real, _ = module.gallery.digits(torch.Generator().manual_seed(0), 1000)
        images = torch.stack([real[0][real[1] == c].mean(0) for c in range(10)])
        module.SOLVER = tight(module)
        assert_gradient(lambda images: module.loss(module.fit(images), *real), images)
    learned, means = numbers(said, "learned images"), numbers(said, "class means")
    assert learned[0] > means[0] + 1 > numbers(said, "real images at random")[0] + 1
    assert_is_a_picture(tmp_path / "distillation.png", 700, 200)


def test_learned_features_beat_random_ones(monkeypatch, capsys, tmp_path):
    with example("ridge_head", TASKS=16, TEST=50) as module:
        run_main(module, monkeypatch, capsys, tmp_path, "--steps", "2")
        test = module.waves(10**6, 200, 50).sample()
        random = min(module.errors(module.RidgeHead(s), test).mean() for s in module.STRENGTHS)
        learner = module.train(module.RidgeHead(), 200, 0, "ridge")
        assert module.errors(learner, test).mean() < 0.5 * random
        torch.manual_seed(0)
        learner = module.RidgeHead().double()
        support, (x, y) = module.waves(0, tasks=3).sample()
        support, x, y = [part.double() for part in support], x.double(), y.double()

        def loss(strength):
            swapped = {"log_strength": strength}
            return (torch.func.functional_call(learner, swapped, (support, x)) - y).square().mean()

        assert_gradient(loss, learner.log_strength)
    assert_is_a_picture(tmp_path / "ridge_head.png", 900, 350)


def test_a_learned_loss_beats_the_best_huber_loss(monkeypatch, capsys, tmp_path):
    small = {"TASKS": 8, "TEST": 60, "DELTAS": torch.tensor([0.1, 0.3, 1.0]).double()}
    with example("learned_loss", **small) as module:
        said = run_main(module, monkeypatch, capsys, tmp_path, "--steps", "25").out
        noisy, clean, _ = module.sample(4, torch.Generator().manual_seed(0))
        module.SOLVER = tight(module)
        theta = torch.zeros(2 * len(module.HINGES)).double()
        assert_gradient(
            lambda theta: module.errors(module.fit(module.learned, theta, *noisy), *clean).mean(),
            theta,
        )
    names = "squared loss", "best Huber loss", "learned loss", "no outliers"
    squared, huber, learned, best = (numbers(said, name)[0] for name in names)
    assert best < learned < huber < 0.5 * squared
    assert_is_a_picture(tmp_path / "learned_loss.png", 900, 350)
