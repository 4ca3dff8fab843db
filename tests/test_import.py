"""What `import implicit_optim` brings in after torch: little, and nothing heavy."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
{line}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# What the run-time dependencies are made of, beside torch.
LIGHT = {"implicit_optim", "jaxtyping", "wadler_lindig", "typing_extensions", "numpy"}
# Parts of torch that `import torch` leaves for later, for a reason.
HEAVY = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.testing", "torch.distributed")


def brought_in_by(line):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(line=line)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def too_much(modules):
    roots = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    heavy = [m for m in modules for h in HEAVY if m == h or m.startswith(h + ".")]
    return sorted(roots - LIGHT - {"torch"}) + heavy


def test_the_import_brings_in_nothing_heavy():
    modules = brought_in_by("import implicit_optim")
    assert "implicit_optim._meta_learner.learner" in modules and "jaxtyping" in modules
    assert too_much(modules) == []
    assert not [m for m in modules if m.startswith("implicit_optim.tasks")]


def test_heavy_modules_would_be_seen():
    modules = [
        "math",
        "implicit_optim",
        "scipy.linalg",
        "torch._dynamo",
        "torch.onnx.ops",
        "torch._x",
    ]
    assert too_much(modules) == ["scipy", "torch._dynamo", "torch.onnx.ops"]
