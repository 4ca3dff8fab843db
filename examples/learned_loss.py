"""Learn a loss: training with it, under outliers, gives what the true loss on clean data asks for.

    python examples/learned_loss.py        # prints a table, saves a picture in runs/learned_loss

A task is a linear regression on thirty points, of which three in ten are far too high: errors of one
sign. The squared loss is pulled up by them, the best Huber loss less so, for it is symmetric. The
learned loss is any convex function of the residual, a sum of hinges with positive weights; the inner
problem is its minimum over the noisy points, the outer loss the squared error on clean ones. The
implicit gradient reaches the weights of the hinges, which the outer loss does not contain.
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt

POINTS, INPUTS, NOISE, OUTLIERS, HEIGHT = 30, 5, 0.3, 0.3, 5.0
TASKS, TEST, LR = 32, 400, 0.1
HINGES, SHARPNESS = torch.linspace(-3, 3, 13).double(), 2.0  # where the slope of the loss changes
DELTAS = 10 ** (torch.arange(-8, 4, 3).double() / 4)  # of the Huber losses that are tried
SOLVER = iopt.newton_cg(linear_solver=iopt.CG(max_steps=5), tol=1e-4, max_steps=60)
SQUARED, HUBER, LEARNED, CLEAN = "squared loss", "best Huber loss", "learned loss", "no outliers"
COLORS = {SQUARED: gallery.GREY, HUBER: gallery.ORANGE, LEARNED: gallery.BLUE}


def learned(r, theta):
    """Slopes from `-sum` to `+sum` of the weights: rising hinges to the right, falling to the left."""
    rise, fall = theta.softmax(0).chunk(2)
    right = F.softplus(SHARPNESS * (r[..., None] - HINGES)) / SHARPNESS
    left = F.softplus(SHARPNESS * (HINGES - r[..., None])) / SHARPNESS
    return (right * rise + left * fall).sum(-1)


def huber(r, delta):
    """Of slope one far out, like the learned loss; a little rounded, so that Newton can work."""
    return delta * (1 + (r / delta).square()).sqrt() - delta


def squared(r, _):
    return r.square() / 2


def sample(count, generator):
    """Noisy points, clean points, the same noisy points without outliers: `(x, y)` each."""

    def normal(*shape):
        return torch.randn(shape, generator=generator).double()

    x = gallery.with_intercept(normal(2, count, POINTS, INPUTS - 1))
    y = (x @ normal(count, INPUTS, 1))[..., 0]
    good = y[0] + NOISE * normal(count, POINTS)
    uniform = torch.rand(2, count, POINTS, generator=generator).double()
    high = (uniform[0] < OUTLIERS) * HEIGHT * -uniform[1].log()
    return (x[0], good + high), (x[1], y[1]), (x[0], good)


def fit(rho, theta, x, y):
    """What training with the loss rho gives, as a function of theta, `[T, INPUTS]`."""

    def objective(phi, theta, x, y):
        return rho(x @ phi - y, theta).mean() + 1e-3 / 2 * phi.square().sum()

    start = torch.zeros(len(x), INPUTS).double()
    found = iopt.minimize(objective, start, theta.detach(), x, y, solver=SOLVER, batch_ndim=1)
    return iopt.attach(found.value, objective, theta, x, y, batch_ndim=1)


def errors(phi, x, y):
    """Mean squared error of each task."""
    return ((x @ phi[..., None])[..., 0] - y).square().mean(-1)


def learn(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros(2 * len(HINGES), dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([theta], lr=LR)
    for _ in tqdm(range(steps), desc="learned loss", unit="step"):
        noisy, clean, _ = sample(TASKS, generator)
        loss = errors(fit(learned, theta, *noisy), *clean).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return theta.detach()


def draw(losses, error, path):
    fig, (left, right) = gallery.panels(2, width_ratios=(3, 2))
    r = torch.linspace(-4, 4, 401).double()
    for place, (name, (rho, theta)) in enumerate(losses.items()):
        value = rho(r, theta) - rho(r, theta).min()
        value = value / value[-1]  # only the shape matters
        left.plot(r, value, color=COLORS[name], lw=2.2, label=name)
        right.bar(place, mean := error[name].mean().item(), color=COLORS[name], width=0.6)
        right.text(place, mean, f"{mean:.3f}", ha="center", va="bottom")
    left.plot(r, r.abs() / 4, color="#222222", lw=1.3, ls=(0, (4, 3)), label="absolute loss")
    left.set(title="losses, scaled to 1 at +4", xlabel="prediction minus target", ylim=(0, 1.15))
    right.set(title="mean squared error on clean points", xticks=[])
    gallery.save(fig, path, legend=left)


def main():
    args = gallery.arguments(__doc__, "learned_loss", 60, "meta-steps")
    theta, fresh = learn(args.steps, args.seed), torch.Generator().manual_seed(10**6 + args.seed)
    choose, (noisy, clean, good) = sample(TEST, fresh), sample(TEST, fresh)
    deltas = {d: errors(fit(huber, d, *choose[0]), *choose[1]).mean() for d in DELTAS}
    delta = min(deltas, key=deltas.get)
    losses = {SQUARED: (squared, delta), HUBER: (huber, delta), LEARNED: (learned, theta)}
    error = {name: errors(fit(*loss, *noisy), *clean) for name, loss in losses.items()}
    error[CLEAN] = errors(fit(squared, delta, *good), *clean)
    print(f"\nMean squared error on the clean points of {TEST} new tasks, +- 95 %:\n")
    for name, values in error.items():
        print(f"{name:18}{values.mean():.4f} +- {1.96 * values.std() / TEST**0.5:.4f}")
    print(f"\nBest Huber loss: delta {delta:.3f}")
    draw(losses, error, args.out / "learned_loss.png")


if __name__ == "__main__":
    main()
