"""What is said in more than one place of the repository agrees: versions, targets, files."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import implicit_optim

ROOT = Path(__file__).resolve().parent.parent


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def only(pattern, name):
    """The one group of the one match in a file."""
    found = re.findall(pattern, text(name), re.MULTILINE)
    assert len(found) == 1, f"{name}: {pattern} found {found}"
    return found[0]


def oldest_torch():
    return only(r'^dependencies = \[.*"torch>=([\d.]+)"', "pyproject.toml")


def oldest_python():
    return only(r'^requires-python = ">=([\d.]+)"', "pyproject.toml")


def test_the_readme_names_the_oldest_torch_and_python():
    assert only(r"torch >= ([\d.]+)", "README.md") == oldest_torch()
    assert only(r"Python >= ([\d.]+)", "README.md") == oldest_python()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_takes_the_oldest_torch_from_pyproject():
    # Not as a part of the make that may be running these tests.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "test-oldest"]
    said = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert set(re.findall(r"\btorch==([\w.]+)", said)) == {oldest_torch()}
    assert oldest_torch() not in text("Makefile"), "it is written in pyproject.toml alone"


def test_nothing_has_an_upper_bound():
    dependencies = re.findall(r'"([\w\[\],-]+)([<>=~!][^"]*)"', text("pyproject.toml"))
    assert ("torch", f">={oldest_torch()}") in dependencies
    assert [d for d in dependencies if re.search(r"<|==|~=", d[1])] == []


def test_the_workflow_runs_targets_that_exist_from_the_oldest_python_on():
    workflow = ".github/workflows/test.yml"
    targets = only(r"target: \[(.*)\]", workflow).split(", ")
    assert {"lint", "test", "docs", "test-oldest"} <= set(targets)
    assert set(targets) <= set(re.findall(r"^([a-z-]+):.*## ", text("Makefile"), re.MULTILINE))
    assert only(r"python: \[(.*)\]", workflow).split(", ")[0] == f'"{oldest_python()}"'


def test_the_citation_has_this_version():
    assert only(r"^version: (.*)$", "CITATION.cff") == implicit_optim.__version__


def test_the_bug_report_asks_for_a_command_that_exists():
    module = only(r"`python -m (\w+)`", ".github/ISSUE_TEMPLATE/bug.yml")
    assert module == "implicit_optim"
    assert (Path(implicit_optim.__file__).parent / "__main__.py").exists()
