"""How the tests of the examples load, run and look at them."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@contextmanager
def example(name, **small):
    """An example as a module, made small; the threads and the style that it sets are put back."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))  # where a script finds what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    for constant, value in small.items():
        assert hasattr(module, constant)
        setattr(module, constant, value)
    threads = torch.get_num_threads()
    try:
        with plt.rc_context():
            yield module
    finally:
        torch.set_num_threads(threads)


def run_main(module, monkeypatch, capsys, out, *more):
    monkeypatch.setattr(sys, "argv", ["example.py", "--out", str(out), *more])
    module.main()
    return capsys.readouterr()


def assert_is_a_picture(path, width=1400, height=450):
    with Image.open(path) as picture:
        found = picture.size
        assert found[0] > width and found[1] > height
        assert len(picture.convert("RGB").getcolors(10**7)) > 100  # not a blank sheet
    assert [p.name for p in path.parent.iterdir()] == [path.name]
