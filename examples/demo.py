"""Implicit MAML in a minute: learn where to start, then fit new sine waves from ten points each.

    python examples/demo.py        # prints a table and saves a picture in runs/demo

One small network is trained three ways. From scratch: on each new wave alone. First-order MAML and
implicit MAML: the same number of meta-steps on other waves, the same inner problem, the same solver;
only `meta_gradient=` differs. All three are judged on the same new waves.

Why Newton-CG and Gauss-Newton: an implicit gradient is right where the inner problem is solved.
After sixteen plain gradient steps this one is not, and then first-order MAML is the better choice.
"""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt
from implicit_optim.tasks import MLP, sinusoids

META_LR, TASKS, SHOTS = 1e-2, 32, 10
LAM, INNER_STEPS, CG_STEPS = 0.5, 5, 10
TEST_WAVES, TEST_STEPS = 400, 20  # new waves, and the inner steps drawn in the picture
SCRATCH_LAMS, SCRATCH_STEPS = (1e-3, 1e-2, 0.1), 100  # from scratch may choose among these
SCRATCH, FIRST, IMPLICIT = "from scratch", "first-order MAML", "implicit MAML"
COLORS = {SCRATCH: gallery.GREY, FIRST: gallery.ORANGE, IMPLICIT: gallery.BLUE}


def inner(steps):
    return iopt.newton_cg(max_steps=steps, curvature=iopt.GaussNewton)


def learner(seed, lam=LAM, **how):
    torch.manual_seed(seed)  # every method starts from the same network
    net = MLP(1, (40, 40), 1)
    return iopt.MetaLearner(net, F.mse_loss, solver=inner(INNER_STEPS), lam=lam, **how)


def train(meta, steps, seed, name):
    opt = torch.optim.Adam(meta.parameters(), lr=META_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    waves = sinusoids(tasks=TASKS, shots=SHOTS, queries=SHOTS, seed=seed, steps=steps)
    for support, query in tqdm(waves, desc=f"{name:16}", unit="step"):
        opt.zero_grad()
        meta(support, query).mean().backward()
        opt.step()
        schedule.step()
    return meta


@torch.no_grad()
def fits(meta, support, x, steps):
    """Predictions at x before adapting and after each of `steps` inner steps."""
    theta = (meta.anchor(), meta.proximal())
    phi = {name: p.expand(len(x), *p.shape) for name, p in meta.anchor().items()}
    found = [meta.predict(phi, x)]
    for _ in range(steps):  # one more step each time, from where the last one ended
        one = iopt.minimize(meta.objective, phi, theta, *support, solver=inner(1), batch_ndim=1)
        phi = one.value
        found.append(meta.predict(phi, x))
    return torch.stack(found)


def errors(meta, support, query, steps):
    """Mean squared error of each wave after each number of steps, `[steps + 1, waves]`."""
    return (fits(meta, support, query[0], steps) - query[1]).square().mean((-2, -1))


def half(values):
    """Half the width of the 95 % confidence interval of a mean over waves."""
    return 1.96 * values.std(-1) / math.sqrt(values.shape[-1])


def draw(methods, steps, error, support, path):
    fig, (left, *waves) = gallery.panels(3, figsize=(13, 4.4))
    for name, values in error.items():
        mean, margin, color = values.mean(-1), half(values), COLORS[name]
        left.plot(mean, color=color, lw=2.2)
        left.fill_between(range(len(mean)), mean - margin, mean + margin, color=color, alpha=0.2)
        left.plot(steps[name], mean[steps[name]], "o", color=color, ms=7)
    left.set_xscale("symlog", linthresh=1, linscale=0.4)
    left.set(title="mean squared error on new waves", xlabel="inner steps", yscale="log")
    left.set_xticks(ticks := [0, 1, 2, 5, 10, 20, 50], ticks)
    left.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5], ticks)
    left.minorticks_off()

    (x, y), grid = support, torch.linspace(-5, 5, 200)[:, None]
    wave = lambda at: torch.cat([at.sin(), at.cos()], -1)  # noqa: E731
    order = error[IMPLICIT][INNER_STEPS].argsort()  # in the middle: typical, not the prettiest
    for axes, share, title in zip(waves, (0.5, 0.9), ("a typical wave", "a hard one"), strict=True):
        i = order[int(share * len(order))]
        truth = wave(grid) @ torch.linalg.lstsq(wave(x[i]), y[i]).solution
        axes.plot(grid, truth, "--", color="#222222", lw=1.3, label="true wave")
        for name, meta in methods.items():
            curves = fits(meta, (x[i : i + 1], y[i : i + 1]), grid[None], steps[name])[:, 0, :, 0]
            axes.plot(grid, curves[-1], color=COLORS[name], lw=2.2, label=name)
        axes.plot(grid, curves[0], ":", color=COLORS[IMPLICIT], label="implicit MAML, before")
        axes.plot(x[i, :, 0], y[i, :, 0], "o", color="#222222", label="ten points", zorder=5)
        axes.set(title=title, xlabel="x", ylim=(-6.5, 6.5))
    gallery.save(fig, path, legend=axes, columns=6, dpi=150)


def main():
    args = gallery.arguments(__doc__, "demo", steps=300, what="meta-steps of each method")
    implicit = iopt.Implicit(iopt.CG(max_steps=CG_STEPS), curvature=iopt.GaussNewton)
    trained = {}
    for name, how in {FIRST: iopt.FirstOrder(), IMPLICIT: implicit}.items():
        meta = learner(args.seed, meta_gradient=how)
        trained[name] = train(meta, args.steps, args.seed, name)

    print("From scratch: choosing lam and the number of steps on other waves ...", flush=True)
    choose = sinusoids(tasks=TEST_WAVES // 4, shots=SHOTS, queries=50, seed=10**6).sample()
    alone = {lam: learner(args.seed, lam) for lam in SCRATCH_LAMS}
    tried = {lam: errors(m, *choose, SCRATCH_STEPS).mean(-1) for lam, m in alone.items()}
    lam = min(tried, key=lambda lam: tried[lam].min())
    methods = {SCRATCH: alone[lam], **trained}
    steps = {SCRATCH: int(tried[lam].argmin()), FIRST: INNER_STEPS, IMPLICIT: INNER_STEPS}

    waves = sinusoids(tasks=TEST_WAVES, shots=SHOTS, queries=50, seed=10**6 + 1).sample()
    error = {name: errors(m, *waves, max(steps[name], TEST_STEPS)) for name, m in methods.items()}
    print(f"\nMean squared error on {TEST_WAVES} new waves, {SHOTS} points each, +- 95 %:\n")
    print(f"{'':18}{'before':>14}{'after adapting':>20}{'inner steps':>14}{'lam':>8}")
    for name, values in error.items():
        cells = [f"{v.mean():.2f} +- {half(v):.2f}" for v in (values[0], values[steps[name]])]
        strength = lam if name == SCRATCH else LAM
        print(f"{name:18}{cells[0]:>14}{cells[1]:>20}{steps[name]:>14}{strength:>8g}")
    gain = error[FIRST][INNER_STEPS] - error[IMPLICIT][INNER_STEPS]
    print(f"\nFirst-order minus implicit, wave by wave: {gain.mean():.2f} +- {half(gain):.2f}")
    draw(methods, steps, error, waves[0], args.out / "demo.png")


if __name__ == "__main__":
    main()
