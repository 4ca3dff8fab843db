"""A model of your own, meta-trained in the fewest lines.

    python examples/few_lines.py        # prints the error on new waves, before and after

Three things are yours: a module, a loss and tasks, each with points to learn from (support) and points
to be judged by (query). `MetaLearner` adapts the module to each task and is differentiable; the loop
is the one that every PyTorch program has.
"""

import argparse

import torch
import torch.nn.functional as F
from tqdm import tqdm

import implicit_optim as iopt
from implicit_optim.tasks import sinusoids


class Wave(torch.nn.Module):
    """Any module will do: this one adds what two hidden layers say."""

    def __init__(self, width=40):
        super().__init__()
        self.inside = torch.nn.Linear(1, width)
        self.between = torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, 1)

    def forward(self, x):
        hidden = torch.tanh(self.inside(x))
        return self.out(hidden + torch.tanh(self.between(hidden)))


@torch.no_grad()
def held_out(meta, tasks=400):
    """Mean query loss on waves never trained on: as it stands, and adapted to ten points each."""
    support, query = sinusoids(tasks=tasks, shots=10, queries=50, seed=10**6).sample()
    return F.mse_loss(meta.model(query[0]), query[1]).item(), meta(support, query).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="meta-steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # for tensors this small a second thread only gets in the way
    torch.manual_seed(args.seed)

    meta = iopt.MetaLearner(
        Wave(),
        F.mse_loss,
        lam=0.5,  # how strongly a task is held to what all tasks share
        solver=iopt.newton_cg(max_steps=3, curvature=iopt.GaussNewton),
        meta_gradient=iopt.Implicit(curvature=iopt.GaussNewton),
    )
    opt = torch.optim.Adam(meta.parameters(), lr=1e-2)
    before = held_out(meta)
    waves = sinusoids(tasks=16, shots=10, queries=10, seed=args.seed, steps=args.steps)
    for support, query in tqdm(waves, desc="meta-training", unit="step"):
        loss = meta(support, query).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    after = held_out(meta)

    print("\nMean squared error on 400 new waves, ten points each:\n")
    print(f"{'':24}{'not adapted':>12}{'adapted':>12}")
    print(f"{'before meta-training':24}{before[0]:12.3f}{before[1]:12.3f}")
    print(f"{'after meta-training':24}{after[0]:12.3f}{after[1]:12.3f}")
    print(f"\n{meta.report()}")


if __name__ == "__main__":
    main()
