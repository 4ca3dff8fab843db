"""Many processes by the real torchrun: as one, uneven shares, a rank that dies or hangs, FSDP.

Starting three processes takes longer than what they compute, so one launch makes all checks of
`ranks.py`, and the tests look at its figures. Rank 1 dies when it has made them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
ROOT = Path(__file__).resolve().parent.parent
STEPS = ranks.STEPS + 2


def torchrun(*words):
    """Two ranks on a free port. Nothing may hang: the limit is for the busiest of machines."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "tests" / "ranks.py"), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def launch(folder):
    return torchrun("checks", folder, STEPS)


@pytest.fixture(scope="module")
def figures(launch, folder):
    path = folder / "figures.json"
    assert path.exists(), launch.stderr[-4000:]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found) == set(ranks.CHECKS)
    print(json.dumps(found, indent=1))
    return found


def test_two_ranks_are_one_process(figures):
    """With a learned lam, a frozen layer, an unused parameter and a buffer; after four meta-steps."""
    unused, *weights, lam = figures["moved"]
    assert min(weights) > 0.02 and unused == 0 and lam > 0.02  # there is something to compare
    assert figures["even"] < 1e-10
    assert figures["accumulated"] < 1e-10


def test_uneven_shares_need_weights(figures):
    assert figures["uneven"] < 1e-10
    assert figures["uneven, mean of means"] > 1e-3  # three tasks and two, as if they were as many


def test_ddp_broadcasts_buffers_and_every_rank_warns_of_its_own_tasks(figures):
    assert figures["buffers"] == pytest.approx([0.1, 0.1])
    assert figures["warned"] == [[], ["SolveWarning"]]


def test_a_learned_lam_without_a_gradient_is_an_unused_parameter_of_ddp(figures):
    assert "find_unused_parameters=True" in figures["first order"]
    assert figures["first order, find unused"] < 1e-10


@pytest.mark.parametrize("name", ["fixed lam", "vector lam", "first order", "unrolled"])
def test_a_sharded_learner_is_one_process(figures, name):
    assert figures[f"fsdp, {name}"] < 1e-10


def test_a_sharded_learner_adapts_and_predicts(figures):
    assert figures["fsdp, adapt and predict"] < 1e-12


def test_what_fsdp_cannot(figures):
    """A scalar lam is torch's own limit; left out, it is learned from one rank's tasks alone."""
    assert "ValueError: fully_shard doesn't support scalar parameters" in figures["fsdp, number"]
    assert figures["fsdp, lam left out"] > 1e-3
    for name in ("inside", "adapt unregistered"):
        message = figures[f"fsdp, {name}"]
        assert message.startswith("TypeError: phi['unused'] is sharded (a DTensor)")
        assert "fully_shard(meta)" in message and "register_fsdp_forward_method" in message


@pytest.mark.parametrize("solver", ["CG", "MINRES"])
def test_a_sharded_solve_is_that_of_one_process(figures, solver):
    """Each rank holds half of every vector, and nothing travels that is as long as one."""
    phi, gradient, share, largest = figures[f"sharded, {solver}"]
    assert max(phi, gradient) < 1e-10
    assert share == 0.5
    assert largest <= 16  # the predictions; a half is 2000 numbers


def test_conjugate_gradients_on_the_shards_of_a_network(figures):
    assert figures["sharded, network"] < 1e-10


# -- the example -----------------------------------------------------------------------------------


def assert_stopped(ran, said, symptom, step, path):
    """With that symptom, on its way to the second checkpoint after the last one there."""
    assert ran.returncode != 0
    assert re.search(symptom, ran.stderr), ran.stderr[-4000:]
    assert "ChildFailedError" in ran.stderr
    assert f"step {step:4}:" in said and f"step {step + 2:4}:" not in said
    assert torch.load(path, weights_only=True)["step"] == step


def test_a_rank_that_dies_or_hangs_stops_the_run_and_the_same_command_goes_on(
    launch, folder, figures
):
    path = folder / "run.pt"
    # Before it was killed, the same processes made an undisturbed run.
    before, after = launch.stdout.split(f"step {STEPS:4}:")
    assert "step    2:" in before
    assert_stopped(launch, after, r"exitcode *: -9", 2, path)
    ran = torchrun("hangs", folder, STEPS)
    assert_stopped(ran, ran.stdout, "Timed out waiting 5000ms", 4, path)

    last = torchrun("train", folder, STEPS)
    assert last.returncode == 0, last.stderr[-4000:]
    assert "step    6:" in last.stdout and "step    4:" not in last.stdout
    assert not list(folder.glob("*.part"))

    ours, whole = (torch.load(folder / f"{n}.pt", weights_only=True) for n in ("run", "whole"))
    assert ours["step"] == whole["step"] == STEPS
    assert ours["meta"].keys() == whole["meta"].keys()
    assert all(torch.equal(t, whole["meta"][name]) for name, t in ours["meta"].items())
    assert torch.equal(ours["episodes"]["generator"], whole["episodes"]["generator"])


def test_the_example_is_one_process(folder, figures):
    """Its loop on two ranks against a plain loop here."""
    torch.set_default_dtype(torch.float64)
    module = ranks.example()
    meta = module.learner(0)
    opt = torch.optim.Adam(meta.parameters(), lr=module.META_LR)
    shots = {"shots": module.SHOTS, "queries": module.SHOTS}
    for episode in module.sinusoids(tasks=module.TASKS, seed=0, steps=STEPS, **shots):
        opt.zero_grad()
        meta(*episode).mean().backward()
        opt.step()
    found = torch.load(folder / "whole.pt", weights_only=True)["meta"]
    worst = max((found[name] - t).abs().max().item() for name, t in meta.state_dict().items())
    print(f"examples/distributed.py on two ranks and in one process differ by {worst:.1e}")
    assert worst < 1e-10
    assert (found["proximal.lam"] - torch.tensor(0.5).log()).abs() > 0.02
