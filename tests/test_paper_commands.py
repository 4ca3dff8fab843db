"""The commands of tables 2 and 3 as they are run: killed and run again, and from a tree of images."""

import argparse
import functools
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from benchmarks.paper import few_shot, table2, table3  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

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
