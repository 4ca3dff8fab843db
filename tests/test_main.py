"""`python -m implicit_optim`: what a bug report needs, and nothing personal."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import implicit_optim
from implicit_optim import __main__ as report

SCRIPT = """
import os, runpy
if hasattr(os, "uname"):
    real = os.uname()
    os.uname = lambda: os.uname_result((real[0], "a-host-name", *real[2:]))
runpy.run_module("implicit_optim", run_name="__main__", alter_sys=True)
"""


def test_the_lines_of_a_fresh_process():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "USER": "a-user-name", "LOGNAME": "a-user-name"}
    text = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    ).stdout

    inter = torch.get_num_interop_threads()
    assert text.splitlines()[:6] == [
        f"implicit_optim: {implicit_optim.__version__}",
        f"jaxtyping: {metadata.version('jaxtyping')}",
        f"threads: 1 intra-op, {inter} inter-op",
        "default dtype: float32",
        "float32 matmul: highest",
        "deterministic: no",
    ]
    assert f"PyTorch version: {torch.__version__}" in text.splitlines()  # torch's own report
    assert any(line.startswith("GPU models and configuration:") for line in text.splitlines())
    personal = ["a-host-name", "a-user-name", Path.home(), Path.cwd(), sys.prefix, sys.executable]
    assert [p for p in map(str, personal) if len(p) > 1 and p in text] == []


def test_settings_are_those_of_the_process():
    precision = torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float64)  # the fixture of conftest.py puts it back
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    try:
        found = report.facts()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
    assert found["default dtype"] == "float64"
    assert found["float32 matmul"] == "high"
    assert found["deterministic"] == "yes"
