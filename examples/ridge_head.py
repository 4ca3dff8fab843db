"""Only the head adapts: deep features with a ridge regression on top, solved exactly.

    python examples/ridge_head.py        # prints a table, saves a picture in runs/ridge_head

A task's inner problem is a ridge regression on the features of a network, a linear system of one
equation per feature. `linear_solve` solves it for all tasks at once and is differentiable: the meta-
gradient reaches the network and the strength of the ridge through the matrix. There is no inner loop
and nothing to converge. Compared with implicit MAML, in which all parameters adapt, and with the ridge
on features that were never trained, at the best of eight strengths.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt
from implicit_optim.tasks import MLP, sinusoids

TASKS, SHOTS, WIDTH, LR, TEST = 16, 10, 40, 1e-2, 400
STRENGTHS = [10.0**e for e in range(-6, 2)]
RANDOM, ALL, RIDGE = "ridge, random features", "implicit MAML, all adapt", "ridge, learned features"
COLORS = {RANDOM: gallery.GREY, ALL: gallery.ORANGE, RIDGE: gallery.BLUE}


class RidgeHead(torch.nn.Module):
    """Predictions at the query points by a ridge on the support points, `[T, M, 1]`."""

    def __init__(self, strength=0.1):
        super().__init__()
        layers = torch.nn.Linear(1, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH)
        self.body = torch.nn.Sequential(*layers)
        self.log_strength = torch.nn.Parameter(torch.tensor(strength).log())

    def forward(self, support, x):
        known, new = self.features(support[0]), self.features(x)
        ridge = self.log_strength.exp() * torch.eye(known.shape[-1], dtype=x.dtype)
        matrix = known.mT @ known / known.shape[-2] + ridge  # [T, n, n]
        right = (known.mT @ support[1]).squeeze(-1) / known.shape[-2]
        head = iopt.linear_solve(iopt.Dense(matrix), right, iopt.Cholesky()).value
        return new @ head[..., None]

    def features(self, x):
        return gallery.with_intercept(torch.tanh(self.body(x)))  # the last one is the intercept


class AllAdapt(torch.nn.Module):
    """The same query predictions by implicit MAML."""

    def __init__(self):
        super().__init__()
        how = iopt.Implicit(iopt.CG(max_steps=10), curvature=iopt.GaussNewton)
        inner = iopt.newton_cg(max_steps=5, curvature=iopt.GaussNewton)
        net = MLP(1, (WIDTH, WIDTH), 1)
        self.meta = iopt.MetaLearner(net, F.mse_loss, solver=inner, lam=0.5, meta_gradient=how)

    def forward(self, support, x):
        return self.meta.predict(self.meta.adapt(support), x)


def waves(seed, tasks, queries=SHOTS, steps=None):
    return sinusoids(tasks=tasks, shots=SHOTS, queries=queries, seed=seed, steps=steps)


def train(learner, steps, seed, name):
    opt = torch.optim.Adam(learner.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    episodes = waves(seed, TASKS, steps=steps)
    for support, (x, y) in tqdm(episodes, desc=f"{name:24}", unit="step"):
        loss = F.mse_loss(learner(support, x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return learner


@torch.no_grad()
def errors(learner, episode):
    """Mean squared error of each wave, `[T]`."""
    return (learner(episode[0], episode[1][0]) - episode[1][1]).square().mean((-2, -1))


def draw(learners, error, episode, path):
    fig, (left, right) = gallery.panels(2, width_ratios=(3, 2))
    (x, y), grid = episode[0], torch.linspace(-5, 5, 200)[:, None]
    i = error[RIDGE].argsort()[TEST // 2].item()  # in the middle: typical, not the prettiest
    truth = torch.linalg.lstsq(torch.cat([x[i].sin(), x[i].cos()], -1), y[i]).solution
    truth = torch.cat([grid.sin(), grid.cos()], -1) @ truth
    left.plot(grid, truth, color="#222222", lw=1.3, ls=(0, (4, 3)), label="true wave", zorder=4)
    left.plot(x[i], y[i], "o", color="#222222", ms=5, zorder=5)
    for place, (name, learner) in enumerate(learners.items()):
        curve = learner([x[i : i + 1], y[i : i + 1]], grid[None])[0].detach()
        left.plot(grid, curve, color=COLORS[name], lw=2.2, label=name)
        mean = error[name].mean().item()
        right.bar(place, mean, color=COLORS[name], width=0.6)
        right.text(place, mean, f"{mean:.2g}", ha="center", va="bottom")
    left.set(title="a new wave, ten points known", xlabel="x", ylim=(-6.5, 6.5))
    right.set(title="mean squared error, new waves", xticks=[])
    gallery.save(fig, path, legend=left)


def main():
    args = gallery.arguments(__doc__, "ridge_head", 200, "meta-steps of each method")
    choose, test = (waves(10**6 + k, TEST, 50).sample() for k in (0, 1))
    learners = {
        RANDOM: min(map(RidgeHead, STRENGTHS), key=lambda ridge: errors(ridge, choose).mean()),
        ALL: train(AllAdapt(), args.steps, args.seed, ALL),
        RIDGE: train(RidgeHead(), args.steps, args.seed, RIDGE),
    }
    error = {name: errors(learner, test) for name, learner in learners.items()}
    print(f"\nMean squared error on {TEST} new waves, {SHOTS} points each, +- 95 %:\n")
    for name, values in error.items():
        print(f"{name:26}{values.mean():.4f} +- {1.96 * values.std() / TEST**0.5:.4f}")
    print(f"learned strength of the ridge: {learners[RIDGE].log_strength.exp():.2g}")
    draw(learners, error, test, args.out / "ridge_head.png")


if __name__ == "__main__":
    main()
