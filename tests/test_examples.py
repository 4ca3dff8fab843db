"""The examples run, say what they promise, and survive a kill."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from io import BytesIO
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


# -------------------------------------------------------------------------- Omniglot, and a kill

STEPS, DRAWINGS = 16, 3
# The script made small, run as it would be: a process of its own, warnings as errors.
OMNIGLOT = """
import functools
import omniglot
omniglot.ConvNet = functools.partial(omniglot.ConvNet, filters=8)
omniglot.QUERIES, omniglot.CHECKPOINT_EVERY, omniglot.VALIDATE_EVERY = 2, 3, 8
omniglot.main()
"""


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Two zips with the 964 + 659 characters of Omniglot, three tiny random drawings of each."""
    folder = tmp_path_factory.mktemp("omniglot")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("images_background", 964), ("images_evaluation", 659)):
        characters = (torch.rand(count, 1, 7, 7, generator=generator) < 0.5).byte()
        noise = (torch.rand(count, DRAWINGS, 7, 7, generator=generator) < 0.1).byte()
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as file:
            for c, character in enumerate(255 * (characters ^ noise)):
                for d, drawing in enumerate(character):
                    png = BytesIO()
                    Image.frombytes("L", (7, 7), bytes(drawing.flatten().tolist())).save(png, "png")
                    name = f"{part}/Alphabet/character{c:04}/{c:04}_{d}.png"
                    file.writestr(name, png.getvalue())
    return folder


def start_omniglot(data, out, log):
    options = {
        "--data": data, "--out": out, "--way": 2, "--tasks": 2, "--steps": STEPS,
        "--test-tasks": 20, "--device": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", OMNIGLOT]
    path = os.pathsep.join([str(EXAMPLES), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command + [str(word) for option in options.items() for word in option],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def finish(process, log):
    """Wait for the end of a run that should succeed; return what it said."""
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    text = Path(log.name).read_text()
    assert code == 0, text
    return text


def test_omniglot_killed_and_run_again_ends_as_if_nothing_had_happened(drawings, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with open(tmp_path / "whole.log", "w") as log:
        said = finish(start_omniglot(drawings, whole, log), log)
    assert "2-way 1-shot, 20 tasks of held-out characters" in said
    assert (whole / "learning_curve.png").stat().st_size > 10_000

    checkpoint = broken / "checkpoint.pt"
    with open(tmp_path / "first.log", "w") as log:
        process = start_omniglot(drawings, broken, log)
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
        said = finish(start_omniglot(drawings, broken, log), log)
    assert f" {done}/{STEPS} " in said and f" 0/{STEPS} " not in said  # it resumed

    one, two = (json.loads((out / "results.json").read_text()) for out in (whole, broken))
    assert len(one["loss"]) == STEPS
    for clock in ("seconds", "minutes"):
        one.pop(clock), two.pop(clock)
    assert one == two  # losses, validations, test accuracy: bit for bit
