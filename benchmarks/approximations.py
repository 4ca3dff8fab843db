"""Ways to approximate the inverse in the implicit gradient: error against Hessian-vector products.

Quadratics in 50 dimensions, float64; the inner problems are solved until their error is below that of
the backward pass, by gradient descent with the step 1 / L for truncated back-propagation, L-BFGS for
SHINE, accelerated for the others. Truncated back-propagation through k steps is the Neumann series with
k terms; with k = 1 it is one-step differentiation. Nystrom is the inverse of a random sketch of rank k
(Hataya & Yamada 2023). SHINE takes the inverse that L-BFGS holds, of all its steps, and refines it by k
products, from there or as CG's preconditioner (Ramzi et al. 2022).
"""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import implicit_optim as iopt
from benchmarks.measure import RESULTS, save, table
from benchmarks.paper.quadratics import Quadratics
from benchmarks.products import low_rank, nystrom, sketch
from benchmarks.shine import Shine

N, LAM, TASKS = 50, 1.0, 4
KAPPAS = (10, 100, 300)  # of the inner objective
PRODUCTS = (0, 1, 2, 5, 10, 20, 50)
COLORS = {
    "truncated": "#E69F00",
    "Neumann": "#D55E00",
    "Nystrom": "#009E73",
    "SHINE": "#CC79A7",
    "SHINE, CG": "#56B4E9",
    "CG": "#0072B2",
}


@dataclass(frozen=True)
class Nystrom(iopt.LinearSolver):
    """``x = (sketch of H of rank k + lam)^-1 b``: k products, whatever b is; a solver of one's own."""

    rank: int
    stats_names = ()

    @torch.no_grad()
    def solve(self, operator, b):
        tasks, n = b.shape
        generator = torch.Generator().manual_seed(0)
        omega = torch.linalg.qr(torch.randn(n, self.rank, generator=generator, dtype=b.dtype)).Q
        Y = sketch(operator.mv, omega, tasks, LAM)
        x = low_rank(*nystrom(Y, omega, LAM), LAM)(b)
        return iopt.Solution(x, torch.zeros(tasks, dtype=torch.int8), {})


def problem(kappa):
    return Quadratics.conditioned(TASKS, N, kappa, LAM)


def rules(products, smoothness):
    """Every way that spends so many products; with none all but SHINE are the first-order direction."""
    shine = {"SHINE": Shine(products), "SHINE, CG": Shine(products, preconditioner=True)}
    if products == 0:
        return dict.fromkeys(COLORS, iopt.FirstOrder()) | shine
    neumann = iopt.Neumann(max_steps=products, step=LAM / smoothness)
    return {
        "truncated": iopt.Truncated(products),
        "Neumann": iopt.Implicit(neumann),
        "Nystrom": iopt.Implicit(Nystrom(products)),
        **shine,
        "CG": iopt.Implicit(iopt.CG(max_steps=products)),
    }


def errors(quadratics, products):
    """Relative error of the meta-gradient, by name."""
    kappa = quadratics.bounds[1] / quadratics.bounds[0]
    fast, steps = quadratics.agd(round(25 * kappa**0.5)), round(12 * kappa**0.35)
    own = {
        iopt.Truncated: quadratics.gd(round(12 * kappa)),
        Shine: iopt.lbfgs(max_steps=steps, memory=steps),
    }
    every = rules(products, quadratics.bounds[1])
    return {name: quadratics.error(own.get(type(r), fast), r) for name, r in every.items()}


def draw(rows, path):
    fig, every = plt.subplots(
        1, len(KAPPAS), figsize=(10, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, kappa in zip(every[0], KAPPAS, strict=True):
        own = [row for row in rows if row["kappa"] == kappa]
        for (name, color), marker in zip(COLORS.items(), "sod^<v", strict=True):
            style = {"ls": "--"} if name == "Neumann" else {}  # on top of the truncated ones
            places = [row["products"] for row in own]
            axes.plot(
                places, [row[name] for row in own], marker=marker, color=color, label=name, **style
            )
        axes.set(title=f"kappa = {kappa}", xlabel="products", yscale="log", ylim=(1e-7, 3))
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.2, 70)
        axes.set_xticks(PRODUCTS, [str(k) for k in PRODUCTS])
        axes.minorticks_off()
    every[0, 0].set_ylabel("relative error")
    every[0, 0].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(folder=RESULTS):
    torch.set_num_threads(1)  # matrices of 50 x 50
    rows = []
    for kappa in KAPPAS:
        quadratics = problem(kappa)
        for products in PRODUCTS:
            rows.append({"kappa": kappa, "products": products} | errors(quadratics, products))
    saved = save("approximations", rows, folder)
    picture = folder.parents[1] / "docs" / "pictures" / "approximations.png"
    draw(rows, picture if folder == RESULTS else folder / "approximations.png")
    print(
        table([{k: f"{v:.2g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows])
    )
    print(f"\nsaved {saved}")
