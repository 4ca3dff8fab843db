"""The examples run and say what they promise."""

import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


# ------------------------------------------------------------------------------------- the demo


@pytest.fixture
def demo(monkeypatch):
    """The demo as a module, made small."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"TASKS": 8, "TEST_WAVES": 40, "TEST_STEPS": 6, "SCRATCH_STEPS": 6}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    with module.plt.rc_context():
        yield module
    torch.set_num_threads(threads)


def run_demo(demo, monkeypatch, capsys, out, *more):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out), *more])
    demo.main()
    return capsys.readouterr()


def table(text):
    """Each method's four numbers: error before, its half-width, error after, its half-width."""
    row = r"^(from scratch|first-order MAML|implicit MAML) +(\S+) \+- (\S+) +(\S+) \+- (\S+) +\d+ +\S+$"
    return {name: [float(v) for v in values] for name, *values in re.findall(row, text, re.M)}


def test_demo_prints_a_table_and_saves_a_picture(demo, monkeypatch, capsys, tmp_path):
    said = run_demo(demo, monkeypatch, capsys, tmp_path / "new" / "folder", "--steps", "30")

    rows = table(said.out)
    assert set(rows) == {"from scratch", "first-order MAML", "implicit MAML"}
    for before, before_half, after, after_half in rows.values():
        assert 0 < after < before < 25  # an amplitude is at most 5; NaN fails every comparison
        assert 0 < before_half < before and 0 < after_half < 3
    assert "Training waves with negative curvature (Gauss-Newton): 0.0 %" in said.out
    assert "30/30" in said.err  # the progress bar

    path = tmp_path / "new" / "folder" / "demo.png"
    assert f"Picture: {path}" in said.out
    with Image.open(path) as picture:
        width, height = picture.size
        assert width > 1500 and height > 500
        assert len(picture.convert("RGB").getcolors(10**7)) > 100  # not a blank sheet
    assert [p.name for p in path.parent.iterdir()] == ["demo.png"]


def test_demo_is_deterministic_for_a_seed(demo, monkeypatch, capsys, tmp_path):
    said = [
        run_demo(demo, monkeypatch, capsys, tmp_path, "--steps", "3", "--seed", seed).out
        for seed in ("1", "1", "2")
    ]
    assert said[0] == said[1] != said[2]


# ------------------------------------------------------------------------------------- Omniglot


def test_omniglot_learns_from_characters_and_judges_by_others(omniglot_zips, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("omniglot", EXAMPLES / "omniglot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = functools.partial(module.ConvNet, filters=8)
    for name, value in {"ConvNet": small, "WAYS": 2, "QUERIES": 2, "TASKS": 4}.items():
        monkeypatch.setattr(module, name, value)
    words = ["--data", omniglot_zips, "--steps", 20, "--test-tasks", 40, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["omniglot.py", *map(str, words)])
    module.main()
    said = capsys.readouterr()
    found = re.search(r"2-way 1-shot, 40 tasks of unseen characters: (\S+) \+- (\S+) %", said.out)
    mean, half = map(float, found.groups())
    assert 60 < mean <= 100 and half < 15  # guessing is 50
    assert "linear_solve" in said.out  # the report
    assert "20/20" in said.err
