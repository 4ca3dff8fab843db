"""Every python block of the README and of the documentation runs as it stands."""

import inspect
import re
from pathlib import Path

import matplotlib
import pytest
import torch

import implicit_optim
import implicit_optim.optim
import implicit_optim.tasks

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PACKAGES = [implicit_optim, implicit_optim.optim, implicit_optim.tasks]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page, namespace):
    """The blocks of a page one after the other, sharing their names, as a reader would paste them.

    One that needs torchvision, which the extra `test` does not have, is the last of its page.
    """
    for number, block in enumerate(blocks(page)):
        if "from torchvision" in block:
            pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)  # noqa: S102
    return namespace


# tasks.md reads data sets; the others have a test of their own, since.md in test_since.py.
ELSEWHERE = ("tasks.md", "README.md", "since.md")
RUNNING = [p for p in PAGES if blocks(p) and p.name not in ELSEWHERE]


@pytest.mark.parametrize("page", RUNNING, ids=lambda p: p.name)
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


# -- the reference ---------------------------------------------------------------------------------

TENSORS = re.compile(r"\b(Tensor|Vector|Scalars|Leaves|Episode|Batch)\b")
SHAPE = re.compile(r"\[[^\]]*\]|\bscalars?\b|\b0-d\b|\bnumbers?\b")


def test_the_reference_has_every_public_name():
    """A class of `optim` is there under the name that the package itself gives it."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: implicit_optim\.(\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown))
    names = set(implicit_optim.__all__)
    names |= {f"tasks.{name}" for name in implicit_optim.tasks.__all__}
    assert set(implicit_optim.optim.__all__) <= set(implicit_optim.__all__)
    assert names - set(shown) == set() and set(shown) - names == set()


def documented():
    """Public classes, functions and methods, by name."""
    for package in PACKAGES:
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{package.__name__}.{name}", thing
            for key, method in vars(thing).items() if inspect.isclass(thing) else ():
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method) and not key.startswith("_"):
                    yield f"{package.__name__}.{name}.{key}", method


def section(doc, title):
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)*)", f"{doc}\n", re.MULTILINE)
    return inspect.cleandoc(found[1]) if found else ""


def entries(doc):
    """What the sections Args and Attributes say, by name."""
    text = section(doc, "Args") + "\n" + section(doc, "Attributes")
    return dict(re.findall(r"^\*{0,2}(\w+): (.*(?:\n(?:[ ].*|))*)", text, re.MULTILINE))


def test_what_is_a_tensor_is_documented_with_its_shape():
    """`[*batch, n]` or "scalar", in every entry of Args and Returns whose annotation has tensors."""
    missing, seen = [], 0
    for name, thing in documented():
        doc = inspect.getdoc(thing) or ""
        if not (said := entries(doc)) and not section(doc, "Returns"):
            continue
        signature = inspect.signature(thing)
        types = {key: p.annotation for key, p in signature.parameters.items()}
        types |= getattr(thing, "__annotations__", {}) if inspect.isclass(thing) else {}
        types.pop("params", None)  # torch's own type of an optimizer's parameters
        tensors = [key for key in said if TENSORS.search(str(types.get(key, "")))]
        missing += [f"{name}: {key}" for key in tensors if not SHAPE.search(said[key])]
        returns = (
            section(doc, "Returns") if TENSORS.search(str(signature.return_annotation)) else ""
        )
        missing += [f"{name}: Returns"] if returns and not SHAPE.search(returns) else []
        seen += len(tensors) + bool(returns)
    assert seen >= 50
    assert missing == [], "\n".join(missing)
