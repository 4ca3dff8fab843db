"""The architecture, read from the folder list and the imports: one direction, no circles, small files.

A folder says in its docstring what it uses; the order of all, top first, is the table of
CONTRIBUTING.md, and the way of the data through them is the drawing below it.
"""

import ast
import graphlib
import importlib
import re
import sys
from pathlib import Path

import pytest

import implicit_optim

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "implicit_optim"
SOURCES = Path(implicit_optim.__file__).parent  # of the source tree, or of an installed wheel
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# Files and folders of the library, top first: an import goes down or stays inside.
ORDER = re.findall(r"^\| `(_\w+)/?` \|", GUIDE, re.MULTILINE)
BOTTOM = {"_torch", "_checks"}  # which all may use, and no folder needs to name
OPTIM, OPTIM_SEES = "optim", "_solver"  # torch.optim shells: see from there down, seen by nobody
TASKS = "tasks"  # episodes: see nothing of the library, seen by nobody
MAIN = "__main__"  # `python -m`: sees the face alone, seen by nobody, and it alone prints
APART = {OPTIM, TASKS, MAIN}

THIRD_PARTY = {"torch", "jaxtyping"}  # the run-time dependencies of pyproject.toml
TASKS_THIRD_PARTY = {*THIRD_PARTY, "torchvision", "PIL"}  # those of the extra `vision`

MAX_LINES_FILE = 300
MAX_LINES_LIBRARY = 5_300  # of code


def library() -> dict[str, str]:
    """Source of every module of the library by dotted name; a package is named `x.__init__`."""
    return {
        ".".join((PACKAGE, *path.relative_to(SOURCES).with_suffix("").parts)): path.read_text(
            "utf-8"
        )
        for path in sorted(SOURCES.rglob("*.py"))
    }


def unit(module: str) -> str:
    """First name under the package: `implicit_optim._solver.gd` -> `_solver`."""
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
    if sink not in ORDER:
        return f"there is no {sink} in the table of CONTRIBUTING.md"
    if source == OPTIM:
        upwards = ORDER.index(sink) < ORDER.index(OPTIM_SEES)
    else:
        upwards = ORDER.index(sink) < ORDER.index(source)
    return f"{source} must not import upwards, from {sink}" if upwards else None


def violations(sources: dict[str, str]) -> list[str]:
    """Everything in `sources` (dotted name -> source) that breaks the architecture."""
    found, graph = [], {}
    modules = set(sources)
    for module, source in sources.items():
        if not is_top(module) and unit(module) not in {*ORDER, *APART}:
            found.append(
                f"{file_of(module)}: in no layer; give `{unit(module)}` a row in the table of "
                "CONTRIBUTING.md, as low as its imports allow"
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
            for line in sorted(
                set(late_imports(tree)) if not is_top(module) else ()
            )  # it has `tasks`
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
    assert len(library()) > len(ORDER)  # they were found
    found = violations(library())
    assert not found, "\n" + "\n".join(found)


def uses(name: str) -> set[str]:
    """Files and folders of the library that one of them imports from."""
    sources = library()
    modules = set(sources)
    return {
        unit(target)
        for module, source in sources.items()
        if unit(module) == name
        for _, target in imports(module, ast.parse(source), modules)
        if target in modules and unit(target) != name
    }


def test_the_table_is_the_folder_list():
    there = {unit(m) for m in library() if not is_top(m)}
    assert sorted(there - APART) == sorted(ORDER)


def test_a_folder_says_what_it_uses():
    for name in ORDER:
        face = library().get(f"{PACKAGE}.{name}.__init__")
        if face is not None:
            _, _, told = ast.get_docstring(ast.parse(face)).partition("\n\n")
            named = set(re.findall(r"`(_\w+)`", told.partition(";")[0]))
            assert named == uses(name) - BOTTOM, f"{name}/__init__.py names what it does not use"


def test_a_face_shows_what_is_taken():
    """No folder re-exports a name that nobody outside of it imports."""
    taken: dict[str, set[str]] = {}
    for base in (SOURCES, ROOT / "tests"):
        for path in base.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    taken.setdefault(node.module, set()).update(a.name for a in node.names)
    for name in ORDER:
        face = library().get(f"{PACKAGE}.{name}.__init__")
        if face is not None:
            shown = {
                a.name
                for n in ast.walk(ast.parse(face))
                if isinstance(n, ast.ImportFrom)
                for a in n.names
            }
            assert shown <= taken[f"{PACKAGE}.{name}"], name


def test_the_drawing_is_true():
    """Each arrow of CONTRIBUTING.md's drawing is an import, and each name in it is in the table."""
    drawing = (
        GUIDE.partition("## The way of the data")[2].partition("```text")[2].partition("```")[0]
    )
    arrows = re.findall(r"(_\w+)(?= → (_\w+))", drawing)
    assert len(arrows) > 10
    for source, target in arrows:
        assert target in uses(source), f"{source} does not import {target}"


def test_private_names_of_torch_are_in_one_file():
    private = re.compile(
        r"torch\.(?:[a-z_.]*\.)?_(?!foreach_)\w+|from torch[\w.]* import .*\b_[a-z]\w+"
    )
    found = {
        f"{file_of(module)}:{number}: {line.strip()}"
        for module, source in library().items()
        if unit(module) != "_torch"
        for number, line in enumerate(source.splitlines(), 1)
        if private.search(line.replace("_torch.", "")) and f"{PACKAGE}." not in line
    }
    assert not found, "wrap it in _torch.py: " + "\n".join(sorted(found))


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


def test_public_names_are_there():
    names = public_names()
    assert len(set(names)) == len(names) < 75
    assert all(hasattr(implicit_optim, name) for name in names)


def test_withdrawn_names_say_what_to_write():
    assert not set(implicit_optim._WITHDRAWN) & set(public_names())
    for name, (value, instead) in implicit_optim._WITHDRAWN.items():
        with pytest.warns(DeprecationWarning, match=f"use {re.escape(instead)}"):
            assert getattr(implicit_optim, name) is value
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = implicit_optim.Nothing


def test_tasks_are_there_once_they_are_touched():
    assert implicit_optim.tasks.MLP is importlib.import_module("implicit_optim.tasks").MLP


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
    "implicit_optim._vectors": "import math\nimport torch.nn as nn\n",
    "implicit_optim._minimize": "from ._vectors import Flat\nfrom implicit_optim._solver import gd\n",
    "implicit_optim._solver.__init__": "from implicit_optim._solver.gd import gd\n",
    "implicit_optim._solver.gd": "from .. import _vectors\nfrom .rule import Rule\n",
    "implicit_optim._solver.rule": "from jaxtyping import Float\n",
    "implicit_optim.optim.__init__": "from implicit_optim._solver import gd\n",
    "implicit_optim.tasks.__init__": "from implicit_optim.tasks._draw import draw\n",
    "implicit_optim.tasks._draw": "import torchvision.datasets\n",
}

BAD = {
    "upwards": ("_vectors", "from implicit_optim._minimize import minimize", "upwards"),
    "upwards, relative": ("_vectors", "from ._solver.gd import gd", "upwards"),
    "upwards, import x.y": ("_vectors", "import implicit_optim._solver.gd", "upwards"),
    "upwards, for types": (
        "_vectors",
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
    "main goes round the face": ("__main__", "from ._vectors import Flat", "the face alone"),
    "prints": ("_vectors", "def f():\n    print('here')", "prints"),
    "torchvision": ("_minimize", "import torchvision", "only tasks/ may import torchvision"),
    "undeclared dependency": ("_minimize", "import numpy as np", "no run-time dependency"),
    "tasks see the core": ("tasks._draw", "from .._vectors import Flat", "knows nothing"),
    "optim sees above the solvers": ("optim._gd", "from .._implicit import attach", "upwards"),
    "late": ("_vectors", "def f():\n    import math", "inside a function"),
    "late, in a method": (
        "_vectors",
        "class A:\n    async def f(self):\n        from math import pi",
        "inside a function",
    ),
    "by a string": (
        "_vectors",
        "import importlib\nimportlib.import_module('implicit_optim._minimize')",
        "by a string",
    ),
    "undeclared module": ("_helpers", "", "give `_helpers` a row"),
    "circle": ("_solver.rule", "from implicit_optim._solver.gd import gd", "circle"),
    "circle through a package": (
        "_solver.rule",
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
