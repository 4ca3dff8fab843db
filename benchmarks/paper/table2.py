"""Table 2: Omniglot, five methods, four settings.

    python -m benchmarks.paper table2 --data DIR --way 5 --shot 1 --method imaml-gd

The defaults are the paper's: 32 tasks, 20,000 meta-steps, lam = 2, 16 inner steps (25 for 20-way), 5 CG
steps, Adam at 1e-3. DIR holds Omniglot as `implicit_optim.tasks.omniglot` reads it.
"""

from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.paper.few_shot import CURVATURES, METHODS, Run, Settings
from implicit_optim.tasks import ConvNet, omniglot, omniglot_splits

PAPER = {  # accuracy and half-width by method, way and shot
    "maml": {"5-1": (98.7, 0.4), "5-5": (99.9, 0.1), "20-1": (95.8, 0.3), "20-5": (98.9, 0.2)},
    "fomaml": {"5-1": (98.3, 0.5), "5-5": (99.2, 0.2), "20-1": (89.4, 0.5), "20-5": (97.9, 0.1)},
    "reptile": {
        "5-1": (97.68, 0.04),
        "5-5": (99.48, 0.06),
        "20-1": (89.43, 0.14),
        "20-5": (97.12, 0.32),
    },
    "imaml-gd": {
        "5-1": (99.16, 0.35),
        "5-5": (99.67, 0.12),
        "20-1": (94.46, 0.42),
        "20-5": (98.69, 0.1),
    },
    "imaml-hf": {
        "5-1": (99.50, 0.26),
        "5-5": (99.74, 0.11),
        "20-1": (96.18, 0.36),
        "20-5": (99.14, 0.1),
    },
}


def arguments(parser):
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of the run (default: under runs/)")
    parser.add_argument("--method", choices=METHODS, default="imaml-gd")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--train-shot", type=int, help="default: shot; for Reptile 5 more")
    parser.add_argument(
        "--queries",
        type=int,
        help="of a class, in training (default 15; Reptile, where they teach nothing, 5)",
    )
    parser.add_argument("--lam", type=float, default=2.0)
    parser.add_argument("--inner-lr", type=float, default=0.1)
    parser.add_argument("--inner-steps", type=int, help="default 16, for 20-way 25")
    parser.add_argument("--cg-steps", type=int, default=5)
    parser.add_argument("--curvature", choices=CURVATURES, default="hessian")
    parser.add_argument(
        "--random-head",
        dest="zero_head",
        action="store_false",
        help="torch's own last layer, not zeros",
    )
    parser.add_argument("--tasks", type=int, default=32, help="in a meta-step")
    parser.add_argument("--steps", type=int, default=20_000, help="meta-steps")
    parser.add_argument("--meta-lr", type=float, default=1e-3)
    parser.add_argument(
        "--cycles",
        type=int,
        default=0,
        help="times that --meta-lr falls to 0 by a cosine, each from the start (default: constant)",
    )
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch's intra-op threads")


def settings(args):
    reptile = args.method == "reptile"
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    given["train_shot"] = args.train_shot or args.shot + (5 if reptile else 0)
    given["queries"] = args.queries or (5 if reptile else 15)
    given["inner_steps"] = args.inner_steps or (16 if args.way < 20 else 25)
    return Settings(**given)


def run(args, name, split, network, published):
    """Train, evaluate, and say what came out beside what was published."""
    if args.threads:
        torch.set_num_threads(args.threads)
    s = settings(args)
    torch.manual_seed(s.seed)
    model = network(s).to(args.device)
    folder = args.out or Path("runs") / name / f"{s.way}-way-{s.shot}-shot-{s.method}"
    results = Run(s, split, model, folder).finish()
    print(f"\n{s.title}, {s.test_tasks} tasks of unseen classes after {s.steps} meta-steps:")
    for kind in ("transductive", "support only"):
        found = results[kind]
        print(
            f"  {kind + ' batch norm:':26}{found['accuracy']:6.2f} +- {found['interval_95']:.2f} %"
        )
    if published:
        print(f"  {'the paper:':26}{published[0]:6.2f} +- {published[1]:.2f} %")
    print(f"  {results['minutes']:.1f} minutes of training; {folder / 'results.json'}")


def main(args):
    images = omniglot(args.data, cache=Path("runs"))
    split = omniglot_splits(images.to(args.device), seed=args.seed)
    published = PAPER[args.method].get(f"{args.way}-{args.shot}")
    run(args, "table2", split, lambda s: ConvNet(s.way, zero_head=s.zero_head), published)
