"""Implicit MAML in many processes: each adapts to its share of the tasks, DDP averages the gradients.

    torchrun --nproc-per-node=2 examples/distributed.py    # nccl if there are GPUs, gloo if not

After a kill the same command goes on from the last checkpoint, and ends as if nothing had happened.
The checkpoint must be where every process can read it.

Every process draws the same episode and takes its share of the tasks: the result does not depend on
the number of processes, but for rounding. Where drawing is dear, as with images, give each process
its own stream, seed=seed + rank, with its own tasks.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import implicit_optim as iopt
from implicit_optim.tasks import MLP, sinusoids

TASKS, SHOTS, META_LR = 25, 10, 5e-3  # 25 tasks: 13 for one process, 12 for the other
LAM, INNER_STEPS, CG_STEPS = 0.5, 3, 5
SAVE_EVERY = 25
TIMEOUT = timedelta(minutes=5)  # who waits longer than this for another process fails


def learner(seed):
    torch.manual_seed(seed)
    return iopt.MetaLearner(
        MLP(1, (40, 40), 1),
        F.mse_loss,
        solver=iopt.newton_cg(max_steps=INNER_STEPS, curvature=iopt.GaussNewton),
        lam=iopt.Proximal(LAM, learned=True),  # a parameter like the others: averaged like them
        meta_gradient=iopt.Implicit(iopt.CG(max_steps=CG_STEPS), curvature=iopt.GaussNewton),
    )


def share(episode, device):
    """The tasks of this process; the sizes of two shares differ by one at most."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [[t.tensor_split(world)[rank].to(device) for t in batch] for batch in episode]


def save(state, path):
    """A kill leaves the old file or the new one, never half of one."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(steps, seed, path, device):
    meta = learner(seed).to(device)
    opt = torch.optim.Adam(meta.parameters(), lr=META_LR)
    episodes = sinusoids(tasks=TASKS, shots=SHOTS, queries=SHOTS, seed=seed, steps=steps)
    parts = {"meta": meta, "opt": opt, "episodes": episodes}
    first = 1
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"] + 1
    ddp = DistributedDataParallel(meta)  # calls go through it; meta.adapt(...) as ever
    for step, episode in enumerate(episodes, first):
        losses = ddp(*share(episode, device))
        # DDP divides the sum over processes by their number: undo that, and divide by all tasks. The
        # mean over each process's own tasks would give those of a smaller share more weight.
        loss = losses.sum() * dist.get_world_size() / TASKS
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % SAVE_EVERY == 0 or step == steps:
            dist.all_reduce(loss.detach_())  # of all processes; its mean is that over all tasks
            if dist.get_rank() == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                save(state | {"step": step}, path)
                mean = loss.item() / dist.get_world_size()
                print(
                    f"step {step:4}: query loss {mean:.3f}, lam {meta.proximal():.3f}", flush=True
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=TIMEOUT)
    train(args.steps, args.seed, args.out / "run.pt", device)
    # Not in a `finally`: a process that fails must not wait for the others. torchrun ends them.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
