"""Learn the strength lam: how far each parameter may leave theta on a new task.

    python examples/learned_lam.py        # prints two tables, saves a picture in runs/learned_lam

A task is a smooth curve of which ten noisy points are known; the model is a sum of cosines. From task
to task the slow ones vary much and the fast ones little, `phi_k ~ N(mean_k, spread_k^2)`: one number
for lam is too strong for some and too weak for others. The best lam is known. The loss is a mean of
squares over N points with noise sigma, so the inner problem, times `N / (2 sigma^2)`, is minus the log
posterior density at `lam_k = 2 sigma^2 / (N spread_k^2)`; its solution is the posterior mean, which no
method beats. Theta and lam are learned without knowing any of this. The fixed number is a fair
opponent: it has the true mean for its theta, and is the best of 17 on curves of its own.
"""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt

COSINES, POINTS, NOISE = 12, 10, 0.2
META_LR, TASKS, CURVES = 0.2, 128, 2000  # a batch of tasks; new curves to judge by
START, FIXED = 0.1, [10 ** (e / 4) for e in range(-12, 5)]  # where lam starts; fixed ones to try
ORDER, GRID = torch.arange(COSINES).double(), torch.linspace(-1, 1, 101).double()
MEAN, SPREAD = (ORDER == 1).double(), 1 / (1 + ORDER**2 / 4)
BEST_LAM = 2 * NOISE**2 / (POINTS * SPREAD**2)
EXACT = iopt.CG(max_steps=POINTS + 2)  # POINTS + 1 are enough: the data term has rank POINTS
NUMBER, LEARNED, VECTOR, BEST = "best fixed number", "learned number", "learned vector", "optimal"
COLORS = {NUMBER: gallery.GREY, LEARNED: gallery.ORANGE, VECTOR: gallery.BLUE}
LINES = {NUMBER: ":", LEARNED: "-", VECTOR: "o-"}
TRUTH = {"color": "#222222", "lw": 1.3, "ls": "--"}


def cosines(x):
    return torch.cos(math.pi / 2 * (x[..., None] + 1) * ORDER)


class Curve(torch.nn.Module):
    def __init__(self, start):
        super().__init__()
        self.weight = torch.nn.Parameter(start.clone())

    def forward(self, x):
        return cosines(x) @ self.weight


def sample(count, generator):
    """Support and query, `(x [T, N], y [T, N])` each, and the true parameters `[T, n]`."""
    truth = MEAN + SPREAD * torch.randn(count, COSINES, generator=generator).double()
    x = 2 * torch.rand(2, count, POINTS, generator=generator).double() - 1
    noise = NOISE * torch.randn(x.shape, generator=generator).double()
    y = (cosines(x) @ truth[..., None]).squeeze(-1) + noise
    return (x[0], y[0]), (x[1], y[1]), truth


def learner(start, lam):
    solver = iopt.newton_cg(linear_solver=EXACT, max_steps=1)  # the inner problem is a quadratic
    rule = iopt.Implicit(EXACT)
    return iopt.MetaLearner(Curve(start), F.mse_loss, solver=solver, lam=lam, meta_gradient=rule)


def learn(lam, steps, seed, name):
    meta = learner(torch.zeros_like(MEAN), iopt.Proximal(lam.double(), learned=True))
    opt = torch.optim.Adam(meta.parameters(), lr=META_LR)  # theta and log lam
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    generator = torch.Generator().manual_seed(seed)  # the same curves for every form of lam
    for _ in tqdm(range(steps), desc=name, unit="step"):
        support, query, _ = sample(TASKS, generator)
        opt.zero_grad()
        meta(support, query).mean().backward()
        opt.step()
        schedule.step()
    return meta


@torch.no_grad()
def errors(meta, support, truth):
    """Mean squared distance from each true curve, `[T]`."""
    phi = meta.adapt(support)["weight"]
    return ((phi - truth) @ cosines(GRID).mT).square().mean(-1)


def draw(methods, lam, error, support, truth, path):
    fig, (left, middle, right) = gallery.panels(3, figsize=(13, 4.4))
    gain = error[NUMBER] - error[VECTOR]
    i = gain.argsort()[len(gain) // 2].item()  # in the middle: typical, not the prettiest
    for place, (name, color) in enumerate(COLORS.items()):
        left.plot(lam[name], LINES[name], color=color, lw=2.2, zorder=3 - place)
        right.bar(place, error[name].mean().item(), color=color, width=0.6, label=name)
        if name != LEARNED:
            phi = methods[name].adapt([part[i : i + 1] for part in support])["weight"][0]
            middle.plot(GRID, cosines(GRID) @ phi.detach(), color=color, lw=2.2)
    left.plot(lam[BEST], **TRUTH, zorder=5)
    middle.plot(GRID, cosines(GRID) @ truth[i], **TRUTH)
    middle.plot(support[0][i], support[1][i], "o", color="#222222", ms=5, zorder=5)
    right.axhline(error[BEST].mean().item(), **TRUTH, label="the truth, or the optimum")
    left.set(title="lam of each cosine", xlabel="frequency", yscale="log")
    middle.set(title="a new curve, fitted to ten noisy points", xlabel="x")
    right.set(title="mean squared error, new curves", xticks=[])
    gallery.save(fig, path, legend=right)


def main():
    args = gallery.arguments(__doc__, "learned_lam", steps=300, what="meta-steps of each learner")
    new = torch.Generator().manual_seed(10**6 + args.seed)
    (support, _, truth), (others, _, known) = sample(CURVES, new), sample(CURVES, new)
    fixed = [learner(MEAN, lam) for lam in FIXED]
    methods = {
        NUMBER: min(fixed, key=lambda meta: errors(meta, others, known).mean()),
        LEARNED: learn(torch.tensor(START), args.steps, args.seed, LEARNED),
        VECTOR: learn(torch.full((COSINES,), START), args.steps, args.seed, VECTOR),
        BEST: learner(MEAN, BEST_LAM),
    }
    error = {name: errors(meta, support, truth) for name, meta in methods.items()}
    lam = {name: meta.proximal().detach().expand(COSINES) for name, meta in methods.items()}

    print(f"\nMean squared error on {CURVES} new curves, +- 95 %, and lam, slow to fast:\n")
    for name, values in error.items():
        half = 1.96 * values.std() / math.sqrt(CURVES)
        print(f"{name:18}{values.mean():.4f} +- {half:.4f}")
        print(f"{'':18}" + "".join(f"{value:7.3f}" for value in lam[name].tolist()))
    draw(methods, lam, error, support, truth, args.out / "learned_lam.png")


if __name__ == "__main__":
    main()
