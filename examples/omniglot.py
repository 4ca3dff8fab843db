"""Implicit MAML on real Omniglot, start to finish; killed at any moment, it resumes where it was.

    python examples/omniglot.py --data DIR        # DIR holds images_background and images_evaluation

as folders or as .zip files; with --download torchvision fetches them. Everything that the run leaves
(checkpoint, results.json, learning curve) is in --out; the same command again continues it.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm

import implicit_optim as iopt
from implicit_optim.tasks import ConvNet, Episodes, omniglot, omniglot_splits

LAM, INNER_LR, INNER_STEPS, CG_STEPS = 0.5, 0.1, 16, 5
META_LR, QUERIES = 1e-3, 15
CHECKPOINT_EVERY, VALIDATE_EVERY = 50, 200
CURVATURES = {"hessian": iopt.Hessian, "gauss-newton": iopt.GaussNewton}


def accuracy(meta, episodes):
    """Accuracy in % on the query sets: mean over tasks and half-width of its 95 % interval."""
    hits = []
    for support, (x, y) in episodes:
        with torch.no_grad():
            logits = meta.predict(meta.adapt(support), x)
        hits.append((logits.argmax(-1) == y).float().mean(-1))
    hits = 100 * torch.cat(hits)
    return hits.mean().item(), 1.96 * hits.std().item() / math.sqrt(len(hits))


def draw(history, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps, values, halves = zip(*history["validation"], strict=True)
    left.errorbar(steps, values, halves, marker="o", ms=3, capsize=2)
    left.set(title="accuracy on unseen characters [%]", xlabel="meta-steps")
    window = max(1, len(history["truncated"]) // 60)
    share = torch.tensor(history["truncated"]).split(window)
    right.plot(
        [(i + 0.5) * window for i in range(len(share))], [100 * s.mean().item() for s in share]
    )
    right.set(title="tasks with negative curvature [%]", xlabel="meta-steps", ylim=(-2, 102))
    fig.savefig(path, dpi=150)
    plt.close(fig)


def save(path, content):
    """Write, then rename: a kill at any moment leaves the old checkpoint or the new one."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"))
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=16, help="tasks in a meta-step")
    parser.add_argument("--steps", type=int, default=1500, help="meta-steps")
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--curvature", choices=CURVATURES, default="hessian")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    images = omniglot(args.data, download=args.download, cache=args.out).to(args.device)
    split = omniglot_splits(images, seed=args.seed)
    shape = {"ways": args.way, "shots": args.shot, "queries": QUERIES}
    train = Episodes(split.train, tasks=args.tasks, seed=args.seed, steps=args.steps, **shape)

    def held_out(images, tasks):
        return Episodes(images, tasks=20, seed=args.seed + 1, steps=math.ceil(tasks / 20), **shape)

    indefinite = []  # share of each meta-step's tasks in which CG met negative curvature

    def on_solve(name, solution):
        if name == "linear_solve":
            indefinite.append(solution.share(iopt.Status.NEGATIVE_CURVATURE))

    meta = iopt.MetaLearner(
        ConvNet(args.way),  # the paper's network; its last layer starts at zero
        F.cross_entropy,
        solver=iopt.gd(lr=INNER_LR, max_steps=INNER_STEPS),
        lam=LAM,
        meta_gradient=iopt.Implicit(iopt.CG(max_steps=CG_STEPS), CURVATURES[args.curvature]),
        on_solve=on_solve,
    ).to(args.device)
    opt = torch.optim.Adam(meta.parameters(), lr=META_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    parts = {"meta": meta, "opt": opt, "schedule": schedule, "train": train}
    history = {
        "settings": vars(args) | {"data": "", "out": ""},
        "loss": [],
        "truncated": [],
        "validation": [],
        "seconds": 0.0,
    }

    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        if state["history"]["settings"] != history["settings"]:
            raise SystemExit(
                f"{checkpoint} is from a run with other settings: choose another --out"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        history = state["history"]

    step, began = len(history["loss"]), time.monotonic() - history["seconds"]
    bar = tqdm(train, total=args.steps, initial=step, desc="meta-steps", smoothing=0.05)
    for support, query in bar if step < args.steps else ():
        loss = meta(support, query).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        step += 1
        history["loss"].append(loss.item())
        history["truncated"].append(indefinite.pop().item())
        if step % VALIDATE_EVERY == 0 or step == args.steps:
            history["validation"].append((step, *accuracy(meta, held_out(split.val, 100))))
            draw(history, args.out / "learning_curve.png")
        recent = history["truncated"][-20:]
        best = f"{history['validation'][-1][1]:.1f} %" if history["validation"] else "-"
        bar.set_postfix_str(
            f"loss {loss.item():.3f}, unseen {best}, "
            f"negative curvature {100 * sum(recent) / len(recent):.1f} % of tasks"
        )
        if step % CHECKPOINT_EVERY == 0 or step == args.steps:
            history["seconds"] = time.monotonic() - began
            save(
                checkpoint,
                {name: p.state_dict() for name, p in parts.items()} | {"history": history},
            )

    test = accuracy(meta, tqdm(held_out(split.test, args.test_tasks), desc="test"))
    share = sum(history["truncated"]) / len(history["truncated"])
    results = {
        "accuracy": test[0],
        "interval_95": test[1],
        "test_tasks": args.test_tasks,
        "meta_steps": step,
        "minutes": history["seconds"] / 60,
        "negative_curvature_share": share,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": args.device,
    } | history
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(
        f"{args.way}-way {args.shot}-shot, {args.test_tasks} tasks of held-out characters: "
        f"{test[0]:.2f} +- {test[1]:.2f} % after {step} meta-steps, {results['minutes']:.1f} min; "
        f"negative curvature in {100 * share:.1f} % of the training tasks"
    )


if __name__ == "__main__":
    main()
