"""`python -m implicit_optim`: what a bug report needs, aligned, and nothing personal."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
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

    rows = text.splitlines()
    (column,) = {len(row) - len(row[row.index("  ") :].lstrip()) for row in rows}
    said = {row[:column].strip(): row[column:] for row in rows}
    assert list(said)[:4] == ["implicit_optim", "python", "torch", "jaxtyping"]
    assert said["implicit_optim"] == implicit_optim.__version__
    assert said["python"].split()[0] == platform.python_version()
    assert said["torch"].split()[0] == torch.__version__
    built = "CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    assert torch.version.hip or said["torch"].endswith(f"(built for {built})")
    assert said["jaxtyping"] == metadata.version("jaxtyping")
    installed = {(d.metadata["Name"] or "").lower() for d in metadata.distributions()}
    for name in report.OPTIONAL:
        assert said.get(name) == (metadata.version(name) if name in installed else None)
    assert said["system"].startswith(platform.system())
    inter = torch.get_num_interop_threads()
    assert said["threads"] == f"1 intra-op, {inter} inter-op"
    assert said["device cpu"] == platform.machine()
    assert said["default dtype"] == "float32"
    assert said["float32 matmul"] == "highest"
    assert said["deterministic"] == "no"

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


@pytest.mark.parametrize("answer", ["555.42\n555.42\n", "", None])
def test_gpus(answer, monkeypatch):
    def nvidia_smi(command, **_):
        assert command[0] == "nvidia-smi"
        if answer is None:
            raise FileNotFoundError
        return subprocess.CompletedProcess(command, 0, answer)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, i))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Some GPU {i}")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", nvidia_smi)

    found = report.facts()
    driver = "555.42" if answer else "unknown"
    assert found["device cuda:1"] == f"Some GPU 1, capability 9.1, driver {driver}"
    assert found["device cuda:0"].startswith("Some GPU 0, capability 9.0")
    assert found["device mps"] == "available"


def test_a_package_that_is_not_there_has_no_line(monkeypatch):
    monkeypatch.setattr(report, "OPTIONAL", ("numpy", "no_such_package_at_all"))
    found = report.facts()
    assert "no_such_package_at_all" not in found and found["numpy"] == metadata.version("numpy")
