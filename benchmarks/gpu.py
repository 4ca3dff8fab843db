"""A meta-step on a GPU: rates, kernels, synchronisations, share of the peak, memory, and the peers.

python -m benchmarks.gpu [--minutes 8.5] [--out DIR] [--only WORDS] [--steps K] [--no-compile]
python -m benchmarks.gpu --device cpu --tiny     # tries the script where there is no GPU

All in one budget of wall-clock time, what compiles last. Every figure is float32 without TF32, except
where its row says otherwise.
"""

import argparse
import copy
import dataclasses
import gc
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import RESULTS, interleaved, synchronise
from benchmarks.peers import hypertorch, learner, ours, torchopt_cg
from benchmarks.report import Report, describe
from benchmarks.workloads import omniglot
from implicit_optim.tasks import ConvNet

PEERS = {"hypertorch's method": hypertorch, "TorchOpt, CG": torchopt_cg}

# ------------------------------------------------------------------ ways to compute a meta-gradient


def backward_of(w, forward=None, context=nullcontext):
    """A function that leaves the meta-gradient in the parameters' `.grad`."""
    forward = learner(w) if forward is None else forward

    def backward():
        w.model.zero_grad()
        with context():
            loss = forward(w.support, w.query).mean()
        loss.backward()

    return backward


def autocast(w):
    device = w.support[0].device.type
    return backward_of(w, context=partial(torch.autocast, device, torch.bfloat16))


def with_tf32(w):
    return tf32(True)(backward_of(w))


@contextmanager
def tf32(allowed):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def captured(w):
    """Forward and backward as one CUDA graph, after a warm-up on a side stream."""
    backward, side = backward_of(w), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backward()
    torch.cuda.current_stream().wait_stream(side)
    w.model.zero_grad()  # the graph then makes gradients of its own, which each replay overwrites
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward()
    return graph.replay


def compiled(w, mode=None):
    torch.compiler.reset()
    return backward_of(w, torch.compile(learner(w), fullgraph=True, mode=mode))


METHODS = {
    "eager": backward_of,
    "TF32": with_tf32,
    "bfloat16 autocast": autocast,
    "CUDA graph": captured,
    "compiled": compiled,
    "compiled, reduce-overhead": partial(compiled, mode="reduce-overhead"),
}
FLOAT32 = ("eager", "CUDA graph", "compiled", "compiled, reduce-overhead")

# -------------------------------------------------------------------------------------- the figures


def rate(w, method, rounds, work):
    """Meta-steps a second, in turn with eager, and how far the gradient is from eager's."""
    base, own = copy.deepcopy(w), copy.deepcopy(w)
    eager = backward_of(base)
    eager()
    start = time.perf_counter()
    run = METHODS[method](own)
    run()
    synchronise()
    first = time.perf_counter() - start
    run()  # CUDA graphs of the compiler record in the second call and replay in the third
    run()
    error = distance(*([p.grad for p in each.model.parameters()] for each in (own, base)))
    steps = {"eager": with_adam(eager, base), method: with_adam(run, own)}
    seconds = interleaved(steps, rounds, warmup=1)
    row = {
        "steps per s": 1 / seconds[method],
        "times eager": seconds["eager"] / seconds[method],
        "difference": error,
        "first call, s": first,
    }
    if "GFLOP" in work:
        share = work["GFLOP"] / 1e3 / seconds[method] / work["float32 matmul, TFLOP/s"]
        row["of float32 matmul"] = share
    return row


def with_adam(backward, w):
    adam = torch.optim.Adam(w.model.parameters(), lr=1e-3)

    def step():
        backward()
        adam.step()

    return step


def distance(xs, ys):
    """Relative, of two lists of tensors."""
    x, y = (torch.cat([t.reshape(-1) for t in ts]) for ts in (xs, ys))
    return ((x - y).norm() / y.norm()).item()


def flops(w, n):
    """Of one meta-gradient: those of one task, times T, as `vmap` is counted too high."""
    one = [tuple(t[:1] for t in episode) for episode in (w.support, w.query)]
    with FlopCounterMode(display=False) as counter:
        ours(dataclasses.replace(w, support=one[0], query=one[1]))
    count = counter.get_total_flops() * len(w.support[0])
    x = torch.randn(n, n, device=w.support[0].device)
    seconds = interleaved({"matmul": lambda: x @ x})["matmul"]
    return {"GFLOP": count / 1e9, "float32 matmul, TFLOP/s": 2 * n**3 / seconds / 1e12}


def one_step(w):
    """Kernels and operators of one whole eager step, and whether it waits for the device."""
    w, gpu = copy.deepcopy(w), w.support[0].is_cuda
    step = with_adam(backward_of(w), w)
    step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as prof:
        step()
        synchronise()
    counts = {e.key: e.count for e in prof.key_averages()}
    return {
        "kernels": sum(c for k, c in counts.items() if "LaunchKernel" in k) or None,
        "aten operators": sum(c for k, c in counts.items() if k.startswith("aten::")),
        "stream synchronisations": counts.get("cudaStreamSynchronize", 0) if gpu else None,
        "set_sync_debug_mode": waits(step) if gpu else None,
    }


def waits(step):
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return describe(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def peak(w):
    """Memory above what is allocated before, of one meta-gradient."""
    if not w.support[0].is_cuda:
        from tests.memory import PeakMemory

        with PeakMemory() as memory:
            ours(w)
        return {"peak, MiB": memory.peak / 2**20}
    ours(w)  # the libraries' workspaces stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours(w)
    return {"peak, MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


def peer(w, run):
    """One meta-gradient of a peer, in turn with ours."""
    error = distance(run(w), ours(w))
    seconds = interleaved({"peer": lambda: run(w), "ours": lambda: ours(w)}, rounds=2, warmup=0)
    row = {"ms": seconds["peer"] * 1e3, "ours, ms": seconds["ours"] * 1e3}
    return row | {"time / ours": seconds["peer"] / seconds["ours"], "difference": error}


def machine(device):
    gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "compute capability": torch.cuda.get_device_capability() if gpu else None,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


# --------------------------------------------------------------------------------------- the report


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tasks, ways and shots of what is timed and of what memory is measured on; steps; repetitions."""

    timed: tuple = ((32, 5, 1), (16, 20, 5))
    memory: tuple = (1, 20, 5)
    memory_steps: tuple = (1, 4, 16, 64)
    filters: int = 64
    steps: int = 16
    cg: int = 5
    matmul: int = 8192
    rounds: int = 9


TINY = Sizes(((2, 3, 2), (2, 3, 5)), (1, 3, 2), (1, 2), 8, steps=2, cg=2, matmul=256, rounds=1)


def workload(shape, size, steps, device):
    w = omniglot(*shape)
    model = ConvNet(shape[1], filters=size.filters).to(device)
    data = {k: tuple(t.to(device) for t in getattr(w, k)) for k in ("support", "query")}
    return dataclasses.replace(w, model=model, steps=steps, cg=size.cg, **data)


def fill(report, size, args):
    steps = args.steps or size.steps
    workloads = [workload(shape, size, steps, args.device) for shape in size.timed]
    report.add("machine", {}, lambda: machine(args.device), needs=0)
    work = [
        report.add("work", {"workload": w.name}, partial(flops, w, size.matmul)) for w in workloads
    ]

    def rates(methods, needs=20):
        for method in methods:
            for w, each in zip(workloads, work, strict=True):
                labels = {"workload": w.name, "method": method}
                report.add("rate", labels, partial(rate, w, method, size.rounds, each), needs)

    rates(["eager", "TF32", "bfloat16 autocast"])
    for w in workloads:
        report.add("one step", {"workload": w.name}, partial(one_step, w))
    for k in size.memory_steps:
        w = workload(size.memory, size, k, args.device)
        report.add("memory", {"workload": w.name, "inner steps": k}, partial(peak, w))
    for name, run in PEERS.items():
        for w in workloads:
            labels = {"workload": w.name, "peer": name}
            report.add("peer", labels, partial(peer, w, run), needs=45)
    rates(["CUDA graph"])
    if not args.no_compile:
        rates(["compiled", "compiled, reduce-overhead"], needs=90)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a try on a CPU")
    parser.add_argument("--minutes", type=float, default=8.5, help="of wall-clock time, in all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.json")
    parser.add_argument("--only", default="", help="rows whose name contains these words")
    parser.add_argument("--steps", type=int, help="inner steps; fewer compile sooner")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    report = Report("gpu", args.out, args.minutes, args.only)
    torch.manual_seed(0)
    with tf32(False):
        fill(report, TINY if args.tiny else Sizes(), args)
    print(f"\n{report}\n\nsaved {args.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
