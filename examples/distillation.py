"""Ten images that teach all digits: the training set itself, learned by the implicit gradient.

    python examples/distillation.py        # prints a table, saves a picture in runs/distillation

A linear classifier is trained to convergence on one image per class; its loss on a thousand real digits
of scikit-learn judges the images. They are data of the inner problem, of which its solution is a
function like of any other tensor, so one linear solve gives the gradient with respect to every pixel.
Judged on the other digits, against real images drawn at random and the mean image of each class, each
with the best of five weight decays; the learned images keep theirs.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm

import gallery
import implicit_optim as iopt

REAL, LR, DECAY, DRAWS = 1000, 0.2, 0.01, 10  # draws of random images
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SOLVER = iopt.newton_cg(linear_solver=iopt.CG(max_steps=20), tol=1e-6, max_steps=50)
CLASSES = torch.arange(10)


def objective(phi, decay, images):
    """Softmax regression on one image per class; phi `[65, 10]`, the last row the intercepts."""
    logits = gallery.with_intercept(images) @ phi
    return F.cross_entropy(logits, CLASSES) + decay / 2 * phi.square().sum()


def fit(images, decay=DECAY, start=None):
    """The classifier that these images teach, as a function of the images."""
    decay = torch.tensor(decay, dtype=images.dtype)
    start = images.new_zeros(images.shape[1] + 1, 10) if start is None else start
    found = iopt.minimize(objective, start, decay, images.detach(), solver=SOLVER)
    return iopt.attach(found.value, objective, decay, images, on_solve=iopt.Raise())


def loss(phi, x, y):
    return F.cross_entropy(gallery.with_intercept(x) @ phi, y)


def judge(phi, x, y):
    return gallery.accuracy(gallery.with_intercept(x) @ phi, y)


def learn(images, real, steps):
    """Images in [0, 1], started at these, and the classifier that they teach."""
    raw = images.clamp(0.05, 0.95).logit().requires_grad_()
    opt = torch.optim.Adam([raw], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    phi = None
    bar = tqdm(range(steps), desc="images", unit="step")
    for _ in bar:
        phi = fit(raw.sigmoid(), start=None if phi is None else phi.detach())
        value = loss(phi, *real)
        opt.zero_grad()
        value.backward()
        opt.step()
        schedule.step()
        bar.set_postfix_str(f"loss on real digits {value.item():.3f}")
    return raw.sigmoid().detach()


def tuned(images, real):
    """The classifier that these images teach with the decay that is best for the real digits."""
    return min((fit(images, decay) for decay in DECAYS), key=lambda phi: loss(phi, *real))


def draw(rows, path):
    fig, axes = plt.subplots(len(rows), 10, figsize=(10, 1.15 * len(rows)), layout="constrained")
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    gallery.save(fig, path)


def main():
    args = gallery.arguments(__doc__, "distillation", 100, "steps of the images")
    generator = torch.Generator().manual_seed(args.seed)
    real, test = gallery.digits(generator, REAL)
    of_class = [real[0][real[1] == c] for c in CLASSES]
    pick = [
        [torch.randint(len(x), (), generator=generator) for x in of_class] for _ in range(DRAWS)
    ]
    drawn = [torch.stack([x[i] for x, i in zip(of_class, p, strict=True)]) for p in pick]
    means = torch.stack([x.mean(0) for x in of_class])
    learned = learn(drawn[0], real, args.steps)

    random = torch.tensor([judge(tuned(images, real), *test) for images in drawn])
    print(f"\nAccuracy in % on {len(test[1])} test digits, trained on one image per class:\n")
    print(
        f"{'real images at random':24}{random.mean():6.1f}   {DRAWS} draws, best {random.max():.1f}"
    )
    print(f"{'class means':24}{judge(tuned(means, real), *test):6.1f}")
    print(f"{'learned images':24}{judge(fit(learned), *test):6.1f}")
    draw({"real": drawn[0], "mean": means, "learned": learned}, args.out / "distillation.png")


if __name__ == "__main__":
    main()
