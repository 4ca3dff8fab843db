"""The commands that reproduce the paper's few-shot results: what is trained, judged and kept."""

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
from benchmarks.paper import curvatures, few_shot, summary  # noqa: E402
from few_shot_runs import SMALL, SPLIT, network  # noqa: E402
from implicit_optim.tasks import Episodes, Splits  # noqa: E402


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
