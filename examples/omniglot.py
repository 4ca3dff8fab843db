"""Implicit MAML on real Omniglot: five-way one-shot, in one page.

    python examples/omniglot.py --data DIR        # DIR holds images_background and images_evaluation

as folders or as .zip files; with --download torchvision fetches them. A few minutes on a CPU by default;
the longer it trains the better. `python -m benchmarks.paper table2` is the full experiment: all methods,
checkpoints, evaluation as in the paper.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import implicit_optim as iopt
from implicit_optim.tasks import ConvNet, Episodes, omniglot, omniglot_splits

WAYS, SHOTS, QUERIES, TASKS = 5, 1, 15, 8
LAM, INNER_LR, INNER_STEPS, CG_STEPS, META_LR = 0.5, 0.1, 16, 5, 1e-3


def accuracy(meta, episodes):
    """Accuracy in % on the query sets: mean over tasks and half-width of its 95 % interval."""
    hits = []
    for support, (x, y) in episodes:
        with torch.no_grad():
            logits = meta.predict(meta.adapt(support), x)
        hits.append((logits.argmax(-1) == y).float().mean(-1))
    hits = 100 * torch.cat(hits)
    return hits.mean().item(), 1.96 * hits.std().item() / len(hits) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--steps", type=int, default=100, help="meta-steps")
    parser.add_argument("--test-tasks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images = omniglot(args.data, download=args.download).to(args.device)
    train, _, test = omniglot_splits(images, seed=args.seed)  # no character is in two parts
    shape = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES}
    episodes = Episodes(train, tasks=TASKS, seed=args.seed, steps=args.steps, **shape)
    unseen = Episodes(test, tasks=20, seed=1, steps=-(-args.test_tasks // 20), **shape)

    meta = iopt.MetaLearner(
        ConvNet(WAYS),  # the paper's network; its last layer starts at zero
        F.cross_entropy,
        solver=iopt.gd(lr=INNER_LR, max_steps=INNER_STEPS),
        lam=LAM,
        meta_gradient=iopt.Implicit(iopt.CG(max_steps=CG_STEPS)),
    ).to(args.device)
    opt = torch.optim.Adam(meta.parameters(), lr=META_LR)

    bar = tqdm(episodes, desc="meta-steps")
    for support, query in bar:
        loss = meta(support, query).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar.set_postfix_str(f"query loss {loss.item():.3f}")

    mean, half = accuracy(meta, tqdm(unseen, desc="test"))
    print(meta.report())
    print(
        f"{WAYS}-way {SHOTS}-shot, {20 * len(unseen)} tasks of unseen characters: "
        f"{mean:.2f} +- {half:.2f} % after {args.steps} meta-steps"
    )


if __name__ == "__main__":
    main()
