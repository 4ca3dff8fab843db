"""The public API as `mypy --strict` sees it from a user's file."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path(__file__).with_name("typed_example.py")
WRONG = """
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import implicit_optim as iopt

iopt.MetaLearner(nn.Linear(1, 1), mse_loss)  # no solver
iopt.gd(lr="fast")
meta = iopt.MetaLearner(nn.Linear(1, 1), mse_loss, solver=iopt.gd(lr=0.1))
reveal_type(meta((torch.ones(1), torch.ones(1)), (torch.ones(1), torch.ones(1))))
meta(torch.ones(1))
"""


def test_strict_mypy_agrees_with_the_example_and_objects_to_mistakes(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG.lstrip(), encoding="utf-8")
    cache = ROOT / ".mypy_cache" / "user"
    # As in a user's project: no settings of ours. One run: mypy reads all of torch first.
    said, trouble, _ = api.run(
        ["--strict", "--config-file=", f"--cache-dir={cache}", str(EXAMPLE), str(wrong)]
    )
    assert trouble == ""
    found = [line.split("wrong.py:")[1] for line in said.splitlines() if "wrong.py:" in line]
    others = [line for line in said.splitlines()[:-1] if "wrong.py:" not in line]
    assert others == [], "\n" + said
    expected = {7: "[call-arg]", 8: "[arg-type]", 10: '"torch._tensor.Tensor"', 11: "[call-arg]"}
    for number, text in expected.items():
        assert any(f.startswith(f"{number}: ") and text in f for f in found), said
