"""The architecture, read from the imports: one direction, no circles, small files.

A new module of the library is declared in `LAYERS`, below; what the layers mean is in
CONTRIBUTING.md.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import implicit_optim

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "implicit_optim"
SOURCES = Path(implicit_optim.__file__).parent  # of the source tree, or of an installed wheel

# The layer of each module or subpackage. An import goes downwards or stays in its layer.
LAYERS = {
    "_evaluator": 0,
    "_hints": 0,
    "_kernels": 0,
    "_precision": 0,
    "_random": 0,
    "_autograd": 0,
    "_batch": 0,
    "_checks": 0,
    "_derivative": 0,
    "_flat": 0,
    "_loss": 0,
    "_masks": 0,
    "_module": 0,
    "_outputs": 0,
    "_replaced": 0,
    "_running_stats": 0,
    "_solution": 0,
    "_vectors": 0,
    "_error_bound": 1,
    "_inner_problem": 1,
    "_l1": 1,
    "_objective": 1,
    "_proximal": 1,
    "_quadratic": 1,
    "_query_loss": 1,
    "_report": 1,
    "_operator": 2,
    "_linear_solver": 3,
    "_linear_solve": 3,
    "_search": 4,
    "_strong_wolfe": 4,
    "_solver": 4,
    "_minimize": 4,
    "_implicit": 5,
    "_meta_gradient": 5,
    "_learner_checks": 6,
    "_meta_learner": 6,
}
OPTIM, OPTIM_SEES = "optim", 4  # torch.optim shells: see layers 0..4, seen by nobody
TASKS = "tasks"  # episodes: see nothing of the library, seen by nobody
MAIN = "__main__"  # `python -m`: sees the face alone, seen by nobody, and it alone prints
UNITS = {*LAYERS, OPTIM, TASKS, MAIN}

THIRD_PARTY = {"torch", "jaxtyping"}  # the run-time dependencies of pyproject.toml
TASKS_THIRD_PARTY = {*THIRD_PARTY, "torchvision", "PIL"}  # those of the extra `vision`

MAX_LINES_FILE = 300
MAX_LINES_LIBRARY = 5_750  # of code; 5,300 before the table of replaced functions


def library() -> dict[str, str]:
    """Source of every module of the library by dotted name; a package is named `x.__init__`."""
    return {
        ".".join((PACKAGE, *path.relative_to(SOURCES).with_suffix("").parts)): path.read_text(
            "utf-8"
        )
        for path in sorted(SOURCES.rglob("*.py"))
    }


def unit(module: str) -> str:
    """First name under the package: `implicit_optim._solver._gd` -> `_solver`."""
    return module.split(".")[1]


def is_top(module: str) -> bool:
    """Whether this is the `__init__` of the whole library, the re-exporter."""
    return unit(module) == "__init__"


def file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def imports(module: str, tree: ast.AST, modules: set[str]):
    """Yield (line, absolute dotted name) of all that `module` imports, wherever it does so."""

    def resolve(name: str) -> str:
        return f"{name}.__init__" if f"{name}.__init__" in modules else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, resolve(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # `from ..x import y` is relative to the package of this file
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                # `from package import name`: a submodule if there is one, an attribute if not.
                submodule = resolve(f"{base}.{alias.name}")
                yield node.lineno, submodule if submodule in modules else resolve(base)


def late_imports(tree: ast.AST):
    """Yield the line of every import inside a function, and of imports by a string."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in ast.walk(tree):
        if isinstance(node, functions):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Import, ast.ImportFrom)):
                    yield inner.lineno
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("__import__", "import_module"):
                yield node.lineno


def prints(tree: ast.AST):
    """Yield the line of every call of `print`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            yield node.lineno


def complaint(module: str, target: str) -> str | None:
    """Why `module` must not import `target`, or None if it may."""
    inside = target.split(".")[0] == PACKAGE
    source = unit(module)
    if not inside:
        root = target.split(".")[0]
        if root in sys.stdlib_module_names:
            return None
        if root == "torchvision" and source != TASKS:
            return f"only {TASKS}/ may import torchvision"
        if root not in (TASKS_THIRD_PARTY if source == TASKS else THIRD_PARTY):
            return f"{root} is no run-time dependency of the library"
        return None
    if target == PACKAGE or is_top(target):
        if source == MAIN:
            return None
        return f"the library does not import its own face; import the module of {PACKAGE} instead"
    sink = unit(target)
    if sink == TASKS and source != TASKS:
        return f"nothing imports {TASKS}"
    if sink == MAIN:
        return f"nothing imports {MAIN}"
    if is_top(module) or sink == source:
        return None
    if source == MAIN:
        return f"{MAIN} imports the face alone"
    if source == TASKS:
        return f"{TASKS}/ knows nothing of the library"
    if sink == OPTIM:
        return f"the core does not import {OPTIM}"
    if sink not in LAYERS:
        return f"there is no {sink} in LAYERS of tests/test_layers.py"
    highest = OPTIM_SEES if source == OPTIM else LAYERS[source]
    if LAYERS[sink] > highest:
        where = OPTIM if source == OPTIM else f"layer {LAYERS[source]}"
        return f"{where} must not import upwards, from layer {LAYERS[sink]}"
    return None


def violations(sources: dict[str, str]) -> list[str]:
    """Everything in `sources` (dotted name -> source) that breaks the architecture."""
    found, graph = [], {}
    modules = set(sources)
    for module, source in sources.items():
        if not is_top(module) and unit(module) not in UNITS:
            found.append(
                f"{file_of(module)}: in no layer; declare `{unit(module)}` in LAYERS of "
                "tests/test_layers.py, as low as its imports allow"
            )
            continue
        tree = ast.parse(source, filename=file_of(module))
        graph[module] = set()
        for line, target in imports(module, tree, modules):
            why = complaint(module, target)
            if why is not None:
                found.append(f"{file_of(module)}:{line}: imports {target}: {why}")
            if target in modules:
                graph[module].add(target)
        found += [
            f"{file_of(module)}:{line}: import inside a function or by a string; "
            "write it at the top of the file, and move code down a layer if that makes a circle"
            for line in sorted(set(late_imports(tree)))
        ]
        found += [
            f"{file_of(module)}:{line}: prints; a library warns, raises or returns"
            for line in prints(tree)
            if unit(module) != MAIN
        ]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("circle of imports: " + " <- ".join(error.args[1]))
    return found


# ----------------------------------------------------------------------------------- the library


def test_imports_go_one_way():
    assert len(library()) > len(UNITS)  # they were found
    found = violations(library())
    assert not found, "\n" + "\n".join(found)


def test_no_file_is_long():
    lines = {module: len(source.splitlines()) for module, source in library().items()}
    long = [f"{file_of(m)}: {n} lines" for m, n in lines.items() if n > MAX_LINES_FILE]
    assert not long, f"over {MAX_LINES_FILE} lines; split by idea: " + ", ".join(long)


def test_the_library_is_small():
    counted = {
        m: s for m, s in library().items() if unit(m) != TASKS
    }  # data is no part of the idea
    total = sum(lines_of_code(source) for source in counted.values())
    assert total < MAX_LINES_LIBRARY, f"{total} lines of code in {PACKAGE}/ without {TASKS}/"


def lines_of_code(source: str) -> int:
    """Lines that hold code: documentation, which is half of the library, may grow freely."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    ]
    in_docs = {line for d in docs for line in range(d.lineno, (d.end_lineno or 0) + 1)}
    return sum(
        1
        for number, line in enumerate(source.splitlines(), 1)
        if number not in in_docs and line.strip() and not line.strip().startswith("#")
    )


def public_names() -> list[str]:
    for node in ast.parse(library()[f"{PACKAGE}.__init__"]).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    pytest.fail(f"{PACKAGE}/__init__.py has no literal __all__")


def test_public_names_are_sorted():
    names = public_names()
    assert names == sorted(set(names)), f"sort __all__ of {PACKAGE}/__init__.py as sorted() does"


def test_public_names_are_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {line.removeprefix(f"::: {PACKAGE}.") for line in page.splitlines()}
    missing = [n for n in public_names() if not n.startswith("_") and n not in listed]
    assert not missing, f"list them under a heading of docs/api.md: {missing}"


# ----------------------------------------------------------------------- the checker checks itself

GOOD = {
    "implicit_optim.__init__": "from implicit_optim._minimize import minimize\n"
    "from implicit_optim.optim import GD\n",
    "implicit_optim.__main__": "import torch\nfrom implicit_optim import __version__\nprint(1)\n",
    "implicit_optim._flat": "import math\nimport torch.nn as nn\n",
    "implicit_optim._minimize": "from ._flat import Flat\nfrom implicit_optim._solver import gd\n",
    "implicit_optim._solver.__init__": "from implicit_optim._solver._gd import gd\n",
    "implicit_optim._solver._gd": "from .. import _flat\nfrom ._rule import Rule\n",
    "implicit_optim._solver._rule": "from jaxtyping import Float\n",
    "implicit_optim.optim.__init__": "from implicit_optim._solver import gd\n",
    "implicit_optim.tasks.__init__": "from implicit_optim.tasks._draw import draw\n",
    "implicit_optim.tasks._draw": "import torchvision.datasets\n",
}

BAD = {
    "upwards": ("_flat", "from implicit_optim._minimize import minimize", "upwards"),
    "upwards, relative": ("_flat", "from ._solver._gd import gd", "upwards"),
    "upwards, import x.y": ("_flat", "import implicit_optim._solver._gd", "upwards"),
    "upwards, for types": (
        "_flat",
        "import typing\nif typing.TYPE_CHECKING:\n    from ._minimize import minimize",
        "upwards",
    ),
    "core imports optim": ("_minimize", "from . import optim", "does not import optim"),
    "core imports tasks": ("_minimize", "from .tasks import draw", "nothing imports tasks"),
    "face imports tasks": ("__init__", "from . import tasks", "nothing imports tasks"),
    "own face": ("_minimize", "import implicit_optim", "own face"),
    "own face, by name": ("_minimize", "from implicit_optim import GD", "own face"),
    "core imports main": ("_minimize", "from . import __main__", "nothing imports __main__"),
    "face imports main": ("__init__", "from .__main__ import main", "nothing imports __main__"),
    "main goes round the face": ("__main__", "from ._flat import Flat", "the face alone"),
    "prints": ("_flat", "def f():\n    print('here')", "prints"),
    "torchvision": ("_minimize", "import torchvision", "only tasks/ may import torchvision"),
    "undeclared dependency": ("_minimize", "import numpy as np", "no run-time dependency"),
    "tasks see the core": ("tasks._draw", "from .._flat import Flat", "knows nothing"),
    "optim sees layer 5": ("optim._gd", "from .._implicit import attach", "upwards"),
    "late": ("_flat", "def f():\n    import math", "inside a function"),
    "late, in a method": (
        "_flat",
        "class A:\n    async def f(self):\n        from math import pi",
        "inside a function",
    ),
    "by a string": (
        "_flat",
        "import importlib\nimportlib.import_module('implicit_optim._minimize')",
        "by a string",
    ),
    "undeclared module": ("_helpers", "", "declare `_helpers` in LAYERS"),
    "circle": ("_solver._rule", "from implicit_optim._solver._gd import gd", "circle"),
    "circle through a package": (
        "_solver._rule",
        "from implicit_optim._solver import gd",
        "circle",
    ),
}


def test_checker_accepts_good():
    assert violations(GOOD) == []


@pytest.mark.parametrize("name", BAD)
def test_checker_catches(name):
    module, source, message = BAD[name]
    found = violations({**GOOD, f"{PACKAGE}.{module}": source})
    assert found, "not caught"
    assert message in "\n".join(found)
