"""Weight decay of each parameter group by the implicit gradient, against grid and random search.

    python examples/hyperparameters.py        # prints a table, saves a picture in runs/hyperparameters

Two of scikit-learn's digits stand side by side and the left one is asked for: 200 pairs to train on,
300 to choose by, the rest to test. A linear classifier is trained to convergence with a decay for each
of the 16 rows of 8 pixels and one for the intercepts, 17 hyper-parameters. The solution is a function
of the decays, and one linear solve gives the gradient of the validation loss with respect to all of
them. Every method gets as many training runs, each from zero: a grid over one decay for all, a random
search over 17 around the best of the grid, and steps of Adam from the middle of the grid. The gradient
is not a run: what it costs beside one is printed.
"""

import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt

TRAIN, CHOOSE, LR, LOW, HIGH = 200, 300, 0.5, -10.0, 2.0  # the grid has decays of e^LOW to e^HIGH
GROUPS, SIZE = 17, [8] * 16 + [1]  # rows of pixels, left and right; the intercepts
SOLVER = iopt.newton_cg(linear_solver=iopt.CG(max_steps=20), tol=1e-4, max_steps=50)
GRID, RANDOM, IMPLICIT = "grid, one decay", "random, 17 decays", "implicit gradient, 17 decays"
COLORS = {GRID: gallery.GREY, RANDOM: gallery.ORANGE, IMPLICIT: gallery.BLUE}

# Weight decay is a proximal term that pulls to zero; as such it preconditions the linear solves.
OBJECTIVE = iopt.Objective(lambda phi, x: x @ phi, F.cross_entropy, iopt.proximal)


class Search:
    """Trains with the decays that it is asked about, and remembers the best by validation loss."""

    def __init__(self, train, choose, test):
        self.train, self.choose, self.test = train, choose, test
        self.losses, self.best = [], None

    def __call__(self, log_decay):
        """Validation loss, a function of the decays."""
        zero = torch.zeros(sum(SIZE), 10).double()
        decay = log_decay.exp().repeat_interleave(torch.tensor(SIZE))  # of each input
        theta = (zero, decay.repeat_interleave(10))  # of each number in phi
        found = iopt.minimize(OBJECTIVE, zero, theta, *self.train, solver=SOLVER)
        phi = iopt.attach(found.value, OBJECTIVE, theta, *self.train, on_solve=iopt.Raise())
        loss = F.cross_entropy(self.choose[0] @ phi, self.choose[1])
        if not self.losses or loss.item() < min(self.losses):
            self.best = phi.detach(), log_decay.detach().clone()
        self.losses.append(loss.item())
        return loss

    def row(self):
        """Validation loss, test loss and test accuracy in % of the best."""
        logits, y = self.test[0] @ self.best[0], self.test[1]
        return min(self.losses), F.cross_entropy(logits, y).item(), gallery.accuracy(logits, y)


def data(generator):
    """Training, validation and test pairs of digits, of which y is the left one."""
    parts = gallery.digits(generator, TRAIN, CHOOSE)
    beside = [x[torch.randperm(len(x), generator=generator)] for x, _ in parts]
    pairs = [torch.cat([x, other], -1) for (x, _), other in zip(parts, beside, strict=True)]
    return [(gallery.with_intercept(x), y) for x, (_, y) in zip(pairs, parts, strict=True)]


def search_all(parts, runs, generator):
    """Every method with its budget of training runs."""
    found = {name: Search(*parts) for name in COLORS}
    for value in tqdm(torch.linspace(LOW, HIGH, runs).double(), desc="one decay", unit="run"):
        found[GRID](value.expand(GROUPS))
    around = found[GRID].best[1]
    for _ in tqdm(range(runs), desc="random search", unit="run"):
        found[RANDOM](around + 1.5 * torch.randn(GROUPS, generator=generator).double())
    log_decay = torch.full((GROUPS,), (LOW + HIGH) / 2, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([log_decay], lr=LR)
    times = torch.zeros(2)  # of training and of gradients
    for _ in tqdm(range(runs), desc="implicit gradient", unit="run"):
        opt.zero_grad()
        start = time.perf_counter()
        loss = found[IMPLICIT](log_decay)
        middle = time.perf_counter()
        loss.backward()
        times += torch.tensor([middle - start, time.perf_counter() - middle])
        opt.step()
    return found, (times[1] / times[0]).item()


def draw(found, path):
    fig, (left, right) = gallery.panels(2)
    for name, color in COLORS.items():
        best = torch.tensor(found[name].losses).cummin(0).values
        left.plot(range(1, len(best) + 1), best, color=color, lw=2.2, label=name)
    decays = found[IMPLICIT].best[1][:-1].exp()
    right.plot(range(1, 9), decays[:8], "o-", color=gallery.BLUE, label="left digit")
    right.plot(range(1, 9), decays[8:], "s--", color=gallery.BLUE, label="right digit")
    right.axhline(found[GRID].best[1][0].exp(), color=COLORS[GRID], label=GRID)
    left.set(title="best validation loss so far", xlabel="training runs")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(title="learned weight decay", xlabel="row of pixels", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False)
    gallery.save(fig, path)


def main():
    args = gallery.arguments(__doc__, "hyperparameters", 20, "training runs of each method")
    generator = torch.Generator().manual_seed(args.seed)
    found, share = search_all(data(generator), args.steps, generator)
    print(f"\nBest by validation loss after {args.steps} training runs each:\n")
    print(f"{'':30}{'validation loss':>16}{'test loss':>12}{'accuracy in %':>16}")
    for name, search in found.items():
        validation, test, right = search.row()
        print(f"{name:30}{validation:16.3f}{test:12.3f}{right:16.1f}")
    print(f"\nA gradient took {100 * share:.0f} % of the time of a training run.")
    draw(found, args.out / "hyperparameters.png")


if __name__ == "__main__":
    main()
