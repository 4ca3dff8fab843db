"""Every python block of the README and of the documentation runs as it stands."""

import inspect
import re
from pathlib import Path

import matplotlib
import pytest
import torch

import implicit_optim
import implicit_optim.tasks

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page, namespace):
    """The blocks of a page one after the other, sharing their names, as a reader would paste them."""
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)  # noqa: S102
    return namespace


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "tasks.md"], ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, {})


def test_readme_blocks_do_what_the_text_says():
    names = run(ROOT / "README.md", {})
    assert names["predictions"].shape == (25, 10, 1)
    # After 150 meta-steps the adapted network is far better than guessing zero all the time.
    zero = names["query"][1].square().mean()
    error = (names["predictions"] - names["query"][1]).square().mean()
    assert error < 0.25 * zero
    x, y, theta = (names[k].detach().double() for k in ("x", "y", "theta"))
    theta = theta.requires_grad_()
    phi = torch.linalg.solve(2 * x.T @ x / 20 + 2 * theta.exp() * torch.eye(3), 2 * x.T @ y / 20)
    (expected,) = torch.autograd.grad(phi.square().sum(), theta)
    torch.testing.assert_close(names["theta"].grad.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "package", [implicit_optim, implicit_optim.tasks], ids=lambda m: m.__name__
)
def test_every_public_class_and_function_has_an_example(package):
    public = {name: getattr(package, name) for name in package.__all__}
    documented = {n: o for n, o in public.items() if inspect.isclass(o) or inspect.isfunction(o)}
    assert len(documented) >= 10
    assert [n for n, o in documented.items() if ">>> " not in (inspect.getdoc(o) or "")] == []


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
