"""What each process of test_distributed.py runs under torchrun.

ranks.py checks OUT STEPS    figures of all checks, as OUT/figures.json; then rank 1 is killed
ranks.py train OUT STEPS     examples/distributed.py, small and in float64
ranks.py hangs OUT STEPS     the same; rank 1 hangs
"""

import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.modules["torchvision"] = None  # nothing here needs it, and its import takes a second

import implicit_optim as iopt  # noqa: E402
from implicit_optim.tasks import MLP, sinusoids  # noqa: E402

TASKS, STEPS = 5, 4
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name="distributed", **small):
    """An example as a module, made small."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = small or {"TASKS": TASKS, "SAVE_EVERY": 2}
    for constant, value in small.items():
        assert hasattr(module, constant)
        setattr(module, constant, value)
    return module


# -- what is compared with one process -------------------------------------------------------------


class Net(nn.Module):
    """With a frozen layer, a parameter that nothing depends on, and a buffer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(1, 8).requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, x):
        return self.layers(torch.tanh(self.frozen(x))) + self.shift


def learner(lam=0.5, net=Net, **settings):
    torch.manual_seed(0)
    rule = iopt.Implicit(iopt.CG(max_steps=5), curvature=iopt.GaussNewton)
    solver = iopt.newton_cg(max_steps=3, curvature=iopt.GaussNewton)
    settings = {"solver": solver, "meta_gradient": rule} | settings
    return iopt.MetaLearner(net(), F.mse_loss, lam=lam, **settings)


def learned():
    return iopt.Proximal(0.5, learned=True)


def vector():
    return iopt.Proximal(torch.full((n_adapting(),), 0.5), learned=True)


def n_adapting():
    return sum(p.numel() for p in learner().anchor().values())


def episodes(tasks):
    return sinusoids(tasks=tasks, shots=6, queries=6, seed=3, steps=STEPS)


def mine(episode, parts=None):
    """This rank's tasks; or a part of them all."""
    part, parts = (dist.get_rank(), dist.get_world_size()) if parts is None else parts
    return [[t.tensor_split(parts)[part] for t in batch] for batch in episode]


def alone(meta, tasks):
    """One process, plainly."""
    opt = torch.optim.Adam(meta.parameters(), lr=0.02)
    for episode in episodes(tasks):
        opt.zero_grad()
        meta(*episode).mean().backward()
        opt.step()
    return meta


def together(meta, tasks, loss, through):
    opt = torch.optim.Adam(meta.parameters(), lr=0.02)
    for episode in episodes(tasks):
        opt.zero_grad()
        loss(through(*mine(episode))).backward()
        opt.step()
    return meta


def weighted(losses):
    return losses.sum() * dist.get_world_size() / TASKS


def whole(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def difference(ours, theirs):
    """The largest of all parameters, on all ranks."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    worst = torch.stack([(whole(p) - q.detach()).abs().max() for p, q in pairs]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def ddp(tasks, loss, lam=learned, settings=None, options=None):
    settings, options = settings or {}, options or {}
    meta = learner(lam(), **settings)
    together(meta, tasks, loss, DistributedDataParallel(meta, **options))
    reference = alone(learner(lam(), **settings), tasks)
    return difference(meta, reference)


def fsdp(lam, settings=None, **options):
    settings = settings or {}
    meta = learner(lam(), **settings)
    fully_shard(meta, **options)
    assert all(hasattr(p, "placements") for p in meta.parameters())  # sharded
    together(meta, TASKS, weighted, meta)
    return difference(meta, alone(learner(lam(), **settings), TASKS))


def fsdp_lam_left_out():
    """Nothing averages a parameter that FSDP is told to ignore."""
    meta = learner(learned())
    fully_shard(meta, ignored_params={meta.proximal.lam})
    together(meta, TASKS, weighted, meta)
    return difference(meta, alone(learner(learned()), TASKS))


def fsdp_adapt_and_predict():
    meta, reference = learner(), learner()
    fully_shard(meta)
    for name in ("adapt", "predict"):
        register_fsdp_forward_method(meta, name)
    support, (x, _) = mine(episodes(TASKS).sample())
    with torch.no_grad():
        ours = meta.predict(meta.adapt(support), x)
        return (ours - reference.predict(reference.adapt(support), x)).abs().max().item()


def moved():
    """How far each adapting parameter and lam went, so that there is something to compare."""
    start, end = learner(learned()), alone(learner(learned()), TASKS)
    pairs = zip(start.parameters(), end.parameters(), strict=True)
    return [(p - q).abs().max().item() for p, q in pairs if q.requires_grad]


def accumulated():
    """Two micro-batches of each rank's tasks, averaged over the ranks with the second alone."""
    meta = learner(learned())
    model = DistributedDataParallel(meta)
    opt = torch.optim.Adam(meta.parameters(), lr=0.02)
    for episode in episodes(8):
        opt.zero_grad()
        first, second = (mine(mine(episode), (i, 2)) for i in range(2))
        with model.no_sync():
            (model(*first).sum() / 4).backward()
        (model(*second).sum() / 4).backward()
        opt.step()
    return difference(meta, alone(learner(learned()), 8))


def buffers():
    """Rank 0's are everybody's, before the first call."""
    meta = learner()
    meta.model.shift += dist.get_rank()
    DistributedDataParallel(meta)(*mine(episodes(TASKS).sample()))
    gathered = [torch.empty(()) for _ in range(2)]
    dist.all_gather(gathered, meta.model.shift)
    return [shift.item() for shift in gathered]


def warned():
    """Ranks that warned, where the tasks of rank 1 alone fail."""
    meta = learner(net=lambda: MLP(1, (4,), 1), solver=iopt.gd(lr=0.1, max_steps=1, tol=1e-9))
    (x, y), query = mine(episodes(TASKS).sample())
    with torch.no_grad():
        y = meta.model(x) + dist.get_rank()
    model = DistributedDataParallel(meta)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model((x, y), query).mean().backward()
    gathered = [None, None]
    dist.all_gather_object(gathered, [w.category.__name__ for w in heard])
    return gathered


def said(call):
    """The error of a call."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def inside_sharded():
    meta = learner()
    fully_shard(meta.model)
    meta(*mine(episodes(TASKS).sample()))


def first_order(**options):
    return ddp(TASKS, weighted, settings={"meta_gradient": iopt.FirstOrder()}, options=options)


def adapt_unregistered():
    meta = learner()
    fully_shard(meta)
    meta.adapt(mine(episodes(TASKS).sample())[0])


# -- vectors in shards -----------------------------------------------------------------------------


class Travelling(TorchDispatchMode):
    """The number of elements of the largest tensor that a collective takes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace.startswith("_c10d_functional") and "wait" not in str(func):
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


def sharded_solve(solver):
    """Errors of phi and of theta's gradient, this rank's share of phi, and what travelled at most."""
    module = example("sharded", FEATURES=4000)
    place = module.sharded(dist.init_device_mesh("cpu", (2,)))
    with Travelling() as travelling:
        found = module.linear(place, solver)
    reference = module.linear(module.whole, solver)
    pairs = zip(found, reference, strict=True)
    errors = [(a.full_tensor() - b).abs().max().item() for a, b in pairs]
    return [*errors, found[0].to_local().numel() / 4000, travelling.largest]


def sharded_network():
    """Error of a solve with the Hessian of a network in shards, against the dense Hessian's."""
    module = example("sharded", HIDDEN=6)
    layers = module.network(module.sharded(dist.init_device_mesh("cpu", (2,))))
    found = torch.cat([layer.full_tensor().reshape(-1) for layer in layers])
    x, y = module.draw(module.EXAMPLES, 8, seed=5), module.draw(module.EXAMPLES, seed=6)
    start = torch.cat([module.draw(48, seed=7) / 3, module.draw(6, seed=8) / 6])
    b = torch.cat([module.draw(48, seed=9), module.draw(6, seed=10)])

    def loss(flat):
        return F.mse_loss(torch.tanh(x @ flat[:48].reshape(6, 8).mT) @ flat[48:], y)

    dense = torch.func.hessian(loss)(start) + module.LAM * torch.eye(54)
    return (found - torch.linalg.solve(dense, b)).abs().max().item()


FIRST_ORDER = {"meta_gradient": iopt.FirstOrder()}
UNROLLED = {"meta_gradient": iopt.Unrolled(), "solver": iopt.gd(lr=0.05, max_steps=4)}
CHECKS = {
    "moved": moved,
    "even": lambda: ddp(4, torch.mean),
    "uneven": lambda: ddp(TASKS, weighted),
    "uneven, mean of means": lambda: ddp(TASKS, torch.mean),
    "accumulated": accumulated,
    "buffers": buffers,
    "warned": warned,
    "first order": lambda: said(first_order),
    "first order, find unused": lambda: first_order(find_unused_parameters=True),
    "fsdp, fixed lam": lambda: fsdp(lambda: 0.5),
    "fsdp, vector lam": lambda: fsdp(vector, reshard_after_forward=True),
    "fsdp, first order": lambda: fsdp(lambda: 0.5, FIRST_ORDER),
    "fsdp, unrolled": lambda: fsdp(vector, UNROLLED),
    "fsdp, lam left out": fsdp_lam_left_out,
    "fsdp, adapt and predict": fsdp_adapt_and_predict,
    "fsdp, number": lambda: said(lambda: fully_shard(learner(learned()))),
    "fsdp, inside": lambda: said(inside_sharded),
    "fsdp, adapt unregistered": lambda: said(adapt_unregistered),
    "sharded, CG": lambda: sharded_solve(iopt.CG(rtol=1e-12)),
    "sharded, MINRES": lambda: sharded_solve(iopt.MINRES(rtol=1e-12)),
    "sharded, network": sharded_network,
}


def checks(out, steps):
    out = Path(out)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    figures = {name: check() for name, check in CHECKS.items()}
    # Without an interruption, by the example's own loop.
    example().train(int(steps), 0, out / "whole.pt", torch.device("cpu"))
    if dist.get_rank() == 0:
        (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    # Rank 1 dies here, in the processes that are there: to start others takes longer.
    module = fourth(lambda: os.kill(os.getpid(), signal.SIGKILL), example())
    module.train(int(steps), 0, out / "run.pt", torch.device("cpu"))


# -- the example, undisturbed and not --------------------------------------------------------------


def train(out, steps, module=None):
    module = module or example()
    sys.argv = ["distributed.py", "--out", out, "--steps", steps]
    module.main()


def fourth(act, module):
    """Rank 1 does that in its fourth step.

    It has then been through a step with rank 0 that came after a checkpoint: the file is there.
    """
    share, calls = module.share, []

    def hit(*args):
        calls.append(args)
        if os.environ["RANK"] == "1" and len(calls) == 4:
            act()
        return share(*args)

    module.share = hit
    return module


def hangs(out, steps):
    """Who waits for rank 1 waits 5 seconds: both begin together, after all that torch imports late."""
    module = fourth(lambda: time.sleep(600), example())
    module.TIMEOUT = timedelta(seconds=5)
    opt = torch.optim.Adam(module.learner(0).parameters())
    opt.zero_grad()
    opt.step()
    (Path(out) / f"ready{os.environ['RANK']}").touch()
    while len(list(Path(out).glob("ready*"))) < 2:
        time.sleep(0.02)
    train(out, steps, module)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    roles = {"checks": checks, "train": train, "hangs": hangs}
    roles[sys.argv[1]](*sys.argv[2:])
