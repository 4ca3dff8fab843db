"""What the examples of the gallery share: their arguments, real digits, the look of the pictures."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

BLUE, ORANGE, YELLOW, GREY = (
    "#0072B2",
    "#D55E00",
    "#E69F00",
    "#7F7F7F",
)  # safe for colour-blind eyes


def arguments(doc, name, steps=None, what="steps"):
    """`--seed`, `--out` and, where there is a default, `--steps`; one thread, a seeded torch."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help=what)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for tensors this small a second thread only gets in the way
    torch.manual_seed(args.seed)
    return args


def digits(generator, *sizes):
    """Disjoint random parts of scikit-learn's digits, the rest last: `(x [N, 64] in [0, 1], y)` each."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    parts = torch.randperm(len(y), generator=generator).split([*sizes, len(y) - sum(sizes)])
    return [(x[part].double() / 16, y[part]) for part in parts]


def with_intercept(x):
    """One more input, which is one."""
    return F.pad(x, (0, 1), value=1.0)


def accuracy(logits, y):
    """In per cent."""
    return 100 * (logits.argmax(-1) == y).double().mean().item()


def panels(count, **how):
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(1, count, **{"figsize": (10, 3.8), "layout": "constrained", **how})


def save(fig, path, legend=None, columns=4, dpi=100):
    """With the legend of one of its axes below them all, if wanted."""
    if legend is not None:
        handles = legend.get_legend_handles_labels()
        fig.legend(*handles, loc="outside lower center", ncols=columns, frameon=False)
    fig.savefig(path, dpi=dpi)
    plt.close(fig)
    print(f"\nPicture: {path}")
